"Runs that go on from a pipeline, settings from a file, and what guidance does."
import json, math, os, re, shutil, tomllib, warnings
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn.functional as F
from errors import one_line
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from latentdiff import report, source
from latentdiff.autoencoder import AELoss, KLAutoencoder, ae_learner, as_double
from latentdiff.commands import Run, run_cli
from latentdiff.core import beside_file, default_device, made, read_toml, sealed, settings_of, to_toml
from latentdiff.conditioning import ClassConditioner, Conditioned, TextConditioner, conditional
from latentdiff.denoisers import ResNetDenoiser
from latentdiff.data import from_uint8, open_images, some_pixels, to_uint8
from latentdiff.few_step import with_steps
from latentdiff.noisify import Latents, Process, make_latents, weights_hash
from latentdiff.pipeline import LatentDiffusionPipeline, zoo
from latentdiff.report import by_guidance, caption_judge, caution, class_judge, guidance_curves, guidance_figure, headline, is_of, report as page_of
from latentdiff.card import repeated
from latentdiff.report import trackers
from latentdiff.training import fit_steps, orthogonalise, rate
from latentdiff.unet import UNet, denoiser_learner, loss_by_level, make_denoiser

FLOW = 'flow', 'velocity', 'logit_normal'

def shaken(net):
    "`net`, with every weight moved, so that nothing it starts at zero stays there"
    with torch.no_grad():
        for p in net.parameters(): p += .05*torch.randn(p.shape)
    return net

def small(told=None, size=32, channels=3, process=FLOW, net=None):
    "A pipeline that knows nothing, with latents 4x8x8"
    torch.manual_seed(0)
    ae = shaken(KLAutoencoder(channels, (8,), 4, 1, 4))
    ae.fit_scale(open_images('rooms', size, n=40, channels=channels).pixels())
    net = net or UNet(4, widths=(16, 32), depth=1)
    if told: net = Conditioned(conditional(net, told.dim), told)
    return LatentDiffusionPipeline(ae, shaken(net), Process(*process), size)

@pytest.fixture(scope='module', autouse=True)
def no_scores_on_the_way():
    "They are tested elsewhere, and take longer than these trainings."
    with pytest.MonkeyPatch.context() as m:
        m.setattr('latentdiff.pipeline.KIDCurve.__init__.__defaults__', ((),))
        yield

@pytest.fixture(scope='module')
def rooms(): return open_images('rooms', 32, n=120)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "The same in a folder"
    folder = tmp_path_factory.mktemp('source')/'small'
    small().save_pretrained(folder)
    return folder

def same(a, b): # two networks
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)

# --- what fits ------------------------------------------------------------------------------------------------------

def test_shards_that_a_run_of_earlier_named_otherwise_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(source, 'made_of', lambda folder: 'same')
    moved = lambda of, was='s/{00..01}.tar': source.moved(tmp_path, dict(data=f'{tmp_path}/s/{{00..01}}.tar'), dict(data=was), lambda: SimpleNamespace(fingerprint=of))
    assert moved('same') == dict(data=f'{tmp_path}/s/{{00..01}}.tar') and moved('another') == {} == moved('same', 'rooms')


def test_what_fits_is_opened(saved, rooms):
    assert same(source.fitting(saved, rooms, None).denoiser, small().denoiser)

class Kind: # of images
    pixels = None
    def __init__(self, size=32, channels=3, classes=None): self.size, self.channels, self.classes = size, channels, classes

@pytest.mark.parametrize('build,images,condition,words', [
    (lambda: small(), Kind(size=64), None, 'size 32, this run size 64'),
    (lambda: small(channels=1), Kind(), None, 'channels 1, this run channels 3'),
    (lambda: small(), Kind(classes=['a', 'b']), 'class', 'condition None, this run condition class'),
    (lambda: small(ClassConditioner(['a', 'b'], 8)), Kind(), None, 'condition class, this run condition None'),
    (lambda: small(ClassConditioner(['a', 'b'], 8)), Kind(classes=['a', 'zebra']), 'class', 'without the class zebra'),
    (lambda: small(net=ResNetDenoiser(4, (16,), 1)), Kind(), None, 'not a U-Net'), (lambda: small(net=with_steps(UNet(4, widths=(16, 32), depth=1))), Kind(), None, 'long steps')])
def test_what_does_not_fit_is_said_in_one_line(tmp_path, build, images, condition, words):
    build().save_pretrained(tmp_path/'small')
    message = one_line(source.fitting, tmp_path/'small', images, condition)
    assert words in message and 'none' in message

def test_what_was_told():
    assert source.told_of(small()) is None and source.told_of(small(ClassConditioner(['a'], 8))) == 'class'
    both = small(ClassConditioner(['a'], 8))
    both.denoiser.conditioners.append(TextConditioner())
    assert source.told_of(both) == 'class and text'

def test_labels_follow_their_names():
    "Whatever the order of the classes, each image keeps the name of its class, or none."
    images = open_images('rooms', 32, n=30)
    images.labels[3] = -1
    names = [images.classes[k] if k >= 0 else None for k in images.labels]
    source.counted_as(images.classes[::-1] + ['another'], images)
    assert [images.classes[k] if k >= 0 else None for k in images.labels] == names and names[3] is None

# --- a run that goes on ---------------------------------------------------------------------------------------------

def test_the_network_is_a_copy_that_trains(saved):
    "With the weights of the source, which stay as they are when it is trained."
    pipe = source.LatentDiffusionPipeline.from_pretrained(saved)
    net = source.going_on(None, None, source.description(pipe), lambda: pipe)['build']()
    assert same(net, small().denoiser) and net.training and all(p.requires_grad for p in net.parameters())
    with torch.no_grad(): next(net.parameters()).zero_()
    assert same(pipe.denoiser, small().denoiser)

