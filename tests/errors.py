"What the tests ask of every error that a reader can mend"
import pytest
from latentdiff.core import UserError

def one_line(f, *args, **kwargs):
    "The message of the `UserError` that this raises, which is one line"
    with pytest.raises(UserError) as e: f(*args, **kwargs)
    message = str(e.value)
    assert message and '\n' not in message
    return message
