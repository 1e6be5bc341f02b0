"The site, as `make docs` builds it: a look at five pages, and at one full of faults, which it must find."
import ast, json, re, shutil, subprocess, sys
from functools import lru_cache
from pathlib import Path
from posixpath import normpath
import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
from notebooks import NBS, alt, badge, labs, lessons, parts, read, settings

WHOLE = 'index', '40_sampling', 'parts/core', 'labs/03_simple_diffusion'    # the others have only titles here
PAGES = *WHOLE, 'api/sampling'

@pytest.fixture(scope='session')
def site(shared):
    "The folder of the site, built once for all workers"
    folder, new = shared/'site', shared/'site.new'
    with FileLock(shared/'site.lock'):
        if not folder.exists():
            r = build(ROOT, new, *WHOLE)
            assert r.returncode == 0, r.stderr
            new.rename(folder)
            assert not (shared/'jupyter_execute').exists(), 'only the site is left'
    return folder

def build(root, *args):
    return subprocess.run([sys.executable, root/'scripts/docs.py', *args], capture_output=True, text=True)

@lru_cache
def soup(site, page): return BeautifulSoup((site/f'{page}.html').read_text(encoding='utf-8'), 'html.parser')

# -- what must not be on a page

def lists(page):
    "Outputs that show the list of lines that a notebook keeps, in place of the lines."
    return [o.text for o in page.select('.cell_output pre') if re.search(r'''\[['"].*\\n['"]''', o.text)]

def empty(page):
    "Boxes with nothing in them."
    boxes = page.select('article pre, .cell_input, .cell_output, .output')
    return [str(o) for o in boxes if not o.text.strip() and not o.select('img, progress')]

def directives(page):
    "Lines that only nbdev should see."
    return [l for o in page.select('article') for l in o.text.splitlines() if l.strip().startswith('#|')]

FETCH = r'(?:url\(|@import )[\s"\']*((?:https?:)?//[^)"\';]*)'     # in a style

def remote(page):
    "What a browser would fetch from elsewhere: scripts, styles, fonts, pictures, but not pages that a reader may open."
    found = [o.get('src') or o.get('href') for o in page.select('[src], link[href]')]
    return [l for l in found if re.match(r'https?:|//', l)] + re.findall(FETCH, str(page))

def dead(page, path, site):
    "Links of the page at `path` to files, or to places in them, that are not there."
    links = {o.get('src') or o.get('href') for o in page.select('[src], [href]')}
    return [l for l in links if not re.match(r'\w+:|//', l) and not there(l, path, site)]

def there(link, path, site):
    file, _, place = link.partition('?')[0].partition('#')
    target = site/normpath(Path(path).parent/file) if file else site/path
    return target.is_file() and (not place or f'id="{place}"' in target.read_text(encoding='utf-8'))

def silent(page):
    "Pictures without words for who cannot see them; Sphinx gives such a picture its file's name."
    return [str(o)[:80] for o in page.select('article img') if o.get('alt', '') in ('', o['src'].removeprefix('../'))]

def unclosed(site, path):
    text = (site/path).read_text(encoding='utf-8')
    return ['details']*(text.count('<details') != text.count('</details>'))

def faults(site, name):
    "What is wrong on the page `name`: {kind: where}"
    page, path = soup(site, name), f'{name}.html'
    found = {look.__name__: look(page) for look in (lists, empty, directives, remote, silent)}
    found |= dict(dead=dead(page, path, site), unclosed=unclosed(site, path))
    return {k: v for k, v in found.items() if v}

@pytest.mark.parametrize('name', PAGES)
def test_a_page_has_no_faults(site, name): assert faults(site, name) == {}

def test_styles_fetch_nothing_from_elsewhere(site):
    "The fonts and pictures of every style sheet are files of the site, or stand in the sheet."
    sheets = list(site.rglob('*.css'))
    assert len(sheets) > 3 and [p for p in sheets if re.search(FETCH, p.read_text(encoding='utf-8'))] == []

