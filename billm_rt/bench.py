"""How fast a model reads a prompt and writes an answer, and how near that comes to what the memory allows."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from billm_format.reader import BillmFile

if TYPE_CHECKING:
    from billm_rt.cache import KVCache
    from billm_rt.model import Model

# The memory that the read bandwidth is measured on is at least this large, and twice the last-level cache.
_LEAST_BUFFER = 256 << 20
_BANDWIDTH_SECONDS, _BANDWIDTH_PASSES = 1.0, 5


@dataclass(frozen=True)
class Speed:
    """Tokens per second, one figure per run."""

    tokens: int  # of one run
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.samples)


def measure(
    model: "Model",
    caches: "Sequence[KVCache]",
    prompt: int,
    generate: int,
    repeat: int,
    done: Callable[[], None] = lambda: None,
) -> tuple[Speed, Speed]:
    """Return the speeds of reading `prompt` tokens at once and of decoding `generate` tokens, as llama-bench does it.

    The prompt goes into the first cache; decoding adds as many tokens to each, and counts them all. Each run empties
    the caches; a first one of either does not count. The tokens are random, their ids fixed. Decoding is the model's
    work alone: one token in, its logits out, nothing sampled. `done` is called after each of the 2 * (repeat + 1) runs.
    The caches must have room for either number of tokens.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (max(prompt, generate), len(caches)))
    batch = model.gather(caches) if len(caches) > 1 else None

    def read_prompt() -> None:
        model.forward(ids[:prompt, 0], caches[0])

    def decode() -> None:
        for tokens in ids[:generate]:
            if batch is None:
                model.forward(tokens, caches[0])
            else:
                model.forward_each(tokens, batch)

    def rate(work: Callable[[], None], tokens: int) -> float:
        for cache in caches:
            cache.truncate(0)
        begun = time.perf_counter()
        work()
        found = tokens / (time.perf_counter() - begun)
        done()
        return found

    # The two take turns, so that a machine that is busy for a while slows both.
    written = generate * len(caches)
    runs = [(rate(read_prompt, prompt), rate(decode, written)) for _ in range(repeat + 1)][1:]
    prompts, answers = zip(*runs, strict=True)
    return Speed(prompt, prompts), Speed(written, answers)


def weight_bytes_per_token(file: BillmFile) -> int:
    """Return how many bytes of the file one decoded token reads: all weights, but of a mere table only a row."""
    tables = ["pos_embed."] + (["embed."] if not file.config.tie_word_embeddings else [])
    return sum(
        info.nbytes // (info.shape[0] if info.name.startswith(tuple(tables)) else 1)
        for info in file.tensors.values()
        if info.kind not in ("tokenizer", "padding")
    )


def resident_part(path: Path) -> int | None:
    """Return how much of a mapped file is in this process's memory; None where the system does not tell."""
    import psutil

    maps = getattr(psutil.Process(), "memory_maps", None)
    if maps is None:
        return None
    return sum(int(entry.rss) for entry in maps() if entry.path == str(path.resolve()))


def read_bandwidth(threads: int, nbytes: int | None = None) -> float:
    """Return the bytes per second that `threads` threads read from memory, the best of many passes.

    The best, because it stands for a limit: other programs only ever take from it. `nbytes` is the memory that is
    read (default: twice the last-level cache and at least 256 MB, if half the free memory allows).
    """
    parts = np.array_split(np.ones((nbytes or _buffer_size()) // 8, np.uint64), threads)
    passes: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + _BANDWIDTH_SECONDS
        while len(passes) < _BANDWIDTH_PASSES or time.perf_counter() < end:
            begun = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            passes.append(time.perf_counter() - begun)
    return sum(part.nbytes for part in parts) / min(passes)


def _buffer_size() -> int:
    import psutil

    return min(max(_LEAST_BUFFER, 2 * last_level_cache()), int(psutil.virtual_memory().available) // 2)


def last_level_cache() -> int:
    """Return the bytes of the largest cache that the system tells of, 0 if it tells of none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units.get(text[-1], 1))
    return max(sizes)
