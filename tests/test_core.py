"Core: presets, streams, files and folders that are whole or absent, components, artefacts, locks."
import errno, json, os, signal, stat, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from latentdiff import core, disk
from latentdiff.core import *
from latentdiff.disk import *

class Toy(torch.nn.Module, ConfigMixin):
    "A component of one layer"
    config_name = 'config.json'
    @register_to_config
    def __init__(self, wide=3, deep=1):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(wide, wide) for _ in range(deep)))

def here(folder): return sorted(o.name for o in folder.iterdir())

def one_line(e): return '\n' not in str(e.value)

# --- presets

def test_preset_by_argument_environment_and_hardware(monkeypatch):
    monkeypatch.delenv('LATENTDIFF_PRESET', raising=False)
    assert preset().name == ('gpu' if torch.cuda.is_available() else 'cpu')
    monkeypatch.setenv('LATENTDIFF_PRESET', 'tiny')
    assert preset().name == 'tiny' and preset('gpu').name == 'gpu'
    with pytest.raises(UserError, match='choose one of tiny, cpu, gpu'): preset('large')

@pytest.mark.parametrize('name,data,size,factor', [('tiny', None, None, 4), ('cpu', 'rooms', None, 8), ('cpu', 'my/folder', None, 8),
                                                   ('cpu', 'smallnorb/lit', None, 8), ('cpu', 'rooms', 32, 8)])
def test_presets_fit_data_and_size(name, data, size, factor):
    p = preset(name, data, size)
    assert p.data == (data or PRESETS[name].data) and p.size == (size or p.size)
    assert p.ae_patch*2**(len(p.ae_widths) - 1) == factor and p.size % factor == 0

def test_a_run_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv('LATENTDIFF_RUNS', str(tmp_path))
    assert run_folder(preset('cpu', '/data/cats.tar.gz/'), 3) == tmp_path/'cats-cpu-64px-seed3'

@pytest.mark.parametrize('data', [None, 'rooms', 'fashion_mnist', 'mnist', 'photos/of/mine', 'smallnorb/lit'])
def test_a_preset_is_whole(data):
    "What a row for other data leaves out comes from the bedrooms' row, and fits there"
    p, home = preset('cpu', data), preset('cpu', 'lsun_bedroom')
    assert home == preset('cpu') and home.size == 64
    assert p.sampler == {None: 'ddpm', 'rooms': 'dpmpp_2m_sde'}.get(data) and (p.n is None) == (data in ('fashion_mnist', 'mnist'))
    assert p.steps > 10*home.steps if data == 'photos/of/mine' else p.steps < 10*home.steps

# --- exercises

def test_an_exercise_says_not_yet_and_never_stops(capsys):
    def wrong(): assert 1 == 2, 'two\nlines'
    def missing(): raise NotImplementedError
    for o in (wrong, missing, lambda: 1/0, sys.exit, lambda: None): exercise(o)
    assert capsys.readouterr().out.splitlines() == ['not yet: ' + o for o in
        ('AssertionError two lines assert 1 == 2', 'NotImplementedError', 'ZeroDivisionError division by zero', 'SystemExit')] + ['right']

# --- streams

def test_only_what_was_measured_is_promised():
    "The minutes are those of the preset as it stands in the table"
    p = preset('cpu', 'rooms')
    assert f'about {p.minutes:g} min' in repr(p)
    for other in (replace(p, steps=p.steps + 1), replace(p, n=200), preset('cpu', 'rooms', size=128)): assert 'about' not in repr(other)

def test_streams_do_not_meet():
    "A million names, all numbers different (torch's CPU generator looks at the lower half of each)"
    seen = {stream(seed, 'noise', i) for seed in (0, 1, 4295, -7) for i in range(250_000)}
    assert len(seen) == 1_000_000 and max(seen) < 2**63 and min(seen) >= 0

def test_the_pairs_that_met():
    assert stream(0, 45589) != stream(4295, 0) and stream(2**32) != stream(0) and stream(0, 1) != stream(0, '1') != stream(0, 1, '')