@pytest.fixture(scope='module')
def went_on(saved, tmp_path_factory):
    "A run of six steps from there, and its folder"
    r = Run(tmp_path_factory.mktemp('runs')/'run', settings_of('rooms', 'tiny', n=120, From=str(saved), steps=6))
    r.go(('denoiser', 'pipeline'))
    return r

def test_a_run_goes_on(went_on, saved):
    "The autoencoder is the very same, its scale too; the denoiser has the source's shape and fingerprint, and has learned."
    assert weights_hash(went_on.autoencoder) == weights_hash(small().autoencoder)
    note, settings = made(went_on.folder/'unet'), json.loads((went_on.folder/'run.json').read_text())['settings']
    mark = source.mark(LatentDiffusionPipeline.from_pretrained(saved))
    assert settings['from'] == str(saved) and note['settings']['start'] == settings['start']['fingerprint'] == mark
    assert note['settings']['widths'] == [16, 32] and note['settings']['steps'] == 6
    assert made(went_on.folder/'autoencoder')['parents']['source'] == mark
    assert not same(went_on.denoiser[0], small().denoiser)

@pytest.mark.parametrize('change', [*[dict(process=o) for o in (3, [], 'x', None, dict(extra=1), dict(schedule=3), dict(schedule='cosine', target='v'))], *[dict(classes=o) for o in (3, 'x', ['a'], [1])],
    *[dict(parts=o) for o in ([], [3], [None], ['vae', 'unet'])], dict(fingerprint='x'), dict(network={}), dict(network=dict(widths=3)), dict(network=dict(widths=[16, 64], depth=1, attn_levels=[]))], ids=str)
def test_what_run_json_says_of_the_source_is_compared_with_it(went_on, tmp_path, change):
    "Another process, in silence, would train a network that has learned one noise on another; nothing is made from it"
    s, given = went_on.settings, settings_of('rooms', 'tiny', n=120, From=went_on.settings['from'], steps=6)
    (tmp_path/'run.json').write_text(json.dumps(dict(settings=s | dict(start=s['start'] | change))))
    assert 'run.json' in one_line(lambda: Run(tmp_path, given).go(('denoiser',))) and not [*tmp_path.glob('.*.making')] + [*tmp_path.glob('checkpoints')]

def test_classes_that_the_source_cannot_have_are_one_line(rooms):
    images = SimpleNamespace(labels=rooms.labels, classes=['red'])
    assert 'red' in one_line(source.counted_as, ['blue'], images)
    images = SimpleNamespace(labels=None, classes=None, kind='flat')   # whose folders of classes are gone
    assert 'flat has no classes any more' in one_line(source.counted_as, ['blue'], images) and source.counted_as(None, images) is images

def test_a_run_goes_on_with_the_process_of_its_source(tmp_path):
    "A source that predicts noise under the betas of DDPM: the loss of that process falls, and the run says what it was trained for."
    process = 'ddpm_linear', 'eps', 'uniform'
    pipe, p = small(process=process), Process(*process)
    pipe.save_pretrained(tmp_path/'source')
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, From=str(tmp_path/'source'), steps=30))
    r.go(('denoiser', 'pipeline'))
    assert made(r.folder/'unet')['settings']['process']['target'] == process[1]
    shutil.rmtree(tmp_path/'source')
    again = Run(r.folder, r.settings)
    net, found = again.denoiser
    assert found == p and LatentDiffusionPipeline.from_pretrained(r.folder, 'cpu').process == p
    z = r.latents.tensor('valid', 'cpu')
    before, after = (loss_by_level(o.cpu(), p, z, n_levels=5)[1].mean() for o in (pipe.denoiser, net))
    assert after < .9*before, (before, after)

def test_a_source_is_opened_once(saved, rooms, monkeypatch):
    "For its size, for a run, for what it says of itself; anew when its folder has changed."
    opened, real = [], LatentDiffusionPipeline.from_pretrained
    monkeypatch.setattr(LatentDiffusionPipeline, 'from_pretrained', lambda *args: (opened.append(args[0]), real(*args))[1])
    folder = shutil.copytree(saved, saved.with_name('copy'))
    assert source.as_there({'from': str(folder)})['size'] == 32
    pipe = source.fitting(str(folder), rooms, None)
    assert opened == [str(folder)] and source.fitting(str(folder), rooms, None) is pipe
    other = small()
    with torch.no_grad(): other.denoiser.conv_in.weight[0] += 1
    other.save_pretrained(folder)
    again = source.fitting(str(folder), rooms, None)
    assert len(opened) == 2 and same(again.denoiser, other.denoiser) and not same(again.denoiser, pipe.denoiser)

def test_no_source_is_searched_for(saved, tmp_path, monkeypatch):
    "A home, or a whole disk, is no pipeline: that is said at once, and of one that lies in it only its parts are looked at"
    folder = shutil.copytree(saved, tmp_path/'large')
    (folder/'photos'/'2020').mkdir(parents=True)
    listed, real = [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda *args: (listed.append(str(args[0])), real(*args))[1])
    assert source.opened(str(folder)).size == 32 and not [o for o in listed if 'photos' in o]
    (folder/'model_index.json').unlink()
    listed.clear()
    assert 'model_index.json is missing' in one_line(source.opened, str(folder))
    assert not [o for o in listed if 'photos' in o]

