"""What the decoder asks of the machine it runs on, and the one place that decides which machine that is.

`model.py` is written against `Backend` alone. `reference.py` gives every operation its meaning in float32 NumPy;
`cpu_backend.py` replaces the linear layers by integer products and, with the native library, all layers by one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from billm_format.config import ModelConfig
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear, Table
from billm_rt.cache import KVCache

Array = NDArray[np.float32]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm's float32 tensors [width]."""

    weight: Array
    bias: Array | None  # None: RMSNorm


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer; each group of Linears is what `Backend.load_linears` made of those that read one input."""

    attn_norm: Norm
    mlp_norm: Norm
    q_norm: Array | None
    k_norm: Array | None
    qkv: Any
    o: Any
    up: Any  # gate and up, or up alone
    down: Any


class FusedLayers(Protocol):
    """All decoder layers behind one call."""

    def run(self, x: Array, cache: KVCache, rotary: tuple[Array, Array] | None) -> None:
        """Replace x [tokens, hidden_size] by the last layer's output and write the cache, without committing.

        `rotary` is cos and sin, [tokens, 1, head_dim / 2], or None where positions were learned.
        """
        ...


class Backend(Protocol):
    """The operations of a decoder. Activations are float32 [tokens, width]; weights are what `load_*` returned."""

    device: str  # "cpu"
    isa: str  # the instruction set or path in use: "avx2", "numpy", "exact"
    reason: str  # why this back end was chosen, for people
    kv_dtype: DTypeLike  # of the KV cache: float32 or int16
    chunk: (
        int  # tokens that pass through the decoder together: many share the unpacking of the weights, few take memory
    )

    def load_tensor(self, array: NDArray[Any]) -> Array:
        """Return a small tensor (a norm's weight, a bias) as float32."""
        ...

    def load_linears(self, linears: Sequence[PackedLinear]) -> Any:
        """Prepare Linears that read the same input; the result goes to `linears`."""
        ...

    def load_table(self, table: Table) -> Any:
        """Prepare an embedding, head or table of positions, of 4, 8 or 16 bits."""
        ...

    def fuse(self, config: ModelConfig, layers: Sequence[Layer]) -> FusedLayers | None:
        """Return the layers as one call that does the same as the loop in `model.py`, or None where there is none."""
        ...

    def linears(self, x: Array, group: Any) -> list[Array]:
        """Return W x + bias, float32 [tokens, rows], for every Linear of the group."""
        ...

    def embed(self, token_ids: NDArray[np.int64], table: Any) -> Array:
        """Return the rows of `table` that `token_ids` names, float32 [tokens, width]."""
        ...

    def head(self, x: Array, table: Any) -> Array:
        """Return x times the table's transpose, float32 [tokens, rows]."""
        ...

    def dense(self, x: Array, weight: NDArray[Any]) -> Array:
        """Return x times the transpose of a full-precision weight [rows, cols]."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return x / rms(x) * weight over the last axis."""
        ...

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return (x - mean(x)) / std(x) * weight + bias over the last axis."""
        ...

    def rotary_table(self, start: int, count: int, inv_freq: Array, scale: float) -> tuple[Array, Array]:
        """Return cos and sin, float32 [count, 1, head_dim / 2], of positions start..start + count."""
        ...

    def rotate(self, x: Array, table: tuple[Array, Array]) -> Array:
        """Turn heads [tokens, heads, head_dim] by their positions (rotate-half convention)."""
        ...

    def activate(self, x: Array, function: Activation) -> Array:
        """Apply the activation function; may overwrite x."""
        ...

    def attention(self, query: Array, cache: KVCache, layer: int, window: int | None) -> Array:
        """Attend from query [tokens, heads, head_dim] to `layer` of the cache, which already holds these tokens' keys.

        Causal; `window` limits a query to itself and the window - 1 tokens before it. Returns float32
        [tokens, heads * head_dim].
        """
        ...


def choose(device: str, *, exact: bool = False, threads: int | None = None, activation_bits: int = 16) -> Backend:
    """Return the back end for `device` ("auto" or "cpu"); UsageError names what is not there.

    `exact` takes the float32 NumPy path; else integer activations of `activation_bits` (8 or 16), by the
    native kernels where they can be loaded.
    """
    if activation_bits not in (8, 16):
        raise UsageError(f"activation bits {activation_bits}: wanted 8 or 16")
    if threads is not None and not 1 <= threads <= 256:
        raise UsageError(f"--threads {threads}: wanted 1 to 256")
    if device.split(":")[0] == "cuda":
        raise UsageError(f"--device {device}: this version has no GPU back end yet; use --device cpu")
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: wanted auto or cpu")
    from billm_rt import cpu
    from billm_rt.cpu_backend import CpuBackend
    from billm_rt.reference import ReferenceBackend

    if exact:
        return ReferenceBackend("exact", "float32 NumPy, slow: the exact path was asked for")
    if threads is not None:
        cpu.set_threads(threads)
    return CpuBackend(activation_bits)
