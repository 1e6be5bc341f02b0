"The autoencoder: shapes, scale, metrics against torchmetrics, training, diffusers' own both ways, the maker."
import copy, json, os
from dataclasses import replace
import pytest, torch
from diffusers import AutoencoderKL, AutoencoderTiny
from flat import Flat
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from latentdiff import autoencoder as A, data as D
from latentdiff.autoencoder import *
from latentdiff.core import WEIGHTS, UserError, load_component, made, preset, save_component
from latentdiff.data import as_images, open_images
from latentdiff.rooms import rooms
from latentdiff.training import fit_steps


def tiny(c=3, **kw):
    torch.manual_seed(0)
    return KLAutoencoder(c, (8, 16), 2, 1, 4, **kw)

@pytest.fixture(scope='module')
def x(): return rooms(48, 16)

def images(n=3, c=3, s=16, seed=0, dtype=torch.float32):
    return torch.rand(n, c, s, s, generator=torch.Generator().manual_seed(seed), dtype=dtype)*2 - 1

# --- shapes and the doors

@pytest.mark.parametrize('widths,patch,size', [((8,), 4, 16), ((8, 16), 2, 24), ((8, 8, 16), 1, 16)])
def test_shapes_and_factor(widths, patch, size):
    ae = KLAutoencoder(1, widths, patch, 1, 5)
    z = ae.encode(images(2, 1, size))
    assert ae.factor == patch*2**(len(widths) - 1) and z.shape == (2, *ae.latent_shape(size))
    y = ae.decode(z)
    assert y.shape == (2, 1, size, size) and y.abs().max() <= 1

def test_wrong_sizes_are_user_errors():
    with pytest.raises(UserError, match='multiples of 4'): tiny().encode(images(1, 3, 18))

def test_flat_latent():
    ae = Flat()
    z = ae.encode(images())
    assert z.shape == (3, 7) and ae.latent_shape(16) == (7,) and ae.decode(z).shape == (3, 3, 16, 16)

def test_block_starts_as_identity():
    b, z = AEBlock(8), torch.randn(2, 8, 4, 4)
    assert torch.equal(b(z), z)

def test_posterior_sample_has_the_posteriors_moments():
    mean, logvar = torch.full((1, 4, 100, 100), 2.), torch.full((1, 4, 100, 100), -2.)
    s = posterior_sample(mean, logvar, torch.Generator().manual_seed(0))
    assert abs(s.mean() - 2) < .01 and abs(s.var() - torch.tensor(-2.).exp()) < .01
    ae = tiny()
    g = lambda: torch.Generator().manual_seed(3)
    a = ae.encode(images(), sample=True, generator=g())
    assert torch.equal(a, ae.encode(images(), sample=True, generator=g())) and not torch.equal(a, ae.encode(images()))

def test_forward_draws_only_in_train_mode():
    ae, im = tiny(), images()
    ae.train(); torch.manual_seed(0); a = ae(im)[0]; b = ae(im)[0]
    assert not torch.equal(a, b)
    ae.eval(); assert torch.equal(ae(im)[0], ae(im)[0])

@torch.no_grad()
def test_posterior_in_standard_units():
    ae, im = tiny().eval(), images()
    ae.set_scale([1., 2., 3., 4.], [.5, 1., 2., 3.])
    mean, std = ae.posterior(im)
    draws = torch.stack([ae.encode(im, sample=True, generator=torch.Generator().manual_seed(i)) for i in range(400)])
    assert torch.equal(mean, ae.encode(im)) and mean.shape == std.shape
    assert ((draws.mean(0) - mean).abs() < 6*std/20).all() and (draws.std(0)/std - 1).abs().max() < .2
    flat = Flat()
    assert flat.posterior(im)[1] is None and flat.posterior(im)[0].shape == (3, 7)

# --- the linear start

def test_pca_start_is_the_best_linear_autoencoder(x):
    ae = KLAutoencoder(3, (8,), 4, 1, 48)     # as many latents as numbers in a patch: nothing is lost but the mean's texture
    pca_start(ae, x)
    q = quality(ae, x)
    few = KLAutoencoder(3, (8,), 4, 1, 4)
    pca_start(few, x)
    assert q['psnr'] > 28 > 24 > quality(few, x)['psnr'] > 12
    with torch.no_grad(): mean, std = channel_stats([few.encode_raw(b)[0] for b in A.batches_for(few, x)])
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-2

