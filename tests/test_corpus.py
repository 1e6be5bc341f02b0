"""Bad input at every door: what a run folder holds, weights, pickles, and what is said to the five commands. Each is one line, or
made again with a word. `python tests/test_corpus.py` counts the inputs, and those that end otherwise."""
import contextlib, gzip, io, json, os, pickle, shutil, struct, sys, tempfile, warnings
from functools import cache, partial
from pathlib import Path
import numpy as np, pytest, torch
from diffusers import UNet2DModel
from fastcore.script import anno_parser
from safetensors.torch import load as load_bytes, load_file, save, save_file
from latentdiff import autoencoder as A, commands as M, core as C, data as D, files as F, noisify as N, pipeline as P, report, sampling, training, unet
from latentdiff.core import UserError
from latentdiff.labs_data import NorbImages, car_names, read_norb
from test_cli import cli, run
from test_trust import DEEP, PNG, Planted, npz_of, tar_of, zip_of

nan = float('nan')

def command(verb, *args):
    "(exit code, stderr) of latentdiff-`verb`, in this process"
    f, err = getattr(M, f'{verb}_cli'), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            given = vars(anno_parser(f, prog=f'latentdiff-{verb}').parse_args([str(a) for a in args]))
            f.__wrapped__(**{k: v for k, v in given.items() if k not in ('pdb', 'xtra')})
        except SystemExit as e: return (e.code, err.getvalue()) if isinstance(e.code, int) else (1, f'{e.code}\n')
    return 0, err.getvalue()

class Started(Exception):
    "Work would begin now"

def begin(*args, **kw): raise Started

def answer(f, *args):
    "'one line', 'started', or in words what else happened"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            f(*args)
    except UserError as e: return 'one line' if str(e) and '\n' not in str(e) and len(str(e)) < 1500 else f'{len(str(e))} letters'
    except Started: return 'started'
    except Exception as e: return f'{type(e).__name__}: {e}'[:200]
    return 'no word'

# --- what a run folder holds

def report_of(folder):
    "What latentdiff-run says of a finished run whose page is lost"
    (folder/'report.html').unlink(missing_ok=True)
    M.Run(folder, json.loads((folder/'run.json').read_text())['settings']).go()

def train(folder):
    rc, said = command('train', folder)
    if rc: raise UserError(said)

def encode_again(folder):
    "The latents, from where an earlier call says that it stopped"
    work = folder/'.latents.making'
    N._encode_rest(A.KLAutoencoder(3, (8,), 4, 1, 4).eval(), D.open_images('rooms', 32, n=8), work, (8, 4, 8, 8), dict(mirrored=False), 4)

def by_config(folder):
    rc, said = command('run', '--config', folder/'config.toml', '--out', folder)
    if rc: raise UserError(said)

def more(folder):
    rc, said = command('train', folder, '--more', 5)
    if rc: raise UserError(said)

def evaluated(folder):
    "What latentdiff-run says if the scores have to be made"
    (folder/'scores').rename(folder/'.scores')
    try: report_of(folder)
    finally: (folder/'.scores').rename(folder/'scores')

def card(folder): P.model_card('us/rooms', 'drawn by a program', folder)

