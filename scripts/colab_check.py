"Would `pip install latentdiff[eval,text]` on Colab move torch, or anything else that constraints/ says is there?"
import json, subprocess, sys, tempfile
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from notebooks import ROOT, settings

RUNTIMES = {'colab.txt': '3.13', 'colab-2026.07.txt': '3.12'} # the list of what is there -> Python

def there(pins):
    "{name: version} of the file `pins` in constraints/."
    lines = [l.split('#')[0].strip() for l in (ROOT/'constraints'/pins).read_text(encoding='utf-8').splitlines()]
    return {canonicalize_name(name): version for name, version in (l.split('==') for l in lines if l)}

def wanted(): return ' '.join(settings()[f'{k}requirements'] for k in ('', 'eval_', 'text_')).split()

def unmet(requirements, pins):
    "Those of `requirements` that ask for another version than the one that is there."
    have, reqs = there(pins), [Requirement(r) for r in requirements]
    return [str(r) for r in reqs if have.get(canonicalize_name(r.name), None) and not r.specifier.contains(have[canonicalize_name(r.name)])]

def missing(requirements, pins):
    "Those of `requirements` that are not there in any version."
    return [r for r in requirements if canonicalize_name(Requirement(r).name) not in there(pins)]

def pip(requirements, python):
    "What pip says about `requirements`, for `python`, without what they need in turn; RuntimeError with its reason if it cannot."
    with tempfile.TemporaryDirectory() as tmp:
        r = subprocess.run([sys.executable, '-m', 'pip', 'install', '--dry-run', '--no-deps', '--ignore-installed', '--only-binary=:all:', '--quiet',
            '--retries', '0', '--python-version', python, '--target', tmp, '--report', '-', *requirements], capture_output=True, text=True)
    if r.returncode: raise RuntimeError(r.stderr.strip())
    return [i['metadata'] for i in json.loads(r.stdout)['install']]

def index_answers():
    try: return bool(pip(['fastcore'], '3.13'))
    except RuntimeError: return False

def needs(package, python):
    "The requirements of `package`, as pip describes it, that hold for `python` without extras."
    reqs = [Requirement(r) for r in package.get('requires_dist', [])]
    env = dict(python_version=python, python_full_version=f'{python}.0', extra='')
    return [f'{r.name}{r.specifier}' for r in reqs if not r.marker or r.marker.evaluate(env)]

def additions(requirements, pins):
    "What an install adds, {name: version}; RuntimeError if it would move something that is there."
    added, new = {}, requirements
    while new:
        if bad := unmet(new, pins): raise RuntimeError(f"{pins} does not satisfy {', '.join(bad)}")
        packages = pip(missing(new, pins), RUNTIMES[pins]) if missing(new, pins) else []
        added |= {canonicalize_name(p['name']): p['version'] for p in packages}
        new = [r for p in packages for r in needs(p, RUNTIMES[pins]) if canonicalize_name(Requirement(r).name) not in added]
    return added

if __name__ == '__main__':
    for pins, python in RUNTIMES.items():
        try: added = additions(wanted(), pins)
        except RuntimeError as e: sys.exit(f'{e}\nAn install on Colab would move what is there: a requirement has become too new.')
        print(f"Python {python}: torch stays at {there(pins)['torch']}; added: " + ', '.join(f'{k} {v}' for k, v in added.items()))
