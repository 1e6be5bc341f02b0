"Killed, stopped, starved of disk: what is finished is kept, what is half done is never taken for the whole, and the same command goes on."
import errno, json, os, random, secrets, shutil, signal, subprocess, sys, threading, time
import numpy as np, pytest, torch
from filelock import FileLock
from pathlib import Path
from fastcore.basics import AttrDict
from latentdiff import checks, core, disk
from latentdiff.checks import not_finite
from latentdiff.core import *
from latentdiff.disk import *

LONG = 'LATENTDIFF_LONG' in os.environ
STAGES = 'download', 'unpack', 'start', 'autoencoder', 'encoding', 'denoiser', 'samples', 'to a folder', 'evaluation'
posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

# --- SIGKILL

@pytest.fixture(scope='session')
def deaths(server, shared):
    "What `deaths.py` found, by stage: made by one worker, read by each"
    said, n, seed = shared/'deaths.json', 20 if LONG else 3, secrets.randbelow(10**6) if LONG else 0
    with FileLock(shared/'deaths.lock'):
        if not said.exists():
            (shared/'deaths').mkdir()
            r = server.run(Path(__file__).with_name('deaths.py'), shared/'deaths', n, seed)
            assert r.rc == 0, (seed, r.err)
            said.write_text(json.dumps(dict(seed=seed, err=r.err, **json.loads(r.out.splitlines()[-1]))))
    return AttrDict(n=n, **json.loads(said.read_text()))

@posix
@pytest.mark.parametrize('stage', STAGES)
def test_killed_at_any_write_and_called_again(deaths, stage):
    "The next call ends with the bytes of a run that was left in peace, and nothing half made is left. With LATENTDIFF_LONG=1 each time at other places"
    d = AttrDict(deaths[stage])
    assert len({(at, half) for at, half, *_ in d.kills}) >= min(deaths.n, d.possible), (stage, len(d.kills))
    for at, half, killed, again, differs, left in d.kills:
        where = f'{stage}, at {at} of {d.places}{", half written"*half}; deaths.py FOLDER {deaths.n} {deaths.seed}'
        assert killed == -signal.SIGKILL and not differs and not left, (where, differs, left, deaths.err)
        assert again == (stage == 'to a folder' and at == d.places), where   # killed when all was in place: it says so

def test_only_what_nobody_is_at_is_cleared_away(tmp_path):
    "Left by a dead process of this machine, or moved out of the way by any; not what a living one writes, nor one of another machine that sees the same disk, unless a day went by"
    path, (here, me) = tmp_path/'a', disk._beside(tmp_path/'a', 'part').name.split('.')[2].split('-')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    assert int(me) == os.getpid() and here != '0'*8
    for writer, kinds in ((f'{here}-{dead.pid}', ('part', 'new', 'old')), (f'{here}-{me}', ('part',)), (f'{"0"*8}-{dead.pid}', ('part', 'old')), ('123', ('part',))):
        for kind in kinds: (tmp_path/f'.a.{writer}.{kind}').write_text('half')
    (tmp_path/f'.ab.{here}-{dead.pid}.part').write_text('of another file')
    for kind in ('part', 'new'): (tmp_path/f'.a.{"f"*8}-{me}.{kind}').write_text('half, two days ago, elsewhere'), os.utime(tmp_path/f'.a.{"f"*8}-{me}.{kind}', (time.time() - 2*86400,)*2)
    for o in ('.a.backup.old', '.a.2025.old', '.a.old'): (tmp_path/o).write_text("the user's own")
    inside = [f'.{o}.{here}-{dead.pid}.part' for o in ('b', 'c.png')], [f'.b.{here}-{me}.part', f'.b.{here}-{dead.pid}.new', '.b.x.part', 'b']
    (path/'deep').mkdir(parents=True)
    for o in [*inside[0], *inside[1], f'deep/{inside[0][0]}']: (path/o).write_text('half')
    clear_away(path, 'part', 'old')
    assert {o.name for o in path.rglob('*')} == {*inside[1], 'deep'}
    shutil.rmtree(path)
    stays = {f'.a.{"f"*8}-{me}.new', f'.a.{here}-{dead.pid}.new', f'.a.{here}-{me}.part', f'.a.{"0"*8}-{dead.pid}.part', '.a.123.part', f'.ab.{here}-{dead.pid}.part', '.a.backup.old', '.a.2025.old', '.a.old'}
    assert {o.name for o in tmp_path.iterdir()} == stays

# --- signals

HANDED = """
import atexit, os, signal, sys, time
sys.argv[0] = sys.argv[0].replace('program.py', 'latentdiff-train')
from latentdiff import core, commands
from latentdiff.core import write_whole
how, name, folder = sys.argv[1], sys.argv[2], sys.argv[3]
n, me = getattr(signal, name), os.getpid()
if how == 'ignored': signal.signal(n, signal.SIG_IGN)

@commands.one_line_errors
def train_cli():
    if how == 'import':                                    # something that swallows whatever is raised while it is imported
        with open(folder + '/swallows.py', 'w') as f: f.write(f'import os\\ntry: os.kill({me}, {int(n)})\\nexcept BaseException: pass\\n')
        sys.path.insert(0, folder)
        import swallows
        return
    with core.whole_folder(folder + '/a') as new:
        write_whole(new/'x', 'half')
        try:
            os.kill(me, n)
            time.sleep(0)
        finally:
            if how == 'twice': os.kill(me, n)
    if how == 'after': os.kill(me, n)

if how == 'late': atexit.register(os.kill, me, n)
train_cli()
"""

@posix
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
@pytest.mark.parametrize('how', ['once', 'twice', 'late', 'import'])
def test_a_signal_is_one_line_and_its_code(server, tmp_path, how, name):
    "In the middle, twice, while the process ends already, and in an import that swallows it; what was half made is cleared away, unless it was asked twice"
    r = server.code(HANDED, how, name, tmp_path)
    assert r.rc == 128 + getattr(signal, name), r
    assert r.err == 'stopped: what is finished is kept, and the same command goes on from there\n', r.err
    if how in ('once', 'late'): assert not [*tmp_path.iterdir()]
    assert not (tmp_path/'a').exists()

ENDS = """
import atexit, os, signal, sys
sys.argv[0] = 'latentdiff-train'
from latentdiff.disk import one_line_errors
class Garbage:                                             # which only a collector finds
    def __init__(self): self.me = self
    def __del__(self): os.write(1, b'collected')
@one_line_errors
def train_cli():
    atexit.register(print, 'left')
    sys.stdout.write('begun, ')
    Garbage()
    os.kill(os.getpid(), signal.SIGTERM)
train_cli()
"""

@posix
def test_a_command_that_was_stopped_ends_at_once():
    "In a process of its own: what it has printed comes out, and what others have asked for at the end is done, but no garbage is collected, for seconds after a training"
    r = subprocess.run([sys.executable, '-c', ENDS], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(core.__file__).parents[1])))
    assert r.returncode == 143 and r.stdout == 'begun, left\n' and r.stderr.startswith('stopped') and r.stderr.count('\n') == 1, r

@posix
def test_what_nohup_ignores_stays_ignored(server, tmp_path):
    r = server.code(HANDED, 'ignored', 'SIGHUP', tmp_path)
    assert r.rc == 0 and not r.err and (tmp_path/'a'/'x').read_text() == 'half'

EARLY = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsys.argv = ['/bin/latentdiff-run', '--help']\n{}\nimport latentdiff.commands"

@posix
def test_ctrl_c_while_the_command_itself_is_imported():
    "Two processes of their own: numpy kills the command that imports it; where no command runs, Ctrl-C is Python's own"
    poison = "class Finder:\n    def find_spec(self, name, *_):\n        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Finder())"
    env = os.environ | dict(PYTHONPATH=str(Path(core.__file__).parents[1]))
    run = lambda code: subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    r = run(EARLY.format(poison))
    assert r.returncode == 130 and r.stderr.count('\n') == 1 and r.stderr.startswith('stopped'), r.stderr
    r = run(EARLY.format(poison).replace('/bin/latentdiff-run', 'python'))
    assert 'KeyboardInterrupt' in r.stderr

# --- a full disk

