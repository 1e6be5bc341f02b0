"""Code that runs on a GPU, checked without one. On fake CUDA tensors (no values, but a device each) a forward pass fails where two
devices meet; on `meta` backward runs too. Networks and inputs are made on the device and called outside of any default device, so that
a tensor made without `device=` lands on the CPU and meets them."""
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from flat import Flat
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from latentdiff import few_step, noisify, pipeline, sampling
from latentdiff.autoencoder import (TAEF2, AELoss, Adversary, FeatureLoss, KLAutoencoder, PatchDiscriminator, PretrainedKL, PretrainedTiny,
                                    hinge_loss, ssim_map)
from latentdiff.conditioning import (ClassConditioner, Conditioned, ConditionalUNet, FactorReader, StyleConditioner, TextConditioner,
                                     attention_maps, guide)
from latentdiff.core import PRESETS
from latentdiff.few_step import Shortcut, autoguide, shortcut, unipc
from latentdiff.denoisers import CNN1d, DiT, MLPDenoiser, ResNetDenoiser, SegNet, UNet1d
from latentdiff.kid_eval import EfficientNetFeatures, GreyClassifier, kernel_sums
from latentdiff.muon import Muon, moves
from latentdiff.noisify import SCHEDULES, TARGETS, NoisifyCB, Process
from latentdiff.sampling import SAMPLERS, img2img, inpaint, optimal_denoiser, time_steps
from latentdiff.training import EMA, DeviceLoader
from latentdiff.unet import ActStats, AnyUNet2D, UNet, unet2d_args

GPU = PRESETS['gpu']
U = dict(widths=GPU.widths, depth=GPU.depth, attn_levels=GPU.attn_levels)
FLOW = Process()

# name: the network, and the shape of one input
NETS = {'U-Net': (partial(UNet, 4, **U), (4, 32, 32)), "diffusers' U-Net": (lambda: AnyUNet2D(UNet2DModel(**unet2d_args(4, **U))), (4, 32, 32)),
        'conditional U-Net': (partial(ConditionalUNet, 4, **U), (4, 32, 32)), 'ResNet': (partial(ResNetDenoiser, 4), (4, 8, 8)),
        'SegNet': (partial(SegNet, 4), (4, 8, 8)), '1-D CNN': (partial(CNN1d, 4), (4, 8, 8)), '1-D U-Net': (partial(UNet1d, 1), (128,)),
        'MLP': (MLPDenoiser, (128,)), 'DiT': (partial(DiT, 4), (4, 8, 8))}

# torch 2.6 asks a driver, which need not be there, where a fake tensor is indexed or attends
FAKES_CUDA = torch.cuda.is_available() or hasattr(torch._C, '_ensureCUDADeviceGuardSet')

@contextmanager
def on(device):
    "Fake CUDA tensors, or `meta`"
    if device == 'meta': yield
    elif not FAKES_CUDA: pytest.skip('this torch has no fake CUDA tensors without a driver')
    else:
        with FakeTensorMode(): yield

def made(f, device):
    "What `f` makes, on the device"
    with torch.device(device): return f()

def batch(*shape, device): return torch.randn(2, *shape, device=device)
def times(device): return torch.rand(2, device=device)

def check(device, f, *args):
    "The output of `f` is on the device, and backward runs where it can"
    out = f(*args)
    for o in out if isinstance(out, (tuple, list)) else [out]: assert o.device.type == device
    if device == 'meta': sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out])).backward()

@pytest.fixture(autouse=True)
def nothing_fake_is_kept():
    "Tables that are computed once must not outlive the mode in which they were"
    noisify.log_abar_table.cache_clear()
    yield
    noisify.log_abar_table.cache_clear()

both = pytest.mark.parametrize('device', ['cuda', 'meta'])
each = lambda d: pytest.mark.parametrize('name', d)

# --- networks -------------------------------------------------------------------------------------------------------

@both
@each(NETS)
def test_denoisers(device, name):
    make,shape = NETS[name]
    with on(device):
        net = made(make, device)
        check(device, lambda: F.mse_loss(net(batch(*shape, device=device), FLOW.time_input(times(device))), batch(*shape, device=device)))

