"""Which kernel runs how: names of the variants, grids and shared memory, by plain arithmetic that needs no GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from billm_format.config import BLOCK_SIZES

WARP = 32
GEMV_THREADS = 256
TILE_ROWS = 16  # of a weight, in one product of the tensor cores
MAX_GEMV_TOKENS = 8
# Tiles of one thread block: bounds the sums that it keeps in shared memory.
_MOST_TILES = 32
_B_WORDS = 20


class Dtype(IntEnum):
    """How activations lie in memory; the numbers are those of common.cuh."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2


# `struct Linear` of common.cuh: pointers, sizes, and the thread blocks that work on it.
LINEAR = np.dtype(
    [(name, np.uint64) for name in ("sign", "second", "salient", "scales", "row_scale", "col_scale", "bias")]
    + [(name, np.int32) for name in ("rows", "cols", "first_row", "first_cta", "ctas", "padding")]
)

# `struct Cache` of common.cuh: pointers and the room for tokens.
CACHE = np.dtype(
    [(name, np.uint64) for name in ("keys", "values", "key_scale", "value_scale", "past")]
    + [(name, np.int32) for name in ("capacity", "padding")]
)


class Kernel(NamedTuple):
    """One variant: the file and the C++ expression that names it."""

    file: str
    expression: str


class Size(NamedTuple):
    """Grid, threads of a block, bytes of shared memory."""

    grid: tuple[int, int, int]
    threads: int
    shared: int = 0


