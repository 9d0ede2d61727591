"""Every instruction set that this machine can run, as a parameter."""

from collections.abc import Iterator

import pytest

from billm_rt import cpu


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn; the best one is back in use afterwards."""
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(cpu.supported_isas()[0])


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = cpu.threads()
    yield
    cpu.set_threads(before)
