"The autoencoder: shapes, scale, metrics against torchmetrics, the clock, saving and loading, pretrained wrappers."
import json, os, time
from dataclasses import replace
import pytest, torch
from diffusers import AutoencoderKL, AutoencoderTiny
from fastai.basics import DataLoaders, Learner
from torch.nn import functional as F
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from latentdiff import autoencoder as A
from latentdiff.autoencoder import *
from latentdiff.data import DeviceLoader, UserError, preset, rooms


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
    flat = FlatAutoencoder(3, 16, (8, 16), latent_dim=7)
    with pytest.raises(UserError, match='16x16'): flat.encode(images(1, 3, 32))

def test_flat_latent():
    ae = FlatAutoencoder(3, 16, (8, 16), latent_dim=7)
    z = ae.encode(images())
    assert z.shape == (3, 7) and ae.latent_shape(16) == (7,) and ae.decode(z).shape == (3, 3, 16, 16)

def test_block_starts_as_identity_and_attention_only_scales():
    b, z = AEBlock(8), torch.randn(2, 8, 4, 4)
    assert torch.equal(b(z), z)
    ratio = ChannelAttention(8)(z)/z
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-5) and 0 < ratio.min() and ratio.max() < 1
    assert any(isinstance(m, ChannelAttention) for m in CABAutoencoder(1, (8,), 2).modules())

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

# --- the linear start

def test_pca_start_is_the_best_linear_autoencoder(x):
    ae = KLAutoencoder(3, (8,), 4, 1, 48)     # as many latents as numbers in a patch: nothing is lost but the mean's texture
    pca_start(ae, x)
    q = quality(ae, x)
    few = KLAutoencoder(3, (8,), 4, 1, 4)
    pca_start(few, x)
    assert q['psnr'] > 28 > 24 > quality(few, x)['psnr'] > 12
    mean, std = channel_stats(A.raw_latents(few, x))
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-2

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

# --- metrics

def batches(dtype):
    a = [images(n, 3, 24, seed=n, dtype=dtype) for n in (5, 1, 8)]
    return [(u, (u + .2*images(len(u), 3, 24, seed=99, dtype=dtype)).clamp(-1, 1)) for u in a]

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('ours,theirs', [(PSNR, PeakSignalNoiseRatio), (SSIM, StructuralSimilarityIndexMeasure)])
def test_metrics_equal_torchmetrics(ours, theirs, dtype):
    m, t = ours(), theirs(data_range=2.).to(torch.float64)
    for u, v in batches(dtype): m.update(v, u), t.update(v.double(), u.double())
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

def test_metric_closed_forms():
    im = images()
    assert psnr(im*0, im*0 + .2) == pytest.approx(20, rel=1e-6)   # range 2, error 0.2: 10 log10(4/0.04)
    assert ssim(im, im) == pytest.approx(1, abs=1e-12) and psnr(im, im) == float('inf')

# --- the clock

class Count(A.Callback):
    def before_fit(self): self.seen, self.pcts, self.rounds = 0, [], 0
    def after_batch(self):
        if self.training: self.seen += 1; self.pcts.append(self.learn.pct_train); time.sleep(.004)
    def after_validate(self): self.rounds += 1; time.sleep(.02)

def small_learner(*cbs, n=64):
    torch.manual_seed(0)
    data = torch.randn(n, 3)
    dls = DataLoaders(DeviceLoader(data, data, bs=8, shuffle=True, seed=0, device='cpu'), DeviceLoader(data, data, bs=32, device='cpu'))
    return Learner(dls, torch.nn.Linear(3, 3), F.mse_loss, opt_func=adamw, cbs=cbs)

