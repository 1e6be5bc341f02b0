"Killed, stopped, starved of disk: what is finished is kept, what is half done is never taken for the whole, and the same command goes on."
import errno, json, os, signal, subprocess, sys, threading
import pytest
from filelock import FileLock
from pathlib import Path
from fastcore.basics import AttrDict
from latentdiff import core
from latentdiff.core import *

LONG = 'LATENTDIFF_LONG' in os.environ
STAGES = 'download', 'unpack', 'start', 'autoencoder', 'encoding', 'denoiser', 'samples', 'to a folder', 'evaluation'
posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

# --- SIGKILL

@pytest.fixture(scope='session')
def deaths(server, shared):
    "What `deaths.py` found, by stage: made by one worker, read by each"
    said, n = shared/'deaths.json', 20 if LONG else 3
    with FileLock(shared/'deaths.lock'):
        if not said.exists():
            (shared/'deaths').mkdir()
            r = server.run(Path(__file__).with_name('deaths.py'), shared/'deaths', n, 0)
            assert r.rc == 0, r.err
            said.write_text(r.out.splitlines()[-1])
    return AttrDict(n=n, **json.loads(said.read_text()))

@posix
@pytest.mark.parametrize('stage', STAGES)
def test_killed_at_any_write_and_called_again(deaths, stage):
    "The next call ends with the bytes of a run that was left in peace, and nothing half made is left"
    assert len(deaths[stage]) >= min(deaths.n, 9)
    for where, killed, again, differs, left in deaths[stage]:
        assert killed == -signal.SIGKILL and not differs and not left, (stage, where, differs, left)
        done = stage == 'to a folder' and int(where.split()[0]) > int(where.split()[-1]) - 2   # killed when all was in place: it says so
        assert again == done, (stage, where)
