"UniPC against diffusers and exact solutions; shortcuts against the flow map of Gaussian data, which is known in closed form."
import json, math, runpy, warnings, diffusers, matplotlib.pyplot as plt, pytest, torch
from pathlib import Path
from types import SimpleNamespace
from torch import nn
from fastai.basics import Callback
from latentdiff.conditioning import ClassConditioner, Conditioned, ConditionalUNet
from latentdiff.core import UserError, load_component, save_component
from latentdiff.few_step import *
from latentdiff.noisify import Process
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.sampling import levels, optimal_denoiser, sample, start_noise, time_steps
from latentdiff import training
from latentdiff.training import Checkpoint
from latentdiff.unet import UNet

SHAPE = (6, 4, 3, 3)
POINTS = torch.randn(5, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
FLOW = Process('flow', 'velocity')

def close(a, b, tol=1e-5): assert (a - b).abs().max() < tol, (a - b).abs().max()
def drive(scheduler, net, x):
    for k in scheduler.timesteps: x = scheduler.step(net(x, k.expand(len(x))), k, x).prev_sample
    return x

# --- UniPC -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('order', [1, 2, 3])
@pytest.mark.parametrize('n', [1, 3, 10])
@pytest.mark.parametrize('target,theirs', [('eps', 'epsilon'), ('v', 'v_prediction'), ('x0', 'sample')])
def test_unipc_equals_diffusers(order, n, target, theirs):
    p = Process('ddpm_linear', target)
    sch = diffusers.UniPCMultistepScheduler(beta_start=1e-4, beta_end=.02, beta_schedule='linear', solver_order=order,
                                            prediction_type=theirs, final_sigmas_type='zero')
    sch.set_timesteps(n)
    x, net, ts = start_noise(p, SHAPE, seed=1), optimal_denoiser(p, POINTS, .3), [(int(k) + 1)/1000 for k in sch.timesteps] + [0.]
    close(unipc(net, p, x, ts, order=order), drive(sch, net, x))

@pytest.mark.parametrize('order', [2, 3])
def test_unipc_equals_diffusers_on_flow(order):
    sch = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction', solver_order=order)
    sch.set_timesteps(12)
    x, net, ts = start_noise(FLOW, SHAPE, seed=1), optimal_denoiser(FLOW, POINTS, .3), sch.sigmas.tolist()
    sch.timesteps = 1000*sch.sigmas[:-1]                                    # this scheduler rounds them
    sch.index_for_timestep = lambda k, timesteps=None: 0
    close(unipc(net, FLOW, x, ts, order=order), drive(sch, net, x))

@pytest.mark.parametrize('schedule', ['cosine', 'edm', 'flow'])
@pytest.mark.parametrize('order', [1, 2])
def test_the_corrector_adds_an_order(schedule, order):
    p, std = Process(schedule, 'v'), .5
    x, net, errors = start_noise(p, SHAPE, seed=1).double(), optimal_denoiser(p, torch.zeros(1, *SHAPE[1:]).double(), std), []
    for n in (40, 80):
        ts = time_steps(p, n, 'logsnr')
        (a, s), start = levels(p, ts[0]), x*levels(p, ts[0])[1]/levels(p, 1.)[1]
        errors.append((unipc(net, p, start, ts, order=order) - start*std/math.sqrt((a*std)**2 + s**2)).abs().max().item())
    assert math.log2(errors[0]/errors[1]) > order + .8, errors

@pytest.mark.parametrize('n', [1, 2, 9])
def test_unipc_asks_once_a_step_and_shows_what_it_asks_about(n):
    asked, seen, best = [], [], optimal_denoiser(FLOW, POINTS, .3)
    def net(x, time):
        asked.append(x)
        return best(x, time)
    end = unipc(net, FLOW, start_noise(FLOW, SHAPE, seed=1), time_steps(FLOW, n), callback=lambda i, t, x, x0: seen.append((i, x, x0)))
    assert len(asked) == len(seen) == n and [i for i, _, _ in seen] == list(range(n))
    assert end.isfinite().all() and torch.equal(end, seen[-1][2])      # the last step lands on the last guess

def test_sample_takes_a_spacing_and_a_list_of_times():
    net, n = optimal_denoiser(FLOW, POINTS, .3), 5
    draw = lambda **kw: sample(net, FLOW, 3, SHAPE[1:], n, unipc, seed=2, device='cpu', **kw)
    assert torch.equal(draw(), draw(spacing='uniform')) and not torch.equal(draw(), draw(spacing='logsnr'))
    assert torch.equal(draw(spacing='karras'), draw(spacing=time_steps(FLOW, n, 'karras')))
    with pytest.raises(UserError, match='spacing is uniform, karras or logsnr'): draw(spacing='even')
    for bad in ([1., .5], [.5, .5, 0.], [1.5, 0.], [0.], []):
        with pytest.raises(UserError, match='times fall from at most 1 to 0'): draw(spacing=bad)

# --- autoguidance ------------------------------------------------------------------------------------------------------

def test_autoguidance_moves_away_from_the_weak_network():
    good, weak = (lambda x, time, c=o: c*x for o in (3., 1.))
    x, time = torch.randn(2, 4), torch.ones(2)
    for scale, factor in ((0, 1.), (1, 3.), (2, 5.)): close(autoguide(good, weak, scale)(x, time), factor*x)
    with pytest.raises(UserError, match='scale'): autoguide(good, weak, math.nan)
    assert autoguide(good, None, 1.)(x, time).equal(3*x)   # at 1 nobody asks the weak one

# --- shortcuts: Gaussian data ------------------------------------------------------------------------------------------

STD = .5

def spread(t): return torch.sqrt(((1 - t)*STD)**2 + t**2)

def exact(x, t, d):
    "The mean slope over a step for data N(0, STD^2): the flow keeps x/spread(t)"
    return x*((1 - spread(t - d)/spread(t))/d)[:, None]

def exact_net(x, time):
    t, d = (time/1000).double().unbind(1)
    return exact(x, t, d.clamp(min=1e-6)).to(x.dtype)

@pytest.mark.parametrize('d', [1., .5, .25, .125])
def test_the_exact_slope_is_two_in_one(d):
    t = torch.arange(1, round(1/d) + 1).double()*d
    x, ds = torch.randn(len(t), 5).double(), torch.full((len(t),), d).double()
    close(two_in_one(exact, x, t, ds), exact(x, t, ds), 1e-9)

def test_the_velocity_is_not():
    t, x = torch.ones(3).double(), torch.ones(3, 5).double()
    velocity = lambda x, t, d: exact(x, t, torch.full_like(t, 1e-6))
    close(velocity(x, t, t) - two_in_one(velocity, x, t, t), torch.full_like(x, .2), 1e-4)     # 1, and the mean of 1 and 0.6

def test_midpoint_is_of_second_order():
    velocity = optimal_denoiser(FLOW, torch.zeros(1, 5).double(), STD)
    v = lambda x, t: velocity(x, 1000*t)
    x, t = torch.randn(4, 5).double(), torch.full((4,), .75).double()
    errors = [(midpoint(v, x, t, torch.full_like(t, d)) - exact(x, t, torch.full_like(t, d))).abs().max() for d in (.25, .125, .0625)]
    assert errors[0]/errors[1] > 3.4 and errors[1]/errors[2] > 3.4

@pytest.mark.parametrize('n', [1, 2, 3, 8])
def test_exact_slopes_end_at_the_data_in_any_number_of_steps(n):
    x = start_noise(FLOW, (8, 5), seed=1)
    seen = []
    end = shortcut(exact_net, FLOW, x, time_steps(FLOW, n), callback=lambda i, t, x, x0: seen.append(t))
    close(end, STD*x, 1e-4)
    assert len(seen) == n and seen[0] == 1.

@pytest.mark.parametrize('n', [10, 32, 100])
def test_steps_and_times_fit(n):
    t, d = draw_steps(n, generator=torch.Generator().manual_seed(0))
    assert len(t) == len(d) == n and (t > 0).all() and (t <= 1).all() and (t - d > -1e-6).all()
    for length, share in SHARES.items(): assert abs((d == length).sum() - share*n) <= 1
    whole = (t/d)[d > 0]
    assert torch.equal(whole, whole.round()) and (t[d == 1] == 1).all()

class Linear(nn.Module):
    "For Gaussian data every slope is a number times x; this learns the number from the time and the step"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    def forward(self, x, time): return self.body(time/1000)*x

def test_training_finds_the_exact_slopes():
    "From the velocity alone: nobody tells the network where a path ends"
    torch.manual_seed(0)
    z = STD*torch.randn(2000, 5)
    learn = train_shortcut(Linear(), FLOW, optimal_denoiser(FLOW, torch.zeros(1, 5), STD), z, z[:200], 300, 5e-3, bs=128, device='cpu', rounds=1)
    x = start_noise(FLOW, (200, 5), seed=1)
    for n in (1, 2, 4, 8):
        ratio = (shortcut(learn.model, FLOW, x, time_steps(FLOW, n))/x).mean().item()
        assert ratio == pytest.approx(STD, abs=.04), n
    one_euler_step = (x - optimal_denoiser(FLOW, torch.zeros(1, 5), STD)(x, torch.full((200,), 1000.)))/x
    assert one_euler_step.abs().max() < .01     # where all of this would be the mean of the data

def test_consistency_asks_for_the_exact_slope_to_the_end():
    "The other method of bench/few_step.py: gaps are halved as it trains, so its targets come near those of the closed form"
    bench = runpy.run_path(Path(__file__).parents[1]/'bench'/'few_step.py')
    class Exact(bench['Consistency']):
        def average(self, x, time): return exact_net(x, time)
    velocity, errors = optimal_denoiser(FLOW, torch.zeros(1, 5).double(), STD), []
    for k in (0, 25, 50, 75):
        asks = Exact(FLOW, velocity)
        asks.step_by_step = SimpleNamespace(k=k, steps=100)
        t, d = asks.draw(30, torch.Generator().manual_seed(0), 'cpu')
        assert torch.equal(t, d) and (t[:10] == 1).all() and (t > 0).all() and (t <= 1).all()
        x, t = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)).double(), t.double()
        errors.append((asks.answers(x, t, t, ()) - exact(x, t, t)).abs().max().item())
    assert all(a > 2*b for a, b in zip(errors, errors[1:])) and errors[-1] < .002, errors

