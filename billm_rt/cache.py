"""Keys and values of the tokens a model has read: grows as needed, can be cut back, never half written."""

import math
import mmap
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from billm_format.config import ModelConfig
from billm_format.errors import DoesNotFitError

Float32 = NDArray[np.float32]

# The first allocation, in tokens; every later one doubles.
FIRST_CAPACITY = 256
# Integer keys lie in groups of this many tokens, element by element: [capacity / 16, width, 16]. A vector of sixteen
# scores then needs no sum across its lanes. Capacities are multiples of it. The native decoder relies on this layout.
_KEY_GROUP = 16
# Windows has no other kind. Elsewhere a child process would write into its parent's.
_PRIVATE: dict[str, int] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


class KVCache:
    """Keys and values of every layer for up to `ctx` tokens.

    `dtype` is float32 (exact), int16 or int8: fixed point with one float32 scale per token and head. int16 takes the
    memory of float16, is more precise where it matters (its error is absmax / 65534) and NumPy turns it into float32
    about twenty times faster, the scale being applied to the scores instead of the elements. int8 takes half of that.

    `tokens` is always what the cache holds: an interrupted write leaves it as it was before.
    """

    def __init__(self, config: ModelConfig, ctx: int, dtype: DTypeLike = np.float32) -> None:
        self.ctx = ctx
        self.tokens: list[int] = []
        self.dtype = np.dtype(dtype)
        self.num_heads = config.num_key_value_heads
        self._layers = [
            _Layer(self.num_heads, config.head_dim, ctx, self.dtype) for _ in range(config.num_hidden_layers)
        ]
        self._room = 0  # tokens that every layer has room for
        self._arrays: tuple[tuple[NDArray[np.generic], Float32], ...] = ()  # every layer's, with that much room

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def caches(self) -> "tuple[KVCache, ...]":
        """The cache alone, as a `CacheBatch` has several."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now; pages never written to take no memory yet."""
        return sum(layer.nbytes for layer in self._layers)

    def require(self, count: int) -> None:
        """Raise DoesNotFitError unless `count` more tokens fit the context length."""
        if len(self) + count > self.ctx:
            raise DoesNotFitError(
                f"{len(self)} tokens in the cache and {count} new ones make {len(self) + count}, "
                f"more than the context length of {self.ctx}: shorten the text or raise --ctx"
            )

    def write(self, layer: int, keys: Float32, values: Float32) -> None:
        """Put float32 [tokens, heads, head_dim] of `layer` behind the tokens held; `commit` makes them count."""
        self.room_for(len(keys))
        self._layers[layer].write(len(self), keys, values)

    def commit(self, token_ids: Sequence[int]) -> None:
        """Count `token_ids`, written in every layer, as held."""
        self.tokens.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        del self.tokens[length:]

    def read(self, layer: int, start: int, stop: int, limit: int) -> Iterator[tuple[slice, Float32, Float32 | None]]:
        """Yield (heads, data, scale) of positions start..stop, all heads in turn.

        data: float32 [2, some heads, stop - start, head_dim], keys first, then values; to be multiplied by scale
        float32 [2, some heads, stop - start] unless that is None. At most `limit` elements at once (but one head), so
        that the float32 copy stays small.
        """
        return self._layers[layer].read(start, stop, limit)

    def room_for(self, count: int) -> tuple[tuple[NDArray[np.generic], Float32], ...]:
        """Grow until `count` more tokens fit and return every layer's (data, scale), for the native decoder to write.

        data: int16 or int8 [2, heads, capacity, width], keys (grouped by sixteen tokens) and values; scale float32
        [2, heads, capacity]. `commit` makes what was written count.
        """
        used = len(self)
        if used + count > self._room:
            self._arrays, self._room = (), 0  # so that a layer's old array goes when it has a new one
            self._arrays = tuple(layer.room_for(used, used + count) for layer in self._layers)
            self._room = min(layer.capacity for layer in self._layers)
        return self._arrays


