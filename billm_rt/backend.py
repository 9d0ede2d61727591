"""What the decoder asks of the machine it runs on, and the one place that decides which machine that is.

`model.py` is written against `Backend` alone. `reference.py` gives every operation its meaning in float32 NumPy;
`cpu_backend.py` replaces the linear layers by integer products and, with the native library, all layers by one call;
`cuda_backend.py` keeps everything on a GPU.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear, Table
from billm_format.reader import BillmFile
from billm_rt.cache import CacheBatch, KVCache, Texts
from billm_rt.sampling import Logits

T = TypeVar("T")
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


@runtime_checkable
class FusedLayers(Protocol):
    """All decoder layers behind one call."""

    def run(self, x: Any, texts: Texts, rotary: tuple[Any, Any] | None) -> None:
        """Replace x [tokens, hidden_size] by the last layer's output and write the caches, without committing.

        `rotary` is what `Backend.rotary_table` returned for these tokens, or None where positions were learned.
        """
        ...

    @property
    def few_tokens(self) -> int:
        """How many tokens at once, at most, read weights from copies in memory instead of the file; 0: none do."""
        ...

    def copied_bytes(self) -> int:
        """Return the bytes of those copies; none before they are wanted."""
        ...


@runtime_checkable
class FusedHead(Protocol):
    """Fused layers that also know the last norm and the head."""

    def run_to_logits(self, x: Any, texts: Texts, rotary: tuple[Any, Any] | None, *, every: bool) -> Array:
        """As `FusedLayers.run`; return the logits float32 [tokens or 1, vocab_size] of every token or of the last."""
        ...


class LayerOps(Protocol):
    """The operations inside a layer, for the loop in `model.py`. Activations are float32 [tokens, width]."""

    def linears(self, x: Array, group: Any) -> list[Array]:
        """Return W x + bias, float32 [tokens, rows], for every Linear of the group."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return x / rms(x) * weight over the last axis."""
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


