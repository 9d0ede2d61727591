"""Bit planes to arrays and back, and what the codes of a binarized Linear mean (SPEC.md, "Linear")."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S, GROUP, num_blocks, row_bytes, table_bytes

Bytes = NDArray[np.uint8]
Bits = NDArray[np.bool_]
Float32 = NDArray[np.float32]


def pack_bits(bits: Bits) -> Bytes:
    """Pack bool [..., cols] into uint8 [..., row_bytes(cols)]: column j is bit j % 8 of byte j // 8, padding is 0."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    missing = row_bytes(bits.shape[-1]) - packed.shape[-1]
    return np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)]) if missing else packed


def unpack_bits(plane: Bytes, cols: int) -> Bits:
    """Unpack uint8 [..., row_bytes(cols)] into bool [..., cols]."""
    return np.unpackbits(plane, axis=-1, count=cols, bitorder="little").view(np.bool_)


def magnitudes(scales: Bytes) -> Bytes:
    """Turn scale codes [..., 4] into the four magnitudes [..., 4], both in units of the row multiplier.

    Entry 0: concentrated (alpha_c). 1: sparse (alpha_s). 2: salient, signs differ (alpha_o - alpha_r, at least 0).
    3: salient, signs agree (alpha_o + alpha_r, at most 255).
    """
    wide = scales.astype(np.int16)
    out = np.empty_like(wide)
    out[..., 0] = wide[..., ALPHA_C]
    out[..., 1] = wide[..., ALPHA_S]
    out[..., 2] = np.maximum(wide[..., ALPHA_O] - wide[..., ALPHA_R], 0)
    out[..., 3] = np.minimum(wide[..., ALPHA_O] + wide[..., ALPHA_R], 255)
    return out.astype(np.uint8)


def pack_nibbles(codes: Bytes) -> Bytes:
    """Pack codes 0..15 [rows, cols] into uint8 [rows, table_bytes(cols)].

    Byte i of a group of 32 columns holds its column i in the low and its column 16 + i in the high half.
    """
    rows, cols = codes.shape
    padded = np.zeros((rows, 2 * table_bytes(cols)), np.uint8)
    padded[:, :cols] = codes
    groups = padded.reshape(rows, -1, 2, GROUP // 2)
    packed: Bytes = (groups[:, :, 0] | groups[:, :, 1] << 4).astype(np.uint8)
    return packed.reshape(rows, -1)


def unpack_nibbles(packed: Bytes, cols: int) -> Bytes:
    """Unpack uint8 [rows, table_bytes(cols)] into codes 0..15 [rows, cols]."""
    rows = packed.shape[0]
    groups = packed.reshape(rows, -1, 1, GROUP // 2)
    codes = np.concatenate([groups & 15, groups >> 4], axis=2, dtype=np.uint8)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :cols])


def nibble_levels(packed: Bytes, step: NDArray[np.int8], cols: int) -> NDArray[np.int16]:
    """Return the integer levels int16 [rows, cols] of a 4-bit table's rows; `step` int8 [groups, rows]."""
    codes = unpack_nibbles(packed, cols).astype(np.int16) - 8
    return codes * np.repeat(step.T.astype(np.int16), GROUP, axis=1)[:, :cols]


@dataclass(frozen=True, eq=False)
class Table:
    """A table [rows, cols] that is not binarized (embedding, head, positions), as it lies in the file.

    At 16 bits a value is `weight` itself, at 8 bits `weight * scale`, at 4 bits `(code - 8) * step * scale`.
    """

    weight: NDArray[Any]  # float16 or int8 [rows, cols], or uint8 [rows, table_bytes(cols)]
    cols: int
    scale: NDArray[np.float16] | None = None  # [rows]; None at 16 bits
    step: NDArray[np.int8] | None = None  # [groups of 32 columns, rows], at 4 bits

    def take(self, rows: Any) -> Float32:
        """Return the rows that a slice or an array of indices names, float32 [some rows, cols]."""
        weight = self.weight[rows]
        if self.step is not None:
            weight = nibble_levels(weight, self.step[:, rows], self.cols)
        values: Float32 = weight.astype(np.float32)
        if self.scale is not None:
            values *= self.scale[rows].astype(np.float32)[:, None]
        return values


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A binarized Linear as it lies in the file; arrays may be read-only views of a memory map.

    `y = W x + bias` with `W[r, j] = level[r, j] * row_scale[r] * col_scale[j]`, level an integer in -255..255.
    """

    rows: int
    cols: int
    block: int
    sign: Bytes  # [rows, row_bytes(cols)], bit 1: +, 0: -
    second: Bytes  # same shape; salient column: residual sign (1: +), else: group flag (1: sparse)
    salient: Bytes  # [row_bytes(cols)], bit 1: salient column
    scales: Bytes  # [rows, num_blocks, 4], alpha_c, alpha_s, alpha_o, alpha_r
    row_scale: NDArray[np.float16]  # [rows]
    col_scale: NDArray[np.float16] | None = None  # [cols]
    bias: Float32 | None = None  # [rows]

    @property
    def num_blocks(self) -> int:
        """Blocks per row; the last may be short."""
        return num_blocks(self.cols, self.block)

    def levels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int16]:
        """Return the integer levels int16 [stop - start, cols] of rows start..stop, in units of row_scale."""
        rows = slice(start, self.rows if stop is None else stop)
        positive = unpack_bits(self.sign[rows], self.cols)
        second = unpack_bits(self.second[rows], self.cols)
        salient = unpack_bits(self.salient, self.cols)
        index = np.where(salient, 2 + (second == positive), second)
        block_of_col = np.arange(self.cols) // self.block
        table = magnitudes(self.scales[rows]).astype(np.int16)
        level = np.take_along_axis(table.reshape(table.shape[0], -1), 4 * block_of_col + index, axis=1)
        return np.where(positive, level, -level)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return the weights float32 [stop - start, cols] of rows start..stop."""
        rows = slice(start, self.rows if stop is None else stop)
        weight = self.levels(start, stop) * self.row_scale[rows].astype(np.float32)[:, None]
        if self.col_scale is not None:
            weight *= self.col_scale.astype(np.float32)
        return weight