def test_a_source_that_was_moved_is_the_same(went_on, saved, tmp_path):
    "A run knows it by its fingerprint, wherever it lies, and goes on from there"
    there, run = (shutil.copytree(o, tmp_path/k) for k, o in dict(there=saved, run=went_on.folder).items())
    other, before = shutil.copytree(there, tmp_path/'other'), (run/'run.json').read_text()   # the same weights, learned under another noise
    Process('flow', 'velocity', 'uniform').save(other/'process')
    assert '(process)' in one_line(Run, run, settings_of('rooms', 'tiny', n=120, From=str(other), steps=8)) and (run/'run.json').read_text() == before
    r = Run(run, settings_of('rooms', 'tiny', n=120, From=str(there), steps=8))
    r.go(('denoiser', 'pipeline'))
    s = json.loads((run/'run.json').read_text())['settings']
    assert (s['from'], s['steps'], s['start']) == (str(there), 8, went_on.settings['start'])

def test_a_source_that_is_gone_may_be_named_anew(tmp_path, monkeypatch):
    assert '--from' in one_line(source.opened, str(tmp_path/'gone')) and 'name its place' in one_line(source.opened, str(tmp_path/'gone'))

@pytest.mark.skipif(os.name != 'posix', reason='a pipe in a folder')
def test_a_pipe_among_checkpoints_is_not_waited_for(tmp_path):
    (tmp_path/'checkpoints'/'unet').mkdir(parents=True)
    os.mkfifo(tmp_path/'checkpoints'/'unet'/'other.safetensors')
    assert source.begun(tmp_path) == 0

def test_two_sources_give_two_runs(went_on, saved, tmp_path):
    "Nothing is made from one source and called the other's, and one line says so"
    message = one_line(Run, went_on.folder, settings_of('rooms', 'tiny', n=120, From='none', steps=6))
    assert 'from' in message and '--out' in message
    other = shutil.copytree(saved, tmp_path/'small')
    pipe = small()
    with torch.no_grad(): pipe.denoiser.conv_in.weight[0] += 1
    pipe.save_pretrained(other)
    r = Run(tmp_path/'run', {**went_on.settings, 'from': str(other)})
    assert 'has changed' in one_line(lambda: r.source)

def test_a_finished_run_needs_its_source_no_more(went_on, tmp_path, capsys):
    "It is loaded and drawn from though the source is gone."
    folder = shutil.copytree(went_on.folder, tmp_path/'run')
    text = (folder/'run.json').read_text().replace(went_on.settings['from'], str(tmp_path/'gone'))
    (folder/'run.json').write_text(text)
    r = Run(folder, json.loads(text)['settings'])
    r.go(('denoiser', 'pipeline'))
    assert 'nothing to do' in capsys.readouterr().out and same(r.denoiser[0], went_on.denoiser[0])

def test_no_further_steps_are_written_down_where_the_source_is_gone(went_on, tmp_path):
    "A refused call leaves the run as it was"
    folder = shutil.copytree(went_on.folder, tmp_path/'run')
    text = (folder/'run.json').read_text().replace(went_on.settings['from'], str(tmp_path/'gone'))
    (folder/'run.json').write_text(text)
    s = {k: v for k, v in json.loads(text)['settings'].items() if k != 'steps'}
    files = sorted(folder.rglob('*'))
    assert 'gone' in one_line(Run(folder, s, 2).go, ('denoiser', 'pipeline'))
    assert (folder/'run.json').read_text() == text and sorted(o for o in folder.rglob('*') if o.name != '.lock') == [o for o in files if o.name != '.lock']

class Stop(Exception): pass

def test_killed_and_gone_on_it_ends_with_the_same_weights(saved, went_on, tmp_path, monkeypatch):
    "To the bit: from its checkpoint, not from the source."
    from fastai.callback.core import Callback
    class Kill(Callback):
        def after_batch(self):
            if self.learn.step_by_step.k == 4: raise Stop('now')
    start, images = went_on.settings['start'], went_on.images
    ae = went_on.autoencoder
    monkeypatch.setattr('latentdiff.training.Checkpoint.__init__.__defaults__', (0.,))
    latents = make_latents(tmp_path, images, ae, went_on.p)
    more = source.going_on(images, None, start, lambda: small())
    with pytest.raises(Stop): make_denoiser(tmp_path, latents, went_on.p, cbs=Kill(), **more)
    more['build'] = lambda *_: UNet(4, widths=(16, 32), depth=1)   # what it starts from no longer matters
    net, _ = make_denoiser(tmp_path, latents, went_on.p, **more)
    assert same(net, went_on.denoiser[0])

def test_classes_of_the_source(tmp_path):
    "Labels are counted as the source counts them, and the first step has the loss of its weights, not of fresh ones."
    images = open_images('rooms', 32, n=120)
    pipe = small(ClassConditioner(images.classes[::-1] + ['another'], 8))
    pipe.save_pretrained(tmp_path/'small')
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, From=str(tmp_path/'small'), condition='class', steps=1))
    r.go(('denoiser',))
    assert r.images.classes == images.classes[::-1] + ['another'] and not (tmp_path/'run'/'unet').exists()
    assert sorted(r.asked['cond']) == sorted(images.classes[images.labels[i]] for i in images.valid_idxs)
    again = Run(r.folder, r.settings)
    assert again.images.classes == r.images.classes and same(again.denoiser[0], r.denoiser[0])

