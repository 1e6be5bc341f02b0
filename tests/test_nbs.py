"""Every notebook runs from top to bottom at the tiny preset: one test a notebook, each in its own process and folders.
A lesson finds what the lessons before it leave in the run folder, as it does for who reads the course in order, and the overview a run that
is there already, so one autoencoder and one denoiser are trained for all. With LATENTDIFF_LONG=1 each begins with empty folders, as for who opens a lesson alone."""
import os, re, shutil
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NBS = sorted(p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUN = "import sys; from nbdev.test import test_nb; ok, _ = test_nb(sys.argv[1], profile=False, cell_timeout=None); sys.exit(not ok)"

LEAVES = {10: ['autoencoder'], 20: ['latents'], 30: ['unet', 'process', 'scheduler']} # number of a lesson: folders of the run

def earlier(nb):
    "Folders of the run that lessons before `nb` leave"
    number = re.match(r'\d+_', str(nb))
    return [o for k, names in LEAVES.items() if number and k < int(number[0][:-1]) for o in names]

@pytest.mark.parametrize('nb', NBS, ids=str)
def test_notebook(nb, tmp_path, server, request):
    "The notebook raises nothing and writes nothing beside itself. It runs as a copy, out of the way of others that run meanwhile."
    copy = tmp_path/'nbs'/nb.name
    copy.parent.mkdir()
    shutil.copy(ROOT/'nbs'/nb, copy)
    if 'LATENTDIFF_LONG' not in os.environ and (earlier(nb) or nb.name == 'index.ipynb'):
        run = Path(request.getfixturevalue('finished_run').made_at)
        for name in earlier(nb): shutil.copytree(run/name, tmp_path/'runs'/run.name/name)
        if nb.name == 'index.ipynb': shutil.copytree(run, tmp_path/'runs'/'demo')
    r = server.code(RUN, copy, seconds=3600, LATENTDIFF_RUNS=f'{tmp_path}/runs', LATENTDIFF_DATA=f'{tmp_path}/data') # against a hang
    assert r.rc == 0, f'{nb}:\n{r.out[-3000:]}\n{r.err[-6000:]}'
    assert [p.name for p in copy.parent.iterdir()] == [nb.name]
