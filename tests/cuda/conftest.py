"""The devices that kernels are tested on, emulated and real."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda.emulator import EmulatedDevice, compiler

from billm_rt.cuda.device import CupyDevice, Device
from billm_rt.cuda.launch import all_kernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDevice:
    """Every kernel, compiled by the C++ compiler."""
    if compiler() is None:
        pytest.skip("the emulated kernels need a C++ compiler (c++ or CXX)")
    return EmulatedDevice(tmp_path_factory.mktemp("kernels"), all_kernels())


class PoisonedGpu(CupyDevice):
    """A GPU whose fresh memory is NaN."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory full of what nobody should read."""
        array = super().empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(0xFF)
        return array


@pytest.fixture
def emulated(compiled: EmulatedDevice) -> Iterator[EmulatedDevice]:
    """The emulated device; afterwards nothing must have been written outside its arrays."""
    yield compiled
    compiled.check_margins()


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Both devices in turn."""
    return PoisonedGpu() if request.param == "gpu" else request.getfixturevalue("emulated")