def test_strange_latents_are_announced_once(tmp_path, capsys):
    "By the run that takes the autoencoder; the latents say it no second time, nor when they are opened again."
    pipe = small()
    pipe.autoencoder.set_scale(pipe.autoencoder.latent_mean, pipe.autoencoder.latent_std/4)
    pipe.save_pretrained(tmp_path/'small')
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, From=str(tmp_path/'small'), steps=1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        r.go(('latents',))
        Run(r.folder, r.settings).latents
        assert capsys.readouterr().out.count('warning: ') == 1 and not [o for o in seen if 'latents have std' in str(o.message)]
        Latents(r.folder/'latents')
    assert [o for o in seen if 'latents have std' in str(o.message)]   # whoever opens them without the run is told

def test_strange_pictures_are_announced(rooms, tmp_path, capsys):
    "A source whose scale is off by 4 finds latents with a spread of 4, and says so once; within a factor of 3 it says nothing."
    for times, warned in ((4., True), (.25, True), (2., False)):
        pipe = small()
        pipe.autoencoder.set_scale(pipe.autoencoder.latent_mean, pipe.autoencoder.latent_std/times)
        take = lambda: source.take_autoencoder(tmp_path/f'{times}', rooms, source.description(pipe), lambda: pipe)
        take()
        assert ('warning' in capsys.readouterr().out) is warned
        assert made(tmp_path/f'{times}'/'autoencoder')['facts']['std'] == pytest.approx([times]*4, rel=.25)
        take()
        assert not capsys.readouterr().out

# --- few pictures ---------------------------------------------------------------------------------------------------

def test_few_pictures_get_a_proposal(saved, rooms, tmp_path, monkeypatch, capsys):
    """The pipeline that keeps most of them, if it keeps enough; where none fits, such an autoencoder alone, unless the run has one; the reason is
    printed; many pictures get none."""
    good = small()
    good.autoencoder.encode = good.autoencoder.decode = lambda x: x
    grey = LatentDiffusionPipeline(KLAutoencoder(1, (8,), 4, 1, 4), small().denoiser, Process(*FLOW), 32)
    sharp = dict(bad=small(), good=good, grey=grey)
    monkeypatch.setattr(source, 'zoo', lambda: sharp)
    monkeypatch.setattr(source, 'opened', lambda name: sharp[name])
    def said(condition=None, **kw): return source.choice(rooms, condition, **kw), capsys.readouterr().out
    found, why = said()
    assert found == {'from': 'good'} and 'goes on from good' in why and '--from none' in why and 'dB' in why
    found, why = said('class')
    assert found == {'from': 'none', 'autoencoder': 'good'} and 'the autoencoder is that of good' in why and 'told class' in why and '--from none' in why
    found, why = said('class', given='taef2')
    assert found == {'from': 'none'} and 'from nothing' in why and 'at random' not in why
    del sharp['good']
    found, why = said()
    assert found == {'from': 'none'} and 'bad gives these back with only' in why and 'at random' in why
    monkeypatch.setattr(source, 'FEW', 120)
    assert said() == ({'from': 'none'}, '')

def test_where_a_choice_is_made():
    "For pictures of one's own, unless an autoencoder or a source is given; the course's data sets start from nothing."
    assert settings_of('rooms', 'tiny')['from'] == settings_of('smallnorb/animals', 'tiny')['from'] == 'none'
    assert settings_of('pics', 'tiny')['from'] is None and settings_of('pics', 'tiny', From='none')['from'] == 'none'
    assert settings_of('pics', 'tiny', autoencoder='taef2')['from'] == 'none'
    assert '--autoencoder' in one_line(settings_of, 'pics', 'tiny', autoencoder='taef2', From='bedrooms64')

def test_a_choice_is_made_once(saved, tmp_path, monkeypatch):
    "It is written into the settings, and the same command goes on with it without choosing again."
    (tmp_path/'pics').mkdir()
    for i in range(120): Image.new('RGB', (32, 32), (i, 2*i, 99)).save(tmp_path/'pics'/f'{i}.png')
    options = dict(data=str(tmp_path/'pics'), preset='tiny', steps=1)
    monkeypatch.setattr(source, 'choice', lambda *_: {'from': str(saved)})
    r = Run(tmp_path/'run', settings_of(**options))
    r.begin()
    r.fix_steps()
    r.folder.mkdir()
    r.write()
    monkeypatch.delattr(source, 'choice')
    again = Run(r.folder, settings_of(**options))
    assert again.settings == r.settings and again.settings['from'] == str(saved) and again.p == r.p and r.p.widths == (16, 32)
    assert 'from' in one_line(Run, r.folder, settings_of(**options, From='none')) and 'chosen' not in r.options()

@pytest.mark.parametrize('data', ['rooms', '.'])
@pytest.mark.parametrize('given', [dict(autoencoder='taef2'), dict(From='bedrooms64')], ids=['autoencoder', 'from'])
def test_what_was_given_and_is_left_away_later_is_refused(data, given, tmp_path):
    "On pictures of one's own as on the course's: only what the run has chosen by itself may be left open again, and what is the default"
    for name, options in (('with', given), ('without', dict(From='none'))):
        r = Run(tmp_path/name, settings_of(data, 'tiny', **options))
        r.folder.mkdir()
        r.write()
    (k, v), = given.items()
    assert Run(tmp_path/'with', settings_of(data, 'tiny', **given)).settings[k.lower()] == v
    assert f'{k.lower()} {v}, not' in one_line(Run, tmp_path/'with', settings_of(data, 'tiny'))
    assert Run(tmp_path/'without', settings_of(data, 'tiny')).settings['from'] == 'none'

