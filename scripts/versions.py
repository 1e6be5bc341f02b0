"""The tests with the oldest versions that settings.ini promises, or with the newest there are, each in an environment of its own.

    python scripts/versions.py oldest newest                     # what `make test` runs, in both
    python scripts/versions.py oldest --only tests/test_unet.py  # some of it

It prints the versions, and how many tests passed. An environment takes about 8 GB of .versions/, and is used again the next time."""
import argparse, os, re, shutil, subprocess, sys
from pathlib import Path
from notebooks import ROOT, settings

EXTRAS = '', 'eval_', 'text_', 'dev_', 'docs_', 'track_'
SHOWN = 'torch', 'torchvision', 'fastai', 'fastcore', 'diffusers', 'numpy', 'datasets', 'huggingface_hub', 'transformers'

def oldest():
    "Every lower bound of settings.ini, as the one version that is allowed"
    bounds = ' '.join(settings()[f'{k}requirements'] for k in EXTRAS).split()
    return [r.replace('>=', '==') for r in bounds if '>=' in r and not r.startswith('setuptools')]

def environment(kind, python): # 'oldest' or 'newest'; a command -> the environment's Python
    "The folder .versions/`kind`, made unless it is there"
    home = ROOT/'.versions'/kind
    own = home/'bin'/'python'
    if (home/'ready').exists(): return own
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([python, '-m', 'venv', home], check=True)
    pins = home/'pins.txt'
    pins.write_text('\n'.join(oldest()) if kind == 'oldest' else '')
    subprocess.run([own, '-m', 'pip', 'install', '-q', '-c', pins, '-e', f'{ROOT}[eval,dev]'], check=True)
    subprocess.run([own, '-m', 'pip', 'check'])
    (home/'ready').touch()
    return own

def versions(python): # -> 'Python 3.11.7, torch 2.6.0, ...'
    code = """import platform, sys
from importlib.metadata import version
print('Python', platform.python_version(), *[f', {o} {version(o)}' for o in sys.argv[1:]])"""
    said = subprocess.run([python, '-c', code, *SHOWN], check=True, capture_output=True, text=True).stdout
    return said.strip().replace(' ,', ',')

def test(python, args): # -> exit code, the last line of pytest
    "The tests, as `make test` runs them"
    args = [*args] or ['-n', 'auto', '--maxprocesses', '4', '--dist', 'worksteal']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    p = subprocess.Popen([python, '-m', 'pytest', *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    last = ''
    for line in p.stdout:
        print(line, end='', flush=True)
        last = line if re.search(r'\d+ (passed|failed|error)', line) else last
    return p.wait(), last.strip(' =\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='+', choices=['oldest', 'newest'])
    parser.add_argument('--python', default=sys.executable, help='the Python of the environments')
    parser.add_argument('--only', nargs='+', default=[], help='for pytest: files, options')
    args = parser.parse_args()
    found = []
    for kind in args.kinds:
        python = environment(kind, args.python)
        found.append((kind, versions(python), *test(python, args.only)))
    for kind, names, code, last in found: print(f'{kind}: {names}: {last}')
    return any(code for _, _, code, _ in found)

if __name__ == '__main__': sys.exit(main())
