"""Products with binarized, 8-bit and 4-bit weights on a CPU: the native library, or NumPy where it is missing.

Both follow the arithmetic that `src/kernels.h` states, so they agree bit for bit, whatever the instruction set, the
number of threads, and the number of tokens computed together:

    isum[t, r, b] = sum over the columns j of block b of level[r, j] * x[t, j]          exact
    acc           = 0; for every block b in order: acc += x_scale[t, b] * isum[t, r, b]  float32
    out[t, r]     = acc * row_scale[r] (+ bias[r])

An activation x is an integer of 8 bits (-127..127) or 16, of which it uses 14 (-8191..8191: four of them add up in 16).
"""

import atexit
import contextlib
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from billm_format.layout import GROUP, num_blocks
from billm_rt.cpu import fallback
from billm_rt.cpu.fallback import QuantizedActivations

if TYPE_CHECKING:
    from billm_format.packing import PackedLinear
    from billm_rt.cpu import _native

__all__ = [
    "QuantizedActivations",
    "allow_copies",
    "available",
    "binary_linear",
    "few_tokens",
    "int4_linear",
    "int8_linear",
    "isa",
    "native_linear",
    "quantize",
    "select_isa",
    "set_threads",
    "supported_isas",
    "threads",
    "unavailable_reason",
]

_reason: str | None = None
if os.environ.get("BILLM_NATIVE") == "0":
    _reason = "BILLM_NATIVE=0 is set"
else:
    try:
        from billm_rt.cpu import _native
    except ImportError as _error:
        _reason = f"the native library cannot be loaded ({_error})"


def available() -> bool:
    """Return whether the native library is loaded; if not, everything here works in NumPy, many times slower."""
    return _reason is None


def unavailable_reason() -> str | None:
    """Return why the native library is not loaded, or None."""
    return _reason


def isa() -> str:
    """Return the instruction set in use: one of `supported_isas()`."""
    return "numpy" if _reason else _native.isa()


def supported_isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run, best first; ("numpy",) without the native library."""
    return ("numpy",) if _reason else _native.supported_isas()


def select_isa(name: str) -> None:
    """Use the instruction set of this name from now on (for tests and benchmarks); ValueError for one not supported."""
    if _reason is None:
        _native.select_isa(name)
    elif name != "numpy":
        raise ValueError(f"instruction set {name!r}: only 'numpy' works here, {_reason}")


def allow_copies(allowed: bool) -> None:
    """Let planes be copied where an instruction set decodes from another order; else it reads them as for prompts."""
    if _reason is None:
        _native.allow_copies(allowed)


def few_tokens() -> int:
    """Return how many tokens at once are decoded from copies of the planes in another order, 0: no copies."""
    return 0 if _reason else _native.few_tokens()


def _default_threads() -> int:
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_threads = _default_threads()


def set_threads(n: int) -> None:
    """Use `n` threads (1 to 256, the caller's own included); they start at the next product. ValueError otherwise."""
    global _threads
    if not 1 <= n <= 256:
        raise ValueError(f"threads: wanted 1 to 256, found {n}")
    if _reason is None:
        _native.set_threads(n)
    _threads = n


def threads() -> int:
    """Return how many threads products use: at first OMP_NUM_THREADS if set, else the processors we may run on."""
    return _threads


if _reason is None:
    _native.set_threads(min(_threads, 256))
    atexit.register(_native.set_threads, 1)  # joins the others before the interpreter goes


def quantize(
    x: NDArray[np.float32], block: int, col_scale: NDArray[np.float32] | None = None, bits: int = 16
) -> QuantizedActivations:
    """Quantize x [tokens, cols] (times col_scale [cols], if given) to `bits` (8 or 16), a scale per token and block.

    scale = absmax / top (127 or 8191), value = x / scale rounded half to even; a block of zeros has the scale 0, one
    that holds an infinity or NaN the scale NaN. TypeError for a wrong dtype, ValueError for a wrong shape, block size
    or number of bits.
    """
    if _reason:
        return fallback.quantize(x, block, col_scale, bits)
    tokens, cols = x.shape if x.ndim == 2 and block > 0 else (0, 1)
    values = np.empty((tokens, cols), np.int16)
    scales = np.empty((tokens, num_blocks(cols, max(block, 1))), np.float32)
    _native.quantize(x, col_scale, block, bits, values, scales)
    return QuantizedActivations(values, scales, block, bits)


_checked: "weakref.WeakKeyDictionary[PackedLinear, _native.BinaryLinear]" = weakref.WeakKeyDictionary()


def native_linear(weight: "PackedLinear") -> "_native.BinaryLinear":
    """Return the weight as the native library knows it, checked once: its arrays must stay as they are."""
    linear = _checked.get(weight)
    if linear is None:
        linear = _checked[weight] = _native.BinaryLinear(
            weight.sign,
            weight.second,
            weight.salient,
            weight.scales,
            weight.row_scale,
            weight.bias,
            weight.rows,
            weight.cols,
            weight.block,
        )
    return linear


def binary_linear(
    weight: "PackedLinear", x: QuantizedActivations, row_scale: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return x W^T + bias, float32 [tokens, rows], of a binarized Linear.

    `row_scale` float32 [rows] stands in for the weight's own. The weight's col_scale is the caller's business: it
    belongs into `quantize`. The weight's arrays are checked at its first use and must stay as they are.
    TypeError for a wrong dtype, ValueError for shapes or block sizes that do not fit each other.
    """
    if x.block != weight.block:
        raise ValueError(f"x.block: wanted the weight's block size {weight.block}, found {x.block}")
    if _reason:
        return fallback.binary_linear(weight, x, row_scale)
    linear = native_linear(weight)
    out = np.empty((x.values.shape[0], weight.rows), np.float32)
    linear.multiply(x.values, x.scales, x.bits, out, row_scale)
    return out


def int8_linear(
    weight: NDArray[np.int8], scale: NDArray[np.float16] | NDArray[np.float32], x: QuantizedActivations
) -> NDArray[np.float32]:
    """Return x (weight * scale)^T, float32 [tokens, rows], of an int8 weight [rows, cols] with a scale per row.

    TypeError for a wrong dtype, ValueError for shapes that do not fit each other.
    """
    if _reason:
        return fallback.int8_linear(weight, scale, x)
    out = np.empty((x.values.shape[0], weight.shape[0]), np.float32)
    _native.int8_linear(weight, scale, x.values, x.scales, x.block, x.bits, out)
    return out


def int4_linear(
    weight: NDArray[np.uint8],
    step: NDArray[np.int8],
    scale: NDArray[np.float16] | NDArray[np.float32],
    x: QuantizedActivations,
) -> NDArray[np.float32]:
    """Return x (level * scale)^T, float32 [tokens, rows], of a weight of 4-bit codes in groups of 32 columns.

    `weight` [rows, 16 * groups] holds codes, `step` [groups, rows] what they count (`billm_format.packing.Table`); a
    group of columns is a block of x. TypeError for a wrong dtype, ValueError for shapes that do not fit each other.
    """
    if x.block != GROUP:
        raise ValueError(f"x.block: wanted {GROUP}, the columns of a group, found {x.block}")
    if _reason:
        return fallback.int4_linear(weight, step, scale, x)
    tokens, cols = x.values.shape
    out = np.empty((tokens, weight.shape[0]), np.float32)
    _native.int4_linear(weight, step, scale, cols, x.values, x.scales, x.bits, out)
    return out
