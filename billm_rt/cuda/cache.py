"""Keys and values on the device, as the kernels read and write them, and the steps recorded on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_rt.cache import FIRST_CAPACITY, CacheBatch, KVCache
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

    def describe(self, entry: Any, device: Device, past: Any) -> None:
        """Fill in a `CACHE`; `past`, int32 [1] on the device: how many tokens are there already."""
        entry["keys"], entry["values"] = map(device.pointer, self.data)
        if self.scale is not None:
            entry["key_scale"], entry["value_scale"] = map(device.pointer, self.scale)
        entry["past"], entry["capacity"] = device.pointer(past), self.capacity

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
        device.copy(data[:, :, :used], self.data[:, :, :used])
        if self.scale is None:
            return KeysValues(data, None)
        scale = device.zeros((halves, heads, capacity), np.float32)
        device.copy(scale[:, :, :used], self.scale[:, :, :used])
        return KeysValues(data, scale)


class View(NamedTuple):
    """The caches of the texts of a step, as kernels find them."""

    layers: Any  # `CACHE` [layers, texts] as bytes on the device
    texts: int
    dtype: np.dtype[Any]  # of keys and values
    padded: int  # elements of a head
    capacity: int  # tokens that the largest has room for


def _view(device: Device, caches: Sequence["DeviceCache"], pasts: Any) -> View:
    """Describe caches of one model; `pasts` is int32 [texts] on the device."""
    held = [cache.reserve(0) for cache in caches]
    table = np.zeros((len(held[0]), len(held)), launch.CACHE)
    for text, layers in enumerate(held):
        for layer, keys_values in enumerate(layers):
            keys_values.describe(table[layer, text], device, pasts[text : text + 1])
    padded = int(held[0][0].data.shape[3])
    longest = max(cache.capacity for cache in caches)
    return View(device.upload(table.view(np.uint8)), len(held), caches[0].dtype, padded, longest)


class DeviceCache(KVCache):
    """Keys and values as binary16, or as int8 with a scale per token and head like the CPU's.

    Counts tokens as every `KVCache`; only kernels read and write what it holds.
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
        self._moves = 0
        self._steps = Steps(device, 1, longest)

    @property
    def past(self) -> Any:
        """How many tokens are held, int32 [1], where kernels can read it."""
        return self._steps.pasts

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(held.nbytes for held in self._held)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._capacity

    @property
    def moves(self) -> int:
        """How often the memory of a layer may have moved."""
        return self._moves

    def reserve(self, count: int) -> list[KeysValues]:
        """Grow until `count` more tokens fit and return what every layer holds."""
        used, needed = len(self), len(self) + count
        if needed <= self._capacity:
            return self._held
        self._device.wait()
        capacity = grown_capacity(self._capacity, needed, self.ctx)
        for layer in range(len(self._held)):  # each on its own: an interrupt may fall between two
            if capacity > self._held[layer].capacity:
                self._moves += 1
                self._held[layer] = self._held[layer].grown(self._device, capacity, used)
                self._device.trim()  # no larger layer fits into what the pool has kept of this one
        self._capacity = min((held.capacity for held in self._held), default=capacity)
        return self._held

    @property
    def view(self) -> View:
        """The cache as kernels find it, until it grows."""
        return self._steps.view((self,))

    def run(self, step: Step, kind: str, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Any:
        """Return step(ids, positions) for tokens to be written behind those held, see `Steps.run`."""
        self.reserve(token_ids.size)
        return self._steps.run(step, kind, token_ids, positions, (self,))


class DeviceBatch(CacheBatch):
    """Caches on one device, of which a token each is read at a time."""

    def __init__(self, device: Device, caches: Sequence[DeviceCache]) -> None:
        super().__init__(caches)
        self._caches = tuple(caches)
        self._steps = Steps(device, len(caches), len(caches))

    @property
    def view(self) -> View:
        """The caches as kernels find them, until one of them grows."""
        return self._steps.view(self._caches)

    def run(self, step: Step, kind: str, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Any:
        """Return step(ids, positions) for a token to be written behind each cache, see `Steps.run`."""
        for cache in self._caches:
            cache.reserve(1)
        return self._steps.run(step, kind, token_ids, positions, self._caches)


class Steps:
    """What kernels need to know of a step, on the device, so that a step of few tokens is recorded and replayed."""

    def __init__(self, device: Device, texts: int, longest: int) -> None:
        """`longest`: tokens of a step at most."""
        self._device, self._texts = device, texts
        # How many tokens each text has, then the ids and the positions of those to come.
        self._state = device.zeros((texts + 2 * longest,), np.int32)
        self._state_here = device.pinned((texts + 2 * longest,), np.int32)
        self._recorded: dict[tuple[int, str], Recording | None] = {}
        self._view: View | None = None
        self._moves: tuple[int, ...] = ()  # of the caches, when the view was made

    @property
    def pasts(self) -> Any:
        """How many tokens each text has, int32 [texts], up to date during `run`."""
        return self._state[: self._texts]

    def run(
        self,
        step: Step,
        kind: str,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        caches: Sequence[DeviceCache],
    ) -> Any:
        """Return step(ids, positions) for tokens that go behind what `caches` hold, room for them made already.

        Steps of one `kind` and number of tokens are the same work, and it may be done more than once: if they are few,
        the first is done as it is, the second recorded, the others replayed.
        """
        count = token_ids.size
        self._device.wait()  # until nobody reads what is written now
        self.view(caches)
        state = [*map(len, caches), *token_ids.tolist(), *positions.tolist()]
        self._state_here[: len(state)] = state
        key = count, kind
        if count > _RECORDED_TOKENS or key not in self._recorded:
            result = self._take(step, count)
            self._recorded.setdefault(key, None)
            return result
        recorded = self._recorded[key]
        if recorded is None:
            recorded = self._recorded[key] = self._device.record(lambda: self._take(step, count))
        recorded.replay()
        return recorded.result

    def view(self, caches: Sequence[DeviceCache]) -> View:
        """Return what describes the caches: made anew where memory has moved, as what was recorded will be."""
        moves = tuple(cache.moves for cache in caches)
        if self._view is None or moves != self._moves:
            self._recorded = dict.fromkeys(self._recorded)
            self._view, self._moves = _view(self._device, caches, self.pasts), moves
        return self._view

    def _take(self, step: Step, count: int) -> Any:
        ids, positions, end = (self._texts + n * count for n in range(3))
        self._device.copy_in(self._state[:end], self._state_here[:end])
        return step(self._state[ids:positions], self._state[positions:end])


def grown_capacity(capacity: int, needed: int, ctx: int) -> int:
    """Return the tokens that a cache makes room for when it has to grow."""
    return min(ctx, max(needed, 2 * capacity, FIRST_CAPACITY))