def ceil_div(count: int, size: int) -> int:
    """Return count / size, rounded up."""
    return -(-count // size)


@dataclass(frozen=True)
class GemvShape:
    """How activation rows and blocks fill the columns of a product; the same arithmetic as in gemv.cu."""

    split: int  # binary16 values that make one activation: 2 for float32
    rows: int  # activation rows: 1, 2, 4 or 8
    block: int

    @property
    def groups(self) -> int:
        """Columns of b, but for their class."""
        return self.split * self.rows

    @property
    def pairs(self) -> int:
        """Those of them in one tile of b."""
        least = {256: 4, 128: 2}.get(self.block, 1)
        return max(least, min(self.groups, 4, self.block // 32))

    @property
    def tiles(self) -> int:
        """Tiles of b."""
        return ceil_div(self.groups, self.pairs)

    @property
    def step_words(self) -> int:
        """32-bit words of a row in one step of a warp."""
        return 4 // self.pairs * self.block // 32

    @property
    def resident(self) -> int:
        """Thread blocks that share a multiprocessor."""
        return {1: 3, 2: 2}.get(self.tiles, 1)

    @property
    def kernel(self) -> Kernel:
        """The variant for this shape."""
        return Kernel("gemv.cu", f"gemv<{self.split}, {self.rows}, {self.block}>")

    def shared_bytes(self, chunk_words: int, partials: int) -> int:
        """Return the shared memory for chunks of so many words and so many partial sums."""
        class_words = (chunk_words * _B_WORDS + 15) // 32 * 32 + 16
        b = self.groups * 2 * class_words
        blocks = chunk_words * WARP // self.block * self.groups * 4
        return LINEAR.itemsize + 4 * (b + 16 + ceil_div(chunk_words, 4) * 4 + blocks + partials)


def gemv_shapes() -> Iterator[GemvShape]:
    """Yield every shape that has a kernel: at most four tiles of sums, more need too many registers."""
    for split in (1, 2):
        for block in BLOCK_SIZES:
            for rows in (1, 2, 4, 8):
                shape = GemvShape(split, rows, block)
                if shape.tiles <= 4:
                    yield shape


@cache
def gemv_shape(tokens: int, split: int, block: int) -> GemvShape:
    """Return the smallest shape for so many tokens, or the largest there is: the rest then wants another launch."""
    shapes = [shape for shape in gemv_shapes() if shape.split == split and shape.block == block]
    return next((shape for shape in shapes if shape.rows >= tokens), shapes[-1])


def thread_blocks(rows: Sequence[int], multiprocessors: int) -> list[int]:
    """Return how many thread blocks work on each Linear of a group: together about three a multiprocessor."""
    tiles = [ceil_div(count, TILE_ROWS) for count in rows]
    wanted = 3 * multiprocessors
    return [min(n, max(ceil_div(n, _MOST_TILES), n * wanted // sum(tiles), 1)) for n in tiles]


class GemvPlan(NamedTuple):
    """How one launch cuts the columns."""

    chunk_words: int  # of a row, whose activations are in shared memory at once
    slices: int  # warps that share a tile
    shared: int  # bytes


@cache
def gemv_plan(shape: GemvShape, cols: int, tiles: int, limit: int) -> GemvPlan:
    """Return the plan with the fewest steps of the busiest warp; `tiles` are those of the busiest thread block.

    `limit` is the shared memory of a thread block in bytes, at least 32 KiB.
    """
    warps = GEMV_THREADS // WARP
    steps = ceil_div(cols, WARP * shape.step_words)
    plans: list[tuple[int, int, GemvPlan]] = []
    for slices in (1, 2, 4, 8):
        partials = slices * tiles * TILE_ROWS * shape.rows
        chunk = steps
        while chunk > 1 and shape.shared_bytes(chunk * shape.step_words, partials) > limit:
            chunk = ceil_div(chunk, slices) * slices - slices if chunk > slices else chunk - 1
        shared = shape.shared_bytes(chunk * shape.step_words, partials)
        if shared > limit:
            continue
        whole, rest = divmod(steps, chunk)
        turns = whole * ceil_div(chunk, slices) + ceil_div(rest, slices)
        cost = ceil_div(tiles, warps // slices) * turns
        plans.append((cost, slices, GemvPlan(chunk * shape.step_words, slices, shared)))
    return min(plans)[2]


# ---- prompts

# From so many tokens on, cuBLAS on unpacked rows instead of one gemv per eight tokens. Not measured: by the arithmetic
# of an H100, unpacking moves 4 bytes a weight where a gemv of 8 tokens reads 0.28, about as long as four of those.
DENSE_TOKENS = 40
# Of unpacked levels at once: enough rows to fill a large GPU with tiles of 128 x 128, far from a whole model.
_SCRATCH_BYTES = 64 << 20

UNPACK, ROUND_ROWS, SCALE_PRODUCTS = (Kernel("dense.cu", name) for name in ("unpack", "round_rows", "scale_products"))


def scratch_width(cols: int) -> int:
    """Return the columns of the scratch: a multiple of 8, which the tensor cores want."""
    return ceil_div(cols, 8) * 8


def scratch_rows(cols: int, rows: int) -> int:
    """Return how many rows are unpacked at once."""
    return min(rows, max(TILE_ROWS, _SCRATCH_BYTES // (2 * scratch_width(cols))))


def per_element(count: int) -> Size:
    """Return the size for a thread per element."""
    return Size((ceil_div(count, 256), 1, 1), 256)


def per_column(columns: int, tokens: int) -> Size:
    """Return the size for a thread per column and token."""
    return Size((ceil_div(columns, 256), tokens, 1), 256)


def per_token(tokens: int) -> Size:
    """Return the size for a thread block per token, with a float per warp."""
    return Size((tokens, 1, 1), 256, 256 // WARP * 4)


# ---- embeddings and heads

# The C++ type, and how many weights one load may bring: the first that divides the width.
_TABLE_TYPES: dict[np.dtype[Any], tuple[str, tuple[int, ...]]] = {
    np.dtype(np.int8): ("i8", (16, 4, 1)),
    np.dtype(np.float16): ("Half", (8, 1)),
    np.dtype(np.float32): ("float", (4, 1)),
}
MAX_TABLE_TOKENS = 8


def gather_kernel(dtype: np.dtype[Any]) -> Kernel:
    """Return the kernel that looks rows up."""
    return Kernel("table.cu", f"gather<{_TABLE_TYPES[dtype][0]}>")


def multiply_kernel(dtype: np.dtype[Any], width: int, tokens: int) -> Kernel:
    """Return the kernel for rows of `width`, one token or up to eight."""
    name, counts = _TABLE_TYPES[dtype]
    count = next(count for count in counts if width % count == 0)
    return Kernel("table.cu", f"multiply<{name}, {count}, {1 if tokens == 1 else MAX_TABLE_TOKENS}>")


def multiply_size(rows: int, tokens: int) -> Size:
    """Return the size: a warp takes four rows for one token, two for several."""
    return Size((ceil_div(rows, 256 // WARP * (4 if tokens == 1 else 2)), 1, 1), 256)


# ---- sampling

SURVEY, WEIGH, CHOOSE, COLLECT = (Kernel("sample.cu", name) for name in ("survey", "weigh", "choose", "collect"))
_MOST_GROUPS = 1024


class Groups(NamedTuple):
    """How a row of logits is cut into runs, a warp each."""

    size: int
    number: int  # at most one for each thread of `choose`


def logit_groups(vocab_size: int) -> Groups:
    """Return the runs of a vocabulary: a load of a warp at least."""
    size = max(WARP, ceil_div(vocab_size, _MOST_GROUPS))
    return Groups(size, ceil_div(vocab_size, size))


def per_group(groups: int) -> Size:
    """Return the size for a warp per group."""
    return Size((ceil_div(groups, 256 // WARP), 1, 1), 256)


def choose_size(groups: int) -> Size:
    """Return the size for a thread per group, with a float for each, for each warp and one more."""
    warps = ceil_div(groups, WARP)
    return Size((1, 1, 1), warps * WARP, 4 * (groups + warps + 1))


# ---- between the Linears

NORMALIZE, ACTIVATE, ADD = (Kernel("decoder.cu", name) for name in ("normalize", "activate", "add"))
_ELEMENTS: dict[np.dtype[Any], str] = {np.dtype(np.float16): "u16", np.dtype(np.int8): "i8"}  # of the cache
_ATTENTION_THREADS = 128
_ATTENTION_WARPS = _ATTENTION_THREADS // WARP
MAX_HEAD_DIM = 256
# Beyond so many tokens a block takes 16 queries of one head through the keys; up to it, the context is split.
FEW_TOKENS = 8
MOST_SPLITS = 32
_KEYS_PER_SPLIT = 64
COMBINE = Kernel("attention.cu", "combine")


def padded_width(width: int) -> int:
    """Return the elements of a head in the cache: a multiple of 8."""
    return ceil_div(width, 8) * 8


def rotate_and_store(dtype: np.dtype[Any]) -> Kernel:
    """Return the kernel for a cache of this type."""
    return Kernel("decoder.cu", f"rotate_and_store<{_ELEMENTS[dtype]}>")


def per_head(heads: int, tokens: int) -> Size:
    """Return the size for a warp per head and token."""
    return Size((ceil_div(heads, 4), tokens, 1), 4 * WARP)


def per_row_of_heads(heads: int, tokens: int) -> Size:
    """Return the size for a thread block per head and token."""
    return Size((heads, tokens, 1), _ATTENTION_THREADS)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


class AttendFew(NamedTuple):
    """Attention of few tokens: the kernel, its size, how often the context is split."""

    kernel: Kernel
    size: Size
    splits: int


def attend_few(
    tokens: int, seen: int, heads: int, kv_heads: int, width: int, dtype: np.dtype[Any], multiprocessors: int
) -> AttendFew:
    """Return the launch for `tokens` queries, the last of which sees `seen` keys of this type."""
    count = _power_of_two(ceil_div(padded_width(width), WARP))
    queries = 1 if heads == kv_heads else 4
    sets = kv_heads * ceil_div(heads // kv_heads, queries)
    splits = min(MOST_SPLITS, ceil_div(seen, _KEYS_PER_SPLIT), ceil_div(4 * multiprocessors, sets * tokens))
    shared = _ATTENTION_WARPS * queries * WARP * (2 + count) * 4
    kernel = Kernel("attention.cu", f"attend_few<{count}, {queries}, {_ELEMENTS[dtype]}>")
    return AttendFew(kernel, Size((splits, sets, tokens), _ATTENTION_THREADS, shared), splits)


def attend_many(tokens: int, heads: int, width: int, dtype: np.dtype[Any]) -> tuple[Kernel, Size]:
    """Return the launch for many queries."""
    padded, queries = padded_width(width), 4 * _ATTENTION_WARPS
    count = _power_of_two(ceil_div(padded, 2 * WARP))
    shared = 4 * (queries * padded + queries * WARP + WARP * (padded // 2 | 1))
    size = Size((ceil_div(tokens, queries), heads, 1), _ATTENTION_THREADS, shared)
    return Kernel("attention.cu", f"attend_many<{count}, {_ELEMENTS[dtype]}>"), size


def all_kernels() -> list[Kernel]:
    """Return every variant that can be launched."""
    kernels = [shape.kernel for shape in gemv_shapes()]
    kernels += [UNPACK, ROUND_ROWS, SCALE_PRODUCTS, NORMALIZE, ACTIVATE, ADD, COMBINE]
    kernels += [SURVEY, WEIGH, CHOOSE, COLLECT]
    for dtype, (_, counts) in _TABLE_TYPES.items():
        kernels += [gather_kernel(dtype)]
        kernels += [multiply_kernel(dtype, count, tokens) for count in counts for tokens in (1, MAX_TABLE_TOKENS)]
    for dtype, name in _ELEMENTS.items():
        kernels += [rotate_and_store(dtype)]
        kernels += [
            Kernel("attention.cu", f"attend_few<{count}, {queries}, {name}>")
            for count in (1, 2, 4, 8)
            for queries in (1, 4)
        ]
        kernels += [Kernel("attention.cu", f"attend_many<{count}, {name}>") for count in (1, 2, 4)]
    return kernels
