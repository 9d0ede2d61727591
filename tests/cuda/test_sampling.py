"""Drawing from logits on a device: the tokens that the sampler draws from the same logits on the host."""

import math
from typing import Any

import numpy as np
import pytest
from cuda.emulator import EmulatedDevice
from runtime.test_sampling import LARGE, draw, plain_distribution

from billm_format.errors import CorruptFileError
from billm_rt.cuda import launch
from billm_rt.cuda.device import Device
from billm_rt.cuda.logits import CAPACITY, DeviceLogits, DeviceRow
from billm_rt.sampling import Sampler, Sampling

NOBODY = np.empty(0, np.int64)


def on_device(device: Device, logits: np.ndarray, row: int = 2) -> DeviceRow:
    """Return logits as one row among others."""
    all_rows = DeviceLogits(device, logits.size)
    all_rows.array[row] = device.upload(logits)
    return DeviceRow(all_rows, row)


def random_logits(rng: np.random.Generator, size: int, step: float = 0.0) -> np.ndarray:
    """Return normal logits, whole multiples of `step` if that is not 0."""
    logits = (2 * rng.standard_normal(size)).astype(np.float32)
    return np.round(logits / step) * np.float32(step) if step else logits


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["all different", "many equal"])
@pytest.mark.parametrize("name", LARGE)
def test_tokens_have_their_plain_share(name: str, step: float, device: Device, rng: np.random.Generator) -> None:
    """The middle of a token's share of the plain distribution, in the order of ids, draws that token."""
    logits = random_logits(rng, 5123, step)
    history = rng.integers(0, logits.size, 100).tolist()
    wanted = dict(sorted(plain_distribution(logits.tolist(), history, LARGE[name]).items()))
    there = on_device(device, logits)
    shares = np.array(list(wanted.values()))
    middles = np.cumsum(shares) - shares / 2
    places = np.flatnonzero(shares > 1e-4)
    for place in np.unique(np.concatenate(([places[0], places[-1]], rng.choice(places, 5)))).tolist():
        token = list(wanted)[place]
        assert draw(there, history, LARGE[name], middles[place]) == token  # type: ignore[arg-type]
    for uniform in (0.0, 1 - 2**-53):
        assert draw(there, history, LARGE[name], uniform) in wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [40, 320, 1023, 33_000])
def test_a_seed_draws_what_it_draws_on_the_host(size: int, device: Device, rng: np.random.Generator) -> None:
    """Text of options drawn at random; a random number next to an edge may tip over to the neighbour."""
    logits = random_logits(rng, size)
    there, history = on_device(device, logits), rng.integers(0, size, 30).tolist()
    options = Sampling(
        temperature=float(rng.choice([0.3, 1.0, 1.5])),
        top_k=int(rng.choice([0, 0, 1, 40, 2000])),
        top_p=float(rng.choice([0.5, 0.95, 1.0])),
        min_p=float(rng.choice([0.0, 0.05])),
        repeat_penalty=float(rng.choice([1.0, 1.3])),
        repeat_last_n=int(rng.choice([-1, 0, 5])),
        seed=int(rng.integers(1 << 30)),
    )
    here = [Sampler(options).sample(logits, history) for _ in range(4)]
    assert [Sampler(options).sample(there, history) for _ in range(4)] == here


def test_greedy_is_the_lowest_id_of_the_best(device: Device, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 5000, 0.5)
    equals = rng.choice(5000, 30, replace=False)
    logits[equals] = logits.max() + 1
    for history in ([], [int(equals.min())]):
        options = Sampling(temperature=0, repeat_penalty=1.1)
        wanted = Sampler(options).sample(logits, history)
        assert Sampler(options).sample(on_device(device, logits), history) == wanted
    flat = np.zeros(5000, np.float32)  # more than a list holds
    assert Sampler(Sampling(temperature=0)).sample(on_device(device, flat), []) == 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}, {"min_p": 0.001}, {"top_k": 50}], ids=str)
def test_impossible_tokens_are_never_drawn(options: Any, device: Device) -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[[700, 1400]] = 1.0
    there, sampling = on_device(device, logits), Sampling(temperature=1, **options)
    drawn = [draw(there, [], sampling, u) for u in (0, 0.49, 0.51, 1 - 2**-53)]  # type: ignore[arg-type]
    assert drawn == [700, 700, 1400, 1400]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_an_error(temperature: float, value: float, device: Device) -> None:
    logits = np.ones(300, np.float32)
    logits[77] = value
    with pytest.raises(CorruptFileError, match="not a number"):
        Sampler(Sampling(temperature=temperature)).sample(on_device(device, logits), [])


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_next_to_nothing_takes_the_best(
    temperature: float, device: Device, rng: np.random.Generator
) -> None:
    logits = random_logits(rng, 1000)
    there = on_device(device, logits)
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}):
        assert draw(there, [], Sampling(temperature=temperature, **options), 0.999) == logits.argmax()  # type: ignore[arg-type]


def test_a_survey_says_what_it_should(device: Device, rng: np.random.Generator) -> None:
    """Sums of every group, the list of just those logits; twice the same, for the penalty is applied to a copy."""
    logits = random_logits(rng, 40_007)
    there, recent = on_device(device, logits), rng.integers(0, logits.size, 300)
    penalised = logits.copy()
    penalised[recent] = np.where(logits[recent] > 0, logits[recent] / np.float32(1.7), logits[recent] * np.float32(1.7))
    weights = np.exp((penalised - penalised.max()).astype(np.float64) / 0.9)
    groups = launch.logit_groups(logits.size)
    options = Sampling(temperature=0.9, min_p=0.05, repeat_penalty=1.7)
    for _ in range(2):
        found = there.survey(options, recent)
        assert found.best == penalised.max() and found.size == groups.size
        sums = np.add.reduceat(weights, np.arange(0, logits.size, groups.size))
        assert sums.size == groups.number <= 1024
        assert np.allclose(found.sums, sums, rtol=1e-5)
        assert found.complete and set(np.flatnonzero(weights >= 0.05)) <= set(found.ids.tolist())
        assert (weights[found.ids] > 0.0499).all() and (np.diff(found.ids) > 0).all()
        assert np.array_equal(found.logits, penalised[found.ids])
    assert np.array_equal(there.read(100, 300), penalised[100:300])
    assert not there.survey(Sampling(temperature=100, min_p=0.01), NOBODY).complete
    for count in (1, 40, 900):
        found = there.survey(Sampling(temperature=1, top_k=count), NOBODY)
        assert count <= found.ids.size <= CAPACITY or not found.complete
        assert set(np.argsort(logits)[-count:]) <= set(found.ids.tolist()) or not found.complete


def test_what_cannot_be_listed_is_read_whole(emulated: EmulatedDevice, rng: np.random.Generator) -> None:
    """A flat distribution, more of the largest than there are groups: rare, and exact all the same."""
    logits = random_logits(rng, 4000)
    there = on_device(emulated, logits)
    for options in (
        Sampling(temperature=5, top_p=0.99), Sampling(temperature=1, top_k=3999), Sampling(temperature=1, top_k=9999),
        Sampling(temperature=20, min_p=0.01),
    ):  # fmt: skip
        for uniform in rng.random(3):
            assert draw(there, [], options, uniform) == draw(logits, [], options, uniform)  # type: ignore[arg-type]
