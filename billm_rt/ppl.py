"""Perplexity by a named protocol, in bounded memory, with a standard error.

Nothing here knows what computes the logits: a scorer is a function of one window, so a `.billm` file and the
full-precision model it came from are measured by the same code on the same windows.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from billm_format.errors import CorruptFileError, UsageError
from billm_rt.texts import windows

if TYPE_CHECKING:
    from billm_rt.cache import KVCache
    from billm_rt.model import Model

Ids = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
ProtocolName = Literal["paper", "llamacpp"]

DEFAULT_SEQLEN: dict[ProtocolName, int] = {"paper": 2048, "llamacpp": 512}
DESCRIPTIONS: dict[ProtocolName, str] = {
    "paper": "windows that do not overlap, all tokens but the first of each scored",
    "llamacpp": "windows that do not overlap, BOS first, the second half of each scored",
}

# Logits are taken in chunks of positions: 2,048 positions of a 152k vocabulary would be 1.2 GB.
_CHUNK_BYTES = 32 << 20

# (window, position of the first token to score) -> logits float32 [n, vocab_size] of the positions first - 1 up to
# the last but one of the window, in order, in chunks of any size.
Scorer = Callable[[Ids, int], Iterator[Float32]]


@dataclass(frozen=True)
class Result:
    """One model's perplexity on a sequence of windows."""

    perplexity: float  # exp(nll)
    stderr: float  # of the perplexity, windows taken as independent, see `summarize`
    stderr_tokens: float  # the same with tokens taken as independent: too small, but what other tools print
    nll: float  # mean negative log-likelihood of a scored token, in nats
    tokens: int  # scored
    windows: int
    seconds: float
    tokens_per_s: float  # tokens read, scored or not, per second


@dataclass
class Tally:
    """Negative log-likelihoods as they come in, for the progress display and the result."""

    total_windows: int
    nlls: list[Float64] = field(default_factory=list)  # per window, [scored tokens]
    read: int = 0
    seconds: float = 0.0

    @property
    def running(self) -> float:
        """Perplexity over the windows done so far."""
        return _exp(float(np.concatenate(self.nlls).mean())) if self.nlls else math.nan


Progress = Callable[[Tally], None]


def first_scored(protocol: ProtocolName, seqlen: int) -> int:
    """Return the position in a window of the first token whose likelihood counts."""
    return 1 if protocol == "paper" else seqlen // 2 + 1


def cut(
    token_ids: Sequence[int] | Ids, seqlen: int, limit: int | None, protocol: ProtocolName, bos: int | None = None
) -> list[Ids]:
    """Cut a tokenized text into the protocol's windows, int64 [seqlen] each, at most `limit`; the tail is dropped.

    `bos` is the token that the tokenizer puts in front of a text, None if it puts none. The paper's protocol has it
    where the tokenizer put it: once, in front of the text. llama.cpp's overwrites the first token of every window.
    Raises UsageError when the text is shorter than one window.
    """
    if seqlen < 4:
        raise UsageError(f"--seqlen: wanted at least 4, found {seqlen}")
    ids = np.asarray(token_ids, dtype=np.int64)
    if len(ids) < seqlen:
        remedy = f"take --seqlen {len(ids)} or less, or a longer text" if len(ids) >= 4 else "take a longer text"
        raise UsageError(f"the text has {len(ids):,} tokens, less than one window of {seqlen:,}: {remedy}")
    parts = windows(ids, seqlen, limit)
    if protocol == "llamacpp" and bos is not None:
        parts = [np.concatenate(([bos], part[1:])) for part in parts]
    return parts


def measure(parts: Sequence[Ids], scorer: Scorer, protocol: ProtocolName, progress: Progress | None = None) -> Result:
    """Score windows one by one and return the perplexity; `progress` is called after each window.

    Raises CorruptFileError at the first log-likelihood that is not a number.
    """
    tally = Tally(total_windows=len(parts))
    start = time.perf_counter()
    for number, window in enumerate(parts):
        first = first_scored(protocol, len(window))
        tally.nlls.append(_window_nll(window, first, scorer, number))
        tally.read += len(window) - 1
        tally.seconds = time.perf_counter() - start
        if progress:
            progress(tally)
    return summarize(tally)


def _window_nll(window: Ids, first: int, scorer: Scorer, number: int) -> Float64:
    targets = window[first:]
    nll = np.empty(len(targets), np.float64)
    done = 0
    for logits in scorer(window, first):
        step = targets[done : done + len(logits)]
        nll[done : done + len(step)] = token_nll(logits, step)
        done += len(step)
    if done != len(targets):
        raise ValueError(f"window {number}: {len(targets)} tokens to score, logits for {done}")
    if not np.isfinite(nll).all():
        position = first + int(np.flatnonzero(~np.isfinite(nll))[0])
        raise CorruptFileError(
            f"the model's logits for token {position} of window {number} are not finite numbers: "
            "its weights or scales are damaged or overflow; check the file with `billm-info --verify`"
        )
    return nll


