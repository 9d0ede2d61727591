"""What a model takes on a device, reckoned from the file's header before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from billm_format.config import ModelConfig
from billm_format.errors import DoesNotFitError
from billm_format.layout import LINEAR_KINDS
from billm_format.reader import BillmFile
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceCache, grown_capacity
from billm_rt.cuda.logits import survey_bytes

# The pool hands out memory in units of this size.
_UNIT = 512
# Not measured: the workspace of cuBLAS (32 MiB on Hopper), the code of the kernels, small buffers.
_LIBRARY_BYTES = 48 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes of device memory."""

    weights: dict[str, int]  # by kind, as `layout.KINDS` has them
    per_token: int  # of the KV cache
    ctx: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it, the KV cache at its full length."""
        return sum(self.weights.values()) + self.per_token * self.ctx + self.scratch


def budget(file: BillmFile, ctx: int, kv_bits: int, chunk: int) -> Budget:
    """Return what the model takes with a context of `ctx` tokens, prompts read `chunk` tokens at a time."""
    scratch = scratch_bytes(file.config, ctx, min(chunk, ctx))
    return Budget(weight_bytes(file), cache_bytes(file.config, kv_bits), ctx, scratch)


def require(file: BillmFile, ctx: int, kv_bits: int, chunk: int, free: int, name: str) -> None:
    """Raise DoesNotFitError, with the arithmetic, unless the model fits into `free` bytes of the device `name`."""
    wanted = budget(file, ctx, kv_bits, chunk)
    if wanted.total <= free:
        return
    linears = sum(size for kind, size in wanted.weights.items() if kind in LINEAR_KINDS)
    tables = wanted.weights["embedding"] + wanted.weights["head"]
    parts = (
        f"{_mb(linears)} of binarized Linears, {_mb(tables)} of embeddings and head, "
        f"{_mb(sum(wanted.weights.values()) - linears - tables)} of other weights, "
        f"{_mb(wanted.per_token * ctx)} of KV cache for {ctx:,} tokens and {_mb(wanted.scratch)} of scratch"
    )
    fitting = _longest_context(file, ctx, kv_bits, chunk, free)
    remedy = f"take a context (--ctx) of {fitting:,} tokens or less" if fitting else "use --device cpu"
    raise DoesNotFitError(
        f"{file.path.name} does not fit on {name}: {parts} make {_mb(wanted.total)}, {_mb(free)} are free: {remedy}"
    )


def require_caches(caches: Sequence[DeviceCache], lengths: Sequence[int], per_token: int, free: int, name: str) -> None:
    """Raise DoesNotFitError, with the arithmetic, unless all caches can grow to their `lengths` in tokens.

    `per_token`: `cache_bytes`.
    """
    new = sum(
        grown_capacity(cache.capacity, length, cache.ctx)
        for cache, length in zip(caches, lengths, strict=True)
        if length > cache.capacity
    )
    if new * per_token > free:
        raise DoesNotFitError(
            f"{len(caches)} texts at once need room for {new:,} more tokens in their KV caches: at {per_token:,} bytes "
            f"each {_mb(new * per_token)}, {_mb(free)} are free on {name}: read fewer texts at once, or shorter ones"
        )


def _longest_context(file: BillmFile, ctx: int, kv_bits: int, chunk: int, free: int) -> int:
    """Return the longest context below `ctx` that fits, 0 if none does."""
    low, high = 0, ctx
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget(file, middle, kv_bits, chunk).total <= free else (low, middle)
    return low


def weight_bytes(file: BillmFile) -> dict[str, int]:
    """Return kind -> bytes on the device, of every kind that goes there."""
    config = file.config
    sizes: dict[str, int] = dict.fromkeys((*LINEAR_KINDS, "embedding", "head", "other"), 0)
    for info in file.tensors.values():
        if info.kind not in sizes:
            continue
        nbytes = info.nbytes
        if file.quantization.embedding_bits == 4 and info.name.startswith(("embed.", "head.")):
            # A table of 4 bits becomes float16, without a step and a scale.
            nbytes = 2 * config.vocab_size * config.embedding_size if info.name.endswith(".weight") else 0
        elif info.kind == "other" and info.dtype == "F16":
            nbytes *= 2  # projections become float32
        sizes[info.kind] += _rounded(nbytes)
    sizes["other"] += config.num_hidden_layers * len(config.linears()) * _UNIT  # descriptors of the Linears
    return sizes


def cache_bytes(config: ModelConfig, kv_bits: int) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    width = launch.padded_width(config.head_dim)
    of_head = 2 * width if kv_bits == 16 else width + 4  # a float32 scale
    return config.num_hidden_layers * 2 * config.num_key_value_heads * of_head


def scratch_bytes(config: ModelConfig, ctx: int, tokens: int) -> int:
    """Return a bound on what is alive besides, while `tokens` pass through a layer: all of its activations at once."""
    linears = config.linears()
    up = sum(rows for name, (rows, _, _) in linears.items() if name in ("gate_proj", "up_proj"))
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    widths = 4 * config.hidden_size + 2 * config.embedding_size + 2 * heads + up + config.intermediate_size
    few = min(tokens, launch.FEW_TOKENS)
    partial = few * config.num_attention_heads * launch.MOST_SPLITS * (launch.padded_width(config.head_dim) + 2)
    rotary = ctx * config.head_dim
    recorded = launch.FEW_TOKENS * (few * widths + partial)  # a step each of 1 to FEW_TOKENS tokens, of two kinds
    unpacked = max((_unpacked(rows, cols, tokens) for rows, cols, _ in linears.values()), default=0)
    return (
        _LIBRARY_BYTES
        + 4 * (tokens * widths + partial + recorded + rotary)
        + unpacked
        + survey_bytes(config.vocab_size)
    )


def _unpacked(rows: int, cols: int, tokens: int) -> int:
    """Return the bytes that a product of many rows takes: rounded activations, levels, products."""
    if tokens < launch.DENSE_TOKENS:
        return 0
    width, most = launch.scratch_width(cols), launch.scratch_rows(cols, rows)
    return tokens * width * 2 + most * width * 2 + tokens * most * 4


def _rounded(nbytes: int) -> int:
    return launch.ceil_div(nbytes, _UNIT) * _UNIT


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
