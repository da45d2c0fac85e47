"""How a wrong option, file or shape is refused: by one line."""

import pytest


def refused(function, *args, match):
    """Asserts that function(*args) raises ValueError or FileNotFoundError, of one line that holds `match`."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        function(*args)
    assert match in str(error.value) and "\n" not in str(error.value)
