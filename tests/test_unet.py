"The denoiser against diffusers on copied weights, and its training against closed forms."
import copy, inspect, json, math
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from fastai.basics import Callback
from latentdiff.autoencoder import KLAutoencoder
from latentdiff.denoisers import DiT
from latentdiff.core import DATASETS, PRESETS, UserError, load_component, made, preset, save_component
from latentdiff.noisify import Process, save_process
from latentdiff.sampling import SAMPLERS, time_steps
import latentdiff.training
from latentdiff.training import Checkpoint, largest_divisor, mixed_precision
from latentdiff.unet import (ActStats, AnyUNet2D, ResBlock, SelfAttention, UNet, loss_by_level, make_denoiser, timestep_embedding,
                             train_denoiser, unet2d_args, unet_for)

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
    "On the same argument, whatever it is: steps, thousandths, or the logarithms of EDM."
    time = torch.cat([torch.linspace(0, 1000, 11), torch.tensor([-1., -1.5, 1.1])])
    assert gap(timestep_embedding(time, dim), get_timestep_embedding(time, dim, flip_sin_to_cos=True, downscale_freq_shift=0)) < 1e-6

def test_time_embedding_refuses_odd():
    with pytest.raises(ValueError, match='dim is 7: give multiples of 2, such as 6 or 8'): timestep_embedding(torch.rand(2), 7)

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
    with pytest.raises(UserError, match='c is 32: give multiples of 5, such as 30 or 35'): SelfAttention(32, 5)

@pytest.mark.parametrize('block', [ResBlock(32, 32, 8), SelfAttention(32, 2)])
def test_blocks_start_as_the_identity(block):
    x = noise(2, 32, 4, 4)
    assert torch.equal(block(x, noise(2, 8)), x)

# --- the whole network ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(widths=(32,64)), dict(widths=(32,64,64,128), depth=1), dict(widths=(40,72), attn_levels=(0,)),
                                dict(widths=(128,256), depth=1), dict(widths=(64,), attn_levels=()), dict(out_channels=8, widths=(32,32))])
def test_unet_is_diffusers(kw):
    ours,theirs = randomise(UNet(4, **kw)), AnyUNet2D(UNet2DModel(**unet2d_args(4, **kw)))
    theirs.load_state_dict(ours.state_dict())
    x,t = noise(2, 4, 16, 8), torch.tensor([30., 800.])
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
        (net(x, torch.full((4,), 500.)) - x).square().mean().backward()
        opt.step()
    assert all(p.grad is not None and p.grad.any() for n,p in net.named_parameters() if n.startswith('conv'))

def test_time_changes_the_answer():
    net,x = randomise(UNet(4, widths=(32,64), depth=1)), noise(1, 4, 8, 8)
    assert gap(net(x, torch.tensor([200.])), net(x, torch.tensor([700.]))) > 1e-3

def test_refusals():
    net = UNet(4, widths=(32,64))
    with pytest.raises(ValueError, match='multiples of 2'): net(noise(1, 4, 7, 8), torch.rand(1))
    with pytest.raises(ValueError, match='cond'): net(noise(1, 4, 8, 8), torch.rand(1), cond=torch.zeros(1))
    with pytest.raises(ValueError, match='cond'): AnyUNet2D(UNet2DModel(**unet2d_args(widths=(32,))))(noise(1, 4, 8, 8), torch.rand(1), cond=torch.zeros(1))

def test_save_and_load(tmp_path):
    net = randomise(UNet(4, widths=(32,64), depth=1, attn_levels=(0,)))
    save_component(net, tmp_path/'net')
    x,t = noise(2, 4, 8, 8), 1000*torch.rand(2)
    assert torch.equal(load_component(tmp_path/'net').eval()(x, t), net.eval()(x, t))

# --- exchanged with diffusers ---------------------------------------------------------------------------------------

SHAPES = [dict(widths=(32,64), depth=1), dict(widths=(40,72), attn_levels=(0,)), dict(widths=(32,), attn_levels=(), out_channels=8),
          dict(widths=(64,128,128), depth=1, head_dim=8, groups=32)]