load = lambda folder: P.LatentDiffusionPipeline.from_pretrained(folder, 'cpu')
TEXTS = '', '[]', 'null', '3', '{', DEEP, '{"a":' + DEEP + '}', '\0', '{"_class_name": "' + 'x'*10**6 + '"}', '{"_class_name": [[]]}', b'\xff\xfe{}', None
VALUES = None, -1, 'x', [], nan, 2**63, [[[[]]]], 'gone'
# who reads it, which of its names are looked at, what else than one line is right: it is cheap, and made again
HOLDS = {'run.json': (train, ('settings', 'settings.data', 'settings.preset', 'settings.size', 'settings.seed', 'settings.start'), [('settings.start', None), ('settings.start', 'gone'), ('settings.seed', -1), ('settings.seed', 2**63)]),
    'latents/manifest.json': (train, ('shape', 'names', 'labels', 'valid', 'mirrored', 'captions', 'classes'), ()),
    'latents/made.json': (train, ('fingerprint', 'facts', 'parents', 'seconds'), ()),
    'unet/made.json': (evaluated, ('facts.rows', 'facts.kid'), ()), 'scores/made.json': (report_of, ('facts', 'facts.kid', 'facts.n_fake', 'parents', 'settings'), ()),
    'autoencoder/made.json': (report_of, ('facts', 'facts.psnr', 'facts.n', 'settings', 'fingerprint', 'facts.history.rows'), ()),
    'metrics.json': (card, ('psnr', 'kid', 'n_real', 'sampler'), ()),
    'model_index.json': (load, ('_class_name', 'size', 'autoencoder', 'unet', 'scheduler'), [('scheduler', 'gone')]), 'unet/config.json': (load, ('_class_name', 'block_out_channels', 'in_channels', 'layers_per_block', 'norm_num_groups'), [('norm_num_groups', 'gone')]),
    'autoencoder/config.json': (load, ('_class_name', 'widths', 'latent_std', 'patch', 'depth', 'latent_channels'), [('depth', 'gone'), ('latent_channels', 'gone')]),
    'process/config.json': (load, ('schedule', 'target', 'steps', 'rho'), ()),
    'scheduler/scheduler_config.json': (load, ('_class_name', 'num_train_timesteps', 'shift'), [(k, 'gone') for k in ('num_train_timesteps', 'shift')]),
    '.latents.making/done.json': (encode_again, (), ()), 'config.toml': (by_config, (), ())}

def changed(text, path, value):
    d = json.loads(text)
    *way, last = path.split('.')
    o = d
    for k in way: o = o[k]
    if value == 'gone': o.pop(last, None)
    else: o[last] = value
    return json.dumps(d)

def stands(file, path, value):
    "Is the value one that the file may have, so that nothing has to be said?"
    return any((path, repr(value)) == (k, repr(v)) for k, v in HOLDS[file][2])

JSONS = [(file, None, text) for file in HOLDS for text in TEXTS if not (text == '' and file == 'config.toml' or text is None and file in ('run.json', '.latents.making/done.json', 'latents/made.json', 'unet/made.json', 'autoencoder/made.json', 'metrics.json'))]
JSONS += [(file, path, v) for file, (_, paths, _) in HOLDS.items() for path in paths for v in VALUES if not stands(file, path, v)]

def spoil(folder, file, path, value):
    "Write the bad file, and return what undoes it"
    f = folder/file
    f.parent.mkdir(exist_ok=True)
    good = f.read_bytes() if f.exists() else b'{"done": 4}'
    text = changed(good, path, value) if path else value
    f.unlink(missing_ok=True)
    if text is not None: f.write_bytes(text if isinstance(text, bytes) else text.encode())
    return lambda: f.write_bytes(good)

def answer_to(folder, file, path, value):
    undo = spoil(folder, file, path, value)
    try: return answer(HOLDS[file][0], folder)
    finally: undo()

def nothing_long(patch):
    "What would take long begins, and no more"
    for o, k in ((A, 'fit_steps'), (unet, 'fit_steps'), (M.Run, 'draw'), (report, 'save_png'), (M.Run, 'write'), (P.LatentDiffusionPipeline, 'pixels')): patch.setattr(o, k, begin)
    patch.setattr(training, 'step_time', lambda learn: .1)
    patch.setattr(report, 'report', lambda folder, settings, m: str(report.headline(m)) + begin())
    patch.setattr(P, 'expectation', lambda pipe, n, steps, sampler, bs, **told: begin(sampling._sampler_of(sampler), pipe.listening(bs, bs, **told)))
    patch.setattr(M.Run, 'judge', property(lambda self: type('Judge', (), dict(name=json.loads((self.folder/'metrics.json').read_text())['extractor']))()))


@pytest.fixture(scope='module')
def folder(run, tmp_path_factory): return shutil.copytree(run.folder, tmp_path_factory.mktemp('corpus')/'run')

@pytest.fixture
def short(monkeypatch): nothing_long(monkeypatch)

AGAIN = {'scores/made.json', 'unet/made.json', 'samples/made.json'}     # what hangs on them is made again, with a word

@pytest.mark.parametrize('file', HOLDS)
def test_what_a_run_folder_holds(file, folder, short):
    "Wrong type, missing, nested 100,000 deep, huge: one line each"
    said = {(path, repr(v)[:30]): answer_to(folder, *o) for o in JSONS for f, path, v in [o] if f == file}
    again = lambda k, v: v == 'started' and file in AGAIN or v == 'no word' and file.endswith('done.json') and '_class_name' in k[1]   # it says nothing of rows
    assert {k: v for k, v in said.items() if v != 'one line' and not again(k, v)} == {}

