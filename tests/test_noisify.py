"Noise schedules and targets against closed forms and diffusers; the latent cache against kills and mix-ups."
import errno, itertools, json, math, os, shutil, signal, threading
from dataclasses import replace
import diffusers, numpy as np, pytest, torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from flat import Flat
from latentdiff.autoencoder import KLAutoencoder
from latentdiff.core import UserError, artefact, made, preset
from latentdiff.data import cropped, from_uint8, open_images
from latentdiff.noisify import (SCHEDULES, TARGETS, TARGETS_THERE, TIMES, Latents, NoisifyCB, Process, make_latents, prefetch,
                                save_process, weights_hash)
from latentdiff.training import DeviceLoader

STEPS = 1000
K = torch.arange(STEPS)
t_of_step = Process('ddpm_linear').t_of_time
T = t_of_step(K)

def pair(dtype=torch.float32, seed=0): return torch.randn(2, STEPS, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def gap(a, b): return (a-b).abs().max().item()

# --- schedules -----------------------------------------------------------------------------------------------------

def test_links_in_place_of_the_process_lead_nowhere(tmp_path):
    "As a run folder from elsewhere may hold them: what they lead to stays as it is"
    (tmp_path/'other').mkdir()
    for k in ('config.json', 'scheduler_config.json'): (tmp_path/'other'/k).write_text('my letters')
    (tmp_path/'run'/'scheduler').mkdir(parents=True)
    (tmp_path/'run'/'process').symlink_to(tmp_path/'other')
    (tmp_path/'run'/'scheduler'/'scheduler_config.json').symlink_to(tmp_path/'other'/'scheduler_config.json')
    save_process(Process('ddpm_linear', 'eps', 'uniform'), tmp_path/'run')
    assert {o.read_text() for o in (tmp_path/'other').iterdir()} == {'my letters'}
    assert Process.load(tmp_path/'run'/'process') == Process('ddpm_linear', 'eps', 'uniform') and not (tmp_path/'run'/'process').is_symlink()

@pytest.mark.parametrize('ours,theirs', [('ddpm_linear', 'linear'), ('scaled_linear', 'scaled_linear'), ('ddpm_cosine', 'squaredcos_cap_v2')])
@pytest.mark.parametrize('cls', [DDPMScheduler, DDIMScheduler])
def test_add_noise_equals_diffusers_at_every_step(ours, theirs, cls):
    x, e = pair()
    sched = cls(beta_schedule=theirs)
    assert gap(Process(ours).add_noise(x, e, T), sched.add_noise(x, e, K)) < 1e-6
    assert gap(Process(ours, 'v').target_of(x, e, T), sched.get_velocity(x, e, K)) < 1e-6

def test_levels_can_be_asked_for_within_torch_func():
    "Where no number can be looked at; torch 2.6 cannot index within vmap"
    t, indexed = torch.linspace(.1, .9, 5), torch.__version__ >= '2.7'
    for p in (Process(), Process('edm', 'v'), Process('ddpm_linear', 'eps')):
        for f in (p.alpha, p.time_input, p.t_of) if indexed or not p.schedule.startswith('ddpm') else ():
            assert torch.allclose(torch.func.vmap(f)(t), f(t)), (p.schedule, f)
        assert torch.allclose(torch.compile(p.alpha, fullgraph=True, backend='eager')(t), p.alpha(t))
        assert p.alpha(torch.tensor(1 + 1e-7)).isfinite()   # rounding goes beyond


def test_beta_end_reaches_the_schedule():
    x, e = pair()
    assert gap(Process('ddpm_linear', beta_end=.01).add_noise(x, e, T), DDPMScheduler(beta_end=.01).add_noise(x, e, K)) < 1e-6

def test_cosine_equals_diffusers_in_float64():
    "alpha-bar_k = cos^2(pi (k+1)/2000); in float32 diffusers subtracts it from 1 and loses digits in the first ten steps"
    x, e = pair(torch.float64)
    p = Process('cosine', 'v')
    sched = p.to_diffusers()
    x32, e32 = x.float(), e.float()
    assert gap(p.add_noise(x32, e32, T)[10:], sched.add_noise(x32, e32, K)[10:]) < 5e-6
    sched.alphas_cumprod = (1-torch.tensor(sched.config.trained_betas, dtype=torch.float64)).cumprod(0)
    assert gap(p.add_noise(x, e, T.double()), sched.add_noise(x, e, K)) < 1e-6
    assert gap(p.target_of(x, e, T.double()), sched.get_velocity(x, e, K)) < 1e-6

def test_flow_equals_diffusers():
    x, e = pair()
    sched = Process().to_diffusers()
    assert isinstance(sched, FlowMatchEulerDiscreteScheduler)
    assert gap(Process().add_noise(x, e, sched.timesteps/1000), sched.scale_noise(x, sched.timesteps, e)) < 1e-6

def test_edm_equals_diffusers_euler_with_karras_sigmas():
    x, e = pair()
    p = Process('edm', 'v')
    sched = p.to_diffusers()
    sched.set_timesteps(STEPS)
    t = torch.arange(STEPS-1, -1, -1, dtype=torch.float64)/(STEPS-1)
    t[-1] = 1e-12 # t -> 0: at t = 0 exactly sigma is 0, as in Karras et al. 2022, eq. 5
    assert torch.allclose(p.sigma(t).float(), sched.sigmas[:-1], rtol=1e-6)
    ours, theirs = p.add_noise(x.double(), e.double(), t), sched.add_noise(x, e, sched.timesteps)
    assert ((ours-theirs).abs()/p.sigma(t).clamp(min=1)[:,None,None,None]).max() < 1e-6

def test_table_is_exact_on_the_grid_and_monotone_between():
    p = Process('ddpm_linear')
    a = p.alpha(torch.linspace(0, 1, 7001))
    assert (a.diff() < 0).all() and a[0] == 1
    assert gap(p.alpha(T), DDPMScheduler().alphas_cumprod.sqrt()) < 1e-6
    assert gap(p.time_input(t_of_step(K)), K.float()) < 1e-3

@pytest.mark.parametrize('s', SCHEDULES)
def test_ends(s):
    a, sg = Process(s).levels(torch.tensor([0., 1.]))
    assert (a[0], sg[0]) == (1, 0)
    want = dict(cosine=(0, 1), flow=(0, 1), edm=(1, 80), ddpm_linear=(.00635, .99998), scaled_linear=(.02708, .99963), ddpm_cosine=(0, 1), ddpm_linear_zero=(0, 1),
                scaled_linear_zero=(0, 1))[s]
    assert (a[1].item(), sg[1].item()) == pytest.approx(want, abs=1e-4)
    assert a[1] >= 0 and sg.isfinite().all()

def test_snr_closed_forms():
    t = torch.linspace(.01, .99, 99, dtype=torch.float64)
    assert torch.allclose(Process('cosine').log_snr(t), -2*torch.tan(t*math.pi/2).log(), rtol=1e-9)
    assert torch.allclose(Process('flow').log_snr(t), 2*((1-t)/t).log(), rtol=1e-9)
    sigma = (.002**(1/7) + t*(80**(1/7)-.002**(1/7)))**7
    assert torch.allclose(Process('edm').log_snr(t), -2*sigma.log(), rtol=1e-9)
    left = DDPMScheduler().alphas_cumprod.double()
    assert torch.allclose(Process('ddpm_linear').log_snr(T.double()), (left/(1-left)).log(), atol=1e-3)

@pytest.mark.parametrize('s', ['cosine', 'ddpm_linear', 'scaled_linear', 'ddpm_cosine', 'scaled_linear_zero'])
def test_variance_preserving(s):
    a, sg = Process(s).levels(torch.linspace(0, 1, 333))
    assert torch.allclose(a**2+sg**2, torch.ones(333), atol=1e-6)

@pytest.mark.parametrize('s', SCHEDULES)
def test_t_of_inverts_the_ratio(s):
    t = torch.linspace(.001, .999, 999)
    a, sg = Process(s).levels(t)
    assert gap(Process(s).t_of(sg/a), t) < 1e-5
    assert Process(s).t_of(torch.tensor([0.])).item() == 0

@pytest.mark.parametrize('s', SCHEDULES)
def test_all_schedules_are_one_line(s):
    "y = x/(alpha+sigma) is (1-tau) x0 + tau eps with tau = sigma/(alpha+sigma), whatever the schedule"
    x, e = torch.randn(2, 9, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    p, tau = Process(s), torch.linspace(.05, .95, 9)
    t = p.t_of(tau/(1-tau))
    total = sum(p.levels(t))[:,None,None,None]
    assert gap(p.add_noise(x, e, t)/total, Process().add_noise(x, e, tau)) < 1e-4

@pytest.mark.parametrize('s', SCHEDULES)
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_half_precision_levels_are_computed_in_float32(s, dtype):
    "0.3 is another number in half precision, but its levels are the float32 levels of that number"
    t = torch.tensor([.3, .7, 1.], dtype=dtype)
    for half, full in zip(Process(s).levels(t), Process(s).levels(t.float())): assert half.dtype == torch.float32 and torch.equal(half, full)
    x = torch.randn(3, 4, 2, 2, dtype=dtype)
    assert Process(s).add_noise(x, x, t).dtype == dtype and Process(s, 'v').x0_eps(x, x, t)[0].dtype == dtype

# --- what the network is told --------------------------------------------------------------------------------------

@pytest.mark.parametrize('s', ['ddpm_linear', 'scaled_linear', 'ddpm_cosine', 'cosine'])
@pytest.mark.parametrize('n', [100, 1000, 4000])
def test_time_input_is_exactly_diffusers_timestep(s, n):
    "Whole numbers, so that a table of embeddings could be asked"
    p, k = Process(s, 'v', steps=n), torch.arange(n)
    for t in ((k+1)/n, (k.double()+1)/n, p.t_of_time(k), torch.linspace(0, 1, n+1)[1:]):
        assert p.time_input(t).dtype == torch.float32 and torch.equal(p.time_input(t), k.float())
    assert torch.equal(p.time_input(torch.tensor([.5/n])), torch.tensor([-.5]))

def test_time_input_of_flow_and_edm_is_diffusers():
    flow = Process().to_diffusers()
    assert gap(Process().time_input(flow.sigmas), flow.timesteps) < 1e-4
    p = Process('edm', 'v')
    sched = p.to_diffusers()
    sched.set_timesteps(40)
    t = torch.linspace(1, 0, 40)
    assert gap(p.time_input(t), sched.timesteps) < 1e-5 # at t = 0 it is held at sigma_min
    assert gap(p.time_input(t), p.to_diffusers(diffusers.EDMEulerScheduler).precondition_noise(p.sigma(t.clamp(min=1e-9)))) < 1e-6

@pytest.mark.parametrize('s', SCHEDULES)
def test_t_of_time_inverts_time_input(s):
    p = Process(s, steps=250)
    t = torch.cat([torch.linspace(0, 1, 1001)[1:], torch.tensor([1e-7, 1e-5])])
    assert gap(p.t_of_time(p.time_input(t)), t) < 2e-6 and (p.t_of_time(p.time_input(t)) > 0).all()

def test_float64_in_float64_out():
    for s in SCHEDULES:
        a, sg = Process(s).levels(torch.tensor([.3], dtype=torch.float64))
        assert a.dtype == sg.dtype == torch.float64
        assert Process(s).alpha(.5).dtype == torch.float32 and Process(s).alpha(.5).ndim == 0

# --- targets -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('s', SCHEDULES)
@pytest.mark.parametrize('o', TARGETS)
def test_round_trip(s, o):
    x, e = pair(torch.float64)
    p, t = Process(s, o), T.double()
    x0, eps = p.x0_eps(p.target_of(x, e, t), p.add_noise(x, e, t), t)
    a, sg = p.levels(t)
    known = torch.ones(STEPS, dtype=bool)
    if o == 'eps': known = a >= 1e-4
    if o == 'x0': known = sg >= 1e-4
    assert known.sum() > 990
    assert gap(x0[known], x[known]) < 1e-7 and gap(eps[known], e[known]) < 1e-7
    assert x0.isfinite().all() and eps.isfinite().all()

@pytest.mark.parametrize('s', SCHEDULES)
@pytest.mark.parametrize('o', TARGETS)
def test_wrong_predictions_stay_finite_at_the_ends(s, o):
    x, e = pair()
    most = 2e5 if s == 'ddpm_cosine' else 2e3 # they end at alpha = 4.9e-5, which diffusers divides by, and 0.006
    for end in (0., 1.):
        x_t = Process(s, o).add_noise(x, e, end)
        for v in Process(s, o).x0_eps(torch.full_like(x, 3.), x_t, end): assert v.isfinite().all() and v.abs().max() < most

def test_what_cannot_be_known_is_the_mean():
    x, e = pair()
    x0, eps = Process('cosine', 'eps').x0_eps(e+.1, e, 1.)
    assert (x0 == 0).all() and torch.equal(eps, e+.1)
    x0, eps = Process('cosine', 'x0').x0_eps(x+.1, x, 0.)
    assert (eps == 0).all() and torch.equal(x0, x+.1)

def test_edm_v_is_karras_network_target():
    "Karras et al. 2022, eq. 8 with sigma_data = 1: F = (x0 - c_skip x_t)/c_out; our v is -F"
    x, e = pair(torch.float64)
    p, t = Process('edm', 'v'), T.double()
    s = p.sigma(t)[:,None,None,None]
    F = (x - (x+s*e)/(1+s**2)) * (1+s**2).sqrt()/s
    assert gap(p.target_of(x, e, t), -F) < 1e-8

def test_euler_and_flow_targets_agree_with_diffusers_step():
    "One step of diffusers' sampler with our target as its model output must land on the clean latent"
    x, e = (o[:4] for o in pair())
    for p in (Process(), Process('edm', 'v')):
        sched = p.to_diffusers()
        sched.set_timesteps(sigmas=[p.sigma(.6).item(), 0.] if p.schedule == 'edm' else [.6])
        if p.schedule == 'edm': sched.is_scale_input_called = True
        t = p.t_of(sched.sigmas[0]) if p.schedule == 'edm' else .6
        out = sched.step(p.target_of(x, e, t), sched.timesteps[0], p.add_noise(x, e, t))
        assert gap(out.prev_sample, x) < 1e-4

@pytest.mark.parametrize('o', ['eps', 'x0', 'v'])
def test_ddim_believes_our_targets(o):
    x, e = (v[:4] for v in pair())
    for s in ('cosine', 'ddpm_linear', 'scaled_linear', 'ddpm_cosine'):
        p = Process(s, o)
        if o not in TARGETS_THERE.get(s, (o,)): continue # refused: see below
        sched = p.to_diffusers(DDIMScheduler)
        sched.set_timesteps(STEPS)
        out = sched.step(p.target_of(x, e, t_of_step(400)), 400, p.add_noise(x, e, t_of_step(400)))
        assert gap(out.pred_original_sample, x) < 1e-4

def test_flat_latents():
    x, e = torch.randn(2, 5, 16)
    t = torch.rand(5)
    x_t, _, target = Process().noisify(x, t, e)
    assert torch.allclose(x_t, (1-t)[:,None]*x + t[:,None]*e) and torch.allclose(target, e-x)

# --- conversion ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('p', [Process(), Process('cosine', 'v'), Process('cosine', 'x0', 'uniform'), Process('ddpm_linear', 'x0', beta_end=.012),
                               Process('ddpm_cosine', 'v'), Process('edm', 'v', 'edm', sigma_max=50.),
                               Process('scaled_linear', 'eps', beta_start=.00085, beta_end=.012), Process('flow', steps=500),
                               Process('ddpm_linear', 'eps', steps=4000), Process('cosine', 'v', steps=50)])
