"""All decoder layers on the device: the loop of `model.py`, each step a kernel that does as much as it can at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from billm_format.config import ModelConfig
from billm_rt.backend import Activation, Layer, Norm
from billm_rt.cache import Texts
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceBatch, DeviceCache, KeysValues, Place
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

    def run(self, x: Any, texts: Texts, rotary: tuple[Any, Any] | None) -> None:
        """Replace x [tokens, hidden_size] by the last layer's output; write the caches, without committing.

        `rotary` is cos and sin of positions from 0 on, [at least all positions, head_dim / 2].
        """
        if not isinstance(texts, DeviceCache | DeviceBatch):
            raise TypeError("caches: wanted those of this device")
        delta, places = None, texts.places(x.shape[0])  # delta: what is still to be added to x
        for index, layer in enumerate(self._layers):
            delta = self._layer(x, delta, layer, index, places, rotary)
        if delta is not None:
            add(self._device, x, delta)

    def _layer(self, x: Any, delta: Any, layer: Layer, index: int, places: Sequence[Place], rotary: Any) -> Any:
        device, eps = self._device, self._config.norm_eps
        if self._config.norm_position == "pre":
            normed = normalize(device, x, layer.attn_norm, eps, delta, keep=True)
            attended = self._attention(normed, layer, index, places, rotary)
            return self._mlp(normalize(device, x, layer.mlp_norm, eps, attended, keep=True), layer)
        normalize(device, x, layer.attn_norm, eps, self._attention(x, layer, index, places, rotary), keep=False)
        normalize(device, x, layer.mlp_norm, eps, self._mlp(x, layer), keep=False)
        return None

    def _attention(self, x: Any, layer: Layer, index: int, places: Sequence[Place], rotary: Any) -> Any:
        device, config = self._device, self._config
        qkv = layer.qkv.multiply(x)
        mixed = device.empty((x.shape[0], config.query_size), np.float32)
        for rows, held, past in places:
            self._store(qkv[rows], layer, held[index], past, rotary)
            attend(device, qkv[rows], held[index], past, config, mixed[rows])
        return layer.o.multiply(mixed)

    def _store(self, qkv: Any, layer: Layer, held: KeysValues, past: Any, rotary: Any) -> None:
        """Turn queries and keys of some tokens of one text, and put keys and values into its cache."""
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cos, sin = (None, None) if rotary is None else rotary
        capacity, padded = held.data.shape[2:]
        kernel, size = launch.rotate_and_store(held.data.dtype), launch.per_head(heads + 2 * kv_heads, qkv.shape[0])
        pointers = (qkv, layer.q_norm, layer.k_norm, cos, sin, *held.arguments, past)
        numbers = map(np.int32, (heads, kv_heads, config.head_dim, padded, capacity))
        self._device.launch(kernel, size, *pointers, *numbers, np.float32(config.norm_eps))

    def _mlp(self, x: Any, layer: Layer) -> Any:
        device, config, tokens = self._device, self._config, x.shape[0]
        both = layer.up.multiply(x)
        width = config.intermediate_size
        out = device.empty((tokens, width), np.float32)
        numbers = (tokens, width, _ACTIVATIONS.index(config.activation), config.gated_mlp)
        device.launch(launch.ACTIVATE, launch.per_element(out.size), both, out, *map(np.int32, numbers))
        return layer.down.multiply(out)


def attend(device: Device, qkv: Any, held: KeysValues, past: Any, config: ModelConfig, out: Any) -> None:
    """Write the mixed values [tokens, heads * head_dim] for queries at the start of each row of qkv.

    `held` is one layer's cache, which already has these tokens' keys behind the first *past.
    """
    tokens, stride = qkv.shape
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    capacity, padded = held.data.shape[2:]
    window = config.sliding_window or 0
    shape = (heads, kv_heads, width, padded, capacity, stride, window)
    if tokens > launch.FEW_TOKENS:
        kernel, size = launch.attend_many(tokens, heads, width, held.data.dtype)
        device.launch(kernel, size, qkv, *held.arguments, past, out, *map(np.int32, (tokens, *shape)))
        return
    # Split for a full cache: a step that is replayed sees more keys each time.
    seen = min(capacity, window or capacity)
    few = launch.attend_few(tokens, seen, heads, kv_heads, width, held.data.dtype, device.multiprocessors)
    partial = device.empty((tokens, heads, few.splits, padded + 2), np.float32)
    device.launch(few.kernel, few.size, qkv, *held.arguments, past, partial, *map(np.int32, shape))
    size = launch.per_row_of_heads(heads, tokens)
    device.launch(launch.COMBINE, size, partial, out, *map(np.int32, (heads, width, padded, few.splits)))