@pytest.mark.parametrize('kw', SHAPES)
def test_what_we_save_diffusers_loads(kw, tmp_path):
    ours,x,t = randomise(UNet(4, **kw)), noise(2, 4, 16, 8), torch.tensor([0., 731.5])
    save_component(ours, tmp_path/'unet')
    theirs,info = UNet2DModel.from_pretrained(tmp_path, subfolder='unet', output_loading_info=True)
    assert not any(info.values()) and gap(ours(x, t), theirs(x, t).sample) < 1e-5 * ours(x, t).abs().max().item()
    assert json.loads((tmp_path/'unet'/'config.json').read_text())['_class_name'] == 'UNet2DModel'

@pytest.mark.parametrize('kw', SHAPES)
def test_what_diffusers_saves_we_load(kw, tmp_path):
    theirs,x,t = randomise(UNet2DModel(**unet2d_args(4, **kw))), noise(2, 4, 16, 8), torch.tensor([0., 731.5])
    theirs.save_pretrained(tmp_path/'unet')
    ours = load_component(tmp_path/'unet')
    assert type(ours) is UNet and gap(ours(x, t), theirs(x, t).sample) < 1e-5 * theirs(x, t).sample.abs().max().item()
    save_component(ours, tmp_path/'again')
    keep = lambda f: {k: v for k,v in json.loads((f/'config.json').read_text()).items() if k[0] != '_'}
    usual = {k: o.default for k,o in inspect.signature(UNet2DModel).parameters.items()}
    same = lambda c: json.loads(json.dumps({**usual, **c}))
    assert same(keep(tmp_path/'again')) == same(keep(tmp_path/'unet'))

@pytest.mark.parametrize('change', [dict(class_embed_type='timestep'), dict(num_class_embeds=10), dict(resnet_time_scale_shift='default'),
    dict(time_embedding_type='fourier'), dict(add_attention=False), dict(norm_eps=1e-6), dict(center_input_sample=True), dict(dropout=.1),
    dict(attention_head_dim=None), dict(attn_norm_num_groups=None), dict(downsample_type='resnet'), dict(freq_shift=1),
    dict(down_block_types=('SkipDownBlock2D', 'AttnDownBlock2D')), dict(up_block_types=('UpBlock2D', 'UpBlock2D')), dict(new_option=7)])
def test_what_our_unet_cannot_be_is_refused(change, tmp_path):
    "Silently left out, each of these would give a network that loads and answers something else."
    save_component(UNet(4, widths=(32,64), depth=1), tmp_path/'unet')
    f = tmp_path/'unet'/'config.json'
    f.write_text(json.dumps({**json.loads(f.read_text()), **change}))
    with pytest.raises(UserError, match=f"this network has .*use diffusers' UNet2DModel") as e: load_component(tmp_path/'unet')
    assert '\n' not in str(e.value) and any(k in str(e.value) for k in change)

def theirs_loop(net, scheduler, x, late=0):
    "The loop of diffusers' own pipelines, for schedulers that start from noise of std 1 and do not scale; with a fault, if asked for"
    flow,g = isinstance(scheduler, FlowMatchEulerDiscreteScheduler), torch.Generator().manual_seed(5)
    scheduler.set_timesteps(**(dict(sigmas=np.linspace(1, 1/20, 20)) if flow else dict(num_inference_steps=20)))
    for k in scheduler.timesteps:
        fresh = dict(generator=g) if isinstance(scheduler, DDPMScheduler) else {}
        x = scheduler.step(net(x, k + late).sample, k, x, **fresh).prev_sample
    return x

@pytest.mark.parametrize('args,sampler,cls', [(('flow', 'velocity'), 'euler', FlowMatchEulerDiscreteScheduler), (('ddpm_linear', 'eps'), 'ddpm', DDPMScheduler),
    (('ddpm_linear', 'v'), 'ddpm', DDPMScheduler), (('ddpm_linear', 'eps'), 'ddim', DDIMScheduler), (('ddpm_linear', 'v'), 'ddim', DDIMScheduler)])