def test_pca_start_of_sprites():
    "Enlarged ones whose cells are the patches, which span three directions; other crops of them give latents all the same"
    x = torch.randint(0, 256, (100, 3, 8, 8), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    ae = pca_start(KLAutoencoder(3, (8,), 4, 1, 4), x)
    assert ae.encode_raw(D.from_uint8(x.roll(2, 3)))[0].abs().max() < 1000
    train_autoencoder(ae, x, x[:8], 2, bs=8, crop=2, device='cpu')
    assert ae.encode(D.cropped(D.from_uint8(x), 2, 1)).std((0, 2, 3)).max() < 2   # the scale is that of crops too

def test_patch_pca_matches_svd():
    im = images(20, 1, 8, dtype=torch.float64)
    mean, dirs, std = A.patch_pca(im, 4, 3)
    p = im.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 16)
    s = torch.linalg.svdvals(p - p.mean(0))
    assert torch.allclose(std, s[:3]/len(p)**.5) and torch.allclose(mean, p.mean(0))
    assert torch.allclose(dirs.T@dirs, torch.eye(3, dtype=torch.float64), atol=1e-10)

# --- losses

def test_kl_is_torch_distributions():
    m, lv = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    N = torch.distributions.Normal
    want = torch.distributions.kl_divergence(N(m, (lv/2).exp()), N(0., 1.)).mean()
    assert torch.allclose(kl_loss(m, lv), want, rtol=1e-5) and kl_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)) == 0

def test_loss_parts():
    im = images()
    pred = (im*.5, torch.ones(3, 4, 2, 2), torch.zeros(3, 4, 2, 2))
    assert torch.allclose(AELoss(2.)(pred, im), F.smooth_l1_loss(im*.5, im, beta=.1) + 2*.5)
    assert torch.allclose(AELoss(2.)((im, pred[1], None), im), torch.tensor(0.))

def test_feature_loss():
    pytest.importorskip('efficientnet_lite_pytorch')
    f, im = FeatureLoss(), images(2, 3, 32)
    assert f(im, im) == 0 and not any(p.requires_grad for p in f.parameters())
    assert not f.train().blocks[0]._bn1.training
    assert f(im[:, :1], im[:, :1].clone()) == 0      # grey
    y = im.clone().requires_grad_()
    f(y, im.flip(-1)).backward()
    assert y.grad.abs().sum() > 0

def test_efficientnet_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(A.importlib.util, 'find_spec', lambda m: None)
    with pytest.raises(UserError, match='pip install'): efficientnet_lite0()

def test_ruined_in_the_last_step_of_a_round_says_what_to_do():
    "Not what the metrics think of such reconstructions"
    from test_training import Ruin
    learn = ae_learner(KLAutoencoder(3, (8,), 4, 1, 4), x := images(20, 3, 16), x, bs=8)
    with pytest.raises(UserError, match='training KLAutoencoder stopped at step 5: .*lower rate than 0.001'): fit_steps(learn, 10, rounds=2, cbs=[Ruin(4)])

# --- metrics

def batches(dtype):
    a = [images(n, 3, 24, seed=n, dtype=dtype) for n in (5, 1, 8)]
    return [(u, (u + .2*images(len(u), 3, 24, seed=99, dtype=dtype)).clamp(-1, 1)) for u in a]

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('ours,theirs', [(PSNR, PeakSignalNoiseRatio), (SSIM, StructuralSimilarityIndexMeasure)])
def test_metrics_equal_torchmetrics(ours, theirs, dtype):
    m, t = ours(), theirs(data_range=1.).to(torch.float64)   # in [0,1], for which SSIM is defined
    for u, v in batches(dtype): m.update(v, u), t.update(v.double()/2 + .5, u.double()/2 + .5)
    assert m.compute().dtype == torch.float64
    assert m.compute().item() == pytest.approx(t.compute().item(), rel=1e-6)

@pytest.mark.parametrize('cls', [PSNR, SSIM])
def test_metrics_merge_and_reset(cls):
    whole, parts = cls(), [cls(), cls(), cls()]
    for m, (u, v) in zip(parts, batches(torch.float32)): m.update(u, v), whole.update(u, v)
    assert parts[0].merge_state(parts[1:]).compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    sd = parts[0].state_dict()
    again = cls(); again.load_state_dict(sd)
    assert again.compute() == parts[0].compute()
    whole.reset(); whole.update(*batches(torch.float32)[0])
    alone = cls().update(*batches(torch.float32)[0])
    assert whole.compute() == alone.compute()

