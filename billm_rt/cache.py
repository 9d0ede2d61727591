"""Keys and values of the tokens a model has read: grows as needed, can be cut back, never half written."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from billm_format.config import ModelConfig
from billm_format.errors import DoesNotFitError

Float32 = NDArray[np.float32]

# The first allocation, in tokens; every later one doubles.
_FIRST_CAPACITY = 256
_INT16_MAX = 32767


class KVCache:
    """Keys and values of every layer for up to `ctx` tokens.

    `dtype` is float32 (exact) or int16: fixed point with one float32 scale per token and head. int16 takes the memory
    of float16, is more precise where it matters (its error is absmax / 65534) and NumPy turns it into float32 about
    twenty times faster, the scale being applied to the scores instead of the elements.

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

    def __len__(self) -> int:
        return len(self.tokens)

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


class _Layer:
    """One growing array [2, heads, capacity, width], fixed point (with scales) or float32."""

    def __init__(self, heads: int, width: int, ctx: int, dtype: np.dtype[np.generic]) -> None:
        self._ctx = ctx
        self._scaled = dtype == np.int16
        self._data: NDArray[np.generic] = np.empty((2, heads, 0, width), dtype)
        self._scale: Float32 = np.empty((2, heads, 0), np.float32)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._scale.nbytes

    def write(self, start: int, keys: Float32, values: Float32) -> None:
        stop = start + keys.shape[0]
        self._grow(start, stop)
        if not self._scaled:
            self._data[0, :, start:stop] = keys.transpose(1, 0, 2)
            self._data[1, :, start:stop] = values.transpose(1, 0, 2)
            return
        both = np.array((keys, values)).transpose(0, 2, 1, 3)
        scale = np.abs(both).max(axis=3)
        scale *= np.float32(1 / _INT16_MAX)
        self._scale[:, :, start:stop] = scale
        # A row of zeros keeps scale 0 and codes 0: dividing by the smallest float instead of 0 sees to that.
        both /= np.maximum(scale, np.finfo(np.float32).tiny, out=scale)[..., None]
        self._data[:, :, start:stop] = np.rint(both, out=both)

    def read(self, start: int, stop: int, limit: int) -> Iterator[tuple[slice, Float32, Float32 | None]]:
        _, heads, _, width = self._data.shape
        step = max(1, limit // max(1, 2 * (stop - start) * width))
        for head in range(0, heads, step):
            group = slice(head, min(head + step, heads))
            data = self._data[:, group, start:stop].astype(np.float32, copy=False)
            yield group, data, self._scale[:, group, start:stop] if self._scaled else None

    def _grow(self, used: int, needed: int) -> None:
        _, heads, capacity, width = self._data.shape
        if needed <= capacity:
            return
        capacity = min(self._ctx, max(needed, 2 * capacity, _FIRST_CAPACITY))
        data = np.empty((2, heads, capacity, width), self._data.dtype)
        data[:, :, :used] = self._data[:, :, :used]
        if self._scaled:
            scale = np.empty((2, heads, capacity), np.float32)
            scale[:, :, :used] = self._scale[:, :, :used]
            # Before `_data`, whose shape is the capacity: an interrupt may fall between the two.
            self._scale = scale
        self._data = data
