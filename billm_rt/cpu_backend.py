"""The CPU back end: linear layers and the head on integer activations by `billm_rt.cpu`, the rest in NumPy.

int8 activations are the fast way, but their rounding costs: 1.3 % of perplexity with the full-precision weights of
SmolLM2-135M, several times that where a small model came out badly damaged. The default is therefore 16 bits, an int8
value and an int8 remainder through the same kernels: within 0.03 % of float32 activations at twice the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from billm_format.packing import PackedLinear
from billm_rt import cpu
from billm_rt.backend import Array
from billm_rt.reference import ReferenceBackend

# Columns that share an activation scale in front of the head, whose rows have one scale each.
_HEAD_BLOCK = 128


@dataclass(frozen=True, eq=False)
class _Shared:
    """Linears that can read one quantized activation: same block size, same column scales."""

    block: int
    col_scale: Array | None
    members: list[tuple[int, PackedLinear]]  # (place in the group, Linear)

    def serves(self, linear: PackedLinear) -> bool:
        if self.col_scale is None or linear.col_scale is None:
            return self.block == linear.block and self.col_scale is linear.col_scale
        return self.block == linear.block and np.array_equal(self.col_scale, linear.col_scale)


class CpuBackend(ReferenceBackend):
    """`ReferenceBackend` with the integer products of `billm_rt.cpu`: native, or NumPy where the library is missing."""

    chunk = 256

    def __init__(self, activation_bits: int = 16) -> None:
        self._remainder = activation_bits == 16
        why = cpu.unavailable_reason()
        reason = f"native kernels, {cpu.isa()}" if why is None else f"NumPy, right but many times slower: {why}"
        reason += f", {activation_bits}-bit activations"
        super().__init__(cpu.isa(), reason, np.int16)  # int16: see KVCache

    def load_linears(self, linears: Sequence[PackedLinear]) -> Any:
        """Sort the Linears by the quantized activation they can share."""
        shared: list[_Shared] = []
        for place, linear in enumerate(linears):
            home = next((group for group in shared if group.serves(linear)), None)
            if home is None:
                scale = None if linear.col_scale is None else linear.col_scale.astype(np.float32)
                home = _Shared(linear.block, scale, [])
                shared.append(home)
            home.members.append((place, linear))
        return shared

    def linears(self, x: Array, group: Any) -> list[Array]:
        """Quantize x once per kind of activation and multiply."""
        out: dict[int, Array] = {}
        for shared in group:
            activations = self._quantize(x, shared.block, shared.col_scale)
            for place, linear in shared.members:
                y = cpu.binary_linear(linear, activations)
                if self._remainder:
                    y = _fold(y)
                    if linear.bias is not None:
                        y -= linear.bias  # both halves came with it
                out[place] = y
        return [out[place] for place in range(len(out))]

    def head(self, x: Array, table: Any) -> Array:
        """Multiply by int8 rows on int8 activations; a float16 table goes the float32 way."""
        if table.scale is None:
            return super().head(x, table)
        y = cpu.int8_linear(table.weight, table.scale, self._quantize(x, _HEAD_BLOCK, None))
        return _fold(y) if self._remainder else y

    def _quantize(self, x: Array, block: int, col_scale: Array | None) -> cpu.QuantizedActivations:
        """Quantize to int8; with 16 bits, the remainders follow as as many tokens again, for `_fold` to add up."""
        coarse = cpu.quantize(x, block, col_scale)
        if not self._remainder:
            return coarse
        scale = np.repeat(coarse.scales, block, axis=1)[:, : x.shape[1]]
        scaled = x if col_scale is None else x * col_scale
        rest = np.subtract(scaled, coarse.values * scale, dtype=np.float32)
        fine = cpu.quantize(rest, block)
        values = np.concatenate((coarse.values, fine.values))
        return cpu.QuantizedActivations(values, np.concatenate((coarse.scales, fine.scales)), block)


def _fold(y: Array) -> Array:
    tokens = y.shape[0] // 2
    return y[:tokens] + y[tokens:]
