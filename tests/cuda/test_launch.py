"""The arithmetic of launches, for GPUs and shapes that no test here can run."""

import re

import numpy as np
import pytest

from billm_rt.cuda import launch
from billm_rt.cuda.launch import GEMV_THREADS, TILE_ROWS, WARP, ceil_div
from billm_rt.cuda.source import source

# Multiprocessors and their shared memory: H100, A100, RTX 5090, RTX 4090, RTX 3050, and one that no Ampere is below.
GPUS = [(132, 228), (108, 164), (170, 100), (128, 100), (20, 100), (1, 100)]
HALF, BYTE = np.dtype(np.float16), np.dtype(np.int8)  # elements of a cache
# Rows of the Linears of a group, columns: LLaMA-2-70B, LLaMA-2-7B, Qwen2.5-0.5B, SmolLM2-135M, one row.
GROUPS = [
    ([8192, 1024, 1024], 8192), ([28672, 28672], 8192), ([8192], 28672), ([11008, 11008], 4096), ([4096], 11008),
    ([896, 128, 128], 896), ([896], 4864), ([576, 192, 192], 576), ([576], 1536), ([1], 33),
]  # fmt: skip


@pytest.mark.parametrize(("multiprocessors", "kibibytes"), GPUS)
def test_every_gemv_fits_every_gpu(multiprocessors: int, kibibytes: int) -> None:
    for rows, cols in GROUPS:
        ctas = launch.thread_blocks(rows, multiprocessors)
        for shape in launch.gemv_shapes():
            limit = (kibibytes << 10) // shape.resident - 1024
            tiles = max(ceil_div(ceil_div(n, TILE_ROWS), count) for n, count in zip(rows, ctas, strict=True))
            plan = launch.gemv_plan(shape, cols, tiles, limit)
            partials = plan.slices * tiles * TILE_ROWS * shape.rows
            assert shape.shared_bytes(plan.chunk_words, partials) == plan.shared <= limit
            assert plan.chunk_words % shape.step_words == 0
            assert GEMV_THREADS // WARP % plan.slices == 0


@pytest.mark.parametrize(("multiprocessors", "kibibytes"), GPUS)
def test_every_tile_has_one_thread_block(multiprocessors: int, kibibytes: int) -> None:
    for rows, _ in GROUPS:
        for count, ctas in zip(rows, launch.thread_blocks(rows, multiprocessors), strict=True):
            tiles = ceil_div(count, TILE_ROWS)
            taken = sorted(tile for cta in range(ctas) for tile in range(cta, tiles, ctas))
            assert taken == list(range(tiles))
            assert all(cta < tiles for cta in range(ctas))  # none without work


def test_a_large_gpu_is_full_and_waits_for_nobody() -> None:
    """Two thirds of the thread blocks that an H100 can hold, at least, and the busiest has at most a third more."""
    for rows in ([28672], [11008], [8192], [28672, 28672]):
        (*ctas,) = launch.thread_blocks(rows, 132)
        assert 2 * 132 <= sum(ctas) <= 3 * 132
        for count, of in zip(rows, ctas, strict=True):
            tiles = ceil_div(count, TILE_ROWS)
            assert ceil_div(tiles, of) <= 4 / 3 * tiles / of + 1


@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("split", [1, 2])
def test_tokens_find_a_shape(block: int, split: int) -> None:
    for tokens in range(1, launch.DENSE_TOKENS):
        shape = launch.gemv_shape(tokens, split, block)
        assert shape in set(launch.gemv_shapes())
        assert shape.rows < 2 * tokens or shape.rows == 1
    assert launch.gemv_shape(8, split, 128).rows == 8


def test_attention_splits_what_is_worth_it() -> None:
    assert launch.attend_few(1, 1, 32, 32, 128, HALF, 132).splits == 1
    long = launch.attend_few(1, 4096, 32, 8, 128, HALF, 132)
    assert 1 < long.splits <= 32
    assert long.size.grid == (long.splits, 8, 1)
    assert launch.attend_few(8, 4096, 64, 8, 128, HALF, 132).size.grid[1:] == (16, 8)
    for width in (8, 24, 64, 80, 128, 256):
        for heads, kv_heads in ((8, 8), (8, 2), (7, 1)):
            dtype = BYTE if width == 64 else HALF
            few = launch.attend_few(3, 100, heads, kv_heads, width, dtype, 132)
            many, size = launch.attend_many(100, heads, width, dtype)
            assert {few.kernel, many, launch.rotate_and_store(dtype)} <= set(launch.all_kernels())
            assert max(few.size.shared, size.shared) <= 48 << 10
            assert size.grid == (7, heads, 1)


def test_scratch_is_bounded() -> None:
    for rows, cols in ((28672, 8192), (8192, 28672), (576, 576), (5, 33)):
        count, width = launch.scratch_rows(cols, rows), launch.scratch_width(cols)
        assert 0 < count <= rows and width % 8 == 0 and 0 <= width - cols < 8
        assert count * width * 2 <= 64 << 20


@pytest.mark.parametrize("file", sorted({kernel.file for kernel in launch.all_kernels()}))
def test_a_source_is_whole(file: str) -> None:
    """Nothing is left to include, nothing is there twice, and each kernel that is named is there."""
    text = source(file)
    assert "#include" not in text and "#pragma once" not in text
    assert text.count("struct Linear {") == 1
    names = {re.match(r"\w+", kernel.expression)[0] for kernel in launch.all_kernels() if kernel.file == file}  # type: ignore[index]
    assert set(re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*\) )?(\w+)\(", text)) == names