def cell(kind, source, **kw): return dict(cell_type=kind, id=f'c{len(source)}', metadata={}, source=source) | kw

PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=='
OUTPUTS = [dict(output_type='stream', name='stdout', text="['one line\\n', 'another\\n']\n#| export\n"),
           dict(output_type='display_data', metadata={}, data={'image/png': PNG})]
FAULTS = '''# Planted

[Gone](gone.ipynb), <a href="gone.html">gone too</a> and <a href="#nowhere">nowhere</a>.

<script src="https://cdn.example/a.js"></script><link rel="stylesheet" href="https://fonts.example/a.css">
<style>@import "https://fonts.example/b.css";</style>

```
```

<details><summary>Open for ever</summary>

'''

def test_planted_faults_are_found(tmp_path):
    "In a notebook with each kind of fault, Sphinx names the link between notebooks, and the look at the page the rest."
    for d in ('scripts', 'docs'): shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs/images').mkdir(parents=True)
    cells = [cell('markdown', FAULTS), cell('code', '1', execution_count=None, outputs=OUTPUTS)]
    nb = dict(cells=cells, metadata=read(NBS/'index.ipynb')['metadata'], nbformat=4, nbformat_minor=5)
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(nb))
    r = build(tmp_path, tmp_path/'site')
    assert r.returncode == 1 and "'gone.ipynb'" in r.stderr
    found = faults(tmp_path/'site', 'index')
    expected = dict(lists=1, empty=1, directives=1, remote=3, silent=1, dead=3, unclosed=1)
    assert {k: len(v) for k, v in found.items()} == expected, found

# -- what must be on a page

PICTURES = {'image/png', 'image/gif', 'image/jpeg'}

def text_of(page): return ' '.join(page.text.split())

def code_cells(name): return [c for c in read(NBS/f'{name}.ipynb')['cells'] if c['cell_type'] == 'code']

@pytest.mark.parametrize('name', WHOLE)
def test_a_page_shows_what_its_notebook_printed(site, name):
    "Every text, word for word, and every table as a table."
    outs = [o for c in code_cells(name) if '#| hide' not in c['source'] for o in c['outputs']]
    plain = [o for o in outs if not {'text/html', *PICTURES} & set(o.get('data', {}))]
    texts = [''.join(o.get('text') or o['data']['text/plain']) for o in plain]
    tables = [o for o in outs if '<table' in ''.join(o.get('data', {}).get('text/html', ''))]
    page = soup(site, name)
    shown = text_of(page)
    assert texts and [t for t in texts if ' '.join(t.split()) not in shown] == []
    assert len(page.select('.cell_output table')) == len(tables)

@pytest.mark.parametrize('name', WHOLE)
def test_a_page_says_what_its_pictures_show(site, name):
    "The words behind `fig-alt` are the alternative text."
    said = [alt(c) for c in code_cells(name) for o in c['outputs'] if PICTURES & set(o.get('data', {}))]
    assert [o['alt'] for o in soup(site, name).select('.cell_output img')] == said

def test_answers_are_folded_and_set(site):
    "Solutions and answers are closed; the code in them is a box of code, and the numbered answers are a list."
    folded = [o for o in soup(site, '40_sampling').select('article details') if 'hide' not in o.get('class', [])]
    assert len(folded) == read_text('40_sampling').count('<details>') > 2
    assert not any(o.has_attr('open') for o in folded)
    assert folded[0].select('.highlight-python pre .k') and len(folded[-1].select('ol > li')) == 5

def read_text(name):
    "The prose of a notebook."
    return '\n'.join(c['source'] for c in read(NBS/f'{name}.ipynb')['cells'] if c['cell_type'] == 'markdown')

