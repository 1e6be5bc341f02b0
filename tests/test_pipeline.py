"The pipeline object, the plan of a run and the small pieces behind the commands."
import json
import numpy as np, pytest, torch
from latentdiff.autoencoder import FlatAutoencoder, KLAutoencoder
from latentdiff.data import UserError, open_images
from latentdiff.noisify import Process
from latentdiff.pipeline import (KIDCurve, LatentDiffusionPipeline, Run, View, npz_pixels, path_of, plan, settings_of, thin, write_npz,
                                 write_pngs, write_whole)
from latentdiff.unet import UNet, train_denoiser

def small(latent_channels=4, process=Process('flow', 'velocity', 'logit_normal'), seed=0):
    "An untrained pipeline whose denoiser is not all zeros."
    torch.manual_seed(seed)
    ae = KLAutoencoder(3, (16,), patch=4, latent_channels=latent_channels)
    net = UNet(latent_channels, widths=(16,32), depth=1, attn_levels=(1,))
    torch.nn.init.normal_(net.conv_out.weight, std=.1)
    return LatentDiffusionPipeline(ae.eval(), net.eval(), process, 32)

@pytest.mark.parametrize('process', [Process('flow', 'velocity', 'logit_normal'), Process('cosine', 'v', 'uniform'), Process('edm', 'v', 'edm')])
def test_saved_and_loaded_draws_the_same_bits(tmp_path, process):
    a = small(process=process)
    a.save(tmp_path)
    b = LatentDiffusionPipeline.load(tmp_path, 'cpu')
    assert b.process == process and b.size == 32
    assert torch.equal(a(5, 3, seed=7), b(5, 3, seed=7))

def test_index_is_as_diffusers_writes_it(tmp_path):
    small().save(tmp_path)
    d = json.loads((tmp_path/'model_index.json').read_text())
    assert d['_class_name'] == 'LatentDiffusionPipeline' and '_diffusers_version' in d
    assert d['denoiser'] == ['latentdiff.unet', 'UNet'] and d['autoencoder'] == ['latentdiff.autoencoder', 'KLAutoencoder']

def test_images():
    x = small()(3, 2)
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1

def test_one_image_depends_on_seed_and_index_alone():
    p = small()
    a = p(6, 3, seed=1)
    torch.testing.assert_close(p(3, 3, seed=1, bs=2), a[:3], atol=1e-4, rtol=0)
    assert (p(3, 3, seed=2) - a[:3]).abs().max() > .01

def test_drawing_leaves_the_global_generator_alone():
    p = small()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    p(2, 2)
    assert torch.equal(torch.rand(2), want)

def test_parts_of_two_runs_do_not_mix():
    a, b = small(4), small(6)
    with pytest.raises(UserError, match='in_channels 6 .* 4 latent channels'): LatentDiffusionPipeline(a.autoencoder, b.denoiser, a.process, 32)

def test_path_goes_from_noise_to_image():
    p = small()
    path = path_of(p, 2, 4, seed=0)
    assert [round(t, 2) for t, *_ in path] == [1, .75, .5, .25, 0]
    assert torch.equal(path[-1][1], p.latents(2, 4)) and path[0][1].std() > .8

def test_path_of_a_known_score():
    "With a denoiser that always answers 'the clean latent is c', the guess is c from the first step and the end is c."
    p = small(process=Process('flow', 'x0', 'uniform'))
    c = torch.full(p.latent_shape, .3)
    p.denoiser.forward = lambda x, t, cond=None: c.expand_as(x)
    path = path_of(p, 2, 4, seed=0)
    for _, _, x0 in path: torch.testing.assert_close(x0, c.expand_as(x0))

# The plan

def test_plan_splits_what_remains():
    assert plan(100, dict(data=10, report=10), dict(a=1, b=3)) == dict(data=10, report=10, a=20, b=60)

def test_plan_adds_a_share_to_fixed_work_of_the_same_name():
    assert plan(100, dict(a=20), dict(a=1, b=1)) == dict(a=60, b=40)

def test_plan_never_promises_more_than_there_is():
    for left in (50, 300, 5000): assert sum(plan(left, dict(x=12.5, y=30), dict(a=2, b=5)).values()) == pytest.approx(left)

def test_plan_says_how_many_minutes_are_enough():
    "The number in the message is enough: a plan for it goes through."
    with pytest.raises(UserError, match=r'0\.5 minutes are too few') as e: plan(20, dict(x=100), dict(a=1), least=10, spent=10)
    need = float(str(e.value).split('--minutes ')[1].split()[0])
    assert plan(60*need - 10, dict(x=100), dict(a=1), least=10)['a'] >= 10