def test_a_trained_autoencoder_is_trained_further(x):
    "Its straight lines are where training has brought them, not set anew"
    ae = tiny()
    train_autoencoder(ae, x, x[:8], steps=3, bs=16, device='cpu')
    before = ae.line_in.weight.clone()
    train_autoencoder(ae, x, x[:8], steps=1, bs=16, lr=1e-9, device='cpu')
    assert (ae.line_in.weight - before).abs().max() < 1e-6 and ae.decoder[-2].weight.any()

def test_the_scale_is_saved_as_it_was_measured(tmp_path):
    "Not as bfloat16 rounds it"
    model = dict(AutoencoderKL(block_out_channels=(32, 64), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2).config)
    ae = PretrainedKL(model)
    ae.set_scale(mean := [.123456789]*4, std := [1.23456789]*4)
    ae.to(torch.bfloat16).save_config(tmp_path)
    saved = json.loads((tmp_path/'config.json').read_text())
    assert (saved['latents_mean'], saved['latents_std']) == (mean, std)

@pytest.mark.parametrize('dtype,far', [(torch.bfloat16, .2), (torch.float16, .02), (torch.float64, 1e-4)])
def test_an_autoencoder_in_another_precision_takes_any_pictures(dtype, far):
    torch.manual_seed(0)
    ae, x = tiny(), images(2, 3, 16)
    ae.set_scale([.1]*4, [.7]*4)
    z, y = ae.eval().encode(x), ae.decode(ae.encode(x))
    other = copy.deepcopy(ae).to(dtype)
    for pictures in (x, x.to(dtype)):
        found = other.encode(pictures)
        assert found.dtype == dtype and (found.double() - z).abs().max() < far*z.abs().max()
        for latents in (found, z): assert (other.decode(latents).double() - y).abs().max() < far + .02

def test_metric_closed_forms():
    im = images()
    assert psnr(im*0, im*0 + .2) == pytest.approx(20, rel=1e-6)   # range 2, error 0.2: 10 log10(4/0.04)
    flat = lambda v: torch.full_like(im, v)   # (2 mx my + c1)/(mx^2 + my^2 + c1), of means in [0,1]: mid-grey and a little darker are alike
    assert ssim(flat(0.), flat(-.1)) == pytest.approx((2*.5*.45 + 1e-4)/(.5**2 + .45**2 + 1e-4), rel=1e-6)
    assert ssim(im, im) == pytest.approx(1, abs=1e-12) and psnr(im, im) == float('inf')

def test_metrics_on_a_device_without_float64(monkeypatch):
    "What stands in for the device: float32 only, and said to be mps"
    class NoDouble(torch.Tensor):
        @property
        def device(self): return torch.device('mps')
        def double(self): raise TypeError('no float64 on this device')
        def cpu(self): return self.as_subclass(torch.Tensor)
    x, y = images(), images(seed=1)
    a, b = x.as_subclass(NoDouble), y.as_subclass(NoDouble)
    assert psnr(a, b) == psnr(x, y) and ssim(a, b) == ssim(x, y)

def test_psnr_is_pooled():
    "20 and 30 dB in two equal halves are 22.6, not 25: the errors average"
    x = torch.zeros(2, 1, 8, 8)
    y = torch.stack([x[0] + .2, x[1] + .2/10**.5])
    assert psnr(x, y) == pytest.approx(22.596, abs=1e-3)

# --- training

def quick(x, seed=0, cls=KLAutoencoder, **kw):
    torch.manual_seed(5)
    ae = cls(3, (8, 16), 2, 1, 4)
    train_autoencoder(ae, x[:40], x[40:], bs=8, seed=seed, device='cpu', **{'epochs': 2, **kw})
    return ae

def test_training_is_repeatable_to_the_bit(x):
    a, b, c = quick(x), quick(x), quick(x, seed=1)
    same = lambda u, v: all(torch.equal(p, q) for p, q in zip(u.state_dict().values(), v.state_dict().values()))
    assert same(a, b) and not same(a, c) and a.config.latent_mean == b.config.latent_mean

