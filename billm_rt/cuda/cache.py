"""Keys and values on the device, as the kernels read and write them, and the steps recorded on them."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class KeysValues:
    """What one layer holds on the device."""

    data: Any  # [2, kv_heads, capacity, padded], keys first; elements behind head_dim are zero
    scale: Any  # float32 [2, kv_heads, capacity] for int8, None for binary16

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        """Keys, values and their scales, as kernels take them."""
        if self.scale is None:
            return self.data[0], self.data[1], None, None
        return self.data[0], self.data[1], self.scale[0], self.scale[1]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return int(self.data.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return int(self.data.nbytes) + (0 if self.scale is None else int(self.scale.nbytes))

    def grown(self, device: Device, capacity: int, used: int) -> "KeysValues":
        """Return the same with room for more, of which the first `used` tokens are copied."""
        halves, heads, _, padded = self.data.shape
        data = device.zeros((halves, heads, capacity, padded), self.data.dtype)
        data[:, :, :used] = self.data[:, :, :used]
        if self.scale is None:
            return KeysValues(data, None)
        scale = device.zeros((halves, heads, capacity), np.float32)
        scale[:, :, :used] = self.scale[:, :, :used]
        return KeysValues(data, scale)


class DeviceCache(KVCache):
    """Keys and values as binary16, or as int8 with a scale per token and head like the CPU's.

    Counts tokens as every `KVCache`; only kernels read and write what it holds. What they need to know of a step lies
    on the device as well, so that a step of few tokens is recorded once and replayed for every position.
    """

    def __init__(self, config: ModelConfig, ctx: int, device: Device, bits: int = 16, longest: int = 512) -> None:
        """`bits`: 16 or 8 of an element; `longest`: tokens of a step at most."""
        super().__init__(config, ctx, np.float16 if bits == 16 else np.int8)
        self._device = device
        shape = (2, config.num_key_value_heads, 0, launch.padded_width(config.head_dim))
        scale = None if bits == 16 else device.zeros(shape[:3], np.float32)
        nothing = KeysValues(device.zeros(shape, self.dtype), scale)
        self._held = [nothing] * config.num_hidden_layers
        self._capacity = 0  # of every layer
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
        return sum(held.nbytes for held in self._held)

    def reserve(self, count: int) -> list[KeysValues]:
        """Grow until `count` more tokens fit and return what every layer holds."""
        used, needed = len(self), len(self) + count
        if needed <= self._capacity:
            return self._held
        self._device.wait()
        self._steps = dict.fromkeys(self._steps)  # recorded with the memory that goes
        capacity = min(self.ctx, max(needed, 2 * self._capacity, FIRST_CAPACITY))
        for layer, held in enumerate(self._held):  # each on its own: an interrupt may fall between two
            if capacity > held.capacity:
                self._held[layer] = held.grown(self._device, capacity, used)
        self._capacity = min((held.capacity for held in self._held), default=capacity)
        return self._held

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