@pytest.mark.parametrize('n', [1, 2, 4])
def test_jumps_end_at_the_data(n):
    "The sampler of a consistency model: with one step the shortcut, with more fresh noise in between"
    jumps = runpy.run_path(Path(__file__).parents[1]/'bench'/'few_step.py')['jumps']
    x, g = start_noise(FLOW, (2000, 5), seed=1), torch.Generator().manual_seed(2)
    end = jumps(exact_net, FLOW, x, time_steps(FLOW, n), generator=g)
    assert end.std() == pytest.approx(STD, abs=.02) and (n > 1 or torch.allclose(end, STD*x, atol=1e-4))

# --- the network -------------------------------------------------------------------------------------------------------

def told(b=3): return torch.rand(b)*1000, torch.rand(b, 2)*1000

def noisy(net):
    "Weights that answer something"
    torch.manual_seed(1)
    for p in net.parameters(): nn.init.normal_(p, std=.1)
    return net.eval()

def classes(): return Conditioned(ConditionalUNet(4, widths=(16, 16), depth=1, dim=8), ClassConditioner(['a', 'b'], 8), drop=.2)

@pytest.mark.parametrize('make,cond', [(lambda: UNet(4, widths=(16, 16), depth=1), []), (classes, [torch.tensor([0, 1, -1])])])
def test_it_begins_as_its_teacher_and_is_saved_whole(make, cond, tmp_path):
    teacher = noisy(make())
    net, x, (t, both) = with_steps(teacher), torch.randn(3, 4, 8, 8), told()
    assert torch.equal(net.eval()(x, t, *cond), teacher(x, t, *cond))
    assert torch.equal(net(x, both, *cond), teacher(x, both[:, 0], *cond))             # whatever the step: not yet trained
    assert all(p.requires_grad for p in net.parameters()) and getattr(net, 'drop', 0) == 0
    again = load_component(save_component(noisy(net), tmp_path/'net'))
    assert torch.equal(again(x, both, *cond), net(x, both, *cond))
    assert not torch.equal(net(x, both, *cond), net(x, both*torch.tensor([1., .5]), *cond))      # now the step matters
    zero = torch.stack([t, torch.zeros(3)], 1)
    assert torch.equal(net(x, t, *cond), net(x, zero, *cond))