def test_training_leaves_the_global_generator_alone(x):
    torch.manual_seed(1); want = torch.rand(3)
    ae = KLAutoencoder(3, (8,), 4)
    torch.manual_seed(1); train_autoencoder(ae, x[:16], x[16:24], epochs=1, device='cpu')
    assert torch.equal(torch.rand(3), want)
    train_autoencoder(ae, x[:16], x[16:24], epochs=1, device='cpu')   # and it can be trained again, as by a cell that is run twice

def test_trained_latents_are_standard_and_better_than_pca(x):
    ae = quick(x, epochs=12)
    z = torch.cat([(r - ae.latent_mean.view(1, -1, 1, 1))/ae.latent_std.view(1, -1, 1, 1) for r in (ae.encode_raw(b)[0] for b in A.batches_for(ae, x[:40]))])
    mean, std = channel_stats([z])
    assert mean.abs().max() < 1e-5 and (std - 1).abs().max() < 1e-5
    assert torch.allclose(z, ae.encode(as_images(x[:40])), atol=1e-5)
    assert not ae.training and not any(p.requires_grad for p in ae.parameters())
    assert quality(ae, x[40:])['psnr'] > quality(pca_start(tiny(), x), x[40:])['psnr']

def test_the_best_weights_are_kept(x):
    "Eight pictures by heart: the validation loss rises again, and the autoencoder is the one from before"
    ae = tiny()
    learn = train_autoencoder(ae, x[:8], x[8:16], steps=150, lr=1e-2, bs=8, device='cpu', cbs=())
    rows = learn.history['rows']
    best = min(rows, key=lambda r: r[2])
    assert learn.history['best'] == [best[0], best[2]] and best[0] < 150
    with torch.no_grad():
        out = ae(as_images(x[8:16]))
        assert AELoss()(out, as_images(x[8:16])).item() == pytest.approx(best[2], rel=1e-4) and best[2] < rows[-1][2]

def test_channel_stats_do_not_depend_on_batches():
    z = torch.randn(50, 4, 3, 3)*3 + 6
    for bs in (1, 7, 50):
        mean, std = channel_stats(z.split(bs))
        assert torch.allclose(mean, z.double().mean((0, 2, 3))) and torch.allclose(std, z.double().transpose(0, 1).flatten(1).std(1, correction=0))

def test_one_of_steps_epochs_and_minutes(x):
    for how in (dict(minutes=1, epochs=1), dict(steps=3, epochs=1), dict()):
        with pytest.raises(UserError, match='one of the three'): train_autoencoder(tiny(), x, x, device='cpu', **how)

def test_learner_accepts_every_autoencoder(x):
    flat = Flat()
    learn = train_autoencoder(flat, x[:40], x[40:], epochs=1, device='cpu')
    assert len(learn.recorder.values[0]) == 4 and len(flat.config.latent_std) == 7

# --- the discriminator, and the decoder trained against it

def test_hinge_loss_is_its_formula():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-3., 0., 2.])
    assert hinge_loss(real, fake).item() == pytest.approx(.5*((0 + .5 + 2)/3 + (0 + 1 + 3)/3))
    assert hinge_loss(torch.tensor([1.]), torch.tensor([-1.])) == 0

def test_adaptive_weight_is_the_ratio_of_gradients():
    w = torch.tensor([3., 4.], requires_grad=True)
    rec, adv = 6*w[0] + 8*w[1], (w**2).sum()                  # gradients (6, 8) and (6, 8)
    assert adaptive_weight(rec, adv, w).item() == pytest.approx(10/(10 + 1e-4))
    assert adaptive_weight(rec, 0*adv, w) == 1e4 and not adaptive_weight(rec, adv, w).requires_grad
    x, last = images(2, 3, 8), torch.nn.Conv2d(3, 3, 3, padding=1)
    rec, adv = (last(x) - x).abs().mean(), -last(x).square().mean()
    g = [torch.cat([o.flatten() for o in torch.autograd.grad(l, last.weight, retain_graph=True)]).norm() for l in (rec, adv)]
    assert adaptive_weight(rec, adv, last.weight).item() == pytest.approx((g[0]/(g[1] + 1e-4)).item(), rel=1e-6)

def test_patch_discriminator_sees_patches():
    torch.manual_seed(0)
    net, a = PatchDiscriminator(3, 8).eval(), images(1, 3, 64)
    b = a.clone()
    b[..., :8, :8] = 0
    assert net(a).shape == (1, 1, 8, 8)
    changed = (net(a) != net(b))[0, 0]
    assert changed[0, 0] and not changed[4:].any() and not changed[:, 4:].any()

