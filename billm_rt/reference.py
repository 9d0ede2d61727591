"""The meaning of every operation, in float32 NumPy: oracle of the tests, `exact=True`, and the way without a compiler.

Weights are dequantized a few rows at a time and thrown away: the model is never in memory as floats.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig
from billm_format.packing import PackedLinear, Table
from billm_format.reader import BillmFile
from billm_rt.backend import Activation, Array, FusedLayers, Layer, LayerOps, Norm
from billm_rt.cache import CacheBatch, KVCache, Texts

T = TypeVar("T")

# Elements of one float32 scratch array: weights of a few rows, scores of a few queries, keys of a few heads.
_WEIGHT_ELEMENTS = 1 << 18
_SCORE_ELEMENTS = 1 << 21
_CACHE_ELEMENTS = 1 << 21


class ReferenceBackend:
    """Every operation of `Backend` in plain NumPy, float32 throughout."""

    device = "cpu"
    activations = "float32"
    chunk = 1024  # every chunk dequantizes all weights again: few of them

    def __init__(self, isa: str, reason: str, kv_type: str = "float32") -> None:
        self.isa = isa
        self.reason = reason
        self.activations = "float32"
        self.kv_type = kv_type

    def require(self, file: BillmFile, ctx: int) -> None:
        """Ask for nothing: the weights stay in the file, and the cache grows with what is read."""

    def device_memory(self, file: BillmFile, kv_cache: int) -> dict[str, int]:
        """Return nothing: all is the process's own."""
        return {}

    def new_cache(self, config: ModelConfig, ctx: int) -> KVCache:
        """Return an empty cache of `kv_type`."""
        return KVCache(config, ctx, self.kv_type)

    def gather(self, caches: Sequence[KVCache]) -> CacheBatch:
        """Return the caches as a batch."""
        return CacheBatch(caches)

    def require_room(self, config: ModelConfig, caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
        """Ask for nothing, as `require`."""

    def load_tensor(self, array: NDArray[Any]) -> Array:
        """Return the tensor as float32; a view where it already is."""
        return array.astype(np.float32, copy=False)

    def load_linears(self, linears: Sequence[PackedLinear]) -> Any:
        """Keep the packed Linears as they are."""
        return tuple(linears)

    def load_table(self, table: Table) -> Any:
        """Keep the table as it is."""
        return table

    def fuse(
        self, config: ModelConfig, layers: Sequence[Layer], norm: Norm | None, head: Any
    ) -> FusedLayers | LayerOps:
        """Leave the layers to the loop in `model.py`: it is their meaning."""
        return self

    def linears(self, x: Array, group: Any) -> list[Array]:
        """Return W x + bias for every Linear, W dequantized a few rows at a time."""
        return [_linear(x, linear) for linear in group]

    def take_step(
        self,
        step: Callable[[Any, Any], T],
        kind: str,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        texts: Texts,
    ) -> T:
        """Take the step."""
        return step(token_ids, positions)

    def embed(self, rows: NDArray[np.int64], table: Any) -> Array:
        """Return float32 rows of the table."""
        values: Array = table.take(rows)
        return values

    def add(self, x: Array, y: Array) -> Array:
        """Return the sum in x."""
        x += y
        return x

    def head(self, x: Array, table: Any) -> Array:
        """Return x times the table's transpose, the table turned into float32 a few rows at a time."""
        out = np.empty((x.shape[0], table.weight.shape[0]), np.float32)
        for rows, values in some_rows(table):
            np.matmul(x, values.T, out=out[:, rows])
        return out

    def logits(self, head: Any) -> Array:
        """Return the array that it is."""
        array: Array = head
        return array

    def rows(self, head: Any) -> Sequence[Array]:
        """Return the array's rows."""
        return list(head)

    def dense(self, x: Array, weight: Array) -> Array:
        """Return x times the weight's transpose."""
        out: Array = x @ weight.T
        return out

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return x / sqrt(mean(x^2) + eps) * weight."""
        mean = np.einsum("...i,...i->...", x, x)[..., None]
        mean *= np.float32(1 / x.shape[-1])
        mean += np.float32(eps)
        out: Array = x / np.sqrt(mean)
        out *= weight
        return out

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return (x - mean) / sqrt(variance + eps) * weight + bias."""
        centred = x - x.mean(axis=-1, keepdims=True)
        out = self.rms_norm(centred, weight, eps)
        out += bias
        return out

    def rotary_table(self, positions: NDArray[np.int64], inv_freq: Array, scale: float) -> tuple[Array, Array]:
        """Return cos and sin of position * inv_freq, times `scale`, float32 [positions, 1, head_dim / 2]."""
        return rotary_table(positions, inv_freq, scale)

    def rotate(self, x: Array, table: tuple[Array, Array]) -> Array:
        """Turn the pair (element i, element i + head_dim / 2) by the angle i of its position."""
        cos, sin = table
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        out = np.empty_like(x)
        np.subtract(first * cos, second * sin, out=out[..., :half])
        np.add(second * cos, first * sin, out=out[..., half:])
        return out

    def activate(self, x: Array, function: Activation) -> Array:
        """Apply SiLU, GELU (by erf or by tanh) or ReLU."""
        if function == "silu":
            return _silu(x)
        if function == "relu":
            return np.maximum(x, 0, out=x)
        return _gelu_tanh(x) if function == "gelu_tanh" else _gelu(x)

    def attention(self, query: Array, cache: KVCache, layer: int, window: int | None) -> Array:
        """Softmax attention over the cache in float32, a few queries and a few heads at a time."""
        tokens, heads, width = query.shape
        past = len(cache)
        kv_heads = cache.num_heads
        # [kv head, query head of its group, token, width]: the heads of a group share one pass over their keys.
        grouped = (query * np.float32(width**-0.5)).reshape(tokens, kv_heads, -1, width).transpose(1, 2, 0, 3)
        out = np.empty((tokens, kv_heads, heads // kv_heads, width), np.float32)
        step = max(1, min(tokens, _SCORE_ELEMENTS // (heads * (past + tokens))))
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            first = 0 if window is None else max(0, past + start - window + 1)
            mask = _mask(past + start - first, stop - start, window)
            for group, data, scale in cache.read(layer, first, past + stop, _CACHE_ELEMENTS):
                mixed = _attend(grouped[group, :, start:stop], data, scale, mask)
                out[start:stop, group] = mixed.transpose(2, 0, 1, 3)
        return out.reshape(tokens, heads * width)


def rotary_table(positions: NDArray[np.int64], inv_freq: Array, scale: float) -> tuple[Array, Array]:
    """Return cos and sin of position * inv_freq, times `scale`, float32 [positions, 1, head_dim / 2]."""
    angle = positions[:, None, None].astype(np.float32) * inv_freq
    return np.cos(angle) * np.float32(scale), np.sin(angle) * np.float32(scale)


def some_rows(table: Table) -> Iterator[tuple[slice, Array]]:
    """Yield (rows, float32 [some rows, cols]) of a table from top to bottom."""
    count, step = table.weight.shape[0], max(1, _WEIGHT_ELEMENTS // table.cols)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, table.take(rows)


def _linear(x: Array, linear: PackedLinear) -> Array:
    out = np.empty((x.shape[0], linear.rows), np.float32)
    step = max(1, _WEIGHT_ELEMENTS // linear.cols)
    for start in range(0, linear.rows, step):
        stop = min(start + step, linear.rows)
        np.matmul(x, linear.dequantize(start, stop).T, out=out[:, start:stop])
    if linear.bias is not None:
        out += linear.bias
    return out


def _mask(before: int, count: int, window: int | None) -> Array | None:
    """Return what to add to the scores [count queries, before + count keys]; None where every key is seen."""
    if count == 1:
        return None
    distance = before + np.arange(count)[:, None] - np.arange(before + count)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return np.where(hidden, np.float32(-np.inf), np.float32(0))


def _attend(query: Array, data: Array, scale: Array | None, mask: Array | None) -> Array:
    """Return float32 [heads, group, tokens, width] for query of that shape; data and scale as from `KVCache.read`."""
    heads, group, tokens, width = query.shape
    scores: Array = query.reshape(heads, group * tokens, width) @ data[0].transpose(0, 2, 1)
    if scale is not None:
        scores *= scale[0, :, None]
    if mask is not None:
        scores.reshape(heads, group, tokens, -1)[...] += mask
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if scale is not None:
        scores *= scale[1, :, None]
    mixed: Array = scores @ data[1]
    mixed /= total
    return mixed.reshape(heads, group, tokens, width)


def _silu(x: Array) -> Array:
    scratch = np.negative(x)
    np.exp(scratch, out=scratch)
    scratch += np.float32(1)
    return np.divide(x, scratch, out=x)


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    out: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def _gelu(x: Array) -> Array:
    # erf by Abramowitz and Stegun 7.1.26 in float64: within 1.5e-7, NumPy having none of its own.
    scaled = np.abs(x.astype(np.float64)) * np.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * scaled)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.copysign(1 - series * np.exp(-scaled * scaled), x)
    out: Array = (0.5 * x * (1 + erf)).astype(np.float32)
    return out
