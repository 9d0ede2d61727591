"""Sampling against a plain reference that sorts everything and loops."""

import math

import numpy as np
import pytest

from billm_format.errors import CorruptFileError, UsageError
from billm_rt.sampling import Sampler, Sampling


def plain_distribution(logits: list[float], history: list[int], options: Sampling) -> dict[int, float]:
    """Return id -> probability, in the order of steps that `Sampling` states."""
    logits = list(logits)
    last = options.repeat_last_n
    recent = history if last == -1 else history[len(history) - last :] if last < len(history) else history
    for token in set(recent):
        logits[token] = (
            logits[token] / options.repeat_penalty if logits[token] > 0 else logits[token] * options.repeat_penalty
        )
    top = max(logits)
    odds = {token: math.exp((value - top) / options.temperature) for token, value in enumerate(logits)}
    ranked = sorted(odds, key=lambda token: -odds[token])
    if options.top_k:
        ranked = ranked[: options.top_k]
    total, running, kept = sum(odds[token] for token in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        running += odds[token]
        if running >= options.top_p * total:
            break
    ranked = kept if options.top_p < 1 else ranked
    ranked = [token for token in ranked if odds[token] >= options.min_p * odds[ranked[0]]]
    total = sum(odds[token] for token in ranked)
    return {token: odds[token] / total for token in ranked}


CASES = {
    "temperature": Sampling(temperature=1.7),
    "top-k": Sampling(temperature=1, top_k=5),
    "top-p": Sampling(temperature=1, top_p=0.6),
    "min-p": Sampling(temperature=1, min_p=0.2),
    "penalty": Sampling(temperature=1, repeat_penalty=1.8, repeat_last_n=3),
    "penalty-all": Sampling(temperature=1, repeat_penalty=1.8, repeat_last_n=-1),
    "penalty-none": Sampling(temperature=1, repeat_penalty=1.8, repeat_last_n=0),
    "all": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repeat_penalty=1.3),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_plain_distribution(name: str, rng: np.random.Generator) -> None:
    options = CASES[name]
    logits = (2 * rng.standard_normal(40)).astype(np.float32)
    history = rng.integers(0, 40, 10).tolist()
    wanted = plain_distribution(logits.tolist(), history, options)
    sampler = Sampler(Sampling(**{**vars(options), "seed": int(rng.integers(1 << 30))}))
    draws = 4000
    counts = np.bincount([sampler.sample(logits, history) for _ in range(draws)], minlength=40)
    assert set(np.flatnonzero(counts)) <= set(wanted)
    for token, probability in wanted.items():
        # Five standard deviations: 40 tokens and eight cases pass by chance but once in some 10,000 runs.
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) < 5 * spread + 1, token


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_over_a_large_vocabulary_keeps_the_plain_set(top_p: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(5000).astype(np.float32)  # flat: hundreds to thousands of tokens are needed
    options = Sampling(temperature=1, top_p=top_p, seed=0)
    wanted = plain_distribution(logits.tolist(), [], options)
    sampler = Sampler(options)
    drawn = {sampler.sample(logits, []) for _ in range(300)}
    assert drawn <= set(wanted)
    edges = []

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    for value in (0.0, 1 - 2**-53):  # the first and the last candidate in the sampler's own order
        sampler._random = Fixed(value)  # type: ignore[assignment]
        edges.append(sampler.sample(logits, []))
    ranked = sorted(wanted, key=lambda token: -wanted[token])
    assert edges == [ranked[0], ranked[-1]]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.array([0, 3, 1, 3], np.float32)
    assert Sampler(Sampling(temperature=0)).sample(logits, []) == 1
    assert Sampler(Sampling(temperature=0, repeat_penalty=2)).sample(logits, [1]) == 3
    assert logits.tolist() == [0, 3, 1, 3]


def test_a_seed_repeats_itself_and_none_does_not(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(500).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler.sample(logits, []) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("temperature", -0.1, "--temp"),
        ("temperature", math.nan, "--temp"),
        ("temperature", math.inf, "--temp"),
        ("top_k", -1, "--top-k"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.01, "--top-p"),
        ("min_p", 1.5, "--min-p"),
        ("repeat_penalty", 0.0, "--repeat-penalty"),
        ("repeat_last_n", -2, "--repeat-last-n"),
        ("seed", -1, "--seed"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        Sampling(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(temperature: float) -> None:
    with pytest.raises(CorruptFileError, match="not a number"):
        Sampler(Sampling(temperature=temperature)).sample(np.array([1, np.nan], np.float32), [])
