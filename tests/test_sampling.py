"Samplers against diffusers' schedulers, against exact solutions, and on their edges."
from functools import partial
import math, runpy, numpy as np, pytest, torch, diffusers
from pathlib import Path
from torch import nn
from latentdiff.core import UserError
from latentdiff.noisify import SCHEDULES, TARGETS, Process
from latentdiff.sampling import *
from latentdiff.sampling import levels

N, SHAPE = 6, (6, 4, 3, 3)
POINTS = torch.randn(5, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
ALL = [Process(s, t) for s in SCHEDULES for t in TARGETS]
DDPM_LINEAR = dict(beta_start=1e-4, beta_end=.02, beta_schedule='linear')
name = lambda p: f'{p.schedule}-{p.target}'

def from_the_lesson(*names):
    "Functions of lesson 40 that are not in the library, from its own cells"
    import io, json, time
    from pathlib import Path
    from latentdiff import sampling
    from latentdiff.core import number
    from latentdiff.data import image_grid
    there = dict(vars(sampling), io=io, time=time, number=number, image_grid=image_grid)
    nb = json.loads((Path(__file__).parents[1]/'nbs/40_sampling.ipynb').read_text(encoding='utf-8'))
    for s in (''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code'):
        if s.startswith(tuple(f'def {k}(' for k in ('controls_for', *names))): exec(s, there)
    return [there[k] for k in names]

draw_between, noise_and_guess, look, the_panel, save_gif = from_the_lesson('draw_between', 'noise_and_guess', 'look', 'panel', 'save_gif')

def wavy(x, time): return torch.sin(2*x.roll(1, -1) + 4*(time.view(-1, 1, 1, 1) + 1)/1000) + .3*x
def denoiser(process):
    "A toy network: exact for a mixture, which draws errors together, or a wave that lets them stand"
    return wavy if process.target in ('v', 'velocity') else optimal_denoiser(process, POINTS, .3)
def times(scheduler): return [(int(k)+1)/1000 for k in scheduler.timesteps] + [0.]
def close(a, b, tol=1e-5):
    err = (a-b).abs().max().item()/max(1., b.abs().max().item())
    assert err < tol, err

def drive(scheduler, net, x, **kw):
    "The plain loop of a diffusers pipeline: the network is told the scheduler's own timestep"
    for k in scheduler.timesteps:
        xin = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(xin, k.expand(len(x))), k, x, **kw).prev_sample
    return x

@pytest.mark.parametrize('target,theirs', [('eps', 'epsilon'), ('v', 'v_prediction'), ('x0', 'sample')])
@pytest.mark.parametrize('n', [1, 7, 50])
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_ddpm_equals_diffusers(target, theirs, n, spacing):
    p = Process('ddpm_linear', target)
    sch = diffusers.DDPMScheduler(**DDPM_LINEAR, prediction_type=theirs, clip_sample=False, variance_type='fixed_small', timestep_spacing=spacing)
    sch.set_timesteps(n); x = start_noise(p, SHAPE, seed=1)
    a = ddpm(denoiser(p), p, x, times(sch), generator=torch.Generator().manual_seed(5))
    close(a, drive(sch, denoiser(p), x, generator=torch.Generator().manual_seed(5)))

@pytest.mark.parametrize('eta', [0., .5, 1.])
@pytest.mark.parametrize('target,theirs', [('eps', 'epsilon'), ('v', 'v_prediction'), ('x0', 'sample')])
def test_ddim_equals_diffusers(eta, target, theirs):
    p = Process('ddpm_linear', target)
    sch = diffusers.DDIMScheduler(**DDPM_LINEAR, prediction_type=theirs, clip_sample=False, timestep_spacing='trailing')
    sch.set_timesteps(25); x = start_noise(p, SHAPE, seed=1)
    a = ddim(denoiser(p), p, x, times(sch), eta=eta, generator=torch.Generator().manual_seed(5))
    close(a, drive(sch, denoiser(p), x, eta=eta, generator=torch.Generator().manual_seed(5)))

def sigma_hat(p, t): a, s = levels(p, t); return s/a

@pytest.mark.parametrize('sampler,theirs', [(euler, diffusers.EulerDiscreteScheduler), (partial(heun, straight=False), diffusers.HeunDiscreteScheduler)])
@pytest.mark.parametrize('target,kind', [('eps', 'epsilon'), ('v', 'v_prediction')])
def test_ode_solvers_equal_diffusers(sampler, theirs, target, kind):
    p = Process('ddpm_linear', target)
    sch = theirs(**DDPM_LINEAR, prediction_type=kind, timestep_spacing='trailing'); sch.set_timesteps(15)
    x = start_noise(p, SHAPE, seed=1); ts = list(dict.fromkeys(times(sch)))   # Heun's timesteps come twice
    close(sampler(denoiser(p), p, x, ts), drive(sch, denoiser(p), x/levels(p, ts[0])[0]))

@pytest.mark.parametrize('n', [2, 5, 10, 30])
@pytest.mark.parametrize('target,kind', [('eps', 'epsilon'), ('v', 'v_prediction'), ('x0', 'sample')])
def test_dpmpp_2m_equals_diffusers(n, target, kind):
    p = Process('ddpm_linear', target)
    sch = diffusers.DPMSolverMultistepScheduler(**DDPM_LINEAR, prediction_type=kind, algorithm_type='dpmsolver++', solver_order=2,
        solver_type='midpoint', lower_order_final=True); sch.set_timesteps(n)
    x = start_noise(p, SHAPE, seed=1)
    close(dpmpp_2m(denoiser(p), p, x, times(sch)), drive(sch, denoiser(p), x))

@pytest.mark.parametrize('n', [2, 5, 16, 30])
@pytest.mark.parametrize('target,kind', [('eps', 'epsilon'), ('v', 'v_prediction')])
def test_dpmpp_2m_sde_equals_diffusers(n, target, kind):
    p = Process('ddpm_linear', target); gen = lambda: torch.Generator().manual_seed(5)
    sch = diffusers.DPMSolverMultistepScheduler(**DDPM_LINEAR, prediction_type=kind, algorithm_type='sde-dpmsolver++', solver_order=2,
        solver_type='midpoint', lower_order_final=True, euler_at_final=True); sch.set_timesteps(n)
    x = start_noise(p, SHAPE, seed=1)
    close(dpmpp_2m_sde(denoiser(p), p, x, times(sch), generator=gen()), drive(sch, denoiser(p), x, generator=gen()))

@pytest.mark.parametrize('schedule', ['cosine', 'flow', 'edm'])
def test_dpmpp_2m_sde_keeps_the_spread(schedule):
    "Data N(0, .25): after 64 steps the samples' standard deviation is three times nearer to .5 than DDPM's"
    p = Process(schedule, 'v'); net, ts = optimal_denoiser(p, torch.zeros(1, 1), .5), time_steps(p, 64)
    def lack(sampler):
        gen = lambda seed: torch.Generator().manual_seed(seed)
        x = levels(p, ts[0])[1]*torch.randn(20_000, 1, generator=gen(2))
        return abs(sampler(net, p, x, ts, generator=gen(3)).std().item() - .5)
    assert lack(dpmpp_2m_sde) < lack(ddpm)/3

@pytest.mark.parametrize('sampler,theirs,kw', [(ddpm, diffusers.DDPMScheduler, dict(clip_sample=False)), (ddim, diffusers.DDIMScheduler, dict(clip_sample=False)),
                                               (dpmpp_2m, diffusers.DPMSolverMultistepScheduler, {})])
def test_cosine_betas_equal_diffusers(sampler, theirs, kw):
    p = Process('ddpm_cosine', 'v'); gen = lambda: torch.Generator().manual_seed(5)
    sch = theirs(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', timestep_spacing='trailing', **kw); sch.set_timesteps(20)
    x = start_noise(p, SHAPE, seed=1)
    close(sampler(denoiser(p), p, x, times(sch), generator=gen()), drive(sch, denoiser(p), x, **(dict(generator=gen()) if sampler is ddpm else {})))

@pytest.mark.parametrize('beta_schedule,schedule', [('linear', 'ddpm_linear_zero'), ('scaled_linear', 'scaled_linear_zero')])
@pytest.mark.parametrize('theirs,sampler', [(diffusers.DDIMScheduler, ddim), (diffusers.EulerDiscreteScheduler, euler)])
def test_noise_that_leaves_nothing_equals_diffusers(theirs, sampler, beta_schedule, schedule):
    "With zero SNR at the end the first guess is -v; diffusers' Euler begins at alpha = 2^-12, and so do its two ends agree no closer."
    sch = theirs(beta_schedule=beta_schedule, prediction_type='v_prediction', timestep_spacing='trailing', rescale_betas_zero_snr=True,
                 **(dict(clip_sample=False) if sampler is ddim else {}))
    p = Process.from_diffusers(sch)
    assert p.schedule == schedule and p.levels(1.)[0] < 1e-9
    x = start_noise(p, SHAPE, seed=1)
    v = denoiser(p)(x, p.time_input(torch.ones(len(x))))
    assert torch.equal(p.x0_eps(v, x, 1.)[0], -v)
    sch.set_timesteps(20)
    got = sampler(denoiser(p), p, x, times(sch))
    want = drive(sch, denoiser(p), x if sampler is ddim else x*sch.init_noise_sigma)
    assert (got - want).abs().max() < (1e-4 if sampler is ddim else 2e-3), (got - want).abs().max()

@pytest.mark.parametrize('sampler,theirs', [(euler, diffusers.FlowMatchEulerDiscreteScheduler), (heun, diffusers.FlowMatchHeunDiscreteScheduler)])
def test_flow_equals_diffusers(sampler, theirs):
    p = Process('flow', 'velocity'); sch = theirs(); sch.set_timesteps(12); x = start_noise(p, SHAPE, seed=1)
    ts = list(dict.fromkeys(float(k)/1000 for k in sch.timesteps)) + [0.]
    close(sampler(denoiser(p), p, x, ts), drive(sch, denoiser(p), x))

def test_dpmpp_2m_equals_diffusers_on_flow():
    p = Process('flow', 'velocity')
    sch = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction'); sch.set_timesteps(12)
    ts, x = sch.sigmas.tolist(), start_noise(p, SHAPE, seed=1)
    sch.timesteps = 1000*sch.sigmas[:-1]                                    # this scheduler rounds them
    sch.index_for_timestep = lambda k, timesteps=None: 0
    close(dpmpp_2m(denoiser(p), p, x, ts), drive(sch, denoiser(p), x))

@pytest.mark.parametrize('sampler,theirs', [(euler, diffusers.EDMEulerScheduler), (dpmpp_2m, diffusers.EDMDPMSolverMultistepScheduler)])
def test_edm_equals_diffusers(sampler, theirs):
    p = Process('edm', 'v'); sch = theirs(sigma_data=1.); sch.set_timesteps(12); x = start_noise(p, SHAPE, seed=1)
    ts = time_steps(p, 12); net = denoiser(p)
    assert torch.allclose(sch.sigmas, torch.tensor([levels(p, t)[1] for t in ts]), rtol=1e-5)
    flip = lambda xin, t: -net(xin, t)       # EDM's F is -v at sigma_data = 1
    close(sampler(net, p, x, ts), drive(sch, flip, x))

K_DIFFUSION = dict(euler=[-.04683, .36576, -.74259, .11768, .67451], heun=[-.02924, .36896, -.73678, .16401, .70974],
                   dpmpp_2m=[-.03056, .36906, -.74257, .16828, .71838])

@pytest.mark.parametrize('schedule', ['edm', 'flow'])
@pytest.mark.parametrize('sampler', list(K_DIFFUSION))
def test_equals_k_diffusion(schedule, sampler):
    """What `sample_euler`, `sample_heun` and `sample_dpmpp_2m` of k-diffusion 0.1.1.post1 return for the same denoiser, start
    and 12 Karras sigmas (first five values of the second sample): recorded, because that package is not installed here"""
    p = Process(schedule, 'v'); ts = time_steps(p, 12, 'karras')
    net = optimal_denoiser(p, torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(3)), .3)
    x = levels(p, ts[0])[1]*torch.linspace(-2, 2, 72).view(2, 4, 3, 3).roll(1, -1)
    kw = dict(straight=False) if sampler == 'heun' else {}
    close(SAMPLERS[sampler](net, p, x, ts, **kw)[1].flatten()[:5], torch.tensor(K_DIFFUSION[sampler]), 3e-5)

@pytest.mark.parametrize('n,uniform_wins', [(5, False), (10, True), (20, True), (30, True), (40, False), (80, False)])
def test_where_dpmpp_2m_wants_uniform_times(n, uniform_wins):
    "On the straight line with Gaussian data: at 10 to 30 steps uniform times end nearer than even steps in lambda"
    p = Process('flow', 'velocity'); net = optimal_denoiser(p, torch.zeros(1, 64).double(), .5)
    def error(spacing):
        ts = time_steps(p, n, spacing); x = start_noise(p, (16, 64), t=ts[0]).double()
        return (dpmpp_2m(net, p, x, ts) - exact(p, x, ts[0], .5)).abs().max()
    assert (error('uniform') < error('logsnr')) == uniform_wins

# --- exact solutions ---------------------------------------------------------------------------------------------------

def gaussian(p, std): return optimal_denoiser(p, torch.zeros(1, *SHAPE[1:]).double(), std)

def exact(p, x, t0, std):
    "For data N(0, std^2) the ODE keeps x/sqrt(alpha^2 std^2 + sigma^2)"
    a, s = levels(p, t0); return x*std/math.sqrt((a*std)**2 + s**2)

@pytest.mark.parametrize('schedule', ['cosine', 'ddpm_linear', 'edm', 'flow'])
@pytest.mark.parametrize('sampler,order', [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(schedule, sampler, order):
    p, std = Process(schedule, 'v'), .5
    x = start_noise(p, SHAPE, seed=1).double(); errs = []
    for n in (20, 40, 80):
        ts = time_steps(p, n, 'logsnr' if schedule in ('edm', 'ddpm_linear') or sampler is dpmpp_2m else None)
        x1 = x*levels(p, ts[0])[1]/levels(p, 1.)[1]
        errs.append((sampler(gaussian(p, std), p, x1, ts) - exact(p, x1, ts[0], std)).abs().max().item())
    slopes = [math.log2(a/b) for a, b in zip(errs, errs[1:])]
    assert slopes[-1] > order - .25, (errs, slopes)
    if order == 1: assert slopes[-1] < 1.3, slopes

@pytest.mark.parametrize('sampler', [ddpm, partial(ddim, eta=1.)])
def test_fresh_noise_keeps_the_variance(sampler):
    "At 200 steps the samples have the data's standard deviation"
    p, std = Process('cosine', 'v'), .5
    net = optimal_denoiser(p, torch.zeros(1, 1), std); gen = lambda: torch.Generator().manual_seed(3)
    x = torch.randn(8000, 1, generator=torch.Generator().manual_seed(2))
    out = sampler(net, p, x, time_steps(p, 200), generator=gen())
    assert abs(out.std().item() - std) < .02

def test_ddim_at_eta_1_is_ddpm():
    p = Process('cosine', 'v'); x = start_noise(p, SHAPE); ts = time_steps(p, 30); gen = lambda: torch.Generator().manual_seed(3)
    close(ddim(denoiser(p), p, x, ts, eta=1., generator=gen()), ddpm(denoiser(p), p, x, ts, generator=gen()))

# --- edges -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('process', ALL, ids=name)
@pytest.mark.parametrize('spacing', ['uniform', 'karras', 'logsnr'])
def test_finite_and_on_the_data(process, spacing):
    "From t = 1, where alpha may be 0, to t = 0, where sigma is: every sampler ends near one of the points"
    for sampler in SAMPLERS.values():
        ts = time_steps(process, 30, spacing); x = start_noise(process, SHAPE, t=ts[0])
        out = sampler(optimal_denoiser(process, POINTS), process, x, ts, generator=generators(0, N))
        assert out.isfinite().all()
        assert torch.cdist(out.flatten(1), POINTS.flatten(1)).min(1).values.max() < .35

@pytest.mark.parametrize('process', ALL, ids=name)
@pytest.mark.parametrize('n', [1, 2, 3])
def test_few_steps_are_finite(process, n):
    for sampler in SAMPLERS.values():
        for spacing in (None, 'karras', 'logsnr'):
            x = start_noise(process, SHAPE)
            assert sampler(denoiser(process), process, x, time_steps(process, n, spacing), generator=generators(0, N)).isfinite().all()

def own_range(p):
    "sigma/alpha of the first and the last step of diffusers' schedule, or EDM's table 1"
    theirs = dict(ddpm_linear='linear', scaled_linear='scaled_linear', ddpm_cosine='squaredcos_cap_v2').get(p.schedule)
    if theirs is None: return .002, 80.
    left = diffusers.DDPMScheduler(beta_schedule=theirs).alphas_cumprod
    return tuple(((1-left)/left).sqrt()[[0, -1]].tolist())

@pytest.mark.parametrize('process', ALL[::4], ids=name)
def test_time_steps(process):
    for spacing in ('uniform', 'karras', 'logsnr'):
        for start in (1., .4):
            ts = time_steps(process, 9, spacing, start)
            assert len(ts) == 10 and ts[-1] == 0 and ts == sorted(set(ts), reverse=True) and ts[0] <= start + 1e-6
    ratios = [levels(process, t)[1]/levels(process, t)[0] for t in time_steps(process, 12, 'karras')[:-1]]
    low, most = own_range(process)
    top = most**(1/7); want = [(top + i/11*(low**(1/7) - top))**7 for i in range(12)]
    assert torch.allclose(torch.tensor(ratios), torch.tensor(want), rtol=2e-3)

# --- faults that were found by comparing with others -----------------------------------------------------------------

EDMS = [dict(sigma_min=.02), dict(sigma_min=.0292, sigma_max=14.61), dict(sigma_max=160.), dict(rho=3.), dict(sigma_min=.5, sigma_max=700., rho=9.)]

@pytest.mark.parametrize('kw', EDMS, ids=str)
@pytest.mark.parametrize('n', [1, 2, 20])
@pytest.mark.parametrize('spacing', ['karras', 'logsnr', 'uniform'])
def test_edm_grid_covers_its_own_range(kw, n, spacing):
    p = Process('edm', 'v', **kw)
    ts = time_steps(p, n, spacing)
    sigmas = [levels(p, t)[1] for t in ts]
    assert len(ts) == n+1 and all(a > b for a, b in zip(ts, ts[1:])) and all(a > b for a, b in zip(sigmas, sigmas[1:]))
    assert sigmas[0] == pytest.approx(p.sigma_max, rel=1e-6) and sigmas[-1] == 0
    if n > 1 and spacing != 'uniform': assert sigmas[-2] == pytest.approx(p.sigma_min, rel=1e-6)
    net = optimal_denoiser(p, POINTS, .3)
    for sampler in SAMPLERS.values(): assert sampler(net, p, start_noise(p, SHAPE), ts, generator=generators(0, N)).isfinite().all()

@pytest.mark.parametrize('kw', EDMS, ids=str)
def test_edm_grid_equals_diffusers(kw):
    p = Process('edm', 'v', **kw)
    sch = p.to_diffusers(diffusers.EDMEulerScheduler)
    sch.set_timesteps(20)
    ts, x = time_steps(p, 20), start_noise(p, SHAPE, seed=1)
    assert torch.allclose(torch.tensor([levels(p, t)[1] for t in ts]), sch.sigmas, rtol=1e-5)
    close(euler(denoiser(p), p, x, ts), drive(sch, denoiser(p), x))
    sch = p.to_diffusers(diffusers.EDMDPMSolverMultistepScheduler)
    sch.set_timesteps(20)
    close(dpmpp_2m(denoiser(p), p, x, ts), drive(sch, denoiser(p), x))

@pytest.mark.parametrize('kw', [{}, *EDMS], ids=str)
def test_edm_img2img_starts_at_its_strength(kw):
    p = Process('edm', 'v', **kw)
    starts = [levels(p, time_steps(p, 10, start=s)[0])[1] for s in (1., .99, .95, .9, .3)]
    assert starts == pytest.approx([levels(p, s)[1] for s in (1., .99, .95, .9, .3)]) and starts == sorted(set(starts), reverse=True)

@pytest.mark.parametrize('process', ALL[::4], ids=name)
@pytest.mark.parametrize('start', [1e-9, 1e-6, 1e-4, 1e-3, .01])
def test_a_start_near_clean_holds_no_time_twice(process, start):
    for spacing in ('uniform', 'karras', 'logsnr'):
        ts = time_steps(process, 20, spacing, start)
        assert all(a > b for a, b in zip(ts, ts[1:])) and ts[-1] == 0
        assert dpmpp_2m(optimal_denoiser(process, POINTS, .3), process, POINTS, ts).isfinite().all()

@pytest.mark.parametrize('schedule,theirs', [('ddpm_linear', 'linear'), ('scaled_linear', 'scaled_linear'), ('ddpm_cosine', 'squaredcos_cap_v2')])
@pytest.mark.parametrize('spacing,flag', [('karras', 'use_karras_sigmas'), ('logsnr', 'use_lu_lambdas')])
@pytest.mark.parametrize('target,kind', [('eps', 'epsilon'), ('v', 'v_prediction')])
@pytest.mark.parametrize('n', [10, 20])
def test_own_range_grids_equal_diffusers(schedule, theirs, spacing, flag, target, kind, n):
    "DPM++ Karras and DPM++ Lu; their timesteps are the whole numbers beside ours, so the network is told ours"
    p = Process(schedule, target)
    sch = diffusers.DPMSolverMultistepScheduler(beta_schedule=theirs, prediction_type=kind, **{flag: True})
    sch.set_timesteps(n)
    sch.set_begin_index(0)                                                  # it would look a repeated timestep up
    ts, x = time_steps(p, n, spacing), start_noise(p, SHAPE, seed=1)
    ours = torch.tensor([s/a for a, s in (levels(p, t) for t in ts)])
    assert torch.allclose(ours, sch.sigmas, rtol=1e-3, atol=1e-6)
    told = p.time_input(torch.tensor(ts[:-1]))
    assert (told - sch.timesteps).abs().max() <= 1 and told[0] == 999 and told[-1].round() == 0
    net, i = denoiser(p), iter(told)
    close(dpmpp_2m(net, p, x, ts), drive(sch, lambda x, k: net(x, next(i).expand(len(x))), x), 2e-4)

@pytest.mark.parametrize('schedule,theirs', [('ddpm_linear', 'linear'), ('scaled_linear', 'scaled_linear')])
@pytest.mark.parametrize('steps', [100, 1000, 4000])
def test_eps_in_the_plain_loop_of_diffusers(schedule, theirs, steps):
    "`model(x, k)` with their k: .33 off when the network was told k+1. For any number of steps"
    p = Process(schedule, 'eps', beta_start=.85/steps, beta_end=12/steps, steps=steps)
    sch = p.to_diffusers(diffusers.DDIMScheduler)
    assert len(sch.alphas_cumprod) == steps and sch.config.beta_schedule == theirs
    sch.set_timesteps(20)
    def net(x, k): return wavy(x, k*1000/steps)
    x = start_noise(p, SHAPE, seed=1)
    close(ddim(net, p, x, time_steps(p, 20)), drive(sch, net, x), 5e-5)

def test_ddpm_cosine_eps_equals_diffusers_ddim():
    "x0 at t = 1, where alpha is 4.9e-5: .026 off when it was taken for 0"
    p = Process('ddpm_cosine', 'eps')
    sch = p.to_diffusers(diffusers.DDIMScheduler)
    sch.set_timesteps(20)
    x, net = start_noise(p, SHAPE, seed=1), optimal_denoiser(p, POINTS, .3)
    assert p.x0_eps(torch.zeros(1, 1), torch.full((1, 1), 1e-4), 1.)[0].item() == pytest.approx(1e-4/levels(p, 1.)[0], rel=1e-3)
    close(ddim(net, p, x, time_steps(p, 20)), drive(sch, net, x), 1e-4)

@pytest.mark.parametrize('n', [10, 20])
def test_default_heun_equals_diffusers_on_ddpm_cosine(n):
    "6e-2 off when alpha(1) = 4.9e-5 decided, though the grid never goes there"
    p = Process('ddpm_cosine', 'v')
    sch = diffusers.HeunDiscreteScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', timestep_spacing='leading')
    sch.set_timesteps(n)
    ts, x = list(dict.fromkeys(times(sch))), start_noise(p, SHAPE, seed=1)
    close(heun(denoiser(p), p, x, ts), drive(sch, denoiser(p), x/levels(p, ts[0])[0]))

def test_default_heun_from_pure_noise_is_near_the_truth():
    "Where the capped cosine begins, x/alpha is 20,000 times x: there the straight line is hundreds of times nearer"
    p = Process('ddpm_cosine', 'v')
    x, ts = start_noise(p, SHAPE, seed=1).double(), time_steps(p, 20)
    errs = [(heun(gaussian(p, .5), p, x, ts, straight=o) - exact(p, x, 1., .5)).abs().max().item() for o in (None, False)]
    assert errs[0] < .03 and errs[1] > 30*errs[0]

def test_img2img_at_strength_0_changes_nothing():
    for p in (Process(), Process('edm', 'v')): assert torch.equal(img2img(None, p, POINTS, 0.), POINTS)

def test_one_default_sampler():
    import inspect
    for f in (sample, denoise_path, img2img): assert inspect.signature(f).parameters['sampler'].default == SAMPLER
    assert SAMPLERS[SAMPLER] is dpmpp_2m

@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_sampling_in_half_precision_stays_there(dtype):
    "The network sees its own precision, though times and levels are float32"
    p = Process()
    def net(x, time):
        assert x.dtype == dtype and time.dtype == torch.float32
        return optimal_denoiser(p, POINTS, .3)(x.float(), time).to(dtype)
    x = start_noise(p, SHAPE)
    for sampler in SAMPLERS.values():
        a = sampler(net, p, x.to(dtype), time_steps(p, 10), generator=generators(0, N))
        b = sampler(optimal_denoiser(p, POINTS, .3), p, x, time_steps(p, 10), generator=generators(0, N))
        assert a.dtype == dtype and (a.float()-b).abs().median() < .05

def test_user_errors():
    p = Process()
    for call in (lambda: time_steps(p, 5, 'even'), lambda: time_steps(p, 0), lambda: time_steps(p, 5, start=0.), lambda: sample(None, p, 1, (2,), sampler='magic'),
                 lambda: denoise_path(None, p, POINTS, [1., 0.], 'magic'), lambda: img2img(None, p, POINTS, sampler='magic'), lambda: generators(2**64, 1),
                 lambda: img2img(None, p, POINTS, 1.5)):
        with pytest.raises(ValueError) as e: call()
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('sampler', list(SAMPLERS))
def test_samples_do_not_depend_on_the_batch(sampler):
    p = Process(); kw = dict(steps=5, sampler=sampler, seed=3, device='cpu')
    all7 = sample(denoiser(p), p, 7, SHAPE[1:], bs=7, **kw)
    assert all7.shape == (7, *SHAPE[1:]) and all7.dtype == torch.float32 and not all7.is_inference()
    close(sample(denoiser(p), p, 5, SHAPE[1:], bs=2, **kw), all7[:5])
    assert torch.equal(sample(denoiser(p), p, 5, SHAPE[1:], bs=2, **kw), sample(denoiser(p), p, 8, SHAPE[1:], bs=2, **kw)[:5])
    assert torch.equal(all7, sample(denoiser(p), p, 7, SHAPE[1:], bs=7, **kw))
    assert not torch.allclose(all7, sample(denoiser(p), p, 7, SHAPE[1:], bs=7, **{**kw, 'seed': 4}))

def first(seed, i=0): return noise_like(torch.empty(1, 9), generators(seed, 1, i))

def test_every_seed_and_sample_is_a_stream_of_its_own():
    "Pairs that used to share a stream among them: (0, 45589) and (4295, 0); 0 and 2**32"
    seeds = [0, 1, 2, 4295, 2**31, 2**32 - 2, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, -1, -2, -2**63]
    drawn = {tuple(first(s, i)[0].tolist()) for s in seeds for i in (0, 1, 4295, 45589)}
    assert len(drawn) == 4*len(seeds)

def test_seeds_of_numpy_are_seeds():
    for s in (np.int64(7), np.int32(7), np.uint64(7), torch.tensor(7)): assert torch.equal(first(s), first(7))
    assert torch.equal(first(np.int64(-3)), first(-3))

def test_a_stream_goes_on():
    "What a sampler draws at its second step is new, and the same however the samples are divided"
    x, both, one = torch.empty(2, 5), generators(3, 2), generators(3, 1, 1)
    a, b = noise_like(x, both), noise_like(x, both)
    assert not torch.equal(a, b) and torch.equal(torch.cat([noise_like(x[:1], one), noise_like(x[:1], one)]), torch.stack([a[1], b[1]]))
    long = noise_like(torch.empty(1, 60_000), generators(5, 1))
    assert abs(long.mean()) < .02 and abs(long.std() - 1) < .02

def test_noise_from_torch_generators():
    gen = lambda s: torch.Generator().manual_seed(s)
    x = torch.empty(2, 3, dtype=torch.float64)
    assert noise_like(x, gen(0)).dtype == torch.float64 and torch.equal(noise_like(x, gen(0)), torch.randn(2, 3, generator=gen(0)).double())
    rows = noise_like(x, [gen(1), gen(2)])
    assert torch.equal(rows[1], torch.randn(3, generator=gen(2)).double())

@pytest.mark.parametrize('sampler', list(SAMPLERS))
def test_evaluations_are_counted(sampler):
    p, calls = Process(), []
    net = denoiser(p)
    sample(lambda x, t: (calls.append(1), net(x, t))[1], p, 3, SHAPE[1:], steps=8, sampler=sampler, device='cpu')
    assert len(calls) == evaluations(sampler, 8)

def test_eval_mode_and_no_gradients():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.seen = nn.Linear(4, 4), set()
        def forward(self, x, t, cond=None): self.seen.add(self.training); return self.lin(x)
    net, p = Net(), Process()
    z = sample(net.train(), p, 2, (4,), steps=3, device='cpu')
    assert net.seen == {False} and net.training and not z.requires_grad
    assert not sample(net.eval(), p, 2, (4,), steps=3, device='cpu').requires_grad and not net.training
    assert not heun(net, p, torch.randn(2, 4), time_steps(p, 3)).requires_grad
    with pytest.raises(RuntimeError): sample(net.train(), p, 2, (5,), steps=3, device='cpu')
    assert net.training                       # put back after a failure too

@pytest.mark.parametrize('sampler', list(SAMPLERS))
def test_callback_sees_every_step(sampler):
    p, seen = Process(), []; ts = time_steps(p, 6); x = start_noise(p, SHAPE)
    SAMPLERS[sampler](denoiser(p), p, x, ts, callback=lambda i, t, x, x0: seen.append((i, t, x, x0)), generator=generators(0, N))
    assert [o[:2] for o in seen] == list(enumerate(ts[:-1])) and torch.equal(seen[0][2], x)
    close(seen[-1][3], predict(denoiser(p), p, seen[-1][2], ts[-2])[0])

def test_path_and_gif(tmp_path):
    from latentdiff.data import image_grid
    from PIL import Image
    p = Process('edm', 'v'); ts = time_steps(p, 6, 'uniform'); x = start_noise(p, (4, 3, 8, 8)); net = optimal_denoiser(p, torch.zeros(1, 3, 8, 8), .3)
    path = denoise_path(net, p, x, ts, 'heun')
    assert len(path) == 7 and path[-1][0] == 0 and path[0][1].std() < 1.2     # shown at unit variance, though sigma is 80
    close(path[-1][1], heun(net, p, x, ts))
    f = save_gif([image_grid(o.clamp(-1, 1)) for _, o, _ in path], tmp_path/'a.gif')
    with Image.open(f) as g: assert g.n_frames == 7 and g.info['loop'] == 0

def test_optimal_denoiser_of_means_in_float64():
    "It is asked in float32, as `sample` does"
    p, x, t = Process('flow', 'v'), torch.randn(2, *POINTS.shape[1:], generator=torch.Generator().manual_seed(0)), torch.tensor([.2, .9])
    assert torch.equal(optimal_denoiser(p, POINTS.double(), .3)(x, p.time_input(t)), optimal_denoiser(p, POINTS.float(), .3)(x, p.time_input(t)))

def test_slerp():
    a, b = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    close(slerp(a, b, 0.), a); close(slerp(a, b, 1.), b); close(slerp(a, a, .3), a)
    n = b/b.flatten(1).norm(dim=1).view(-1, 1, 1, 1)*a.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for w in (.2, .5, .9): close(slerp(a, n, w).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    assert interpolate(a, b, 6).shape == (3, 6, 4, 5, 5)
    close(interpolate(a.double(), b, 3).float(), interpolate(a, b, 3), 1e-5)   # noise of another width, as a user has it

def test_noise_that_is_not_finite_is_no_start():
    a, nan = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), math.nan)
    for pair in ((nan, a), (a, nan)):
        for f in (slerp, lambda *o: interpolate(*o, 3)):
            with pytest.raises(UserError, match='not a finite number'): f(*pair, *[.5]*(f is slerp))

def test_img2img_keeps_more_at_low_strength():
    p = Process(); z = POINTS + .1
    moved = [(img2img(optimal_denoiser(p, POINTS, .3), p, z, s) - z).pow(2).mean().item() for s in (.01, .3, 1.)]
    assert moved[0] < moved[1] < moved[2] and moved[0] < 1e-3

@pytest.mark.parametrize('process', [Process(), Process('edm', 'v'), Process('ddpm_linear', 'eps')], ids=name)
def test_inpaint_keeps_the_known_part_and_finds_the_rest(process):
    mask = torch.zeros(1, *SHAPE[1:], dtype=torch.bool); mask[..., 2:] = True
    z = torch.where(mask, torch.zeros_like(POINTS), POINTS)
    out = inpaint(optimal_denoiser(process, POINTS, .05), process, z, mask, steps=30)
    assert torch.equal(out[(~mask).expand_as(out)], z[(~mask).expand_as(z)])
    assert (out - POINTS).abs().max() < .4    # the known part says which point it is

# --- the panel ---------------------------------------------------------------------------------------------------------

SHOWN = dict(cond='bag', guidance=3.)

@pytest.fixture(scope='module')
def fashion():
    "The smallest pipeline of the package that was told classes"
    from latentdiff.pipeline import LatentDiffusionPipeline
    return LatentDiffusionPipeline.from_pretrained('fashion_mnist32', 'cpu')

@pytest.mark.parametrize('sampler', list(SAMPLERS))
def test_drawing_between_two_seeds(fashion, sampler):
    "The ends are what the pipeline draws from each seed (of fresh noise there is that of the first); the middle is neither"
    z = draw_between(fashion, 3, 4, [0, .5, 1], 2, sampler, **SHOWN)
    ends = [fashion.latents(1, 2, sampler, s, bs=1, **SHOWN) for s in (3, 4)]
    close(z[:1], ends[0])
    if sampler in ('ddim', 'euler', 'heun', 'dpmpp_2m'): close(z[2:], ends[1])
    assert min((z[1] - z[i]).abs().mean() for i in (0, 2)) > .1

def test_what_the_panel_shows(fashion):
    "The drawn picture, that with noise on it, and the guess; the same numbers give the same bytes"
    args = dict(w=0., a=5, b=6, steps=2, sampler='euler', **SHOWN)
    images, clean = look(fashion, .5, **args), look(fashion, 0., **args)
    assert images.shape == (3, 1, 32, 32) and torch.equal(images, look(fashion, .5, **args))
    close(images[:1], fashion.draw(1, 2, 'euler', 5, bs=1, **SHOWN))
    close(clean, images[:1].expand(3, -1, -1, -1))
    assert (images[1:] - images[0]).abs().mean((1, 2, 3)).min() > .02

def test_what_no_panel_can_show(fashion):
    one = partial(look, fashion, a=1, b=2, steps=1)
    for call in (partial(one, 1.5, 0.), partial(one, .5, 1.5), partial(one, .5, 0., cond='hat'), partial(one, .5, 0., sampler='magic')):
        with pytest.raises(UserError) as e: call()
        assert '\n' not in str(e.value)

class Mixture:
    "What the panel needs of a pipeline, at once: latents are pixels, a condition is one of five pictures, guidance a factor"
    latent_shape, device, centres = (3, 8, 8), 'cpu', .7*torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    def __init__(self, process=Process()): self.process, self.denoiser = process, None
    def listening(self, n, bs, cond=None, guidance=1.):
        means = self.centres if cond is None else self.centres[cond:cond+1]*guidance
        return [optimal_denoiser(self.process, means, .2)]
    def decode(self, z, bs): return z.clamp(-1, 1)

@pytest.mark.parametrize('process', ALL[::4], ids=name)
def test_noise_and_guess(process):
    "Noisy latents have the spread that the network is shown, and as much of the clean ones as the level says; a good guess"
    pipe, z = Mixture(process), Mixture.centres
    (a, s), many = levels(process, .6), torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy, scale = noise_and_guess(pipe, many, .6)[0], process.scale_input(torch.ones(1, 1), torch.tensor([.6])).item()
    assert noisy.std().item() == pytest.approx(math.hypot(a, s)*scale, rel=.01)
    assert torch.corrcoef(torch.stack([noisy.flatten(), many.flatten()]))[0, 1].item() == pytest.approx(a/math.hypot(a, s), abs=.02)
    close(noise_and_guess(pipe, z, 0.)[0], z)
    noisy, guess = noise_and_guess(pipe, z, .3)
    assert (guess - z).std() < .2 and (guess - z).std() < .7*(noisy/(a*scale) - z).std()

def test_the_guess_is_made_with_new_noise():
    "The noise that a picture was drawn from would give it away, even where nothing of it is left"
    noise = noise_and_guess(Mixture(), Mixture.centres[:1], 1.)[0]
    starts = [start_noise(Process(), (1, 3, 8, 8), seed=s) for s in (0, 1, 9999)]
    assert torch.pdist(torch.cat([noise, *starts]).flatten(1)).min() > 15          # about sqrt(2*192)

@pytest.fixture
def panel(): return the_panel

@pytest.fixture
def controls(panel):
    "The controls of a panel by name, its pictures, and the line below them"
    pytest.importorskip('ipywidgets')
    left, right = panel(Mixture(), [0, 1]).children
    return {o.description: o for o in left.children}, [o.children[1] for o in right.children[0].children], right.children[1]

CHANGES = [('noise t', .9, False), ('from a to b', .5, True), ('seed a', 7, True), ('steps', 3, True), ('sampler', 'ddpm', True),
           ('show', 1, True), ('guidance', 6., True)]

@pytest.mark.parametrize('control,value,drawn', CHANGES)
def test_controls_of_the_panel_draw(controls, control, value, drawn):
    "What depends on it changes and nothing else, and the old value brings the same bytes back"
    by_name, frames, _ = controls
    values = lambda: [bytes(o.value) for o in frames]
    old, before = by_name[control].value, values()
    by_name[control].value = value
    assert [a != b for a, b in zip(values(), before)] == [drawn, True, True]
    by_name[control].value = old
    assert values() == before
    by_name['seed b'].value = 8
    assert values() == before          # at w = 0 only the first seed counts

def test_controls_wait_until_a_slider_is_let_go(controls):
    by_name, frames, says = controls
    assert not any(o.continuous_update for k, o in by_name.items() if k not in ('sampler', 'show'))
    by_name['sampler'].value = 'heun'
    assert says.value.startswith('drawn with 19 evaluations;')

def test_pictures_of_the_panel_are_those_of_look(controls):
    import io
    from PIL import Image
    from latentdiff.data import to_uint8
    images = to_uint8(look(Mixture(), .5, 0., 1, 2, 10, SAMPLER, cond=0, guidance=2.))
    for o, x in zip(controls[1], images, strict=True):
        with Image.open(io.BytesIO(o.value)) as im: pixels = torch.from_numpy(np.array(im)).permute(2, 0, 1)
        assert torch.equal(pixels, x.repeat_interleave(20, 1).repeat_interleave(20, 2))

def test_panel_of_a_pipeline_without_classes(panel):
    pytest.importorskip('ipywidgets')
    left, right = panel(Mixture()).children
    assert [o.description for o in left.children] == ['noise t', 'from a to b', 'seed a', 'seed b', 'steps', 'sampler']

def test_without_ipywidgets_a_line_says_what_is_missing(panel, monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    assert panel(Mixture()) is None
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'pip install ipywidgets' in said

def test_what_is_left_of_the_mean_belongs_to_the_start():
    "As `bench/lsun_runs.py` draws: noise with it leads to the mean of Gaussian data; pure noise misses the share of it that the last noisy latent knows"
    start = runpy.run_path(str(Path(__file__).parents[1]/'bench'/'lsun_runs.py'))['from_there']
    p, m, std = Process('ddpm_linear', 'eps', 'uniform', beta_end=.01), 35., 20.
    (a, s), net = levels(p, 1.), optimal_denoiser(p, torch.full((1, 4), m).double(), std)
    x = s*torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).double()
    drawn = lambda left: start(torch.tensor(left), net, p, x, time_steps(p, 200), generator=torch.Generator().manual_seed(1)).mean().item()
    known = (a*std)**2/((a*std)**2 + s**2)
    assert known > .7 and abs(drawn(a*m) - m) < .6 and abs(drawn(0.) - m*(1 - known)) < .6
