"What the library computed before it was rebuilt, it computes still; a commit that changes a value here says why."
import json
from functools import cache
import pytest, torch
from golden import FILE, compute

now = cache(compute)
WANT = json.loads(FILE.read_text())

def test_no_value_is_missing(): assert now().keys() == WANT.keys()

@pytest.mark.parametrize('name', WANT)
def test_golden(name):
    "Equal but for what another processor's rounding does in ten steps."
    if isinstance(WANT[name], str): assert now()[name] == WANT[name]
    else: torch.testing.assert_close(torch.tensor(now()[name]), torch.tensor(WANT[name]), rtol=1e-4, atol=1e-5)
