"The denoiser against diffusers on copied weights, and its training against closed forms."
import math, time
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from torch import nn
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from fastai.basics import Callback, DataLoaders, Learner, SGD
from latentdiff.autoencoder import load_component, save_component
from latentdiff.data import PRESETS, DeviceLoader, UserError
from latentdiff.noisify import Process
import latentdiff.unet
from latentdiff.unet import (EMA, ActStats, Diffusers2D, Passes, ResBlock, SelfAttention, UNet, denoiser_for, largest_divisor,
                             loss_by_level, mixed_precision, timestep_embedding, train_denoiser)

FLOW = Process('flow', 'velocity', 'logit_normal')

def randomise(net, seed=0):
    "Give every weight of `net` a value, so that nothing hides behind a zero."
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g)*(.05 if p.ndim > 1 else .5)
    return net

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def gap(a, b): return (a - b).abs().max().item()

# --- blocks ---------------------------------------------------------------------------------------------------------

def test_largest_divisor():
    assert [largest_divisor(*o) for o in ((96,32), (7,6), (40,10), (1,8), (12,0))] == [32, 1, 10, 1, 1]

@pytest.mark.parametrize('dim', [2, 32, 96])
def test_time_embedding_is_diffusers(dim):
    t = torch.linspace(0, 1, 11)
    assert gap(timestep_embedding(t, dim), get_timestep_embedding(1000*t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)) < 1e-6

def test_time_embedding_refuses_odd():
    with pytest.raises(ValueError, match='even'): timestep_embedding(torch.rand(2), 7)

@pytest.mark.parametrize('cin,cout,groups', [(32,32,8), (32,64,8), (96,48,12)])
def test_resblock_is_diffusers(cin, cout, groups):
    ours = randomise(ResBlock(cin, cout, 40))
    theirs = ResnetBlock2D(in_channels=cin, out_channels=cout, temb_channels=40, groups=groups, eps=1e-5, time_embedding_norm='scale_shift')
    theirs.load_state_dict(ours.state_dict())
    x,emb = noise(3, cin, 6, 10), noise(3, 40, seed=2)
    assert gap(ours(x, emb), theirs(x, emb)) < 1e-5

@pytest.mark.parametrize('c,heads', [(32,1), (64,4), (48,3)])
@pytest.mark.parametrize('processor', [None, AttnProcessor()])
def test_attention_is_diffusers(c, heads, processor):
    ours = randomise(SelfAttention(c, heads))
    theirs = Attention(c, heads=heads, dim_head=c//heads, bias=True, norm_num_groups=ours.group_norm.num_groups, eps=1e-5,
                       residual_connection=True, processor=processor)
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, c, 4, 6)
    assert gap(ours(x), theirs(x)) < 1e-5

@torch.no_grad()
def test_attention_is_its_equation():
    att = randomise(SelfAttention(32, 2))
    x = noise(2, 32, 3, 5)
    tok = att.group_norm(x).flatten(2).mT
    q,k,v = (f(tok).reshape(2, 15, 2, 16).permute(0, 2, 1, 3) for f in (att.to_q, att.to_k, att.to_v))
    w = (q @ k.mT / math.sqrt(16)).softmax(-1)
    out = att.to_out[0]((w @ v).permute(0, 2, 1, 3).reshape(2, 15, 32)).mT.reshape(x.shape)
    assert gap(att(x), x + out) < 1e-5

def test_attention_moves_with_its_tokens():
    att,x,order = randomise(SelfAttention(32, 2)), noise(1, 32, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    assert gap(att(shuffled).flatten(2), att(x).flatten(2)[..., order]) < 1e-5

def test_attention_refuses_uneven_heads():
    with pytest.raises(ValueError, match='split'): SelfAttention(32, 5)

@pytest.mark.parametrize('block', [ResBlock(32, 32, 8), SelfAttention(32, 2)])
def test_blocks_start_as_the_identity(block):
    x = noise(2, 32, 4, 4)
    assert torch.equal(block(x, noise(2, 8)), x)

# --- the whole network ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(widths=(32,64)), dict(widths=(32,64,64,128), depth=1), dict(widths=(40,72), attn_levels=(0,)),
                                dict(widths=(128,256), depth=1), dict(widths=(64,), attn_levels=()), dict(out_channels=8, widths=(32,32))])
