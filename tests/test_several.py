"Two processes, as `accelerate launch` starts them, do the work of one: the same latents, losses, samples and scores."
import json, os, re, shutil, signal, socket, subprocess, sys, time
import numpy as np, pytest
from latentdiff.core import agreed, every, first_ahead, gathered, locked, share
from processes import ROOT
from test_cli import cli, command, one_line, run, weights

# Forks as many processes, tells them what `accelerate launch` tells them, and runs the command, or the code, in each. Rank 0 waits for the others and prints how they ended.
START = '''
import atexit, os, socket, sys
import latentdiff.commands as C
world, what, *args = sys.argv[1:]
with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
rank, others = 0, []
for r in range(1, int(world)):
    pid = os.fork()
    if not pid:
        rank, others = r, []
        break
    others.append(pid)
os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
def ends():
    if others: print('ENDS', *[os.waitstatus_to_exitcode(os.waitpid(others.pop(0), 0)[1]) for _ in (*others,)])
atexit.register(ends)   # a command that is stopped comes to no end but this one
sys.argv, code = [f'latentdiff-{what}', *args], 0
try: exec(what) if ' ' in what else getattr(C, f'{what}_cli')()
except SystemExit as e:
    if isinstance(e.code, str): print(e.code, file=sys.stderr)
    code = e.code if isinstance(e.code, int) else int(e.code is not None)
ends()
sys.exit(code)
'''

@pytest.fixture
def several(server, tmp_path):
    "several(2, 'train', folder) -> AttrDict(rc, out, err); `before` is code that both run first"
    script = tmp_path/'several.py'
    def start(world, what, *args, before=''):
        script.write_text(before + START)
        server.start(script, world, what, *args)
        return server
    def go(*args, **kw): return start(*args, **kw).wait()
    go.start = start
    return go

def half_done(run, tmp_path, *keep):
    "A copy of a finished run, without what was made from its autoencoder"
    made = 'latents', 'unet', 'scheduler', 'process', 'model_index.json', 'samples', 'scores', 'report.html', 'metrics.json', 'checkpoints'
    return shutil.copytree(run.folder, tmp_path/'run', ignore=shutil.ignore_patterns(*{*made} - {*keep}))

def facts(folder, part): return json.loads((folder/part/'made.json').read_text())['facts']

SLOW_DISK = '''
import time, latentdiff.commands as C
at_once = C.write_whole
def write_whole(*args):
    if not C.rank(): time.sleep(1)
    at_once(*args)
C.write_whole = write_whole
'''   # of the first process: the others must wait for what it writes
EVERY_STEP = 'from latentdiff import training\ntraining.Checkpoint.__init__.__defaults__ = (0.,)\n'   # a checkpoint after every step

def test_two_processes_killed_and_going_on_are_one_process(several, run, tmp_path):
    "Latents to the byte, the loss curve to 1e-4, samples to a grey level, and so the same KID; a death in the middle changes nothing"
    folder = half_done(run, tmp_path)
    r = several(2, 'encode', *run.args, '--out', folder)
    assert r.rc == 0 and 'ENDS 0' in r.out, r
    for f in ('latents.f16', 'mirrored.f16', 'latents3.f16', 'mirrored3.f16', 'manifest.json'): assert (folder/'latents'/f).read_bytes() == (run.folder/'latents'/f).read_bytes()
    server = several.start(2, 'train', folder, before=EVERY_STEP)
    while server.alive() and not [*folder.glob('checkpoints/unet/last*')]: time.sleep(.02)
    server.kill()
    assert server.wait().rc == -signal.SIGKILL
    r = several(2, 'run', *run.args, '--out', folder, before=SLOW_DISK)
    assert r.rc == 0 and 'ENDS 0' in r.out and 'from step' in r.out, r
    one, two = (np.array(facts(o, 'unet')['loss']) for o in (run.folder, folder))
    assert len(one) == 40 and np.abs(one - two).max() < 1e-4
    one, two = (np.load(o/'samples/samples.npz')['arr_0'].astype(int) for o in (run.folder, folder))
    assert np.abs(one - two).max() <= 2
    one, two = (facts(o, 'scores') for o in (run.folder, folder))
    assert two['kid'] == pytest.approx(one['kid'], rel=1e-3) and two['fid'] == pytest.approx(one['fid'], rel=1e-3)
    assert not [o for o in folder.rglob('*') if o.suffix in ('.part', '.new', '.old', '.making')]

SAYS = """
import atexit, pathlib, sys
def say():
    d = getattr(sys.modules.get('torch'), 'distributed', None)
    if d and d.is_initialized(): (pathlib.Path(__file__).parent/f'{d.get_rank()} of {d.get_world_size()}, {d.get_backend()}').touch()
atexit.register(say)
"""   # the sitecustomize of processes that are watched: in the end each leaves a file that says whom it has worked with

