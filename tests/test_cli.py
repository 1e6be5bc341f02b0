"The console commands, each in a process of its own: what they leave behind, and one clear line for every bad input."
import base64, io, json, os, random, re, shlex, shutil, signal, subprocess, sys, tarfile, time
from contextlib import redirect_stdout
from html import unescape
import numpy as np, pytest, torch
from fastcore.basics import AttrDict
from PIL import Image
from pathlib import Path
import latentdiff
from latentdiff.card import model_card
from latentdiff.commands import Run, eval_cli, settings_of
from latentdiff.core import Bar, UserError, locked, preset, sealed
from latentdiff.disk import contents_of
from latentdiff.data import open_images
from latentdiff.files import npz_pixels
from latentdiff.kid_eval import Extractor, features
from latentdiff.report import figure, report
from processes import command

@pytest.fixture(scope='session')
def cli(server, tmp_path_factory):
    "cli('run', '--data', ...) -> AttrDict(rc, out, err) of latentdiff-run --data ..."
    tmp = tmp_path_factory.mktemp('cli')
    return lambda verb, *args: server.run(command(tmp, verb), *args)

@pytest.fixture(scope='session')
def run(finished_run, tmp_path_factory):
    "A finished run on rooms, and what the command said: a copy of its own for each worker"
    return AttrDict(finished_run, folder=shutil.copytree(finished_run.made_at, tmp_path_factory.mktemp('runs')/'run'))

def one_line(r, *words):
    "Exit code 1 and one line on stderr that has all `words`, and no traceback."
    assert r.rc == 1 and r.err.count('\n') == 1, r
    for w in words: assert w in r.err, r.err

def test_run_leaves_everything(run):
    for f in ('run.json', 'model_index.json', 'metrics.json', 'report.html', 'samples/grid.png', 'samples/path.png', 'samples/samples.npz',
              'scores/training.png', 'scores/pairs.png', 'scores/neighbours.png', 'process/config.json', 'scheduler/scheduler_config.json',
              'autoencoder/config.json', 'autoencoder/autoencoder.safetensors', 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors'):
        assert (run.folder/f).is_file(), f
    assert not [f for f in run.folder.rglob('*') if f.suffix in ('.pkl', '.pth', '.pt', '.part', '.tmp', '.old', '.making')]

def test_files_have_the_permissions_of_any_new_file(run):
    umask = os.umask(0)
    os.umask(umask)
    for f in run.folder.rglob('*.*'):
        if f.is_file() and f.name != '.lock': assert f.stat().st_mode & 0o777 == 0o666 & ~umask, f

def test_run_says_first_what_it_will_do(run):
    head = run.out.split('training KLAutoencoder')[0]
    for w in ('rooms', 'tiny', 'cpu' if 'cpu' in head else 'cuda', 'seed 0', run.made_at, ' min', ' GB', '30 steps', '40 of the denoiser'): assert w in head, w

def test_metrics(run):
    m = json.loads((run.folder/'metrics.json').read_text())
    for k in ('kid', 'kid_se', 'kid_floor', 'kid_floor_se', 'fid', 'fid_floor', 'psnr', 'ssim'): assert np.isfinite(m[k]), k
    assert m['n_fake'] == 64 and m['n_real'] == len(open_images('rooms', 32, preset('tiny').n).valid_idxs)
    assert m['seed'] == 0 and m['device'] in ('cpu', 'cuda') and set(m['seconds']) >= {'autoencoder', 'latents', 'unet', 'samples', 'scores'}

def stands_alone(page):
    "No script, and nothing but data is linked; what a picture's bytes spell does not count"
    page = re.sub('base64,[A-Za-z0-9+/=]*', 'base64,', page)
    return not re.search(r'(src|href)="(?!data:)', page) and 'http' not in page and '<script' not in page

def test_report_needs_no_other_file(run):
    "Every picture is inside the page."
    page = (run.folder/'report.html').read_text()
    assert page.count('src="data:image/png;base64,') == 5 and 'name=viewport' in page and stands_alone(page)

@pytest.mark.parametrize('holds', [None, b'', b'GIF'])
def test_a_picture_of_the_report_that_is_gone_or_none(holds, tmp_path):
    "In a run of an earlier version, which has not noted its pictures: one line that says how to get them again"
    f = tmp_path/'scores'/'pairs.png'
    f.parent.mkdir()
    if holds is not None: f.write_bytes(holds)
    with pytest.raises(UserError, match=f'{f} cannot be read .*: delete {f.parent} to make it again'): figure(f, 'pairs')

@pytest.mark.parametrize('into,alone', [('base64,AAAAhttpAAAA', True), ('base64," src="http://x/', False), ('base64,"><script>', False)])
def test_what_a_picture_spells_is_no_link(into, alone):
    assert stands_alone('<img src="data:image/png;base64,AAAA">'.replace('base64,', into)) is alone

def test_report_shows_what_it_is_told_and_runs_none_of_it(run):
    "A name from outside is text in the page, and one word in the command to paste."
    name = 'x ; touch PWN <script>alert(1)</script>'
    m = json.loads((run.folder/'metrics.json').read_text()) | dict(device=name, told=dict(cond=[name]*64, guidance=2.5))
    page = report(run.folder, dict(data=name, size=32, preset='tiny', seed=0), m)
    cells = re.findall('<figure><img[^>]*base64,([^"]*)"[^>]*><figcaption>(.*?)</figcaption>', page.split('<div class="asked">')[1])[:64]
    assert [unescape(words) for _, words in cells] == [name]*64 and 'not chosen' in page and 'guidance 2.5' in page
    shown = np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(o)))) for o, _ in cells])
    assert (shown == npz_pixels(run.folder/'samples'/'samples.npz').permute(0, 2, 3, 1)[:64].numpy()).all()   # each above its words
    command = unescape(re.search('<code>(.*?)</code>', page)[1])
    assert '<script' not in page and shlex.split(command)[:3] == ['latentdiff-run', '--data', name]

def test_a_training_that_falls_ill_is_one_line_and_saves_nothing(server, run, tmp_path):
    "At a rate far too high latentdiff-train stops; nothing of the network is in the folder"
    gone = shutil.ignore_patterns('unet', 'checkpoints', 'samples', 'scores', 'report.html', 'metrics.json', 'model_index.json')
    folder = shutil.copytree(run.folder, tmp_path/'run', ignore=gone)
    script = command(tmp_path, 'train', "from dataclasses import replace\nfrom latentdiff import core\n"
                                        "core.PRESETS['tiny'] = replace(core.PRESETS['tiny'], lr=1e30)")
    one_line(server.run(script, folder), 'train again at a lower rate')
    assert not (folder/'unet').exists() and not (folder/'model_index.json').exists()
    assert not [f for f in folder.rglob('*.safetensors') if f.parts[-2] not in ('autoencoder', 'judge')]

