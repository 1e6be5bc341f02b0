"Exercises check themselves: a stub is 'not yet' and stops nothing, the folded solution is 'right'"
import contextlib, importlib, io, re, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
from notebooks import labs, lessons, read

TAUGHT = lessons() + labs()

def exercises(cells):
    "(stub, check, solution) of each exercise, as code"
    for i, c in enumerate(cells):
        if not c['source'].startswith('# exercise'): continue
        check, solution = cells[i + 1], cells[i + 2]
        assert check['cell_type'] == 'code' and check['source'].startswith('@exercise'), f"no check behind {c['source']!r}"
        found = re.search(r'<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n.*</details>', solution['source'], re.S)
        assert found, f"no folded solution behind {c['source']!r}"
        yield c['source'], check['source'], found[1]

def names_of(nb):
    "What an exercise may use: all that the notebook's module has, and what the notebook imports"
    module = next((re.search(r'default_exp (\S+)', c['source']) for c in nb['cells'] if 'default_exp' in c['source']), None)
    names = dict(vars(importlib.import_module(f'latentdiff.{module[1]}'))) if module else {}
    for c in nb['cells']:
        lines = [o for o in c['source'].splitlines() if o.strip() and not o.startswith('#')]
        if c['cell_type'] == 'code' and lines and re.match(r'(from|import) ', lines[0]): exec(c['source'], names)
    return names

def said(code, names):
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(code, names)
    return out.getvalue().strip().splitlines()[-1]

@pytest.mark.parametrize('path', TAUGHT, ids=lambda p: p.stem)
def test_exercises(path):
    nb = read(path)
    found = list(exercises(nb['cells']))
    assert len(found) >= 2
    for stub, check, solution in found:
        names = names_of(nb)
        assert said(f'{stub}\n{check}', names).startswith('not yet'), stub
        assert said(f'{solution}\n{check}', names) == 'right', solution

@pytest.mark.parametrize('path', TAUGHT, ids=lambda p: p.stem)
def test_committed_outputs_of_exercises_are_those_of_the_stub(path):
    for c in read(path)['cells']:
        if c['cell_type'] == 'code' and c['source'].startswith('@exercise'):
            assert ''.join(c['outputs'][0]['text']).startswith('not yet'), c['source']
