"Training: batches by number, averages, rates; a training that was killed, or continued, ends with the weights of one that was not."
import copy, json, math, os, random, re, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from functools import partial
from fastai.basics import SGD, Adam, Callback, DataLoaders, Larc, Learner, OptimWrapper, ranger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from latentdiff import training
from latentdiff.autoencoder import KLAutoencoder, ae_learner, train_autoencoder
from latentdiff.conditioning import ClassConditioner, Conditioned, conditional
from latentdiff.core import UserError, sealed
from latentdiff.disk import crc_of
from latentdiff.data import cropped, from_uint8, open_images, shifted
from latentdiff.muon import *
from latentdiff.noisify import Process
from latentdiff.rooms import rooms
from latentdiff.training import *
from latentdiff.training import largest_divisor   # which it passes on
from latentdiff.training import _DECAY as DECAY, _WARM as WARM
from latentdiff.unet import UNet, denoiser_learner, train_denoiser

# --- batches by number

def test_device_loader_batches():
    x, y = rooms(100, 16), torch.arange(100)
    valid = list(DeviceLoader(x, y, bs=32, device='cpu'))
    assert [len(b[0]) for b in valid] == [32, 32, 32, 4] and torch.cat([b[1] for b in valid]).tolist() == list(range(100))
    assert torch.equal(torch.cat([b[0] for b in valid]), from_uint8(x))
    train = DeviceLoader(x, y, bs=32, shuffle=True, seed=3, device='cpu')
    first, second = [torch.cat([b[1] for b in train]).tolist() for _ in range(2)]
    assert len(train) == 3 and len(set(first)) == 96 and first != second
    again = DeviceLoader(x, y, bs=32, shuffle=True, seed=3, device='cpu')
    torch.rand(5)
    assert torch.cat([b[1] for b in again]).tolist() == first
    for xb, yb in train: assert torch.equal(xb, from_uint8(x[yb]))
    assert len(DeviceLoader(x, bs=500, shuffle=True, device='cpu')) == 1

def test_device_loader_flip_and_floats():
    x = torch.randn(64, 4, 8, 8, dtype=torch.float16)
    (b,) = DeviceLoader(x, bs=64, flip=True, seed=0, device='cpu').one_batch()
    same = (b == x.float()).flatten(1).all(1)
    mirrored = (b == x.float().flip(-1)).flatten(1).all(1)
    assert b.dtype == torch.float32 and (same ^ mirrored).all() and 15 < same.sum() < 50
    (b,) = DeviceLoader(x, bs=8, transform=lambda o: o*0, device='cpu').one_batch()
    assert b.eq(0).all()

def test_device_loader_in_a_learner():
    x = rooms(120, 16)
    y = open_images('rooms', 16, n=120).labels
    dls = DataLoaders(DeviceLoader(x, y, bs=32, shuffle=True, seed=0, device='cpu'), DeviceLoader(x, y, bs=50, device='cpu'))
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 6)), loss_func=nn.CrossEntropyLoss(), lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit(15)
    with learn.no_bar():
        preds, targs = learn.get_preds()
        _, targs_train = learn.get_preds(ds_idx=0)
    assert targs.tolist() == y.tolist() == targs_train.tolist()
    assert (preds.argmax(1) == y).float().mean() > .5

def test_a_batch_is_a_function_of_seed_and_number():
    x, y = rooms(40, 16), torch.arange(40)
    make = lambda seed: DeviceLoader(x, y, bs=16, shuffle=True, flip=True, seed=seed, device='cpu')
    forth = [make(1).batch(k) for k in range(7)]
    dl = make(1)
    back = [dl.batch(k) for k in reversed(range(7))][::-1]
    other = [make(2).batch(k) for k in range(7)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forth, back))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(forth, other))
    assert len({*forth[0][1].tolist(), *forth[1][1].tolist()}) == 32            # an epoch takes no row twice
    turned = [b[0][i].equal(from_uint8(x[b[1][i]]).flip(-1)) for b in forth for i in range(16)]
    assert 30 < sum(turned) < 82 and turned[:16] != turned[32:48]

def test_shifted_pictures_are_cut_from_a_reflected_one():
    "Each of them, from any place up to `most` pixels off and from all of them; with 0 nothing moves."
    x, most = torch.arange(2*3*6*5.).view(2, 3, 6, 5), 2
    wide = F.pad(x, (most,)*4, 'reflect')
    cuts = {(i, t, l): wide[i, :, t:t+6, l:l+5] for i in (0, 1) for t in range(5) for l in range(5)}
    seen = set()
    for k in range(300):
        y = shifted(x, most, torch.Generator().manual_seed(k))
        seen |= {next((i, *o[1:]) for o, c in cuts.items() if o[0] == i and torch.equal(c, y[i])) for i in (0, 1)}
    assert seen == cuts.keys() and torch.equal(shifted(x, 0, torch.Generator()), x)

def test_crops_are_cut_from_inside_and_enlarged():
    "Each at a place that seed and number of the picture decide, however many there are at once; all places come; with 0 nothing is cut."
    x = from_uint8(rooms(2, 16))
    grown = lambda o, whole: F.interpolate(o[None], 16, mode='bicubic', antialias=True)[0].clamp(whole.min(), whole.max())
    parts = {(i, t, l): grown(x[i, :, t:t+14, l:l+14], x[i]) for i in (0, 1) for t in range(3) for l in range(3)}
    seen = set()
    for k in range(60):
        y = cropped(x, 2, 3, 2*k)
        assert torch.allclose(y[1:], cropped(x[1:], 2, 3, 2*k + 1), atol=1e-6) and (x.amin((1, 2, 3)) <= y.amin((1, 2, 3))).all() and (y.amax((1, 2, 3)) <= x.amax((1, 2, 3))).all()
        found = [next((o for o in parts if o[0] == i and torch.allclose(parts[o], y[i], atol=1e-5)), None) for i in (0, 1)]
        seen |= {*found}
    assert seen == parts.keys() and torch.equal(cropped(x, 0, 3), x)
    assert not torch.equal(cropped(x, 2, 3), cropped(x, 2, 4)) and torch.equal(cropped(x, 2, 3, 8), cropped(x, 2, 3, 8))

