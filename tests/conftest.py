"The tests run at the tiny preset, without the network, and leave nothing behind: run and data folders are temporary."
import os, tempfile
from pathlib import Path

home = tempfile.TemporaryDirectory(prefix='latentdiff-tests-')  # one a worker; deleted when it ends
os.environ |= dict(LATENTDIFF_PRESET='tiny', LATENTDIFF_RUNS=f'{home.name}/runs', LATENTDIFF_DATA=f'{home.name}/data',
                   HF_HUB_OFFLINE='1', MPLBACKEND='Agg')

def pytest_collection_modifyitems(items):
    "Notebooks first: they take longest, and the short tests then fill the gaps between workers."
    items.sort(key=lambda item: item.path.name != 'test_nbs.py')
