"""The GPU back end: everything on one CUDA device but the sampling; activations float32, keys and values binary16."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear, Table
from billm_rt.backend import FusedLayers, Layer, Norm
from billm_rt.cache import KVCache
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceCache
from billm_rt.cuda.device import Device
from billm_rt.cuda.layers import DeviceLayers, normalize
from billm_rt.cuda.linear import LinearGroup
from billm_rt.reference import rotary_table, some_rows


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """An embedding or head on the device: int8 [rows, width] with a scale per row, or float16."""

    weight: Any
    scale: Any


class CudaBackend:
    """The operations that a model needs around its layers, and `DeviceLayers` for the layers."""

    isa = "cuda"
    activations = "float32"
    kv_type = "float16"
    chunk = 512  # many tokens share the unpacking of the weights; their logits together stay some hundred megabytes

    def __init__(self, device: Device, index: int = 0) -> None:
        self.device = f"cuda:{index}"
        self.reason = device.name
        self._device = device
        self._rotary: tuple[Any, Any] | None = None

    def new_cache(self, config: ModelConfig, ctx: int) -> KVCache:
        """Return an empty cache in device memory."""
        return DeviceCache(config, ctx, self._device)

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

    def embed(self, token_ids: NDArray[np.int64], table: DeviceTable) -> Any:
        """Return the rows of `table` that `token_ids` names, float32 [tokens, width]."""
        tokens, width = token_ids.size, table.weight.shape[1]
        out = self._device.empty((tokens, width), np.float32)
        ids = self._device.upload(token_ids.astype(np.int32))
        kernel, size = launch.gather_kernel(table.weight.dtype), launch.per_column(width, tokens)
        self._device.launch(kernel, size, ids, table.weight, table.scale, out, np.int32(width))
        return out

    def head(self, x: Any, table: DeviceTable) -> NDArray[np.float32]:
        """Return x times the table's transpose, float32 [tokens, rows], on the host."""
        return self._device.download(self._multiply(x, table))

    def dense(self, x: Any, weight: Any) -> Any:
        """Return x times the transpose of a full-precision weight [rows, cols]."""
        return self._multiply(x, DeviceTable(weight, None))

    def _multiply(self, x: Any, table: DeviceTable) -> Any:
        rows, width = table.weight.shape
        out = self._device.empty((x.shape[0], rows), np.float32)
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

    def rotary_table(self, start: int, count: int, inv_freq: Any, scale: float) -> tuple[Any, Any]:
        """Return cos and sin, float32 [positions, head_dim / 2], of positions from 0 on, at least to start + count."""
        if self._rotary is None or self._rotary[0].shape[0] < start + count:
            positions = 1 << max(10, (start + count - 1).bit_length())
            angles = rotary_table(0, positions, self._device.download(inv_freq), scale)
            cos, sin = (self._device.upload(part[:, 0]) for part in angles)
            self._rotary = cos, sin
        return self._rotary
