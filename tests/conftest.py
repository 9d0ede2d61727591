"""What all tests share: fresh random seeds that a failure prints, data and GPUs that are skipped aloud when absent."""

import os
import secrets
from pathlib import Path

import numpy as np
import pytest
from random_linear import RandomLinear


@pytest.fixture
def seed() -> int:
    """A fresh seed, or the one in BILLM_TEST_SEED; pytest shows the line when the test fails."""
    value = int(os.environ.get("BILLM_TEST_SEED") or secrets.randbits(32))
    print(f"seed: repeat with BILLM_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A random generator from `seed`."""
    return np.random.default_rng(seed)


@pytest.fixture
def random_linear(rng: np.random.Generator) -> RandomLinear:
    """A function (rows, cols, block, ...) -> PackedLinear."""
    return RandomLinear(rng)


@pytest.fixture(autouse=True)
def gpu_only_where_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `--device auto` on the CPU in tests that are not marked `gpu`: the same tests on every machine."""
    if request.node.get_closest_marker("gpu") is None:
        reason = "hidden from tests that are not marked gpu"
        monkeypatch.setattr("billm_rt.cuda.device.unavailable_reason", lambda index=0: reason)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of test texts: BILLM_DATA, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("BILLM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test texts at {folder}: set BILLM_DATA to the folder that holds wikitext2/, ptb/ and c4/")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is, saying why."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    """Return why no CUDA device can be used, empty if one can."""
    try:
        import cupy
    except ImportError:
        return "needs CuPy (pip install billm-rt[cuda13])"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
