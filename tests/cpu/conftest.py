"""Random weights in the file's layout, and every instruction set this machine can run as a parameter."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from billm_format.layout import ALPHA_O, ALPHA_R, num_blocks, row_bytes
from billm_format.packing import PackedLinear
from billm_rt import cpu

RandomLinear = Callable[..., PackedLinear]


@pytest.fixture
def random_linear(rng: np.random.Generator) -> RandomLinear:
    """A function (rows, cols, block, bias=False, narrow=False) -> PackedLinear of random bytes, padding bits included.

    `narrow`: no level lies beyond -127 to 127, some at either end.
    """

    def make(rows: int, cols: int, block: int, bias: bool = False, narrow: bool = False) -> PackedLinear:
        stride, blocks = row_bytes(cols), num_blocks(cols, block)
        scales = rng.integers(0, 256, (rows, blocks, 4), dtype=np.uint8)
        if narrow:
            scales = np.where(rng.random(scales.shape) < 0.1, 127, scales % 128).astype(np.uint8)
            scales[..., ALPHA_R] %= 128 - scales[..., ALPHA_O]
        return PackedLinear(
            rows,
            cols,
            block,
            sign=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            second=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            salient=rng.integers(0, 256, stride, dtype=np.uint8) & rng.integers(0, 256, stride, dtype=np.uint8),
            scales=scales,
            row_scale=rng.uniform(-0.01, 0.01, rows).astype(np.float16),
            bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
        )

    return make


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