class Backend(Protocol):
    """The operations around the layers, and `fuse` for the layers. Weights are what `load_*` returned.

    Activations are float32 [tokens, width]: NumPy arrays, or what a device has in their place. Token ids come from
    NumPy arrays.
    """

    device: str  # "cpu", "cuda:0"
    isa: str  # the instruction set or path in use: "avx2", "numpy", "exact", "cuda"
    reason: str  # why this back end was chosen, for people
    activations: str  # number type of what the Linears multiply by: "int16", "float32" ...
    kv_type: str  # number type of the KV cache
    chunk: (
        int  # tokens that pass through the decoder together: many share the unpacking of the weights, few take memory
    )

    def require(self, file: BillmFile, ctx: int) -> None:
        """Raise DoesNotFitError, before anything is loaded, if a model with `ctx` tokens of context cannot fit."""
        ...

    def device_memory(self, file: BillmFile, kv_cache: int) -> dict[str, int]:
        """Return the bytes that the model takes on a device of its own, by kind; `kv_cache` of them are caches.

        `weights.<kind>`, `kv_cache`, `scratch` (what else is in use), `pool` (all that this process holds, used or not)
        and `card` (all that is in use there, other programs included). Empty where the device is the process.
        """
        ...

    def new_cache(self, config: ModelConfig, ctx: int) -> KVCache:
        """Return an empty cache for up to `ctx` tokens, kept as this back end likes it."""
        ...

    def gather(self, caches: Sequence[KVCache]) -> CacheBatch:
        """Return two or more caches as a batch."""
        ...

    def require_room(self, config: ModelConfig, caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
        """Raise DoesNotFitError if the caches cannot all grow to their `lengths` in tokens."""
        ...

    def load_tensor(self, array: NDArray[Any]) -> Any:
        """Return a small tensor (a norm's weight, a bias) as float32."""
        ...

    def load_linears(self, linears: Sequence[PackedLinear]) -> Any:
        """Prepare Linears that read the same input; the result goes to `linears`."""
        ...

    def load_table(self, table: Table) -> Any:
        """Prepare an embedding, head or table of positions, of 4, 8 or 16 bits."""
        ...

    def fuse(
        self, config: ModelConfig, layers: Sequence[Layer], norm: Norm | None, head: Any
    ) -> FusedLayers | LayerOps:
        """Return the layers as one call that does what the loop in `model.py` does, or the operations for the loop.

        `norm` (of the last layer's output, if any) and `head` (a table) are for those that are a `FusedHead` as well.
        """
        ...

    def take_step(
        self,
        step: Callable[[Any, Any], T],
        kind: str,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        texts: Texts,
    ) -> T:
        """Return step(token_ids, positions) for tokens that go behind those in `texts`, ids and positions as `embed`
        takes them. Steps of one `kind` are the same work but for these: a device may do what it recorded of an earlier.
        """
        ...

    def embed(self, rows: Any, table: Any) -> Any:
        """Return the rows of `table` that are named, float32 [tokens, width]."""
        ...

    def add(self, x: Any, y: Any) -> Any:
        """Return x + y; may overwrite x."""
        ...

    def head(self, x: Any, table: Any) -> Any:
        """Return the logits, x times the table's transpose, float32 [tokens, rows], for `logits` or `rows`."""
        ...

    def logits(self, head: Any) -> Array:
        """Return what `head` returned as a NumPy array."""
        ...

    def rows(self, head: Any) -> Sequence[Logits]:
        """Return what `head` returned token by token, for a `Sampler`, valid until `head` is called again."""
        ...

    def dense(self, x: Any, weight: Any) -> Any:
        """Return x times the transpose of a full-precision weight [rows, cols]."""
        ...

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """Return x / rms(x) * weight over the last axis."""
        ...

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        """Return (x - mean(x)) / std(x) * weight + bias over the last axis."""
        ...

    def rotary_table(self, positions: NDArray[np.int64], inv_freq: Any, scale: float) -> tuple[Any, Any]:
        """Return cos and sin of the positions, float32 [positions, 1, head_dim / 2], for the layers."""
        ...


def choose(
    device: str, *, exact: bool = False, threads: int | None = None, activation_bits: int = 16, kv_bits: int = 16
) -> Backend:
    """Return the back end for `device` ("auto", "cpu", "cuda" or "cuda:N"); UsageError names what is not there.

    "auto" is the CPU: the GPU back end is to be asked for until it has been measured on a card. `exact` takes the
    float32 NumPy path; else the CPU computes with integer activations of `activation_bits` and a KV cache of `kv_bits`
    (8 or 16), by the native kernels where they can be loaded.
    """
    for name, bits in (("activation bits", activation_bits), ("KV cache bits", kv_bits)):
        if bits not in (8, 16):
            raise UsageError(f"{name} {bits}: wanted 8 or 16")
    if threads is not None and not 1 <= threads <= 256:
        raise UsageError(f"--threads {threads}: wanted 1 to 256")
    index = gpu_index(device)
    if exact:
        if index is not None:
            raise UsageError(f"--device {device}: the exact path runs on the CPU alone")
        from billm_rt.reference import ReferenceBackend

        return ReferenceBackend("exact", "float32 NumPy, slow: the exact path was asked for")
    if index is not None:
        return _cuda(device, index, kv_bits)
    return _cpu(threads, activation_bits, kv_bits)


def gpu_index(device: str) -> int | None:
    """Return the number of the GPU that `device` names, None where it is the CPU; UsageError for other names."""
    if device in ("auto", "cpu"):
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if found is None:
        raise UsageError(f"--device {device}: wanted auto, cpu, cuda or cuda:N")
    return int(found[1] or 0)


def _cuda(device: str, index: int, kv_bits: int) -> Backend:
    from billm_rt.cuda.device import CupyDevice, unavailable_reason

    why = unavailable_reason(index)
    if why is not None:
        raise UsageError(f"--device {device}: {why}; use --device cpu")
    from billm_rt.cuda_backend import CudaBackend

    return CudaBackend(CupyDevice(index), index, kv_bits)


def _cpu(threads: int | None, activation_bits: int, kv_bits: int) -> Backend:
    from billm_rt import cpu
    from billm_rt.cpu_backend import CpuBackend

    if threads is not None:
        cpu.set_threads(threads)
    return CpuBackend(activation_bits, kv_bits)