def test_finished_run_is_left_alone(cli, run):
    before = {f: f.stat().st_mtime_ns for f in run.folder.rglob('*') if f.name != '.lock'}
    r = cli('run', *run.args, '--out', run.folder)
    assert r.rc == 0 and 'finished' in r.out
    assert {f: f.stat().st_mtime_ns for f in run.folder.rglob('*') if f.name != '.lock'} == before

def test_other_settings_are_refused(cli, run):
    one_line(cli('run', *run.args, '--seed', 1, '--out', run.folder), 'seed', '--out')

def test_run_of_the_first_version_is_refused(cli, tmp_path):
    (tmp_path/'run.json').write_text(json.dumps(dict(settings={}, stages={})))
    one_line(cli('run', '--preset', 'tiny', '--out', tmp_path), '0.1', '--out')

@pytest.mark.parametrize('lost,says', [(('scores', 'metrics.json', 'report.html'), ''), (('samples/grid.png', 'scores/pairs.png', 'report.html'), 'samples has lost grid.png'),
    (('process/config.json', 'scheduler', 'model_index.json', 'config.toml', 'report.html'), 'has lost process and scheduler: made again'), (('scheduler/scheduler_config.json', 'report.html'), 'has lost scheduler: made again')], ids=['parts', 'pictures', 'noise', 'scheduler'])
def test_interrupted_run_goes_on(cli, run, tmp_path, lost, says):
    "Without its last parts, or pictures of its report, a run makes those and no other."
    folder, kept = shutil.copytree(run.folder, tmp_path/'run'), ('autoencoder/made.json', 'latents/made.json', 'unet/made.json', 'samples/samples.npz')
    for o in lost: shutil.rmtree(folder/o) if (folder/o).is_dir() else (folder/o).unlink()
    stamp = lambda k: (folder/k).stat().st_mtime_ns
    before = [*map(stamp, kept)]
    shutil.copytree(folder/'unet', folder/'unet (1)')   # a copy, and a folder of the user's own, are no parts of the run
    (folder/'notes').mkdir(), (folder/'notes'/'made.json').write_text('{}')
    r = cli('run', *run.args, '--out', folder)
    assert r.rc == 0 and (folder/'report.html').exists() and says in r.out, r
    assert {*json.loads((folder/'metrics.json').read_text())['seconds']} == {'autoencoder', 'latents', 'samples', 'scores', 'unet'}
    assert [*map(stamp, kept)] == before
    for o in ('samples/grid.png', 'scores/pairs.png', 'process/config.json', 'scheduler/scheduler_config.json', 'model_index.json', 'config.toml'): assert (folder/o).read_bytes() == (run.folder/o).read_bytes()
    same = [json.loads((f/'metrics.json').read_text()) for f in (folder, run.folder)]
    assert same[0]['kid'] == pytest.approx(same[1]['kid'], rel=1e-3)

def test_a_run_goes_on_with_what_a_lesson_has_trained(cli, run, tmp_path):
    "A lesson's denoiser was not scored on the way: the run's curve is then its last point."
    folder = shutil.copytree(run.folder, tmp_path/'run')
    for k in ('scores', 'metrics.json', 'report.html', 'run.json'): shutil.rmtree(folder/k) if (folder/k).is_dir() else (folder/k).unlink()
    note = json.loads((folder/'unet'/'made.json').read_text())
    del note['facts']['kid'], note['seal']
    (folder/'unet'/'made.json').write_text(json.dumps(sealed(note)))
    r = cli('run', *run.args, '--out', folder)
    assert r.rc == 0 and (folder/'scores'/'training.png').exists(), r
    assert json.loads((folder/'metrics.json').read_text())['kid_curve'] == []

def test_changed_pictures_are_never_mixed_with_old_results(cli, bad, tmp_path):
    "A run on grey noise, whose pictures then turn red under the same names, says so in one line and keeps what it has."
    pics = tmp_path/'pics'
    pics.mkdir()
    rng = np.random.default_rng(1)
    for i in range(120): Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(pics/f'{i}.png')
    assert cli('encode', '--data', pics, '--preset', 'tiny', '--ae-steps', 4, '--out', tmp_path/'run').rc == 0
    weights = (tmp_path/'run/autoencoder/autoencoder.safetensors').read_bytes()
    for i in range(120): Image.fromarray(np.full((32, 32, 3), (200, i, 0), np.uint8)).save(pics/f'{i}.png')
    one_line(cli('run', '--data', pics, '--preset', 'tiny', '--out', tmp_path/'run'), 'other images')
    assert (tmp_path/'run/autoencoder/autoencoder.safetensors').read_bytes() == weights

def test_pictures_that_lie_elsewhere_are_those_that_have_the_same_fingerprint(cli, tmp_path):
    "A run whose folder of pictures was renamed says how it goes on, and goes on; with others, or others of that name, it does not"
    pics, new, folder = tmp_path/'pics', tmp_path/'new', tmp_path/'a run'
    pics.mkdir()
    rng = np.random.default_rng(1)
    for i in range(120): Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(pics/f'{i}.png')
    assert cli('encode', '--data', pics, '--preset', 'tiny', '--ae-steps', 4, '--steps', 4, '--from', 'none', '--out', folder).rc == 0
    shutil.copytree(pics, tmp_path/'other')
    png(tmp_path/'other'/'0.png', 32)
    pics.rename(new)
    notes = {o: o.read_bytes() for o in folder.glob('*/made.json')}
    settings = lambda: json.loads((folder/'run.json').read_text())['settings']
    one_line(r := cli('train', folder), f"no folder or file '{pics}'; ")
    way = shlex.split(r.err.split('elsewhere now: latentdiff-')[1])[:-1]
    for o in (pics, 'pics', 'rooms'): one_line(cli(*way, o), f"no folder or file '{pics}'; ")
    one_line(cli(*way, tmp_path/'nowhere'), f"no folder or file '{tmp_path}/nowhere'; ")
    one_line(cli(*way, tmp_path/'other'), f'made with data {pics}, not {tmp_path}/other, whose pictures are not all the same: bring back')
    one_line(cli(*way, new, '--seed', 1), 'made with seed 0, not 1')
    assert settings()['data'] == str(pics)
    assert (r := cli(*way, new)).rc == 0 and settings()['data'] == str(new), r
    assert {o: o.read_bytes() for o in folder.glob('*/made.json')} == notes
    assert (r := cli('train', folder)).rc == 0 and (folder/'unet'/'made.json').exists(), r
    new.rename(pics)
    written = (folder/'run.json').read_bytes()
    one_line(cli('train', folder, '--more', 3), f"no folder or file '{new}'; ")
    assert (folder/'run.json').read_bytes() == written

def weights(folder): return (folder/'unet/diffusion_pytorch_model.safetensors').read_bytes()