@pytest.fixture(scope='module')
def finished(x): return quick(x)

def sharpened(ae, x, steps=6, **kw):
    ae = copy.deepcopy(ae)
    return ae, sharpen_decoder(ae, x[:40], x[40:], steps, **{'feature_weight': 0., 'bs': 8, 'width': 8, 'device': 'cpu', **kw})

def test_sharpening_leaves_the_latents_alone(finished, x):
    ae, learn = sharpened(finished, x)
    im, old, new = as_images(x), finished.state_dict(), ae.state_dict()
    assert torch.equal(ae.encode(im), finished.encode(im)) and ae.config == finished.config
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed and all(k.split('.')[0] in ('decoder', 'line_out') for k in changed)
    assert not ae.training and not any(p.requires_grad for p in ae.parameters()) and len(learn.adversary.log) == 6

def test_sharpening_is_repeatable_to_the_bit(finished, x):
    run = lambda **kw: sharpened(finished, x, **kw)[0]
    torch.manual_seed(1)
    a = run()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after               # the global generator was left alone
    b, seed, late, alone = run(), run(seed=1), run(start=6), run(adversary_weight=0.)
    assert same(a, b) and not same(a, seed) and not same(a, late) and same(late, alone)

def test_the_adversary_is_weighed_only_when_it_counts(finished, x, monkeypatch):
    calls, usual = [], A.adaptive_weight
    monkeypatch.setattr(A, 'adaptive_weight', lambda *a: calls.append(1) or usual(*a))
    sharpened(finished, x, start=4)
    assert len(calls) == 2

def test_sharpening_stops_at_what_is_not_finite(finished, x):
    bad = x.float()/127.5 - 1
    bad[:40] = float('nan')
    with pytest.raises(UserError, match='not a finite number'): sharpened(finished, bad)
    with pytest.raises(UserError, match='finite number'): sharpened(finished, x, start=0, d_lr=1e30)

def test_only_steps_with_one_backward_pass_are_recorded(finished, x):
    "A CUDA graph allows one, and the adversary's weight takes two more"
    learn, plain = sharpened(finished, x, 2)[1], ae_learner(copy.deepcopy(finished), x[:40], x[40:], device='cpu')
    assert [hasattr(o, 'graphed') for o in (learn, plain)] == [False, True]

def test_only_ours_can_be_sharpened(x):
    with pytest.raises(UserError, match='no Flat'): sharpen_decoder(Flat(), x, x, 1)

def test_feature_loss_alone_brings_features_nearer(finished, x):
    pytest.importorskip('efficientnet_lite_pytorch')
    f, im = FeatureLoss(), as_images(x[40:])
    before, after = (f(a.decode(a.encode(im)), im) for a in
                     (finished, sharpened(finished, x, 15, feature_weight=1., adversary_weight=0.)[0]))
    assert after < before

# --- saving and loading

@pytest.mark.parametrize('make', [lambda: tiny(), lambda: Flat(), lambda: TAEF2(8, 4)])
def test_save_load_round_trip(make, tmp_path):
    ae = make()
    ae.set_scale(torch.arange(ae.latent_channels) + .5, torch.arange(ae.latent_channels) + 1.)
    save_component(ae, tmp_path/'ae')
    again = load_component(tmp_path/'ae')
    assert type(again) is type(ae) and again.latent_channels == ae.latent_channels
    assert torch.equal(again.encode(images()), ae.eval().encode(images())) and again.latent_std[1] == 2
    assert sorted(f.name for f in (tmp_path/'ae').iterdir()) == ['autoencoder.safetensors', 'config.json', 'contents.json']
    save_component(again, tmp_path/'ae')           # over an earlier one
    assert [f.name for f in tmp_path.iterdir()] == ['ae']

def test_a_component_of_another_kind_is_refused(tmp_path):
    save_component(Other(), tmp_path/'x')
    with pytest.raises(UserError, match='not an autoencoder'): open_autoencoder(tmp_path/'x')

class Other(torch.nn.Module, A.ConfigMixin):
    config_name = 'config.json'
    @A.register_to_config
    def __init__(self): super().__init__(); self.l = torch.nn.Linear(2, 2)

# --- pretrained ones

KL = dict(block_out_channels=(32, 32), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4)
TINY = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)

