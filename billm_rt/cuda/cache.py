"""Keys and values on the device, as the kernels read and write them."""

from typing import Any

import numpy as np

from billm_format.config import ModelConfig
from billm_rt.cache import FIRST_CAPACITY, KVCache
from billm_rt.cuda.device import Device
from billm_rt.cuda.launch import padded_width


class DeviceCache(KVCache):
    """Binary16 [2, kv_heads, capacity, padded] for every layer, keys first; elements behind head_dim are zero.

    Counts tokens as every `KVCache`; only kernels read and write what it holds.
    """

    def __init__(self, config: ModelConfig, ctx: int, device: Device) -> None:
        super().__init__(config, ctx, np.float16)
        self._device = device
        shape = (2, config.num_key_value_heads, 0, padded_width(config.head_dim))
        self._arrays = [device.zeros(shape, np.float16) for _ in range(config.num_hidden_layers)]
        self.past = device.zeros((1,), np.int32)  # how many tokens are held, where kernels can read it

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(int(array.nbytes) for array in self._arrays)

    def reserve(self, count: int) -> list[Any]:
        """Grow until `count` more tokens fit and return every layer's array; `past` is up to date."""
        held, needed = len(self), len(self) + count
        for layer, old in enumerate(self._arrays):  # each on its own: an interrupt may fall between two
            if needed > old.shape[2]:
                capacity = min(self.ctx, max(needed, 2 * old.shape[2], FIRST_CAPACITY))
                array = self._device.zeros((*old.shape[:2], capacity, old.shape[3]), np.float16)
                array[:, :, :held] = old[:, :, :held]
                self._arrays[layer] = array
        self.past.fill(held)
        return self._arrays