def test_diffusers_round_trip(p):
    sched = p.to_diffusers()
    assert Process.from_diffusers(sched, p.times) == p
    assert not sched.config.get('clip_sample')
    again = type(sched).from_config(json.loads(sched.to_json_string()))
    assert Process.from_diffusers(again, p.times) == p

def test_other_classes_of_the_family():
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler):
        s = 'cosine' if cls is DDIMScheduler else 'ddpm_cosine' # the other one starts with NaN where alpha is 0
        sched = Process(s, 'v').to_diffusers(cls)
        assert type(sched) is cls and sched.config.prediction_type == 'v_prediction' and Process.from_diffusers(sched, 'uniform').schedule == s

PLAIN = dict(clip_sample=False, timestep_spacing='trailing')

@pytest.mark.parametrize('sched', [DDPMScheduler(trained_betas=[.01]*1000, **PLAIN), DDPMScheduler(rescale_betas_zero_snr=True, **PLAIN),
    DDPMScheduler(beta_schedule='sigmoid', **PLAIN), DDPMScheduler(thresholding=True, **PLAIN), DDPMScheduler(timestep_spacing='trailing'),
    DDPMScheduler(clip_sample=False), DDPMScheduler(variance_type='learned_range', **PLAIN),
    DDIMScheduler(set_alpha_to_one=False, **PLAIN), EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing='trailing'),
    EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=.002, sigma_max=80., timestep_spacing='trailing', timestep_type='continuous'),
    EulerDiscreteScheduler(prediction_type='v_prediction', timestep_type='continuous', timestep_spacing='trailing'),
    DPMSolverMultistepScheduler(use_lu_lambdas=True, timestep_spacing='trailing'), diffusers.LCMScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), FlowMatchEulerDiscreteScheduler(shift_terminal=.1),
    diffusers.FlowMatchHeunDiscreteScheduler(shift=2.), diffusers.EDMEulerScheduler(), diffusers.EDMEulerScheduler(sigma_data=1.),
    diffusers.EDMDPMSolverMultistepScheduler(sigma_data=1., prediction_type='v_prediction', thresholding=True),
    diffusers.EDMEulerScheduler(sigma_data=1., prediction_type='v_prediction', sigma_schedule='exponential'),
    diffusers.ScoreSdeVeScheduler(), diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=False, **PLAIN)],
    ids=lambda s: type(s).__name__)