class CacheBatch:
    """Caches of several texts, of which a token each is read at a time; made by `Model.gather`."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        """Raise ValueError unless there are two or more, all different."""
        if len({id(cache) for cache in caches}) < max(2, len(caches)):
            raise ValueError(f"caches: wanted two or more, all different, found {len(caches)}")
        self.caches = tuple(caches)


# What tokens are read behind: all behind one cache, or one behind each.
Texts = KVCache | CacheBatch


class _Layer:
    """One growing array [2, heads, capacity, width], fixed point (with scales and grouped keys) or float32."""

    def __init__(self, heads: int, width: int, ctx: int, dtype: np.dtype[np.generic]) -> None:
        self._ctx = ctx
        self._scaled = dtype.kind == "i"
        self._top = 2 ** (8 * dtype.itemsize - 1) - 1  # of such an integer
        self._data: NDArray[np.generic] = np.empty((2, heads, 0, width), dtype)
        self._scale: Float32 = np.empty((2, heads, 0), np.float32)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._scale.nbytes

    @property
    def capacity(self) -> int:
        return int(self._data.shape[2])

    def room_for(self, used: int, needed: int) -> tuple[NDArray[np.generic], Float32]:
        self._grow(used, needed)
        return self._data, self._scale

    def write(self, start: int, keys: Float32, values: Float32) -> None:
        stop = start + keys.shape[0]
        if not self._scaled:
            self._data[0, :, start:stop] = keys.transpose(1, 0, 2)
            self._data[1, :, start:stop] = values.transpose(1, 0, 2)
            return
        both = np.array((keys, values))  # [2, tokens, heads, width]
        scale = np.abs(both).max(axis=3)
        scale *= np.float32(1 / self._top)
        self._scale[:, :, start:stop] = scale.transpose(0, 2, 1)
        # A row of zeros keeps scale 0 and codes 0: dividing by the smallest float instead of 0 sees to that.
        both /= np.maximum(scale, np.finfo(np.float32).tiny, out=scale)[..., None]
        np.rint(both, out=both)
        position = np.arange(start, stop)
        self._grouped_keys()[:, position // _KEY_GROUP, :, position % _KEY_GROUP] = both[0]
        self._data[1, :, start:stop] = both[1].transpose(1, 0, 2)

    def read(self, start: int, stop: int, limit: int) -> Iterator[tuple[slice, Float32, Float32 | None]]:
        _, heads, _, width = self._data.shape
        step = max(1, limit // max(1, 2 * (stop - start) * width))
        for head in range(0, heads, step):
            group = slice(head, min(head + step, heads))
            if self._scaled:
                yield group, self._unscaled(group, start, stop), self._scale[:, group, start:stop]
            else:
                yield group, self._data[:, group, start:stop].astype(np.float32, copy=False), None

    def _unscaled(self, heads: slice, start: int, stop: int) -> Float32:
        """Return keys and values of some heads as whole numbers, float32 [2, heads, stop - start, width]."""
        first, last = start // _KEY_GROUP, -(-stop // _KEY_GROUP)
        keys = self._grouped_keys()[heads, first:last].transpose(0, 1, 3, 2)
        count, groups, _, width = keys.shape
        out = np.empty((2, count, stop - start, width), np.float32)
        offset = start - first * _KEY_GROUP
        out[0] = keys.reshape(count, groups * _KEY_GROUP, width)[:, offset : offset + stop - start]
        out[1] = self._data[1, heads, start:stop]
        return out

    def _grouped_keys(self) -> NDArray[np.generic]:
        _, heads, capacity, width = self._data.shape
        keys: NDArray[np.generic] = self._data[0].reshape(heads, capacity // _KEY_GROUP, width, _KEY_GROUP)
        return keys

    def _grow(self, used: int, needed: int) -> None:
        _, heads, capacity, width = self._data.shape
        if needed <= capacity:
            return
        capacity = min(self._ctx, max(needed, 2 * capacity, FIRST_CAPACITY))
        capacity = -(-capacity // _KEY_GROUP) * _KEY_GROUP
        data = _own_pages((2, heads, capacity, width), self._data.dtype)
        kept = -(-used // _KEY_GROUP) * _KEY_GROUP
        # A prefix of the tokens is a prefix of each head's elements, grouped keys included.
        data[:, :, :kept] = self._data[:, :, :kept]
        if self._scaled:
            scale = np.empty((2, heads, capacity), np.float32)
            scale[:, :, :used] = self._scale[:, :, :used]
            # Before `_data`, whose shape is the capacity: an interrupt may fall between the two.
            self._scale = scale
        self._data = data


def _own_pages(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Return an array in pages of its own: untouched ones take no memory, and all go back when it goes.

    From the C library's heap, what a cache outgrows stays with the process.
    """
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **_PRIVATE)
    except OSError as error:
        raise MemoryError("no memory for the KV cache") from error
    return np.frombuffer(pages, dtype).reshape(shape)