def resealed(text, path, value):
    "The same with a seal that fits"
    d = json.loads(changed(text, path, value))
    del d['seal']
    return json.dumps(C.sealed(d))

def history(folder, file, path, value):
    "The answer to a note that is whole, but says this"
    f = folder/file
    good = f.read_bytes()
    f.write_text(resealed(good, path, value))
    try: return answer(report.history_of, f.parent)
    finally: f.write_bytes(good)

HISTORY = [('autoencoder/made.json', f'facts.history{o}') for o in ('', '.loss', '.rows', '.step')] + [('unet/made.json', f'facts{o}') for o in ('', '.loss', '.rows', '.step', '.kid')]

def test_a_history_that_is_none(folder):
    "What cannot be drawn is one line; an autoencoder that was not trained here has none, and there may be no curve of KID"
    fine = ('facts.history', 'None'), ('facts.kid', '[]'), ('facts.kid', "'gone'")
    odd = VALUES + ([[1, 2]], [['a', 'b', 'c']], [[1, nan, nan]])
    said = {(file, path, repr(v)[:30]): history(folder, file, path, v) for file, path in HISTORY for v in odd}
    assert {k: v for k, v in said.items() if v != ('no word' if k[1:] in fine else 'one line')} == {}

def test_one_wrong_digit_is_noticed(folder, short):
    "A note that is sound in every way, but not what was written"
    for file, path, by in (('autoencoder/made.json', 'facts.psnr', 1e-9), ('scores/made.json', 'facts.kid', 1e-9), ('metrics.json', 'kid', 1e-9), ('latents/manifest.json', 'shape', [0]), ('samples/made.json', 'seconds', .1)):
        value = json.loads((folder/file).read_text())
        for k in path.split('.'): value = value[k]
        undo = spoil(folder, file, path, value + by)
        said = answer(HOLDS[file][0] if file in HOLDS else report_of, folder)
        undo()
        assert said == 'one line', file
    assert answer(evaluated, folder) == answer(report_of, folder) == 'started' and answer(card, folder) == answer(load, folder) == 'no word'

@pytest.mark.parametrize('value', VALUES[:-1] + ([],), ids=lambda o: repr(o)[:20])
def test_how_long_a_denoiser_was_trained(value, folder, short):
    "--more adds to what made.json says, which may come from elsewhere"
    f = folder/'unet'/'made.json'
    good = f.read_bytes()
    for path in ('settings', 'settings.steps', *['parents']*(not isinstance(value, dict))):
        f.write_text(resealed(good, path, value))
        try: assert answer(more, folder) == 'one line'
        finally: f.write_bytes(good)

# --- what a pipeline's index names

NAMED = [('unet', ['os', 'system']), ('unet', ['transformers', 'X']), ('unet', ['diffusers', 'UNet2DConditionModel']), ('unet', ['diffusers', 'AutoencoderKL']), ('unet', ['latentdiff.commands', 'Run']), ('unet', ['latentdiff', 'UNet2DModel']),
    ('unet', ['diffusers']), ('unet', 'diffusers.UNet2DModel'), ('unet', [['os'], 'system']), ('scheduler', ['subprocess', 'Popen']), ('scheduler', ['diffusers', 'VQDiffusionScheduler']), ('scheduler', ['diffusers', 'DiffusionPipeline']),
    ('text_encoder', ['transformers', 'CLIPTextModel']), ('safety', ['diffusers', 'UNet2DModel']), ('extra', ['latentdiff.autoencoder', 'KLAutoencoder']), ('extra', [['a']]), ('extra', {'os': 'system'}),
    ('_class_name', 'StableDiffusionPipeline'), ('_class_name', 'os.system'), ('_class_name', ['mine', 'Pipeline'])]
OURS = [('autoencoder', ['latentdiff.autoencoder', 'Adversary']), ('autoencoder', ['mine', 'KLAutoencoder']), ('denoiser', ['latentdiff.conditioning', 'CrossAttention']), ('denoiser', ['__main__', 'Conditioned'])]