def test_no_counterpart_is_refused(sched):
    with pytest.raises(UserError, match='cannot convert') as e: Process.from_diffusers(sched)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('p', [Process('flow', 'eps'), Process('cosine', 'velocity'), Process('edm', 'velocity'), Process('edm', 'v', rho=5.),
                               Process('cosine', 'eps'), Process('edm', 'eps'), Process('edm', 'x0')])
def test_what_diffusers_cannot_express_is_refused(p):
    with pytest.raises(UserError, match='diffusers') as e: p.to_diffusers()
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('p,cls', [(Process('cosine', 'v'), DPMSolverMultistepScheduler), (Process('cosine', 'v'), EulerDiscreteScheduler),
    (Process('edm', 'v'), DDIMScheduler), (Process('ddpm_linear', 'v'), diffusers.EDMEulerScheduler), (Process(), diffusers.EDMEulerScheduler),
    (Process(), DDPMScheduler), (Process('ddpm_linear', 'eps'), FlowMatchEulerDiscreteScheduler)])
def test_a_class_that_cannot_is_refused(p, cls):
    with pytest.raises(UserError, match=f'cannot .*{cls.__name__}'): p.to_diffusers(cls)

@pytest.mark.parametrize('cls', [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_edm_schedulers_both_ways(cls):
    p = Process('edm', 'v', 'uniform', sigma_min=.03, sigma_max=15., rho=5.)
    sched = p.to_diffusers(cls)
    assert type(sched) is cls and sched.config.sigma_data == 1 and Process.from_diffusers(sched) == p
    sched.set_timesteps(9)
    assert torch.allclose(p.t_of_time(sched.timesteps), torch.linspace(1, 0, 9), atol=1e-5)

@pytest.mark.parametrize('s', SCHEDULES)
def test_conversion_is_exact_in_their_own_loop(s):
    "From their `model(x, k)` we read their numbers: what the network is told, and every step's alpha and sigma"
    p = Process(s, TARGETS_THERE.get(s, ('v',))[-1], steps=400)
    sched = p.to_diffusers()
    if s == 'edm': return # has no steps; see test_edm_schedulers_both_ways
    left = 1-sched.timesteps/400 if s == 'flow' else sched.alphas_cumprod.sqrt()
    times = sched.timesteps if s == 'flow' else torch.arange(400)
    assert gap(p.alpha(p.t_of_time(times)), left) < 2e-6

def test_config_round_trip(tmp_path):
    p = Process('ddpm_linear', 'x0', 'edm', beta_end=.015)
    p.save(tmp_path/'process')
    assert Process.load(tmp_path/'process') == p
    assert [f.name for f in (tmp_path/'process').iterdir()] == ['config.json']

def test_save_process_leaves_no_scheduler_of_another_process(tmp_path):
    for p, there in ((Process(), True), (Process('edm', 'v'), True), (Process('flow', 'eps'), False)):
        save_process(p, tmp_path)
        assert Process.load(tmp_path/'process') == p and (tmp_path/'scheduler').exists() is there
        if there: assert json.loads((tmp_path/'scheduler'/'scheduler_config.json').read_text())['_class_name'] == type(p.to_diffusers()).__name__

@pytest.mark.parametrize('kw', [dict(schedule='cosin'), dict(target='epsilon'), dict(times='logit')])
def test_misspelt_names(kw):
    with pytest.raises(UserError, match='choose one of'): Process(**kw)

def test_bad_process_folders(tmp_path):
    with pytest.raises(UserError, match='no noise process'): Process.load(tmp_path)
    (tmp_path/'config.json').write_text('{"_class_name": "UNet", "widths": [32]}')
    with pytest.raises(UserError, match='not the settings'): Process.load(tmp_path)

# --- times and seeds -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('s', SCHEDULES)
@pytest.mark.parametrize('o', TIMES)
def test_times(s, o):
    t = Process(s, times=o).sample_t(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and (t > 0).all() and (t <= 1).all()
    if o == 'uniform': assert t.mean().item() == pytest.approx(.5, abs=.01)
    if o == 'logit_normal': assert torch.logit(t).mean().item() == pytest.approx(0, abs=.03) and torch.logit(t).std().item() == pytest.approx(1, abs=.03)

def test_edm_times_are_log_normal():
    p = Process('edm', times='edm')
    logs = p.sigma(p.sample_t(50_000, torch.Generator().manual_seed(0))).log()
    assert logs.mean().item() == pytest.approx(-1.2+math.log(2), abs=.02) and logs.std().item() == pytest.approx(1.2, abs=.02)

def test_noisify_repeats_from_a_seed():
    x0 = torch.randn(8, 4, 4, 4)
    one, two, other = (Process().noisify(x0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(one[0], other[0])

def test_scale_input_has_unit_std():
    p, x0 = Process('edm', 'v'), torch.randn(512, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0., .2, .6, 1.):
        x_t, _, target = p.noisify(x0, torch.full((512,), t), generator=torch.Generator().manual_seed(1))
        assert p.scale_input(x_t, t).std().item() == pytest.approx(1, abs=.01) and target.std().item() == pytest.approx(1, abs=.01)
    assert Process('cosine').scale_input(x0, .5) is x0

# --- callback ------------------------------------------------------------------------------------------------------

class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.w, self.calls = torch.nn.Parameter(torch.zeros(1)), []
    def forward(self, x, t, cond=None):
        self.calls.append((self.training, x.detach().clone(), t, cond))
        return x*self.w

def fit(labels=(), process=Process(), epochs=2, seed=0):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    z = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    loader = lambda shuffle: DeviceLoader(z, *labels, bs=32, shuffle=shuffle, seed=0, device='cpu')
    learn = Learner(DataLoaders(loader(True), loader(False)), Net(), torch.nn.MSELoss(), cbs=NoisifyCB(process, seed))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn

def test_callback_validation_noise_is_fixed_and_training_noise_is_not():
    calls = fit().model.calls
    valid, train = ([c for c in calls if c[0] is o] for o in (False, True))
    assert len(valid) == len(train) == 4
    for a, b in zip(valid[:2], valid[2:]): assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    assert not torch.equal(train[0][2], train[2][2])
    assert not torch.equal(valid[0][2], valid[1][2]), 'each batch has its own noise'

def test_callback_tells_the_network_diffusers_time():
    for p in (Process(), Process('ddpm_linear', 'eps', 'uniform'), Process('edm', 'v', 'edm')):
        for _, x, time, _ in fit(process=p).model.calls:
            t = p.t_of_time(time)
            assert (t > 0).all() and (t <= 1).all() and gap(p.time_input(t), time) < 2e-3
        assert {'flow': 100, 'ddpm_linear': 100, 'edm': -1}[p.schedule] < time.max() < {'edm': 1.1}.get(p.schedule, 1001)

def test_noise_of_a_step_does_not_depend_on_where_the_fit_began():
    "A training that goes on at step 5 has the noise it would have had"
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from latentdiff.training import StepByStep
    z = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    def run(start):
        dl = DeviceLoader(z, bs=32, shuffle=True, seed=0, device='cpu')
        learn = Learner(DataLoaders(dl, DeviceLoader(z, bs=32, device='cpu')), Net(), torch.nn.MSELoss(), cbs=NoisifyCB(Process(), 3))
        each = StepByStep(8, 1e-3, 0, 1)
        each.k = start
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=each)
        return [c for c in learn.model.calls if c[0]]
    whole, rest = run(0), run(5)
    assert len(whole) == 8 and len(rest) == 3
    for a, b in zip(whole[5:], rest): assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])

def test_callback_repeats_from_a_seed():
    one, two, other = fit(seed=5), fit(seed=5), fit(seed=6)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one.model.calls, two.model.calls))
    assert not torch.equal(one.model.calls[0][1], other.model.calls[0][1])

