"Noise schedules and targets against closed forms and diffusers; the latent cache against kills and mix-ups."
import json, math, signal, subprocess, sys, time
import numpy as np, pytest, torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from latentdiff.autoencoder import FlatAutoencoder, KLAutoencoder
from latentdiff.data import DeviceLoader, UserError, from_uint8, open_images
from latentdiff.noisify import (SCHEDULES, STEPS, TARGETS, TIMES, NoisifyCB, Process, encode_latents, open_latents, posterior,
                                prefetch, step_of_t, t_of_step, weights_hash)

K = torch.arange(STEPS)
T = t_of_step(K)

def pair(dtype=torch.float32, seed=0): return torch.randn(2, STEPS, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def gap(a, b): return (a-b).abs().max().item()

# --- schedules -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ours,theirs', [('ddpm_linear', 'linear'), ('ddpm_cosine', 'squaredcos_cap_v2')])
@pytest.mark.parametrize('cls', [DDPMScheduler, DDIMScheduler])
def test_add_noise_equals_diffusers_at_every_step(ours, theirs, cls):
    x, e = pair()
    sched = cls(beta_schedule=theirs)
    assert gap(Process(ours).add_noise(x, e, T), sched.add_noise(x, e, K)) < 1e-6
    assert gap(Process(ours, 'v').target_of(x, e, T), sched.get_velocity(x, e, K)) < 1e-6

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
    assert gap(step_of_t(t_of_step(K)), K.float()) < 1e-3

@pytest.mark.parametrize('s', SCHEDULES)
def test_ends(s):
    a, sg = Process(s).levels(torch.tensor([0., 1.]))
    assert (a[0], sg[0]) == (1, 0)
    want = dict(cosine=(0, 1), flow=(0, 1), edm=(1, 80), ddpm_linear=(.00635, .99998), ddpm_cosine=(0, 1))[s]
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

@pytest.mark.parametrize('s', ['cosine', 'ddpm_linear', 'ddpm_cosine'])
def test_variance_preserving(s):
    a, sg = Process(s).levels(torch.linspace(0, 1, 333))
    assert torch.allclose(a**2+sg**2, torch.ones(333), atol=1e-6)

@pytest.mark.parametrize('s', SCHEDULES)
def test_t_of_inverts_the_ratio(s):
    t = torch.linspace(.001, .999, 999)
    a, sg = Process(s).levels(t)
    assert gap(Process(s).t_of(sg/a), t) < 1e-5
    assert Process(s).t_of(torch.tensor([0.])).item() == 0

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
    for end in (0., 1.):
        x_t = Process(s, o).add_noise(x, e, end)
        for v in Process(s, o).x0_eps(torch.full_like(x, 3.), x_t, end): assert v.isfinite().all() and v.abs().max() < 2e3 # ddpm_linear ends at alpha = 0.006

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
    for p in (Process(), Process('edm', 'v'), Process('edm', 'eps')):
        sched = p.to_diffusers()
        sched.set_timesteps(sigmas=[p.sigma(.6).item(), 0.] if p.schedule == 'edm' else [.6])
        if p.schedule == 'edm': sched.is_scale_input_called = True
        t = p.t_of(sched.sigmas[0]) if p.schedule == 'edm' else .6
        out = sched.step(p.target_of(x, e, t), sched.timesteps[0], p.add_noise(x, e, t))
        assert gap(out.prev_sample, x) < 1e-4

@pytest.mark.parametrize('o', ['eps', 'x0', 'v'])
def test_ddim_believes_our_targets(o):
    x, e = (v[:4] for v in pair())
    for s in ('cosine', 'ddpm_linear', 'ddpm_cosine'):
        p = Process(s, o)
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

@pytest.mark.parametrize('p', [Process(), Process('cosine', 'v'), Process('cosine', 'eps', 'uniform'), Process('ddpm_linear', 'x0', beta_end=.012),
                               Process('ddpm_cosine', 'v'), Process('edm', 'eps', 'edm', sigma_max=50.)])
def test_diffusers_round_trip(p):
    sched = p.to_diffusers()
    assert Process.from_diffusers(sched, p.times) == p
    assert not sched.config.get('clip_sample')
    again = type(sched).from_config(json.loads(sched.to_json_string()))
    assert Process.from_diffusers(again, p.times) == p

def test_other_classes_of_the_family():
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler):
        sched = Process('cosine', 'v').to_diffusers(cls)
        assert type(sched) is cls and sched.config.prediction_type == 'v_prediction' and Process.from_diffusers(sched, 'uniform').schedule == 'cosine'