def test_unet_is_diffusers(kw):
    ours,theirs = randomise(UNet(4, **kw)), Diffusers2D(4, **kw)
    theirs.net.load_state_dict(ours.state_dict())
    x,t = noise(2, 4, 16, 8), torch.tensor([.03, .8])
    assert gap(ours(x, t), theirs(x, t)) < 1e-5 * ours(x, t).abs().max().item()

@pytest.mark.parametrize('kw,n', [(dict(widths=(32,64,64,128)), 4_949_028), (dict(widths=(128,256,512,768)), 174_581_892)])
def test_parameter_counts(kw, n):
    with torch.device('meta'): assert sum(p.numel() for p in UNet(4, **kw).parameters()) == n

@pytest.mark.parametrize('levels,h,w', [(2,4,4), (2,8,8), (3,4,12), (4,8,8), (4,32,32), (1,5,7)])
def test_shapes(levels, h, w):
    net = UNet(3, widths=(32,)*levels, depth=1)
    assert net(noise(2, 3, h, w), torch.rand(2)).shape == (2, 3, h, w)

def test_no_host_synchronisation():
    "A meta tensor has no values: reading one on the host would raise."
    with torch.device('meta'):
        net = UNet(4, widths=(32,64))
        assert net(torch.empty(2, 4, 8, 8), torch.empty(2)).is_meta

def test_starts_at_zero_and_wakes_up():
    net,x = UNet(4, widths=(32,64), depth=1), noise(4, 4, 8, 8)
    assert not net(x, torch.rand(4)).any()
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(3):
        (net(x, torch.full((4,), .5)) - x).square().mean().backward()
        opt.step()
    assert all(p.grad is not None and p.grad.any() for n,p in net.named_parameters() if n.startswith('conv'))

def test_time_changes_the_answer():
    net,x = randomise(UNet(4, widths=(32,64), depth=1)), noise(1, 4, 8, 8)
    assert gap(net(x, torch.tensor([.2])), net(x, torch.tensor([.7]))) > 1e-3

def test_refusals():
    net = UNet(4, widths=(32,64))
    with pytest.raises(ValueError, match='multiples of 2'): net(noise(1, 4, 7, 8), torch.rand(1))
    with pytest.raises(ValueError, match='cond'): net(noise(1, 4, 8, 8), torch.rand(1), cond=torch.zeros(1))
    with pytest.raises(ValueError, match='cond'): Diffusers2D(widths=(32,))(noise(1, 4, 8, 8), torch.rand(1), cond=torch.zeros(1))

@pytest.mark.parametrize('cls', [UNet, Diffusers2D])
def test_save_and_load(cls, tmp_path):
    net = randomise(cls(4, widths=(32,64), depth=1, attn_levels=(0,)))
    save_component(net, tmp_path/'net')
    x,t = noise(2, 4, 8, 8), torch.rand(2)
    assert torch.equal(load_component(tmp_path/'net').eval()(x, t), net.eval()(x, t))

# --- training -------------------------------------------------------------------------------------------------------

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
    seen,dl = [], DeviceLoader(torch.zeros(5, 1), bs=1)
    ema = EMA(.5)
    learn = Learner(DataLoaders(dl, dl), Walk(), loss_func=lambda p: p.mean(), opt_func=SGD, cbs=[ema, Spy()])
    learn.dls.n_inp = 0
    class Feed(Callback):
        def before_batch(self): self.learn.xb,self.learn.yb = (torch.zeros(1, 1),), (torch.zeros(1),)
    learn.loss_func = lambda p,y: p.mean()
    learn.add_cb(Feed())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, lr=1.)
    avg,path = 0., []
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

def latents(n=64): return noise(n, 1, 1, 1, seed=3).sign()*torch.ones(n, 4, 4, 4)

def small(seed=0):
    torch.manual_seed(seed)
    return UNet(4, widths=(32,), depth=1, attn_levels=())

def fit(net, **kw): return train_denoiser(net, FLOW, latents(), latents()[:16], bs=16, device='cpu', **kw)