def test_callback_passes_labels_and_scales_edm():
    calls = fit((torch.arange(64),), Process('edm', 'v')).model.calls
    assert all(c[3].dtype == torch.long and len(c[3]) == len(c[1]) for c in calls)
    assert torch.cat([c[1] for c in calls]).std() < 1.1
    assert all(c[3] is None for c in fit().model.calls)

# --- the latent cache ----------------------------------------------------------------------------------------------

def small_ae(seed=0, **kw):
    torch.manual_seed(seed)
    return KLAutoencoder(3, (8, 8), **kw).eval()

@pytest.fixture(scope='module')
def images(): return open_images('rooms', 16, 80)

class Fails:
    "Images that break when image `at` is asked for"
    def __init__(self, images, at): self.images, self.at = images, at
    def __getattr__(self, k): return getattr(self.images, k)
    def __len__(self): return len(self.images)
    def read(self, idxs):
        if self.at in idxs: raise OSError('power cut')
        return self.images.read(idxs)

P = preset('tiny')
def cache(ae, images, folder, **kw): return make_latents(folder, images, ae, P, **kw)

def test_latents_equal_encode(images, tmp_path):
    ae = small_ae()
    ae.set_scale([.1]*4, [.5]*4)
    z, x = cache(ae, images, tmp_path), from_uint8(images.pixels())
    with torch.no_grad(): mean, mirrored = ae.encode(x), ae.encode(x.flip(-1))
    assert torch.allclose(z.tensor('all', 'cpu'), mean, atol=2e-3, rtol=1e-3)
    both = torch.cat([mean[images.train_idxs], mirrored[images.train_idxs]])
    assert torch.allclose(z.tensor('train', 'cpu')[:len(both)], both, atol=2e-3, rtol=1e-3)
    assert torch.allclose(z.tensor('valid', 'cpu'), mean[images.valid_idxs], atol=2e-3, rtol=1e-3)
    assert z.mean.dtype == np.float16 and isinstance(z.mean, np.memmap) and len(z) == 80