@pytest.fixture(params=['kl', 'tiny'])
def hub_folder(request, tmp_path):
    torch.manual_seed(0)
    m = AutoencoderKL(**KL) if request.param == 'kl' else AutoencoderTiny(**TINY)
    m.eval().save_pretrained(tmp_path/'hub', safe_serialization=True)
    return tmp_path/'hub', m

@torch.no_grad()
def test_wrapped_diffusers_model_is_the_model(hub_folder, tmp_path):
    folder, m = hub_folder
    ae, im = open_autoencoder(folder), images()
    raw = m.encode(im).latent_dist.mode() if isinstance(m, AutoencoderKL) else m.encode(im).latents
    assert ae.factor == im.shape[-1]//raw.shape[-1] and torch.equal(ae.encode(im), raw)
    assert torch.allclose(ae.decode(raw), m.decode(raw).sample.clamp(-1, 1))
    ae.set_scale([1.]*4, [2.]*4)
    assert torch.allclose(ae.encode(im), (raw - 1)/2) and torch.allclose(ae.decode((raw - 1)/2), m.decode(raw).sample.clamp(-1, 1), atol=1e-5)
    again = open_autoencoder(save_component(ae, tmp_path/'own'))    # needs no hub any more
    assert torch.equal(again.encode(im), ae.encode(im)) and type(again) is type(ae)

def test_wrapped_model_trains_in_a_learner(x):
    ae = PretrainedKL(KL)
    learn = train_autoencoder(ae, x[:8], x[8:16], epochs=1, device='cpu')
    assert len(learn.recorder.values[0]) == 4

@pytest.mark.parametrize('spec', ['./nowhere', '/no/such/folder', 'nothing', 'a/b/c'])
def test_unknown_spec_is_one_line(spec):
    with pytest.raises(UserError, match='neither a folder nor a Hub id'): open_autoencoder(spec)

def test_hub_failure_is_one_line(monkeypatch):
    def gone(*a, **k): raise OSError('no connection\nand much more')
    monkeypatch.setattr(AutoencoderKL, 'load_config', gone)
    with pytest.raises(UserError) as e: open_autoencoder('stabilityai/sd-vae-ft-ema')
    assert '\n' not in str(e.value) and 'sd-vae-ft-ema' in str(e.value)

def test_pickled_weights_are_refused(tmp_path):
    m = AutoencoderTiny(**TINY)
    m.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError) as e: open_autoencoder(tmp_path)
    assert '\n' not in str(e.value)

# --- what diffusers reads, and what it must not

def test_diffusers_stops_at_our_autoencoder(tmp_path):
    save_component(tiny(), tmp_path/'run'/'autoencoder')
    with pytest.raises(OSError): AutoencoderKL.from_pretrained(tmp_path/'run', subfolder='autoencoder')