def test_it_says_how_it_wants_to_be_drawn(tmp_path):
    "To who looks where a pipeline does, whether the network is told classes or not, loaded or new; its teacher says nothing"
    says = lambda net: next((o.drawn_with for o in (net, getattr(net, 'net', None)) if hasattr(o, 'drawn_with')), {})
    for teacher in (noisy(UNet(4, widths=(16, 16), depth=1)), noisy(classes())):
        net = with_steps(teacher)
        again = load_component(save_component(net, tmp_path/type(teacher).__name__))
        assert says(net) == says(again) == dict(sampler='shortcut', steps=2, guidance=1) and says(teacher) == {}

def test_other_processes_are_refused():
    for p in (Process('cosine', 'v'), Process('flow', 'eps')):
        with pytest.raises(UserError, match='straight line'): train_shortcut(Linear(), p, None, None, None, 1)

def test_training_on_goes_on_and_says_the_same(tmp_path):
    "Stopped and started again, it is the same training to the bit; every condition goes with its rows"
    z, y = torch.randn(64, 4, 8, 8), torch.arange(64) % 2
    seen = []
    def teacher(x, time, label):
        seen.append((len(x), len(time), len(label)))
        return x*label.view(-1, 1, 1, 1)
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.learn.step_by_step.k == 4: raise KeyboardInterrupt
    def train(cbs=(), **kw):
        net = with_steps(noisy(classes()))
        learn = train_shortcut(net, FLOW, teacher, (z, y), (z[:16], y[:16]), 6, 1e-3, bs=16, device='cpu', rounds=2, cbs=cbs, **kw)
        return [p.detach().clone() for p in learn.model.parameters()]
    whole, checkpoint = train(), lambda: Checkpoint(tmp_path, 'x', every=0)
    with pytest.raises(KeyboardInterrupt): train([Stop()], checkpoint=checkpoint())
    assert checkpoint().load(6)[1]['k'] in (3, 4)
    for a, b in zip(whole, train(checkpoint=checkpoint())): assert torch.equal(a, b)
    assert all(a == b == c for a, b, c in seen)