def test_an_autoencoder_of_the_package_is_chosen_once(tmp_path, monkeypatch, capsys):
    "For few pictures with classes: it is found by its name, measured on these, announced and written down; the same command goes on with it."
    for name, grey in (('a', 50), ('b', 150)):
        (tmp_path/'pics'/name).mkdir(parents=True)
        for i in range(60): Image.new('RGB', (32, 32), (grey + i, grey, 99)).save(tmp_path/'pics'/name/f'{i}.png')
    options = dict(data=str(tmp_path/'pics'), preset='tiny', condition='class', steps=1)
    monkeypatch.setattr(Run, 'step_times', lambda self: (0., 0.))
    monkeypatch.setattr(source, 'zoo', lambda: {'bedrooms64': zoo()['bedrooms64']})
    r = Run(tmp_path/'run', settings_of(**options))
    r.go(('autoencoder',))
    said, name = capsys.readouterr().out, r.settings['autoencoder']
    assert r.settings['from'] == 'none' and name == 'bedrooms64' and f'that of {name}' in said and '120 images at 32 px' in said
    its = LatentDiffusionPipeline.from_pretrained(name, 'cpu').autoencoder
    assert same(r.autoencoder, its.fit_scale(some_pixels(r.images, 'train', 0)))
    monkeypatch.delattr(source, 'choice')
    again = Run(r.folder, settings_of(**options))
    assert again.settings == r.settings and again.p == r.p
    assert beside_file({}, r.folder/'config.toml', {k: str for k in r.options()} | dict(size=int, seed=int, n=int, steps=int))['autoencoder'] == name
    assert 'autoencoder' in one_line(Run, r.folder, settings_of(**options, From='none'))

def test_size_and_condition_are_those_of_the_source():
    assert source.as_there({'from': 'fashion_mnist32'}) == {'from': 'fashion_mnist32', 'size': 32, 'condition': 'class'}
    given = {'from': 'fashion_mnist32', 'size': 64, 'condition': 'none'}
    assert source.as_there(given) == given and source.as_there({'size': 8}) == {'size': 8}

# --- settings from a file -------------------------------------------------------------------------------------------

KINDS = dict(data=str, minutes=float, steps=int, ae_steps=int)

@pytest.mark.parametrize('value', ['plain', 'a "quoted" \\ name', 'tab\tand\nline', 'café 😀', '\x1f', 3, -1, 2.5, 1e-9])
def test_toml_comes_back(tmp_path, value):
    (tmp_path/'a.toml').write_text(to_toml(dict(name=value, last=1)), encoding='utf-8')
    assert tomllib.loads((tmp_path/'a.toml').read_text(encoding='utf-8')) == dict(name=value, last=1)

@pytest.mark.parametrize('text,words', [('smell = 1', 'smell'), ('steps = "9"', 'whole number'), ('steps = 9.5', 'whole number'), ('data = 3', 'quotes'),
                                        ('steps = true', 'whole number'), ('minutes = "1"', 'a number'), ('[table]\na = 1', 'table'), ('steps =', 'TOML'),
                                        ('data = 2026-01-01', 'quotes')])
def test_a_file_that_is_wrong_is_one_line(tmp_path, text, words):
    (tmp_path/'a.toml').write_text(text)
    assert words in one_line(read_toml, tmp_path/'a.toml', KINDS)
    assert 'b.toml' in one_line(read_toml, tmp_path/'b.toml', KINDS)

def test_what_is_given_beats_the_file(tmp_path):
    "An option its own line; minutes what the file says of steps, and the other way round."
    f = tmp_path/'a.toml'
    f.write_text(to_toml(dict(data='a', steps=9, ae_steps=5)))
    assert beside_file(dict(data='b'), f, KINDS) == dict(data='b', steps=9, ae_steps=5)
    assert beside_file(dict(minutes=1), f, KINDS) == dict(data='a', minutes=1)
    f.write_text(to_toml(dict(data='a', minutes=2)))
    assert beside_file(dict(steps=3), f, KINDS) == dict(data='a', steps=3)
    assert beside_file(dict(data='b'), None, KINDS) == dict(data='b')
    assert 'minutes or steps' in one_line(settings_of, 'rooms', 'tiny', minutes=1, steps=1)

def test_the_file_of_a_run_repeats_it(went_on, tmp_path):
    "Read again, it gives the same settings; that these give the same weights is tested in test_cli."
    f = went_on.folder/'config.toml'
    given = beside_file({}, f, {k: type(v) for k, v in tomllib.loads(f.read_text()).items()})
    r = Run(tmp_path/'run', settings_of(**{'From' if k == 'from' else k: v for k, v in given.items()}))
    r.begin()
    r.fix_steps()
    assert r.settings == went_on.settings and r.p == went_on.p

