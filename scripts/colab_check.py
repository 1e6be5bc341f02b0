"Would `pip install latentdiff[eval,text]` on a Colab-like machine move torch, or anything else in constraints/colab.txt?"
import json, subprocess, sys, tempfile
from pathlib import Path
from notebooks import ROOT, settings

PYTHON, PINS = '3.12', ROOT/'constraints'/'colab.txt'

def pip(*args):
    "Ask pip for a plan to install `args` on a bare Python 3.12, without installing: the finished process."
    with tempfile.TemporaryDirectory() as tmp:
        return subprocess.run([sys.executable, '-m', 'pip', 'install', '--dry-run', '--ignore-installed', '--only-binary=:all:', '--quiet',
            '--python-version', PYTHON, '--target', tmp, '--report', '-', *args], capture_output=True, text=True)

def index_answers(): return pip('--no-deps', '--retries', '0', 'fastcore').returncode == 0

def plan(requirements, pins=PINS):
    "What pip would install for `requirements` with `pins` held: {name: version}; RuntimeError with pip's reason if it cannot."
    r = pip('-c', str(pins), *requirements)
    if r.returncode: raise RuntimeError(r.stderr.strip())
    return {i['metadata']['name'].lower(): i['metadata']['version'] for i in json.loads(r.stdout)['install']}

def pinned(pins=PINS):
    "{name: version} of the pins."
    lines = [l.split('#')[0].strip().lower() for l in Path(pins).read_text().splitlines()]
    return dict(l.split('==') for l in lines if l)

if __name__ == '__main__':
    cfg = settings()
    try: got = plan(' '.join(cfg[f'{k}requirements'] for k in ('', 'eval_', 'text_')).split())
    except RuntimeError as e: sys.exit(f'{e}\nNo install leaves the pins of {PINS.relative_to(ROOT)} in place: a requirement has become too new.')
    print(f"{len(got)} packages; " + ', '.join(f'{k} stays at {v}' for k,v in pinned().items() if got.get(k) == v))