def test_a_shift_is_a_function_of_seed_and_number():
    "Like order and mirror, which it leaves as they are; the same picture is elsewhere in the next epoch."
    x, y = rooms(40, 16), torch.arange(40)
    make = lambda seed, crop=3, flip=False: DeviceLoader(x, y, bs=20, shuffle=True, flip=flip, seed=seed, device='cpu', crop=crop)
    forth, dl, still, other = [make(1).batch(k) for k in range(6)], make(1), make(1, 0), make(2)
    back = [dl.batch(k) for k in reversed(range(6))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forth, back))
    assert all(torch.equal(forth[k][1], still.batch(k)[1]) for k in range(6))
    assert torch.equal(still.batch(4)[0], from_uint8(x[still.batch(4)[1]]))
    of = lambda k: {int(i): o for o, i in zip(*forth[k])} | {int(i): o for o, i in zip(*forth[k + 1])}
    assert sum(not torch.equal(of(0)[i], of(2)[i]) for i in range(40)) > 30
    assert not torch.equal(forth[0][0], other.batch(0)[0]) and dl.new().crop == 3 and dl.new(crop=0).crop == 0
    a, b = make(1, flip=True).batch(3)[0], make(1, 0, flip=True).batch(3)[0]
    cuts = F.pad(b, (3,)*4, 'reflect').unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    assert (cuts == a[:, None]).flatten(2).all(2).any(1).all()

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_are_float32_whatever_is_stored(dtype):
    x = torch.full((4, 1, 2, 2), 255 if dtype == torch.uint8 else 1, dtype=dtype)
    (b,) = DeviceLoader(x, bs=4, device='cpu').batch(0)
    assert b.dtype == torch.float32 and b.eq(1).all()

def test_small_things():
    assert [largest_divisor(*o) for o in ((96, 32), (7, 6), (40, 10), (1, 8), (12, 0))] == [32, 1, 10, 1, 1]
    layer = nn.Conv2d(2, 3, 1)
    assert zero_init(layer) is layer and not any(p.any() for p in layer.parameters())
    before = peak_gb()
    block = torch.ones(50_000_000)
    assert peak_gb() >= before > .05 and peak_gb() < 64 and block.all()
    if sys.platform == 'linux':   # what the kernel calls kB is 1,024 bytes
        most = int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])*1024/1e9
        assert abs(peak_gb()/most - 1) < .01

# --- the average of the weights

class Walk(nn.Module):
    "One number; its gradient is always -1, so that SGD with lr 1 counts the steps."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return -self.w.expand(len(x))

def test_ema_closed_form():
    "The average of 1, 2, ... n with the warm-up decay, in the model after the fit and during validation."
    class Spy(Callback):
        order = 90
        def before_validate(self): seen.append(self.learn.model.w.item())
    class Feed(Callback):
        def before_batch(self): self.learn.xb, self.learn.yb = (torch.zeros(1, 1),), (torch.zeros(1),)
    seen, dl = [], DeviceLoader(torch.zeros(5, 1), bs=1, device='cpu')
    ema = EMA(.5)
    learn = Learner(DataLoaders(dl, dl), Walk(), loss_func=lambda p, y: p.mean(), opt_func=SGD, cbs=[ema, Spy(), Feed()])
    learn.dls.n_inp = 0
    with learn.no_bar(), learn.no_logging(): learn.fit(2, lr=1.)
    avg, path = 0., []
    for n in range(1, 11):
        d = min(.5, (1 + n)/(10 + n))
        avg = d*avg + (1 - d)*n
        path.append(avg)
    assert seen == pytest.approx([path[4], path[9]], rel=1e-6)
    assert learn.model.w.item() == pytest.approx(path[9], rel=1e-6)
    ema.swap()
    assert learn.model.w.item() == 10
    learn.validate()
    assert learn.model.w.item() == 10

# --- small learners

def data(n=50, seed=0): return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))

def shake(x): return x + .3*torch.randn_like(x)

def small_learner(*cbs, transform=None, dtype=torch.float32, n=50, bs=8, frozen=False, noise=.2):
    "A net with dropout, a batch norm, and if asked an average, a random transform and a frozen layer, on 50 rows"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(noise), nn.SiLU(), nn.Linear(16, 6), nn.Linear(6, 6)).to(dtype)
    net[0].requires_grad_(not frozen)
    x, loss = data(n), lambda p, y: F.mse_loss(p, y.to(dtype))
    train = DeviceLoader(x, x.flip(1), bs=bs, shuffle=True, seed=0, device='cpu', transform=transform)
    dls = DataLoaders(train, DeviceLoader(data(seed=1), data(seed=1).flip(1), bs=32, device='cpu'))
    class Cast(Callback):
        def before_batch(self): self.learn.xb = (self.x.to(dtype),)
    return Learner(dls, net, loss, opt_func=adamw, cbs=[Cast(), *cbs])

def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Plug(Callback):
    "Pulled at some event of step k, before anything else or after it"
    def __init__(self, event, k, order=-100): self.event, self.at, self.order = event, k, order
    def pull(self, event):
        if self.event == event and hasattr(self.learn, 'step_by_step') and self.step_by_step.k == self.at: raise KeyboardInterrupt
    def before_batch(self): self.pull('before_batch')
    def before_step(self): self.pull('before_step')
    def after_batch(self): self.pull('after_batch')
    def before_validate(self): self.pull('before_validate')
    def after_validate(self): self.pull('after_validate')
    def after_fit(self): self.pull('after_fit')

def quiet(learn, **kw):
    with learn.no_bar(), learn.no_logging(): return fit_steps(learn, **kw)

# --- saved and loaded

def saving(kind, path):
    "The learners that we make, small, in a folder of their own"
    torch.manual_seed(0)
    if kind == 'autoencoder': learn = ae_learner(KLAutoencoder(3, (8, 16), 2, 1, 4), rooms(32, 16), rooms(32, 16), bs=16, device='cpu')
    elif kind == 'classifier':
        x, y = data(), torch.arange(50) % 2
        loader = lambda **kw: DeviceLoader(x, y, bs=25, seed=0, device='cpu', **kw)
        learn = training.Learner(DataLoaders(loader(shuffle=True), loader()), nn.Linear(6, 2), nn.CrossEntropyLoss())   # by fastai's Adam
    else:
        z, c = torch.randn(32, 4, 8, 8), torch.arange(32) % 2
        net = UNet(4, widths=(16, 32), depth=1, attn_levels=(1,))
        if kind == 'conditional': net = Conditioned(conditional(net, 8), ClassConditioner(['a', 'b'], 8))
        z = (z, c) if kind == 'conditional' else z
        learn = denoiser_learner(net, Process('flow', 'velocity', 'logit_normal'), z, z, bs=16, device='cpu')
    learn.path = path
    return learn

@pytest.mark.parametrize('kind', ['autoencoder', 'denoiser', 'conditional', 'classifier'])
def test_after_load_training_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    "With what the optimizer remembers and its settings; without, it ends elsewhere; no pickle is written."
    def train(learn, **kw):
        with learn.no_bar(), learn.no_logging():
            torch.manual_seed(1)
            learn.fit(2, **kw)
        return state(learn)
    a = saving(kind, tmp_path)
    train(a, lr=1e-2)
    assert a.save('half') == tmp_path/'models'/'half.safetensors'
    half, whole = state(a), train(a, lr=1e-2)
    b = saving(kind, tmp_path)
    b.dls.train.epoch = b.dls.valid.epoch = 2
    assert b.load('half') is b and same(state(b), half) and not same(train(b, lr=1e-2), half)
    assert same(state(b), whole)
    c = saving(kind, tmp_path).load('half', with_opt=False)
    c.dls.train.epoch = 2
    assert c.opt is None and not same(train(c, lr=1e-2), whole)
    assert [f.name for f in (tmp_path/'models').iterdir()] == ['half.safetensors'] and load_file(tmp_path/'models'/'half.safetensors')
    if kind == 'autoencoder':
        assert a.opt.hypers == a.load('half').opt.hypers and a.save('bare', with_opt=False).stat().st_size < .6*a.save('half').stat().st_size

