"""Keys and values on the device, as the kernels read and write them, and the steps recorded on them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_rt.cache import FIRST_CAPACITY, KVCache
from billm_rt.cuda import launch
from billm_rt.cuda.device import Device, Recording

# Steps of up to so many tokens are recorded.
_RECORDED_TOKENS = launch.FEW_TOKENS

# Work on token ids and positions, int32 [tokens] on the device.
Step = Callable[[Any, Any], Any]


class DeviceCache(KVCache):
    """Binary16 [2, kv_heads, capacity, padded] for every layer, keys first; elements behind head_dim are zero.

    Counts tokens as every `KVCache`; only kernels read and write what it holds. What they need to know of a step lies
    on the device as well, so that a step of few tokens is recorded once and replayed for every position.
    """

    def __init__(self, config: ModelConfig, ctx: int, device: Device, longest: int = 512) -> None:
        """`longest`: tokens of a step at most."""
        super().__init__(config, ctx, np.float16)
        self._device = device
        shape = (2, config.num_key_value_heads, 0, launch.padded_width(config.head_dim))
        self._arrays = [device.zeros(shape, np.float16) for _ in range(config.num_hidden_layers)]
        self._capacity = 0  # of every array
        # How many tokens are held, then the ids and the positions of those to come.
        self._state = device.zeros((1 + 2 * longest,), np.int32)
        self._state_here = device.pinned((1 + 2 * longest,), np.int32)
        self._steps: dict[tuple[int, str], Recording | None] = {}

    @property
    def past(self) -> Any:
        """How many tokens are held, int32 [1], where kernels can read it."""
        return self._state[:1]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(int(array.nbytes) for array in self._arrays)

    def reserve(self, count: int) -> list[Any]:
        """Grow until `count` more tokens fit and return every layer's array."""
        held, needed = len(self), len(self) + count
        if needed <= self._capacity:
            return self._arrays
        self._device.wait()
        self._steps = dict.fromkeys(self._steps)  # recorded with the arrays that go
        capacity = min(self.ctx, max(needed, 2 * self._capacity, FIRST_CAPACITY))
        for layer, old in enumerate(self._arrays):  # each on its own: an interrupt may fall between two
            if capacity > old.shape[2]:
                array = self._device.zeros((*old.shape[:2], capacity, old.shape[3]), np.float16)
                array[:, :, :held] = old[:, :, :held]
                self._arrays[layer] = array
        self._capacity = min(array.shape[2] for array in self._arrays)
        return self._arrays

    def run(self, step: Step, kind: str, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Any:
        """Return step(ids, positions) for tokens to be written behind those held; `past` is up to date meanwhile.

        Steps of one `kind` and number of tokens are the same work, and it may be done more than once: if they are few,
        the first is done as it is, the second recorded, the others replayed.
        """
        count = token_ids.size
        self.reserve(count)
        self._device.wait()  # until nobody reads what is written now
        self._state_here[: 1 + 2 * count] = [len(self), *token_ids.tolist(), *positions.tolist()]
        key = count, kind
        if count > _RECORDED_TOKENS or key not in self._steps:
            result = self._take(step, count)
            self._steps.setdefault(key, None)
            return result
        recorded = self._steps[key]
        if recorded is None:
            recorded = self._steps[key] = self._device.record(lambda: self._take(step, count))
        recorded.replay()
        return recorded.result

    def _take(self, step: Step, count: int) -> Any:
        here, there = self._state_here[: 1 + 2 * count], self._state[: 1 + 2 * count]
        self._device.copy_in(there, here)
        return step(there[1 : 1 + count], there[1 + count :])