@pytest.mark.parametrize('ours', [True, False])
def test_an_index_names_what_is_listed_and_nothing_else(ours, folder, tmp_path, monkeypatch):
    "One line that has the name in it, before anything is imported or opened; of ours, and of diffusers'"
    good = json.loads((folder/'model_index.json').read_text()) if ours else dict(_class_name='DDPMPipeline', unet=['diffusers', 'UNet2DModel'], scheduler=['diffusers', 'DDPMScheduler'])
    for o in ('load_part', 'load_scheduler', 'open_autoencoder', 'load_component', 'our_parts', 'their_parts'): monkeypatch.setattr(P, o, begin)
    before, index = {*sys.modules}, tmp_path/'model_index.json'
    for k, v in NAMED + OURS*ours:
        index.write_text(json.dumps({**good, k: v}))
        with pytest.raises(UserError) as e: load(tmp_path)
        name = v[1] if P.names_class(v) else v[0] if isinstance(v, list) else str(v)
        assert str(name) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 500, (k, v, str(e.value))
    assert {*sys.modules} == before
    for d in [good, {**good, 'safety_checker': [None, None]}, *(json.loads((o/'model_index.json').read_text()) for o in P.zoo().values())]:
        index.write_text(json.dumps(d))
        assert answer(load, tmp_path) == 'started'

THEIRS = dict(in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, sample_size=8, down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
SPOILT = [(k, v) for k, values in dict(in_channels=(None, 'x', [], 0, -1, 1.5, 10**9), out_channels=(None, 'x', [], -1), block_out_channels=(None, [], 5, 'ab', [8], [0, 16], [8, 'x'], [8, None]), layers_per_block=(None, 'x', [], -1, [1]), norm_num_groups=(None, 'x', 0, 7, []),
    down_block_types=(None, 5, 'ab', [], ['X', 'Y'], [None, None], ['os.system', 'DownBlock2D']), up_block_types=(None, [], ['X', 'Y']), act_fn=(None, 5, 'evil', []), attention_head_dim=('x', [], {}, -1), time_embedding_type=('x', [], 5), num_class_embeds=('x', [], 2), mid_block_scale_factor=('x', [], 0)).items() for v in values]

def test_a_config_that_diffusers_cannot_build_is_one_line(tmp_path):
    "Its constructors raise what they like: TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError"
    torch.manual_seed(0)
    UNet2DModel(**THEIRS).save_pretrained(tmp_path)
    f = tmp_path/'config.json'
    good = json.loads(f.read_text())
    assert unet.AnyUNet2D.from_pretrained(tmp_path).config.in_channels == 4
    said = {}
    for k, v in SPOILT:
        f.write_text(json.dumps({**good, k: v}))
        said[k, repr(v)] = answer(unet.AnyUNet2D.from_pretrained, tmp_path), answer(C.load_component, tmp_path)
    assert {k: v for k, v in said.items() if v != ('one line', 'one line')} == {}

# --- weights

def header(d, more=b''):
    text = d if isinstance(d, bytes) else json.dumps(d).encode()
    return struct.pack('<Q', len(text)) + text + more

def one(state, f):
    k = next(k for k, v in state.items() if v.ndim > 1)
    return {**state, k: f(state[k])}

def holed(x): return x.clone().view(-1).index_fill(0, torch.tensor([0]), nan).view_as(x)

WEIGHTS = dict(empty=lambda s: b'', seven=lambda s: b'\0'*7, huge_header=lambda s: struct.pack('<Q', 2**60) + b'{}', most=lambda s: b'\xff'*8, cut=lambda s: save(s)[:-9], cut_header=lambda s: save(s)[:99],
    half=lambda s: save(s)[:len(save(s))//2], more=lambda s: save(s) + b'x', html=lambda s: b'<!DOCTYPE html>'*99, pickle=lambda s: pickle.dumps(Planted()), no_json=lambda s: header(b'{"a":'), a_list=lambda s: header([]),
    deep=lambda s: header(DEEP.encode()), nothing=lambda s: header({}), far=lambda s: header(dict(a=dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42]))), backwards=lambda s: header(dict(a=dict(dtype='F32', shape=[1], data_offsets=[4, 0])), b'1234'),
    kind=lambda s: header(dict(a=dict(dtype='X9', shape=[1], data_offsets=[0, 4])), b'1234'), negative=lambda s: header(dict(a=dict(dtype='F32', shape=[-1], data_offsets=[0, 4])), b'1234'),
    bytes=lambda s: save({k: v.to(torch.int8) for k, v in s.items()}), bools=lambda s: save({k: v > 0 for k, v in s.items()}), ints=lambda s: save(one(s, lambda x: x.long())), holed=lambda s: save(one(s, holed)), infinite=lambda s: save(one(s, lambda x: x/0)),
    other_shape=lambda s: save(one(s, lambda x: x[:1].clone())), flat=lambda s: save(one(s, lambda x: x.flatten())), lost=lambda s: save(dict([*s.items()][1:])), strange=lambda s: save({**s, 'more': torch.zeros(1)}), renamed=lambda s: save({f'x.{k}': v for k, v in s.items()}))