def test_minutes_become_steps_once(cli, tmp_path):
    "The first call measures and writes the steps down; the second goes by what is written."
    args = ('encode', '--data', 'rooms', '--preset', 'tiny', '--n', 120, '--minutes', '.05', '--out', tmp_path/'run')
    assert cli(*args).rc == 0
    steps = [json.loads((tmp_path/'run/run.json').read_text())['settings'][k] for k in ('ae_steps', 'steps')]
    assert all(o > 0 for o in steps) and steps != [30, 40]
    assert json.loads((tmp_path/'run/autoencoder/made.json').read_text())['settings']['steps'] == steps[0]
    r = cli(*args)
    assert r.rc == 0 and 'nothing to do' in r.out
    assert [json.loads((tmp_path/'run/run.json').read_text())['settings'][k] for k in ('ae_steps', 'steps')] == steps

def test_a_mistyped_number_of_steps_is_taken_back(server, cli, run, tmp_path):
    "--more 500000, killed when it has written that down: the steps that are trained, or more, may be asked for instead, and what is trained is kept"
    folder, steps = shutil.copytree(run.folder, tmp_path/'run'), lambda: json.loads((folder/'run.json').read_text())['settings']['steps']
    server.start(command(tmp_path, 'train'), folder, '--more', 500_000)
    while server.alive() and steps() == 40: time.sleep(.02)
    server.kill()
    assert server.wait().rc == -signal.SIGKILL and steps() == 500_040
    one_line(cli('run', *run.args, '--steps', 39, '--out', folder), 'has a denoiser of 40 steps: give --steps 40 or more')
    r = cli('run', *run.args, '--steps', 40, '--out', folder)
    assert r.rc == 0 and steps() == 40 and weights(folder) == weights(run.folder), r
    assert cli('train', folder, '--more', 1).rc == 0 and steps() == 41

@pytest.mark.parametrize('part', ['autoencoder', 'unet'])
def test_halves_of_two_runs_are_no_pipeline(cli, run, tmp_path, part):
    "One draws rubbish from the latents of the other; the notes of the two tell"
    folder = shutil.copytree(run.folder, tmp_path/'run')
    note, config = (json.loads((folder/part/o).read_text()) for o in ('made.json', 'config.json'))
    if part == 'unet': note['parents']['latents'] = 'of another run'
    else: (folder/part/'config.json').write_text(json.dumps(config | dict(latent_std=[o*1.5 for o in config['latent_std']])))
    note['contents'] = contents_of(folder/part)   # all of the other run's part is here, as it was made there
    (folder/part/'made.json').write_text(json.dumps(sealed({k: v for k, v in note.items() if k != 'seal'})))
    one_line(cli('sample', folder, '--n', 2, '--npz', tmp_path/'a.npz'), f"{folder/'unet'} was trained on latents of another autoencoder: take both from one run")
    assert not (tmp_path/'a.npz').exists()

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_more_steps_that_were_trained_when_it_was_killed_are_not_trained_again(server, cli, run, tmp_path, number):
    "The network is in its place, and the command has not ended: the same command ends it; once more it trains more"
    folder = shutil.copytree(run.folder, tmp_path/'run')
    steps = lambda: json.loads((folder/'unet'/'made.json').read_text())['settings']['steps']
    kill = f"import os\nfrom latentdiff import commands\nwrite = commands.Run.write\ndef dies(self, *more):\n    if not more and self.folder.name == 'run': os.kill(os.getpid(), {int(number)})\n    write(self, *more)\ncommands.Run.write = dies"
    server.start(command(tmp_path, 'train', kill), folder, '--more', 3)
    assert server.wait().rc in (-number, 128 + number) and steps() == 43
    assert cli('train', folder, '--more', 3).rc == 0 and steps() == 43 and 'more' not in json.loads((folder/'run.json').read_text())
    assert cli('train', folder, '--more', 3).rc == 0 and steps() == 46

def test_a_run_that_is_named_from_within_one_of_its_parts(server, run, tmp_path):
    "The part is made anew, so the folder that one stands in is gone, and '..' leads nowhere"
    folder = shutil.copytree(run.folder, tmp_path/'run')
    code = "import os, sys\nos.chdir(sys.argv[1])\nsys.argv = ['latentdiff-train', '..', '--more', '1']\nfrom latentdiff.commands import train_cli\ntrain_cli()"
    r = server.code(code, folder/'unet')
    assert r.rc == 0 and 'lost' not in r.out and json.loads((folder/'unet'/'made.json').read_text())['settings']['steps'] == 41, r

KILLED_AT = 'checkpoints/autoencoder/*', 'checkpoints/unet/*', '.samples.making' # as soon as one of these files is there, and a little later

def test_a_busy_machine_and_a_killed_run_give_the_same_weights_to_the_bit(server, run, tmp_path):
    "The same run, by its own file of settings, starved of its processor now and then (`make test-long`: beside busy processes, too), killed with SIGKILL again and again, ends with the very bytes."
    script = command(tmp_path, 'run', 'from latentdiff import training\ntraining.Checkpoint.__init__.__defaults__ = (0.,)')
    rng, kills = random.Random(0), 0
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(4*('LATENTDIFF_LONG' in os.environ))]
    try:
        with server.starved():
            for found in (*KILLED_AT, None):
                server.start(script, '--config', run.folder/'config.toml', '--out', tmp_path/'run')
                while found and server.alive() and not [*(tmp_path/'run').glob(found)]: time.sleep(.02)
                if found: time.sleep(rng.uniform(0, .5)), server.kill()
                r = server.wait()
                if r.rc != -signal.SIGKILL: break
                kills += 1
    finally:
        for o in busy: o.kill()
    assert r.rc == 0, r.err
    assert kills and weights(tmp_path/'run') == weights(run.folder)
    assert not [o for o in (tmp_path/'run').rglob('*') if o.suffix in ('.part', '.new', '.old', '.making')]

def test_training_on_ends_where_the_longer_training_ends(cli, run, tmp_path):
    "40 steps and --more 20 are 60 steps, and latentdiff-run then draws and scores anew."
    folder = shutil.copytree(run.folder, tmp_path/'run')
    told = lambda: model_card('us/rooms', 'drawn by a program', folder)
    assert '| KID |' in told() and f"rooms, {json.loads((folder/'latents'/'made.json').read_text())['facts']['n']:,} at " in told()
    r = cli('train', folder, '--more', 20)
    assert r.rc == 0 and 'samples, scores and report are of the unet before: latentdiff-run' in r.out
    assert '| KID |' not in told() and '60 steps' in told()
    d = json.loads((folder/'run.json').read_text())
    (folder/'run.json').write_text(json.dumps(d | dict(settings=d['settings'] | dict(steps=5000))))   # as a --more that was stopped leaves it
    assert '60 steps' in told()
    (folder/'run.json').write_text(json.dumps(d))
    written = (folder/'run.json').read_bytes()
    one_line(cli('train', folder, '--more', 10**9), '--more', '1,000,000,000')
    assert (folder/'run.json').read_bytes() == written
    long = shutil.copytree(run.folder, tmp_path/'long', ignore=shutil.ignore_patterns('unet', 'checkpoints', 'samples', 'scores', 'report.html', 'metrics.json'))
    d = json.loads((long/'run.json').read_text())
    d['settings']['steps'] = 60
    (long/'run.json').write_text(json.dumps(d))
    assert cli('train', long).rc == 0
    assert weights(folder) == weights(long) != weights(run.folder)
    before = (folder/'report.html').read_text()
    r = cli('run', *run.args, '--out', folder)
    assert r.rc == 0 and (folder/'report.html').read_text() != before and 'before' not in r.out and '| KID |' in told()
    assert [o[0] for o in json.loads((folder/'metrics.json').read_text())['kid_curve']] == [10, 20]   # of 40 steps, not of 60