class FewLatents:
    "What `make_shortcut` asks of `Latents`"
    fingerprint, labels = 'abc', torch.arange(40) % 2
    def idxs(self, split): return torch.arange(8, 40) if split == 'train' else torch.arange(8)
    def tensor(self, split): return torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))[self.idxs(split)]

@pytest.mark.parametrize('make', [lambda: UNet(4, widths=(16, 16), depth=1), classes])
def test_a_run_makes_it_once(make, tmp_path):
    "Loaded the second time; other settings are refused; what it learns is its teacher's, guided"
    teacher, kw = noisy(make()), dict(bs=8, device='cpu')
    net = make_shortcut(tmp_path, teacher, FLOW, FewLatents(), 2, **kw)
    x, (_, both), cond = torch.randn(3, 4, 8, 8), told(), [torch.tensor([0, 1, 1])]*hasattr(teacher, 'conditioners')
    assert not net.training and net(x, both, *cond).isfinite().all()
    assert not torch.equal(net(x, both[:, 0], *cond), teacher(x, both[:, 0], *cond))                # two steps have moved it
    again = make_shortcut(tmp_path, teacher, FLOW, FewLatents(), 2, **kw)
    assert torch.equal(again(x, both, *cond), net(x, both, *cond))
    with pytest.raises(UserError, match='guidance 1.0, not 3.0'): make_shortcut(tmp_path, teacher, FLOW, FewLatents(), 2, guidance=3., **kw)
    if cond:
        t = both[:, 0]
        bare, guided = teacher_of(teacher, 1.), teacher_of(teacher, 3.)
        close(guided(x, t, *cond), teacher(x, t) + 3*(bare(x, t, *cond) - teacher(x, t)), 1e-4)

def test_what_diverged_goes_on_at_a_lower_rate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.Checkpoint.__init__, '__defaults__', (0.,))
    usual, kw = training.StepByStep.before_backward, dict(bs=8, device='cpu')
    def poisoned(self):
        if self.k == 4 and self.peak > 5e-4: self.learn.loss_grad = self.learn.loss_grad*float('nan')
        usual(self)
    monkeypatch.setattr(training.StepByStep, 'before_backward', poisoned)
    go = lambda **how: make_shortcut(tmp_path, noisy(UNet(4, widths=(16, 16), depth=1)), FLOW, FewLatents(), 8, **kw, **how)
    with pytest.raises(UserError, match='stopped at step 4: .*lower rate than 0.001'): go()
    capsys.readouterr()
    go(lr=1e-4)
    assert 'from step 4 on' in capsys.readouterr().out

