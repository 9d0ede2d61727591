"""The devices that kernels are tested on, emulated and real; random Linears in the file's layout."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.emulator import EmulatedDevice, compiler

from billm_format.layout import num_blocks, row_bytes
from billm_format.packing import PackedLinear
from billm_rt.cuda.device import CupyDevice, Device
from billm_rt.cuda.launch import all_kernels

RandomLinear = Callable[..., PackedLinear]


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


@pytest.fixture
def random_linear(rng: np.random.Generator) -> RandomLinear:
    """A function (rows, cols, block) -> PackedLinear with every byte random, those behind the last column included."""

    def make(rows: int, cols: int, block: int, *, col_scale: bool = False, bias: bool = False) -> PackedLinear:
        stride, blocks = row_bytes(cols), num_blocks(cols, block)
        return PackedLinear(
            rows,
            cols,
            block,
            sign=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            second=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            salient=rng.integers(0, 256, stride, dtype=np.uint8) & rng.integers(0, 256, stride, dtype=np.uint8),
            scales=rng.integers(0, 256, (rows, blocks, 4), dtype=np.uint8),
            row_scale=rng.uniform(-0.01, 0.01, rows).astype(np.float16),
            col_scale=rng.uniform(0.25, 4, cols).astype(np.float16) if col_scale else None,
            bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
        )

    return make
