"""From logits to the next token: the options people know, in one stated order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from billm_format.errors import CorruptFileError, UsageError

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Sorting a whole vocabulary, or adding it up one by one, takes as long as some layers of a small model. So it is only
# passed through in float32, in groups of this many, and what may be drawn is looked at closely.
_GROUP = 256
# A nucleus of more tokens than this is rare.
FEW_TOKENS = 1000
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, applied in this order; the defaults of all but `temperature` do nothing.

    1. `repeat_penalty` over the last `repeat_last_n` tokens (-1: all): divides positive logits, multiplies others
    2. `temperature`: 0 takes the most probable token (the lowest id of equals) and ends here
    3. `top_k`: the k most probable, of equals those of the lowest ids (0: off)
    4. `top_p`: the fewest most probable ones that together reach this share of what is left (1: off), likewise
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

    @property
    def draws_from_all(self) -> bool:
        """Whether every token may be drawn."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1 and self.min_p == 0


class Survey(NamedTuple):
    """What a device says of logits that stay there, penalties applied."""

    best: float
    size: int  # logits in a group
    sums: Float32  # [groups] of exp((logit - best) / temperature), in order
    ids: Int64  # of those that may be drawn and perhaps some more, in order; empty if all may
    logits: Float32  # theirs
    complete: bool  # else there are more than a device cares to list


class RemoteLogits(Protocol):
    """Logits [vocab_size] that lie on a device until the model reads on."""

    size: int

    def survey(self, options: Sampling, recent: Int64) -> Survey:
        """Apply the penalty to the tokens `recent` and find what may be drawn."""
        ...

    def read(self, start: int, stop: int) -> Float32:
        """Return some of the logits as the last survey left them."""
        ...


Logits = Float32 | RemoteLogits