def test_what_does_not_fit_is_one_line_and_no_pickle_is_read(tmp_path):
    learn, other = saving('autoencoder', tmp_path), saving('denoiser', tmp_path)
    (tmp_path/'models').mkdir()
    torch.save(learn.model.state_dict(), tmp_path/'models'/'x.pth')
    with pytest.raises(UserError, match='x.safetensors is missing'): learn.load('x')
    (tmp_path/'models'/'x.safetensors').write_bytes((tmp_path/'models'/'x.pth').read_bytes())
    with pytest.raises(UserError, match='damaged'): learn.load('x')
    learn.create_opt()
    learn.save('x')
    with pytest.raises(UserError, match='does not fit') as e: other.load('x')
    assert '\n' not in str(e.value)
    again = saving('autoencoder', tmp_path)
    again.opt_func = adamw
    with pytest.raises(UserError, match='with_opt=False'): again.load('x')
    assert again.load('x', with_opt=False) is again

def test_no_sync_keeps_the_running_loss():
    a, b = small_learner(), small_learner()
    torch.manual_seed(0)
    a.fit(1, 1e-2)
    torch.manual_seed(0)
    no_sync(no_sync(b)).fit(1, 1e-2)
    assert torch.allclose(torch.tensor([float(l) for l in a.recorder.losses]), torch.tensor(b.recorder.losses), rtol=1e-6)
    assert isinstance(b.recorder.losses[0], float) and len(b.recorder.losses) == 6

def test_no_step_of_a_training_waits_for_the_loss_that_the_bar_shows():
    "The bar of the training is another than that of the timing before it"
    class Look(Callback):
        def before_batch(self): seen.add(self.training and 'after_batch' in vars(self.learn.progress))
    learn, seen = small_learner(), set()
    fit_steps(learn, steps=2, rounds=1, cbs=[Look()])
    assert True in seen and learn.progress.__dict__['after_batch']

# --- the rate

@pytest.mark.parametrize('steps', [200, 1000, 12_345])
def test_the_rate_rises_stays_and_falls_to_zero(steps):
    r, down = [rate(k, steps) for k in range(steps)], decay_start(steps)
    assert r[0] == 1/WARM and r[:WARM] == sorted(r[:WARM]) and set(r[WARM:down]) == {1}
    assert r[down:] == sorted(r[down:], reverse=True) and 0 < r[-1] <= 1/(DECAY*steps - 1) and down == steps - int(DECAY*steps)
    assert r[:down] == [rate(k, 10*steps) for k in range(down)]                # the longer training is the same so far

@pytest.mark.parametrize('steps', [1, 2, 3, 30])
def test_the_shortest_trainings_have_rates_too(steps):
    assert all(0 < rate(k, steps) <= 1 for k in range(steps))

@pytest.mark.parametrize('lr', [np.float64(1e-3), np.geomspace(1e-4, 1e-3, 2)[1], np.float32(1e-3)])
def test_a_rate_of_numpy_is_a_rate(lr):
    "As from a range of rates that somebody tries"
    a, b = small_learner(), small_learner()
    quiet(a, steps=2, rounds=1, lr=lr), quiet(b, steps=2, rounds=1, lr=1e-3)
    for x, y in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(x, y)

def test_the_optimizer_gets_that_rate():
    class Look(Callback):
        def before_step(self): seen.append(self.opt.hypers[-1]['lr'])
    seen = []
    quiet(small_learner(), steps=21, lr=.02, cbs=Look())
    assert seen == pytest.approx([.02*rate(k, 21) for k in range(21)])

# --- how long

def test_one_of_steps_epochs_and_minutes():
    for how in (dict(), dict(steps=3, epochs=1), dict(minutes=1, epochs=1)):
        with pytest.raises(UserError, match='one of the three'): fit_steps(small_learner(), **how)
    with pytest.raises(UserError, match='steps is 2.7: give a whole number from 1 to 1,000,000,000'): fit_steps(small_learner(), 2.7)
    with pytest.raises(UserError): small_learner().dls.train.new([torch.zeros(3)])   # as fastai's `predict` does: a list of rows
    (frozen := small_learner()).model.requires_grad_(False)   # as a loaded network is
    with pytest.raises(UserError, match='is frozen: call requires_grad_'): fit_steps(frozen, 2)

@pytest.mark.parametrize('how,steps', [(dict(steps=7), 7), (dict(epochs=2), 12), (dict(epochs=.5), 3), (dict(minutes=.1), 60), (dict(epochs=0), 1)])
def test_epochs_and_minutes_become_steps_once(how, steps, monkeypatch, capsys):
    monkeypatch.setattr(training, 'step_time', lambda learn: .1)
    learn = quiet(small_learner(), **how)
    assert learn.history['rows'][-1][0] == steps and f'{steps} steps of 8' in capsys.readouterr().out

def test_measuring_leaves_no_trace():
    learn = small_learner(EMA(.9))
    before, drawn = state(learn), torch.random.get_rng_state()
    with torch.random.fork_rng(): secs = step_time(learn)
    assert 0 < secs < 1 and same(before, state(learn)) and torch.equal(drawn, torch.random.get_rng_state())

def test_a_step_is_timed_without_the_validation_between_two():
    "Where an epoch has one batch, there is one between any two of them"
    class Slow(Callback):
        def before_validate(self): time.sleep(.3)
    with torch.random.fork_rng(): assert step_time(small_learner(Slow(), n=8)) < .2

def test_a_bare_denoiser_is_timed_and_left_as_it_was():
    net = nn.Conv2d(2, 2, 1)
    before = net.weight.clone()
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, z, t): return self.net(z)
    assert 0 < seconds_per_step(Net(), torch.randn(2, 2, 4, 4)) < 1 and torch.equal(net.weight, before)
    assert net.weight.grad is None or not net.weight.grad.any()

def test_the_readers_generator_is_left_alone():
    torch.manual_seed(1)
    want = torch.rand(3)
    learn = small_learner()
    torch.manual_seed(1)
    quiet(learn, steps=5)
    assert torch.equal(torch.rand(3), want)