def launch(tmp_path, *verb):
    "stdout of the command that README and the lesson show, with a real launcher; a CPU has no GPUs to count, so there is a number"
    flags, = re.findall('`accelerate launch (.*) -m latentdiff train runs/mine`', (ROOT/'README.md').read_text())
    assert f'accelerate launch {flags} --num_processes 4 -m latentdiff train runs/mine' in (ROOT/'nbs/90_commands.ipynb').read_text()
    (tmp_path/'sitecustomize.py').write_text(SAYS)
    env = os.environ | dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', HF_HOME=str(tmp_path/'no settings'), CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    with socket.socket() as s:   # the oldest launcher does not know that port 0 means one that is free
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'accelerate.commands.launch', *flags.split(), '--num_processes', 2, '--main_process_port', port, '-m', 'latentdiff', *verb]
    r = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, env=env)
    said = sorted(o.name for o in tmp_path.glob('* of *'))
    assert r.returncode == 0 and said == ['0 of 2, gloo', '1 of 2, gloo'], (r, said)
    for o in said: (tmp_path/o).unlink()
    return r.stdout

def test_accelerate_launch(run, tmp_path):
    "Two processes, each of which knows the other, train as one does"
    folder = half_done(run, tmp_path, 'latents')
    launch(tmp_path, 'train', folder)
    one, two = (np.array(facts(o, 'unet')['loss']) for o in (run.folder, folder))
    assert len(one) == len(two) == 40 and np.abs(one - two).max() < 1e-4

@pytest.mark.skipif('LATENTDIFF_LONG' not in os.environ, reason='one command is enough in `make test`')
def test_accelerate_launch_of_other_commands(cli, run, tmp_path):
    "Latents and samples are those of one process to the byte, and only one process says something"
    folder, how = half_done(run, tmp_path), ('--n', 6, '--bs', 2, '--steps', 2, '--npz')
    launch(tmp_path, 'encode', *run.args, '--out', folder)
    for f in ('latents.f16', 'mirrored.f16', 'latents3.f16', 'mirrored3.f16', 'manifest.json'): assert (folder/'latents'/f).read_bytes() == (run.folder/'latents'/f).read_bytes()
    assert launch(tmp_path, 'sample', run.folder, *how, tmp_path/'two.npz').count('6 images into') == 1
    assert cli('sample', run.folder, *how, tmp_path/'one.npz').rc == 0
    one, two = (np.load(tmp_path/f'{k}.npz')['arr_0'] for k in ('one', 'two'))
    assert (one == two).all()

LEARN = '''
import torch
from latentdiff.autoencoder import KLAutoencoder, ae_learner
from latentdiff.training import fit_steps
torch.manual_seed(0)
x = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
learn = fit_steps(ae_learner(KLAutoencoder(3, (8, 16), 2), x, x[:16], bs=8, kl_weight=1.), 12, rounds=2)
if not rank: print([float(o) for o in learn.recorder.losses], [r[1:4] for r in learn.history['rows']])
'''

def test_noise_that_a_network_draws_is_shared_out_too(several):
    "An autoencoder draws from its posterior while it trains: in two processes it draws what it draws in one"
    one, two = (eval('[' + next(o for o in several(w, LEARN).out.splitlines() if o[:1] == '[').replace('] [', '], [') + ']') for w in (1, 2))
    for a, b in zip(one, two): np.testing.assert_allclose(a, b, rtol=1e-4)

SICK = '''
import torch
from latentdiff.noisify import Process
from latentdiff.unet import UNet, train_denoiser
z = torch.randn(64, 2, 8, 8)
if rank: z *= float('inf')
C.one_line_errors(lambda: train_denoiser(UNet(2, widths=(8, 16), groups=4), Process('flow', 'velocity'), z, z, 8, bs=8))()
'''

def test_what_is_not_finite_in_one_process_stops_all(several):
    r = several(2, SICK)
    assert r.rc == 1 and 'ENDS 1' in r.out and r.err.count('\n') == 1 and 'not a finite number' in r.err, r

def test_two_processes_begin_a_run(several, tmp_path):
    "The others ask for run.json only when the first has written it"
    slow = 'import time, latentdiff.commands as C\nwrite = C.Run.write\nC.Run.write = lambda run, *more: (C.rank() or time.sleep(1), write(run, *more))\n'
    r = several(2, 'run', '--data', 'rooms', '--preset', 'tiny', '--n', 120, '--ae-steps', 2, '--steps', 2, '--out', tmp_path/'run', before=slow)
    assert r.rc == 0 and 'ENDS 0' in r.out and (tmp_path/'run'/'report.html').exists(), r

def test_a_batch_that_cannot_be_shared(several, run, tmp_path):
    r = several(3, 'train', half_done(run, tmp_path, 'latents'))
    assert 'ENDS 1 1' in r.out
    one_line(r, '3 processes cannot share a batch of 64')

REFUSED = """
import os
from collections import namedtuple
from dataclasses import replace
from latentdiff import core, data, disk
from latentdiff.autoencoder import KLAutoencoder, make_autoencoder
from latentdiff.noisify import make_latents
def full(*_):
    assert not rank, 'only the first process asks'
    raise OSError(28, 'No space left on device')
def nearly(path):
    assert not rank, 'only the first process asks'
    return namedtuple('Usage', 'total used free')(10, 5, 1000)
images, p, folder = data.open_images('rooms', 16, 60), replace(core.preset('tiny'), size=16, ae_steps=3, ae_widths=(8,), bs=8), args[1]
if args[0] == 'reserve': os.posix_fallocate = full
else: disk.shutil.disk_usage = nearly
do = dict(reserve=lambda: make_latents(folder, images, KLAutoencoder(3, (8, 8)).eval(), p), enough=lambda: make_autoencoder(folder, images, p, device='cpu'))
C.one_line_errors(do[args[0]])()
"""