def test_a_file_that_was_cut_is_written_again(went_on):
    "As a missing one; what its owner has changed in it stays"
    f, given = went_on.folder/'config.toml', settings_of('rooms', 'tiny', n=120, From=went_on.settings['from'], steps=6)
    good = f.read_text()
    for bad in ('', good[:len(good)//2], good[:good.index('\n') + 1], '\0'*20):
        f.write_text(bad)
        Run(went_on.folder, given).go(())
        assert f.read_text() == good, bad
    f.write_text('# mine\n' + good)
    Run(went_on.folder, given).go(())
    assert f.read_text() == '# mine\n' + good
    f.write_text(good)

def test_what_was_given_is_named_first(went_on):
    "A preset brings other settings along, which nobody gave"
    base = dict(data='rooms', preset='tiny', condition='none', out=str(went_on.folder))
    for given, says in ((dict(preset='cpu'), 'preset tiny, not cpu'), (dict(data='mnist', preset=None), 'data rooms, not mnist'), (dict(data='mnist', seed=1, preset=None), 'seed 0, not 1')):
        with pytest.raises(SystemExit, match=f'made with {says}'): run_cli(**base | given)

def test_a_wrong_file_for_the_command(tmp_path):
    (tmp_path/'a.toml').write_text('stepps = 3')
    with pytest.raises(SystemExit, match='latentdiff-run: .*stepps.*ae_steps'): run_cli(config=str(tmp_path/'a.toml'))
    (tmp_path/'a.toml').write_text('out = "runs"')
    with pytest.raises(SystemExit, match='out'): run_cli(config=str(tmp_path/'a.toml'))

def test_steps_that_are_given_are_kept(went_on):
    "Fewer than are trained are refused, more may still be asked for"
    assert 'a denoiser of 6 steps: give --steps 6 or more' in one_line(Run, went_on.folder, {**went_on.settings, 'steps': 5})
    assert [Run(went_on.folder, {**went_on.settings, 'steps': o}).settings['steps'] for o in (None, 7)] == [6, 7]

# --- Learners -------------------------------------------------------------------------------------------------------

def learners():
    "Of a denoiser and of an autoencoder, untrained, with what they are given to validate on"
    torch.manual_seed(0)
    z, x = torch.randn(24, 4, 8, 8), torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    net, ae = shaken(UNet(4, widths=(16, 32), depth=1)), shaken(KLAutoencoder(3, (8,), 4, 1, 4))
    yield denoiser_learner(net, Process(*FLOW), z, z[:8], bs=8), z[:8]
    yield ae_learner(ae, x, x[:8], bs=8), from_uint8(x[:8])

def shown():
    "The uint8 pictures (n,3,h,w) of the last figure, which is closed"
    fig = plt.gcf()
    px = [torch.as_tensor(np.array(ax.images[0].get_array())) for ax in fig.axes if ax.images]
    plt.close(fig)
    return torch.stack(px).permute(0, 3, 1, 2)

def test_learners_show_what_they_see():
    "Of images themselves, of latents three channels; then what went in above what comes out, which is what the network answers."
    for (learn, x), picture in zip(learners(), (lambda z: z[:, :3]/3, lambda x: x)):
        learn.dls.show_batch()
        first = learn.dls.train.one_batch()[0]
        assert torch.equal(shown(), to_uint8(picture(first)))
        with learn.no_bar(): learn.show_results(shuffle=False)
        rows = shown()
        assert torch.equal(rows[:8], to_uint8(picture(x))) and len(rows) == 16
        if picture(x) is not x: continue
        with torch.no_grad(): out = learn.model.eval()(x)[0]
        assert (rows[8:].int() - to_uint8(out).int()).abs().max() <= 1

def test_lr_find_leaves_the_weights_alone(tmp_path, monkeypatch):
    "It tries rising rates, proposes one of them, and what it writes meanwhile is gone."
    monkeypatch.chdir(tmp_path)
    for learn, _ in learners():
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with learn.no_bar(): found = learn.lr_find(num_it=20, show_plot=False)
        assert 1e-7 <= found.valley <= 10 and all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    assert not [f for f in tmp_path.rglob('*') if f.is_file()]

@pytest.mark.parametrize('name,said', [('a b', "'a b/config.toml' --out 'a b'"), ('-x', './-x/config.toml --out ./-x'), ('~root', "'./~root/config.toml' --out './~root'"), ('/a;b', "'/a;b/config.toml' --out '/a;b'")])
def test_a_command_that_is_advised_names_that_folder(name, said):
    "Pasted into a shell, it is neither an option nor somebody's home"
    assert repeated('run', name) == f'latentdiff-run --config {said}'

def test_tensorboard_is_told(tmp_path, monkeypatch):
    "Losses and rates are in its files; where it is missing, one line says so."
    monkeypatch.setattr('latentdiff.report.find_spec', lambda name: None)
    assert 'pip install' in one_line(trackers, 'tensorboard', tmp_path) and 'tensorboard' in one_line(trackers, 'wandb', tmp_path)
    monkeypatch.undo()
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn, _ = next(learners())
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'run.json').write_text('{}')
    (tmp_path/'run'/'tensorboard').symlink_to(tmp_path)
    assert 'is a link' in one_line(trackers, 'tensorboard', tmp_path/'run'/'tensorboard')
    with learn.no_bar(), learn.no_logging(): fit_steps(learn, 12, lr=1e-3, rounds=2, cbs=trackers('tensorboard', tmp_path/'tb'))
    seen = EventAccumulator(str(tmp_path/'tb')).Reload()
    assert [o.value for o in seen.Scalars('valid_loss')] == pytest.approx([o[2] for o in learn.history['rows']], rel=1e-5)
    assert [o.step for o in seen.Scalars('valid_loss')] == [6, 12] and [o.step for o in seen.Scalars('train_loss')] == [*range(1, 13)]
    assert [o.value for o in seen.Scalars('lr')] == pytest.approx([1e-3*rate(k, 12) for k in range(12)])

def test_the_device_of_a_mac(monkeypatch):
    "It is taken where there is no CUDA; what is float64 goes to the CPU first, because a Mac's GPU has none."
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: True)
    assert default_device().type == 'mps'
    x = torch.randn(3)
    class OnAMac(torch.Tensor):
        "A tensor that says it lies on a Mac's GPU"
        device = property(lambda self: SimpleNamespace(type='mps'))
        def cpu(self): return x
        def double(self): pytest.fail('float64 on a GPU that has none')
    assert torch.equal(as_double(torch.zeros(3).as_subclass(OnAMac)), x.double())