@each(NETS)
def test_a_step_that_is_recorded_copies_nothing_from_the_CPU(name):
    "A CUDA graph cannot: what a network looks up is made where it is used"
    from torch.utils._python_dispatch import TorchDispatchMode
    copied = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            if '_to_copy' in str(f) and (args[0].device.type, out.device.type) == ('cpu', 'cuda'): copied.append(tuple(out.shape))
            return out
    make, shape = NETS[name]
    with on('cuda'):
        net, x, t = made(make, 'cuda'), batch(*shape, device='cuda'), 1000*times('cuda')
        with Watch(): net(x, t)
    assert not copied

@both
def test_conditioned_networks(device):
    "All three conditioners, dropped at random; then guided by each, with a negative."
    with on(device):
        text = made(TextConditioner, device)
        text.table, text.used = made(lambda: torch.zeros(5, 7, 64, dtype=torch.float16), device), made(lambda: torch.ones(5, 7, dtype=torch.bool), device)
        parts = made(lambda: [ClassConditioner('abc', 64), StyleConditioner(3, 64)], device)
        model = Conditioned(made(lambda: ConditionalUNet(4, widths=(32, 64), dim=64), device), *parts, text)
        conds = torch.zeros(2, dtype=torch.long, device=device), batch(3, 32, 32, device=device), torch.ones(2, dtype=torch.long, device=device)
        check(device, model, batch(4, 8, 8, device=device), 1000*times(device), *conds)
        guided = guide(model.eval(), conds, 2., negative=tuple(c[:1] for c in conds))
        assert guided(batch(4, 8, 8, device=device), 1000*times(device)).device.type == device
        maps = attention_maps(model.net, batch(4, 8, 8, device=device), 1000*times(device), *model.tokens(*conds))
        assert {m.device.type for m in maps} == {device}

TINY = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
AES = {'TAEF2': (partial(TAEF2, 8, 4), 32), 'pretrained tiny': (lambda: PretrainedTiny(dict(AutoencoderTiny(**TINY).config)), 32),
       'KL': (partial(KLAutoencoder, 3, GPU.ae_widths, GPU.ae_patch), 64), 'flat': (partial(Flat, 32), 32),
       'pretrained KL': (lambda: PretrainedKL(dict(AutoencoderKL(block_out_channels=(32, 64), down_block_types=('DownEncoderBlock2D',)*2,
                                                                 up_block_types=('UpDecoderBlock2D',)*2).config)), 32)}

@each(AES)
def test_what_an_autoencoder_gives_can_be_recorded(name):
    "`make_graphed_callables` asks each of them for `requires_grad`, so none may be None"
    make, size = AES[name]
    ae = make().train()
    assert any([o.requires_grad for o in torch.utils._pytree.tree_leaves(ae(torch.rand(2, getattr(ae, 'channels', 3), size, size)))])

@both
@each(AES)
def test_autoencoders(device, name):
    "Loss, encoding, posterior and decoding."
    make,size = AES[name]
    with on(device):
        ae = made(make, device).train()
        x = batch(getattr(ae, 'channels', 3), size, size, device=device)
        out = ae(x)
        check(device, AELoss(kl_weight=1e-3), out, x)
        ae.eval()
        assert ae.decode(ae.encode(x)).device.type == device
        assert {o.device.type for o in ae.posterior(x) if o is not None} == {device}

@both
def test_judges(device):
    with on(device):
        check(device, made(partial(FactorReader, [3, 2]), device), batch(3, 32, 32, device=device))
        check(device, made(GreyClassifier, device), batch(1, 28, 28, device=device))