@pytest.mark.parametrize('n_epoch', [1, 1000])
@pytest.mark.parametrize('bar', [True, False])
def test_time_budget_follows_and_keeps_the_clock(n_epoch, bar):
    count = Count()
    learn = small_learner(count)
    start = time.perf_counter()
    if bar: learn.fit_one_cycle(n_epoch, 1e-2, cbs=TimeBudget(1.5/60))
    else:
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-2, cbs=TimeBudget(1.5/60))
    took = time.perf_counter() - start
    assert took < 2.5 and count.rounds <= 10 and len(learn.recorder.values) == count.rounds
    assert count.pcts == sorted(count.pcts) and count.pcts[-1] > .9
    lrs = learn.recorder.lrs
    assert max(lrs) > 5e-3 and lrs[-1] < 1e-3 and lrs[0] < 1e-3     # one whole cycle
    assert all(len(v) == 2 for v in learn.recorder.values)          # train and valid loss in every row

def test_time_budget_smaller_than_a_batch_stops():
    count = Count()
    with (learn := small_learner(count)).no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 1e-2, cbs=TimeBudget(1e-6))
    assert count.seen <= 1 and count.rounds <= 1

def test_no_sync_keeps_the_running_loss():
    a, b = small_learner(), small_learner()
    a.fit(1, 1e-2); A.no_sync(b).fit(1, 1e-2)
    assert torch.allclose(torch.tensor([float(l) for l in a.recorder.losses]), torch.tensor(b.recorder.losses), rtol=1e-6)
    assert isinstance(b.recorder.losses[0], float)

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

def test_trained_latents_are_standard_and_better_than_pca(x):
    ae = quick(x, epochs=12)
    z = torch.cat([(r - ae.latent_mean.view(1, -1, 1, 1))/ae.latent_std.view(1, -1, 1, 1) for r in A.raw_latents(ae, x[:40])])
    mean, std = channel_stats([z])
    assert mean.abs().max() < 1e-5 and (std - 1).abs().max() < 1e-5
    assert torch.allclose(z, ae.encode(as_images(x[:40])), atol=1e-5)
    assert not ae.training and not any(p.requires_grad for p in ae.parameters())
    assert quality(ae, x[40:])['psnr'] > quality(pca_start(tiny(), x), x[40:])['psnr']

def test_channel_stats_do_not_depend_on_batches():
    z = torch.randn(50, 4, 3, 3)*3 + 6
    for bs in (1, 7, 50):
        mean, std = channel_stats(z.split(bs))
        assert torch.allclose(mean, z.double().mean((0, 2, 3))) and torch.allclose(std, z.double().transpose(0, 1).flatten(1).std(1, correction=0))

def test_minutes_or_epochs_not_both(x):
    with pytest.raises(UserError, match='either minutes or epochs'): train_autoencoder(tiny(), x, x, minutes=1, epochs=1)
    with pytest.raises(UserError, match='either minutes or epochs'): train_autoencoder(tiny(), x, x)

def test_learner_accepts_every_autoencoder(x):
    for cls in (CABAutoencoder,): quick(x, cls=cls, epochs=1)
    flat = FlatAutoencoder(3, 16, (8, 16), latent_dim=7)
    learn = train_autoencoder(flat, x[:40], x[40:], epochs=1, device='cpu')
    assert len(learn.recorder.values[0]) == 4 and len(flat.config.latent_std) == 7

# --- saving and loading

@pytest.mark.parametrize('make', [lambda: tiny(), lambda: FlatAutoencoder(3, 16, (8, 16), latent_dim=7), lambda: CABAutoencoder(3, (8,), 4), lambda: TAEF2(8, 4)])
def test_save_load_round_trip(make, tmp_path):
    ae = make()
    ae.set_scale(torch.arange(ae.latent_channels) + .5, torch.arange(ae.latent_channels) + 1.)
    save_component(ae, tmp_path/'ae')
    again = load_component(tmp_path/'ae')
    assert type(again) is type(ae) and again.latent_channels == ae.latent_channels
    assert torch.equal(again.encode(images()), ae.eval().encode(images())) and again.latent_std[1] == 2
    assert sorted(f.name for f in (tmp_path/'ae').iterdir()) == ['config.json', A.WEIGHTS]
    save_component(again, tmp_path/'ae')           # over an earlier one
    assert [f.name for f in tmp_path.iterdir()] == ['ae']