@torch.no_grad()
def test_samples_in_diffusers_own_loop(args, sampler, cls, tmp_path):
    "Network and scheduler as a run saves them, loaded there, and drawn with there: our samples; told one of a thousand steps more, others."
    process,net,x = Process(*args, 'uniform'), randomise(UNet(4, widths=(32,64), depth=1)).eval(), noise(3, 4, 8, 8)
    for n,p in net.named_parameters(): p.mul_(3 if 'time_emb' in n else 1) # it listens to the time,
    scale = net(x, torch.linspace(0, 999, 3)).std()
    for p in net.conv_out.parameters(): p.div_(scale) # and its answer has std 1
    save_component(net, tmp_path/'unet')
    save_process(process, tmp_path)
    theirs,scheduler = UNet2DModel.from_pretrained(tmp_path, subfolder='unet'), cls.from_pretrained(tmp_path, subfolder='scheduler')
    ours = SAMPLERS[sampler](net, process, x, time_steps(process, 20), generator=torch.Generator().manual_seed(5))
    allowed = 1e-5*ours.abs().max().item()
    assert gap(theirs_loop(theirs, scheduler, x), ours) < allowed < gap(theirs_loop(theirs, scheduler, x, late=1), ours)/100

# --- training -------------------------------------------------------------------------------------------------------

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

def test_minutes_become_steps_by_a_measurement(monkeypatch):
    "A machine that needs .1 s a step makes 30 steps in .05 minutes, at a rate that ends near nothing."
    monkeypatch.setattr(latentdiff.training, 'step_time', lambda learn: .1)
    learn = fit(small(), minutes=.05)
    lrs = learn.recorder.lrs
    assert len(lrs) == 30 and learn.history['rows'][-1][0] == 30
    assert max(lrs) > 4e-4 and lrs[-1] < .3*max(lrs) and 0 < len(learn.recorder.values) <= 10

@pytest.mark.parametrize('kw', [{}, dict(minutes=1, epochs=1), dict(steps=3, epochs=1)])
def test_needs_one_length(kw):
    with pytest.raises(UserError, match='how long'): fit(small(), **kw)

def test_stopped_and_gone_on_is_the_same_to_the_bit(tmp_path):
    "Killed in the middle, where it had just saved itself, and started again: the weights of a training that nobody disturbed."
    class Kill(Callback):
        order = 99
        def after_batch(self):
            if self.training and self.step_by_step.k == 13: raise KeyboardInterrupt
    whole = fit(small(), steps=30, flip=True).model
    kept = Checkpoint(tmp_path, 'this', every=0.)
    with pytest.raises(KeyboardInterrupt): fit(small(), steps=30, flip=True, checkpoint=kept, cbs=[Kill()])
    rest = fit(small(1), steps=30, flip=True, checkpoint=kept)
    assert len(rest.recorder.losses) < 20
    assert all(torch.equal(a, b) for a,b in zip(whole.parameters(), rest.model.parameters()))

def test_needs_latents():
    with pytest.raises(UserError, match='no latents'): train_denoiser(small(), FLOW, latents(0), latents(4), epochs=1, device='cpu')

def test_cpu_stays_in_float32(): assert mixed_precision('cpu') == []

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