SMALL = """
import ctypes, json, os, resource, sys, warnings
from pathlib import Path
from dataclasses import replace
from latentdiff import commands, core, data, files, noisify, report, training
from latentdiff.disk import new_place
import torch
warnings.simplefilter('ignore')

def small_disk(where, size):
    "A file system of so many bytes at `where`, of this process alone; False where that is not allowed"
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000): return False          # a namespace of users, and one of mounts
    for name, text in (('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'), ('gid_map', f'0 {gid} 1')): Path('/proc/self', name).write_text(text)
    return not libc.mount(b'none', str(where).encode(), b'tmpfs', 0, f'size={size},nr_inodes=1000'.encode())

class Ballast:
    "A file that takes what room is left"
    def __init__(self, disk): self.path = Path(disk)/'ballast'
    def __call__(self, leave=0):
        with open(self.path, 'ab', buffering=0) as f:
            for block in (1 << 16, 4096, 1):
                try:
                    while f.write(bytes(block)) == block: pass
                except OSError: pass
        os.truncate(self.path, max(0, self.path.stat().st_size - leave))
    def away(self): self.path.unlink()

def said(do):
    try: do()
    except core.UserError as e: return f'{type(e).__name__} {e}'
    return 'nothing'

disk, what = Path(sys.argv[1]), sys.argv[2]
if not small_disk(disk, 20 << 20):
    print('not allowed')
    sys.exit()
os.environ['LATENTDIFF_DATA'] = str(disk/'home')
fill, images, p = Ballast(disk), data.open_images('rooms', 16, n=60), core.preset('tiny')
names = lambda: sorted(o.relative_to(disk).as_posix() for o in disk.rglob('*') if o.name not in ('.lock', 'ballast', 'making.json') and not o.is_dir())

def checkpoint():
    keep = training.Checkpoint(disk/'checkpoints', 'this')
    keep.save('last', dict(x=torch.ones(300_000)), dict(k=1, steps=2))
    fill(500_000)
    yield said(lambda: keep.save('last', dict(x=torch.zeros(300_000)), dict(k=2, steps=2)))
    assert keep.note('last')['k'] == 1                             # the one before is whole
    fill.away()
    keep.save('last', dict(x=torch.zeros(300_000)), dict(k=2, steps=2))
    assert keep.note('last')['k'] == 2

class Encoder(torch.nn.Module):
    "Large latents, at once"
    config, weight = {}, torch.nn.Parameter(torch.zeros(1))
    def latent_shape(self, size): return 4, 96, 96
    def parameters(self): return iter([self.weight])
    def encode(self, x): return torch.randn(len(x), 4, 96, 96)

def encoding():
    ae = Encoder()
    fill(3_000_000)
    yield said(lambda: noisify.make_latents(disk/'run', images, ae, p, flip=False))
    fill.away()
    assert len(noisify.make_latents(disk/'run', images, ae, p, flip=False)) == 60

def pngs():
    px = (torch.rand(300, 32, 32, 3)*255).byte().numpy()
    fill(200_000)
    yield said(lambda: commands.write_pngs(disk/'pngs', px))
    fill.away()
    commands.write_pngs(disk/'pngs', px)
    assert len([*(disk/'pngs').iterdir()]) == 300

def unpack():
    import io, tarfile
    archive = Path(sys.argv[3])
    with tarfile.open(archive, 'w:gz') as t:
        m = tarfile.TarInfo('a.bin')
        m.size = 3_000_000
        t.addfile(m, io.BytesIO(bytes(m.size)))
    fill(1_000_000)
    yield said(lambda: files.unpacked(archive))
    fill.away()
    assert (files.unpacked(archive)/'a.bin').stat().st_size == 3_000_000

def download():
    url, path = sys.argv[3], disk/'home'/'a.bin'
    fill(1_500_000)
    yield said(lambda: files.download(url, path))
    fill.away()
    assert files.download(url, path).stat().st_size == 3_000_000

def page():
    (disk/'run').mkdir()
    write = lambda: core.write_whole(disk/'run'/'report.html', 'x'*400_000)
    fill(100_000)
    yield said(write)
    fill.away()
    write()

def many():
    (disk/'run').mkdir()
    for i in range(1000):
        try: (disk/f'.{i}').touch()
        except OSError: break
    yield said(lambda: core.write_json(disk/'run'/'a.json', {}))
    for o in disk.glob('.[0-9]*'): o.unlink()
    core.write_json(disk/'run'/'a.json', {})

def closed():
    os.mkdir(disk/'run')
    libc = ctypes.CDLL(None)
    libc.mount(None, str(disk).encode(), None, 0x20 | 1, None)     # again, and only to be read
    yield said(lambda: core.artefact(disk/'run'/'a', lambda o: {}, {}, {})) + said(lambda: new_place(disk/'run'/'b', '--out'))

steps = globals()[what]()
before, line = names(), next(steps)
after = names()
for _ in steps: pass
print(json.dumps(dict(line=line, before=before, after=after, end=names())))
"""

CONTENT = random.Random(0).randbytes(3_000_000)

class Source:
    "A server of one file, in parts if asked, that names its size only if told to"
    def __init__(self, says):
        import http.server
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                at = int(self.headers['Range'][6:-1]) if self.headers['If-Range'] == '"v1"' else 0
                self.send_response(206 if at else 200)
                self.send_header('ETag', '"v1"')
                if at: self.send_header('Content-Range', f'bytes {at}-{len(CONTENT) - 1}/{len(CONTENT)}')
                if says: self.send_header('Content-Length', str(len(CONTENT) - at))
                self.end_headers()
                try: self.wfile.write(CONTENT[at:])
                except OSError: pass
            def log_message(self, *args): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}/a.bin'

NO_DISK = 'no small disk can be mounted here'   # the one reason, so that skips can be counted
linux = pytest.mark.skipif(sys.platform != 'linux', reason=NO_DISK)

def on_small_disk(server, tmp_path, what, *args):
    (tmp_path/'disk').mkdir()
    r = server.code(SMALL, tmp_path/'disk', what, *args)
    if r.out.strip() == 'not allowed': pytest.skip(NO_DISK)
    assert r.rc == 0, r.err
    return AttrDict(json.loads(r.out.splitlines()[-1]))

@linux
@pytest.mark.parametrize('what,says', [('checkpoint', '1.2 MB to be written'), ('encoding', '4.4 MB to be written'), ('pngs', ' kB free in'), ('unpack', 'LATENTDIFF_DATA'), ('page', '0.4 MB to be written'),
    ('many', 'no more files are free in')])
def test_a_full_disk_is_one_line_and_after_room_was_made_it_goes_on(server, tmp_path, what, says):
    "How much, where, and what to set; nothing half-written stays, and what was whole is whole"
    d = on_small_disk(server, tmp_path, what, tmp_path/'a.tgz')
    assert d.line.startswith('DiskError') and '\n' not in d.line and says in d.line, d.line
    assert ('LATENTDIFF_DATA' if what == 'unpack' else 'LATENTDIFF_RUNS') in d.line and str(tmp_path/'disk') in d.line and 'make room' in d.line
    assert not [o for o in d.after + d.end if any(k in o for k in ('.part', '.new', '.old'))] and d.end

@linux
@pytest.mark.parametrize('says', [True, False])
def test_a_download_for_which_there_is_no_room(server, tmp_path, says):
    "Where the server names the size, nothing is fetched; where it does not, what came is kept, and a later call ends well"
    source = Source(says)
    d = on_small_disk(server, tmp_path, 'download', source.url)
    assert d.line.startswith('DiskError') and 'LATENTDIFF_DATA' in d.line and str(tmp_path/'disk') in d.line, d.line
    if says: assert '3.0 MB of disk' in d.line and '1.5 MB are free' in d.line and d.after == []
    assert d.end == ['home/a.bin']

@linux
def test_where_only_reading_is_allowed(server, tmp_path):
    d = on_small_disk(server, tmp_path, 'closed')
    assert d.line.count('cannot be written (Read-only file system)') == 2 and '--out' in d.line, d.line

def test_a_place_in_a_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    (tmp_path/'here').rmdir()
    with pytest.raises(UserError, match='x cannot be written .*: choose another place'):
        with disk.on_disk(Path('x'), more=disk.NOWHERE): Path('x').mkdir()
    with pytest.raises(UserError, match='the current folder is gone: go to one'): disk.enough('x', 'y', disk=1)

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='needs posix_fallocate')
def test_a_file_gets_its_room_and_keeps_what_it_holds(tmp_path, monkeypatch):
    "Not opened to append: where a file system cannot reserve, the C library writes instead, and refuses that for such a file"
    import fcntl
    reserve, give = disk.reserve, os.posix_fallocate
    def checked(fd, *where):
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        give(fd, *where)
    monkeypatch.setattr(os, 'posix_fallocate', checked)
    reserve(tmp_path/'new', 100_000)
    assert (tmp_path/'new').stat().st_size == 100_000 and (tmp_path/'new').stat().st_blocks*512 >= 100_000
    (tmp_path/'old').write_bytes(b'done')
    reserve(tmp_path/'old', 10)
    assert (tmp_path/'old').read_bytes() == b'done' + bytes(6)

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='needs posix_fallocate')
@pytest.mark.parametrize('size,taken', [(10**15, 0), (9_000_000, 5_000_000)], ids=['more than there is', 'more than is found'])
def test_a_disk_that_has_no_room_for_a_file_is_not_filled(tmp_path, monkeypatch, size, taken):
    "More than is free is not even tried; ext4 keeps what it has found when there is not enough, and the file gives that back"
    def give(fd, at, size):
        os.ftruncate(fd, taken)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', give if taken else lambda *o: pytest.fail('tried'))
    for had in (b'', b'done'):
        (tmp_path/'x').write_bytes(had)
        assert 'to be written' in one_line(lambda: disk.reserve(tmp_path/'x', size)) and (tmp_path/'x').read_bytes() == had

# --- before the work

def one_line(do):
    with pytest.raises((UserError, SystemExit)) as e: do()
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)

@pytest.mark.parametrize('where', ['x'*300, '/proc/x', '/proc/x/y', 'x'*250, 'file/x', 'file', 'x/'*2000])
def test_where_nothing_can_be_written_is_found_at_once(tmp_path, where):
    "A name that is too long, or too long with what a half-written file has more; a system's own folder; below a file"
    (tmp_path/'file').write_text('mine')
    said = one_line(lambda: new_place(tmp_path/where, '--out'))
    assert '--out' in said and [o.name for o in tmp_path.iterdir()] == ['file'] and (tmp_path/'file').read_text() == 'mine'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or not os.geteuid(), reason='nothing is closed to root')
def test_a_folder_that_may_only_be_read_is_found_at_once(tmp_path):
    tmp_path.chmod(0o555)
    assert 'Permission denied' in one_line(lambda: new_place(tmp_path/'x', '--out'))