OF = 'autoencoder/autoencoder.safetensors', 'unet/diffusion_pytorch_model.safetensors'

ANOTHERS = dict(weights=(OF[0], load, lambda b: save({k: x + .01 for k, x in load_bytes(b).items()})), network=(OF[1], load, lambda b: save({k: x + .01 for k, x in load_bytes(b).items()})),
    config=('autoencoder/config.json', load, lambda b: changed(b, 'latent_std', [1.5]*4).encode()), latents=('latents/latents.f16', train, lambda b: b[::-1]), mirrored=('latents/mirrored.f16', train, lambda b: b[:-1] + bytes([b[-1] ^ 1])))

@pytest.mark.parametrize('what', ANOTHERS)
def test_a_file_of_another_run_is_noticed(what, folder, short):
    "Of the same shape, sound in every way, put there by hand: one line that names it, also where the note of what was made is gone, or says nothing of it; in a run of an earlier version, which had no such notes, it is taken, unless the latents tell"
    file, reader, other = ANOTHERS[what]
    f, note, run = folder/file, (folder/file).parent/'made.json', folder/'run.json'
    good, said, of, beside, kept = f.read_bytes(), note.read_text(), run.read_text(), f.parent/'contents.json', folder/'kept.json'
    f.write_bytes(other(good))
    try:
        with pytest.raises(UserError, match=f'{f} is not the file that was made there.*delete {f.parent} to make it again'): reader(folder)
        note.write_text(json.dumps({k: v for k, v in json.loads(said).items() if k not in ('contents', 'seal')}))
        with pytest.raises(UserError, match=f'{note} has changed since it was written: delete {f.parent}'): reader(folder)
        run.write_text(changed(of, 'versions.latentdiff', 'gone'))
        if beside.exists(): beside.rename(kept)
        assert answer(load, folder) == ('one line' if what in ('weights', 'config') else 'no word')   # the latents are of another autoencoder
        if kept.exists(): kept.rename(beside)
        run.write_text(of)
        note.unlink()
        assert answer(reader, folder) == 'one line'
    finally:
        f.write_bytes(good)
        if kept.exists(): kept.rename(beside)
        for o, text in ((note, said), (run, of)): o.write_text(text)
    assert answer(load, folder) == 'no word'

@pytest.mark.parametrize('reader', [load, train])
def test_the_noise_of_another_run_is_noticed(reader, folder, short):
    "Its process/ and its scheduler/, which agree with one another; the notes of the network know better"
    kept = {o: o.read_bytes() for d in ('process', 'scheduler') for o in (folder/d).iterdir()}
    N.save_process(N.Process('ddpm_linear', 'eps', 'uniform'), folder)
    try:
        with pytest.raises(UserError, match=f'{folder}/process has schedule ddpm_linear, {folder}/unet was trained with flow'): reader(folder)
    finally:
        for d in ('process', 'scheduler'): shutil.rmtree(folder/d), (folder/d).mkdir()
        for o, raw in kept.items(): o.write_bytes(raw)
    assert answer(load, folder) == 'no word'

@pytest.mark.parametrize('reader', [load, train])
def test_a_scheduler_of_other_noise_is_noticed(reader, folder, short):
    "Beside the right process/"
    f = folder/'scheduler'/'scheduler_config.json'
    good = f.read_bytes()
    N.Process('ddpm_linear', 'eps', 'uniform').to_diffusers().save_pretrained(f.parent)
    try:
        with pytest.raises(UserError, match='the scheduler is for ddpm_linear noise and target eps, the network for flow noise'): reader(folder)
    finally: f.write_bytes(good)
    assert answer(reader, folder) == 'no word'