def test_split_labels_and_names_follow(images, tmp_path):
    z = cache(small_ae(), images, tmp_path, flip=False)
    assert z.names == images.names and torch.equal(z.labels, images.labels) and z.captions == images.captions
    assert torch.equal(z.train_idxs, images.train_idxs) and torch.equal(z.valid_idxs, images.valid_idxs)
    assert torch.equal(z.tensor('train', 'cpu')[:len(images.train_idxs)], z.tensor('all', 'cpu')[images.train_idxs])   # then crops of few
    assert z.mirrored is None and sorted(f.name for f in z.folder.glob('*.json')) == ['made.json', 'manifest.json']
    assert z.folder == tmp_path/'latents' and Latents(z.folder).names == z.names

@pytest.mark.parametrize('flip,rows', [(None, 8), (True, 8), (False, 4)])
def test_rows_of_a_split_name_their_images(images, tmp_path, flip, rows):
    z = cache(small_ae(), images, tmp_path, flip=flip)
    for split in ('train', 'valid', 'all'): assert len(z.tensor(split, 'cpu')) == len(z.idxs(split)) == len(z.labels[z.idxs(split)])
    assert torch.equal(z.idxs('train'), images.train_idxs.repeat(rows))
    assert torch.equal(z.tensor('valid', 'cpu'), z.tensor('all', 'cpu')[z.idxs('valid')])