@pytest.mark.parametrize('out,npz', [('x', 'x'), ('x', 'x/a.npz'), ('x/pngs', 'x'), ('x', 'y/../x'), ('x', './x')])
def test_one_place_for_two_things_is_refused(tmp_path, out, npz, monkeypatch):
    "Before the pipeline is even looked for: there is none of this name"
    from latentdiff.commands import sample_cli
    monkeypatch.chdir(tmp_path)
    said = one_line(lambda: sample_cli.__wrapped__('no such run', out=out, npz=npz))
    assert 'a place of its own' in said and '--out' in said and '--npz' in said and not [*tmp_path.iterdir()]

def test_what_is_refused_later_leaves_no_folder(tmp_path, monkeypatch):
    "Folders to write in are tried out, and made when there is something to put into them"
    from latentdiff.commands import sample_cli, write_npz
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine').mkdir()
    assert 'no such run' in one_line(lambda: sample_cli.__wrapped__('no such run', out='a/b/c', npz='mine/d/e.npz'))
    assert [*tmp_path.rglob('*')] == [tmp_path/'mine']
    write_npz(tmp_path/'a'/'b'/'e.npz', np.zeros((1, 8, 8, 3), np.uint8), put_beside)
    assert (tmp_path/'a'/'b'/'e.npz').exists()

def test_places_beside_each_other_are_fine(tmp_path):
    new_places(out=tmp_path/'a', npz=tmp_path/'a.npz', other=None)
    assert not [*tmp_path.iterdir()]

ESTIMATES = """
import json, sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from latentdiff import autoencoder, commands, core, data, disk
folder, said = Path(sys.argv[1]), {}
def what(name, do):
    try: do()
    except (core.UserError, SystemExit) as e: said[name] = str(e)
    said[name + ' left'] = [o.name for o in folder.rglob('*') if o.is_file() and o.name not in ('.lock', 'making.json')]
disk.free_memory = lambda: 1e6
what('run', lambda: commands.Run(folder/'run', core.settings_of('rooms', 'tiny', size=16, n=120)).go())
disk.shutil.disk_usage = lambda path: namedtuple('Usage', 'total used free')(10, 5, 1000)
what('draw', lambda: commands.sample_cli.__wrapped__('fashion_mnist32', n=10**7, npz=str(folder/'a.npz')))
p, images = replace(core.preset('tiny'), size=16, ae_steps=3, ae_widths=(8,), bs=8), data.open_images('rooms', 16, 60)
what('train', lambda: autoencoder.make_autoencoder(folder/'ae', images, p, device='cpu'))
print(json.dumps(said))
"""

def test_disk_and_memory_are_asked_for_before_a_stage(server, tmp_path):
    "In one line with the figures, before anything is written"
    r = server.code(ESTIMATES, tmp_path)
    assert r.rc == 0, r.err
    said = json.loads(r.out.splitlines()[-1])
    assert 'Drawing 10,000,000 images needs 30.7 GB of disk, and 1 kB are free' in said['draw'], said['draw']
    assert 'This run needs' in said['run'] and 'of memory, and 1.0 MB are free' in said['run']
    assert 'The training needs' in said['train'] and 'of disk, and 1 kB are free' in said['train']
    assert not any(said[k] for k in said if k.endswith(' left')) and not any('\n' in said[k] for k in ('draw', 'run', 'train'))

# --- two at once

TWICE = """
import os, sys
from pathlib import Path
from latentdiff import files
url, path, archive = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
begun, tell = os.pipe()

class Telling(files.FileLock):
    "Tells the first process that the second one has come to the door"
    def acquire(self, *args, **kw):
        os.write(tell, b'x')
        return super().acquire(*args, **kw)

def second(do):
    "Another process that does the same; returns when it waits, or is done"
    pid = os.fork()
    if pid:
        os.close(tell)
        os.read(begun, 1)
        return pid
    files._arriving = arriving
    files.FileLock = Telling
    try: do()
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

pids = []
arriving = files._arriving
def halfway(response):
    for i, o in enumerate(arriving(response)):
        yield o
        if i == 0: pids.append(second(lambda: files.download(url, path)))
files._arriving = halfway
files.download(url, path)
assert os.waitpid(pids[0], 0)[1] == 0

begun, tell = os.pipe()
members = files._members
def slowly(archive):
    for i, o in enumerate(members(archive)):
        yield o
        if i == 0:
            files._members = members
            pids.append(second(lambda: files.unpacked(archive)))
            assert os.waitpid(pids[1], 0)[1] == 0
            kept.append(os.stat(next(folder() .rglob('*.bin'))).st_ino)
kept, folder = [], lambda: next(o for o in Path(os.environ['LATENTDIFF_DATA']).iterdir() if o.name[0] != '.')
files._members = slowly
files.unpacked(archive)
print(len([*folder().rglob('*.bin')]), os.stat(next(folder().rglob('*.bin'))).st_ino == kept[0])
"""

@posix
def test_two_downloads_of_one_file_are_both_right(server, tmp_path):
    "The second begins when half is there of the first, which goes on with an older half; of two that unpack an archive, neither takes away the folder that the other reads"
    import io, tarfile
    source = Source(True)
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'a.bin.part').write_bytes(CONTENT[:500_000])
    (tmp_path/'d'/'a.bin.part.tag').write_text('"v1"')
    with tarfile.open(tmp_path/'a.tgz', 'w:gz') as t:
        for i in range(3):
            m = tarfile.TarInfo(f'{i}.bin')
            m.size = 1000
            t.addfile(m, io.BytesIO(bytes(1000)))
    r = server.code(TWICE, source.url, tmp_path/'d'/'a.bin', tmp_path/'a.tgz', LATENTDIFF_DATA=str(tmp_path/'home'), seconds=60)
    assert r.rc == 0 and r.out.split()[-2:] == ['3', 'True'], r
    assert (tmp_path/'d'/'a.bin').read_bytes() == CONTENT and not [*(tmp_path/'d').glob('*part*')]

@posix
def test_a_lock_of_a_dead_process_keeps_nobody_out(server, tmp_path):
    r = server.code('import os, signal, sys\nfrom latentdiff.core import locked\nwith locked(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)', tmp_path)
    assert r.rc == -signal.SIGKILL and (tmp_path/'.lock').exists()
    with locked(tmp_path): pass

# --- what is not finite

def test_a_training_that_diverged_goes_on_at_a_lower_rate_when_asked(tmp_path, capsys):
    "Its last good checkpoint is kept; the message names step and cause"
    from test_training import Poison, quiet, small_learner, state, trained
    from latentdiff.training import Checkpoint
    keep = Checkpoint(tmp_path, 'this', every=0)
    with pytest.raises(UserError, match='training Sequential stopped at step 13: .*the training diverged, so train again at a lower rate than 0.05'):
        trained('plain', keep, cbs=Poison('loss', 13))
    learn = quiet(small_learner(), steps=40, lr=.01, checkpoint=keep)
    assert 'from step 13 on' in capsys.readouterr().out and not not_finite(state(learn))
    late = Checkpoint(tmp_path/'late', 'this', every=0)   # its checkpoint is of weights that were ruined already
    for k, says in ((13, 'lower rate than 0.05;'), (14, f'lower rate than 0.05, or, if no rate is low enough, delete {tmp_path}/late;')):
        with pytest.raises(UserError, match=says): trained('plain', late, cbs=Poison('loss', k))

def test_float16_that_overflows_is_told_from_divergence():
    "Mixed precision in float16, on the CPU: an activation of 100,000 is infinite there, and finite in float32"
    import torch
    from fastai.basics import Callback
    from test_training import quiet, small_learner
    class MixedPrecision(Callback):
        order = 10
        def before_fit(self): self.autocast = torch.autocast('cpu', torch.float16)
        def before_batch(self): self.autocast.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.autocast.__exit__(None, None, None)
        def after_cancel_fit(self): pass
    for value, says in ((1e5, 'float16 overflowed, and in float32 it is finite'), (float('nan'), 'the training diverged')):
        learn = small_learner(MixedPrecision())
        learn.model[-1].bias.data[:] = value
        with pytest.raises(UserError, match=says): quiet(learn, steps=4)
        while torch.is_autocast_enabled('cpu'): learn.mixed_precision.autocast.__exit__(None, None, None)

def test_a_training_that_overfits_says_whose_weights_are_kept(capsys):
    from test_training import quiet, small_learner
    import torch
    learn = small_learner(n=12, noise=0.)
    x, y = learn.dls.train.dataset.tensors
    learn.dls.train.dataset = torch.utils.data.TensorDataset(x, torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))   # nothing to be learnt from
    quiet(learn, steps=100, lr=.05, keep_best=True)
    at = learn.history['best'][0]
    assert at < 100 and f'the weights of step {at} of 100 are kept' in capsys.readouterr().out
    assert learn.history['best'][1] == min(r[2] for r in learn.history['rows'])

