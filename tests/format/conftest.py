"""What the format's tests share: their own helper modules, and small whole files."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of version 1.0's golden files."""
    return ROOT / "format" / "vectors" / "v1.0"


@pytest.fixture(params=["v1.0/llama", "v1.0/opt", "v1.1/llama-4bit"])
def golden(request: pytest.FixtureRequest, vectors: Path) -> Path:
    """The path of a golden file (not to be written to)."""
    return vectors.parent / f"{request.param}.billm"


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    """A golden file's copy, to be damaged."""
    path = tmp_path / "copy.billm"
    path.write_bytes(golden.read_bytes())
    return path


@pytest.fixture
def victim(vectors: Path, tmp_path: Path) -> Path:
    """A copy of the LLaMA-like golden file, where one file is enough."""
    path = tmp_path / "victim.billm"
    path.write_bytes((vectors / "llama.billm").read_bytes())
    return path