def test_of_few_pictures_crops_are_encoded(images, tmp_path, monkeypatch):
    "Three of each that is trained on and of its mirror image, which number and seed decide; of the held-out ones none is shown."
    ae, x, train = small_ae(), from_uint8(images.pixels()), images.train_idxs
    some = [x, *(torch.cat([cropped(x[i:i+1], 1, 5, 500*k + i) for i in range(80)]) for k in range(3))]
    with torch.no_grad(): want = torch.cat([ae.encode(o)[train] for v in some for o in (v, v.flip(-1))])
    z = cache(ae, images, tmp_path/'few', seed=5)
    assert torch.allclose(z.tensor('train', 'cpu'), want, atol=2e-3, rtol=1e-3) and torch.equal(z.idxs('train'), train.repeat(8))
    assert 'each in 8 views' in repr(z) and made(z.folder)['settings'] == dict(mirrored=True, crops=3, leeway=1, seed=5)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(z.tensor('train', 'cpu').chunk(8), 2))
    with pytest.raises(UserError, match='seed 5, not 6'): cache(ae, images, tmp_path/'few', seed=6)
    monkeypatch.setattr('latentdiff.data.FEW', 80)
    enough = cache(ae, images, tmp_path/'enough', seed=5)
    assert len(enough.views) == 2 and made(enough.folder)['settings'] == dict(mirrored=True)
    assert all(torch.equal(z.tensor(o, 'cpu'), enough.tensor(o, 'cpu')) for o in ('valid', 'all'))

def test_latents_of_before_there_were_crops_stay_as_they_are(images, tmp_path, monkeypatch):
    monkeypatch.setattr('latentdiff.data.FEW', 80)
    before = cache(small_ae(), images, tmp_path)
    monkeypatch.undo()
    after = cache(small_ae(), Fails(images, 0), tmp_path, seed=7) # would raise if it read an image
    assert len(after.views) == 2 and after.fingerprint == before.fingerprint
    shutil.rmtree(tmp_path/'latents')   # lost, as a message advises: the denoiser that was trained on them stays what it is
    artefact(tmp_path/'unet', lambda o: {}, dict(latents=before.fingerprint), {})
    again = cache(small_ae(), images, tmp_path, seed=7)
    assert len(again.views) == 2 and again.fingerprint == before.fingerprint