@both
def test_feature_networks(device):
    "What KID compares: from bytes on the device to numbers there."
    extractor = EfficientNetFeatures(device='cpu')
    with on(device):
        for table in [d for m in extractor.net.modules() for d in (m._parameters, m._buffers)]:
            table |= {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in table.items() if v is not None}
        extractor.device = torch.device(device)
        out = extractor(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
        assert out.device.type == device and out.shape == (2, 1296)

# --- noise and samplers ---------------------------------------------------------------------------------------------

PROCESSES = [Process(s, t, 'edm' if s == 'edm' else 'logit_normal') for s in SCHEDULES for t in TARGETS]

@both
@pytest.mark.parametrize('process', PROCESSES, ids=lambda p: f'{p.schedule} {p.target}')
def test_noise(device, process):
    "Everything a training step asks of a process."
    with on(device):
        z = batch(4, 8, 8, device=device)
        x_t,t,target = process.noisify(z)
        shown = process.scale_input(x_t, t), process.time_input(t), process.t_of_time(process.time_input(t))
        assert {o.device.type for o in (x_t, t, target, *shown, *process.x0_eps(target, x_t, t), process.log_snr(t))} == {device}

@pytest.fixture
def plain_levels(monkeypatch):
    "A fake tensor has no value to make a float of: samplers compute their levels outside."
    real = sampling.levels
    def outside(f):
        def g(*args, **kw):
            with unset_fake_temporarily(): return f(*args, **kw)
        return g
    for room in (sampling, few_step): monkeypatch.setattr(room, 'levels', outside(real))
    monkeypatch.setattr(sampling, 'time_steps', outside(sampling.time_steps))
    monkeypatch.setattr(few_step, '_unipc_weights', outside(few_step._unipc_weights))
    monkeypatch.setattr(sampling, 'generators', lambda seed, n, first=0: [torch.default_generator]*n) # numpy's numbers are never fake

@both
@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('process', [Process(), Process('ddpm_linear', 'eps'), Process('cosine', 'v'), Process('edm', 'x0')], ids=lambda p: p.schedule)
def test_samplers(device, sampler, process, plain_levels):
    ts = time_steps(process, 3)
    with on(device), torch.no_grad():
        net = made(partial(UNet, 4, widths=(16,), depth=1), device)
        assert SAMPLERS[sampler](net, process, batch(4, 8, 8, device=device), ts).device.type == device
        oracle = optimal_denoiser(process, torch.randn(3, 4, 8, 8, device=device), .5)
        assert SAMPLERS[sampler](oracle, process, batch(4, 8, 8, device=device), ts).device.type == device

def long_steps(net, z, ts):
    return shortcut(made(partial(Shortcut, net), z.device), FLOW, z, ts)

WAYS = {'img2img': lambda net, z, ts: img2img(net, FLOW, z, .6, 3), 'inpaint': lambda net, z, ts: inpaint(net, FLOW, z, z > 0, 2, 2),
        'unipc': lambda net, z, ts: unipc(net, FLOW, z, ts, order=3), 'shortcut': long_steps,
        'autoguidance': lambda net, z, ts: SAMPLERS['euler'](autoguide(net, net), FLOW, z, ts)}

@both
@each(WAYS)
def test_other_ways_to_draw(device, name, plain_levels):
    ts = time_steps(FLOW, 4)
    with on(device), torch.no_grad():
        net = made(partial(UNet, 4, widths=(16,), depth=1), device)
        assert WAYS[name](net, batch(4, 8, 8, device=device), ts).device.type == device

def test_a_pipeline_draws(plain_levels, monkeypatch):
    "From start noise to pictures on the CPU; not on `meta`, from which nothing comes back, and values of pictures are not looked at"
    monkeypatch.setattr(pipeline, 'check_images', lambda *args, **kw: None)
    with on('cuda'):
        ae, net = made(lambda: (KLAutoencoder(3, (16,), 4, latent_channels=4), UNet(4, widths=(16,), depth=1)), 'cuda')
        pipe = pipeline.LatentDiffusionPipeline(ae.eval(), net.eval(), FLOW, 32)
        assert pipe.device.type == 'cuda' and pipe.draw(3, 2, bs=2).device.type == 'cpu'

# --- callbacks, loaders, metrics ------------------------------------------------------------------------------------

class NoGenerator:
    "torch has no CUDA generator where there is no CUDA; drawing without one is the same to a device"
    def __init__(self, device=None): self.device = torch.device(device or 'cpu')
    def manual_seed(self, seed): return None

@both
def test_noise_callback(device, monkeypatch):
    monkeypatch.setattr(torch, 'Generator', NoGenerator)
    cb = NoisifyCB(FLOW)
    with on(device):
        cb.learn = SimpleNamespace(xb=(batch(4, 8, 8, device=device),), yb=(torch.zeros(2, dtype=torch.long, device=device),), training=True, train_iter=0)
        cb.before_batch()
        assert {o.device.type for o in (*cb.learn.xb, *cb.learn.yb)} == {device} and len(cb.learn.xb) == 3

@both
def test_average_of_weights(device):
    ema = EMA()
    with on(device):
        ema.learn = SimpleNamespace(model=made(partial(UNet, 4, widths=(32,), depth=1), device))
        ema.before_fit()
        ema.after_step()
        for swap in (ema.before_validate, ema.after_validate, ema.after_fit): swap()
        assert {p.device.type for p in (*ema.learn.model.parameters(), *ema.shadow)} == {device}

@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.uint8])
def test_batches(device, dtype, monkeypatch):
    monkeypatch.setattr(torch, 'Generator', NoGenerator)
    monkeypatch.setattr('latentdiff.data.checked', lambda **kw: None)   # `shifted` asks for a generator
    with on(device):
        x,y = torch.zeros(10, 3, 8, 8, device=device).to(dtype), torch.zeros(10, dtype=torch.long, device=device)
        dl = DeviceLoader(x, y, bs=4, shuffle=True, flip=True, crop=2, seed=0, device=device)
        a,b = dl.batch(1)
        assert (a.device.type, b.device.type, a.dtype, len(a)) == (device, device, torch.float32, 4)

