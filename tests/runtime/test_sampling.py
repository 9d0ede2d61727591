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


class Fixed:
    """A random generator that always says the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def draw(logits: np.ndarray, history: list[int], options: Sampling, uniform: float) -> int:
    sampler = Sampler(options)
    sampler._random = Fixed(uniform)  # type: ignore[assignment]
    return sampler.sample(logits, history)


LARGE = {
    "temperature": Sampling(temperature=0.7),
    "cold": Sampling(temperature=0.01),
    "hot": Sampling(temperature=100),
    "top-k, few": Sampling(temperature=1, top_k=7),
    "top-k, many": Sampling(temperature=1, top_k=700),
    "top-k, all but one": Sampling(temperature=1, top_k=5122),
    "top-p 0.01": Sampling(temperature=1, top_p=0.01),
    "top-p 0.5": Sampling(temperature=1, top_p=0.5),
    "top-p 0.9, hot": Sampling(temperature=5, top_p=0.9),
    "min-p": Sampling(temperature=1, min_p=0.03),
    "min-p 1": Sampling(temperature=1, min_p=1.0),
    "top-k, min-p": Sampling(temperature=1.3, top_k=60, min_p=0.2),
    "top-p, min-p cuts more": Sampling(temperature=1, top_p=0.99, min_p=0.1),
    "top-p cuts more, min-p": Sampling(temperature=1, top_p=0.3, min_p=0.001),
    "all": Sampling(temperature=0.8, top_k=300, top_p=0.9, min_p=0.01, repeat_penalty=1.3, repeat_last_n=-1),
}


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["all different", "many equal"])
@pytest.mark.parametrize("name", LARGE)
def test_every_token_of_a_large_vocabulary_has_its_plain_share(
    name: str, step: float, rng: np.random.Generator
) -> None:
    """The middle of every token's share of the plain distribution, in the order of ids, draws that token."""
    logits = (2 * rng.standard_normal(5123)).astype(np.float32)
    if step:
        logits = np.round(logits / step) * np.float32(step)
    history = rng.integers(0, logits.size, 100).tolist()
    wanted = dict(sorted(plain_distribution(logits.tolist(), history, LARGE[name]).items()))
    edge, drawn, tried = 0.0, [], []
    for token, share in wanted.items():
        if share > 1e-4:  # what float32 tells apart with ease
            tried.append(token)
            drawn.append(draw(logits, history, LARGE[name], edge + share / 2))
        edge += share
    assert drawn == tried
    assert edge == pytest.approx(1)
    assert {draw(logits, history, LARGE[name], uniform) for uniform in (0.0, 1 - 2**-53)} <= set(wanted)


@pytest.mark.parametrize("name", ["temperature", "top-k, few", "top-p 0.5", "all"])
def test_vocabulary_of_152_thousand(name: str, rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal(151_936)).astype(np.float32)
    wanted = dict(sorted(plain_distribution(logits.tolist(), [1, 2], LARGE[name]).items()))
    edges = np.cumsum(list(wanted.values()))
    for uniform in rng.random(20):
        token = draw(logits, [1, 2], LARGE[name], uniform)
        place = list(wanted).index(token)
        below = edges[place - 1] if place else 0.0
        assert below - 1e-5 <= uniform <= edges[place] + 1e-5


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("flat", [0.0, 1.0, 10.0])
def test_top_p_stops_where_the_share_is_reached(top_p: float, flat: float, rng: np.random.Generator) -> None:
    """The least probable token that may be drawn, wherever its id puts it: moved to the end, it is drawn last."""
    logits = np.sort(flat * rng.standard_normal(20_000).astype(np.float32))[::-1].copy()
    logits[0] += 1e-3
    weights = np.exp(logits.astype(np.float64) - float(logits[0]))
    reached = np.cumsum(weights) / weights.sum()
    last = draw(logits, [], Sampling(temperature=1, top_p=top_p), 1 - 2**-53)
    # float32 may stop a token or two to the side where tokens are worth less than its last digit.
    assert reached[last] >= top_p - 1e-6
    assert last == 0 or reached[last - 1] <= top_p + 1e-6


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_next_to_nothing_takes_the_best(temperature: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(1000).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        for options in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}):
            assert draw(logits, [], Sampling(temperature=temperature, **options), 0.999) == logits.argmax()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[[700, 1400]] = 1.0
    for options in ({}, {"top_p": 0.999}, {"min_p": 0.001}, {"top_k": 50}):
        sampling = Sampling(temperature=1, **options)
        assert [draw(logits, [], sampling, u) for u in (0, 0.49, 0.51, 1 - 2**-53)] == [700, 700, 1400, 1400]


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