def test_a_denoiser_that_diverged_goes_on_at_a_lower_rate_in_its_run(tmp_path, monkeypatch, capsys):
    "The same command stops where it stopped; with --lr it goes on from its last good checkpoint, and a finished training is left alone"
    from dataclasses import replace
    from latentdiff import commands, training
    monkeypatch.setattr(training.Checkpoint.__init__, '__defaults__', (0.,))
    monkeypatch.setitem(core.PRESETS, 'tiny', replace(core.PRESETS['tiny'], ae_widths=(16,), widths=(16, 32), bs=16))
    usual = training.StepByStep.before_backward
    def poisoned(self):
        if type(self.model).__name__ == 'UNet' and self.k == 8 and self.peak > 5e-4: self.learn.loss_grad = self.learn.loss_grad*float('nan')
        usual(self)
    monkeypatch.setattr(training.StepByStep, 'before_backward', poisoned)
    def go(**kw):
        r = commands.Run(tmp_path/'run', settings_of('rooms', 'tiny', size=16, n=120, steps=16, ae_steps=4, **kw))
        r.announce = lambda: None
        r.go(('denoiser',))
    for _ in range(2):
        with pytest.raises(UserError, match='^training UNet stopped at step 8: .*lower rate than 0.001'): go()
    capsys.readouterr()
    def long(self, *args, load=training.Checkpoint.load, **kw):
        found = load(self, *args, **kw)
        self.spent += 1000
        return found
    monkeypatch.setattr(training.Checkpoint, 'load', long)
    go(lr=1e-4)
    assert made(tmp_path/'run'/'unet')['seconds'] > 1000 > made(tmp_path/'run'/'autoencoder')['seconds']   # also of earlier calls
    assert 'from step 8 on' in capsys.readouterr().out and made(tmp_path/'run'/'unet')['settings']['lr'] == 1e-4
    for how in (dict(), dict(lr=1e-4)):
        go(**how)
        assert 'nothing to do' in capsys.readouterr().out
    with pytest.raises(UserError, match='finished the training that --lr is for'): go(lr=1e-5)
    go()

# --- an odd world around a command

def ended(do, tmp_path):
    "(exit code, stderr) of a command that does it, in a child"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (tmp_path/'err').read_text()
    code = 99
    try:
        os.dup2(os.open(tmp_path/'err', os.O_WRONLY|os.O_CREAT|os.O_TRUNC), 2)
        def look_cli(): do()
        one_line_errors(look_cli)()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if code == 1: os.write(2, e.code.encode())
    except BaseException as e: os.write(2, repr(e).encode())
    finally: os._exit(code)

LIBRARIES = dict(                    # modules whose import ends, and what is said of it
    brittle=('raise ValueError("a\\nb")', 'brittle cannot be imported (ValueError: a b): '),
    lazy=('try: import brittle\nexcept ValueError as e: raise RuntimeError("look up") from e', 'brittle cannot be imported (ValueError: a b): '),
    locked=('open("nowhere/x")', 'locked cannot be imported (FileNotFoundError: '),
    large=('raise ImportError("libx.so: failed to map segment from shared object")', 'large cannot be imported (ImportError: the memory does not suffice): '),
    poor=('import nosuchlibrary', 'poor cannot be imported (ModuleNotFoundError: No module named'),
    nosuch=(None, "nosuch cannot be imported (ModuleNotFoundError: No module named 'nosuch'): "),
    halved=('x = (', 'halved cannot be imported (SyntaxError: '),
    latentdiff_=('x = {}["k"]', None))

@pytest.mark.parametrize('name', LIBRARIES)
def test_a_library_that_cannot_be_imported_is_one_line(name, tmp_path, monkeypatch):
    "It names the library and the cause, and how to see more; a module of ours shows its traceback."
    for k, (text, _) in LIBRARIES.items(): text and (tmp_path/f'{k}.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    @one_line_errors
    def look_cli():
        if name == 'latentdiff_': exec(LIBRARIES[name][0], {'__name__': 'latentdiff.ours'})
        __import__(name)
    said = LIBRARIES[name][1]
    with pytest.raises(SystemExit if said else KeyError) as e: look_cli()
    if said: assert str(e.value).startswith(f'latentdiff-look: {said}') and 'python -c' in str(e.value) and '\n' not in str(e.value)

def test_a_variable_that_a_library_refuses_is_one_line(tmp_path):
    "In a real command: exit code 1, and nothing but that line."
    command = [sys.executable, '-W', 'ignore', '-m', 'latentdiff', 'sample', 'bedrooms64', '--out', str(tmp_path/'out')]
    r = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(MPLBACKEND='nosuch'), cwd=Path(__file__).parents[1])
    assert r.returncode == 1 and r.stderr.startswith('latentdiff-sample: matplotlib cannot be imported (ValueError: Key backend') and r.stderr.count('\n') == 1 and not r.stdout

@pytest.mark.parametrize('how', [['-m', 'latentdiff', 'run'], ['-c', "import sys; sys.argv = ['/bin/latentdiff-run', '--help']; import latentdiff.commands"]])
@pytest.mark.parametrize('library', ['numpy', 'fastcore'])
def test_a_library_that_ends_the_first_imports_is_one_line(library, how, tmp_path):
    "Those that a command needs before it begins, as with a file of that name in the current folder; and nothing of what else would be said at the end."
    (tmp_path/f'{library}.py').write_text('import atexit\natexit.register(lambda: 1/0)\nraise ValueError("my own")')
    r = subprocess.run([sys.executable, *how], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])), cwd=tmp_path)
    assert r.returncode == 1 and r.stderr.startswith(f'latentdiff: {library} cannot be imported (ValueError: my own): ') and r.stderr.count('\n') == 1 and not r.stdout, r

@pytest.mark.parametrize('raw,says', [('猫'.encode(), "Class is '猫', which this shell's locale cannot say: set PYTHONUTF8=1."), (b'caf\xe9', 'not UTF-8: rename it.')])
def test_a_name_that_the_locale_cannot_say(raw, says):
    "As Python gives it in the C locale, where every other letter is an escaped byte: only what is not UTF-8 shall be renamed."
    with pytest.raises(UserError) as e: disk.check_call({'Class': raw.decode('ascii', 'surrogateescape')})
    assert str(e.value).endswith(says)

def test_a_home_that_cannot_be_written_is_no_news(tmp_path):
    "Matplotlib would say in two lines that it keeps its things elsewhere."
    say = 'from latentdiff.disk import plain_output\nplain_output()\nimport matplotlib\nmatplotlib.get_cachedir()'
    env = {k: v for k, v in os.environ.items() if k not in ('MPLCONFIGDIR', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME')}
    r = subprocess.run([sys.executable, '-c', say], capture_output=True, text=True, env=env | dict(HOME='/proc/nowhere', TMPDIR=str(tmp_path)), cwd=Path(__file__).parents[1])
    assert r.returncode == 0 and r.stderr == ''

def unread():
    "Print into a pipe that nobody reads"
    r, w = os.pipe()
    os.close(r)
    sys.stdout = os.fdopen(w, 'w', buffering=1)
    print('a line')

def closed():
    "A bar that is to be shown, where there is no output"
    sys.stdout = None
    plain_output()
    bar = core.Bar(9)
    bar.start -= 9
    bar.step()

def ascii_only():
    sys.stdout = open(os.devnull, 'w', encoding='ascii')
    plain_output()
    print('±')

def homeless():
    "The current folder is gone"
    os.mkdir('gone')
    os.chdir('gone')
    os.rmdir('../gone')
    new_places(out='a')

def too_much():
    import torch
    torch.empty(1 << 60)

def threadless():
    "A limit of processes, as a container has"
    import threading
    from latentdiff.data import open_images
    def refuse(*args, **kw): raise RuntimeError("can't start new thread")
    for o in ('_start_new_thread', '_start_joinable_thread'): hasattr(threading, o) and setattr(threading, o, refuse)
    open_images('rooms', 16, n=20).pixels()

def ours(): raise RuntimeError('a mistake of ours')

@posix
@pytest.mark.parametrize('do,code,says', [(unread, 141, ''), (closed, 0, ''), (ascii_only, 0, ''), (homeless, 1, 'No such file'), (lambda: os.stat('x'*300), 1, 'File name too long'), (too_much, 1, 'memory does not suffice'), (threadless, 1, 'no further thread may be started here'), (ours, 99, ''),
                                          (lambda: print('x', file=open('/dev/full', 'w', buffering=1)), 1, 'No space left')])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, do, code, says):
    monkeypatch.chdir(tmp_path)
    rc, err = ended(do, tmp_path)
    assert rc == code and says in err and '\n' not in err and (not says or err.startswith('latentdiff-look: ')), err

TRIES = """
import sys
sys.argv[0] = 'latentdiff-look'
from latentdiff.disk import one_line_errors
@one_line_errors
def look_cli():
    from huggingface_hub.utils import http_backoff
    try: http_backoff('HEAD', 'http://127.0.0.1:1/x', max_retries=1, base_wait_time=.01)
    except Exception as e: print(type(e).__name__)
look_cli()
"""

def test_the_tries_of_the_hub_are_not_told_one_by_one():
    "In a process of its own, because the library asks once, when it is imported: nothing but what is said of their outcome"
    env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'HF_HUB_VERBOSITY')} | dict(PYTHONPATH=str(Path(core.__file__).parents[1]), NO_PROXY='127.0.0.1')
    r = subprocess.run([sys.executable, '-c', TRIES], capture_output=True, text=True, env=env)
    assert r.returncode == 0 and r.stdout.startswith('Connect') and not r.stderr, r

@pytest.mark.parametrize('told,is_one', [('abc', True), ('', True), ('0', True), ('-3', True), ('2', False)])
def test_only_numbers_are_numbers_of_processes(monkeypatch, told, is_one):
    monkeypatch.setenv('WORLD_SIZE', told)
    monkeypatch.setenv('RANK', '1' if told == '2' else 'x')
    assert (world(), rank()) == ((1, 0) if is_one else (2, 1))
    monkeypatch.delenv('WORLD_SIZE')
    assert (world(), rank()) == (1, 0)

