"""All decoder layers on the device: the loop of `model.py`, each step a kernel that does as much as it can at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from billm_format.config import ModelConfig
from billm_rt.backend import Activation, Layer, Norm
from billm_rt.cache import Texts
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceBatch, DeviceCache, View
from billm_rt.cuda.device import Device

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of decoder.cu


def normalize(device: Device, x: Any, norm: Norm, eps: float, delta: Any = None, *, keep: bool) -> Any:
    """Return norm(x + delta) [tokens, width]; x becomes the sum where `keep`, else it becomes the result."""
    out = device.empty(x.shape, np.float32) if keep else x
    size = launch.per_token(x.shape[0])
    numbers = (np.int32(x.shape[1]), np.float32(eps), np.int32(keep))
    device.launch(launch.NORMALIZE, size, x, delta, norm.weight, norm.bias, out, *numbers)
    return out


def add(device: Device, x: Any, y: Any) -> None:
    """x += y."""
    device.launch(launch.ADD, launch.per_element(x.size), x, y, np.uint64(x.size))


class DeviceLayers:
    """The layers of a model; activations are float32 on the device."""

    def __init__(self, device: Device, config: ModelConfig, layers: Sequence[Layer]) -> None:
        self._device, self._config, self._layers = device, config, layers

    few_tokens = 0

    def copied_bytes(self) -> int:
        """Return 0: what is read lies on the device."""
        return 0

    def run(self, x: Any, texts: Texts, rotary: tuple[Any, Any] | None) -> None:
        """Replace x [tokens, hidden_size] by the last layer's output; write the caches, without committing.

        `rotary` is cos and sin of positions from 0 on, [at least all positions, head_dim / 2].
        """
        if not isinstance(texts, DeviceCache | DeviceBatch):
            raise TypeError("caches: wanted those of this device")
        delta, view = None, texts.view  # delta: what is still to be added to x
        for index, layer in enumerate(self._layers):
            delta = self._layer(x, delta, layer, index, view, rotary)
        if delta is not None:
            add(self._device, x, delta)

    def _layer(self, x: Any, delta: Any, layer: Layer, index: int, view: View, rotary: Any) -> Any:
        device, eps = self._device, self._config.norm_eps
        if self._config.norm_position == "pre":
            normed = normalize(device, x, layer.attn_norm, eps, delta, keep=True)
            attended = self._attention(normed, layer, index, view, rotary)
            return self._mlp(normalize(device, x, layer.mlp_norm, eps, attended, keep=True), layer)
        normalize(device, x, layer.attn_norm, eps, self._attention(x, layer, index, view, rotary), keep=False)
        normalize(device, x, layer.mlp_norm, eps, self._mlp(x, layer), keep=False)
        return None

    def _attention(self, x: Any, layer: Layer, index: int, view: View, rotary: Any) -> Any:
        device, config = self._device, self._config
        qkv = layer.qkv.multiply(x)
        mixed = device.empty((x.shape[0], config.query_size), np.float32)
        self._store(qkv, layer, index, view, rotary)
        attend(device, qkv, index, view, config, mixed)
        return layer.o.multiply(mixed)

    def _store(self, qkv: Any, layer: Layer, index: int, view: View, rotary: Any) -> None:
        """Turn queries and keys, and put keys and values into the caches."""
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cos, sin = (None, None) if rotary is None else rotary
        tokens = qkv.shape[0]
        kernel, size = launch.rotate_and_store(view.dtype), launch.per_head(heads + 2 * kv_heads, tokens)
        pointers = (qkv, layer.q_norm, layer.k_norm, cos, sin, view.layers[index])
        numbers = map(np.int32, (tokens // view.texts, heads, kv_heads, config.head_dim, view.padded))
        self._device.launch(kernel, size, *pointers, *numbers, np.float32(config.norm_eps))

    def _mlp(self, x: Any, layer: Layer) -> Any:
        device, config, tokens = self._device, self._config, x.shape[0]
        both = layer.up.multiply(x)
        width = config.intermediate_size
        out = device.empty((tokens, width), np.float32)
        numbers = (tokens, width, _ACTIVATIONS.index(config.activation), config.gated_mlp)
        device.launch(launch.ACTIVATE, launch.per_element(out.size), both, out, *map(np.int32, numbers))
        return layer.down.multiply(out)


def attend(device: Device, qkv: Any, index: int, view: View, config: ModelConfig, out: Any) -> None:
    """Write the mixed values [tokens, heads * head_dim] for queries at the start of each row of qkv.

    `view` is of caches whose layer `index` has these tokens' keys behind those that are counted; every text has as
    many tokens, and many of them only if it is the only one.
    """
    tokens, stride = qkv.shape
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    window = config.sliding_window or 0
    shape = (heads, kv_heads, width, view.padded, stride, window)
    per_text = tokens // view.texts
    if per_text > launch.FEW_TOKENS:
        kernel, size = launch.attend_many(tokens, heads, width, view.dtype)
        device.launch(kernel, size, qkv, view.layers[index], out, *map(np.int32, (tokens, *shape)))
        return
    # Split for a full cache: a step that is replayed sees more keys each time.
    seen = min(view.capacity, window or view.capacity)
    few = launch.attend_few(tokens, seen, heads, kv_heads, width, view.dtype, device.multiprocessors)
    partial = device.empty((tokens, heads, few.splits, view.padded + 2), np.float32)
    device.launch(few.kernel, few.size, qkv, view.layers[index], partial, *map(np.int32, (per_text, *shape)))
    size = launch.per_row_of_heads(heads, tokens)
    device.launch(launch.COMBINE, size, partial, out, *map(np.int32, (heads, width, view.padded, few.splits)))
