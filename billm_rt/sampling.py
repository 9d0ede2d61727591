"""From logits to the next token: the options people know, in one stated order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from billm_format.errors import CorruptFileError, UsageError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Candidates that top-p looks at first; it takes eight times more until they carry enough probability.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, applied in this order; the defaults of all but `temperature` do nothing.

    1. `repeat_penalty` over the last `repeat_last_n` tokens (-1: all): divides positive logits, multiplies others
    2. `temperature`: 0 takes the most probable token (the lowest id of equals) and ends here
    3. `top_k`: the k most probable (0: off)
    4. `top_p`: the fewest most probable ones that together reach this share of what is left (1: off)
    5. `min_p`: those at least this fraction as probable as the most probable one (0: off)

    The same `seed` draws the same tokens; None draws afresh. Raises UsageError on a value out of range.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            ("--temp", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("--repeat-penalty", self.repeat_penalty, 0 < self.repeat_penalty <= 100, "more than 0, at most 100"),
            ("--repeat-last-n", self.repeat_last_n, self.repeat_last_n >= -1, "-1 (all), 0 (off) or more"),
            ("--seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        ]
        for option, value, good, wanted in checks:
            if not good:
                raise UsageError(f"{option} {value}: wanted {wanted}")


class Sampler:
    """Draws tokens as `sampling` says; holds the random generator."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def sample(self, logits: Float32, history: Sequence[int]) -> int:
        """Return the next token's id for float32 logits [vocab_size]; `history` is the tokens so far.

        Raises CorruptFileError if no logit is a finite maximum, which only damaged weights bring about.
        """
        options = self.sampling
        logits = _penalise(logits, history, options)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise CorruptFileError("the model's output is not a number: check the file with billm-info --verify")
        if options.temperature == 0:
            return best
        # float64: a sum over 100,000 float32 probabilities would bend the last ones.
        ids, probabilities = _candidates(logits, options)
        edges = np.cumsum(probabilities)
        place = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        place = min(place, probabilities.size - 1)
        return int(place if ids is None else ids[place])


def _penalise(logits: Float32, history: Sequence[int], options: Sampling) -> Float32:
    if options.repeat_penalty == 1 or options.repeat_last_n == 0 or not history:
        return logits
    recent = history if options.repeat_last_n < 0 else history[-options.repeat_last_n :]
    seen = np.unique(np.asarray(recent, np.int64))
    logits = logits.copy()
    values = logits[seen]
    penalty = np.float32(options.repeat_penalty)
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _candidates(logits: Float32, options: Sampling) -> tuple[NDArray[np.int64] | None, Float64]:
    """Return the ids that may be drawn (None: all of them, in order) and their unnormalised probabilities."""
    weight = np.exp((logits.astype(np.float64) - logits.max()) / options.temperature)
    ids = None
    if 0 < options.top_k < weight.size:
        ids = np.argpartition(weight, -options.top_k)[-options.top_k :]
        weight = weight[ids]
    if options.top_p < 1:
        kept = _nucleus(weight, options.top_p)
        ids, weight = kept if ids is None else ids[kept], weight[kept]
    if options.min_p > 0:
        kept = np.flatnonzero(weight >= options.min_p * weight.max())
        ids, weight = kept if ids is None else ids[kept], weight[kept]
    return ids, weight


def _nucleus(weight: Float64, top_p: float) -> NDArray[np.int64]:
    """Return the fewest places, most probable first, whose weights reach `top_p` of the sum, sorting only a few."""
    wanted = top_p * weight.sum()
    count = _FIRST_CANDIDATES
    while True:
        count = min(count, weight.size)
        places = np.argpartition(weight, weight.size - count)[weight.size - count :]
        places = places[np.argsort(-weight[places], kind="stable")]
        reached = np.cumsum(weight[places])
        if reached[-1] >= wanted or count == weight.size:
            return places[: int(np.searchsorted(reached, wanted)) + 1]
        count *= 8