def test_a_step_of_the_training_uses_no_masks():
    "Each of which a GPU would have to wait for; `d` falls along a batch, so its parts are slices"
    from torch.utils._python_dispatch import TorchDispatchMode
    waits = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if 'nonzero' in str(f) or 'index' in str(f) and any(getattr(o, 'dtype', 0) == torch.bool for o in args[1]): waits.append(str(f))   # a boolean mask
            return f(*args, **kwargs or {})
    asks = Shortcuts(FLOW, lambda x, t, *c: x)
    asks.average = lambda x, t, *c: x
    t, d = draw_steps(30, torch.Generator().manual_seed(0), 'cpu')
    assert len({*d.tolist()}) > 3 and (d.diff() <= 0).all()
    with Watch(): asks.answers(torch.randn(30, 4), t, d, ())
    assert not waits

def test_what_is_drawn_has_no_graph():
    net, x = Shortcut(UNet(4, widths=(16, 16), depth=1)).train(), torch.randn(2, 4, 8, 8)
    assert not shortcut(net, FLOW, x, [1., .5, 0.]).requires_grad

def test_captions_have_to_be_given_row_by_row(tmp_path, monkeypatch):
    "Class numbers are no rows of a table of captions"
    class Words(nn.Module): pass
    teacher, kw, seen = noisy(classes()), dict(bs=8, device='cpu'), []
    def train(net, process, teacher, *z, **kw): seen.extend(z[:2]); raise KeyboardInterrupt
    monkeypatch.setattr('latentdiff.few_step.train_shortcut', train)
    with pytest.raises(KeyboardInterrupt): make_shortcut(tmp_path, teacher, FLOW, FewLatents(), 2, conds=range(100, 140), **kw)
    for (x, rows), split in zip(seen, ('train', 'valid')): assert torch.equal(rows, 100 + FewLatents().idxs(split)) and len(x) == len(rows)
    teacher.conditioners[0] = Words()
    with pytest.raises(UserError, match='give conds'): make_shortcut(tmp_path/'b', teacher, FLOW, FewLatents(), 2, **kw)
    assert not (tmp_path/'b').exists()

def test_a_pipeline_of_few_steps_is_saved_and_drawn(tmp_path):
    zoo = LatentDiffusionPipeline.from_pretrained('fashion_mnist32', 'cpu')
    pipe = LatentDiffusionPipeline(zoo.autoencoder, with_steps(zoo.denoiser).eval(), zoo.process, 32)
    pipe.save_pretrained(tmp_path)
    again, told = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu'), dict(seed=1, bs=2, cond=['bag', 'dress'])
    assert torch.equal(again.draw(2, 2, shortcut, guidance=1, **told), pipe.draw(2, 2, shortcut, guidance=1, **told))
    plain = dict(sampler='dpmpp_2m', guidance=2., **told)
    close(again.draw(2, 2, **plain), zoo.draw(2, 2, **plain))     # not trained yet, and other samplers need not know

# --- the curves of the lesson ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('least,scale', [(.01, 'log'), (0., 'linear'), (-.01, 'linear')])
def test_a_kid_below_zero_is_drawn(least, scale):
    "It is free of bias, so a very good one may be below 0, where no logarithmic axis shows it"
    cells = json.loads((Path(__file__).parents[1]/'nbs/70_few_step.ipynb').read_text(encoding='utf-8'))['cells']
    cell, = (''.join(c['source']) for c in cells if 'def draw_curves' in ''.join(c['source']))
    there = dict(plt=plt)
    exec(cell.split('\n\n')[0], there)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.simplefilter('ignore', DeprecationWarning)   # an old matplotlib calls pyparsing by its old names, and such a warning is both
        there['draw_curves'](dict(a=((1, 2), torch.full((2, 3), least))), 'KID', '')
        plt.gcf().canvas.draw()
    assert plt.gca().get_yscale() == scale
    plt.close()