def token_nll(logits: Float32, targets: Ids) -> Float64:
    """Return -log softmax(logits)[target], float64 [n], for logits float32 [n, vocab_size] and targets [n].

    Not finite where a row's logits are not. Works a few rows at a time: temporaries stay far below the logits' size.
    """
    out = np.empty(len(targets), np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(targets), 8):
            rows = logits[start : start + 8]
            top = rows.max(axis=1, keepdims=True)
            total = np.exp(rows - top).sum(axis=1, dtype=np.float64)
            chosen = rows[np.arange(len(rows)), targets[start : start + 8]]
            out[start : start + 8] = np.log(total) + (top[:, 0].astype(np.float64) - chosen)
    return out


def summarize(tally: Tally) -> Result:
    """Return the mean of all tokens' likelihoods as a perplexity, with its standard error.

    The standard error of the mean log-likelihood is carried through exp by the delta method: perplexity times it.
    It is taken over windows, because the tokens of one article are alike: over tokens as if they were independent, as
    llama.cpp has it, it comes out several times too small (SmolLM2-135M, 8 windows of WikiText-2: 0.45 instead of
    2.8). With one window there is none (NaN). It says how far another text of this kind and length might lie, not how
    sure a comparison of two models on the *same* windows is (much surer).
    """
    nll = np.concatenate(tally.nlls)
    mean = float(nll.mean())
    value = _exp(mean)
    over_windows = _standard_error(np.array([window.mean() for window in tally.nlls]))
    rate = tally.read / tally.seconds if tally.seconds else math.inf
    return Result(
        perplexity=value,
        stderr=value * over_windows,
        stderr_tokens=value * _standard_error(nll),
        nll=mean,
        tokens=len(nll),
        windows=len(tally.nlls),
        seconds=tally.seconds,
        tokens_per_s=rate,
    )


def _standard_error(values: Float64) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@dataclass
class Divergence:
    """How far the distributions of one model are from those of a reference, token by token."""

    kl: list[Float64] = field(default_factory=list)  # per window, Kullback-Leibler from the reference, nats a token
    same_top: int = 0  # tokens where both models' most likely tokens agree
    seconds: float = 0.0  # spent on the other model and on the comparison

    @property
    def tokens(self) -> int:
        """Tokens compared."""
        return sum(map(len, self.kl))

    @property
    def top1(self) -> float:
        """The share of tokens where both models' most likely tokens agree."""
        return self.same_top / self.tokens

    def mean(self) -> tuple[float, float]:
        """Return the mean divergence of a token and its standard error over windows, see `summarize`."""
        over_windows = _standard_error(np.array([window.mean() for window in self.kl]))
        return float(np.concatenate(self.kl).mean()), over_windows

    def begin_window(self) -> None:
        """Count what is added from now on to a window of its own."""
        self.kl.append(np.empty(0))

    def add(self, reference: Float32, other: Float32) -> None:
        """Compare logits float32 [n, vocab_size] of the same positions of the window begun last."""
        out = np.empty(len(reference), np.float64)
        for start in range(0, len(reference), 8):
            p = _log_softmax(reference[start : start + 8])
            q = _log_softmax(other[start : start + 8])
            share = np.exp(p)
            # A token that the reference rules out (-inf) adds nothing, whatever the other model thinks of it.
            out[start : start + 8] = np.multiply(share, p - q, where=share > 0, out=np.zeros_like(p)).sum(axis=1)
        self.kl[-1] = np.append(self.kl[-1], out)
        self.same_top += int((reference.argmax(axis=1) == other.argmax(axis=1)).sum())


def _log_softmax(logits: Float32) -> Float64:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def paired(reference: Scorer, other: Scorer, divergence: Divergence) -> Scorer:
    """Return the reference's scorer with `other` running beside it, chunk by chunk; differences go to `divergence`.

    Both must yield chunks of the same sizes. No more than one chunk of each model's logits is in memory.
    """

    def score(window: Ids, first: int) -> Iterator[Float32]:
        divergence.begin_window()
        others = other(window, first)
        for logits in reference(window, first):
            start = time.perf_counter()
            divergence.add(logits, next(others))
            divergence.seconds += time.perf_counter() - start
            yield logits

    return score


def model_scorer(model: "Model") -> tuple[Scorer, "KVCache"]:
    """Return the scorer of a loaded `.billm` model, and the KV cache that it uses for one window after the other."""
    cache = model.new_cache()
    rows = chunk_rows(model.config.vocab_size)

    def score(window: Ids, first: int) -> Iterator[Float32]:
        cache.truncate(0)
        if first > 1:
            model.forward(window[: first - 1], cache, logits="none")
        for start in range(first - 1, len(window) - 1, rows):
            logits = model.forward(window[start : min(start + rows, len(window) - 1)], cache, logits="all")
            if logits is not None:
                yield logits

    return score, cache


def chunk_rows(vocab_size: int) -> int:
    """Return how many positions' logits are computed at once: 32 MiB of them, in steps of 16."""
    return max(16, _CHUNK_BYTES // (4 * vocab_size) // 16 * 16)