@both
def test_feature_loss(device):
    loss = FeatureLoss()
    with on(device):
        for table in [d for m in loss.modules() for d in (m._parameters, m._buffers)]:
            table |= {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in table.items() if v is not None}
        check(device, lambda x, y: loss(x.requires_grad_(), y), batch(3, 32, 32, device=device), batch(3, 32, 32, device=device))

@both
def test_discriminator(device):
    "Its loss; on `meta`, where backward runs, also its part in a step of training"
    with on(device):
        net, x, y = made(PatchDiscriminator, device), batch(3, 32, 32, device=device), batch(3, 32, 32, device=device)
        check(device, lambda: hinge_loss(net(x), net(y)))
    if device == 'cuda': return
    model, cb = made(partial(KLAutoencoder, 3, (16,), 4), device), Adversary(0, .3, 1e-3, 0, 8)
    out = model(x)
    cb.learn = SimpleNamespace(model=model, dls=SimpleNamespace(device=torch.device(device)), pred=out, yb=(x,), loss_grad=(out[0] - x).square().mean())
    cb.before_fit(), cb.after_loss(), cb.after_step()
    assert {o.device.type for o in (cb.learn.loss_grad, *cb.log, *cb.net.parameters())} == {device}

@both
def test_orthogonal_moves(device):
    with on(device): check(device, moves, *(torch.randn(32, c, 3, 3, device=device, requires_grad=True) for c in (16, 32, 32)))

def test_a_step_of_muon(monkeypatch):
    "Without the recording; not on `meta`, for which AdamW has no fused step"
    monkeypatch.setattr(Muon, 'moves_for', lambda self, ahead: moves)
    with on('cuda'):
        net = made(partial(UNet, 4, widths=(16,), depth=1), 'cuda')
        opt = Muon(net.parameters())
        for p in net.parameters(): p.grad = torch.randn_like(p)
        opt.step()
        assert {v.device.type for s in opt.state.values() for k, v in s.items() if k != 'step'} == {'cuda'} and len(opt.state) == len([*net.parameters()])

@both
def test_activation_statistics(device):
    with on(device):
        s = ActStats().hook(None, None, batch(4, 8, 8, device=device))
        assert {o.device.type for o in s.values()} == {device}

@both
def test_kernel_sums(device):
    with on(device):
        a,b = torch.randn(6, 16, device=device), torch.randn(5, 16, device=device)
        sums = kernel_sums(a, b)
        assert {o.device.type for o in sums if torch.is_tensor(o)} == {device}

@both
def test_ssim_map(device):
    with on(device): check(device, lambda x: ssim_map(x.requires_grad_(), x.detach()), batch(3, 32, 32, device=device))

# --- the check itself -----------------------------------------------------------------------------------------------

class ForgetsTheDevice(nn.Module):
    "Makes its positions on the CPU, wherever it is: what these tests are for"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x, time, cond=None): return self.conv(x) + torch.arange(x.shape[-1])

@both
def test_a_planted_fault_is_found(device):
    with on(device):
        net = made(ForgetsTheDevice, device)
        with pytest.raises(RuntimeError, match='device'): check(device, net, batch(4, 8, 8, device=device), times(device))