def met(how):
    "Whether it is said on the process' own stderr that the others do not come, or cannot: 'late' takes longer than its patience"
    import time
    sys.stderr, sys.__stderr__ = open(os.devnull, 'w'), os.fdopen(os.dup(2), 'w', buffering=1)
    if how == 'late': sys.stderr = sys.__stderr__
    def meet(cpu):
        if how == 'late': time.sleep(1)
        if how == 'nowhere': raise ValueError('no address')
    sys.modules['accelerate'] = AttrDict(PartialState=meet, utils=AttrDict(gather_object=lambda o: o*2))
    core.default_device = lambda: AttrDict(type='cpu')
    disk.patience.__wrapped__.__defaults__ = (9 if how == 'soon' else .05,)
    try: assert core.agreed(3) == 3
    finally: assert how != 'nowhere' or sys.stderr is sys.__stderr__

@posix
@pytest.mark.parametrize('size,rank,how,code,says', [('2', '0', 'late', 0, 'waiting for 1 more: if this process is alone, unset WORLD_SIZE'), ('2', '0', 'soon', 0, ''), ('2', '1', 'nowhere', 1, 'no way to the other processes (no address)'),
    ('2', '7', 'soon', 1, 'RANK is 7, and WORLD_SIZE 2: unset both'), ('9'*5000, '0', 'soon', 1, "WORLD_SIZE is '999")], ids=['late', 'soon', 'nowhere', 'rank', 'size'])
def test_what_a_batch_system_has_left_is_said(monkeypatch, tmp_path, size, rank, how, code, says):
    "Who waits for others that never come says so; where there is no first process, the others are not silent"
    monkeypatch.setenv('WORLD_SIZE', size), monkeypatch.setenv('RANK', rank)
    rc, err = ended(lambda: met(how), tmp_path)
    assert rc == code and says in err and bool(err) == bool(says) and err.strip().count('\n') == 0 and len(err) < 300, err

def test_homes_that_nobody_knows(monkeypatch):
    for name, home in (('LATENTDIFF_DATA', data_home), ('LATENTDIFF_RUNS', runs_home)):
        monkeypatch.setenv(name, '~nobody-here/x')
        assert name in one_line(home)

def test_a_link_to_nowhere_is_no_new_place(tmp_path):
    "Nor is it a run folder, nor is a device"
    from latentdiff.commands import Run
    (tmp_path/'out').symlink_to(tmp_path/'no'/'where')
    (tmp_path/'loop').symlink_to(tmp_path/'loop')
    assert 'exists' in one_line(lambda: new_place(tmp_path/'new'/'..', '--out'))
    for o in ('out', 'loop'):
        assert 'exists' in one_line(lambda: new_place(tmp_path/o, '--out')) and 'exists' in one_line(lambda: new_places(out=tmp_path/o))
        assert 'is not a run folder' in one_line(lambda: Run(tmp_path/o, settings_of('rooms', 'tiny')))
    assert 'is not a run folder' in one_line(lambda: Run('/dev/null', settings_of('rooms', 'tiny')))
    assert {o.name for o in tmp_path.iterdir()} == {'out', 'loop'}

def test_names_and_seeds_are_looked_at_first(tmp_path):
    from latentdiff.core import read_toml, to_toml
    assert check_call(dict(out='~/x', run='a~', n=3, prompt='~/x')) == dict(out=os.path.expanduser('~/x'), run='a~', n=3, prompt='~/x')
    assert '--out is empty' in one_line(lambda: check_call(dict(out=''))) and '--npz' in one_line(lambda: check_call(dict(n=3, npz='')))
    assert 'UTF-8' in one_line(lambda: check_call(dict(data=os.fsdecode(b'caf\xe9'))))
    (strange := tmp_path/os.fsdecode(b'nu\xff')/'photos').mkdir(parents=True)
    assert 'UTF-8' in one_line(lambda: settings_of(str(strange), 'tiny'))   # as from within that folder
    check_call(dict(data='café', out='x', n=3, prompt=''))
    for seed in (2**63, -2**63 - 1, .5): assert 'seed' in one_line(lambda: settings_of('rooms', 'tiny', seed=seed))
    assert settings_of('rooms', 'tiny', seed=-2**63)['seed'] == -2**63
    (tmp_path/'a.toml').write_text(to_toml(dict(data='a\x7fb')), encoding='utf-8-sig')   # as an editor on Windows does
    assert read_toml(tmp_path/'a.toml', dict(data=str)) == dict(data='a\x7fb')
    for k in ('config', 'autoencoder', 'preset'): assert f'--{k} is empty' in one_line(lambda: check_call({k: ''}))
    assert 'too many folders' in one_line(lambda: new_place(tmp_path.joinpath(*'a'*1500), '--out'))

def test_what_has_no_end_is_not_read(tmp_path, monkeypatch):
    "A device, a pipe, a file of a hundred gigabytes of nothing, an array that unpacks to as much: one line each, at once"
    from latentdiff.core import read_json, read_toml
    from latentdiff.files import npz_pixels
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'large').touch()
    os.truncate(tmp_path/'large', 10**12)
    for o, says in (('/dev/zero', 'cannot be read'), (tmp_path/'pipe', 'cannot be read'), (tmp_path/'large', 'needs 8,000.0 GB of memory')):
        assert says in one_line(lambda: read_json(o, 'copy it again')) and says in one_line(lambda: read_toml(o, {}))
    for o in ('/dev/zero', tmp_path/'pipe'): assert 'cannot be read' in one_line(lambda: npz_pixels(o))
    np.savez_compressed(tmp_path/'bomb.npz', np.zeros((100, 256, 256, 3), np.uint8))
    monkeypatch.setattr(disk, 'free_memory', lambda: 1e7)
    assert 'needs 19.7 MB of memory' in one_line(lambda: npz_pixels(tmp_path/'bomb.npz'))

@pytest.mark.parametrize('widths', [[8000]*3, [90_000], [32]*2000])
def test_a_config_that_asks_for_too_much_takes_no_memory(widths, tmp_path, monkeypatch):
    "The head of the file of weights says what there is, before a network of the size that the config names is built; float8 is none of ours"
    from safetensors.torch import save_file
    from latentdiff.autoencoder import KLAutoencoder
    from latentdiff.core import load_component, read_weights, save_component
    save_component(KLAutoencoder(3, (16,), 4, 2), tmp_path/'ae')
    config, whole = tmp_path/'ae'/'config.json', core._built
    monkeypatch.setattr(core, '_built', lambda folder, config, device: whole(folder, config, device) if device == 'meta' else pytest.fail('built'))
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | dict(widths=widths)))
    assert 'does not ' in one_line(lambda: load_component(tmp_path/'ae'))
    config.write_text(good)
    file = tmp_path/'ae'/'autoencoder.safetensors'
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in read_weights(file).items()}, file)
    for f, o in ((load_component, file.parent), (read_weights, file)): assert 'in float8 or less: save it in float16 or float32' in one_line(lambda: f(o))
    for v, bad in ((0., []), (float('nan'), ['w'])): assert core.not_finite(dict(w=torch.tensor([v]).to(torch.float8_e4m3fn))) == bad

def test_nothing_steers_the_terminal(capfd):
    @one_line_errors
    def a_cli(): raise UserError('a\x1b[31mb\x07')
    with pytest.raises(SystemExit) as e: a_cli()
    assert e.value.code == r'latentdiff-a: a\x1b[31mb\x07'

def test_who_comes_second_to_a_folder_changes_nothing(tmp_path):
    "Both have seen that it is new; only one of them begins"
    from latentdiff.commands import Run
    a, b = (Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, steps=4, ae_steps=4, seed=i)) for i in (0, 1))
    for o in (a, b): o.announce = lambda: None
    def begin():
        if not (tmp_path/'run').exists(): a.go(())
    b.begin = begin                                                 # while `b` measures
    assert 'seed 0, not 1' in one_line(lambda: b.go(()))
    assert json.loads((tmp_path/'run'/'run.json').read_text())['settings']['seed'] == 0

def test_who_was_overtaken_does_not_shorten_a_training(tmp_path, monkeypatch):
    "A longer one was finished after the run was opened, and before it is at work: it stays"
    from latentdiff.commands import Run, train_cli
    settings = settings_of('rooms', 'tiny', n=120)
    def trained(steps):
        (tmp_path/'run').mkdir(exist_ok=True)
        write_json(tmp_path/'run'/'run.json', dict(settings=settings | dict(steps=steps, ae_steps=4)))
        core.artefact(tmp_path/'run'/'unet', lambda o: {}, {}, dict(steps=steps), remake=True)
    trained(4)
    late, told, train = Run(tmp_path/'run', settings), Run(tmp_path/'run', settings | dict(steps=4)), []
    monkeypatch.setattr(Run, 'go', lambda self, goals: train.append(self))
    core.artefact(tmp_path/'run'/'latents', lambda o: {}, {}, {})
    train_cli.__wrapped__(str(tmp_path/'run'))
    monkeypatch.undo()
    trained(44)
    assert 'a denoiser of 44 steps: give --steps 44 or more' in one_line(lambda: told.go(()))
    for o in (late, *train):   # nobody has told them how many
        o.go(())
        assert o.p.steps == o.settings['steps'] == 44
    assert json.loads((tmp_path/'run'/'run.json').read_text())['settings']['steps'] == 44