@pytest.fixture
def tiny_run(tmp_path):
    "A run that has measured nothing: its rates are given."
    def make(minutes=None, n=400, **kw):
        r = Run(tmp_path/'run', settings_of('rooms', 'tiny', minutes=minutes, n=n), **kw)
        r.rates = dict(read=.001, encode=.001, decode=.001, net=.001, step=.003, score=.01, ae_step=.004)
        return r
    return make

def test_plan_of_a_run_fills_its_minutes(tiny_run):
    r = tiny_run(minutes=10)
    secs = r.plan()
    assert list(secs) == list(r.goals)
    assert .95*600 <= sum(secs.values()) <= 600
    assert secs['denoiser'] > secs['autoencoder'] > 60

def test_half_a_run_has_its_part_of_the_minutes(tiny_run):
    "Without --minutes, encoding and training together take as long as the whole."
    a, b, both = tiny_run(goals=('data', 'autoencoder', 'latents')), tiny_run(goals=('denoiser',)), tiny_run()
    assert a.total() + b.total() == pytest.approx(both.total()) == pytest.approx(60*both.p.minutes) and a.total() < b.total()

def test_plan_is_made_again_with_what_is_left(tiny_run):
    "When the autoencoder has taken twice its time, the denoiser pays for it, not the clock."
    r = tiny_run(minutes=10)
    before = r.plan()
    r.state['stages'] |= {k: dict(seconds=before[k]) for k in ('data', 'autoencoder')}
    r.since -= before['data'] + 2*before['autoencoder']
    after = r.plan()
    assert after['denoiser'] == pytest.approx(before['denoiser'] - before['autoencoder'], rel=.05)
    assert sum(after.values()) <= r.left()

def test_late_run_draws_fewer_samples(tiny_run):
    r = tiny_run(minutes=10)
    n = r.n_eval()
    r.p = type(r.p)(**{**r.p.__dict__, 'n_eval': 100_000})
    many = r.n_eval()
    r.since -= 595
    assert n == 64 and many > 1000 and r.n_eval() < many

def test_short_minutes_are_refused_before_anything_is_written(tiny_run, tmp_path):
    with pytest.raises(UserError, match='too few'): tiny_run(minutes=.01).plan(strict=True)
    assert not (tmp_path/'run').exists()

def test_settings_name_data_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pics').mkdir()
    assert settings_of('pics', 'tiny')['data'] == str((tmp_path/'pics').resolve())
    assert settings_of('rooms', 'tiny')['data'] == 'rooms'

# Small pieces

def test_view_mirrors_and_remembers():
    ims = open_images('rooms', 16, n=12)
    px = ims.pixels()
    a, b = View(ims, px), View(ims, px, flip=True)
    assert torch.equal(b.pixels(torch.tensor([3, 5])), a.pixels(torch.tensor([3, 5])).flip(-1))
    assert torch.equal(View(ims, flip=True).pixels(), b.pixels()) and torch.equal(a[4], ims[4])
    assert a.fingerprint == ims.fingerprint != b.fingerprint and a.names == ims.names and len(b) == 12

def test_thin_keeps_both_ends():
    v = list(range(1000))
    assert thin(v)[0] == 0 and thin(v)[-1] == 999 and len(thin(v)) == 200 and thin([1., 2.]) == [1., 2.]

def test_write_whole_leaves_the_old_file_if_it_fails(tmp_path):
    f = tmp_path/'a.json'
    write_whole(f, 'old')
    with pytest.raises(TypeError): write_whole(f, 3)
    assert f.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1

def test_pngs_appear_all_or_none(tmp_path):
    with pytest.raises(TypeError): write_pngs(tmp_path/'a', np.zeros((2, 4, 4, 5), np.uint8))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('c', [1, 3])
def test_npz_round_trip(tmp_path, c):
    a = np.random.default_rng(0).integers(0, 256, (5, 8, 8, c), dtype=np.uint8)
    write_npz(tmp_path/'a.npz', a)
    assert torch.equal(npz_pixels(tmp_path/'a.npz').permute(0, 2, 3, 1), torch.from_numpy(a))

def test_kid_curve_scores_the_average_and_changes_nothing():
    "At each point the model holds the averaged weights in eval mode; the training ends with the very bits it would have had."
    z, seen = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    def train(cbs):
        torch.manual_seed(0)
        net = UNet(4, widths=(16,32), depth=1, attn_levels=())
        return train_denoiser(net, Process('flow', 'velocity', 'logit_normal'), z, z[:8], epochs=8, bs=16, cbs=cbs, device='cpu')
    def score(m):
        seen.append((m.training, m.conv_out.weight.detach().clone()))
        return 1., .1
    curve = KIDCurve(score, at=(.2, .6))
    a, b = train([curve]).model, train([]).model
    assert [c[0] for c in curve.curve] == [.2, .6] and not any(t for t, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