@pytest.mark.parametrize('sched', [DDPMScheduler(beta_schedule='scaled_linear'), DDPMScheduler(100), DDPMScheduler(trained_betas=[.01]*1000),
                                   DDPMScheduler(rescale_betas_zero_snr=True)])
def test_no_counterpart_is_refused(sched):
    with pytest.raises(UserError, match='cannot convert'): Process.from_diffusers(sched)

@pytest.mark.parametrize('p', [Process('flow', 'eps'), Process('cosine', 'velocity'), Process('edm', 'velocity'), Process('edm', 'v', rho=5.)])
def test_what_diffusers_cannot_express_is_refused(p):
    with pytest.raises(UserError, match='diffusers'): p.to_diffusers()

def test_config_round_trip(tmp_path):
    p = Process('ddpm_linear', 'x0', 'edm', beta_end=.015)
    p.save(tmp_path/'process')
    assert Process.load(tmp_path/'process') == p
    assert [f.name for f in (tmp_path/'process').iterdir()] == ['config.json']

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
    def pixels(self, idxs, workers=None):
        if self.at in idxs: raise OSError('power cut')
        return self.images.pixels(idxs, workers)

def test_latents_equal_encode(images, tmp_path):
    ae = small_ae()
    ae.set_scale([.1]*4, [.5]*4)
    z = encode_latents(ae, images, tmp_path/'z', bs=32, posterior_std=True)
    with torch.no_grad(): mean, std = posterior(ae, from_uint8(images.pixels()))
    assert torch.allclose(mean, ae.encode(from_uint8(images.pixels())))
    assert torch.allclose(z.tensor('all', 'cpu'), mean, atol=2e-3, rtol=1e-3)
    assert torch.allclose(torch.tensor(np.array(z.std)).float(), std, atol=2e-3, rtol=1e-3)
    assert z.mean.dtype == np.float16 and isinstance(z.mean, np.memmap) and len(z) == 80

def test_split_labels_and_names_follow(images, tmp_path):
    z = encode_latents(small_ae(), images, tmp_path/'z')
    assert z.names == images.names and torch.equal(z.labels, images.labels) and z.captions == images.captions
    assert torch.equal(z.train_idxs, images.train_idxs) and torch.equal(z.valid_idxs, images.valid_idxs)
    assert torch.equal(z.tensor('train', 'cpu'), z.tensor('all', 'cpu')[images.train_idxs])
    assert z.std is None and sorted(f.name for f in (tmp_path/'z').iterdir()) == ['latents.f16', 'manifest.json']

def test_resumes_bit_for_bit_after_an_error(images, tmp_path):
    ae = small_ae()
    with pytest.raises(OSError): encode_latents(ae, Fails(images, 50), tmp_path/'cut', bs=16, posterior_std=True)
    assert json.loads((tmp_path/'cut'/'manifest.json').read_text())['done'] == 48
    with pytest.raises(UserError, match='only 48 of 80'): open_latents(tmp_path/'cut')
    encode_latents(ae, images, tmp_path/'cut', bs=16, posterior_std=True)
    encode_latents(ae, images, tmp_path/'whole', bs=16, posterior_std=True)
    for f in ('latents.f16', 'std.f16'): assert (tmp_path/'cut'/f).read_bytes() == (tmp_path/'whole'/f).read_bytes()
    assert (tmp_path/'cut'/'manifest.json').read_bytes() == (tmp_path/'whole'/'manifest.json').read_bytes()

CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from latentdiff import noisify
from latentdiff.data import open_images
from latentdiff.autoencoder import KLAutoencoder
noisify._encode_rest.__defaults__ = (0.,)  # a checkpoint after every batch
torch.manual_seed(0)
ae, images = KLAutoencoder(3, (8, 8)).eval(), open_images('rooms', 16, 80)
read = images._read
def slowly(idxs): time.sleep(.3); return read(idxs)
images._read = slowly
noisify.encode_latents(ae, images, sys.argv[1], bs=4)
"""

@pytest.fixture
def one_thread():
    "Sums in the same order, as in the child process"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_resumes_bit_for_bit_after_kill_9(images, tmp_path, one_thread):
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'cut')], stdout=subprocess.DEVNULL)
    f, done, until = tmp_path/'cut'/'manifest.json', 0, time.time()+120
    while done < 8 and time.time() < until and child.poll() is None:
        time.sleep(.05)
        done = json.loads(f.read_text())['done'] if f.is_file() else 0 # never half a file: it is replaced in one step
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 8 <= json.loads(f.read_text())['done'] < 80
    for name in ('cut', 'whole'): encode_latents(small_ae(), images, tmp_path/name, bs=4)
    assert (tmp_path/'cut'/'latents.f16').read_bytes() == (tmp_path/'whole'/'latents.f16').read_bytes()
    assert open_latents(tmp_path/'cut').manifest['done'] == 80

def test_a_finished_cache_is_not_encoded_again(images, tmp_path):
    ae = small_ae()
    encode_latents(ae, images, tmp_path/'z')
    encode_latents(ae, Fails(images, 0), tmp_path/'z') # would raise if it read an image

def test_refuses_to_mix(images, tmp_path):
    ae = small_ae()
    encode_latents(ae, images, tmp_path/'z')
    before = (tmp_path/'z'/'latents.f16').read_bytes()
    rescaled = small_ae()
    rescaled.set_scale([0.]*4, [.5]*4)
    for other, data, what in ((small_ae(1), images, 'another autoencoder'), (rescaled, images, 'another autoencoder'),
                              (ae, open_images('rooms', 16, 60), 'other images'), (ae, open_images('rooms', 16, 80, seed=1), 'other images')):
        with pytest.raises(UserError, match=what) as e: encode_latents(other, data, tmp_path/'z')
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='without their std'): encode_latents(ae, images, tmp_path/'z', posterior_std=True)
    assert (tmp_path/'z'/'latents.f16').read_bytes() == before

def test_broken_caches(images, tmp_path):
    with pytest.raises(UserError, match='no latents in'): open_latents(tmp_path/'nowhere')
    encode_latents(small_ae(), images, tmp_path/'z')
    f = tmp_path/'z'/'latents.f16'
    f.write_bytes(f.read_bytes()[:-2])
    with pytest.raises(UserError, match='wrong size'): open_latents(tmp_path/'z')
    f.unlink()
    with pytest.raises(UserError, match='missing'): encode_latents(small_ae(), images, tmp_path/'z')

def test_latents_that_float16_cannot_hold(images, tmp_path):
    ae = small_ae()
    ae.set_scale([0.]*4, [1e-9]*4)
    with pytest.raises(UserError, match='float16 cannot hold'): encode_latents(ae, images, tmp_path/'z')

def test_flat_latents_are_cached(images, tmp_path):
    torch.manual_seed(0)
    ae = FlatAutoencoder(3, 16, (8, 8), latent_dim=12).eval()
    z = encode_latents(ae, images, tmp_path/'z')
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
    "Decoding that sleeps and work that sleeps must not add up"
    class Slow:
        def __len__(self): return 8
        def pixels(self, idxs, workers=None): time.sleep(.1); return torch.zeros(len(idxs), 1, 2, 2)
    t0 = time.perf_counter()
    for _ in prefetch(Slow(), range(8), 1): time.sleep(.1)
    assert time.perf_counter()-t0 < 1.3 # in turns it would be 1.6 s