def test_a_command_advises_what_it_can_do(tmp_path, monkeypatch):
    "latentdiff-train has no --steps, no --out, no --from: a refusal names none of them, and what it names works"
    import inspect, re
    from latentdiff.commands import train_cli
    from latentdiff.training import Checkpoint
    settings, run, said = settings_of('rooms', 'tiny', n=120) | dict(steps=10, ae_steps=4), tmp_path/'run', []
    def refused(spoil, *more):
        shutil.rmtree(run, ignore_errors=True)
        for o in ('unet', 'latents'): core.artefact(run/o, lambda o: {}, {}, dict(steps=10))
        write_json(run/'run.json', dict(settings=settings))
        spoil()
        said.append(one_line(lambda: one_line_errors(train_cli.__wrapped__.__wrapped__)(str(run), *more)))
        assert {*re.findall('--([a-z]+)', said[-1])} <= {*inspect.signature(train_cli).parameters}, said[-1]
    kept = lambda: Checkpoint(run/'checkpoints'/'unet', 'x').save('last', {}, dict(k=44, steps=60))
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    refused(kept, 20)
    assert 'give --more 34 or more' in said[-1]
    refused(lambda: shutil.rmtree(run/'unet'), 20)
    refused(lambda: write_json(run/'run.json', dict(settings=settings, stages={})))
    for k in ('steps', 'ae_steps', 'lr', 'size', 'n'): refused(lambda: write_json(run/'run.json', dict(settings=settings | {k: -3})))
    start = dict(fingerprint='x', parts=['autoencoder', 'unet'], network={}, classes=None)
    refused(lambda: write_json(run/'run.json', dict(settings=settings | {'from': 'bedrooms64', 'start': start})))
    refused(lambda: monkeypatch.setattr(core, 'write_whole', full) or monkeypatch.setattr(disk.Path, 'write_bytes', full))

def test_what_a_checkpoint_has_learned_is_not_shortened(tmp_path):
    "Nobody has finished the training; fewer steps than it has taken would begin again and write over them"
    from latentdiff.commands import Run
    from latentdiff.training import Checkpoint
    settings = settings_of('rooms', 'tiny', n=120)
    (tmp_path/'run').mkdir()
    write_json(tmp_path/'run'/'run.json', dict(settings=settings | dict(steps=60, ae_steps=4)))
    Checkpoint(tmp_path/'run'/'checkpoints'/'unet', 'x').save('last', {}, dict(k=44, steps=60))
    assert 'a denoiser of 44 steps' in one_line(lambda: Run(tmp_path/'run', settings | dict(steps=6)))
    assert Run(tmp_path/'run', settings | dict(steps=50)).settings['steps'] == 50
    core.artefact(tmp_path/'run'/'unet', lambda o: {}, {}, dict(steps=10))   # finished, and trained on since
    assert 'give --steps 10, or 44 or more' in one_line(lambda: Run(tmp_path/'run', settings | dict(steps=30)))
    assert Run(tmp_path/'run', settings | dict(steps=10)).settings['steps'] == 10
    shutil.rmtree(tmp_path/'run'/'unet')
    (tmp_path/'run'/'checkpoints'/'unet'/'last.safetensors').write_text('damaged')
    assert Run(tmp_path/'run', settings | dict(steps=6)).settings['steps'] == 6

def test_a_run_without_seals_stays_one(tmp_path):
    "It was begun by an earlier version; when its run.json is written again, its notes are still its own"
    from latentdiff.commands import Run
    settings = settings_of('rooms', 'tiny', n=120)
    for name, old in (('old', True), ('new', False)):
        r = Run(tmp_path/name, settings | dict(steps=4, ae_steps=4))
        r.folder.mkdir()
        if old: write_json(r.folder/'run.json', dict(settings=settings | dict(steps=4, ae_steps=4), versions=dict(torch='2')))
        core.artefact(r.folder/'unet', lambda o: {}, {}, dict(steps=4))
        note = json.loads((r.folder/'unet'/'made.json').read_text())
        if old: (r.folder/'unet'/'made.json').write_text(json.dumps({k: v for k, v in note.items() if k != 'seal'}))
        for _ in range(2): r.write()
        assert core.made(r.folder/'unet')['settings'] == dict(steps=4) and core.seals(r.folder) == (not old)
        (r.folder/'run.json').unlink()
        r.write()
        assert core.made(r.folder/'unet')['settings'] == dict(steps=4) and core.seals(r.folder) == (not old)

def test_a_finished_run_that_may_only_be_read_is_finished(tmp_path, monkeypatch):
    "Somebody else's, or on a disk without writing; what is not there cannot be made"
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120) | dict(steps=4, ae_steps=4))
    r.folder.mkdir()
    r.write()
    def shut(*args, **kw): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(core, 'FileLock', shut)
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    r.go(())
    assert 'cannot be written (Permission denied)' in one_line(lambda: core.artefact(r.folder/'unet', lambda o: {}, {}, {}))

def test_a_finished_run_is_rid_of_what_a_killed_process_left(tmp_path):
    "Also of files that need not be written again: killed at run.json after config.toml, or at metrics.json after the page"
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120) | dict(steps=4, ae_steps=4))
    r.folder.mkdir()
    r.write()
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    left, living = ([r.folder/f'.{o}.{disk._HERE}-{k}.part' for o in ('run.json', 'metrics.json')] for k in (dead.pid, os.getpid()))
    for o in left + living: o.write_text('half')
    r.go(())
    assert not any(o.exists() for o in left) and all(o.exists() for o in living)

@pytest.mark.parametrize('begun', [False, True])
def test_a_part_is_rid_of_what_a_killed_process_left_in_it(begun, tmp_path):
    "Of a file that was written once more: the part is whole, finished or still to be put in place"
    def make(folder): write_whole(folder/'grid.png', 'grid')
    part = core.artefact(tmp_path/'samples', make, {}, {}, cheap=True)
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    left, living = (part/f'.grid.png.{disk._HERE}-{k}.part' for k in (dead.pid, os.getpid()))
    for o in (left, living): o.write_text('half')
    if begun:
        write_json(part/'making.json', dict(settings={}, parents={}, version=1))
        part.rename(core._work(part))
    core.artefact(part, make, {}, {}, cheap=True)
    assert {o.name for o in part.iterdir()} == {'grid.png', 'made.json', living.name}

@pytest.mark.parametrize('part,text', [('process', '{'), ('process', '{"schedule": "flow"}'), ('process', None), ('scheduler', '{'), ('scheduler', None)])
def test_damaged_noise_is_made_again(tmp_path, part, text):
    "A file that cannot be read, or one in the place of the folder, as if it were lost; what is whole is left alone"
    from latentdiff import noisify
    process, files = noisify.Process('flow', 'velocity', 'uniform'), dict(process='config.json', scheduler='scheduler_config.json')
    noisify.save_process(process, tmp_path)
    good = {k: (tmp_path/k/o).read_bytes() for k, o in files.items()}
    if text is None: shutil.rmtree(tmp_path/part), (tmp_path/part).write_text('no folder')
    else: (tmp_path/part/files[part]).write_text(text)
    noisify.mend_process(process, tmp_path)
    assert {k: (tmp_path/k/o).read_bytes() for k, o in files.items()} == good

def test_what_lacks_a_file_says_to_delete_it(tmp_path):
    "Who loads it and who makes it give the same advice, which works"
    write_json(tmp_path/'run.json', dict(settings={}, versions=dict(latentdiff='0')))
    make = lambda: core.artefact(tmp_path/'unet', lambda o: (o/'config.json').write_text('{}') and {}, {}, {})
    for lost in ('config.json', 'made.json'):
        make()
        (tmp_path/'unet'/lost).unlink()
        assert f'delete {tmp_path}/unet to make it again' in one_line(lambda: core.load_component(tmp_path/'unet'))
        if lost == 'made.json': assert 'delete it to make it again' in one_line(make)
        shutil.rmtree(tmp_path/'unet')