def test_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    save_component(tiny(), tmp_path/'ae')
    def killed(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(A, 'save_file', killed)
    with pytest.raises(KeyboardInterrupt): save_component(tiny(), tmp_path/'ae')
    assert load_component(tmp_path/'ae').factor == 4

def damage(folder, what):
    f, c = folder/A.WEIGHTS, folder/'config.json'
    if what == 'no config': c.unlink()
    if what == 'bad config': c.write_text('{')
    if what == 'no class': c.write_text('{"_class_name": "Nothing"}')
    if what == 'no weights': f.unlink()
    if what == 'cut off': f.write_bytes(f.read_bytes()[:500])
    if what == 'other widths': c.write_text(json.dumps({**json.loads(c.read_text()), 'widths': [8, 24]}))
    if what == 'other depth': c.write_text(json.dumps({**json.loads(c.read_text()), 'depth': 2}))

@pytest.mark.parametrize('what', ['no config', 'bad config', 'no class', 'no weights', 'cut off', 'other widths', 'other depth'])
def test_damaged_components_are_one_line(what, tmp_path):
    save_component(tiny(), tmp_path/'ae')
    damage(tmp_path/'ae', what)
    with pytest.raises(UserError) as e: load_component(tmp_path/'ae')
    assert '\n' not in str(e.value)

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

# --- for the later lessons

def test_autoencoder_for_makes_loads_and_makes_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('LATENTDIFF_RUNS', str(tmp_path))
    p = replace(preset('tiny'), n=40, size=16, ae_minutes=.01)
    a = autoencoder_for(p, device='cpu')
    assert (tmp_path/'rooms-tiny'/'autoencoder'/'config.json').exists()
    b = autoencoder_for(p, device='cpu')
    assert 'loaded' in capsys.readouterr().out.splitlines()[-1] and torch.equal(a.encode(images()), b.encode(images()))
    c = autoencoder_for(replace(p, latent_channels=2), device='cpu')
    assert 'other settings' in capsys.readouterr().out and c.latent_channels == 2

def test_autoencoder_for_opens_a_pretrained_one_and_measures_it(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**KL).save_pretrained(tmp_path/'hub')
    p = replace(preset('tiny'), n=40, size=16, ae_pretrained=str(tmp_path/'hub'))
    ae = autoencoder_for(p, tmp_path/'own', device='cpu')
    assert isinstance(ae, PretrainedKL) and ae.config.latent_std != [1.]*4
    assert torch.equal(autoencoder_for(p, tmp_path/'own', device='cpu').latent_std, ae.latent_std)

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
    for part in ('encoder', 'decoder'): A.save_file({k: v.half() for k, v in getattr(ae, part).state_dict().items()}, tmp_path/f'{part}.safetensors')
    monkeypatch.setenv('LATENTDIFF_TAEF2', str(tmp_path))
    for spec in ('taef2', tmp_path):
        again = open_autoencoder(spec)
        assert again.encoder[0].weight.dtype == torch.float32
        assert torch.allclose(again.encoder[0].weight, ae.encoder[0].weight, atol=1e-3)
    (tmp_path/'decoder.safetensors').unlink()
    with pytest.raises(UserError, match='missing'): open_autoencoder(tmp_path)

@torch.no_grad()
@pytest.mark.skipif('LATENTDIFF_TAEF2' not in os.environ, reason='needs the published weights in $LATENTDIFF_TAEF2')
def test_taef2_real_weights():
    x = rooms(4, 128)
    q = quality(open_autoencoder('taef2'), x)
    assert q['psnr'] > 28 and q['ssim'] > .9
