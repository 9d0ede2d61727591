"""What the kernels compute, in float64 NumPy: shared by the tests on the emulated device and on a GPU."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from billm_format.packing import PackedLinear

Float64 = NDArray[np.float64]


def products(x: NDArray[np.generic], linears: Sequence[PackedLinear]) -> Float64:
    """Return W x + bias of all Linears, side by side."""
    wide = x.astype(np.float64)
    outs = [wide @ linear.dequantize().astype(np.float64).T for linear in linears]
    return np.concatenate(
        [out + (0 if linear.bias is None else linear.bias) for out, linear in zip(outs, linears, strict=True)], axis=1
    )


def normed(x: Float64, weight: NDArray[np.float32], bias: NDArray[np.float32] | None, eps: float) -> Float64:
    """Return the RMSNorm, or with a bias the LayerNorm, over the last axis."""
    centred = x if bias is None else x - x.mean(axis=-1, keepdims=True)
    out: Float64 = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight
    return out if bias is None else out + bias


def turned(x: Float64, angle: Float64) -> Float64:
    """Turn heads [tokens, heads, width] by angles [tokens, width / 2], element i with element i + width / 2."""
    half = x.shape[-1] // 2
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)


def attention(query: Float64, keys: Float64, values: Float64, past: int, window: int) -> Float64:
    """Return mixed values [tokens, heads, width]; query of that shape, keys and values [kv_heads, seen, width]."""
    tokens, heads, width = query.shape
    out = np.empty_like(query)
    for token in range(tokens):
        last = past + token
        first = max(0, last - window + 1) if window else 0
        for head in range(heads):
            of = head // (heads // keys.shape[0])
            scores = keys[of, first : last + 1] @ query[token, head] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ values[of, first : last + 1]
    return out


def error(found: NDArray[np.generic], wanted: Float64) -> float:
    """Return the largest difference in units of the largest value wanted."""
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())