@pytest.mark.parametrize('seed', [-1, 0, 2**32, 2**70, np.int64(5), np.int32(-5), torch.tensor(4)])
def test_any_whole_number_is_a_seed(seed):
    torch.Generator().manual_seed(stream(seed, 'x'))
    assert stream(seed, 'x') == stream(int(seed), 'x') and stream(0, seed) == stream(0, int(seed))

def test_streams_are_what_they_were():
    "Runs of yesterday go on today"
    assert stream(0) == 7210762507766007076 and stream(1, 'step', 2) == 3185912055271076126

# --- progress

class FakeTime:
    now = 0.
    def monotonic(self): return self.now

@pytest.fixture
def clock(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(core, 'time', clock)
    return clock

def test_progress_gives_every_item_and_is_silent_when_quick(clock, capsys):
    assert list(progress('abc', what='three letters')) == ['a', 'b', 'c']
    assert list(progress(iter('abc'), 3)) == ['a', 'b', 'c'] and capsys.readouterr().out == ''

def test_progress_says_once_what_takes_long(clock, capsys):
    for _ in progress(range(9), what='nine things'): clock.now += 1
    assert capsys.readouterr().out == 'nine things\n'

def test_a_bar_shows_itself_where_somebody_looks(clock, capsys, monkeypatch):
    drawn = []
    class Drawn:
        start_t = 0.
        def __init__(self, *args, **kw): drawn.append(kw['total'])
        def update(self, k): drawn.append(k)
        def on_iter_end(self): drawn.append('end')
    monkeypatch.setattr(core, 'progress_bar', Drawn)
    monkeypatch.setattr(core, 'IN_NOTEBOOK', True)
    for _ in progress(range(5), what='five things'): clock.now += 1
    assert drawn == [5, 0, 3, 4, 5, 'end'] and capsys.readouterr().out == ''
    for i in progress(range(9)):
        clock.now += 1
        if i == 6: break    # whoever has enough leaves no bar behind
    assert drawn[6:] == [9, 0, 3, 4, 5, 6, 'end']

# --- files

@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)

def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    save_component(Toy(), tmp_path/'toy')
    write_json(tmp_path/'toy'/'x.json', {})
    assert {stat.S_IMODE(o.stat().st_mode) for o in (tmp_path/'toy').iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path/'toy').stat().st_mode) == 0o755

@pytest.mark.parametrize('fails', ['replace', 'write'])
def test_a_failed_write_leaves_the_old_file(fails, tmp_path, monkeypatch):
    write_whole(tmp_path/'a', 'old')
    def broken(*args): raise OSError(28, 'No space left on device')
    if fails == 'replace': monkeypatch.setattr(core.os, 'replace', broken)
    else: monkeypatch.setattr(Path, 'write_bytes', lambda self, data: (self.open('w').write('ha'), broken()))
    with pytest.raises(OSError): write_whole(tmp_path/'a', b'new')
    assert (tmp_path/'a').read_text() == 'old' and here(tmp_path) == ['a']

def test_json_both_ways(tmp_path):
    write_json(tmp_path/'a.json', dict(x=[1, 'ä']), indent=1)
    assert read_json(tmp_path/'a.json', 'do this') == dict(x=[1, 'ä'])

@pytest.mark.parametrize('text', [None, b'{', b'\xff\xfe{}', b'[1]', b'3', b'['*100_000, 'folder'])
def test_what_is_no_json_is_one_line_with_the_hint(text, tmp_path):
    if text == 'folder': (tmp_path/'a.json').mkdir()
    elif text: (tmp_path/'a.json').write_bytes(text)
    with pytest.raises(UserError, match='do this$') as e: read_json(tmp_path/'a.json', 'do this')
    assert one_line(e)

def test_md5(tmp_path):
    write_whole(tmp_path/'a', 'hello')
    assert file_md5(tmp_path/'a') == '5d41402abc4b2a76b9719d911017c592'

# --- folders