def test_grey_pictures_are_not_mirrored(tmp_path):
    torch.manual_seed(0)
    grey = open_images('rooms', 16, 20, channels=1)
    assert cache(KLAutoencoder(1, (8, 8)).eval(), grey, tmp_path).mirrored is None

def same_files(a, b):
    names = [sorted(f.name for f in (o/'latents').glob('*.f16')) for o in (a, b)]
    assert len(names[0]) == 8 and names[0] == names[1]
    for f in names[0]: assert (a/'latents'/f).read_bytes() == (b/'latents'/f).read_bytes()
    assert json.loads((a/'latents'/'manifest.json').read_text()) == json.loads((b/'latents'/'manifest.json').read_text())

@pytest.mark.parametrize('kw', [dict(schedule='edm', rho=.001), dict(schedule='edm', sigma_min=80.), dict(schedule='ddpm_linear_zero', target='v', beta_end=.9),
    dict(schedule='ddpm_linear', target='v', beta_end=.9), dict(schedule='ddpm_linear', target='v', beta_start=1e-9, beta_end=1e-9)], ids=str)
def test_noise_that_does_not_grow_is_refused(kw, tmp_path):
    "In float32 such levels are one and the same, and samplers divide by what lies between; a file that says so is not read either"
    with pytest.raises(UserError, match='it does not grow|rho is') as e: Process(**kw)
    assert '\n' not in str(e.value)
    Process().save(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(json.loads((tmp_path/'config.json').read_text()) | kw))
    with pytest.raises(UserError, match='it does not grow|rho is'): Process.load(tmp_path)

@pytest.mark.parametrize('kw', [dict(schedule='edm', rho=1.), dict(schedule='edm', sigma_max=1e6), dict(schedule='ddpm_linear', target='eps', beta_end=.9, steps=10), dict(schedule='ddpm_linear', beta_end=.1),
    dict(schedule='ddpm_cosine', steps=2), dict(schedule='ddpm_linear', steps=1), dict(schedule='scaled_linear_zero', target='v', steps=4000)], ids=str)
def test_noise_that_grows_is_taken(kw): assert Process(**kw).levels(torch.rand(5))[0].isfinite().all()

def test_resumes_bit_for_bit_after_an_error(images, tmp_path):
    ae = small_ae()
    with pytest.raises(OSError): cache(ae, Fails(images, 70), tmp_path/'cut')
    assert json.loads((tmp_path/'cut'/'.latents.making'/'done.json').read_text())['done'] == 64
    with pytest.raises(UserError, match='no latents in'): Latents(tmp_path/'cut'/'latents')
    cache(ae, Fails(images, 63), tmp_path/'cut') # would raise if it read the first batch again
    cache(ae, images, tmp_path/'whole')
    same_files(tmp_path/'cut', tmp_path/'whole')

@pytest.mark.parametrize('what', ['latents.f16', 'mirrored.f16', '{"done": 64}', '{"done": 64.0}', '{"done": true}', '{"done": null}', '{"done": -1}', '{"done": 99999}', 'a folder done.json', 'a folder latents.f16'])
def test_what_has_changed_is_encoded_again(images, tmp_path, what):
    "A bit of the rows that were done, or an older note, without checksums, or one that cannot be right"
    with pytest.raises(OSError): cache(small_ae(), Fails(images, 70), tmp_path/'cut')
    work = tmp_path/'cut'/'.latents.making'
    f = work/(what if what.endswith('.f16') and ' ' not in what else 'latents.f16')
    if what[0] == '{': (work/'done.json').write_text(what)
    f.write_bytes(bytes([(b := f.read_bytes())[0] ^ 1]) + b[1:])
    if what.startswith('a folder'):
        (work/what.split()[-1]).unlink()
        (work/what.split()[-1]).mkdir()
    for name in ('cut', 'whole'): cache(small_ae(), images, tmp_path/name)
    same_files(tmp_path/'cut', tmp_path/'whole')

@pytest.mark.parametrize('keep', [None, 0, 1000])
def test_what_is_not_all_there_is_encoded_again(images, tmp_path, monkeypatch, keep):
    "A folder that was copied while it was filled: rows of zeros are no latents"
    with pytest.raises(OSError): cache(small_ae(), Fails(images, 70), tmp_path/'cut')
    f = tmp_path/'cut'/'.latents.making'/'latents.f16'
    if keep is None: f.unlink()
    else: os.truncate(f, keep)
    def dies(path, size):
        if path != f: raise OSError
        with open(path, 'a'): os.truncate(path, size)
    with monkeypatch.context() as m, pytest.raises(OSError):   # when it has as many bytes as it shall have
        m.setattr('latentdiff.noisify.reserve', dies)
        cache(small_ae(), images, tmp_path/'cut')
    for name in ('cut', 'whole'): cache(small_ae(), images, tmp_path/name)
    same_files(tmp_path/'cut', tmp_path/'whole')

def test_a_disk_without_memory_maps_is_one_line(images, tmp_path, monkeypatch):
    "Such as a folder that a virtual machine shares"
    def none(*args, **kw): raise OSError(errno.ENODEV, 'No such device')
    monkeypatch.setattr(np, 'memmap', none)
    with pytest.raises(UserError, match='latents.making cannot be written .No such device.: go to another disk') as e: cache(small_ae(), images, tmp_path)
    assert '\n' not in str(e.value)