@pytest.mark.parametrize('when', ['drawing', 'writing'])
def test_a_place_that_was_taken_meanwhile_is_left_alone_and_what_was_drawn_is_kept(tmp_path, monkeypatch, when):
    "While images are drawn, or while they are written: they lie beside it under another name, which is said, each of both kinds"
    import torch
    from latentdiff import commands
    from latentdiff.pipeline import LatentDiffusionPipeline
    def take():
        for o in ('out', 'out-2'): (tmp_path/o).mkdir()
        (tmp_path/'out'/'theirs').write_text('x')
        (tmp_path/'a.npz').write_text('theirs')
    def pixels(self, n, *args, **kw):
        if when == 'drawing': take()
        return torch.zeros(n, 1, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(LatentDiffusionPipeline, 'pixels', pixels)
    if when == 'writing': monkeypatch.setattr(commands.np, 'savez_compressed', lambda f, px, save=commands.np.savez_compressed: (save(f, px), take()))
    out, npz = tmp_path/'out', tmp_path/'a.npz'
    said = one_line(lambda: commands.sample_cli.__wrapped__('fashion_mnist32', n=1, steps=1, out=str(out), npz=str(npz)))
    assert f'{out} was taken' in said and str(tmp_path/'out-3') in said and f'{npz} was taken' in said and str(tmp_path/'a-2.npz') in said
    assert [o.name for o in out.iterdir()] == ['theirs'] and npz.read_text() == 'theirs' and not [*(tmp_path/'out-2').iterdir()]
    assert [o.name for o in (tmp_path/'out-3').iterdir()] == ['00000.png'] and commands.np.load(tmp_path/'a-2.npz')['arr_0'].shape == (1, 32, 32, 1)
    assert {o.name for o in tmp_path.iterdir()} == {'out', 'out-2', 'out-3', 'a.npz', 'a-2.npz'}

def test_a_note_that_may_not_be_read_is_not_of_somebody_else(tmp_path, monkeypatch):
    "What was trained is not to be deleted for that"
    from latentdiff import core
    core.artefact(tmp_path/'unet', lambda o: (o/'a').write_text('x') and {}, {}, {})
    def denied(path, *args, stat=os.stat, **kw):
        if str(path).endswith('made.json'): raise PermissionError(13, 'Permission denied', str(path))
        return stat(path, *args, **kw)
    (tmp_path/'loop').mkdir()
    (tmp_path/'loop'/'made.json').symlink_to('made.json')
    assert 'cannot be read' in one_line(lambda: core.made(tmp_path/'loop')) and core.made(tmp_path/'none') == core.made(tmp_path/'loop'/'x') == {}
    monkeypatch.setattr(core.os, 'stat', denied)
    assert 'made.json cannot be read (Permission denied): see to it that it can' in one_line(lambda: core.artefact(tmp_path/'unet', None, {}, {}))

KILLED_BETWEEN = """
import os, signal, sys
from PIL import Image
from latentdiff.commands import sample_cli
save, folder = Image.Image.save, sys.argv[1]
def killing(im, fp, *args, **kw):
    save(im, fp, *args, **kw)
    if sys.argv[2] in str(fp): os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = killing
sample_cli.__wrapped__('fashion_mnist32', n=3, steps=1, out=folder + '/out', npz=folder + '/a.npz')
"""

def test_images_in_two_forms_appear_together(server, tmp_path):
    "Killed while the second is written, neither is there, and the same command finishes with nothing left over"
    (folder := tmp_path/'drawn').mkdir()
    r = server.code(KILLED_BETWEEN, folder, '00001.png')
    assert r.rc == -signal.SIGKILL and [o for o in folder.iterdir() if o.name in ('out', 'a.npz')] == [], r.err
    r = server.code(KILLED_BETWEEN, folder, 'no such file')
    assert r.rc == 0 and {o.name for o in folder.iterdir()} == {'out', 'a.npz'} and len([*(folder/'out').iterdir()]) == 3, r.err

def test_a_part_that_is_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    "Also where it stands in the way of a training that begins"
    from latentdiff.core import artefact
    (tmp_path/'big').mkdir()
    (tmp_path/'big'/'theirs').write_text('x')
    for o in ('a', '.b.making'): (tmp_path/o).symlink_to(tmp_path/'big')
    with whole_folder(tmp_path/'a') as new: (new/'mine').write_text('y')
    artefact(tmp_path/'b', lambda o: {}, {}, {})
    assert {o.name for o in tmp_path.iterdir()} == {'a', 'b', 'big', '.lock'} and (tmp_path/'big'/'theirs').exists()
    assert [o.name for o in (tmp_path/'a').iterdir()] == ['mine'] and not (tmp_path/'a').is_symlink()

def test_a_run_whose_folder_goes_away_says_so(tmp_path):
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, steps=4, ae_steps=4))
    r.announce, r.kept['report'] = lambda: None, 0
    class Moving(Run):
        @property
        def moved(self): self.folder.rename(tmp_path/'elsewhere')
    r.__class__ = Moving
    assert 'is gone' in one_line(lambda: r.go(('moved',)))

def test_a_run_that_is_moved_while_it_trains_says_so_at_the_next_checkpoint(tmp_path):
    "Not after the training; nothing takes its old place, and the training goes on in the new one"
    from test_training import quiet, small_learner
    from fastai.basics import Callback
    from latentdiff.commands import Run
    from latentdiff.training import Checkpoint
    class Move(Callback):
        order = 80
        def after_batch(self):
            if self.step_by_step.k == 9: (tmp_path/'run').rename(tmp_path/'elsewhere')
    keep = lambda run: Checkpoint(run/'checkpoints'/'unet', 'x', every=0)
    (tmp_path/'run').mkdir()
    said = one_line(lambda: quiet(small_learner(), steps=40, checkpoint=keep(tmp_path/'run'), cbs=Move()))
    assert f'{tmp_path}/run' in said and 'is gone, or was moved' in said and [o.name for o in tmp_path.iterdir()] == ['elsewhere']
    assert keep(tmp_path/'elsewhere').load(40)[1]['k'] == 8
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, steps=4, ae_steps=4))
    r.announce = lambda: None
    class Moving(Run):
        report = property(lambda self: pytest.fail('went on'))
        @property
        def moved(self):
            self.folder.rename(tmp_path/'new')
            self.folder.mkdir()   # as a stage does that writes into it
    r.__class__ = Moving
    assert 'is gone' in one_line(lambda: r.go(('moved', 'report')))

def test_memory_that_a_container_allows_counts(tmp_path, monkeypatch):
    "The least of what the machine has free and what its group may still take; a group without a limit does not count"
    own, found = disk.Path, tmp_path/'fs'
    (found/'job').mkdir(parents=True)
    places = {'/proc/self/cgroup': tmp_path/'cgroup', '/sys/fs/cgroup': found, '/proc/meminfo': tmp_path/'meminfo'}
    monkeypatch.setattr(disk, 'Path', lambda p: places.get(str(p), own(p)))
    (tmp_path/'meminfo').write_text('MemAvailable:   1000 kB\nSwapFree:   24 kB\n')
    (tmp_path/'cgroup').write_text('0::/job\n')
    assert free_memory() == 1024*1024
    (found/'job'/'memory.current').write_text('300\n')
    (found/'job'/'memory.max').write_text('1000\n')
    assert free_memory() == 700
    (found/'job'/'memory.stat').write_text('anon 10\nfile 250\ninactive_file 200\nactive_file 50\nslab_reclaimable 7\n')
    assert free_memory() == 907   # the kernel gives its copies of files back
    (found/'job'/'memory.max').write_text('max\n')
    assert free_memory() == 1024*1024
    (found/'memory.max').write_text('900\n')
    (found/'memory.current').write_text('100\n')
    assert free_memory() == 800   # of what it lies in
    (found/'memory.max').unlink()
    (tmp_path/'cgroup').write_text('12:pids:/job\n4:memory:/docker/ab:c\n1:name=systemd:/job\n')   # version 1, seen from within
    (found/'memory').mkdir()
    (found/'memory'/'memory.limit_in_bytes').write_text('1000\n')
    (found/'memory'/'memory.usage_in_bytes').write_text('900\n')
    (found/'memory'/'memory.stat').write_text('cache 500\ninactive_file 3\ntotal_cache 500\ntotal_inactive_file 300\n')
    assert free_memory() == 400
    (found/'memory'/'memory.limit_in_bytes').write_text('9223372036854771712\n')
    assert free_memory() == 1024*1024

def test_a_link_to_nowhere_is_found_before_the_work(tmp_path):
    "Where an artefact belongs, as on a disk that is not there"
    (tmp_path/'unet').symlink_to(tmp_path/'elsewhere')
    assert 'was not made by' in one_line(lambda: core.artefact(tmp_path/'unet', lambda o: pytest.fail('work'), {}, {}))

def test_nothing_is_written_to_where_a_link_in_a_run_leads(tmp_path):
    "As in a run of somebody else's: checkpoints are refused, cheap parts are made again in its place"
    from latentdiff.training import Checkpoint
    big, run = tmp_path/'big', tmp_path/'run'
    big.mkdir(), run.mkdir()
    make = lambda: core.artefact(run/'samples', lambda o: (o/'a').write_text('x') and {}, {}, {}, cheap=True)
    make()
    (run/'samples').rename(big/'samples')
    (big/'samples'/'a').unlink()
    (run/'samples').symlink_to(big/'samples')
    (run/'checkpoints').symlink_to(big)
    c = Checkpoint(run/'checkpoints'/'unet', 'x')
    assert c.load('last') is None   # a folder of one's own may lie anywhere
    (run/'run.json').write_text('{}')
    for f in (lambda: c.save('last', {}, dict(k=1, steps=2)), lambda: c.load('last')): assert f'{run}/checkpoints is a link' in one_line(f)   # before the work
    make()
    assert (run/'samples'/'a').exists() and not (run/'samples').is_symlink() and {o.name for o in big.rglob('*')} == {'samples', 'made.json'}

def test_a_run_of_version_0_1_is_called_one(tmp_path):
    "Wherever it, or a part of it, is given"
    from latentdiff import autoencoder, pipeline, source
    (tmp_path/'autoencoder').mkdir()
    write_json(tmp_path/'run.json', dict(stages={}))
    write_json(tmp_path/'model_index.json', dict(_class_name='LatentDiffusionPipeline', denoiser=['latentdiff.unet', 'UNet']))
    write_json(tmp_path/'autoencoder'/'config.json', dict(_class_name='KLAutoencoder'))
    for f in (pipeline.LatentDiffusionPipeline.from_pretrained, lambda o: source.as_there({'from': str(o)}), autoencoder.open_autoencoder, lambda o: autoencoder.open_autoencoder(o/'autoencoder')):
        assert f'{tmp_path} is a run of version 0.1' in one_line(lambda: f(tmp_path))
    (tmp_path/'new').mkdir(), write_json(tmp_path/'new'/'model_index.json', {})
    assert checks.of_this_version(tmp_path/'new') == tmp_path/'new'   # a pipeline beside it