class Sampler:
    """Draws tokens as `sampling` says; holds the random generator."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def sample(self, logits: Logits, history: Sequence[int]) -> int:
        """Return the next token's id for float32 logits [vocab_size]; `history` is the tokens so far.

        From logits on a device it draws the same token, but where a random number falls on an edge between two tokens
        and a sum's last digit decides.

        Raises CorruptFileError if no logit is a finite maximum, which only damaged weights bring about.
        """
        recent = _recent(history, self.sampling)
        if isinstance(logits, np.ndarray):
            return self._sample(_penalise(logits, recent, self.sampling))
        survey = logits.survey(self.sampling, recent)
        _require_number(survey.best)
        if self.sampling.draws_from_all:
            weights_of = partial(self._weights_of, logits, survey)
            return _draw(survey.sums, self._random.random(), survey.size, weights_of)
        if survey.complete and self.sampling.temperature == 0:
            return int(survey.ids[survey.logits.argmax()])
        found = _shortlist(survey, logits.size, self.sampling) if survey.complete else None
        return self._sample(logits.read(0, logits.size)) if found is None else self._one_of(*found)

    def _sample(self, logits: Float32) -> int:
        best = int(logits.argmax())
        _require_number(logits[best])
        if self.sampling.temperature == 0:
            return best
        ids, weights = _candidates(logits, float(logits[best]), self.sampling)
        return self._one_of(ids, weights)

    def _one_of(self, ids: Int64 | None, weights: Float32) -> int:
        sums = np.add.reduceat(weights, np.arange(0, weights.size, _GROUP))
        place = _draw(sums, self._random.random(), _GROUP, partial(_part, weights))
        return int(place if ids is None else ids[place])

    def _weights_of(self, logits: RemoteLogits, survey: Survey, group: int) -> Float32:
        start = group * survey.size
        part = logits.read(start, min(start + survey.size, logits.size))
        return _weights(part, survey.best, self.sampling.temperature)


def _require_number(best: float | np.float32) -> None:
    if not np.isfinite(best):
        raise CorruptFileError("the model's output is not a number: check the file with billm-info --verify")


def _recent(history: Sequence[int], options: Sampling) -> Int64:
    """Return the tokens that the penalty is for."""
    if options.repeat_penalty == 1 or options.repeat_last_n == 0:
        return np.empty(0, np.int64)
    recent = history if options.repeat_last_n < 0 else history[-options.repeat_last_n :]
    return np.fromiter(recent, np.int64, len(recent))


def _penalise(logits: Float32, recent: Int64, options: Sampling) -> Float32:
    if not recent.size:
        return logits
    logits = logits.copy()
    values = logits[recent]  # one that comes twice is set twice to the same value
    penalty = np.float32(options.repeat_penalty)
    logits[recent] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _shortlist(survey: Survey, size: int, options: Sampling) -> tuple[Int64, Float32] | None:
    """Return what `_candidates` makes of all `size` logits, from the few that a device listed; None if it cannot."""
    if options.top_p < 1 and not 0 < options.top_k < size:
        weights = _weights(survey.logits, survey.best, options.temperature)
        wanted = options.top_p * float(survey.sums.sum(dtype=np.float64))
        kept, enough = _reaching(weights, wanted, options.min_p)
        # Short of the share, all that min_p leaves must be there; nothing else is left out where min_p bounds.
        if not enough and options.min_p < (1 - options.top_p) * wanted / options.top_p / FEW_TOKENS:
            return None
        return survey.ids[kept], weights[kept]
    places, weights = _candidates(survey.logits, survey.best, options)
    return survey.ids if places is None else survey.ids[places], weights


def _candidates(logits: Float32, best: float, options: Sampling) -> tuple[Int64 | None, Float32]:
    """Return the ids that may be drawn, in order (None: all of them), and their probabilities over that of `best`."""
    ids = None
    if 0 < options.top_k < logits.size:
        ids = _largest(logits, options.top_k)
        logits = logits[ids]
    if options.top_p < 1:
        weights = _weights(logits, best, options.temperature)
        kept = _nucleus(weights, options.top_p, options.min_p)
        return kept if ids is None else ids[kept], weights[kept]
    if options.min_p > 0:
        kept = np.flatnonzero(logits >= best + options.temperature * math.log(options.min_p))
        ids, logits = kept if ids is None else ids[kept], logits[kept]
    return ids, _weights(logits, best, options.temperature)


def _weights(logits: Float32, best: float, temperature: float) -> Float32:
    weights = np.subtract(logits, np.float32(best))
    # A temperature next to 0 takes all but the best to -infinity, as it should. Multiplying is quicker than dividing.
    with np.errstate(over="ignore"):
        np.multiply(weights, np.float32(min(1 / temperature, _LARGEST)), out=weights)
    return np.exp(weights, out=weights)


def _largest(values: Float32, count: int) -> Int64:
    """Return the places of the `count` largest values, in order; of equals, the first."""
    groups = values.size // _GROUP
    places: Int64 | None = None
    if count < groups:
        # So many groups hold a value of at least `floor`, so the values wanted are not below it.
        highest = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        floor = np.partition(highest, groups - count)[groups - count]
        places = np.flatnonzero(values >= floor)
        values = values[places]
    edge = np.partition(values, values.size - count)[values.size - count]
    kept = _down_to(values, edge, count)
    return kept if places is None else places[kept]


def _nucleus(weights: Float32, top_p: float, min_p: float) -> Int64:
    """Return the places of the fewest largest weights that reach `top_p` of the sum, without those below `min_p`."""
    wanted = top_p * float(weights.sum())  # NumPy sums in pairs: float32 is good to the last digit or two
    left_out = (1 - top_p) / top_p * wanted
    # So many weights below the bound make less than what is to be left out: the second bound is always low enough,
    # the first nearly always, with far fewer places above it.
    for count in (FEW_TOKENS, weights.size):
        bound = max(left_out / count, min_p)
        places, enough = _reaching(weights, wanted, bound)
        if enough or bound == min_p:
            break
    return places


def _reaching(weights: Float32, wanted: float, bound: float) -> tuple[Int64, bool]:
    """Return the places of the fewest largest weights, none below `bound`, that reach `wanted`, and whether they do."""
    places = np.flatnonzero(weights >= np.float32(bound))
    ranked = np.sort(weights[places])[::-1]
    reached = np.cumsum(ranked, dtype=np.float64)
    size = int(np.searchsorted(reached, wanted)) + 1
    if size < places.size:
        places = places[_down_to(weights[places], ranked[size - 1], size)]
    return places, bool(reached.size and reached[-1] >= wanted)


def _down_to(values: Float32, edge: np.float32, count: int) -> Int64:
    """Return the places of `count` values, in order: those above `edge`, and the first of those equal to it."""
    above = np.flatnonzero(values > edge)
    equal = np.flatnonzero(values == edge)
    return np.sort(np.concatenate((above, equal[: count - above.size])))


def _draw(sums: Float32, uniform: float, size: int, weights_of: Callable[[int], Float32]) -> int:
    """Return the place where `uniform` (0 to 1) of all weight lies: first the group of `size`, then the place in it."""
    groups = np.cumsum(sums, dtype=np.float64)
    group = _reached(groups, uniform)
    before = groups[group - 1] if group else 0.0
    inside = np.cumsum(weights_of(group), dtype=np.float64)
    return group * size + _reached(inside, (uniform * groups[-1] - before) / (groups[group] - before))


def _part(weights: Float32, group: int) -> Float32:
    return weights[group * _GROUP : (group + 1) * _GROUP]


def _reached(edges: NDArray[np.float64], share: float) -> int:
    """Return the first place whose edge lies beyond `share` of the last one; rounding never leads past the last."""
    end = edges[-1]
    return int(np.searchsorted(edges, min(share * end, np.nextafter(end, 0)), side="right"))