def test_what_was_begun_with_another_autoencoder_is_thrown_away(images, tmp_path):
    with pytest.raises(OSError): cache(small_ae(1), Fails(images, 70), tmp_path/'cut')
    for name in ('cut', 'whole'): cache(small_ae(), images, tmp_path/name)
    same_files(tmp_path/'cut', tmp_path/'whole')

CHILD = """
import os, sys, torch
from dataclasses import replace
torch.set_num_threads(1)
from latentdiff import noisify
from latentdiff.core import preset
from latentdiff.data import open_images
from latentdiff.autoencoder import KLAutoencoder
noisify._encode_rest.__defaults__ = (0.,)  # a checkpoint after every batch
torch.manual_seed(0)
ae, images = KLAutoencoder(3, (8, 8)).eval(), open_images('rooms', 16, 80)
write = noisify.write_json
def dies(path, d, **kw):
    write(path, d, **kw)
    if d.get('done', 0) >= 8: os.kill(os.getpid(), 9)
noisify.write_json = dies
noisify.make_latents(sys.argv[1], images, ae, replace(preset('tiny'), bs=4))
"""

@pytest.fixture
def one_thread():
    "Sums in the same order, as in the child process"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_resumes_bit_for_bit_after_kill_9(images, tmp_path, one_thread, server):
    child = server.code(CHILD, tmp_path/'cut')
    f = tmp_path/'cut'/'.latents.making'/'done.json'
    assert child.rc == -signal.SIGKILL
    assert 8 <= json.loads(f.read_text())['done'] < 80
    for name in ('cut', 'whole'): make_latents(tmp_path/name, images, small_ae(), replace(P, bs=4))
    same_files(tmp_path/'cut', tmp_path/'whole')

def test_a_finished_cache_is_not_encoded_again(images, tmp_path):
    ae = small_ae()
    cache(ae, images, tmp_path)
    cache(ae, Fails(images, 0), tmp_path) # would raise if it read an image

def test_refuses_to_mix(images, tmp_path):
    ae = small_ae()
    cache(ae, images, tmp_path)
    before = (tmp_path/'latents'/'latents.f16').read_bytes()
    rescaled = small_ae()
    rescaled.set_scale([0.]*4, [.5]*4)
    for other, data, what in ((small_ae(1), images, 'other autoencoder'), (rescaled, images, 'other autoencoder'),
                              (ae, open_images('rooms', 16, 60), 'other images'), (ae, open_images('rooms', 16, 80, seed=1), 'other images')):
        with pytest.raises(UserError, match=what) as e: cache(other, data, tmp_path)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='mirrored'): cache(ae, images, tmp_path, flip=False)
    prints = {cache(*args, tmp_path/str(i), flip=False).fingerprint for i, args in enumerate(((ae, images), (small_ae(1), images), (ae, images)))}
    assert len(prints) == 2
    assert (tmp_path/'latents'/'latents.f16').read_bytes() == before
    assert made(tmp_path/'latents')['parents'] == dict(images=images.fingerprint, autoencoder=weights_hash(ae))

def test_broken_caches(images, tmp_path):
    with pytest.raises(UserError, match='no latents in'): Latents(tmp_path/'nowhere')
    cache(small_ae(), images, tmp_path)
    f = tmp_path/'latents'/'latents.f16'
    f.write_bytes(f.read_bytes()[:-2])
    with pytest.raises(UserError, match='wrong size'): Latents(tmp_path/'latents')
    f.unlink()
    with pytest.raises(UserError, match='missing'): cache(small_ae(), images, tmp_path)

def test_latents_that_float16_cannot_hold(images, tmp_path):
    ae = small_ae()
    ae.set_scale([0.]*4, [1e-9]*4)
    with pytest.raises(UserError, match='beyond float16'): cache(ae, images, tmp_path)

def test_flat_latents_are_cached(images, tmp_path):
    torch.manual_seed(0)
    ae = Flat(16, 12).eval()
    z = cache(ae, images, tmp_path)
    assert z.tensor('all', 'cpu').shape == (80, *ae.latent_shape(16))

def test_hash_sees_weights_and_scale():
    a, b, c = small_ae(), small_ae(), small_ae()
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad(): next(b.parameters()).view(-1)[0] += 1e-6
    c.set_scale([0.]*4, [1.01]*4)
    assert len({weights_hash(o) for o in (a, b, c)}) == 3

def test_prefetch_gives_every_batch_in_order(images):
    got = list(prefetch(images, range(0, 80, 32), 32))
    assert [i for i, _ in got] == [0, 32, 64]
    assert torch.equal(torch.cat([x for _, x in got]), images.pixels())

def test_prefetch_overlaps():
    "While a batch is worked on, the next ones are being read: nobody waits for a read that has not begun"
    begun = [threading.Event() for _ in range(8)]
    class Eager:
        def __len__(self): return 8
        def read(self, idxs):
            begun[idxs[0]].set()
            return torch.zeros(len(idxs), 1, 2, 2)
    for i, _ in prefetch(Eager(), range(8), 1): assert begun[min(i + 1, 7)].wait(60)
