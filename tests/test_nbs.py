"Every notebook runs from top to bottom at the tiny preset: one test a notebook, each in its own process and folders."
import shutil
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NBS = sorted(p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUN = "import sys; from nbdev.test import test_nb; ok, _ = test_nb(sys.argv[1], profile=False, cell_timeout=None); sys.exit(not ok)"

@pytest.mark.parametrize('nb', NBS, ids=str)
def test_notebook(nb, tmp_path, server):
    "The notebook raises nothing and writes nothing beside itself. It runs as a copy, out of the way of others that run meanwhile."
    copy = tmp_path/'nbs'/nb.name
    copy.parent.mkdir()
    shutil.copy(ROOT/'nbs'/nb, copy)
    r = server.code(RUN, copy, seconds=3600, LATENTDIFF_RUNS=f'{tmp_path}/runs', LATENTDIFF_DATA=f'{tmp_path}/data') # against a hang
    assert r.rc == 0, f'{nb}:\n{r.out[-3000:]}\n{r.err[-6000:]}'
    assert [p.name for p in copy.parent.iterdir()] == [nb.name]
