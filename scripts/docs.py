"""docs.py FOLDER [NOTEBOOK...]: the site: each notebook as a page, and the library by its docstrings and comments.
Nothing is executed. With notebooks named, such as labs/02_mnist_cab, the others have only a title, which is quicker."""
import ast, json, posixpath, re, shutil, sys, tempfile
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from sphinx.cmd.build import build_main
from notebooks import NBS, ROOT, labs, lessons, notebooks, parts, read, settings, shown

LINK = re.compile(r'(\]\()(?!https?:|#)([^)\s#]+)')
BADGE = re.compile(r'\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)')
PYTHON = dict(name='python', pygments_lexer='ipython3')

# -- the notebooks

def github(path, cfg):
    "The address of the file or folder `path`, which starts in the root."
    kind = 'tree' if (ROOT/path).is_dir() else 'blob'
    return f"https://github.com/{cfg['user']}/{cfg['repo']}/{kind}/{cfg['branch']}/{path}"

def prose(text, folder, cfg):
    "Markdown of a notebook in `folder` for a page: no picture from elsewhere, and what is no page is linked at GitHub."
    def link(m):
        path = posixpath.normpath(posixpath.join(folder.relative_to(ROOT).as_posix(), m[2]))
        return m[0] if path.endswith(('.ipynb', '.png')) else m[1] + github(path, cfg)
    raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/nbs/images/"
    text = BADGE.sub(r'<a class="colab" href="\1">Open in Colab</a>', text)
    return LINK.sub(link, text.replace(raw, posixpath.relpath(NBS/'images', folder) + '/'))

def prepares(source):
    "Does a cell only install the package, import, or choose the style of figures?"
    def one(o): return isinstance(o, (ast.Import, ast.ImportFrom)) or ast.unparse(o).startswith('plt.style.use(')
    try: body = ast.parse(source).body
    except SyntaxError: return '![ -e /content ] && pip install' in source
    return bool(body) and all(one(o) for o in body)

def joined(cells):
    "`cells` with those in a row that only prepare as one, folded: a page should soon show something."
    new = []
    for c in cells:
        if c['cell_type'] == 'code' and prepares(c['source']):
            if new and 'hide-input' in new[-1]['metadata'].get('tags', []): new[-1]['source'] += '\n\n' + c['source']
            else: new.append(c | dict(metadata=dict(tags=['hide-input'])))
        else: new.append(c)
    return new

def prepared(c, folder, cfg):
    "The cell `c`, as `shown` gives it, for a page in `folder`."
    if c['cell_type'] == 'markdown': return c | dict(source=prose(c['source'], folder, cfg))
    for o in c['outputs']: o.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    metadata = dict(tags=[], mystnb=dict(image=dict(alt=c['alt'])))
    if c['source'].strip(): return c | dict(metadata=metadata)
    metadata['tags'].append('remove-input')             # no empty box
    return c | dict(source='# myst-nb leaves out empty cells', metadata=metadata)

def page(path, cfg):
    "The notebook at `path` as Sphinx should read it."
    nb = read(path)
    cells = [c for c in shown(nb['cells']) if not c['source'].startswith('<!-- notebook only -->')]
    cells = [prepared(c, path.parent, cfg) for c in cells if c['source'].strip() or c['outputs']]
    for c in cells: c.pop('alt')
    return nb | dict(cells=joined(cells), metadata=dict(kernelspec=nb['metadata']['kernelspec'], language_info=PYTHON))

# -- the library

def header(node, lines):
    "The signature of a function with the comments beside its parameters."
    first = node.body[0]
    if first.lineno == node.lineno: return lines[node.lineno-1][node.col_offset:first.col_offset].rstrip()
    return dedent('\n'.join(lines[node.lineno-1:first.lineno-1])).rstrip()

def named(node):
    "The names of the decorators of a function, and of what they are told by name."
    calls = [o for o in node.decorator_list if isinstance(o, ast.Call)]
    plain = [o for o in node.decorator_list if not isinstance(o, ast.Call)]
    return {ast.unparse(o) for o in plain + [c.func for c in calls]} | {k.arg for c in calls for k in c.keywords}

def kind(node):
    "What Sphinx calls a function: a method is a property, or one of the class, if its decorators say so."
    names = named(node)
    if names & {'property', 'as_prop'}: return 'property', ''
    return 'method', ':classmethod:\n' if names & {'classmethod', 'cls_method'} else ''

def entry(directive, name, source, doc, options='', inner=''):
    "One thing of the library: its signature as it is written, and its docstring."
    body = f'```python\n{source}\n```\n\n{cleandoc(doc or "")}\n{inner}'
    return f'`````{"`"*bool(inner)}{{py:{directive}}} {name}\n{options}\n{body}\n`````{"`"*bool(inner)}\n\n'

def method(node, cls, lines):
    "A method, written in its class or patched into it."
    directive, options = kind(node)
    return entry(directive, f'{cls}.{node.name}', header(node, lines), ast.get_docstring(node), options)

def methods(node):
    "The public methods of a class; that a property can be set is no second entry."
    found = [o for o in node.body if isinstance(o, ast.FunctionDef) and not o.name.startswith('_')]
    return [o for o in found if f'{o.name}.setter' not in named(o)]

def class_source(node, lines):
    "The first line of a class, and either its commented fields or the signature of its `__init__`."
    start = [lines[node.lineno-1]]
    fields = [o for o in node.body if isinstance(o, ast.AnnAssign)]
    for o in fields: start += lines[o.lineno-1:o.end_lineno]
    init = [header(o, lines) for o in node.body if isinstance(o, ast.FunctionDef) and o.name == '__init__']
    return '\n'.join(start + ['    ' + l for o in init for l in o.splitlines()])