@pytest.mark.parametrize('change', [('size', 16), ('size', 2048), ('sampler', 'scheduler'), ('unet', ['diffusers', 'AutoencoderKL'])], ids=repr)
def test_an_index_that_was_changed_is_made_again(change, folder, short):
    "By the commands that have made it; who draws from it hears that the size is another than that of the run"
    f = folder/'model_index.json'
    good = f.read_bytes()
    f.write_text(changed(good, *change))
    try:
        if change[0] == 'size':
            with pytest.raises(UserError, match=f'says {change[1]} px, run.json 32: run latentdiff-run on it again'): load(folder)
        train(folder)
        assert f.read_bytes() == good
    finally: f.write_bytes(good)
    assert answer(load, folder) == 'no word'

def answer_to_weights(folder, file, kind):
    f = folder/file
    good = f.read_bytes()
    f.write_bytes(WEIGHTS[kind](load_file(f)))
    try: return answer(load, folder)
    finally: f.write_bytes(good)

@pytest.mark.parametrize('file', OF)
def test_weights_that_are_none(file, folder):
    assert {k: v for k in WEIGHTS if (v := answer_to_weights(folder, file, k)) != 'one line'} == {}

# --- no pickle, wherever a file is read

def planted(kind='raw'):
    raw = pickle.dumps(Planted())
    return dict(raw=lambda: raw, gz=lambda: gzip.compress(raw), npz=lambda: npz_of(arr_0=np.array([Planted(), None])), torch=lambda: (torch.save(Planted(), o := io.BytesIO()), o.getvalue())[1])[kind]()

IN_A_RUN = [(file, HOLDS[file][0] if file in HOLDS else load, kind) for file in (*HOLDS, *OF, 'scheduler/scheduler_config.json') for kind in ('raw', 'torch') if file != 'scheduler/scheduler_config.json']
BESIDE = ('mnist/train-images-idx3-ubyte', 'mnist'), ('mnist/train-images-idx3-ubyte.gz', 'mnist'), ('fashion_mnist/t10k-labels-idx1-ubyte', 'fashion_mnist'), ('stanford_cars/cars.tgz', 'stanford_cars'), \
    ('lsun_bedroom/bedroom.zip', 'lsun_bedroom'), ('smallnorb/smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat', 'smallnorb'), ('smallnorb/smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz', 'smallnorb')
GIVEN = 'a.npz', 'a.zip', 'a.tar', 'a.tgz', 'a.tar.gz', 'a.pkl', 'a.pt', 'a.npy', 'folder/a.png', 'folder/metadata.csv', 'folder/metadata.jsonl', '00.tar'

def in_a_run(folder, file, reader, kind):
    undo = spoil(folder, file, None, planted(kind))
    try: return answer(reader, folder)
    finally: undo()

def open_planted(tmp, name, kind):
    f = tmp/name
    f.parent.mkdir(parents=True, exist_ok=True)
    if f.parent.name == 'folder' and f.suffix != '.png': (f.parent/'b.png').write_bytes(PNG)
    f.write_bytes(planted(kind))
    at = str(tmp/'{00..00}.tar') if name == '00.tar' else f.parent if f.parent.name == 'folder' else f
    said = answer(D.open_images, at, 8)
    f.unlink()
    return said

def in_the_home(home, name, spec):
    (home/name).parent.mkdir(parents=True, exist_ok=True)
    (home/name).write_bytes(planted())
    said = answer(D.open_images, spec, 32)
    (home/name).unlink()
    return said

def elsewhere(tmp):
    "Readers of single files"
    (tmp/'p').mkdir()
    for name in ('x.bin', 'diffusion_pytorch_model.bin', 'pytorch_model.bin', 'labels.csv', 'cars_train_annos.mat', 'cars_meta.mat', 'devkit.mat'): (tmp/'p'/name).write_bytes(planted())
    (tmp/'p'/'config.json').write_text(json.dumps(dict(_class_name='AutoencoderKL')))
    net = torch.nn.Linear(1, 1)
    return {'read_norb': answer(read_norb, tmp/'p'/'x.bin'), 'weights': answer(C.load_weights, net, tmp/'p'/'x.bin'), 'bin of diffusers': answer(A.open_autoencoder, tmp/'p'),
        'labels.csv': answer(car_names, tmp/'p'), 'norb folder': answer(lambda: NorbImages(16, folder=tmp/'p')), 'toml': answer(C.read_toml, tmp/'p'/'x.bin', dict(data=str)),
        'json': answer(C.read_json, tmp/'p'/'x.bin', 'hint'), 'checkpoint': answer(training.Checkpoint(tmp/'p', 'x').note, 'last') if (tmp/'p'/'x.bin').rename(tmp/'p'/'last.safetensors') else ''}