def test_a_folder_is_whole_or_as_before(tmp_path):
    with whole_folder(tmp_path/'a') as new: write_whole(new/'x', '1')
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path/'a') as new:
            write_whole(new/'y', '2')
            raise KeyboardInterrupt
    assert here(tmp_path/'a') == ['x'] and here(tmp_path) == ['a']
    with whole_folder(tmp_path/'a') as new: write_whole(new/'y', '2')
    assert here(tmp_path/'a') == ['y'] and here(tmp_path) == ['a']

# --- components

@pytest.mark.parametrize('n', [2, 15, 1])
def test_a_signal_that_a_library_makes_another_error_of_is_still_one(n):
    "As torch's C code does"
    code = f"""import signal, sys; sys.argv = ['latentdiff-x']
signal.signal({n}, signal.SIG_DFL)   # a background process may have it ignored
from latentdiff.disk import one_line_errors
import os, time
def f():
    try: os.kill(os.getpid(), {n}), time.sleep(1)
    except BaseException: raise ValueError('could not determine the shape of an object')
one_line_errors(f)()"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 128 + n and r.stderr.count('\n') == 1 and 'what is finished is kept' in r.stderr, r

def test_a_signal_when_the_work_is_done_is_nothing_any_more():
    "While the interpreter leaves, which takes seconds after a training: no traceback, no word that something was stopped"
    code = """import signal, sys; sys.argv = ['latentdiff-x']
for n in (2, 15, 1): signal.signal(n, signal.SIG_DFL)   # a background process may have them ignored
from latentdiff.disk import one_line_errors
import atexit, os, time
atexit.register(lambda: [(os.kill(os.getpid(), n), time.sleep(.1)) for n in (2, 15, 1)])
one_line_errors(lambda: print('done'))()"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (0, 'done\n', '')


@pytest.mark.parametrize('n', [2, 15, 1])
def test_a_signal_when_a_result_is_in_place_says_so(n, tmp_path):
    "The same command would be refused, as the place is taken; the next one in this process knows nothing of it"
    code = f"""import signal, sys; sys.argv = ['latentdiff-x']
signal.signal({n}, signal.SIG_DFL)   # a background process may have it ignored
from latentdiff.disk import one_line_errors, put_beside, write_whole
import os, time
one_line_errors(lambda: write_whole('b', 'x', put_beside))()
def f():
    if 'early' in os.environ: os.kill(os.getpid(), {n}), time.sleep(1)
    for o in ('a', 'c'): write_whole(o, 'x', put_beside)
    os.kill(os.getpid(), {n}), time.sleep(1)
signal.signal({n}, signal.SIG_DFL)
one_line_errors(f)()"""
    for early, said in ((True, 'what is finished is kept, and the same command goes on from there'), (False, 'with a and c complete')):
        r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | ({'early': '1'} if early else {}) | {'PYTHONPATH': str(Path(disk.__file__).parents[1])})
        assert r.returncode == 128 + n and r.stderr.count('\n') == 1 and said in r.stderr, r
        (tmp_path/'b').unlink()


@pytest.mark.parametrize('n', [2, 15, 1])
def test_a_signal_between_imports_and_command_is_one_line(n):
    code = f"import signal, sys; sys.argv = ['latentdiff-x']\nsignal.signal({n}, signal.SIG_DFL)   # a background process has it ignored\nfrom latentdiff import disk\nimport os, time\nos.kill(os.getpid(), {n})\ntime.sleep(1)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 128 + n and r.stderr.count('\n') == 1 and r.stderr.startswith('stopped: '), r


def test_what_is_free_on_a_full_disk_is_asked_while_its_own_half_lies_there(tmp_path, monkeypatch):
    "Else the line would say that there is no space left, and that there is some"
    monkeypatch.setattr(disk, 'room_at', lambda path: (0 if any(tmp_path.iterdir()) else 21e6, tmp_path, 'go elsewhere'))
    assert [disk.size_of(o) for o in (0, 1, 999, 1001, 2e5)] == ['0 kB', '1 kB', '1 kB', '2 kB', '0.2 MB']   # something is never nothing
    with pytest.raises(UserError, match='No space left on device; 0 kB free'), whole_folder(tmp_path/'a'): raise OSError(errno.ENOSPC, 'No space left on device')
    assert not any(tmp_path.iterdir())