def test_a_link_that_an_editor_leaves_in_a_run_is_nothing_to_it(cli, run, tmp_path):
    "Emacs puts .#run.json, which leads nowhere, beside a file that is being edited"
    folder = shutil.copytree(run.folder, tmp_path/'run')
    (folder/'.#run.json').symlink_to('me@here.1234')
    r = cli('run', *run.args, '--out', folder)
    assert r.rc == 0 and 'nothing to do' in r.out, r.err

def test_a_finished_run_where_nobody_may_write_is_finished(run, tmp_path, monkeypatch, capsys):
    "As on a CD, also where its config.toml is cut: nothing can be written, and nothing has to be"
    folder = shutil.copytree(run.folder, tmp_path/'run')
    (folder/'config.toml').write_text('data = ')
    settings = json.loads((folder/'run.json').read_text())['settings']
    monkeypatch.setattr(os, 'access', lambda *_: False)
    Run(folder, settings).go()
    assert 'nothing to do' in capsys.readouterr().out and (folder/'config.toml').read_text() == 'data = '

def test_two_commands_in_one_folder(server, run):
    "The second leaves in one line while the first is at work."
    with locked(run.folder):
        p = server.code(f'import sys; sys.argv = ["latentdiff-run"]; from latentdiff.commands import Run; Run({str(run.folder)!r}, {{}}).go()')
    assert p.rc == 1 and 'another process works' in p.err.splitlines()[-1]

def test_two_commands_at_once_in_a_new_folder(run, tmp_path):
    "Two processes started together: one at least ends well, the other may leave in one line; in the folder is what a run left in peace has, and nothing else"
    command = [sys.executable, '-W', 'ignore', '-m', 'latentdiff', 'run', *run.args, '--out', tmp_path/'run']
    env = os.environ | dict(PYTHONPATH=str(Path(latentdiff.__file__).parents[1]))
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    said = [AttrDict(err=p.communicate()[1], rc=p.returncode) for p in both]
    assert 0 in [r.rc for r in said], said
    for r in said:
        if r.rc: one_line(r, 'another process works')
    for part in ('unet/diffusion_pytorch_model.safetensors', 'autoencoder/autoencoder.safetensors', 'samples/samples.npz', 'samples/grid.png'):
        assert (tmp_path/'run'/part).read_bytes() == (run.folder/part).read_bytes(), part
    alone, two = ({o.relative_to(f) for o in f.rglob('*')} for f in (run.folder, tmp_path/'run'))
    assert not two - alone and [o.name for o in tmp_path.iterdir()] == ['run']

def test_help_does_not_wait_for_torch():
    for verb in ('run', 'encode', 'train', 'sample', 'eval'):
        code = f"""import sys
sys.argv = ['latentdiff-{verb}', '--help']
from latentdiff.commands import {verb}_cli
try: {verb}_cli.__wrapped__ and __import__('fastcore.script').script.anno_parser({verb}_cli).parse_args(['--help'])
except SystemExit: pass
sys.exit('torch' in sys.modules)"""
        p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(latentdiff.__file__).parents[1])))
        assert p.returncode == 0 and 'usage' in p.stdout, p.stderr

def as_module(*args, **kw):
    "python -m latentdiff ..., in a process of its own; stderr says what was imported"
    env = os.environ | dict(PYTHONPATH=str(Path(latentdiff.__file__).parents[1]))
    return subprocess.run([sys.executable, '-X', 'importtime', '-m', 'latentdiff', *args], capture_output=True, text=True, env=env, **kw)

def test_the_module_names_its_verbs_without_torch():
    "And each verb's help is that of its command"
    p = as_module('--help')
    assert p.returncode == 0 and re.findall(r'^  (\w+) ', p.stdout, re.M) == ['run', 'encode', 'train', 'sample', 'eval']
    assert re.search(r'\| +latentdiff\.commands$', p.stderr, re.M) and not re.search(r'\| +torch$', p.stderr, re.M)
    p = as_module('sample', '--help')
    assert p.returncode == 0 and p.stdout.startswith('usage: ') and '--guidance' in p.stdout
    assert not re.search(r'\| +torch$', p.stderr, re.M)

def test_names_that_would_steer_a_terminal_are_written_out(cli, tmp_path):
    "Of pictures that are left out, folders and the set"
    for k in ('a', 'b\x1b[31m'):
        (tmp_path/k).mkdir()
        for i in range(8): Image.fromarray(np.random.RandomState(i).randint(0, 256, (16, 16, 3), np.uint8)).save(tmp_path/k/f'{i}.png')
        (tmp_path/k/'bad\x1b]0;pw\a.png').write_bytes(b'x')
    r = cli('eval', tmp_path/'a', tmp_path/'b\x1b[31m')
    assert r.rc == 0 and not {'\x1b', '\a'} & {*r.out + r.err} and 'bad\\x1b]0;pw\\x07.png' in r.err and 'b\\x1b[31m' in r.err

@pytest.mark.parametrize('args,words', [(('sing',), ("'sing'", 'run, encode, train, sample, eval')), (('\x1b[31mx' + 'y'*5000,), ('\\x1b[31mxy', 'yyy...')), (('sample', 'rooms64'), ('latentdiff-sample', '--out'))])
def test_what_the_module_cannot_do_is_one_line(tmp_path, args, words):
    p = as_module(*args, cwd=tmp_path)
    said = ''.join(l for l in p.stderr.splitlines(keepends=True) if not l.startswith('import time:'))
    one_line(AttrDict(rc=p.returncode, err=said), *words)
    assert not p.stdout and not [*tmp_path.iterdir()]

def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    (tmp_path/'gone').mkdir()
    code = f"import os, sys; os.chdir({str(tmp_path/'gone')!r}); os.rmdir({str(tmp_path/'gone')!r}); sys.argv[0] = 'latentdiff-eval'; import latentdiff.commands"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(latentdiff.__file__).parents[1])))
    one_line(AttrDict(rc=p.returncode, err=p.stderr), 'the current folder is gone')