def pickles(folder, tmp):
    "What each place answers, by name"
    home = Path(os.environ['LATENTDIFF_DATA'])
    return {**{f'{o[0]} {o[2]}': in_a_run(folder, *o) for o in IN_A_RUN}, **{f'{o} {kind}': open_planted(tmp, o, kind) for o in GIVEN for kind in ('raw', 'torch', 'npz')[:2 + (o == 'a.npz')]},
        **{name: in_the_home(home, name, spec) for name, spec in BESIDE}, **elsewhere(tmp)}

def test_no_pickle_is_opened_anywhere(folder, tmp_path, short, monkeypatch):
    "A program that is planted as a pickle, raw, in torch's wrapping or as an array of objects, at more than 45 places"
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    said = pickles(folder, tmp_path)
    assert len(said) > 45 and not (tmp_path/'planted-was-here').exists()
    assert {k: v for k, v in said.items() if v != 'one line' and not (v == 'started' and k.split()[0] in AGAIN)} == {}
    pickle.loads(planted())                                                  # it would have worked
    assert (tmp_path/'planted-was-here').exists()

# --- arguments

WORDS = '', 'a', 'nan', 'inf', '1e308', '\u00e9', 'x'*5000, '[]', '<script>'
BELOW, BEYOND = ('-1', '0', '1.5'), (str(2**63), '100000000000')
FIRST = dict(run=('--data', 'rooms', '--n', 40), encode=('--data', 'rooms', '--n', 40), train=('RUN',), sample=('fashion_mnist32', '--npz', 'a.npz'), eval=('RUN/samples/samples.npz', 'RUN/samples/samples.npz'))
WRONG = {**{(verb, o): (*WORDS, *BELOW, *BEYOND) for verb in ('run', 'encode') for o in ('size', 'steps', 'ae-steps', 'n')}, ('run', 'minutes'): (*WORDS, '-1', '0'), ('run', 'seed'): (*WORDS, '1.5'), ('run', 'lr'): (*WORDS, '-1', '0'),
    **{('run', o): WORDS[bool(o == 'preset'):] for o in ('preset', 'condition')}, ('run', 'data'): (*WORDS, '-5', '/dev/zero', '/dev/null', 'a\0b', '~nobody/x', '/proc/self/mem'), ('run', 'autoencoder'): WORDS[1:], ('run', 'from'): WORDS,
    ('run', 'config'): (*WORDS[1:], '/dev/null/x', '/proc'), ('run', 'track'): WORDS, ('train', 'more'): (*WORDS, *BELOW, str(2**63)), ('eval', 'seed'): (*WORDS, '1.5'),
    **{('sample', o): (*WORDS, *BELOW, *BEYOND) for o in ('n', 'steps', 'bs')}, ('sample', 'seed'): (*WORDS, '1.5'), ('sample', 'sampler'): WORDS[1:], ('sample', 'class'): WORDS, ('sample', 'prompt'): WORDS,
    ('sample', 'guidance'): WORDS, ('sample', 'negative'): WORDS}
WRONG = [(verb, o, v) for (verb, o), values in WRONG.items() for v in values]

def answer_to_option(folder, verb, option, value):
    args = [str(o).replace('RUN', str(folder)) for o in FIRST[verb]] + (['--out', str(folder.parent/'new')] if verb in ('run', 'encode') else [])
    try: rc, said = command(verb, *args, f'--{option}={value}')
    except Started: return 'started'
    except Exception as e: return f'{type(e).__name__}: {e}'[:200]
    lines = said.rstrip().splitlines()
    return 'one line' if rc == 2 and 'error: ' in lines[-1] or rc == 1 and len(lines) == 1 and len(said) < 1500 else f'{rc}: {said[:200]}'

def test_what_is_said_to_the_commands(folder, short, monkeypatch, tmp_path):
    "Wrong type, negative, zero, NaN, beyond all numbers, empty, not ASCII, 5,000 characters: exit code 1, or 2 for a usage, and one line"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(P.LatentDiffusionPipeline, 'from_pretrained', cache(P.LatentDiffusionPipeline.from_pretrained))
    assert len(WRONG) > 199
    said = {o: answer_to_option(folder, *o) for o in WRONG}
    assert {k: v for k, v in said.items() if v != 'one line'} == {}