def test_component_round_trip(tmp_path):
    a = Toy(4, deep=2).train()
    save_component(a, tmp_path/'toy')
    b = load_component(tmp_path/'toy')
    assert type(b) is Toy and b.config.wide == 4 and not b.training and not any(p.requires_grad for p in b.parameters())
    assert all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters())) and here(tmp_path/'toy') == ['config.json', 'contents.json', 'weights.safetensors']

def test_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    save_component(Toy(), tmp_path/'toy')
    def killed(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(core, 'write_whole', killed)
    with pytest.raises(KeyboardInterrupt): save_component(Toy(9), tmp_path/'toy')
    assert load_component(tmp_path/'toy').config.wide == 3 and here(tmp_path) == ['toy']

def damage(folder, what):
    f, c = folder/'weights.safetensors', folder/'config.json'
    if what == 'no config': c.unlink()
    if what == 'bad config': c.write_text('{')
    if what == 'no class': c.write_text('{"_class_name": "Nothing"}')
    if what == 'no class name': c.write_text('{}')
    if what == 'no weights': f.unlink()
    if what == 'cut off': f.write_bytes(f.read_bytes()[:100])
    if what == 'empty': f.write_bytes(b'')
    if what == 'other widths': c.write_text(json.dumps({**json.loads(c.read_text()), 'wide': 4}))
    if what == 'other depth': c.write_text(json.dumps({**json.loads(c.read_text()), 'deep': 2}))
    if what == 'nonsense': c.write_text(json.dumps({**json.loads(c.read_text()), 'wide': 'three'}))
    if what == 'too large for float32': save_file({k: v.double() + 1e39 for k, v in load_file(f).items()}, f), (folder/'contents.json').unlink()
    if what == 'nan': f.write_bytes(f.read_bytes()[:-4] + b'\x00\x00\xc0\x7f')

@pytest.mark.parametrize('what', ['no config', 'bad config', 'no class', 'no class name', 'no weights', 'cut off', 'empty', 'other widths',
                                  'other depth', 'nonsense', 'nan', 'too large for float32'])
def test_damaged_components_are_one_line(what, tmp_path):
    save_component(Toy(), tmp_path/'toy')
    load_component(tmp_path/'toy')
    damage(tmp_path/'toy', what)
    with pytest.raises(UserError) as e: load_component(tmp_path/'toy')
    assert one_line(e)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    save_component(Toy(), tmp_path/'toy')
    sick = Toy(5)
    sick.layers[0].bias.data[2] = value
    with pytest.raises(UserError, match='layers.0.bias of Toy is not finite'): save_component(sick, tmp_path/'toy')
    assert load_component(tmp_path/'toy').config.wide == 3

def test_what_was_saved_is_loaded_where_nothing_else_was_imported():
    "Every class of the package that can be saved, with `core` alone"
    code = """import ast, latentdiff
from pathlib import Path
from latentdiff.core import find_class
for path in sorted(Path(latentdiff.__file__).parent.glob('[a-z]*.py')):
    for o in ast.parse(path.read_text()).body:
        if isinstance(o, ast.ClassDef) and 'ConfigMixin' in map(ast.unparse, o.bases): assert find_class(o.name).__module__ == f'latentdiff.{path.stem}', o.name
print(find_class('KLAutoencoder').__name__)"""
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout == 'KLAutoencoder\n'

def test_weights_are_what_they_were_whatever_a_notebook_has_for_a_default(tmp_path):
    torch.manual_seed(0)
    toy = Toy()
    save_component(toy, tmp_path/'toy')
    torch.set_default_dtype(torch.bfloat16)
    try: again = load_component(tmp_path/'toy')
    finally: torch.set_default_dtype(torch.float32)
    assert all(torch.equal(v, w) and v.dtype == w.dtype for v, w in zip(toy.state_dict().values(), again.state_dict().values()))

def test_the_class_of_a_notebook_comes_before_that_of_diffusers():
    from latentdiff.autoencoder import PretrainedKL
    assert find_class('AutoencoderKL') is PretrainedKL and find_class('Toy') is Toy

# --- artefacts

class Maker:
    "Writes its number; breaks down in call `at`, half way"
    def __init__(self, at=None): self.calls, self.at = 0, at
    def __call__(self, folder):
        self.calls += 1
        (folder/f'half-{self.calls}').write_text('')
        if self.calls == self.at: raise KeyboardInterrupt
        (folder/'number').write_text(str(self.calls))
        return dict(number=self.calls)

def make(path, maker, steps=1, images='f00', **kw): return artefact(path, maker, dict(images=images), dict(steps=steps, widths=(1, 2)), **kw)

def test_a_part_of_a_containers_image_is_made_anew(tmp_path, monkeypatch):
    "overlayfs gives no folder of a lower layer another name: EXDEV"
    maker, lower, rename = Maker(), [], Path.rename
    make(tmp_path/'run'/'a', maker)
    lower.append((tmp_path/'run'/'a').stat().st_ino)
    def overlay(self, to):
        if self.stat().st_ino in lower: raise OSError(errno.EXDEV, 'Invalid cross-device link', str(self))
        return rename(self, to)
    monkeypatch.setattr(Path, 'rename', overlay)
    make(tmp_path/'run'/'a', maker, steps=2, cheap=True)
    assert made(tmp_path/'run'/'a')['facts'] == dict(number=2) and [o.name for o in (tmp_path/'run').iterdir() if o.name != '.lock'] == ['a']

def test_made_once(tmp_path):
    maker = Maker()
    for _ in range(3): assert make(tmp_path/'run'/'a', maker) == tmp_path/'run'/'a'
    note = made(tmp_path/'run'/'a')
    assert maker.calls == 1 and note['facts'] == dict(number=1) and note['settings'] == dict(steps=1, widths=[1, 2])
    assert here(tmp_path/'run'/'a') == ['half-1', 'made.json', 'number'] and made(tmp_path/'b') == {}

@pytest.mark.parametrize('change,said', [(dict(steps=2), 'steps 1, not 2'), (dict(images='bar'), 'other images'), (dict(version=2), 'version 1 of the recipe')])
def test_what_was_made_from_something_else(change, said, tmp_path, capsys):
    maker = Maker()
    make(tmp_path/'a', maker)
    with pytest.raises(UserError, match=said) as e: make(tmp_path/'a', maker, **change)
    assert one_line(e) and maker.calls == 1 and (tmp_path/'a'/'number').read_text() == '1'
    make(tmp_path/'a', maker, remake=True, **change)
    assert said in capsys.readouterr().out and (tmp_path/'a'/'number').read_text() == '2'
    make(tmp_path/'a', maker, **change)
    assert maker.calls == 2 and here(tmp_path) == ['.lock', 'a']

def test_killed_in_the_middle_goes_on_in_the_same_folder(tmp_path):
    maker = Maker(at=1)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'a', maker)
    assert not (tmp_path/'a').exists()
    make(tmp_path/'a', maker)
    assert here(tmp_path/'a') == ['half-1', 'half-2', 'made.json', 'number']