def test_advice_for_a_run_that_is_there(tmp_path, monkeypatch):
    "A command without --out cannot be told to choose a place, nor to set where new runs go"
    monkeypatch.setattr(disk, '_options', ['run', 'more'])
    assert room_at(tmp_path/'x')[2].endswith('move the run folder there') and 'LATENTDIFF_RUNS' not in room_at(tmp_path/'x')[2]

def test_two_dashes_are_no_value():
    "Python 3.11's argparse makes an empty list of --class=--"
    assert '--Class is --' in one_line(lambda: check_call({'Class': []}))

def test_numbers_that_are_equal_are_the_same_setting(tmp_path):
    for lr in (1, 1.): core.artefact(tmp_path/'a', lambda o: dict(made=lr), {}, dict(lr=lr))
    assert core.made(tmp_path/'a')['facts'] == dict(made=1)

def test_more_than_a_hundred_pictures_may_be_too_few(tmp_path):
    "Which are held out is a matter of chance: twice as many will do"
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny'))
    for n, most in ((120, 240), (20, 100)):
        r.kept['images'] = type('Few', (), dict(__len__=lambda self: n, valid_idxs=[0]*7))()
        assert one_line(lambda: r.images).endswith(f'{n} images, 7 to test on, by chance: give {most} or more.')

@pytest.mark.parametrize('size', [3, 4, 12])
def test_a_size_that_will_not_do_is_answered_with_one_that_will(tmp_path, size):
    "For the autoencoder and for the U-Net, which halves what that leaves"
    from latentdiff.commands import Run
    run = lambda size: Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, size=size, From='none'))
    said = one_line(lambda: run(size).go(()))
    found = [int(o) for o in said.split('such as ')[1].split(' or ')]
    assert found and size not in found and not (tmp_path/'run'/'run.json').exists(), said
    for o in found: assert len(run(o).step_times()) == 2

def test_a_folder_on_the_way_to_a_result_does_not_stay_without_it(tmp_path):
    def refused(): raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(UserError), disk.whole_folder(tmp_path/'a'/'b'/'c'): refused()
    with pytest.raises(UserError): disk.write_whole(tmp_path/'a'/'b'/'c', 'x', lambda *_: refused())
    assert not any(tmp_path.iterdir())
    (tmp_path/'a').mkdir()   # of somebody else: it stays
    with pytest.raises(UserError), disk.whole_folder(tmp_path/'a'/'b'): refused()
    assert [*tmp_path.rglob('*')] == [tmp_path/'a']

def test_minutes_without_end_write_nothing(tmp_path):
    "They become more steps than a run may have: said before anything is written, so that the folder stays free"
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120, minutes=1e9))
    r.step_times = lambda: (.01, .01)
    assert 'steps is' in one_line(lambda: r.go(())) and not (tmp_path/'run'/'run.json').exists()

def test_latents_that_the_disk_cannot_hold_are_found_before_any_training(tmp_path, monkeypatch):
    from collections import namedtuple
    from latentdiff.commands import Run
    r = Run(tmp_path/'run', settings_of('rooms', 'tiny', n=120))
    r.step_times = lambda: (.01, .01)
    monkeypatch.setattr(disk.shutil, 'disk_usage', lambda path: namedtuple('Usage', 'total used free')(10, 5, 10_000))
    assert 'This run needs 0.1 MB of disk' in one_line(r.announce)   # 122,880 bytes: of few pictures three crops are encoded too

BEHIND = """
import os, sys
from pathlib import Path
from latentdiff import autoencoder, commands, core, data, disk, files, noisify, pipeline, training
tmp = Path(sys.argv[1])
shut = tmp/'shut'/'x'
shut.mkdir(parents=True)
for o in ('run.json', 'a.zip', 'last.safetensors'): (shut/o).write_text('{}')
(tmp/'shut').chmod(0)
if not os.geteuid(): os.seteuid(65534)
os.environ['LATENTDIFF_DATA'] = str(shut/'data')
calls = dict(room_at=lambda: disk.room_at(shut/'y'), enough=lambda: disk.enough('x', shut/'y'), on_disk=lambda: disk.write_json(shut/'y', {}), new_place=lambda: disk.new_place(shut/'y', '--out'),
    reserve=lambda: disk.reserve(shut/'y', 9), remove=lambda: disk.remove(shut), whole=lambda: disk.whole_folder(shut/'y').__enter__(), replace=lambda: core.artefact(shut, lambda o: {}, {}, {}), made=lambda: core.made(shut),
    read_weights=lambda: core.read_weights(shut/'last.safetensors'), load=lambda: core.load_component(shut), checkpoint=lambda: training.Checkpoint(shut, 'x').load(9), latents=lambda: noisify.Latents(shut),
    data=lambda: data.open_images(shut, 16), archive=lambda: data.open_images(shut/'a.zip', 16), known=lambda: data.open_images('mnist', 16), cars=lambda: data.open_images('stanford_cars', 16), download=lambda: files.download('http://127.0.0.1:9/a.zip', shut/'a.zip'),
    autoencoder=lambda: autoencoder.open_autoencoder(shut), pipeline=lambda: pipeline.LatentDiffusionPipeline.from_pretrained(shut), run=lambda: commands.Run(shut, core.settings_of('rooms', 'tiny')).go(()), train=lambda: commands.train_cli.__wrapped__(str(shut)))
for k, do in calls.items():
    try: do()
    except (core.UserError, SystemExit) as e: print('fine' if '\\n' not in str(e) else e, k)
    except Exception as e: print(repr(e), k)
    else: print('fine', k)
"""

@posix
def test_what_lies_behind_a_closed_folder_is_one_line(server, tmp_path):
    "Whatever looks whether it is there, by a user who may not enter the folder above it"
    r = server.code(BEHIND, tmp_path)
    assert r.rc == 0 and len(r.out.splitlines()) >= 22 and {l for l in r.out.splitlines() if not l.startswith('fine ')} == set(), r

SHUT = """
import os, shutil, sys, tempfile
from pathlib import Path
from latentdiff import commands, core, files, training
me, tmp = os.geteuid(), Path(tempfile.mkdtemp())   # others may not enter those of pytest
tmp.chmod(0o755)
run, weights = tmp/'run', 'unet/diffusion_pytorch_model.safetensors'
for o in ('run.json', weights, 'checkpoints/last.safetensors', 'unet/made.json', 'a.tar', 'unet/config.json'):
    (run/o).parent.mkdir(parents=True, exist_ok=True)
    (run/o).write_text('{}')
    (run/o).chmod(0)
if not me: os.seteuid(65534)
calls = dict(run=lambda: commands.Run(run, core.settings_of('rooms', 'tiny')), train=lambda: commands.train_cli.__wrapped__(str(run)), weights=lambda: core.read_weights(run/weights), made=lambda: core.made(run/'unet'), load=lambda: core.load_component(run/'unet'),
    checkpoint=lambda: training.Checkpoint(run/'checkpoints', 'x').load(9), archive=lambda: files.unpacked(run/'a.tar'), config=lambda: core.network_config(run/'unet'), altered=lambda: core.altered((run/weights).parent, dict(contents={(run/weights).name: 'x'})), toml=lambda: core.read_toml(run/'run.json', {}))
for k, do in calls.items():
    try: do()
    except (core.UserError, SystemExit) as e: print('fine' if str(e).count('cannot be read (Permission denied)') and 'delete' not in str(e) and str(run) in str(e) and '\\n' not in str(e) else e, k)
    except Exception as e: print(repr(e), k)
    else: print('nothing', k)
os.seteuid(me)
shutil.rmtree(tmp)
"""

@posix
def test_what_may_not_be_read_is_named_with_the_reason(server):
    "Somebody else's, of mode 0: nothing is damaged or lost, so nobody is told to delete it"
    r = server.code(SHUT)
    assert r.rc == 0 and len(r.out.splitlines()) == 10 and {l for l in r.out.splitlines() if not l.startswith('fine ')} == set(), r

def test_an_array_whose_header_is_no_end_of_brackets(tmp_path):
    import io, zipfile
    import numpy as np
    from latentdiff.files import npz_pixels
    for text in (b'('*5000, b"{'descr': " + b'['*3000, b"{'a': '''"):
        head = text.ljust(len(text) + 64 - (len(text) + 11) % 64) + b'\n'
        with zipfile.ZipFile(tmp_path/'a.npz', 'w') as z: z.writestr('arr_0.npy', b'\x93NUMPY\x01\x00' + len(head).to_bytes(2, 'little') + head)
        assert 'cannot be read as .npz' in one_line(lambda: npz_pixels(tmp_path/'a.npz'))

@pytest.mark.parametrize('said', ['could not create a primitive', 'std::bad_alloc', 'DefaultCPUAllocator: can\'t allocate memory', 'CUDA out of memory. Tried to'])
def test_memory_that_runs_out_in_a_library_is_told_as_that(said):
    assert 'the memory does not suffice' in str(disk.refused(RuntimeError(said))) and disk.refused(RuntimeError('shapes differ')) is None

def test_a_limit_of_the_shell_is_told_as_that(tmp_path):
    "Room on the disk would not help"
    code = "import resource, sys; from latentdiff.disk import write_whole; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_whole(sys.argv[1], 'x'*5000)"
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.txt')], capture_output=True, text=True)
    assert 'File too large' in r.stderr and 'raise ulimit -f' in r.stderr and 'make room' not in r.stderr and not [*tmp_path.iterdir()], r.stderr