def patched(tree):
    "The methods that a module patches into classes: pairs of a class's name and a function."
    found = [o for o in tree.body if isinstance(o, ast.FunctionDef) and 'patch' in named(o)]
    return [(ast.unparse(o.args.args[0].annotation), o) for o in found]

def constant(node, lines, most=12):
    "The source of an assignment, at `most` so many lines of it."
    source = lines[node.lineno-1:node.end_lineno]
    return '\n'.join(source[:most] + ['...']*(len(source) > most))

def entries(tree, lines):
    "What each name of a module's `__all__` is, as Markdown."
    patches, made = patched(tree), {}
    for o in tree.body:
        if isinstance(o, ast.FunctionDef):
            made[o.name] = entry('function', o.name, header(o, lines), ast.get_docstring(o))
        elif isinstance(o, ast.ClassDef):
            inner = [method(m, o.name, lines) for m in methods(o) + [f for cls,f in patches if cls == o.name]]
            made[o.name] = entry('class', o.name, class_source(o, lines), ast.get_docstring(o), inner=''.join(inner))
        elif isinstance(o, ast.Assign):
            for t in o.targets:   # `a, b = 1, 2` names two
                for name in map(ast.unparse, t.elts if isinstance(t, ast.Tuple) else [t]): made[name] = entry('data', name, constant(o, lines), '')
    foreign = [method(f, cls, lines) for cls,f in patches if cls not in made]
    return [made[n] for n in public(tree) if n in made or not is_module(n)] + foreign

def is_module(name):
    "`commands` has other modules among its names, because it opens them only when they are asked for."
    return (ROOT/settings()['lib_path']/f'{name}.py').exists()

def public(tree):
    "The names in `__all__` of a module."
    assigned = {ast.unparse(o.targets[0]): o.value for o in tree.body if isinstance(o, ast.Assign)}
    return ast.literal_eval(assigned['__all__'])

def modules():
    "The module of each notebook that exports one: pairs of paths, in the order of the sidebar."
    found = {}
    for p in (ROOT/settings()['lib_path']).glob('*.py'):
        said = re.search(r'File to edit: \.\./(\S+\.ipynb)', p.read_text(encoding='utf-8'))
        if said: found[ROOT/said[1]] = p
    return [(nb, found[nb]) for nb in ordered() if nb in found]

def reference(nb, path):
    "The page of the module at `path`, which the notebook `nb` builds."
    source = path.read_text(encoding='utf-8')
    tree, lib = ast.parse(source), settings()['lib_path']
    head = f'# {path.stem}\n\n{ast.get_docstring(tree)}. Built in [{nb.stem}](../{nb.relative_to(NBS).as_posix()}).\n\n'
    return head + f'```{{py:module}} {lib}.{path.stem}\n```\n\n' + ''.join(entries(tree, source.splitlines()))

# -- the site

def ordered():
    "All notebooks but the index, in the order of the sidebar: lessons, the workshop as the index names it, labs."
    index = ''.join(c['source'] for c in read(NBS/'index.ipynb')['cells'])
    def place(path): return index.find(f'({path.relative_to(NBS).as_posix()})')
    return lessons() + sorted(parts(), key=place) + labs()

def toctree(caption, pages):
    "A table of contents for the sidebar alone."
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```\n\n'

def sidebar(cfg):
    "The tables of contents, as a cell of the index."
    groups = dict(Lessons=lessons(), Workshop=parts(), Labs=labs())
    groups = {k: [p.relative_to(NBS).with_suffix('').as_posix() for p in ordered() if p in v] for k,v in groups.items()}
    groups['Library'] = ['api/index', f'GitHub <https://github.com/{cfg["user"]}/{cfg["repo"]}>']
    trees = ''.join(toctree(k, v) for k,v in groups.items())
    return dict(cell_type='markdown', id='sidebar', metadata={}, source=trees)

def api_index():
    "The page that lists the modules."
    docs = {p.stem: ast.get_docstring(ast.parse(p.read_text(encoding='utf-8'))) for _,p in modules()}
    rows = ''.join(f'| [{name}]({name}.md) | {doc} |\n' for name,doc in docs.items())
    tree = '```{toctree}\n:hidden:\n\n' + '\n'.join(docs) + '\n```\n'
    return f'# API reference\n\n| module | what it holds |\n|---|---|\n{rows}\n{tree}'

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def sources(folder, whole):
    "Write what Sphinx reads into `folder`: the notebooks, of those not in `whole` only titles, and the library."
    cfg = settings()
    for path in notebooks():
        nb = page(path, cfg)
        if path not in whole: nb['cells'] = nb['cells'][:1]
        if path.name == 'index.ipynb': nb['cells'].append(sidebar(cfg))
        write(folder/path.relative_to(NBS), json.dumps(nb))
    for nb,path in modules(): write(folder/'api'/f'{path.stem}.md', reference(nb, path))
    write(folder/'api/index.md', api_index())
    shutil.copytree(NBS/'images', folder/'images')

def build(folder, whole):
    "Build the site in `folder`, the notebooks `whole` in full; a warning, such as of a link to nowhere, is an error."
    with tempfile.TemporaryDirectory() as tmp:
        sources(Path(tmp)/'pages', whole)
        options = ['-q', '-W', '--keep-going', '-c', str(ROOT/'docs'), '-d', f'{tmp}/doctrees']
        failed = build_main([*options, f'{tmp}/pages', f'{tmp}/site'])     # myst-nb puts a folder beside the site
        shutil.copytree(f'{tmp}/site', folder, dirs_exist_ok=True)
        return failed

if __name__ == '__main__': sys.exit(build(Path(sys.argv[1]), [NBS/f'{n}.ipynb' for n in sys.argv[2:]] or notebooks()))