def test_killed_in_the_middle_and_called_for_something_else_starts_afresh(tmp_path):
    maker = Maker(at=1)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'a', maker)
    make(tmp_path/'a', maker, steps=2)
    assert here(tmp_path/'a') == ['half-2', 'made.json', 'number']

@pytest.mark.parametrize('at', [0, 1])
def test_killed_before_or_between_the_two_renames(at, tmp_path, monkeypatch):
    "Whatever moment, the next call has the new one in place, and makes nothing again"
    maker, renames, rename = Maker(), [], Path.rename
    make(tmp_path/'a', maker)
    def dies(self, target):
        if len(renames) == at: raise KeyboardInterrupt
        renames.append(target)
        return rename(self, target)
    monkeypatch.setattr(Path, 'rename', dies)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'a', maker, steps=2, remake=True)
    monkeypatch.undo()
    assert (tmp_path/'a').exists() == (at == 0)
    make(tmp_path/'a', maker, steps=2, remake=True)
    assert maker.calls == 2 and (tmp_path/'a'/'number').read_text() == '2' and here(tmp_path) == ['.lock', 'a']

def test_remaking_keeps_the_old_one_until_the_new_one_is_whole(tmp_path):
    maker = Maker(at=2)
    make(tmp_path/'a', maker)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'a', maker, steps=2, remake=True)
    assert (tmp_path/'a'/'number').read_text() == '1' and made(tmp_path/'a')['settings']['steps'] == 1

