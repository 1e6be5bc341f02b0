"What the scripts and tests need to know about the project and its notebooks."
from configparser import ConfigParser
from pathlib import Path
import json, re

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'

def settings():
    "The [DEFAULT] section of settings.ini."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def labs(): return [p for p in notebooks() if p.parent.name == 'labs']

def parts(): return [p for p in notebooks() if p.parent.name == 'parts']

def lessons(): return [p for p in notebooks() if re.match(r'\d\d_', p.name) and p.parent == NBS]

def read(path):
    "The notebook at `path`, the source of each cell as one string."
    nb = json.loads(Path(path).read_text(encoding='utf-8'))
    for c in nb['cells']: c['source'] = ''.join(c['source'])
    return nb

GPU = dict(accelerator='GPU', colab=dict(gpuType='T4')) # what Colab reads in a notebook's metadata when it opens one

def ask_for_gpu(path):
    "Make the notebook at `path` ask Colab for a GPU."
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['metadata'] |= GPU
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')

def directives(cell):
    "The first words of the `#|` lines that a code cell starts with."
    lines = cell['source'].splitlines() if cell['cell_type'] == 'code' else []
    return {re.match(r'#\|\s*([\w-]+)', l)[1] for l in lines if l.startswith('#|')}

def shown(cells, leave_out=('hide',)):
    "`cells` as a reader should see them: without those that hold one of `leave_out`; `echo: false` keeps only outputs."
    return [c | dict(source=bare(c), alt=alt(c)) for c in cells if not directives(c) & set(leave_out)]

def alt(cell):
    "What the picture is that `cell` draws, from its line `#| fig-alt: ...`; empty without one."
    found = re.search(r'^#\|\s*fig-alt:\s*(.+)$', cell['source'], re.M)
    return found[1] if found else ''

def bare(cell):
    "The source of `cell` without directives."
    if 'echo' in directives(cell): return ''
    return '\n'.join(l for l in cell['source'].splitlines() if not l.startswith('#|'))

def badge(path, cfg):
    "The Colab badge of the notebook at `path`."
    url = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{path.relative_to(ROOT).as_posix()}"
    return f'[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})'

def setup_cell(cfg):
    "The cell that installs the package on Colab, as it was released."
    return f'''#| eval: false
# On Colab, choose a GPU first: Runtime > Change runtime type > T4 GPU. This line installs the package there and leaves Colab's torch alone.
![ -e /content ] && pip install -q "{cfg['lib_name']}[eval] @ git+https://github.com/{cfg['user']}/{cfg['repo']}@v{cfg['version']}"
# To keep what you train on your Drive, remove the # from the next two lines.
# from google.colab import drive; drive.mount('/content/drive')
# %env LATENTDIFF_RUNS=/content/drive/MyDrive/latentdiff
import latentdiff'''

def set_up(path, cfg):
    "Give the notebook at `path` the set-up cell of this version, in place of another one's."
    nb = json.loads(path.read_text(encoding='utf-8'))
    cell = next(c for c in nb['cells'] if '![ -e /content ]' in ''.join(c['source']))
    module = ''.join(o for o in cell['source'] if o.startswith('#| default_exp'))
    cell['source'] = (module + setup_cell(cfg)).splitlines(keepends=True)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')

if __name__ == '__main__': # after the version in settings.ini has changed
    for p in notebooks(): set_up(p, settings())
    for p in set(notebooks()) - set(parts()): ask_for_gpu(p) # the workshop trains nothing worth a GPU