def test_ten_rounds_and_their_rows():
    learn = quiet(small_learner(), steps=40)
    h = learn.history
    assert [r[0] for r in h['rows']] == list(range(4, 41, 4)) and all(len(r) == 3 for r in h['rows'])
    assert h['step'] == list(range(1, 41)) and len(h['loss']) == 40 and isinstance(h['loss'][0], float)
    assert [r[2] for r in h['rows']] == pytest.approx([float(v[1]) for v in learn.recorder.values])

# --- killed, and called again

KINDS = dict(plain={}, average=dict(ema=True), best=dict(keep_best=True), average_and_best=dict(ema=True, keep_best=True),
             loader=dict(transform=shake), frozen=dict(frozen=True, ema=True), double=dict(dtype=torch.float64, ema=True))

def trained(kind, checkpoint=None, steps=40, cbs=(), rounds=10):
    kw = dict(KINDS[kind])
    keep_best, cb = kw.pop('keep_best', False), [EMA(.9)] if kw.pop('ema', False) else []
    return quiet(small_learner(*cb, **kw), steps=steps, lr=.05, checkpoint=checkpoint, keep_best=keep_best, cbs=cbs, rounds=rounds)

@pytest.mark.parametrize('kind', KINDS)
def test_killed_at_any_moment_and_called_again(kind, tmp_path):
    "At any event of any step, with a checkpoint after every step or now and then"
    whole, luck = trained(kind), random.Random(kind)
    events = 'before_batch before_step after_batch before_validate after_validate after_fit'.split()
    for i in range(5):
        event, folder = luck.choice(events), tmp_path/str(i)
        k = luck.choice((4, 20, 36)) if 'validate' in event else 40 if event == 'after_fit' else luck.randrange(1, 40)
        keep = Checkpoint(folder, 'this', every=luck.choice((0, 0, .01)))
        with pytest.raises(KeyboardInterrupt): trained(kind, keep, cbs=Plug(event, k, luck.choice((-100, 99))))
        again = trained(kind, keep)
        assert same(state(again), state(whole)), (event, k)
        assert again.history['best'] == whole.history['best']
        assert [r[::2] for r in again.history['rows']] == [r[::2] for r in whole.history['rows']], (event, k)
        assert [again.history['step'][-1], len(again.history['step'])] == [40, 40]

def test_a_minute_is_all_that_can_be_lost(tmp_path, monkeypatch):
    "By a clock that moves 15 seconds a step: no minute goes by without a checkpoint of where the training is"
    now, written = [1000.], [1000.]
    class Clock(Callback):
        order = -8
        def before_batch(self): now[0] += 15*self.training
    class Noted(Checkpoint):
        def save(self, name, tensors, note):
            written.append(now[0])
            super().save(name, tensors, note)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    trained('average_and_best', Noted(tmp_path, 'this'), cbs=Clock())
    gaps = [b - a for a, b in zip(written, [*written[1:], now[0]])]
    assert now[0] == 1600 and max(gaps) <= 60, gaps

def test_the_best_weights_are_those_that_were_validated():
    "With an average the best validation is the average's, and so are the weights that are kept"
    learn = small_learner(EMA(.9))
    quiet(learn, steps=40, lr=.3, keep_best=True, rounds=20)
    best = min(learn.history['rows'], key=lambda r: r[2])
    assert learn.history['best'] == [best[0], best[2]]
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[0] == pytest.approx(best[2], rel=1e-5)

def test_a_killed_training_says_from_where_it_goes_on(tmp_path, capsys):
    keep = Checkpoint(tmp_path, 'this', every=0)
    with pytest.raises(KeyboardInterrupt): trained('plain', keep, cbs=Plug('before_batch', 17))
    trained('plain', keep)
    assert 'from step 17 on' in capsys.readouterr().out

def test_an_autoencoder_killed_and_called_again(tmp_path):
    x, luck = rooms(40, 16), random.Random(0)
    def train(checkpoint=None, cbs=()):
        torch.manual_seed(5)
        ae = KLAutoencoder(3, (8, 16), 2, 1, 4)
        learn = train_autoencoder(ae, x[:32], x[32:], steps=30, bs=8, flip=True, checkpoint=checkpoint, device='cpu', cbs=cbs)
        return {**state(learn), 'mean': ae.latent_mean, 'std': ae.latent_std}
    whole = train()
    for k in luck.sample(range(1, 30), 2):
        keep = Checkpoint(tmp_path/str(k), 'this', every=0)
        with pytest.raises(KeyboardInterrupt): train(keep, [Plug('after_batch', k, 99)])
        assert same(train(keep), whole), k

def test_a_unet_killed_and_called_again(tmp_path):
    from latentdiff.noisify import Process
    from latentdiff.unet import UNet, train_denoiser
    z, luck = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)), random.Random(1)
    def train(checkpoint=None, cbs=()):
        torch.manual_seed(5)
        net = UNet(4, widths=(16, 32), depth=1, attn_levels=(1,))
        process = Process('flow', 'velocity', 'logit_normal')
        return state(train_denoiser(net, process, z[:32], z[32:], steps=24, bs=8, checkpoint=checkpoint, device='cpu', cbs=cbs))
    whole = train()
    for k in luck.sample(range(1, 24), 2):
        keep = Checkpoint(tmp_path/str(k), 'this', every=0)
        with pytest.raises(KeyboardInterrupt): train(keep, [Plug('after_batch', k, 99)])
        assert same(train(keep), whole), k