# --- functions

NET, FLOW, X = torch.nn.Identity(), N.Process(), torch.zeros(1, 4, 8, 8)

@pytest.mark.parametrize('name', sampling.SAMPLERS)
@pytest.mark.parametrize('ts', [[], [1.], ()])
def test_a_sampler_without_a_step_is_one_line(name, ts):
    assert answer(sampling.SAMPLERS[name], lambda x, t: x, FLOW, X, ts) == 'one line'

@pytest.mark.parametrize('how', [dict(steps=o) for o in (nan, -1, 0, 'a', 1.5, 2**63)] + [dict(minutes=o) for o in (nan, -1, 0, 'a', float('inf'), 1e308)] + [dict(epochs=o) for o in (nan, -1, 'a')]
    + [dict(steps=2, lr=o) for o in (nan, -1, 'a', None, float('inf'))] + [dict(steps=2, rounds=o) for o in (0, -1, 'a')] + [dict(steps=2, seed=o) for o in (nan, 'a', 1.5)], ids=str)
def test_a_training_of_no_length_is_one_line(how):
    class Learner: dls = type('Dls', (), dict(train=None))
    assert answer(partial(training.fit_steps, Learner(), **how)) == 'one line'

def test_the_size_of_a_set_does_not_hang_on_one_picture(tmp_path):
    "Whichever of them is damaged or tiny; arrays that are not square are refused"
    from PIL import Image
    for k in range(12):
        folder = tmp_path/f'{k}'
        folder.mkdir()
        for i in range(12):
            side = 9 if i == k else 40
            Image.new('RGB', (side + 5, side)).save(folder/f'{i}.png')
        (folder/f'{(k + 1) % 12}.png').write_bytes(b'damaged')
        assert D.side_of(folder) == 40
    np.savez(tmp_path/'a.npz', np.zeros((9, 8, 16, 3), np.uint8))
    with pytest.raises(UserError, match='8x16'): D.side_of(tmp_path/'a.npz')

def test_a_message_is_one_line_of_short_words():
    said = str(UserError('a\nb ' + 'x'*9999 + ' c'))
    assert '\n' not in said and said.startswith('a b xxx') and said.endswith('xxx c') and len(said) < 400
    assert str(UserError('no folder a')) == 'no folder a'

def test_a_size_that_will_work_is_named():
    with pytest.raises(UserError, match='16, 33.*give multiples of 4, such as 16 x 32 or 16 x 36') as e: A.KLAutoencoder(3, (8,), 4, 1, 4).encode(torch.zeros(1, 3, 16, 33))

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    tmp, patch = Path(tempfile.mkdtemp()), pytest.MonkeyPatch()
    os.environ |= dict(LATENTDIFF_DATA=str(tmp/'home'), LATENTDIFF_PRESET='tiny', HF_HUB_OFFLINE='1')
    made = shutil.copytree(sys.argv[1], tmp/'run') if sys.argv[1:] else tmp/'run'
    if not sys.argv[1:]: print(command('run', '--data', 'rooms', '--n', 120, '--out', made))
    os.chdir(tmp)
    nothing_long(patch)
    said = {(o[0], str(o[1]), repr(o[2])[:30]): answer_to(made, *o) for o in JSONS}
    said |= {(file, k, ''): answer_to_weights(made, file, k) for file in OF for k in WEIGHTS}
    said |= {('pickle', k, ''): v for k, v in pickles(made, tmp).items()}
    patch.setattr(P.LatentDiffusionPipeline, 'from_pretrained', cache(P.LatentDiffusionPipeline.from_pretrained))
    said |= {(f'latentdiff-{o[0]}', o[1], repr(o[2])[:30]): answer_to_option(made, *o) for o in WRONG}
    bad = {k: v for k, v in said.items() if v != 'one line' and not (v == 'started' and (k[0] in AGAIN or k[1].split()[0] in AGAIN) or v == 'no word' and k[0].endswith('done.json') and '_class_name' in k[2])}
    for k, v in bad.items(): print(*k, '->', v)
    print(f'of {len(said)} bad inputs {len(bad)} end otherwise than in one line')
