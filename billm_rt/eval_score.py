"""Zero-shot scores: log-likelihoods of answers, and the accuracies that lm-evaluation-harness makes of them.

Nothing here knows what computes the logits: a `Reader` reads tokens behind what it holds and can be cut back, so that a
context that several answers share is read once.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from billm_format.errors import CorruptFileError, UsageError
from billm_rt.eval_tasks import Item
from billm_rt.ppl import Float32, token_nll

if TYPE_CHECKING:
    from billm_rt.model import Model


class Reader(Protocol):
    """A language model with a memory of the tokens read last."""

    max_length: int  # tokens that can be held

    @property
    def tokens(self) -> list[int]:
        """The tokens held."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the text's tokens as the model's own tokenizer makes them, beginning-of-text token included."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...

    def read(self, token_ids: list[int], *, logits: bool) -> Float32 | None:
        """Read tokens behind those held; return float32 [tokens, vocab_size] if wanted."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """How a model sees a continuation."""

    total: float  # log-likelihood, nats
    greedy: bool  # whether every token of it is the most likely one


@dataclass(frozen=True)
class Score:
    """What a task came to; None: the task has no such metric."""

    items: int
    acc: float  # share of items whose most likely choice is right (LAMBADA: whose word greedy decoding gives)
    acc_stderr: float
    acc_norm: float | None  # the same with log-likelihoods divided by the choices' lengths in characters
    acc_norm_stderr: float | None
    perplexity: float | None  # of the continuations, each counting once
    perplexity_stderr: float | None
    chance: float | None  # accuracy of guessing
    seconds: float


class BillmReader:
    """A loaded `.billm` model as a Reader."""

    def __init__(self, model: "Model") -> None:
        """Read with a KV cache of the model's own."""
        self._model = model
        self._cache = model.new_cache()
        self.max_length = model.ctx

    @property
    def tokens(self) -> list[int]:
        """The tokens held."""
        return self._cache.tokens

    def encode(self, text: str) -> list[int]:
        """Return the text's tokens; names of special tokens are these tokens, as in transformers."""
        return self._model.tokenizer.encode(text, special=True)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._cache.truncate(length)

    def read(self, token_ids: list[int], *, logits: bool) -> Float32 | None:
        """Read tokens behind those held; return float32 [tokens, vocab_size] if wanted."""
        return self._model.forward(token_ids, self._cache, logits="all" if logits else "none")


def encode_pair(reader: Reader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of what follows it, cut where the context's own tokens end.

    Both are encoded as one text, so that tokens are those that the model knows; white space at the context's end counts
    as the continuation's. Raises UsageError where nothing is left to score.
    """
    bare = context.rstrip()
    whole = reader.encode(context + continuation)
    first = len(reader.encode(bare)) if bare else 0
    if not 0 < first < len(whole):
        raise UsageError(f"nothing to score: context {context!r}, continuation {continuation!r}")
    return whole[:first], whole[first:]


def likelihood(reader: Reader, context: list[int], continuation: list[int]) -> Likelihood:
    """Return how likely the tokens `continuation` are behind `context`, both not empty.

    What the reader holds already of the beginning is not read again. A text beyond `max_length` loses its beginning.
    Raises CorruptFileError when logits are not finite.
    """
    tokens = (context + continuation)[-reader.max_length - 1 :]
    continuation = continuation[-len(tokens) + 1 :]
    first = len(tokens) - len(continuation) - 1  # the token whose logits judge the continuation's first
    reader.truncate(min(first, _common_length(reader.tokens, tokens)))
    held = len(reader.tokens)
    if held < first:
        reader.read(tokens[held:first], logits=False)
    logits = reader.read(tokens[first:-1], logits=True)
    if logits is None:
        raise ValueError("the reader returned no logits")
    targets = np.array(continuation, np.int64)
    nll = token_nll(logits, targets)
    if not np.isfinite(nll).all():
        raise CorruptFileError("the model's logits are not finite numbers: check the file with `billm-info --verify`")
    return Likelihood(-float(nll.sum()), bool((logits.argmax(axis=1) == targets).all()))


def _common_length(held: list[int], wanted: list[int]) -> int:
    for place, (a, b) in enumerate(zip(held, wanted, strict=False)):
        if a != b:
            return place
    return min(len(held), len(wanted))


def evaluate(
    reader: Reader,
    items: Sequence[Item],
    metrics: tuple[str, ...],
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score every item's choices and return the task's metrics; `progress` is called with the items done."""
    begun = time.perf_counter()
    found: list[list[Likelihood]] = []
    for item in items:
        found.append([likelihood(reader, *encode_pair(reader, *pair)) for pair in item.pairs])
        if progress:
            progress(len(found))
    return summarize(items, found, metrics, time.perf_counter() - begun)


def summarize(
    items: Sequence[Item], found: Sequence[Sequence[Likelihood]], metrics: tuple[str, ...], seconds: float
) -> Score:
    """Return the metrics of items whose choices have the likelihoods `found`; the first of equal choices counts."""
    totals = [np.array([choice.total for choice in choices]) for choices in found]
    if "perplexity" in metrics:
        right = np.array([choices[0].greedy for choices in found], np.float64)
        chance = None
    else:
        right = _hits(items, totals)
        chance = float(np.mean([1 / len(item.pairs) for item in items]))
    acc_norm = acc_norm_stderr = perplexity = perplexity_stderr = None
    if "acc_norm" in metrics:
        acc_norm, acc_norm_stderr = _mean(
            _hits(items, [total / item.lengths for total, item in zip(totals, items, strict=True)])
        )
    if "perplexity" in metrics:
        nll, error = _mean(-np.array([total[0] for total in totals]))
        perplexity = math.exp(nll) if nll < 700 else math.inf
        perplexity_stderr = perplexity * error  # carried through exp by the delta method
    acc, acc_stderr = _mean(right)
    return Score(
        items=len(items),
        acc=acc,
        acc_stderr=acc_stderr,
        acc_norm=acc_norm,
        acc_norm_stderr=acc_norm_stderr,
        perplexity=perplexity,
        perplexity_stderr=perplexity_stderr,
        chance=chance,
        seconds=seconds,
    )


def _hits(items: Sequence[Item], scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([score.argmax() == item.gold for score, item in zip(scores, items, strict=True)], np.float64)


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for a single value."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