NURSERY = """
import os, random, signal, sys, time
from dataclasses import replace
from latentdiff import autoencoder, core, data, training
training.Checkpoint.__init__.__defaults__ = (.02,)
images, p = data.open_images('rooms', 16, n=60), replace(core.preset('tiny'), n=60, size=16, ae_steps=60, bs=8)
def start(folder):
    "Make the autoencoder in a process of its own"
    pid = os.fork()
    if pid: return pid
    try: autoencoder.make_autoencoder(folder, images, p, device='cpu')
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
began = time.monotonic()
os.waitpid(start(sys.argv[1] + '/whole'), 0)
took, kills = time.monotonic() - began, 0
while True:
    pid = start(sys.argv[1] + '/cut')
    if kills < 6:
        time.sleep(took*random.uniform(.05, .4))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status): break
    kills += 1
print(status, kills)
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_by_sigkill_again_and_again(tmp_path, server):
    "The autoencoder of a run, killed up to six times at random moments, has the weights of one that was left in peace"
    out = server.code(NURSERY, tmp_path, seconds=300)
    assert out.rc == 0, out.err
    status, kills = map(int, out.out.split()[-2:])
    assert status == 0 and kills > 1, out.err
    whole, cut = (tmp_path/o/'autoencoder' for o in ('whole', 'cut'))
    assert sorted(o.name for o in cut.iterdir()) == ['autoencoder.safetensors', 'config.json', 'contents.json', 'made.json']
    for name in ('autoencoder.safetensors', 'config.json'): assert (cut/name).read_bytes() == (whole/name).read_bytes()
    left = [o.name for o in (tmp_path/'cut').rglob('.*') if o.name != '.lock']
    assert not [o for o in left if o.endswith('.making')] and not list((tmp_path/'cut'/'checkpoints').rglob('.*.part'))

# --- more

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('first,then', [(40, 41), (20, 70)])
def test_more_is_the_longer_training(kind, first, then, tmp_path):
    keep = Checkpoint(tmp_path, 'this', every=0)
    trained(kind, keep, steps=first)
    class From(Callback):
        order = 95
        def before_fit(self): began.append(self.step_by_step.k)
    began = []
    more = trained(kind, keep, steps=then, cbs=From())
    assert same(state(more), state(trained(kind, steps=then)))
    assert began == [0 if 'best' in kind else decay_start(first)]    # the best of other validations is another best

def test_more_and_killed_while_at_it(tmp_path):
    keep = Checkpoint(tmp_path, 'this', every=0)
    trained('average', keep, steps=40)
    for k in (33, 47, 71):
        with pytest.raises(KeyboardInterrupt): trained('average', keep, steps=80, cbs=Plug('after_batch', k, 99))
    assert same(state(trained('average', keep, steps=80)), state(trained('average', steps=80)))

def test_less_starts_afresh(tmp_path):
    "The longer training was past the point where the shorter one slows down"
    keep = Checkpoint(tmp_path, 'this', every=0)
    trained('plain', keep, steps=40)
    assert same(state(trained('plain', keep, steps=20)), state(trained('plain', steps=20)))

# --- checkpoints

def test_the_checkpoint_of_another_training_is_left_out(tmp_path):
    trained('plain', Checkpoint(tmp_path, 'that', every=0))
    keep = Checkpoint(tmp_path, 'this', every=0)
    assert keep.load(40) is None and Checkpoint(tmp_path, 'that').load(40)[1]['k'] == 40
    assert same(state(trained('plain', keep)), state(trained('plain')))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_a_checkpoint_keeps_every_type(dtype, tmp_path):
    x = (torch.randn(3, 4, 5, 6)*3).to(dtype).to(memory_format=torch.channels_last)
    keep = Checkpoint(tmp_path, 'this')
    keep.save('last', dict(x=x, n=torch.tensor(7).to(dtype)), dict(k=3, steps=9))
    tensors, note = keep.load(9)
    assert tensors['x'].dtype == dtype and torch.equal(tensors['x'], x) and torch.equal(tensors['n'], torch.tensor(7).to(dtype)) and note['k'] == 3

def test_a_write_that_was_cut_off_is_cleared_away(tmp_path):
    (tmp_path/'.last.safetensors.123.part').write_bytes(b'half')
    Checkpoint(tmp_path, 'this').save('last', {}, dict(k=1, steps=2))
    assert [o.name for o in tmp_path.iterdir()] == ['last.safetensors']

@pytest.mark.parametrize('note', [dict(k='x'), dict(k=2.5), dict(k=-1), dict(k=None), dict(steps='x'), dict(steps=None), dict(ema='x'), dict(ema=None), dict(spent='x'), dict(spent=math.nan), dict(k=10**30), dict(ema=10**12), dict(spent=10**400)], ids=lambda o: f'{o!s:.30}')
def test_a_note_that_counts_wrongly_is_one_line(note, tmp_path):
    "With a seal that fits"
    keep = Checkpoint(tmp_path, 'this')
    whole = dict(k=3, steps=40, ema=0, history={}) | note
    keep.save('last', {'a': torch.ones(2)}, {k: v for k, v in whole.items() if k != 'spent'})
    if 'spent' in note:
        had = load_file(keep.path('last'))
        save_file(had, keep.path('last'), {'note': json.dumps(sealed(dict(whole, made_from='this', sums=crc_of(had))))})
    with pytest.raises(UserError, match='is not a whole checkpoint: delete it') as e: keep.load(40)
    assert '\n' not in str(e.value)

class Quits(Callback):
    order = 95
    def after_batch(self):
        if self.step_by_step.k == 24: raise KeyboardInterrupt

def moments(how, of=''): return lambda d: {k: how(v) if k.startswith(f'opt.{of}') and v.ndim else v for k, v in d.items()}
def without(start): return lambda d: {k: v for k, v in d.items() if not k.startswith(start)}

FORGED = dict(half=lambda d: {k: v.half() for k, v in d.items()}, whole_numbers=lambda d: {k: v.to(torch.int8) if k.startswith('model.') else v for k, v in d.items()},
              one_moment=moments(lambda v: v.flatten()[:1]), half_moments=moments(torch.Tensor.half), no_average=without('ema.0'), no_memory=without('opt.'), without_a_moment=without('opt.0.exp_avg_sq'), a_short_moment=moments(lambda v: v.flatten()[:1], '1.'),
              before_the_first=lambda d: {k: -5 + 0*v if k.endswith('.step') else v for k, v in d.items()}, one_more=lambda d: d | {'ema.99': torch.ones(2)}, a_stranger=lambda d: d | {'z': torch.ones(2)}, best_of_half=lambda d: {k: v.half() if k.startswith('best.') else v for k, v in d.items()},
              of_a_stranger=lambda d: d | {'opt.99.step': torch.tensor(1)}, of_nobody=lambda d: d | {'opt.x.step': torch.tensor(1)})
NOTED = dict(k=[dict(k=41), dict(k=None)], kid=[dict(kid=o) for o in ('rubbish', 5, [1], [['a']])], smooth=[dict(smooth=o) for o in (None, 'x', [], math.nan, math.inf)], ema=[dict(ema=2**40)], scaler=[dict(scaler={'x': 1})],
             history=[dict(history=o) for o in ('x', {}, dict(step=[1], loss=[1.], rows=[]))], lists=[dict(step={}), dict(loss={}), dict(rows=''), dict(step=[])], rows=[dict(rows=o) for o in ('x', [['a']], [[1]], [[1, 2., 'x']], [3], None)],
             loss=[dict(loss=['a']), dict(loss=None)], step=[dict(step=[None])], best=[dict(best=o) for o in (None, 'x', [1], [1, 'x'], {}, [])])

@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A checkpoint of a training with an average and its best weights; what such a training is"
    folder = tmp_path_factory.mktemp('begun')
    train = lambda folder, *cbs: quiet(small_learner(EMA()), steps=40, checkpoint=Checkpoint(folder, 'this', every=0), keep_best=True, cbs=[*cbs])
    with pytest.raises(KeyboardInterrupt): train(folder, Quits())
    with safe_open(folder/'last.safetensors', 'pt') as o: note = json.loads(o.metadata()['note'])
    return load_file(folder/'last.safetensors'), note, train

def forge(folder, tensors, note):
    "With a seal and sums that fit"
    note = {k: v for k, v in note.items() if k != 'seal'} | dict(sums=crc_of(tensors))
    save_file(tensors, folder/'last.safetensors', {'note': json.dumps(sealed(note))})

def test_a_training_within_no_grad_is_one(tmp_path):
    "As in a cell that goes on to draw"
    with torch.no_grad(): there = quiet(small_learner(), steps=3)
    assert all(torch.equal(v, w) for v, w in zip(there.model.state_dict().values(), quiet(small_learner(), steps=3).model.state_dict().values()))

def test_a_training_goes_on_from_what_it_wrote(begun, tmp_path):
    "That is: its state is then, to the last byte, the one that was written down"
    tensors, note, train = begun
    assert {k.split('.')[0] for k in tensors} == {'model', 'opt', 'ema', 'best'} and note['history']['best']
    forge(tmp_path, tensors, note)
    assert all(torch.equal(v, w) for v, w in zip(train(tmp_path).model.state_dict().values(), train(tmp_path/'whole').model.state_dict().values()))

@pytest.mark.parametrize('how', [*FORGED, *(f'{k} {i}' for k, v in NOTED.items() for i in range(len(v)))])
def test_a_checkpoint_that_somebody_has_made_up_is_one_line(how, begun, tmp_path):
    "Of other kinds, shapes and names than the training has, or with a history of letters; nothing is gone on from in silence"
    tensors, note, train = begun
    if how in FORGED: forge(tmp_path, FORGED[how](dict(tensors)), note)
    else:
        (k, v), = NOTED[how.split()[0]][int(how.split()[1])].items()
        forge(tmp_path, tensors, note | {k: v} if k in note and k != 'kid' else note | dict(history=note['history'] | {k: v}))
    with pytest.raises(UserError, match='delete it, and this training starts again') as e: train(tmp_path)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('left_out', ['k', 'steps', 'sums', 'smooth', 'history', 'ema', 'scaler'])
def test_a_checkpoint_whose_note_lacks_something_is_one_line(left_out, begun, tmp_path):
    tensors, note, train = begun
    save_file(tensors, tmp_path/'last.safetensors', {'note': json.dumps(sealed({k: v for k, v in note.items() if k not in ('seal', left_out)}))})
    with pytest.raises(UserError, match='delete it, and this training starts again'): train(tmp_path)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, *[torch.float64]*('LATENTDIFF_LONG' in os.environ)])
@pytest.mark.parametrize('opt', ['NAdam', 'ASGD', 'RAdam', 'AdamW', 'Adafactor', 'SGD', 'Muon', 'fastai', 'larc'])
def test_any_optimizer_goes_on_to_the_bit(opt, dtype, tmp_path):
    "Some keep single numbers of another kind than the weights are, or moments of another shape"
    func = Adam if opt == 'fastai' else Larc if opt == 'larc' else muon if opt == 'Muon' else partial(OptimWrapper, opt=getattr(torch.optim, opt))
    def train(folder, *cbs):
        learn = small_learner(dtype=dtype)
        learn.opt_func = func
        return quiet(learn, steps=40, checkpoint=Checkpoint(folder, 'this', every=0), cbs=[*cbs])
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'cut', Quits())
    for v, w in zip(train(tmp_path/'whole').model.parameters(), train(tmp_path/'cut').model.parameters()): assert torch.equal(v, w)

def test_a_loss_that_is_not_finite_is_not_written_down(tmp_path):
    "On a GPU it is looked at a step later; a checkpoint with it would be refused when it is read"
    class Spoil(Callback):
        order = 89
        def after_batch(self):
            if self.step_by_step.k == 9: self.recorder.smooth_loss.val = torch.tensor(math.inf)
    keep = Checkpoint(tmp_path, 'this', every=0)
    with pytest.raises(UserError, match='nothing of this step is saved'): quiet(small_learner(), steps=40, checkpoint=keep, cbs=[Spoil()])
    assert keep.load(40)[1]['k'] == 8

@pytest.mark.parametrize('opt', [Adam, adamw, muon])
def test_a_memory_of_another_shape_or_kind_is_not_taken(opt, tmp_path):
    "A fused optimizer reads where nothing is; halves would stay halves"
    def learner():
        learn = small_learner()
        learn.opt_func = opt
        return learn
    quiet(learn := learner(), steps=4)
    f = learn.save(tmp_path/'learned')
    with safe_open(f, 'pt') as o: tensors, note = {k: o.get_tensor(k).clone() for k in o.keys()}, o.metadata()
    moment = next(k for k, v in tensors.items() if k.startswith('opt.') and v.ndim == 2)
    for spoilt in (tensors[moment][:1, :1], tensors[moment].flatten(), tensors[moment][0, 0]):
        save_file(tensors | {moment: spoilt.contiguous()}, f, note)
        with pytest.raises(UserError, match='does not fit this optimizer'): learner().load(tmp_path/'learned')
    save_file({k: v.half() if v.is_floating_point() and k.startswith('opt.') and v.ndim else v for k, v in tensors.items()}, f, note)
    state = getattr((again := learner().load(tmp_path/'learned')).opt, 'opt', again.opt).state
    assert {v.dtype for s in state.values() for v in s.values() if torch.is_tensor(v) and v.ndim} == {torch.float32}

def test_an_optimizer_that_remembers_more_is_refused(tmp_path):
    "fastai's Lookahead keeps slow weights beside what its optimizer keeps"
    learn = small_learner()
    learn.opt_func = ranger
    with pytest.raises(UserError, match='Lookahead remembers what cannot be written down'): quiet(learn, steps=40, checkpoint=Checkpoint(tmp_path, 'this'))   # before its first step
    quiet(learn, steps=4)   # without a checkpoint it may
    with pytest.raises(UserError, match='take another optimizer'): learn.save(tmp_path/'learned')

def test_a_single_number_goes_on_as_it_was(tmp_path):
    "Its moments have no axes, like the number of its steps"
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.net, self.by = nn.Linear(4, 4), nn.Parameter(torch.tensor(.5))
        def forward(self, x): return self.by*self.net(x)
    for name, opt in dict(fastai=Adam, torch=adamw).items():
        def train(folder, *cbs):
            torch.manual_seed(0)
            loader = DeviceLoader(torch.randn(64, 4), torch.randn(64, 4), bs=16, seed=0, device='cpu')
            return quiet(Learner(DataLoaders(loader, loader), Scaled(), nn.MSELoss(), opt), steps=40, checkpoint=Checkpoint(folder, 'this', every=0), cbs=[*cbs])
        with pytest.raises(KeyboardInterrupt): train(tmp_path/name, Quits())
        whole, again = train(tmp_path/'whole'/name), train(tmp_path/name)
        assert torch.equal(whole.model.by, again.model.by) and torch.equal(whole.model.net.weight, again.model.net.weight)

def test_the_seconds_of_a_training_are_those_of_all_its_calls(tmp_path, monkeypatch):
    "Of a killed one what its checkpoint holds, and of a longer one what it goes on from; by a clock that moves ten seconds a step"
    from latentdiff import core
    now = [0.]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0], perf_counter=lambda: now[0])
    for o in (core, training): monkeypatch.setattr(o, 'time', clock)
    class Tick(Callback):
        order, run_valid = 80, False
        def after_batch(self):
            if hasattr(self, 'step_by_step'): now[0] += 10
    def train(steps, *cbs):
        keep = Checkpoint(tmp_path/'checkpoints', 'this', every=0)
        def make(work):
            quiet(small_learner(), steps=steps, checkpoint=keep, cbs=[Tick(), *cbs])
            return dict(seconds_before=keep.spent)
        now[0] += 1000   # nobody trains
        note = core.made(core.artefact(tmp_path/'unet', make, {}, dict(steps=steps), remake=True))
        assert 'before' not in note['facts']
        return note['seconds']
    with pytest.raises(KeyboardInterrupt): train(40, Plug('before_batch', 17))
    assert train(40) == pytest.approx(400, abs=11)
    assert train(60) == pytest.approx(600, abs=11)

@pytest.mark.parametrize('how', ['cut off', 'empty', 'no note'])
def test_a_damaged_checkpoint_is_one_line(how, tmp_path):
    f, keep = tmp_path/'last.safetensors', Checkpoint(tmp_path, 'this')
    keep.save('last', dict(x=torch.ones(100)), dict(k=1, steps=2))
    if how == 'no note': save_file(load_file(f), f)
    else: f.write_bytes(f.read_bytes()[:-50] if how == 'cut off' else b'')
    with pytest.raises(UserError, match='delete it') as e: keep.load(2)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('how,which,k', [('cut off', 'last', 30), ('no note', 'last', 30), ('not finite', 'last', 30), ('a bit', 'last', 30), ('its kind', 'last', 30), ('its step', 'last', 30), ('empty', 'stable', 34)])
def test_beside_a_damaged_checkpoint_the_other_one_is_gone_on_from(how, which, k, tmp_path, capsys):
    "To the very weights, whichever it is; said in one line"
    keep, whole = Checkpoint(tmp_path, 'this', every=0), trained('average')
    with pytest.raises(KeyboardInterrupt): trained('average', keep, cbs=[Plug('before_batch', 34)])
    f = keep.path(which)
    with safe_open(f, 'pt') as o: note = o.metadata()
    if how in ('cut off', 'empty'): f.write_bytes(f.read_bytes()[:-50] if how == 'cut off' else b'')
    elif how == 'a bit':   # of a number that stays finite
        raw = f.read_bytes()
        f.write_bytes(raw[:-400] + bytes([raw[-400] ^ 1]) + raw[-399:])
    elif how == 'its kind': save_file({n: x.view(torch.int32) if x.dtype == torch.float32 else x for n, x in load_file(f).items()}, f, note)
    elif how == 'its step': save_file(load_file(f), f, dict(note=json.dumps(json.loads(note['note']) | dict(k=40))))
    else: save_file({n: x*float('nan') if how == 'not finite' and x.is_floating_point() else x for n, x in load_file(f).items()}, f, None if how == 'no note' else note)
    capsys.readouterr()
    again = trained('average', keep)
    said = [l for l in capsys.readouterr().out.splitlines() if str(f) in l]
    assert len(said) == 1 and f'goes on from another, at step {k}' in said[0] and same(state(again), state(whole))

def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    "Whatever it lacks, in its note or among its tensors; without it, the training starts again"
    keep, f, says = Checkpoint(tmp_path, 'this', every=0), tmp_path/'last.safetensors', 'delete it, and this training starts again'
    with pytest.raises(KeyboardInterrupt): trained('average', keep, cbs=[Plug('before_batch', 20)])
    with safe_open(f, 'pt') as o: note, tensors = json.loads(o.metadata()['note']), {k: o.get_tensor(k).clone() for k in o.keys()}   # the file is written over
    for lost in ('made_from', 'k', 'steps', 'smooth', 'ema', 'scaler', 'history', 'history.rows', 'ema.0', 'model.0.bias'):
        less = json.loads(json.dumps(note))
        *way, last = lost.split('.')
        if lost not in tensors: del (less[way[0]] if way else less)[last]
        save_file({k: v for k, v in tensors.items() if k != lost}, f, dict(note=json.dumps(less)))
        with pytest.raises(UserError, match=says) as e: keep.load(40) if lost in ('made_from', 'k', 'steps') else trained('average', keep)
        assert '\n' not in str(e.value), lost
    for bad in (dict(k='x'), dict(k=-1), dict(steps=float('nan')), dict(k=True)):
        save_file(tensors, f, dict(note=json.dumps({**note, **bad})))
        with pytest.raises(UserError, match=says): keep.load(40)
    save_file(tensors, f, dict(note=json.dumps(note)))
    assert keep.load(40)[1]['k'] == note['k']

def test_a_learner_is_not_exported(tmp_path):
    "fastai's `export` pickles it; ours says what to do instead, and writes nothing"
    learn = saving('classifier', tmp_path)
    with pytest.raises(UserError, match="learn.save") as e: learn.export('learner.pkl')
    assert '\n' not in str(e.value) and not [*tmp_path.iterdir()]

# --- not a number

class Poison(Callback):
    "At step k, something is not a number any more"
    def __init__(self, what, k): self.what, self.at = what, k
    def here(self, what): return self.what == what and self.training and self.step_by_step.k == self.at
    def after_pred(self):
        if self.here('loss'): self.learn.pred = self.pred*float('nan')
        if self.here('infinite loss'): self.learn.pred = self.pred + float('inf')
    def before_step(self):
        if self.here('gradient'): next(self.model.parameters()).grad[0] = float('nan')
    def after_step(self):
        if self.here('weights'): next(self.model.parameters()).data[0] = float('inf')

class Ruin(Callback):
    "At step k, weights that are finite, but too large for anything to come out"
    def __init__(self, k): self.at = k
    def after_step(self):
        if self.step_by_step.k == self.at:
            for p in self.model.parameters(): p.data.mul_(1e30)

def test_ruined_in_the_last_step_of_a_round_is_told_by_its_validation():
    with pytest.raises(UserError, match='training Sequential stopped at step 20: its validation loss is not .* lower rate than 0.001'):
        fit_steps(small_learner(), 40, rounds=2, cbs=[Ruin(19)])

@pytest.mark.parametrize('what', ['loss', 'infinite loss', 'gradient', 'weights'])
@pytest.mark.parametrize('k,every', [(0, (0,)), (13, (0,)), (39, (0,)), (13, ())], ids=['0', '13', '39', 'seldom written'])
@pytest.mark.parametrize('kind', ['plain', 'average_and_best'])
def test_what_is_not_finite_stops_within_a_step(what, k, every, kind, tmp_path):
    "In one line, at once or one step later, and no file holds any of it; nor does the folder of a training that fell ill at once"
    keep, last = Checkpoint(tmp_path/'keep', 'this', *every), []
    class Count(Callback):
        order = -8
        def before_batch(self): last.append(self.step_by_step.k)
    with pytest.raises(UserError, match='train again at a lower rate') as e: trained(kind, keep, cbs=[Poison(what, k), Count()])
    assert '\n' not in str(e.value) and last[-1] <= k + 1
    if k == 0 or not every: assert not keep.folder.exists()
    else:
        assert keep.load(40, exact=True)[1]['k'] <= k
        for f in keep.folder.iterdir(): assert all(v.isfinite().all() for v in load_file(f).values() if v.is_floating_point())

def test_without_checkpoints_it_stops_too():
    for what in ('loss', 'gradient'):
        with pytest.raises(UserError, match='not'): trained('average_and_best', cbs=Poison(what, 39))

# --- Muon

def wide_and_tall():
    x = torch.randn(3, 24, 80, generator=torch.Generator().manual_seed(0))
    return x, x.mT

def test_orthogonalise_keeps_directions():
    "U S V^T becomes U T V^T with T near one, wide or tall"
    for x in wide_and_tall():
        y = orthogonalise(x)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        t = torch.einsum('nrk,nrc,nkc->nk', u, y, vh)
        assert (y - u@torch.diag_embed(t)@vh).norm() < 1e-4*y.norm()       # the same directions
        a, b, c = 3.4445, -4.775, 2.0315
        want = s/s.norm(dim=1, keepdim=True)
        for _ in range(5): want = a*want + b*want**3 + c*want**5           # the polynomial, on singular values alone
        assert (t - want).abs().max() < 1e-3 and .6 < t.min() and t.max() < 1.3

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon to compare with')

@needs_muon
def test_orthogonalise_is_torchs():
    "As far as bfloat16 goes, in which torch computes"
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs
    for x in wide_and_tall():
        for o, p in zip(x, orthogonalise(x)): assert (theirs(o, (3.4445, -4.775, 2.0315), 5, 1e-7).float() - p).norm() < .02*p.norm()

@needs_muon
def test_muon_is_torchs_on_matrices_and_adamw_elsewhere():
    "A convolution moves as torch's Muon moves its matrix; a linear layer, and a convolution to three channels, as AdamW moves them"
    conv, rest = nn.Conv2d(6, 20, 3), [*nn.Linear(25, 24).parameters(), *nn.Conv2d(20, 3, 3).parameters()]
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    other = [nn.Parameter(p.detach().clone()) for p in (conv.bias, *rest)]
    ours = Muon([*conv.parameters(), *rest], 3e-3, weight_decay=.1)
    theirs = torch.optim.Muon([matrix], 3e-3, weight_decay=.1, momentum=.95, nesterov=True, adjust_lr_fn='match_rms_adamw')
    adamw = torch.optim.AdamW(other, 3e-3, weight_decay=.1, fused=True)
    start = conv.weight.detach().clone()
    for k in range(6):
        g = torch.Generator().manual_seed(k)
        for p in (*conv.parameters(), *rest): p.grad = torch.randn(p.shape, generator=g)
        matrix.grad = conv.weight.grad.flatten(1).clone()
        for p, o in zip((conv.bias, *rest), other): o.grad = p.grad.clone()
        for opt in (ours, theirs, adamw): opt.step()
    moved = (conv.weight - start).flatten(1)
    assert (conv.weight.flatten(1) - matrix).norm() < .01*moved.norm()     # torch's works in bfloat16
    for p, o in zip((conv.bias, *rest), other): assert torch.equal(p, o)

def test_muon_sees_unscaled_gradients_and_skips_bad_ones():
    "With a loss scaled by a power of two it takes the same steps to the bit; where a gradient overflows, none"
    def steps(scaler, factors=(1., 1., 1.)):
        torch.manual_seed(0)
        conv, g = nn.Conv2d(16, 16, 3), torch.Generator().manual_seed(1)
        opt = Muon(conv.parameters(), 1e-2)
        for f in factors:
            loss = (conv(torch.randn(2, 16, 4, 4, generator=g))*f).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler: scaler.step(opt), scaler.update()
            else: opt.step()
            opt.zero_grad()
        return conv.weight.detach()
    plain, scaled = steps(None), steps(torch.amp.GradScaler('cpu', init_scale=2.**12))
    assert torch.equal(plain, scaled)
    assert torch.equal(steps(None, ()), steps(torch.amp.GradScaler('cpu', init_scale=2.**12), (float('inf'),)))

@pytest.mark.parametrize('kind, least', [(torch.float64, .999999), (torch.bfloat16, .99)])
def test_muon_moves_weights_of_any_precision(kind, least):
    "As far as in float32, and in the same direction"
    x = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)).to(kind)
    moved = []
    for o in (nn.Parameter(x.clone()), nn.Parameter(x.float())):
        o.grad = o.detach().clone()
        Muon([o], lr=1., weight_decay=0).step()
        moved.append((o.detach() - x.to(o)).double().flatten())
    far, want = (o.norm().item() for o in moved)
    assert F.cosine_similarity(*moved, dim=0) > least and far == pytest.approx(want, rel=.02) and far > 1

def test_muon_goes_on_from_its_state():
    "Saved and loaded after three steps, three more end at the same bits"
    def steps(opt, conv, ks):
        for k in ks:
            for p in conv.parameters(): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            opt.step()
    conv = nn.Conv2d(3, 20, 3)
    again = copy.deepcopy(conv)
    opt = Muon(conv.parameters())
    steps(opt, conv, range(3))
    again.load_state_dict(conv.state_dict())
    other = Muon(again.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(opt, conv, range(3, 6))
    steps(other, again, range(3, 6))
    for p, q in zip(conv.parameters(), again.parameters()): assert torch.equal(p, q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_recorded_step_is_the_step(monkeypatch):
    "The losses and weights of a training do not change when network and Muon are recorded and replayed"
    def train():
        torch.manual_seed(0)
        z = torch.randn(256, 4, 8, 8)
        net = UNet(4, widths=(32, 64), depth=1, attn_levels=(1,))
        return train_denoiser(net, Process('flow', 'velocity', 'uniform'), z, z[:64], steps=40, bs=32, rounds=2)
    learn = train()
    assert 'forward' not in vars(learn.model)
    monkeypatch.setattr(Graphed, 'before_batch', lambda self: None)
    monkeypatch.setattr(Muon, 'moves_for', lambda self, ahead: moves)
    plain = train()
    torch.testing.assert_close(torch.tensor(learn.recorder.losses), torch.tensor(plain.recorder.losses), rtol=2e-3, atol=0)
    for a, b in zip(learn.model.parameters(), plain.model.parameters()): torch.testing.assert_close(a, b, rtol=.02, atol=2e-3)
