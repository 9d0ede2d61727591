"""Random Linears in the file's layout, for the tests of kernels."""

import numpy as np

from billm_format.layout import num_blocks, row_bytes
from billm_format.packing import PackedLinear


class RandomLinear:
    """What the fixture `random_linear` gives: a new Linear at every call."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def __call__(
        self,
        rows: int,
        cols: int,
        block: int,
        *,
        bias: bool = False,
        col_scale: bool = False,
    ) -> PackedLinear:
        """Return a Linear of random bytes, those behind the last column included."""
        rng = self._rng
        stride, blocks = row_bytes(cols), num_blocks(cols, block)
        scales = rng.integers(0, 256, (rows, blocks, 4), dtype=np.uint8)
        return PackedLinear(
            rows,
            cols,
            block,
            sign=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            second=rng.integers(0, 256, (rows, stride), dtype=np.uint8),
            salient=rng.integers(0, 256, stride, dtype=np.uint8) & rng.integers(0, 256, stride, dtype=np.uint8),
            scales=scales,
            row_scale=rng.uniform(-0.01, 0.01, rows).astype(np.float16),
            col_scale=rng.uniform(0.25, 4, cols).astype(np.float16) if col_scale else None,
            bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
        )
