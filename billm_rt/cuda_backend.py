"""The GPU back end: everything on one CUDA device; activations float32, keys and values binary16 or int8."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear, Table
from billm_format.reader import BillmFile
from billm_rt.backend import FusedLayers, Layer, Norm
from billm_rt.cache import CacheBatch, KVCache, Texts
from billm_rt.cuda import launch, memory
from billm_rt.cuda.cache import DeviceBatch, DeviceCache
from billm_rt.cuda.device import Device
from billm_rt.cuda.layers import DeviceLayers, add, normalize
from billm_rt.cuda.linear import LinearGroup
from billm_rt.cuda.logits import DeviceLogits, DeviceRow
from billm_rt.reference import rotary_table, some_rows
from billm_rt.sampling import Logits

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """An embedding or head on the device: int8 [rows, width] with a scale per row, or float16."""

    weight: Any
    scale: Any


@dataclass(frozen=True, eq=False)
class Few:
    """The logits of a few tokens on the device, float32 [tokens, rows]."""

    logits: DeviceLogits
    array: Any


class CudaBackend:
    """The operations that a model needs around its layers, and `DeviceLayers` for the layers."""

    isa = "cuda"
    activations = "float32"
    chunk = 512  # many tokens share the unpacking of the weights

    def __init__(self, device: Device, index: int = 0, kv_bits: int = 16) -> None:
        self.kv_type = "float16" if kv_bits == 16 else "int8"
        self._kv_bits = kv_bits
        self.device = f"cuda:{index}"
        self.reason = device.name
        self._device = device
        self._rotary: tuple[Any, Any] | None = None
        self._longest = 0  # context of the caches
        self._logits: DeviceLogits | None = None

    def require(self, file: BillmFile, ctx: int) -> None:
        """Raise DoesNotFitError unless the device has memory for the weights, a full KV cache and the scratch."""
        memory.require(file, ctx, self._kv_bits, self.chunk, self._device.free_bytes(), self.device)

    def device_memory(self, file: BillmFile, kv_cache: int) -> dict[str, int]:
        """Return the weights as they were reckoned, which is to the byte, and the rest as the device has it."""
        weights, usage = memory.weight_bytes(file), self._device.usage()
        report = {f"weights.{kind}": size for kind, size in weights.items()}
        scratch = usage.arrays - sum(weights.values()) - kv_cache
        return {**report, "kv_cache": kv_cache, "scratch": max(scratch, 0), "pool": usage.pool, "card": usage.card}

    def new_cache(self, config: ModelConfig, ctx: int) -> KVCache:
        """Return an empty cache in device memory."""
        self._longest = max(self._longest, ctx)
        return DeviceCache(config, ctx, self._device, self._kv_bits, self.chunk)

    def gather(self, caches: Sequence[KVCache]) -> CacheBatch:
        """Return the caches as a batch whose steps are recorded together."""
        return DeviceBatch(self._device, _ours(caches))

    def require_room(self, config: ModelConfig, caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
        """Raise DoesNotFitError unless the device has memory for all caches at their `lengths` in tokens."""
        per_token = memory.cache_bytes(config, self._kv_bits)
        memory.require_caches(_ours(caches), lengths, per_token, self._device.free_bytes(), self.device)

    def load_tensor(self, array: NDArray[Any]) -> Any:
        """Return a small tensor as float32 on the device."""
        return self._device.upload(array.astype(np.float32, copy=False))

    def load_linears(self, linears: Sequence[PackedLinear]) -> LinearGroup:
        """Upload Linears that read the same input."""
        return LinearGroup(self._device, linears)

    def load_table(self, table: Table) -> DeviceTable:
        """Upload a table; one of 4 bits as float16, because no kernel here reads it."""
        if table.step is not None:
            weight = np.empty((table.weight.shape[0], table.cols), np.float16)
            for rows, values in some_rows(table):
                weight[rows] = values
            table = Table(weight, table.cols)
        scale = None if table.scale is None else self._device.upload(table.scale)
        return DeviceTable(self._device.upload(table.weight), scale)

    def fuse(self, config: ModelConfig, layers: Sequence[Layer], norm: Norm | None, head: Any) -> FusedLayers:
        """Return the layers; UsageError where the kernels do not know heads this wide."""
        if config.head_dim > launch.MAX_HEAD_DIM:
            raise UsageError(
                f"--device {self.device}: heads of {config.head_dim} elements, the GPU back end knows up to "
                f"{launch.MAX_HEAD_DIM}: use --device cpu"
            )
        return DeviceLayers(self._device, config, layers)

    def take_step(
        self,
        step: Callable[[Any, Any], T],
        kind: str,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        texts: Texts,
    ) -> T:
        """Take the step, or replay what was recorded of one like it."""
        if not isinstance(texts, DeviceCache | DeviceBatch):
            raise TypeError(f"caches: wanted those that Model.new_cache made, found {type(texts).__name__}")
        result: T = texts.run(step, kind, token_ids, positions)
        return result

    def embed(self, rows: Any, table: DeviceTable) -> Any:
        """Return the rows of `table` that int32 `rows` [tokens] on the device name, float32 [tokens, width]."""
        tokens, width = rows.size, table.weight.shape[1]
        out = self._device.empty((tokens, width), np.float32)
        kernel, size = launch.gather_kernel(table.weight.dtype), launch.per_column(width, tokens)
        self._device.launch(kernel, size, rows, table.weight, table.scale, out, np.int32(width))
        return out

    def add(self, x: Any, y: Any) -> Any:
        """Return the sum in x."""
        add(self._device, x, y)
        return x

    def head(self, x: Any, table: DeviceTable) -> "Few | NDArray[np.float32]":
        """Return x times the table's transpose, float32 [tokens, rows]: that of few tokens stays on the device."""
        if self._logits is None:
            self._logits = DeviceLogits(self._device, table.weight.shape[0])
        if x.shape[0] <= launch.MAX_TABLE_TOKENS:
            return Few(self._logits, self._few_rows(x, table, self._logits))
        out = np.empty((x.shape[0], table.weight.shape[0]), np.float32)
        for start in range(0, x.shape[0], launch.MAX_TABLE_TOKENS):  # a whole chunk's logits would take hundreds of MB
            rows = slice(start, start + launch.MAX_TABLE_TOKENS)
            out[rows] = self._device.download(self._few_rows(x[rows], table, self._logits))
        return out

    def _few_rows(self, x: Any, table: DeviceTable, logits: DeviceLogits) -> Any:
        return self._multiply(x, table, logits.array[: x.shape[0]])

    def logits(self, head: "Few | NDArray[np.float32]") -> NDArray[np.float32]:
        """Return the logits on the host."""
        if not isinstance(head, Few):
            return head
        # A copy: the next ones are written where these lie.
        return np.array(self._device.download(head.array), np.float32)

    def rows(self, head: "Few | NDArray[np.float32]") -> Sequence[Logits]:
        """Return each token's logits, on the device if they are few."""
        if not isinstance(head, Few):
            return list(head)
        return [DeviceRow(head.logits, row) for row in range(head.array.shape[0])]

    def dense(self, x: Any, weight: Any) -> Any:
        """Return x times the transpose of a full-precision weight [rows, cols]."""
        return self._multiply(x, DeviceTable(weight, None), self._device.empty((x.shape[0], len(weight)), np.float32))

    def _multiply(self, x: Any, table: DeviceTable, out: Any) -> Any:
        rows, width = table.weight.shape
        for start in range(0, x.shape[0], launch.MAX_TABLE_TOKENS):
            tokens = min(launch.MAX_TABLE_TOKENS, x.shape[0] - start)
            kernel = launch.multiply_kernel(table.weight.dtype, width, tokens)
            arrays = (table.weight, table.scale, x[start : start + tokens], out[start : start + tokens])
            size = launch.multiply_size(rows, tokens)
            self._device.launch(kernel, size, *arrays, *map(np.int32, (rows, width, tokens)))
        return out

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """Return x / rms(x) * weight over the last axis."""
        return normalize(self._device, x, Norm(weight, None), eps, keep=True)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        """Return (x - mean(x)) / std(x) * weight + bias over the last axis."""
        return normalize(self._device, x, Norm(weight, bias), eps, keep=True)

    def rotary_table(self, positions: NDArray[np.int64], inv_freq: Any, scale: float) -> tuple[Any, Any]:
        """Return cos and sin, float32 [positions, head_dim / 2], of positions from 0 on.

        Of all that the caches may come to hold: a step that is replayed has the table that it was recorded with.
        """
        needed = int(positions.max()) + 1
        if self._rotary is None or self._rotary[0].shape[0] < needed:
            all_positions = np.arange(max(self._longest, needed))
            angles = rotary_table(all_positions, self._device.download(inv_freq), scale)
            cos, sin = (self._device.upload(part[:, 0]) for part in angles)
            self._rotary = cos, sin
        return self._rotary


def _ours(caches: Sequence[KVCache]) -> list[DeviceCache]:
    """Return the caches; TypeError unless all lie on a device."""
    ours = [cache for cache in caches if isinstance(cache, DeviceCache)]
    if len(ours) < len(caches):
        raise TypeError("caches: wanted those that Model.new_cache made")
    return ours
