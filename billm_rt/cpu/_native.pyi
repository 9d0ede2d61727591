"""The C extension; `billm_rt.cpu` is its face. Arrays are C-contiguous; a wrong dtype is a TypeError, a wrong shape a
ValueError with both numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Scale = NDArray[np.float16] | NDArray[np.float32]

class BinaryLinear:
    """A binarized weight, checked once; holds on to the arrays' memory."""

    def __new__(
        cls,
        sign: NDArray[np.uint8],
        second: NDArray[np.uint8],
        salient: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        row_scale: _Scale,
        bias: NDArray[np.float32] | None,
        rows: int,
        cols: int,
        block: int,
        /,
    ) -> BinaryLinear: ...
    def multiply(
        self,
        values: NDArray[np.int16],
        x_scales: NDArray[np.float32],
        bits: int,
        out: NDArray[np.float32],
        row_scale: NDArray[np.float32] | None,
        /,
    ) -> None: ...

class Decoder:
    """Decoder layers, checked once; holds on to the arrays' memory. `decoder.py` says what the arguments are."""

    def __new__(
        cls,
        sizes: tuple[int, int, int, int, int, int],
        norm_eps: float,
        post_norm: bool,
        gated: bool,
        activation: int,
        activation_bits: int,
        layers: tuple[Any, ...],
        head: tuple[Any, ...] | None,
        /,
    ) -> Decoder: ...
    def run(
        self,
        x: NDArray[np.float32],
        starts: tuple[int, ...],
        cos: NDArray[np.float32] | None,
        sin: NDArray[np.float32] | None,
        first: int,
        caches: tuple[tuple[NDArray[np.generic], NDArray[np.float32]], ...],
        logits: NDArray[np.float32] | None,
        /,
    ) -> None: ...
    def copied_bytes(self) -> int: ...

def int8_linear(
    weight: NDArray[np.int8],
    scale: NDArray[Any],
    values: NDArray[np.int16],
    x_scales: NDArray[np.float32],
    block: int,
    bits: int,
    out: NDArray[np.float32],
    /,
) -> None: ...
def int4_linear(
    weight: NDArray[np.uint8],
    step: NDArray[np.int8],
    scale: NDArray[Any],
    cols: int,
    values: NDArray[np.int16],
    x_scales: NDArray[np.float32],
    bits: int,
    out: NDArray[np.float32],
    /,
) -> None: ...
def quantize(
    x: NDArray[np.float32],
    col_scale: NDArray[np.float32] | None,
    block: int,
    bits: int,
    values: NDArray[np.int16],
    scales: NDArray[np.float32],
    /,
) -> None: ...
def isa() -> str: ...
def allow_copies(allowed: bool, /) -> None: ...
def few_tokens() -> int: ...
def supported_isas() -> tuple[str, ...]: ...
def select_isa(name: str, /) -> None: ...
def set_threads(count: int, /) -> None: ...
def threads() -> int: ...
