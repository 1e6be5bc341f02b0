"""The tests with the oldest versions that settings.ini promises on the oldest Python, or with the newest there are on the newest
Python, each in an environment of its own.

    python scripts/versions.py oldest newest                     # what `make test` runs, in both
    python scripts/versions.py oldest --only tests/test_unet.py  # some of it
    python scripts/versions.py newest --python python3.13        # on another Python

It prints the versions, and how many tests passed. uv makes the environments, since pip searches for more than ten minutes for a
set of old versions that fit each other. A Python that is not on this machine is downloaded from GitHub. An environment takes about
8 GB of .versions/, and is used again until the requirements change. Where one cannot be made, a line says what to do, and the tests
run in the other."""
import argparse, os, re, shutil, subprocess, sys
from pathlib import Path
from notebooks import ROOT, settings

HOME = ROOT/'.versions'
SHOWN = 'torch', 'torchvision', 'fastai', 'fastcore', 'diffusers', 'numpy', 'datasets', 'huggingface_hub', 'transformers'
# the bounds of settings.ini themselves, and of what these need in turn the newest that fits
CHOICE = dict(oldest='lowest-direct', newest='highest')
PYTHON = dict(oldest='min_python', newest='max_python')

class Lacking(Exception): "One line: why there is no environment, and what to do"

def do(lack, *command):
    "What a command that fails says stands above, on stderr; `lack` is the line that counts"
    if subprocess.run(command).returncode: raise Lacking(lack)

def tool():
    "The command uv, installed in .versions/uv unless it is there"
    uv = HOME/'uv'/'bin'/'uv'
    if not uv.exists():
        lack = f'uv could not be installed in {HOME/"uv"} (see above): call again when the package index answers'
        do(lack, sys.executable, '-m', 'venv', HOME/'uv')
        do(lack, HOME/'uv'/'bin'/'python', '-m', 'pip', 'install', '-q', 'uv')
    return uv

def environment(kind, python): # 'oldest' or 'newest'; a command, a path or a version like 3.11 -> the environment's Python
    "The folder .versions/`kind`, made unless it is there, for the same requirements"
    home = HOME/kind
    own, made = home/'bin'/'python', home/'made'
    wanted = '\n'.join([python, *(v for k, v in settings().items() if k.endswith('requirements'))])
    if made.exists() and made.read_text() == wanted: return own
    uv = tool()
    shutil.rmtree(home, ignore_errors=True)
    name = f'Python {python}' if python[0].isdigit() else python
    do(f'{name} is not on this machine, and uv could not fetch it (see above): install it, or name another Python that is here with '
       f'`python scripts/versions.py {kind} --python NAME`', uv, 'venv', '-q', '--python', python, home)
    install = uv, 'pip', 'install', '-q', '--python', own
    lack = f'uv could not install what settings.ini asks for on {name} (see above): call again when that is mended'
    do(lack, *install, '--resolution', CHOICE[kind], '-e', f'{ROOT}[eval,dev]')
    do(lack, *install, 'pip') # the tests ask it what an install would bring
    made.write_text(wanted)
    return own

def versions(python): # -> 'Python 3.11.7, torch 2.6.0, ...'
    code = """import platform, sys
from importlib.metadata import version
print(', '.join([f'Python {platform.python_version()}', *[f'{o} {version(o)}' for o in sys.argv[1:]]]))"""
    return subprocess.run([python, '-c', code, *SHOWN], check=True, capture_output=True, text=True).stdout.strip()

def test(python, args): # -> exit code, the last line of pytest
    "The tests, as `make test` runs them"
    args = [*args] or ['-n', 'auto', '--maxprocesses', '4', '--dist', 'worksteal']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    p = subprocess.Popen([python, '-m', 'pytest', *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    last = ''
    for line in p.stdout:
        print(line, end='', flush=True)
        last = line if re.search(r'\d+ (passed|failed|error)', line) else last
    return p.wait(), last.strip(' =\n') or f'pytest came to no end: exit code {p.wait()}'

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='+', choices=list(CHOICE))
    parser.add_argument('--python', help='the Python of the environments; unless given, min_python and max_python of settings.ini')
    parser.add_argument('--only', nargs=argparse.REMAINDER, default=[], help='for pytest: files and options, to the end of the line')
    args = parser.parse_args()
    found = []
    for kind in args.kinds:
        try: python = environment(kind, args.python or settings()[PYTHON[kind]])
        except Lacking as e:
            found.append((1, f'{kind}: not tested: {e}'))
            continue
        names = versions(python)
        code, last = test(python, args.only)
        found.append((code, f'{kind}: {names}: {last}'))
    for _, line in found: print(line)
    return any(code for code, _ in found)

if __name__ == '__main__': sys.exit(main())
