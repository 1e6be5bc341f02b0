"The recipe of `bedrooms256`, on a handful of made-up latents: what is learned from what, for how long, and that a second call goes on."
import sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent/'scripts'))
import zoo256
from latentdiff import training
from latentdiff.autoencoder import AELoss
from latentdiff.core import read_json
from latentdiff.pipeline import LatentDiffusionPipeline

S = zoo256.Settings(size=64, held=10, pairs_held=4, widths=(8,8,16), depth=1, ae_steps=4, ae_bs=4, places=4, sharpen=(2,2),
                    sharpen_bs=2, unet=(8,8,8), steps=(4,8), bs=8, n=10, sample_steps=2)

@pytest.fixture
def data(tmp_path, monkeypatch):
    "30 latents of 8x8 places; their pictures are drawn from them, so that there is something to learn; the first 12 are there"
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('LATENTDIFF_RUNS', str(tmp_path/'runs'))
    home, g = tmp_path/'data'/'lsun_bedroom', np.random.default_rng(0)
    q = g.integers(60, 200, (30, 4, 8, 8), dtype=np.uint8)
    (home/'bedroom').mkdir(parents=True)
    step, low = np.full((4, 1, 1), .2, 'float32'), np.array([-20, -25, -23, -24], 'float32')[:, None, None]
    names = [f'{i:040x}' for i in range(30)]
    np.savez(home/'sd_latents_u8.npz', q=q, step=step, low=low, names=np.array(names))
    for name, o in zip(names[:12], q):
        Image.fromarray(o[:3].repeat(8, 1).repeat(8, 2).transpose(1, 2, 0)).save(home/'bedroom'/f'{name}.jpg', 'png')
    return zoo256.Data(S)

def test_pairs_stay_pairs(data):
    "Cut out and mirrored, a latent still lies over its picture."
    loader = zoo256.Pairs(*data.pairs()[0], bs=4, shuffle=True, seed=0, places=4, mirror=True, device='cpu')
    batches = [loader.batch(k) for k in range(6)]
    for z, x in batches:
        assert z.shape == (4, 4, 4, 4) and x.shape == (4, 3, 32, 32)
        a, b = z[:, 0].flatten(), torch.nn.functional.avg_pool2d(x, 8)[:, 0].flatten()
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > .99
    assert all(torch.equal(a, b) for a, b in zip(batches[2], loader.batch(2)))

def test_held_out_latents_set_no_scale(data):
    train, held = data.split(data.z)
    assert (len(train), len(held)) == (20, 10)
    assert train.mean((0, 2, 3)).abs().max() < 1e-4 and (train.std((0, 2, 3)) - 1).abs().max() < 1e-2

def test_a_linear_world_needs_no_training(data):
    z, x = data.pairs()[0]
    ae = zoo256.linear_start(zoo256.KLAutoencoder(3, (8,8,16), 2, 1, 4), z, x)
    assert (ae.decode_raw(z) - zoo256.from_uint8(x)).abs().max() < .02
    assert (ae.encode_raw(zoo256.from_uint8(x))[0] - z)[:, :3].abs().max() < .2 # the fourth channel is not in the pictures

def test_how_long_the_next_training_is():
    ask = lambda steps, left, again=.25: zoo256.next_steps(steps, 40_000, 2, again, .1, left)
    assert [ask(o, float('inf')) for o in (4000, 8000, 16_000, 40_000)] == [8000, 16_000, 40_000, None]
    assert ask(4000, 600) == 8400            # all that the time allows, rather than twice as many and then too little for more
    assert ask(4000, 200) is None and 4000 < ask(4000, 400) < 8000

class Brightness:
    "Stands in for the judge: the mean of each colour"
    name, device = 'brightness', 'cpu'
    def __call__(self, pixels): return pixels.float().mean((2, 3))

def test_all_of_it_and_on_from_there(data, tmp_path, capsys, monkeypatch):
    "The feature networks are tested elsewhere, and how long a step takes is not asked here: both cost more than all the rest."
    monkeypatch.setattr(training, 'step_time', lambda learn: .01)
    monkeypatch.setattr(zoo256, 'EfficientNetFeatures', Brightness)
    monkeypatch.setattr(zoo256, 'AELoss', lambda kl, features, device: AELoss(kl))
    out = tmp_path/'out'
    zoo256.main(['--out', str(out)], S)
    note, place = read_json(out/'denoiser.json', ''), out/'bedrooms256'
    assert list(note['lengths']) == ['4', '8'] and note['steps'] == int(min(note['lengths'], key=note['lengths'].get))
    assert 'from step 3 on' in capsys.readouterr().out
    pipe = LatentDiffusionPipeline.from_pretrained(place, 'cpu')
    assert pipe.autoencoder.latent_mean.tolist() == pytest.approx(data.mean.flatten().tolist(), rel=1e-4)
    assert {o.suffix for o in place.rglob('*') if o.is_file()} == {'.safetensors', '.json', '.md'}
    card, before = (place/'README.md').read_text(), {o: o.stat().st_mtime_ns for o in (out/'measured.json', out/'grid.jpg')}
    zoo256.main(['--out', str(out), '--part', 'pack'], S)
    assert (place/'README.md').read_text() == card and {o: o.stat().st_mtime_ns for o in before} == before