class NoDouble(TorchDispatchMode):
    "No float64 comes to lie on `meta`, which stands for the GPU of a Mac"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            assert not (torch.is_tensor(o) and o.device.type == 'meta' and o.dtype == torch.float64), f
        return out

def test_nothing_is_float64_on_the_device():
    "Noise, both networks forward and back, the average and a step of the optimizer; the check itself catches a float64."
    with torch.device('meta'): net, ae, z, x = UNet(4, widths=(16, 32), depth=1), KLAutoencoder(3, (8,), 4, 1, 4), torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32)
    with NoDouble():
        process = Process(*FLOW)
        x_t, t, target = process.noisify(z)
        F.mse_loss(net(process.scale_input(x_t, t), process.time_input(t)), target).backward()
        AELoss()(ae(x), x).backward()
        ae.eval().decode(ae.encode(x))
        shadow = [p.detach().clone() for p in net.parameters()]
        torch._foreach_lerp_(shadow, [p.data for p in net.parameters()], .1)
        for p in net.parameters(): p.data -= .01*orthogonalise(p.grad.flatten(1)[None])[0].view_as(p) if p.ndim > 2 else p.grad
        with pytest.raises(AssertionError): z.double()

# --- the report -----------------------------------------------------------------------------------------------------

def blobs(n, distance, seed):
    "Two Gaussian clouds in 6 dimensions, `distance` apart, and which is which"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.randn(n, 6, generator=g) + distance*y[:, None]*torch.eye(6)[0], y

def test_a_judge_is_as_good_as_can_be():
    "Two clouds at distance d can be told apart in Phi(d/2) of the cases (Bayes), no more; unlabelled ones are left out."
    (x, y), (new, truth) = blobs(2000, 2., 0), blobs(4000, 2., 1)
    best = .5*(1 + math.erf(1/math.sqrt(2)))
    right = (class_judge(x, y)(new) == truth).float().mean().item()
    assert abs(right - best) < .02
    spoilt = torch.cat([x, 100 + x]), torch.cat([y, torch.full_like(y, -1)])
    assert abs((class_judge(*spoilt)(new) == truth).float().mean().item() - best) < .02

def test_guidance_against_what_is_asked():
    "Samples of which a known share shows what was asked for, by a judge that errs never; their KID is that of the features."
    x, y = blobs(400, 40., 0)
    asked, wrong = [0]*50 + [1]*50, {1.: 50, 1.5: 30, 2.: 10, 3.: 0}
    def draw(g):
        shown = torch.tensor(asked)
        shown[:wrong[g]] = 1 - shown[:wrong[g]]
        return torch.randn(100, 6, generator=torch.Generator().manual_seed(2)) + 40*shown[:, None]*torch.eye(6)[0]
    d = by_guidance(draw, None, x[:200], y[:200], (x[200:], y[200:]), asked)
    assert d['right'] == 1 and d['n'] == 100 and d['n_real'] == 200
    assert [o[3] for o in d['rows']] == pytest.approx([.5, .7, .9, 1.]) and [o[0] for o in d['rows']] == [1, 1.5, 2, 3]
    k = [o[1] for o in d['rows']]
    assert k[-1] == min(k) and k[0] == max(k)
    assert by_guidance(draw, None, x[:200])['rows'][0][3] is None

def hearing(n, seed=0):
    "n captions; what hears them: a token or two each, in 8 dimensions, NaN where the mask says no; and the means (n,8)"
    table, mask = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(seed)), torch.ones(n, 2, dtype=torch.bool)
    mask[::2, 1] = False
    means = torch.where(mask[..., None], table, 0).sum(1)/mask.sum(1, True)
    table[~mask] = math.nan
    rows = lambda captions: [int(o.split()[1]) for o in captions]
    return [f'picture {i}' for i in range(n)], lambda o: (table[rows(o)], mask[rows(o)]), means

@pytest.mark.parametrize('k', [2, 10])
def test_a_judge_of_captions_finds_what_is_there_and_no_more(k):
    "Always, where features are a linear function of the embeddings and an offset; where they have nothing to do with them, by luck."
    captions, listen, means = hearing(1200)
    g = torch.Generator().manual_seed(1)
    for f, right, off in ((means@torch.randn(8, 20, generator=g) + 5, 1, 0), (torch.randn(1200, 20, generator=g), 1/k, 3*(1/k*(1 - 1/k)/1000)**.5)):
        see = caption_judge(f[:200], captions[:200], listen, captions[200:], k)
        assert abs(see(f[200:], captions[200:]).double().mean().item() - right) <= off

def test_a_judge_of_captions_is_fair():
    "It is tried with the same others each time; what all captions share does not count; of what sounds alike nothing is the nearest; one caption is no choice, nor are blank ones."
    captions, listen, means = hearing(80)
    noisy = means + torch.randn(80, 8, generator=torch.Generator().manual_seed(1))
    see, far = (caption_judge(noisy[:40], captions[:40], o, captions[40:]) for o in (listen, lambda o: (listen(o)[0] + 10, listen(o)[1])))
    first, again, moved = (o(noisy[40:], captions[40:]) for o in (see, see, far))
    assert torch.equal(first, again) and torch.equal(first, moved) and 0 < first.float().mean() < 1
    assert not caption_judge(means[:40], captions[:40], lambda o: listen(['picture 0']*len(o)), captions[40:])(means[40:], captions[40:]).any()
    score = lambda held, known: by_guidance(lambda g: means[:40], None, means[40:], held, (means[:40], known), held, listen)['right']
    assert score(captions[40:], captions[:40]) == 1 and score([captions[0]]*40, captions[:40]) is score(captions[40:], [captions[0]]*40) is score([' ']*40, captions[:40]) is None