@pytest.mark.parametrize('name', PRESETS)
def test_the_networks_of_a_preset_fit_one_another_on_every_data_set(name):
    for data in (*DATASETS, 'some/pictures'):
        p, c = preset(name, data), 1 if 'mnist' in data or 'norb' in data else 3
        with torch.device('meta'):
            shape = (4, p.size//8, p.size//8) if p.ae_pretrained else KLAutoencoder(c, p.ae_widths, p.ae_patch, 1, p.latent_channels).latent_shape(p.size)
            assert unet_for(shape, p)(torch.zeros(1, *shape), torch.zeros(1)).shape[1:] == shape

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', [small, lambda: DiT(4, 2, 48, 2, 4)], ids=['U-Net', 'DiT'])
def test_networks_answer_in_half_precision(make, dtype):
    "As `UNet2DModel.half()` does; the embedding of the time is computed in float32"
    torch.manual_seed(0)
    net, x, t = make().eval(), noise(2, 4, 8, 8), torch.tensor([10., 990.])
    for o in net.parameters(): o.data += .02*torch.randn_like(o)
    with torch.no_grad(): want, got = net(x, t), copy.deepcopy(net).to(dtype)(x.to(dtype), t)
    assert got.dtype == dtype and (got.float() - want).abs().max() < .1*want.abs().max()

def test_loss_by_level_of_latents_that_are_not_finite():
    with pytest.raises(UserError, match='not a finite number'): loss_by_level(Says(), Process(), torch.full((2, 4, 4, 4), math.nan), n_levels=2)

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

# --- the maker ------------------------------------------------------------------------------------------------------

TINY = replace(PRESETS['tiny'], widths=(32,), attn_levels=(), steps=4, bs=16)

def some_latents(name='abc'):
    return SimpleNamespace(fingerprint=name, mean=latents().numpy(), tensor=lambda split: latents() if split == 'train' else latents()[:16])

def test_a_denoiser_is_made_once(tmp_path, capsys):
    net,process = make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    assert 'training UNet' in capsys.readouterr().out
    again,_ = make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    assert capsys.readouterr().out == '' and not again.training
    assert all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), again.state_dict().values()))
    assert process == FLOW == Process.load(tmp_path/'process')

def test_a_run_holds_what_diffusers_wants(tmp_path):
    "Weights, scheduler and process side by side; made.json says from which latents, and how the losses went."
    make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    assert isinstance(UNet2DModel.from_pretrained(tmp_path, subfolder='unet'), UNet2DModel)
    assert Process.from_diffusers(type(FLOW.to_diffusers()).from_pretrained(tmp_path, subfolder='scheduler')).schedule == 'flow'
    note = made(tmp_path/'unet')
    assert note['parents'] == {'latents': 'abc'} and note['settings']['steps'] == 4 and note['facts']['rows'][-1][0] == 4

@pytest.mark.parametrize('change,words', [(dict(widths=(64,)), 'widths'), (dict(steps=5), 'steps 4, not 5'), (dict(bs=8), 'bs')])
def test_other_settings_are_never_mixed(change, words, tmp_path):
    make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    with pytest.raises(UserError, match=words): make_denoiser(tmp_path, some_latents(), replace(TINY, **change), device='cpu')
    net,_ = make_denoiser(tmp_path, some_latents(), replace(TINY, **change), device='cpu', remake=True)
    assert tuple(net.config.widths) == change.get('widths', (32,))

def test_other_latents_are_never_mixed(tmp_path):
    make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    with pytest.raises(UserError, match='other latents'): make_denoiser(tmp_path, some_latents('xyz'), TINY, device='cpu')

def test_a_denoiser_that_falls_ill_is_not_kept(tmp_path):
    "Nothing is left of a training whose rate was far too high, and a sound one can follow"
    with pytest.raises(UserError, match='train again at a lower rate') as e:
        make_denoiser(tmp_path, some_latents(), replace(TINY, lr=1e30), device='cpu')
    assert '\n' not in str(e.value) and not list(tmp_path.rglob('*.safetensors')) and not (tmp_path/'unet').exists()
    net,_ = make_denoiser(tmp_path, some_latents(), TINY, device='cpu')
    assert all(p.isfinite().all() for p in net.parameters())

def test_a_size_that_works_is_named():
    "72 px in latents of 9 places cannot be halved twice: multiples of 32 px can."
    p = replace(PRESETS['tiny'], widths=(32,32,32), size=72)
    with pytest.raises(UserError, match='72 px gives latents of 9 x 9.*multiples of 32, such as 64') as e: unet_for((4, 9, 9), p)
    assert '\n' not in str(e.value) and unet_for((4, 8, 8), replace(p, size=64))
    with pytest.raises(UserError, match='another autoencoder'): unet_for((128,), p)
