"""Every notebook runs from top to bottom at the tiny preset: one test a notebook, each in its own process and folders.
A lesson finds what the lessons before it leave in the run folder, as it does for who reads the course in order, so one autoencoder and
one denoiser are trained for all. With LATENTDIFF_LONG=1 each begins with empty folders, as for who opens a lesson alone."""
import os, re, shutil
from pathlib import Path
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
NBS = sorted(p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUN = "import sys; from nbdev.test import test_nb; ok, _ = test_nb(sys.argv[1], profile=False, cell_timeout=None); sys.exit(not ok)"

LEFT = """from latentdiff.autoencoder import make_autoencoder
from latentdiff.core import preset, run_folder
from latentdiff.data import open_images
from latentdiff.noisify import make_latents
from latentdiff.unet import make_denoiser
p = preset()
images = open_images(p.data, p.size, p.n)
ae = make_autoencoder(run_folder(p), images, p)
make_denoiser(run_folder(p), make_latents(run_folder(p), images, ae, p), p)"""
LEAVES = {10: ['autoencoder'], 20: ['latents'], 30: ['unet', 'process', 'scheduler']} # number of a lesson: folders of the run

@pytest.fixture(scope='session')
def left(server, shared):
    "Run folders after lesson 30, made by one worker"
    runs, done = shared/'lessons', shared/'lessons are done'
    with FileLock(shared/'lessons.lock'):
        if not done.exists():
            r = server.code(LEFT, LATENTDIFF_RUNS=f'{runs}', LATENTDIFF_DATA=f'{shared}/data')
            assert r.rc == 0, r.err
            done.touch()
    return runs

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
    for name in [] if os.environ.get('LATENTDIFF_LONG') else earlier(nb):
        found, = request.getfixturevalue('left').glob(f'*/{name}')
        shutil.copytree(found, tmp_path/'runs'/found.parent.name/name)
    r = server.code(RUN, copy, seconds=3600, LATENTDIFF_RUNS=f'{tmp_path}/runs', LATENTDIFF_DATA=f'{tmp_path}/data') # against a hang
    assert r.rc == 0, f'{nb}:\n{r.out[-3000:]}\n{r.err[-6000:]}'
    assert [p.name for p in copy.parent.iterdir()] == [nb.name]