def test_guidance_against_the_caption_asked_for():
    "Samples of which a known share shows it, among three captions that pictures share; those with none are left out; the judge comes first in what is said."
    captions, listen, means = hearing(3)
    said, asked, wrong = [captions[i % 3] for i in range(300)], [i % 3 for i in range(90)], {1.: 60, 1.5: 30, 2.: 9, 3.: 0}
    f = means[[i % 3 for i in range(300)]] + .01*torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    def draw(g): return f[[(k + (i < wrong[g])) % 3 for i, k in enumerate(asked)]]
    d = by_guidance(draw, None, f[:120], said[:90] + ['', '  ']*15, (f[120:], said[120:]), [captions[k] for k in asked], listen)
    assert d['right'] == 1 and d['n_real'] == 90 and d['luck'] == pytest.approx(1/3) and [o[3] for o in d['rows']] == pytest.approx([1/3, 2/3, .9, 1])
    (_, _, text, _), = guidance_figure(d)
    assert text.startswith('A judge') and 'out of 3 for 100% of 90 held-out ones (luck for 33%)' in text and 'caption that was asked for' in text
    assert guidance_curves(d).width > 400 and guidance_figure({**d, 'right': None})[0][2].startswith('KID')
    old = {k: d[k] for k in ('right', 'n_real', 'rows', 'n')}   # as runs with classes have noted it before
    assert 'the class of 100% of 90 held-out ones. Left' in guidance_figure(old)[0][2]

def test_few_pictures_are_a_caution():
    "With the error of this very score; where there are many of both, none."
    m = dict(n_real=18, n_fake=500, kid_se=.123)
    for w in ('18 real', '500 samples', '0.25', 'has no error'): assert w in caution(m)['caution'], w
    assert caution({**m, 'n_real': 500}) == {}

SCORED = dict(n_fake=600, n_real=600, kid=1., kid_se=.1, kid_floor=0., kid_floor_se=.1, fid=1., fid_floor=1., psnr=20., ssim=.5, n_reconstructed=3, seconds=dict(a=1.), device='cpu', threads=2, extractor='x',
              told=dict(cond=[0], guidance=2.), guidance=dict(of='class', right=.9, luck=.1, n=9, n_real=9))

@pytest.mark.parametrize('bad', [*[{k: o} for k in ('extractor', 'device', 'seconds') for o in (None, 3)], *[dict(seconds=dict(a=o)) for o in ('x', None, -1, math.nan)], dict(told='x'), dict(told=dict(guidance='x')), dict(told=dict(cond=[0])), dict(guidance=3),
    *[dict(guidance=SCORED['guidance'] | o) for o in (dict(right='x'), dict(luck='x'), dict(right=math.nan), dict(n='x'), dict(n_real=None))]], ids=str)
def test_figures_that_no_run_notes_are_one_line(bad, tmp_path):
    "In a note whose seal fits; the page is not begun"
    assert headline(SCORED) and guidance_figure(SCORED['guidance'])
    for f in (lambda m: headline(m), lambda m: page_of(tmp_path, dict(data='x', size=32, preset='tiny', seed=0), m)): assert re.search('seconds|extractor|device|told|guidance|right|luck|n is|n_real', one_line(f, SCORED | bad))

def test_a_page_is_of_its_scores_and_names_where_the_data_lies(tmp_path):
    "What an older run has noted does not say where: it stays"
    page, of = tmp_path/'report.html', dict(made_from='a', data='/b')
    assert not is_of(page, of)
    page.write_text('x')
    for noted, right in ((of, True), (of | dict(kid=1), True), (dict(made_from='a'), True), (dict(made_from='a', data='/c'), False), (dict(made_from='c', data='/b'), False), ({}, False)):
        (tmp_path/'metrics.json').write_text(json.dumps(sealed(noted)))
        assert is_of(page, of) is right

@pytest.mark.parametrize('fake,real,floor,high', [(600, 600, (300, 300), True), (600, 600, (600, 600), False), (600, 700, (500, 700), True), (600, 5000, (2500, 2500), False)])
def test_a_floor_of_fewer_pictures_than_the_score_is_a_caution(fake, real, floor, high):
    "FID rises about as 1/n + 1/m, so from halves of few real pictures comes more than real ones would score"
    said = report.cautions(dict(n_fake=fake, n_real=real, kid_se=.1, n_floor=floor))
    assert list(said) == ['fid_floor']*high and (not high or f'of {floor[0]} real pictures against {floor[1]}, not {fake} against {real}' in said['fid_floor'])

def test_more_classes_than_rows_are_said():
    m = dict(sampler='ddim', steps=4, told=dict(cond=[0, 1], guidance=2.))
    assert report.samples_figure(m)[2] == 'The first samples, a row a class, in order, not chosen: ddim, 4 steps, guidance 2.'
    for n, said in ((16, False), (17, True)): assert ('a row a class (the first 16), in order' in report.samples_figure(m | dict(told=dict(cond=[*range(n)], guidance=2.)))[2]) is said
    named = m | dict(condition='class', told=dict(cond=['a', 'b']*50, guidance=2.))
    assert report.samples_figure(named) == report.samples_figure(m) and report.samples_figure(named | dict(condition='text'))[4] == ['a', 'b']*32