def test_an_evaluation_that_cannot_be_printed_is_kept(tmp_path, monkeypatch):
    from latentdiff import commands
    for k in 'ab': np.savez(tmp_path/f'{k}.npz', np.random.RandomState(ord(k)).randint(0, 256, (8, 16, 16, 3), np.uint8))
    class Full(io.StringIO):
        def write(self, s): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'dup2', lambda *args: None)   # it is pytest's own output
    with redirect_stdout(Full()), pytest.raises(SystemExit): commands.eval_cli.__wrapped__(*(str(tmp_path/f'{k}.npz') for k in 'ab'), out=str(tmp_path/'e.json'))
    assert 'kid' in json.loads((tmp_path/'e.json').read_text())

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_the_list_of_verbs_that_cannot_be_printed_is_one_line():
    env = os.environ | dict(PYTHONPATH=str(Path(latentdiff.__file__).parents[1]))
    with open('/dev/full', 'w') as full: p = subprocess.run([sys.executable, '-m', 'latentdiff'], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    one_line(AttrDict(rc=p.returncode, err=p.stderr), 'No space left')

@pytest.fixture(scope='session')
def drawn(cli, run, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('drawn')
    r = cli('sample', run.folder, '--n', 8, '--steps', 2, '--out', tmp/'pngs', '--npz', tmp/'all.npz')
    assert r.rc == 0, r.err
    return tmp

def test_sample(drawn):
    a = np.load(drawn/'all.npz')['arr_0']
    assert a.shape == (8, 32, 32, 3) and a.dtype == np.uint8
    names = sorted(f.name for f in (drawn/'pngs').iterdir())
    assert names == [f'{i:05d}.png' for i in range(8)]
    assert all((np.array(Image.open(drawn/'pngs'/f)) == a[i]).all() for i, f in enumerate(names))

def test_sample_seeds(cli, run, drawn, tmp_path):
    "The same seed draws the same images, whatever the batch; another seed does not."
    for seed, name in ((0, 'same'), (1, 'other')):
        assert cli('sample', run.folder, '--n', 4, '--steps', 2, '--bs', 2, '--seed', seed, '--npz', tmp_path/name).rc == 0
    a = np.load(drawn/'all.npz')['arr_0'][:4].astype(int)
    same, other = (np.load(tmp_path/k)['arr_0'].astype(int) for k in ('same', 'other'))
    assert abs(a - same).max() <= 1 and abs(a - other).max() > 10

def test_the_pictures_of_the_report_once_more(cli, run, tmp_path):
    "Nothing but the seed and the size of a batch has to be said: the rest is as it was"
    r = cli('sample', run.folder, '--n', 64, '--bs', 64, '--npz', tmp_path/'again.npz')
    assert r.rc == 0 and 'dpmpp_2m, 10 steps' in r.out, r
    assert torch.equal(npz_pixels(tmp_path/'again.npz'), npz_pixels(run.folder/'samples/samples.npz'))

def test_eval_of_one_set_against_itself(cli, drawn, tmp_path):
    "A folder and an array with the same images: FID 0, KID not above 0 (it is unbiased, so a set is closer to itself than to a fresh draw)."
    pngs = shutil.copytree(drawn/'pngs', tmp_path/'pngs')
    (pngs/'broken.png').write_bytes(b'x'), (pngs/'more').symlink_to(drawn/'pngs')
    r = cli('eval', pngs, drawn/'all.npz', '--out', tmp_path/'new'/'scores.json')
    assert r.rc == 0, r.err
    for w in ('pngs: 8 images', '2 skipped', 'broken.png: not a picture', 'more/: a link to a folder', 'all: 8 images', 'caution: 8 real pictures and 8 samples: KID can be off by', 'fid_floor: of 4 real pictures against 4, not 8 against 8: FID rises'): assert w in r.err, r.err
    d = json.loads(r.out)
    assert d == json.loads((tmp_path/'new'/'scores.json').read_text())
    assert abs(d['fid']) < 1e-3 and d['kid'] <= 0 and d['n_fake'] == d['n_real'] == 8

def test_the_scores_alone_are_on_stdout(drawn, monkeypatch, capsys):
    "However long it takes: what a slow machine says meanwhile is on stderr"
    begin = Bar.__init__
    def minutes_ago(self, *args):
        begin(self, *args)
        self.start -= 60
    monkeypatch.setattr(Bar, '__init__', minutes_ago)
    eval_cli(str(drawn/'pngs'), str(drawn/'all.npz'))
    out, err = capsys.readouterr()
    assert json.loads(out)['n_real'] == 8 and 'pictures' in err and 'compared at' in err

def test_encode_then_train_then_sample(cli, tmp_path):
    folder = tmp_path/'run'
    r = cli('encode', '--data', 'rooms', '--preset', 'tiny', '--n', 120, '--ae_steps', 6, '--steps', 6, '--out', folder)   # how well is not asked
    assert r.rc == 0 and (folder/'latents/manifest.json').exists() and not (folder/'unet').exists(), r.err
    one_line(cli('sample', folder, '--npz', tmp_path/'a.npz'), 'model_index.json', 'latentdiff-train')
    assert cli('train', folder).rc == 0
    assert [json.loads((folder/o/'made.json').read_text())['settings']['steps'] for o in ('autoencoder', 'unet')] == [6, 6]
    assert cli('sample', folder, '--n', 2, '--steps', 2, '--npz', tmp_path/'a.npz').rc == 0

# Bad input: one line, exit code 1, nothing half-written.

def png(path, size): Image.new('RGB', (size, size), (200, 10, 10)).save(path)

@pytest.fixture
def bad(tmp_path):
    "Paths of data that cannot be used."
    (tmp_path/'empty').mkdir(), (tmp_path/'pixel').mkdir(), (tmp_path/'few').mkdir()
    png(tmp_path/'pixel'/'a.png', 1)
    for i in range(3): png(tmp_path/'few'/f'{i}.png', 40)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path/'noise.png')
    with tarfile.open(tmp_path/'whole.tgz', 'w:gz') as t: t.add(tmp_path/'noise.png', 'a.png')
    (tmp_path/'cut.tgz').write_bytes((tmp_path/'whole.tgz').read_bytes()[:3000])
    with tarfile.open(tmp_path/'climbs.tgz', 'w:gz') as t: t.add(tmp_path/'noise.png', '../a.png')
    return tmp_path

@pytest.mark.parametrize('data,words', [('nowhere', ['nowhere']), ('empty', ['empty']), ('cut.tgz', ['cut.tgz']), ('climbs.tgz', ['../a.png']),
                                        ('pixel', ['pixel']), ('few', ['100 or more'])])
def test_bad_data(cli, bad, data, words):
    before = sorted(bad.rglob('*'))
    for verb in ('run', 'encode'):
        one_line(cli(verb, '--data', bad/data, '--preset', 'tiny', '--out', bad/'out'), *words)
    assert sorted(bad.rglob('*')) == before

@pytest.mark.parametrize('args,words', [(('--preset', 'huge'), ['huge', 'tiny, cpu, gpu']), (('--minutes', '-1'), ['--minutes']), (('--minutes', '1e8'), ['latentdiff-run: so many --minutes are too many: ']),
                                        (('--size', '0'), ['--size']),
                                        (('--autoencoder', 'nowhere'), ['nowhere']), (('--data', 'rooms', '--size', '33'), ['33'])])
def test_bad_settings(cli, tmp_path, args, words):
    if '--preset' not in args: args = ('--preset', 'tiny', *args)
    one_line(cli('run', *args, '--out', tmp_path/'out'), *words)
    assert not list(tmp_path.iterdir())

def test_folder_of_something_else_is_refused(cli, tmp_path):
    (tmp_path/'letter.txt').write_text('dear reader')
    one_line(cli('run', '--preset', 'tiny', '--out', tmp_path), 'not a run folder', '--out')
    assert [f.name for f in tmp_path.iterdir()] == ['letter.txt']

def lose_index(f): (f/'model_index.json').unlink()
def lose_denoiser(f): shutil.rmtree(f/'unet')
def lose_weights(f): (f/'autoencoder/autoencoder.safetensors').unlink()
def lose_process(f): (f/'process/config.json').unlink()
def cut_weights(f):
    w = f/'unet/diffusion_pytorch_model.safetensors'
    w.write_bytes(w.read_bytes()[:1000])
def edit(path, **kw): path.write_text(json.dumps({**json.loads(path.read_text()), **kw}))
def swap_class(f): edit(f/'unet/config.json', _class_name='KLAutoencoder')
def more_channels(f): edit(f/'autoencoder/config.json', latent_channels=8)
def foreign_code(f): edit(f/'model_index.json', unet=['os', 'UNet'])
def broken_json(f): (f/'model_index.json').write_text('{"autoencoder": [')

@pytest.mark.parametrize('spoil,word', [(lose_index, 'model_index.json'), (lose_denoiser, 'unet'), (lose_weights, 'autoencoder'),
                                        (lose_process, 'process'), (cut_weights, 'unet'), (swap_class, 'KLAutoencoder'),
                                        (more_channels, 'autoencoder'), (foreign_code, 'os'), (broken_json, 'model_index.json')])
def test_spoilt_run_folder(cli, run, tmp_path, spoil, word):
    folder = shutil.copytree(run.folder, tmp_path/'run', ignore=shutil.ignore_patterns('latents*', '*.png'))
    spoil(folder)
    one_line(cli('sample', folder, '--n', 2, '--out', tmp_path/'pngs'), word)
    assert [f.name for f in tmp_path.iterdir()] == ['run']

def test_bad_calls_of_sample(cli, run, tmp_path):
    one_line(cli('sample', tmp_path/'nowhere', '--out', tmp_path/'o'), 'nowhere', 'latentdiff-run')
    one_line(cli('sample', run.folder), '--out')
    one_line(cli('sample', run.folder, '--sampler', 'magic', '--out', tmp_path/'o'), 'magic', 'heun')
    one_line(cli('sample', run.folder, '--n', '0', '--out', tmp_path/'o'), '--n')
    one_line(cli('sample', run.folder, '--class', 'cat', '--out', tmp_path/'o'), 'without classes')
    one_line(cli('sample', run.folder, '--out', tmp_path), 'exists')
    assert not list(tmp_path.iterdir())

def test_bad_calls_of_train_and_eval(cli, drawn, tmp_path):
    one_line(cli('train', tmp_path/'nowhere'), 'nowhere')
    one_line(cli('train', tmp_path), 'run.json')
    one_line(cli('eval', tmp_path/'nowhere', drawn/'pngs'), 'nowhere')
    one_line(cli('eval', drawn/'pngs', tmp_path), str(tmp_path))
    (tmp_path/'a.npz').write_bytes(b'no zip')
    one_line(cli('eval', tmp_path/'a.npz', drawn/'pngs'), 'a.npz')
    np.savez(tmp_path/'a.npz', np.zeros((4, 8, 8, 3)))
    one_line(cli('eval', tmp_path/'a.npz', drawn/'pngs'), 'uint8')

@pytest.mark.parametrize('option,where', [('--npz', 'kept.txt'), ('--npz', 'kept.txt/x.npz'), ('--out', 'kept.txt/x')])
def test_sample_overwrites_nothing(cli, run, tmp_path, option, where):
    "What stands there stays, and the refusal comes before the drawing."
    (tmp_path/'kept.txt').write_text('mine')
    one_line(cli('sample', run.folder, '--n', 2, option, tmp_path/where), where.split('/')[-1], option)
    assert (tmp_path/'kept.txt').read_text()=='mine' and len(list(tmp_path.iterdir()))==1

# --- the zoo, and what it can be told -------------------------------------------------------------------------------

def test_the_zoo_draws_by_name(cli, tmp_path):
    "Of every class as many, and the same seed gives the same garments in another class's shape."
    for name, classes in (('a', 'bag,trouser'), ('b', 'bag')):
        r = cli('sample', 'fashion_mnist32', '--n', 4, '--steps', 4, '--class', classes, '--guidance', 2, '--npz', tmp_path/f'{name}.npz')
        assert r.rc == 0, r.err
    a, b = (npz_pixels(tmp_path/f'{o}.npz').float() for o in 'ab')
    assert torch.equal(a[::2], b[::2]) and (a[1::2] - b[1::2]).abs().mean() > 5

@pytest.mark.parametrize('options,words', [
    (('--class', ''), ('--class', 'empty')), (('--prompt', ' '), ('--prompt', 'empty')), (('--class', 'bag', '--prompt', 'a bag'), ('one of them',)),
    (('--negative', 'bag'), ('--negative', '--class')), (('--guidance', 3), ('--guidance', '--class')), (('--prompt', 'a bag'), ('without captions',)),
    (('--class', 'bag', '--guidance', 'nan'), ('guidance', 'number')), (('--class', 'bag', '--negative', 'sock'), ('sock', 'trouser'))])
def test_what_cannot_be_drawn_is_said_in_one_line(cli, tmp_path, options, words):
    one_line(cli('sample', 'fashion_mnist32', '--n', 2, '--out', tmp_path/'o', *options), *words)
    assert not (tmp_path/'o').exists()

def test_classes_that_are_not_there(cli, tmp_path):
    one_line(cli('sample', 'fashion_mnist32', '--class', 'sock', '--out', tmp_path/'o'), 'sock', 'trouser')
    one_line(cli('sample', 'fashion_mnist33', '--out', tmp_path/'o'), 'fashion_mnist33', 'fashion_mnist32')
    assert not (tmp_path/'o').exists()

# --- told classes or captions ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def two_colours(tmp_path_factory):
    "A folder of two classes, dark and bright pictures, with captions in metadata.csv."
    folder, lines = tmp_path_factory.mktemp('colours')/'photos', ['file_name,text']
    for name, (low, high) in dict(dark=(0, 40), bright=(200, 256)).items():
        (folder/name).mkdir(parents=True)
        for i in range(60):
            grey = np.random.default_rng(i + low).integers(low, high, 3)
            Image.fromarray(np.tile(grey.astype(np.uint8), (32, 32, 1))).save(folder/name/f'{i}.png')
            lines.append(f'{name}/{i}.png,a {name} picture')
    (folder/'metadata.csv').write_text('\n'.join(lines))
    return folder

class Greys(Extractor):
    "A picture's features are its mean colour."
    def __init__(self): super().__init__(torch.nn.Identity(), 'grey', 'cpu')
    def embed(self, pixels): return pixels.float().mean((2, 3))/255

def judged_by_captions(r, folder, monkeypatch): # a run with a denoiser
    "Real pictures have the caption that a judge picks; samples, drawn at each guidance in the order of what they are told, mostly so."
    r.kept['judge'], train = Greys(), r.images.train_idxs
    monkeypatch.setattr(Run, 'samples', r.pipeline.pixels(16, **r.how | r.asked))
    d = r.by_guidance(folder, features(r.judge, r.images, idxs=train), train)
    assert (d['of'], d['right'], d['luck'], d['n']) == ('caption', 1, .5, 16) and min(o[3] for o in d['rows']) > .7, d
    assert (folder/'guidance.png').exists()

@pytest.mark.parametrize('kind,option', [('auto', '--class'), ('text', '--prompt')])
def test_a_run_that_is_told(cli, two_colours, tmp_path, monkeypatch, kind, option):
    "Its samples are dark where dark ones are asked for; the same command again does nothing; it can be trained further."
    folder, whole = tmp_path/'run', kind == 'auto' or 'LATENTDIFF_LONG' in os.environ   # one report is enough in `make test`
    args = '--data', two_colours, '--preset', 'tiny', '--condition', kind, '--out', folder
    for verb, given in [('run', args)] if whole else [('encode', args), ('train', [folder])]:
        r = cli(verb, *given)
        assert r.rc == 0, r.err
    assert 'nothing to do' in cli('run' if whole else 'encode', *args).out
    if kind == 'auto':   # the pictures of the report, once more
        told = json.loads((folder/'metrics.json').read_text())['told']['cond']
        r = cli('sample', folder, '--n', 64, '--bs', 64, '--class', ','.join(told), '--npz', tmp_path/'again.npz')
        assert torch.equal(npz_pixels(tmp_path/'again.npz'), npz_pixels(folder/'samples/samples.npz')), r
    for name in ('dark', 'bright'):
        asked = name if option == '--class' else f'a {name} picture'
        r = cli('sample', folder, '--n', 16, option, asked, '--npz', tmp_path/f'{name}.npz')
        assert r.rc == 0, r.err
    dark, bright = (npz_pixels(tmp_path/f'{o}.npz').float().mean() for o in ('dark', 'bright'))
    assert dark + 40 < bright, (dark, bright)
    index = json.loads((folder/'model_index.json').read_text())
    assert index['denoiser'] == ['latentdiff.conditioning', 'Conditioned'] and not (folder/'unet').exists()
    if not whole: return judged_by_captions(Run(folder, json.loads((folder/'run.json').read_text())['settings']), tmp_path, monkeypatch)
    settings = json.loads((folder/'samples'/'made.json').read_text())['settings']
    assert settings['condition'] == dict(auto='class', text='text')[kind] and settings['guidance'] == 2
    d, page = json.loads((folder/'metrics.json').read_text())['guidance'], (folder/'report.html').read_text()
    assert [o[0] for o in d['rows']] == [1, 1.5, 2, 3] and d['n'] == 64 and 'What guidance does' in page and 'caution' in page
    kids = re.findall('<td>(KID[^<]*)</td><td>([^<]*)</td>', page)   # none without its error
    assert [k for k, _ in kids] == ['KID', 'KID of real against real, the floor'] and all(re.match(r'-?\d+\.\d+ ± \d+\.\d+(,|$)', v) for _, v in kids), kids
    assert d['right'] == 1 and all(0 <= o[3] <= 1 for o in d['rows']) and 'A judge that' in page   # nothing is easier than dark and bright
    assert d['luck'] == dict(auto=None, text=.5)[kind] and ('a row a class' in page, '"asked"' in page) == (kind == 'auto', kind == 'text')
    if kind == 'text': return
    assert cli('train', folder, '--more', 5).rc == 0
    assert json.loads((folder/'denoiser'/'made.json').read_text())['settings']['steps'] == 45

def test_a_run_of_before_there_were_conditions(cli, run, tmp_path):
    "Its settings say nothing of them, and it goes on."
    folder = shutil.copytree(run.folder, tmp_path/'run')
    d = json.loads((folder/'run.json').read_text())
    del d['settings']['condition']
    (folder/'run.json').write_text(json.dumps(d))
    for verb in (('train', folder), ('run', *run.args, '--out', folder)):
        r = cli(*verb)
        assert r.rc == 0, r.err

class Told:
    "Images of which only some are labelled or have captions."
    def __init__(self, labels, captions, valid):
        self.labels, self.captions, self.classes = torch.tensor(labels), captions, [f'class {i}' for i in range(max(labels) + 1)]
        self.valid_idxs, self.train_idxs = torch.tensor(valid), torch.tensor([i for i in range(len(labels)) if i not in valid])

def told_run(tmp_path, kind, images):
    r = Run(tmp_path/'none', settings_of('rooms', 'tiny', condition=kind))
    r.kept['images'] = images
    return r

def test_kid_on_the_way_is_drawn_as_the_last_one_is(tmp_path, monkeypatch):
    "By the same sampler at the same kind of times, in fewer steps: else its last fall is the sampler's"
    r, seen = Run(tmp_path/'none', settings_of('rooms', 'cpu')), {}
    r.kept |= dict(autoencoder=None, judge=None, real=None)
    drawn = type('Drawn', (), dict(__init__=lambda self, *parts: None, pixels=lambda self, n, **how: seen.update(how)))
    monkeypatch.setattr('latentdiff.pipeline.LatentDiffusionPipeline', drawn)
    for k in ('features', 'kid'): monkeypatch.setattr(f'latentdiff.kid_eval.{k}', lambda *_: None)
    r.score(None, None)
    assert {k: seen[k] for k in ('sampler', 'spacing')} == {k: r.how[k] for k in ('sampler', 'spacing')} == dict(sampler='dpmpp_2m_sde', spacing='logsnr')
    assert seen['steps'] < r.how['steps'] and seen['seed'] == r.how['seed']

def test_samples_are_told_what_held_out_images_are(tmp_path):
    "In their shares; never a class without a picture, and captions of training pictures if those held out have none."
    images = Told([0, 1, 1, 1, -1, 3]*8, ['', ' ', 'a', '', '', '']*8, [*range(0, 48, 6), *range(1, 48, 6), *range(4, 48, 6)])
    r = told_run(tmp_path, 'class', images)
    assert sorted(r.wanted(16)) == [0]*8 + [1]*8 and r.asked['cond'] == [f'class {k}' for k in r.wanted(16)]   # by name: a number may be one
    assert set(told_run(tmp_path, 'text', images).asked['cond']) == {'a'}

def test_a_run_that_can_be_told_nothing_says_why(tmp_path, capsys, monkeypatch):
    "`--condition auto` on pictures without classes and captions"
    monkeypatch.setattr(Run, 'step_times', lambda self: (.01, .01))
    for kind, says in dict(auto='told nothing: no classes, no captions', none=None).items():
        r = told_run(tmp_path, kind, open_images('rooms', 32, n=200))
        r.images.labels = r.images.captions = None
        r.announce()
        out = capsys.readouterr().out
        assert says in out if says else ', told' not in out

class Sorted(Told):
    "A black class, then a white one, as folders by class are read"
    def __init__(self):
        super().__init__([0]*3000 + [1]*3000, None, [*range(2500), *range(3500, 6000)])
        self.channels, self.size = 3, 8
    def __len__(self): return len(self.labels)
    def pixels(self, idxs): return (255*self.labels[idxs]).byte()[:, None, None, None].expand(-1, 3, 8, 8)
    read = pixels

def test_scores_look_at_every_class_of_sorted_folders(tmp_path, monkeypatch):
    "More pictures a class than are looked at: held-out ones, the floor's and the classes a judge learns from are of both, half and half"
    from latentdiff import commands, kid_eval, report
    r = told_run(tmp_path, 'class', Sorted())
    r.kept |= dict(judge=Greys(), autoencoder=AttrDict(encode=lambda x: x, decode=lambda x: x))
    monkeypatch.setattr(commands.Run, 'samples', torch.zeros(200, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(commands.Run, 'neighbours', lambda self: None)
    monkeypatch.setattr(commands.Run, 'pipeline', AttrDict(parts=lambda: ('autoencoder', 'denoiser')))
    monkeypatch.setattr(report, 'history_of', lambda path: {})
    shown, seen = [], {}
    monkeypatch.setattr(report, 'save_png', lambda im, path: shown.append(path.name))
    monkeypatch.setattr(kid_eval, 'evaluate', lambda fake, real, judge, floor_from, seed: seen.update(real=real, floor=floor_from) or {})
    monkeypatch.setattr(report, 'by_guidance', lambda draw, judge, real, said, known, asked, listen: seen.update(labels=torch.tensor(said), known=torch.tensor(known[1])) or seen['stop'])
    with pytest.raises(KeyError): r.evaluate(tmp_path)
    assert shown == ['pairs.png', 'neighbours.png'] and len(seen['real']) == len(seen['labels']) == 2000 and len(seen['floor']) == len(seen['known']) == 200
    for o in (seen['real'].mean(1), seen['floor'].mean(1), seen['labels'], seen['known']): assert o.float().mean() == .5

def test_a_judge_of_one_class_has_no_choice(monkeypatch):
    from latentdiff import report
    monkeypatch.setattr(report, 'features', lambda judge, x: x)
    f, y = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(120, dtype=torch.int64)
    d = report.by_guidance(lambda g: f[:60], None, f, y, (f, y), [0]*60)
    assert d['right'] is None and report.guidance_curves(d).width < 400

def test_a_grid_of_many_classes(tmp_path):
    "Sixteen rows at most, though there are a hundred classes and fewer samples."
    images = Told(list(range(100))*2, None, list(range(100)))
    im = told_run(tmp_path, 'class', images).grid(torch.zeros(64, 3, 8, 8, dtype=torch.uint8))
    assert im.height < 17*120

def test_conditions_that_cannot_be(cli, two_colours, tmp_path):
    start = '--preset', 'tiny', '--out', tmp_path/'run', '--data'
    one_line(cli('run', *start, two_colours, '--condition', 'smell'), 'smell', 'auto')
    (tmp_path/'a').mkdir()
    for f in two_colours.glob('*/*.png'): shutil.copy(f, tmp_path/'a'/f'{f.parent.name}-{f.name}')
    one_line(cli('run', *start, tmp_path/'a', '--condition', 'class'), 'classes', 'folder of its own')
    one_line(cli('run', *start, tmp_path/'a', '--condition', 'text'), 'captions', 'metadata.csv')

def test_what_trains_no_denoiser_has_nothing_to_track(cli, tmp_path):
    one_line(cli('encode', '--data', 'rooms', '--preset', 'tiny', '--out', tmp_path/'run', '--track', 'tensorboard'), '--track', 'latentdiff-run')
    assert not any(tmp_path.iterdir())

def test_shards_of_a_run_may_be_asked_for_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_of('v/sh/{00..01}.tar', 'tiny')['data'] == str(tmp_path.resolve()/'v/sh/{00..01}.tar')
    for url in ('https://x.org/{00..01}.tar', 'hf://datasets/x/y/{00..01}.tar'): assert settings_of(url, 'tiny')['data'] == url
    monkeypatch.setenv('HOME', str(tmp_path)), (tmp_path/'pics').mkdir()
    for o in ('sh/{0..1}.tar', 'pics'): assert settings_of(f'~/{o}', 'tiny')['data'] == str(tmp_path.resolve()/o)
    (tmp_path/'v'/'sh').mkdir(parents=True)
    assert settings_of('hub:v/sh', 'tiny')['data'] == f'hub:{tmp_path.resolve()/"v/sh"}' and settings_of('hub:own/er', 'tiny')['data'] == 'hub:own/er'


def test_a_run_on_the_hub(tmp_path, monkeypatch):
    "Its classes are there to be told, from the column that is named; the settings keep the address as it is; a wrong column is one line."
    from datasets import ClassLabel, Dataset, Features, Image as HubImage
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    png = lambda i: (Image.new('RGB', (32, 32), (i, 99*(i % 2), 0)).save(f := io.BytesIO(), 'png'), f.getvalue())[1]
    rows = [dict(photo=dict(bytes=png(i), path=None), kind=i % 2, hour=i % 3) for i in range(120)]
    kinds = dict(photo=HubImage(), hour=ClassLabel(names=['a', 'b', 'c']), kind=ClassLabel(names=['red', 'brown']))
    (tmp_path/'set').mkdir()
    Dataset.from_list(rows, Features(kinds)).to_parquet(tmp_path/'set'/'train-00000.parquet')
    spec = f"hub:{tmp_path/'set'}?label=kind"
    s = settings_of(spec, 'tiny', n=100, condition='auto')
    r = Run(tmp_path/'run', s)
    assert s['data'] == spec and len(r.images) == 100 and r.condition == 'class' and sorted(r.images.classes) == ['brown', 'red']
    with pytest.raises(UserError, match='no column picture, only .*photo'): Run(tmp_path/'run', settings_of(f'{spec}&image=picture', 'tiny')).images
