"""The CPU back end: Linears and head on integer activations by `billm_rt.cpu`, the layers by one native call.

Activations are integers of 16 bits, of which they use 14, by default: all but exact. 8 bits save arithmetic, but their
rounding costs: 1.3 %
of perplexity with the full-precision weights of SmolLM2-135M, several times that where a small model came out badly
damaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from billm_format.config import ModelConfig
from billm_format.layout import GROUP
from billm_format.packing import PackedLinear
from billm_format.reader import BillmFile
from billm_rt import cpu
from billm_rt.backend import Array, FusedLayers, Layer, LayerOps, Norm
from billm_rt.cpu.decoder import NativeLayers, NativeModel
from billm_rt.reference import ReferenceBackend, some_rows

# Columns that share an activation scale in front of the head, whose rows have one scale each.
_HEAD_BLOCK = 128

# Bytes of planes and scales in another order beside those in the file: at most, and some room for the rest.
_COPIED_SHARE = 1.25


@dataclass(frozen=True, eq=False)
class Shared:
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

    def __init__(self, activation_bits: int = 16, kv_bits: int = 16) -> None:
        self._bits = activation_bits
        self.activations = f"int{activation_bits}"
        why = cpu.unavailable_reason()
        reason = f"native kernels, {cpu.isa()}" if why is None else f"NumPy, right but many times slower: {why}"
        reason += f", {activation_bits}-bit activations"
        super().__init__(cpu.isa(), reason, f"int{kv_bits}")
        self.activations = f"int{activation_bits}"

    def require(self, file: BillmFile, ctx: int) -> None:
        """Let planes be copied into the order that decodes faster if there is memory for it; else say so."""
        import psutil

        if not cpu.few_tokens():
            return
        parts = (".sign", ".second", ".scales")
        copies = _COPIED_SHARE * sum(info.nbytes for name, info in file.tensors.items() if name.endswith(parts))
        room = copies < psutil.virtual_memory().available
        cpu.allow_copies(room)
        if not room:
            self.reason += f"; {copies / 1e6:,.0f} MB free would let it decode faster"

    def load_linears(self, linears: Sequence[PackedLinear]) -> Any:
        """Sort the Linears by the quantized activation they can share."""
        shared: list[Shared] = []
        for place, linear in enumerate(linears):
            home = next((group for group in shared if group.serves(linear)), None)
            if home is None:
                scale = None if linear.col_scale is None else linear.col_scale.astype(np.float32)
                home = Shared(linear.block, scale, [])
                shared.append(home)
            home.members.append((place, linear))
        return shared

    def fuse(
        self, config: ModelConfig, layers: Sequence[Layer], norm: Norm | None, head: Any
    ) -> FusedLayers | LayerOps:
        """Hand the layers to the native library where it can run them."""
        if not NativeLayers.can_run(config):
            return self
        if head.scale is None or config.has_projections:  # a table in float16, or one that reads something else
            return NativeLayers(config, layers, self._bits)
        return NativeModel(config, layers, self._bits, norm, head, _HEAD_BLOCK)

    def linears(self, x: Array, group: Any) -> list[Array]:
        """Quantize x once per kind of activation and multiply."""
        out: dict[int, Array] = {}
        for shared in group:
            activations = cpu.quantize(x, shared.block, shared.col_scale, self._bits)
            for place, linear in shared.members:
                out[place] = cpu.binary_linear(linear, activations)
        return [out[place] for place in range(len(out))]

    def dense(self, x: Array, weight: Array) -> Array:
        """Return x times the weight's transpose, token by token: BLAS sums many in another order than one."""
        return np.stack([weight @ token for token in x])

    def head(self, x: Array, table: Any) -> Array:
        """Multiply by 4- and 8-bit rows on integer activations; by a float16 table in float32, token by token."""
        if table.scale is None:
            out = np.empty((x.shape[0], table.weight.shape[0]), np.float32)
            for rows, values in some_rows(table):
                for logits, token in zip(out, x, strict=True):  # as in `dense`
                    np.dot(values, token, out=logits[rows])
            return out
        if table.step is not None:
            return cpu.int4_linear(table.weight, table.step, table.scale, cpu.quantize(x, GROUP, None, self._bits))
        return cpu.int8_linear(table.weight, table.scale, cpu.quantize(x, _HEAD_BLOCK, None, self._bits))
