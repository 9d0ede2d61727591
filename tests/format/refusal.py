"""How a broken file must be refused."""

from pathlib import Path

import pytest

from billm_format import BillmFile, CorruptFileError


def refused(path: Path, message: str) -> str:
    """Check that opening the file fails with a clear message that matches; return it."""
    with pytest.raises(CorruptFileError, match=message) as caught, BillmFile.open(path):
        pass
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "; " in text
    assert len(text) < 600 + len(str(path))
    return text