def test_epochs_repeat_to_the_bit_and_seeds_differ():
    runs = [fit(small(), epochs=2, seed=s) for s in (5, 5, 6)]
    a,b,c = (torch.cat([p.flatten() for p in r.model.parameters()]) for r in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert runs[0].recorder.values == runs[1].recorder.values

def test_training_learns_and_validates_rarely():
    "Two possible latents, all +1 or all -1: the answer can be read off a noisy one almost everywhere."
    learn = fit(small(), epochs=40, lr=4e-3)
    assert len(learn.recorder.values) == 10 and len(learn.recorder.losses) == 160
    t,loss = loss_by_level(learn.model, FLOW, latents(), n_levels=4)
    white = 1/((1 - t)**2 + t**2) # the error of one who knows only mean and std
    assert (loss[:3] < .6*white[:3]).all() and loss[3] < 1.6

def test_minutes_follow_the_clock():
    net,start = small(), time.perf_counter()
    learn = fit(net, minutes=.05)
    assert 2.5 < time.perf_counter() - start < 5
    lrs = learn.recorder.lrs
    assert max(lrs) > 5e-4 and lrs[-1] < .05*max(lrs)
    assert 0 < len(learn.recorder.values) <= 10 and learn.pct_train == pytest.approx(1, abs=.05)

@pytest.mark.parametrize('kw', [{}, dict(minutes=1, epochs=1)])
def test_needs_one_length(kw):
    with pytest.raises(UserError, match='how long'): fit(small(), **kw)

def test_needs_latents():
    with pytest.raises(UserError, match='no latents'): train_denoiser(small(), FLOW, latents(0), latents(4), epochs=1, device='cpu')

def test_cpu_stays_in_float32(): assert mixed_precision('cpu') == []

def test_passes_are_one_epoch():
    dl = Passes([1, 2], 3)
    assert list(dl) == [1, 2]*3 and len(dl) == 6

class Says(nn.Module):
    "A denoiser that always answers 0."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x, t): return self.w*x

@pytest.mark.parametrize('target,expected', [('eps', 1.), ('x0', 1.), ('velocity', 2.)])
def test_loss_by_level_of_the_silent_net(target, expected):
    t,loss = loss_by_level(Says(), Process('flow', target, 'uniform'), noise(2000, 4, 4, 4, seed=9), n_levels=5)
    assert gap(t, torch.tensor([.1, .3, .5, .7, .9])) < 1e-6
    assert gap(loss, torch.full((5,), expected)) < .03

def test_act_stats_of_a_normal():
    "|N(0,1)|: mean sqrt(2/pi), std sqrt(1-2/pi), 3.99 % below 0.05; every value lands in one bin."
    stats = ActStats()
    s = stats.hook(None, None, noise(100_000))
    assert s['mean'].item() == pytest.approx(math.sqrt(2/math.pi), abs=.01)
    assert s['std'].item() == pytest.approx(math.sqrt(1 - 2/math.pi), abs=.01)
    assert s['near_zero'].item() == pytest.approx(.0399, abs=.003)
    assert s['hist'].sum() == 100_000 and stats.hook(None, None, torch.full((9,), -1e9))['hist'][-1] == 9

def test_act_stats_in_a_fit():
    acts = ActStats(every=4)
    learn = fit(small(), epochs=2, cbs=[acts])
    assert acts.table('mean').shape == (2, 8) and acts.hist(0).shape == (acts.bins, 2)
    assert acts.names[:2] == ['conv_in', 'down_blocks.0.resnets.0'] and acts.names[-1] == 'conv_out'
    assert gap(acts.layer_stats(1)[1], acts.table('std')[:, 1]) == 0
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_denoiser_for_trains_once_and_again_for_other_settings(tmp_path, monkeypatch):
    lat = SimpleNamespace(mean=latents().numpy(), tensor=lambda split: latents() if split == 'train' else latents()[:16])
    monkeypatch.setattr(latentdiff.unet, 'latents_for', lambda p: lat)
    p = replace(PRESETS['tiny'], widths=(32,), attn_levels=(), denoise_minutes=.01)
    net,process = denoiser_for(p, tmp_path)
    again,_ = denoiser_for(p, tmp_path)
    assert all(torch.equal(a.cpu(), b.cpu()) for a,b in zip(net.state_dict().values(), again.state_dict().values()))
    assert process == FLOW and (tmp_path/'process'/'config.json').exists()
    other,_ = denoiser_for(replace(p, widths=(64,)), tmp_path)
    assert tuple(other.config.widths) == (64,)