@pytest.mark.parametrize('what', ['folder', 'file', 'odd note', 'damaged note'])
def test_what_is_not_ours_is_refused_and_kept(what, tmp_path):
    f = tmp_path/'a'
    if what == 'file': f.write_text('mine')
    else: f.mkdir()
    if what == 'folder': (f/'mine').write_text('')
    if what == 'odd note': (f/'made.json').write_text('{"mine": 1}')
    if what == 'damaged note': (f/'made.json').write_text('{')
    with pytest.raises(UserError) as e: make(f, Maker())
    assert one_line(e) and f.exists() and here(tmp_path) == ['a']

def test_what_a_file_holds_is_known_by_64_MB_of_it(tmp_path):
    "All of a small one; of a larger one its size, both ends and 1,022 pieces between them: half of it exchanged, or one byte more, is noticed"
    f, seen = tmp_path/'x', {}
    for size in (0, 1, 65_536, 65_537, 200_000):
        for flip in {0, size//2, size - 1} if size else {0}:
            f.write_bytes(bytes(flip) + b'x' + bytes(max(0, size - flip - 1)) if size else b'')
            seen[size, flip] = core.content_of(f)
    for size in (2**26 + 1, 10**9):
        with f.open('wb') as o: o.truncate(size)
        seen[size, None] = core.content_of(f)
        for at, what in ((0, b'x'), (size - 1, b'x'), (size//3, b'x'*2**21)):
            with f.open('r+b') as o:
                o.seek(at)
                o.write(what)
                o.flush()
                seen[size, at] = core.content_of(f)
                o.seek(at)
                o.write(bytes(len(what)))
    assert len({*seen.values()}) == len(seen) == 19 and all(len(o) == 16 for o in seen.values())

def test_what_was_deleted_or_changed_is_made_again_and_nothing_else(tmp_path, capsys):
    "Where the caller says so; killed on the way, too. The others stay as they are"
    def make(folder, calls=[]):
        calls.append(1)
        for k in 'abc':
            if not (folder/k).exists(): (folder/k).write_text(f'{k}{len(calls)}')
    again = lambda **kw: artefact(tmp_path/'x', make, {}, {}, **kw)
    holds = lambda: ''.join((tmp_path/'x'/k).read_text() for k in 'abc' if (tmp_path/'x'/k).exists())
    again()
    (tmp_path/'x'/'a').unlink()
    (tmp_path/'x'/'b').write_text('mine')
    again()
    assert holds() == 'minec1' and not capsys.readouterr().out
    with pytest.raises(UserError, match='x/a is not the file that was made there'): core.check_contents(tmp_path/'x')
    again(cheap=True)
    assert holds() == 'a2b2c1' and capsys.readouterr().out.count('x has lost a, b, or they were changed: made again') == 1 and here(tmp_path) == ['.lock', 'x'] and here(tmp_path/'x') == ['a', 'b', 'c', 'made.json']
    again(cheap=True)
    assert holds() == 'a2b2c1' and not core.check_contents(tmp_path/'x')

def test_killed_while_what_was_lost_is_made_again(tmp_path, monkeypatch):
    "Before any of its writes, renames and removals: the next call makes it whole, and the files that were not lost stay"
    from pathlib import Path
    class Killed(BaseException): pass
    def draw(folder):
        if not (folder/'a').exists(): (folder/'a').write_text('whole')
        (folder/'b').write_text('b')
    go = lambda: artefact(tmp_path/'x', draw, {}, {}, cheap=True)
    def dying(do):
        def f(*args, **kw):
            left[0] -= 1
            if left[0] < 0: raise Killed
            return do(*args, **kw)
        return f
    left, whole = [10**6], False
    for o, k in ((core, 'write_json'), (core, 'remove'), (core, 'replace_folder'), (Path, 'rename')): monkeypatch.setattr(o, k, dying(getattr(o, k)))
    for at in range(20):
        left[0] = 10**6
        go()
        (tmp_path/'x'/'a').write_text('damaged')
        left[0] = at
        try: whole = go()
        except Killed: pass
        left[0] = 10**6
        go()
        assert (tmp_path/'x'/'a').read_text() == 'whole' and here(tmp_path) == ['.lock', 'x'] and here(tmp_path/'x') == ['a', 'b', 'made.json'], at
        if whole: break
    assert at > 5

def test_stopped_between_two_renames_the_old_folder_is_back(tmp_path, monkeypatch):
    for k in ('a', 'new'): (tmp_path/k).mkdir(), (tmp_path/k/'x').write_text(k)
    usual = Path.rename
    def rename(self, to):
        if self.name == 'new': raise KeyboardInterrupt
        return usual(self, to)
    monkeypatch.setattr(Path, 'rename', rename)
    with pytest.raises(KeyboardInterrupt): replace_folder(tmp_path/'new', tmp_path/'a')
    assert (tmp_path/'a'/'x').read_text() == 'a' and sorted(o.name for o in tmp_path.iterdir()) == ['a', 'new']

@pytest.mark.parametrize('whole', [False, True], ids=['a file', 'the folder'])
def test_a_link_in_what_was_begun_leads_nowhere(whole, tmp_path):
    "As a run folder from elsewhere may hold one: a call that goes on would write over what it leads to"
    def make(new, stop=False):
        with open(new/'x', 'r+' if (new/'x').exists() else 'w') as f: f.write('theirs')
        if stop: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): artefact(tmp_path/'a', lambda new: make(new, True), {}, {})
    work, = tmp_path.glob('.a.making')
    mine = work.rename(tmp_path/'mine') if whole else tmp_path
    if whole: work.symlink_to(mine)
    else: (work/'x').unlink(), (work/'x').symlink_to(tmp_path/'x')
    (mine/'x').write_text('my thesis')
    artefact(tmp_path/'a', make, {}, {})
    assert (mine/'x').read_text() == 'my thesis' and (tmp_path/'a'/'x').read_text() == 'theirs' and not (tmp_path/'a'/'x').is_symlink()

def test_a_finished_artefact_asks_for_no_lock(tmp_path):
    "It may lie in a folder where one may only read"
    make(tmp_path/'a', Maker())
    (tmp_path/'.lock').unlink()
    make(tmp_path/'a', Maker())
    assert here(tmp_path) == ['a']

def test_fingerprints():
    assert fingerprint(a=1, b=[2, 'x']) == fingerprint(b=(2, 'x'), a=1) != fingerprint(a=1, b=[2, 'y'])
    assert len(fingerprint()) == 16 and int(fingerprint(), 16) >= 0

# --- locks

HOLD = """
import sys, time
from latentdiff.core import exercise, locked
with locked(sys.argv[1]):
    print('locked', flush=True)
    time.sleep(60)
"""

@pytest.mark.parametrize('name', ['../precious', '..', '.', '', '.lock', 'a/../../precious', '{}/precious'])
def test_a_note_names_no_file_elsewhere(name, tmp_path):
    "What a run of somebody else's calls a file of its own is not deleted"
    (tmp_path/'precious').write_text('important')
    make(tmp_path/'a', Maker(), cheap=True)
    note = json.loads((tmp_path/'a'/'made.json').read_text()) | dict(contents={name.format(tmp_path): 'x'})
    note.pop('seal', None)
    (tmp_path/'a'/'made.json').write_text(json.dumps(sealed(note)))
    with pytest.raises(UserError, match='no file of its own') as e: make(tmp_path/'a', Maker(), cheap=True)
    assert one_line(e) and (tmp_path/'precious').read_text() == 'important' and (tmp_path/'a'/'made.json').exists()

def test_a_run_that_started_elsewhere_writes_nothing_there(tmp_path):
    from fastcore.basics import AttrDict
    from latentdiff.source import take_autoencoder
    for o in ('../elsewhere', str(tmp_path/'elsewhere'), 'unet'):
        with pytest.raises(UserError, match='does not say') as e: take_autoencoder(tmp_path/'run', AttrDict(fingerprint='a'), dict(parts=[o], fingerprint='b'), None)
    assert one_line(e) and not here(tmp_path)

def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    "As in a run of somebody else's"
    (tmp_path/'precious').write_text('important'), (tmp_path/'run').mkdir(), (tmp_path/'run'/'.lock').symlink_to('../precious')
    with locked(tmp_path/'run'): assert (tmp_path/'precious').read_text() == 'important'

def test_a_disk_that_locks_nothing_is_one_line(tmp_path, monkeypatch):
    "As old versions of filelock say it, where the system has no flock"
    from latentdiff import files
    class NoLock:
        def __init__(self, *args, **kw): raise NotImplementedError('FileSystem does not appear to support flock')
    monkeypatch.setattr(core, 'FileLock', NoLock), monkeypatch.setattr(files, 'FileLock', NoLock)
    with pytest.raises(UserError, match='cannot be written .*flock.*: choose another folder') as e: make(tmp_path/'a', Maker())
    with pytest.raises(UserError, match='could not download .*flock.*') as f: files.download('http://127.0.0.1:9/a.bin', tmp_path/'a.bin')
    assert one_line(e) and one_line(f)

def test_one_process_at_a_time(tmp_path):
    with subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'locked\n'
        with pytest.raises(UserError, match='another process works in') as e: make(tmp_path/'a', Maker())
        assert one_line(e) and not (tmp_path/'a').exists()
        other.send_signal(signal.SIGKILL)          # the system lets go of the lock, however it dies
        other.wait()
        make(tmp_path/'a', Maker())
    assert (tmp_path/'a').exists()

@pytest.mark.parametrize('name', ['x\ny', 'x\r', 'x\ny/z'])
def test_a_folder_whose_name_no_line_could_repeat_is_refused(name, tmp_path):
    "What a command advises is to be pasted"
    with pytest.raises(UserError, match='holds a line break: name another'): make(tmp_path/name/'a', Maker())
    assert not [*tmp_path.iterdir()]

def test_one_process_may_lock_twice(tmp_path):
    with locked(tmp_path), locked(tmp_path): pass
    with locked(tmp_path): pass

def test_where_nothing_can_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot be written') as e: make(tmp_path/'file'/'run'/'a', Maker())
    assert one_line(e)

@pytest.mark.parametrize('name,ours', [('core', ['checks', 'core', 'disk']), ('checks', ['checks', 'disk']), ('disk', ['disk'])])
def test_core_is_quick_and_alone(name, ours):
    "No torch for those who only ask for help, and nothing of ours above it; disk not even numpy, because Ctrl-C may come while that is imported"
    code = f"import sys, latentdiff.{name}; print(*[m for m in sys.modules if m in ('torch', 'numpy') or m.startswith('latentdiff.')])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert sorted(out.split()) == [f'latentdiff.{o}' for o in ours] + ['numpy']*(name != 'disk')

def test_some_of_each_where_classes_follow_one_another():
    import torch
    from latentdiff.core import spread
    x = torch.arange(10)
    assert spread(x, 10) is x and spread(x, 99) is x
    assert spread(x, 4).tolist() == [0, 3, 6, 9] and spread(x[:, None], 2).tolist() == [[0], [9]] and spread(x, 1).tolist() == [0]
    for n in (7, 500, 999): assert len({*spread(np.arange(1000), n).tolist()}) == n