@pytest.mark.parametrize('how,says', [('reserve', 'cannot be written (No space left on device; '), ('enough', 'The training needs')])
def test_a_disk_that_is_full_stops_all_alike(several, tmp_path, how, says):
    "The first process asks, and the others, which wait for it, hear what it was told"
    r = several(2, REFUSED, how, tmp_path)
    assert 'ENDS 1' in r.out
    one_line(r, says)

def test_a_folder_where_another_works_is_refused_to_all(several, run, tmp_path):
    folder = half_done(run, tmp_path)
    with locked(folder): r = several(2, 'encode', *run.args, '--out', folder)
    assert 'ENDS 1' in r.out
    one_line(r, 'another process works in')

SIGNALLED = """
import os, signal
sys.argv[0] = 'latentdiff-train'
def train_cli():
    if args[0] == 'SIGINT' or rank: os.kill(os.getpid(), getattr(signal, args[0]))
C.one_line_errors(train_cli)()
"""

@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_to_several_processes(several, name):
    "Ctrl-C reaches all, and the first one says so; what a launcher sends ends a process at once, even while it waits for the others"
    r = several(2, SIGNALLED, name)
    if name == 'SIGINT': assert r.rc == 130 and 'ENDS 130' in r.out and r.err == 'stopped: what is finished is kept, and the same command goes on from there\n', r
    else: assert r.rc == 0 and f'ENDS -{getattr(signal, name):d}' in r.out and not r.err, r

DESERTED = """
import os, signal
from latentdiff.core import agreed
def train_cli():
    agreed()
    if rank == int(args[0]): os.kill(os.getpid(), signal.SIGKILL)
    agreed()
C.one_line_errors(train_cli)()
"""

@pytest.mark.parametrize('dead', [0, 1])
def test_the_death_of_one_process_is_one_line_of_the_other(several, dead):
    "Killed by the system, say; whoever is left says so, even where the first one, which speaks for all, has gone"
    server = several.start(2, DESERTED, dead)
    r, end = server.wait(), time.monotonic() + 60
    while not r.err and time.monotonic() < end:             # nobody waits for the second process if the first is killed
        time.sleep(.1)
        r.err = (server.tmp/'err').read_text()
    if dead: assert r.rc == 1 and f'ENDS -{signal.SIGKILL:d}' in r.out, r
    assert r.err == 'latentdiff-train: another of the 2 processes has ended: what is finished is kept, and the same command goes on from there\n', r

METRICS = '''
import torch
from torcheval.metrics.toolkit import get_synced_metric
from latentdiff.core import agreed, first_ahead, gathered, share
from latentdiff.kid_eval import FID, KID, kid, features
agreed()
torch.manual_seed(0)
a, b = torch.randn(40, 6), torch.randn(30, 6) + .3
k, f = KID(), FID()
for m in (k, f): m.update(a[rank::2], real=True).update(b[rank::2], real=False)
one, two = FID().update(a, real=True).update(b, real=False).compute(), get_synced_metric(f).compute()
assert torch.allclose(torch.stack(get_synced_metric(k).compute()), torch.tensor(kid(a, b), dtype=torch.float64), rtol=1e-9)
assert abs(one - two) < 1e-9*one
px = torch.randint(256, (11, 3, 4, 4), dtype=torch.uint8)
mean = lambda px: px.float().mean((2, 3))
for bs in (1, 2, 4, 8, 16): assert features(mean, px, bs=bs).equal(mean(px))
assert agreed(rank) == 0 and gathered([o + 1 for o in share(range(5))]) == [1, 2, 3, 4, 5] and gathered([*share('a')]) == ['a']
order = []
with first_ahead(): order.append(__import__('time').monotonic())
assert (agreed(order) <= order)
'''

def test_metrics_and_work_of_two_processes(several):
    "torcheval merges KID and FID to what one process computes from all features; shares come back in order"
    r = several(2, METRICS)
    assert r.rc == 0 and 'ENDS 0' in r.out, r

def test_one_process_alone_shares_with_nobody():
    assert every(3) == [3] and agreed(3) == 3 and [*share('abc')] == ['a', 'b', 'c'] == gathered(['a', 'b', 'c'])
    with first_ahead(): pass

def test_a_call_that_is_wrong_is_told_once():
    "By the first of two processes"
    env = dict(os.environ, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    found = [subprocess.run([sys.executable, '-m', 'latentdiff', 'sample', '--bogus'], env=dict(env, RANK=r, LOCAL_RANK=r), capture_output=True, text=True) for r in '01']
    assert [o.returncode for o in found] == [2, 2] and 'error: ' in found[0].stderr and not found[1].stderr, found