@torch.no_grad()
def test_diffusers_reads_the_run_and_so_do_we(hub_folder, tmp_path):
    "vae/ is diffusers' own folder, with our scale where its pipelines look for it"
    folder, m = hub_folder
    ae, im = open_autoencoder(folder), images()
    ae.set_scale([1., 2., 3., 4.], [.5, 1., 2., 3.])
    save_component(ae, tmp_path/'run'/'vae')
    theirs, info = type(m).from_pretrained(tmp_path/'run', subfolder='vae', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    raw = lambda net: net.encode(im).latent_dist.mode() if isinstance(m, AutoencoderKL) else net.encode(im).latents
    z = raw(theirs)
    assert torch.equal(z, raw(m)) and torch.equal(theirs.decode(z).sample, m.decode(z).sample)
    config = json.loads((tmp_path/'run'/'vae'/'config.json').read_text())
    assert config['_class_name'] == type(m).__name__ and config['scaling_factor'] == 1
    mean, std = (torch.tensor(config[k]).view(1, -1, 1, 1) for k in ('latents_mean', 'latents_std'))
    again = load_component(tmp_path/'run'/'vae')
    assert torch.equal(again.encode(im), (z - mean)/std) and torch.equal(again.encode(im), ae.encode(im))
    assert torch.equal(again.decode(again.encode(im)), ae.decode(ae.encode(im)))

def test_a_published_model_with_weights_missing_is_refused(hub_folder):
    folder, _ = hub_folder
    state = load_file(folder/WEIGHTS)
    state.pop(sorted(state)[0])
    save_file(state, folder/WEIGHTS, metadata={'format': 'pt'})
    with pytest.raises(UserError, match='not whole'): open_autoencoder(folder)

# --- the maker of a run

def small_preset(**kw): return replace(preset('tiny'), **{'n': 60, 'size': 16, 'ae_steps': 12, 'bs': 8, **kw})

@pytest.fixture(scope='module')
def ims(): return open_images('rooms', 16, n=60)

def same(a, b): return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_the_maker_makes_once_and_loads(ims, tmp_path, capsys):
    a = make_autoencoder(tmp_path, ims, small_preset(), device='cpu')
    facts = made(tmp_path/'autoencoder')['facts']
    assert 'training KLAutoencoder' in capsys.readouterr().out and not a.training
    b = make_autoencoder(tmp_path, ims, small_preset(), device='cpu')
    assert capsys.readouterr().out == '' and same(a, b) and torch.equal(a.encode(images()), b.encode(images()))
    held_out = ims.pixels(ims.valid_idxs)
    assert facts['n'] == len(held_out) and facts['psnr'] == pytest.approx(quality(b, held_out)['psnr'], abs=1e-6)
    assert facts['history']['rows'][-1][0] == 12 and facts['history']['best'][0] <= 12
    c = make_autoencoder(tmp_path/'other', ims, small_preset(), device='cpu')
    d = make_autoencoder(tmp_path/'seed', ims, small_preset(), seed=1, device='cpu')
    assert same(a, c) and not same(a, d)

@pytest.mark.parametrize('change', [dict(latent_channels=2), dict(ae_steps=13), dict(bs=4), dict(ae_pretrained='taef2')])
def test_the_maker_refuses_what_was_made_otherwise(ims, tmp_path, change):
    make_autoencoder(tmp_path, ims, small_preset(), device='cpu')
    with pytest.raises(UserError, match='was made with') as e: make_autoencoder(tmp_path, ims, small_preset(**change), device='cpu')
    assert '\n' not in str(e.value)

def test_the_maker_refuses_other_images(ims, tmp_path):
    make_autoencoder(tmp_path, ims, small_preset(), device='cpu')
    other = open_images('rooms', 16, n=61)
    with pytest.raises(UserError, match='other images'): make_autoencoder(tmp_path, other, small_preset(), device='cpu')

def test_the_maker_goes_on_where_it_was_killed(ims, tmp_path, monkeypatch):
    whole = make_autoencoder(tmp_path/'whole', ims, small_preset(), device='cpu')
    monkeypatch.setattr(A, 'Checkpoint', lambda folder, key: Eager(folder, key, every=0))
    Eager.left = 7
    with pytest.raises(KeyboardInterrupt): make_autoencoder(tmp_path/'cut', ims, small_preset(), device='cpu')
    assert not (tmp_path/'cut'/'autoencoder').exists()
    Eager.left, Eager.loads = 99, []
    assert same(make_autoencoder(tmp_path/'cut', ims, small_preset(), device='cpu'), whole)
    assert Eager.loads == [7]

class Eager(A.Checkpoint):
    "A checkpoint after every step, that pulls the plug when `left` have been written"
    left, loads = 99, []
    def save(self, *args):
        super().save(*args)
        Eager.left -= 1
        if not Eager.left: raise KeyboardInterrupt
    def load(self, *args, **kw):
        found = super().load(*args, **kw)
        if found: Eager.loads.append(found[1]['k'])
        return found

def test_colour_is_mirrored_and_grey_is_not(ims, tmp_path):
    make_autoencoder(tmp_path/'colour', ims, small_preset(), device='cpu')
    grey = open_images('rooms', 16, n=60, channels=1)
    make_autoencoder(tmp_path/'grey', grey, small_preset(), device='cpu')
    assert [made(tmp_path/o/'autoencoder')['settings']['flip'] for o in ('colour', 'grey')] == [True, False]

def test_few_pictures_are_moved_and_more_are_not(ims, tmp_path, monkeypatch):
    "By a sixteenth of the side; what they were given is in the settings, and what else it was made from stays the same."
    given = []
    monkeypatch.setattr(A, 'train_autoencoder', lambda *args, crop=0, **kw: given.append(crop) or train_autoencoder(*args, crop=crop, **kw))
    note = lambda name: made(tmp_path/name/'autoencoder')['settings']
    make_autoencoder(tmp_path/'few', ims, small_preset(), device='cpu')
    monkeypatch.setattr('latentdiff.data.FEW', len(ims))
    make_autoencoder(tmp_path/'enough', ims, small_preset(), device='cpu')
    assert given == [1, 0] and note('few') == note('enough') | dict(crop=1) and 'crop' not in note('enough')

def test_a_pretrained_one_is_measured_and_kept_with_the_run(hub_folder, ims, tmp_path):
    folder, m = hub_folder
    p = small_preset(ae_pretrained=str(folder))
    ae = make_autoencoder(tmp_path/'run', ims, p, device='cpu')
    assert isinstance(ae, PretrainedKL) and not (tmp_path/'run'/'autoencoder').exists()
    with torch.no_grad(): mean, std = channel_stats([ae.encode(as_images(ims.pixels(ims.train_idxs)))])
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4
    folder.rename(tmp_path/'moved')                  # the run needs it no more
    assert torch.equal(make_autoencoder(tmp_path/'run', ims, p, device='cpu').encode(images()), ae.encode(images()))
    with pytest.raises(UserError, match='was made with'): make_autoencoder(tmp_path/'run', ims, small_preset(), device='cpu')

def test_pixels_of_a_run_are_in_a_fixed_order_and_fit(ims, monkeypatch):
    a, b = D.some_pixels(ims, 'train', 0), D.some_pixels(ims, 'train', 1)
    assert len(a) == len(ims.train_idxs) and torch.equal(a, D.some_pixels(ims, 'train', 0)) and not torch.equal(a, b)
    assert torch.equal(D.some_pixels(ims, 'train', 0, 5), a[:5])
    monkeypatch.setattr(D, 'FITS', 3*16*16*7)
    assert torch.equal(D.some_pixels(ims, 'train', 0), a[:7])

# --- TAEF2

def test_taef2_block():
    b, z = TAEBlock(8, pool=True), torch.randn(2, 8, 4, 4)
    h = z + F.conv2d(F.relu(F.group_norm(F.conv2d(z, b.pool[0].weight), 4, b.pool[1].weight, b.pool[1].bias)), b.pool[3].weight)
    c = b.conv
    f = c[4](F.relu(c[2](F.relu(c[0](h)))))
    assert torch.allclose(b(z), F.relu(f + h)) and (b(z) >= 0).all() and TAEBlock(8).pool is None

def test_taef2_layout():
    enc, dec = A.taef2_encoder(64, 32).state_dict(), A.taef2_decoder(64, 32).state_dict()
    n = lambda sd: sum(v.numel() for v in sd.values())
    assert (len(enc), len(dec)) == (79, 79)
    assert enc['0.weight'].shape == (64, 3, 3, 3) and enc['14.weight'].shape == (32, 64, 3, 3) and enc['11.pool.0.weight'].shape == (256, 64, 1, 1)
    assert dec['1.weight'].shape == (64, 32, 3, 3) and dec['19.weight'].shape == (3, 64, 3, 3) and '7.bias' not in dec and '10.bias' not in enc

@torch.no_grad()
def test_taef2_hides_its_pixel_range_and_clamps_latents():
    ae = TAEF2(8, 4).eval()
    im = images()
    assert torch.equal(ae.encode(im), ae.encoder(im*.5 + .5)) and ae.encode(im).shape == (3, 4, 2, 2)
    z = torch.randn(1, 4, 2, 2)*100
    assert torch.allclose(ae.decode(z), (ae.decoder[1:](torch.tanh(z/3)*3)*2 - 1).clamp(-1, 1))

def test_taef2_from_a_folder(tmp_path, monkeypatch):
    ae = TAEF2()
    folder = tmp_path/'taef2'
    folder.mkdir()
    for part in ('encoder', 'decoder'): save_file({k: v.half() for k, v in getattr(ae, part).state_dict().items()}, folder/f'{part}.safetensors')
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path))
    for spec in ('taef2', folder):
        again = open_autoencoder(spec)
        assert again.encoder[0].weight.dtype == torch.float32
        assert torch.allclose(again.encoder[0].weight, ae.encoder[0].weight, atol=1e-3)
    (folder/'decoder.safetensors').unlink()
    with pytest.raises(UserError, match='missing'): open_autoencoder(folder)

@torch.no_grad()
@pytest.mark.skipif('TAEF2' not in os.environ, reason='needs the folder of the published weights in $TAEF2')
def test_taef2_real_weights():
    x = rooms(4, 128)
    q = quality(open_autoencoder(os.environ['TAEF2']), x)
    assert q['psnr'] > 28 and q['ssim'] > .9
