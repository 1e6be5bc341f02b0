"The tests run at the tiny preset, without the network, from a fixed seed, and leave nothing behind: run and data folders are temporary."
import os, random, sys, tempfile
from pathlib import Path
import numpy as np, pytest

home = tempfile.TemporaryDirectory(prefix='latentdiff-tests-')  # one a worker; deleted when it ends
os.environ |= dict(LATENTDIFF_PRESET='tiny', LATENTDIFF_RUNS=f'{home.name}/runs', LATENTDIFF_DATA=f'{home.name}/data',
                   HF_HUB_OFFLINE='1', MPLBACKEND='Agg')

@pytest.fixture(autouse=True)
def seeds():
    "What a test draws without a seed does not depend on which tests its worker ran before."
    random.seed(0)
    np.random.seed(0)
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)

def pytest_collection_modifyitems(items):
    "Notebooks first: they take longest, and the short tests then fill the gaps between workers."
    items.sort(key=lambda item: item.path.name != 'test_nbs.py')