def test_a_page_soon_shows_something(site):
    "The installation, the imports and the style are one folded line above the opening of a lesson."
    page = soup(site, '40_sampling')
    first = page.select('article .cell')[0]
    assert 'pip install' in first.text and 'import matplotlib' in first.text and 'plt.style.use' in first.text
    assert first.select('details.hide:not([open])') and page.select('article .cell')[1].select('img')

def test_formulas_need_no_network(site):
    "Each is given to the MathJax that lies beside the pages, with its fonts."
    page, prose = soup(site, '40_sampling'), re.sub(r'```.*?```|`[^`]*`', '', read_text('40_sampling'), flags=re.S)
    assert len(page.select('.math')) == len(re.findall(r'\$\$.*?\$\$|\$[^$]+\$', prose, re.S)) > 50
    assert [o['src'] for o in page.select('script[src*=mathjax]')] == ['_static/mathjax/tex-chtml.js']
    assert (site/'_static/mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Regular.woff').stat().st_size > 30_000

def test_a_page_leads_to_colab(site):
    "The badge is a link of ours, because the picture of the usual one would come from the network."
    for name in ('index', '40_sampling', 'parts/core'):
        assert soup(site, name).select('a.colab')[0]['href'] in badge(NBS/f'{name}.ipynb', settings())

def test_sidebar_and_next_lead_through_the_course(site):
    "Lessons, workshop and labs, as the index names them, then the library; `next` goes the same way."
    groups = [[p.relative_to(NBS).with_suffix('.html').as_posix() for p in f()] for f in (lessons, parts, labs)]
    tree = soup(site, 'index').select_one('.sidebar-tree')
    order = [o['href'] for o in tree.select('li.toctree-l1 > a.internal')]
    assert [o.text for o in tree.select('.caption')] == ['Lessons', 'Workshop', 'Labs', 'Library']
    a, b = len(groups[0]), len(groups[0] + groups[1])
    assert order[:a] == groups[0] and sorted(order[a:b]) == groups[1] and order[b:] == [*groups[2], 'api/index.html']
    assert {o['href'] for o in soup(site, 'index').select('article a.internal[href$=html]')} >= set(order[:-1])
    way, page = [], 'index'
    while page != 'api/index':
        page = normpath(Path(page).parent/soup(site, page).select_one('a.next-page')['href']).removesuffix('.html')
        way.append(f'{page}.html')
    assert way == order

def public(path):
    "The names in `__all__` of the module at `path`, without the modules that `commands` has among them."
    names = re.search(r'^__all__ = (\[.*?\])', path.read_text(encoding='utf-8'), re.M | re.S)[1]
    return {n for n in ast.literal_eval(names) if path.stem != 'commands' or not path.with_name(f'{n}.py').exists()}

def test_reference_has_every_public_name(site):
    "Each module has a page, and each name of its `__all__` an entry."
    modules = [p for p in (ROOT/settings()['lib_path']).glob('[!_]*.py') if '__all__' in p.read_text(encoding='utf-8')]
    assert len(modules) >= 16
    for p in modules:
        ids = set(re.findall(r'<dt [^>]*id="([^"]+)"', (site/f'api/{p.stem}.html').read_text(encoding='utf-8')))
        assert {f'latentdiff.{p.stem}.{n}' for n in public(p)} <= ids, p.stem

def test_reference_says_what_a_parameter_is(site):
    "A signature has the comments beside its parameters; so have fields of data classes and methods patched in."
    def entry(module, name):
        return text_of(soup(site, f'api/{module}').find('dt', id=f'latentdiff.{module}.{name}').parent)
    steps = entry('sampling', 'time_steps')
    assert "spacing=None, # 'uniform' in t, 'karras', 'logsnr'; None: 'karras' for edm, else 'uniform'; or the times" in steps
    assert 'falling from start to 0' in steps and 'raise' not in steps
    assert 'size: int # pixels a side' in entry('core', 'Preset')
    assert 'def add_noise(self:Process, x0, eps, t): # clean latents' in entry('noisify', 'Process.add_noise')
    assert entry('commands', 'Run.report').startswith('property')
