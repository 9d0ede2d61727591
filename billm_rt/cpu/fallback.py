"""The same products in NumPy: what runs where the native library is missing. Right, and many times slower."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from billm_format.config import BLOCK_SIZES
from billm_format.layout import num_blocks, row_bytes, table_bytes
from billm_format.packing import PackedLinear, nibble_levels

_ROWS_AT_A_TIME = 512  # bounds the levels that are unpacked at once


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Activations as integers with one scale per token and block.

    x[t, j] is about values[t, j] * scales[t, j // block], and |values| <= top(bits).
    """

    values: NDArray[np.int16]  # [tokens, cols]
    scales: NDArray[np.float32]  # [tokens, num_blocks]
    block: int
    bits: int = 16


def top(bits: int) -> int:
    """Return the largest value of an activation: 127 for 8 bits, 8191 for 16, as four of them add up in 16 bits."""
    return 127 if bits == 8 else 8191


def quantize(
    x: NDArray[np.float32], block: int, col_scale: NDArray[np.float32] | None, bits: int
) -> QuantizedActivations:
    """Quantize x [tokens, cols]; see `billm_rt.cpu.quantize`."""
    _check_block(block)
    _check_bits(bits)
    _check("x", x, np.float32, (-1, -1))
    tokens, cols = x.shape
    blocks = num_blocks(cols, block)
    padded = np.zeros((tokens, blocks * block), np.float32)
    padded[:, :cols] = x
    if col_scale is not None:
        _check("col_scale", col_scale, np.float32, (cols,))
        padded[:, :cols] *= col_scale
    split = padded.reshape(tokens, blocks, block)
    absmax = np.abs(split).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(np.isfinite(absmax), absmax / np.float32(top(bits)), np.float32(np.nan))
        usable = (scales > 0)[:, :, None]
        values = np.where(usable, np.rint(np.clip(split / scales[:, :, None], -top(bits), top(bits))), 0)
    values = values.astype(np.int16).reshape(padded.shape)[:, :cols]
    return QuantizedActivations(np.ascontiguousarray(values), scales, block, bits)


def binary_linear(
    weight: PackedLinear, x: QuantizedActivations, row_scale: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Return x W^T + bias, float32 [tokens, rows]; see `billm_rt.cpu.binary_linear`."""
    rows, cols, stride = weight.rows, weight.cols, row_bytes(weight.cols)
    _check_block(weight.block)
    _check("sign", weight.sign, np.uint8, (rows, stride))
    _check("second", weight.second, np.uint8, (rows, stride))
    _check("salient", weight.salient, np.uint8, (stride,))
    _check("scales", weight.scales, np.uint8, (rows, weight.num_blocks, 4))
    _check_activations(x, cols)
    scale: NDArray[np.float16] | NDArray[np.float32] = weight.row_scale
    if row_scale is None:
        _check_scale("row_scale", scale, rows)
    else:
        _check("row_scale", row_scale, np.float32, (rows,))
        scale = row_scale
    out = np.empty((x.values.shape[0], rows), np.float32)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, rows)
        out[:, start:stop] = _block_products(weight.levels(start, stop), x)
    out *= scale.astype(np.float32)
    if weight.bias is not None:
        _check("bias", weight.bias, np.float32, (rows,))
        out += weight.bias
    return out


def int8_linear(
    weight: NDArray[np.int8], scale: NDArray[np.float16] | NDArray[np.float32], x: QuantizedActivations
) -> NDArray[np.float32]:
    """Return x (weight * scale)^T, float32 [tokens, rows]; see `billm_rt.cpu.int8_linear`."""
    _check_block(x.block)
    _check("weight", weight, np.int8, (-1, -1))
    rows, cols = weight.shape
    _check_scale("scale", scale, rows)
    _check_activations(x, cols)
    out = np.empty((x.values.shape[0], rows), np.float32)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, rows)
        out[:, start:stop] = _block_products(weight[start:stop], x)
    out *= scale.astype(np.float32)
    return out


def int4_linear(
    weight: NDArray[np.uint8],
    step: NDArray[np.int8],
    scale: NDArray[np.float16] | NDArray[np.float32],
    x: QuantizedActivations,
) -> NDArray[np.float32]:
    """Return x (level * scale)^T, float32 [tokens, rows]; see `billm_rt.cpu.int4_linear`."""
    cols = x.values.shape[1]
    _check("weight", weight, np.uint8, (-1, table_bytes(cols)))
    rows = weight.shape[0]
    _check("step", step, np.int8, (num_blocks(cols, x.block), rows))
    _check_scale("scale", scale, rows)
    _check_activations(x, cols)
    out = np.empty((x.values.shape[0], rows), np.float32)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, rows)
        out[:, start:stop] = _block_products(nibble_levels(weight[start:stop], step[:, start:stop], cols), x)
    out *= scale.astype(np.float32)
    return out


def _block_products(level: NDArray[np.generic], x: QuantizedActivations) -> NDArray[np.float32]:
    """Return the sums over blocks, float32 [tokens, rows]. A float64 product of one block is exact: below 2**31."""
    acc = np.zeros((x.values.shape[0], level.shape[0]), np.float32)
    for index, start in enumerate(range(0, level.shape[1], x.block)):
        columns = slice(start, start + x.block)
        isum = x.values[:, columns].astype(np.float64) @ level[:, columns].astype(np.float64).T
        acc += x.scales[:, index, None] * isum.astype(np.float32)
    return acc


def _check_scale(name: str, scale: NDArray[np.generic], rows: int) -> None:
    if scale.dtype not in (np.float16, np.float32):
        raise TypeError(f"{name}: wanted dtype float16 or float32, found {scale.dtype}")
    _check(name, scale, scale.dtype, (rows,))


def _check_activations(x: QuantizedActivations, cols: int) -> None:
    _check_bits(x.bits)
    _check("x.values", x.values, np.int16, (-1, cols))
    _check("x.scales", x.scales, np.float32, (x.values.shape[0], num_blocks(cols, x.block)))
    limit = top(x.bits)
    if x.values.size and (x.values.max() > limit or x.values.min() < -limit):
        raise ValueError(f"x.values: wanted -{limit} to {limit} at {x.bits} bits, found others")


def _check_block(block: int) -> None:
    if block not in BLOCK_SIZES:
        raise ValueError(f"block: wanted 32, 64, 128 or 256, found {block}")


def _check_bits(bits: int) -> None:
    if bits not in (8, 16):
        raise ValueError(f"bits: wanted 8 or 16, found {bits}")


def _check(name: str, array: NDArray[np.generic], dtype: object, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype:
        raise TypeError(f"{name}: wanted dtype {np.dtype(dtype)}, found {array.dtype}")  # type: ignore[call-overload]
    if array.ndim != len(shape) or any(w not in (-1, f) for w, f in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name}: wanted shape {list(shape)}, found {list(array.shape)} (-1: any)")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: wanted a C-contiguous array in native byte order")
