"The tests run at the tiny preset, without the network, from a fixed seed, and leave nothing behind: run and data folders are temporary."
import json, os, random, sys, tempfile
from itertools import filterfalse, zip_longest
from pathlib import Path
import numpy as np, pytest
from fastcore.basics import AttrDict
from filelock import FileLock
from latentdiff.core import preset, run_folder
from processes import Server, command

home = tempfile.TemporaryDirectory(prefix='latentdiff-tests-')  # one a worker; deleted when it ends
os.environ |= dict(LATENTDIFF_PRESET='tiny', LATENTDIFF_RUNS=f'{home.name}/runs', LATENTDIFF_DATA=f'{home.name}/data',
                   HF_HUB_OFFLINE='1', MPLBACKEND='Agg')

@pytest.fixture(autouse=True)
def seeds():
    "What a test draws without a seed does not depend on which tests its worker ran before."
    random.seed(0)
    np.random.seed(0)
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)

@pytest.fixture(scope='session')
def server(tmp_path_factory, shared):
    "Runs programs in processes of their own that need not import torch again: see processes.py. With LATENTDIFF_LONG=1 each finds out all by itself."
    server = Server(tmp_path_factory.mktemp('server'), memory=None if 'LATENTDIFF_LONG' in os.environ else shared/'memory')
    yield server
    server.close()

@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    "A folder that all workers have"
    own = tmp_path_factory.getbasetemp()
    return own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own

@pytest.fixture(scope='session')
def finished_run(server, shared, tmp_path_factory):
    "A run of the tiny preset as lessons and commands share it, made by one worker: AttrDict(made_at, args, and what the command said)"
    folder, said, args = shared/'runs'/run_folder(preset()).name, shared/'finished run.json', ['--data', 'rooms', '--preset', 'tiny']
    with FileLock(shared/'finished run.lock'):
        if not said.exists():
            r = server.run(command(tmp_path_factory.mktemp('command'), 'run'), *args, '--out', folder)
            assert r.rc == 0, r.err
            said.write_text(json.dumps(dict(r, made_at=str(folder), args=args)))
    return AttrDict(json.loads(said.read_text()))

LONG = 'test_nbs.py', 'test_cli.py', 'test_several.py', 'test_zoo.py', 'test_zoo256.py'

def lesson(item):
    "Whether a notebook is one that finds a finished run: a lesson, but not a lab or a part"
    return item.callspec.params['nb'].parent == Path('.')

def pytest_collection_modifyitems(items):
    """What takes long comes first, dealt to the workers in turn: a lesson, a lab or a part, so that nobody waits while another makes the run that
    lessons find; then the other files of `LONG`, each as a whole. xdist gives each worker one stretch of the list; short tests at its end are what
    a worker that is done takes from another."""
    workers, rest = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)), list(items)
    sizes = [(len(items) + i)//workers for i in range(workers)]            # as xdist cuts the list
    hands, short = [[] for _ in sizes], [o for o in rest if o.path.name not in LONG]
    files = {name: [o for o in rest if o.path.name == name] for name in LONG}
    notebooks = files.pop(LONG[0])
    pairs = zip_longest(filter(lesson, notebooks), filterfalse(lesson, notebooks))
    turns = [[o] for pair in pairs for o in pair if o] + [o for o in files.values() if o]
    for i, turn in enumerate(turns): hands[i % workers] += turn
    for hand, size in zip(hands, sizes):
        take = max(0, size - len(hand))
        hand += short[:take]
        del short[:take]
    items[:] = [o for hand in hands for o in hand] + short
