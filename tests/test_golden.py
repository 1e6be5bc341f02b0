"What the library computed before it was rebuilt, it computes still; a commit that changes a value here says why."
import json
import pytest, torch
from golden import FILE, compute

NOW = compute()
WANT = json.loads(FILE.read_text())

def test_no_value_is_missing(): assert NOW.keys() == WANT.keys()

@pytest.mark.parametrize('name', WANT)
def test_golden(name):
    "Equal but for what another processor's rounding does in ten steps."
    if isinstance(WANT[name], str): assert NOW[name] == WANT[name]
    else: torch.testing.assert_close(torch.tensor(NOW[name]), torch.tensor(WANT[name]), rtol=1e-4, atol=1e-5)
