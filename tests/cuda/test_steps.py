"""Recorded steps: replayed, they give what direct ones give, wherever the context has grown or was cut back to."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.emulator import EmulatedDevice, EmulationError
from cuda.test_decoder import on_device
from random_model import make_random_billm, tiny_config

import billm_rt
from billm_format.config import Quantization
from billm_format.errors import DoesNotFitError
from billm_rt.cuda import cache as device_cache
from billm_rt.cuda.device import Device
from billm_rt.sampling import Sampling

Load = Callable[[str], billm_rt.Model]


@pytest.fixture
def load(device: Device, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """A function that loads a tiny random model of a family; caches begin with room for 8 tokens and double."""
    monkeypatch.setattr(device_cache, "FIRST_CAPACITY", 8)
    models: list[billm_rt.Model] = []

    def make(family: str) -> billm_rt.Model:
        make_random_billm(tmp_path / "m.billm", tiny_config(family), Quantization(block_size=64), seed)
        models.append(on_device(tmp_path / "m.billm", device))
        return models[-1]

    yield make
    for model in models:
        model.close()


def in_parts(model: billm_rt.Model, tokens: np.ndarray, parts: Sequence[int], cuts: dict[int, int]) -> list[Any]:
    """Read tokens in parts, cut back before some of them (number of the part -> length); return all logits."""
    cache, logits, start = model.new_cache(), [], 0
    for number, size in enumerate(parts):
        cache.truncate(cuts.get(number, len(cache)))
        logits.append(model.forward(tokens[start : start + size], cache, logits="all"))
        start += size
    return logits


def alike(first: list[Any], second: list[Any]) -> bool:
    """Return whether logits are the same to the last bit."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "family", ["mistral", "opt-350m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "opt"))]
)
def test_a_replayed_step_is_the_direct_one(
    family: str, load: Load, device: Device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, while the cache grows from 8 to 16 to 32 tokens and is cut back in between."""
    model, tokens = load(family), rng.integers(0, 320, 50)
    parts = [1] * 5 + [2, 2, 1, 2] + [1] * 4 + [9, 1, 2]
    cuts = {5: 2, 12: int(rng.integers(0, 10))}
    replays = getattr(device, "replays", 0)
    found = in_parts(model, tokens, parts, cuts)
    assert getattr(device, "replays", replays + 1) > replays
    monkeypatch.setattr(device_cache, "_RECORDED_TOKENS", 0)
    assert alike(found, in_parts(model, tokens, parts, cuts))


def test_growth_that_is_interrupted_leaves_no_step_that_reads_what_is_gone(
    load: Load, device: Device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two layers; the context is cut back and goes on with steps that were recorded before."""
    model, tokens = load("llama"), rng.integers(0, 320, 20)
    cache = model.new_cache()
    for token in tokens[:8]:
        model.forward([token], cache)
    cache.truncate(4)
    wanted = [model.forward([token], cache) for token in tokens[4:8]]
    zeros, asked = device.zeros, []

    def interrupted(shape: Any, dtype: Any) -> Any:
        asked.append(shape)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return zeros(shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(device, "zeros", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(tokens[8:9], cache)
    cache.truncate(4)
    assert alike([model.forward([token], cache) for token in tokens[4:8]], wanted)


def test_caches_have_steps_of_their_own(load: Load, rng: np.random.Generator) -> None:
    """Two texts in turn, token by token."""
    model = load("llama")
    texts = rng.integers(0, 320, (2, 12))
    wanted = [in_parts(model, text, [1] * 12, {}) for text in texts]
    caches = [model.new_cache() for _ in texts]
    for place in range(12):
        for text, cache, logits in zip(texts, caches, wanted, strict=True):
            assert np.array_equal(model.forward(text[place : place + 1], cache), logits[place])


@pytest.mark.parametrize(
    ("options", "lookup"),
    [({"temperature": 0}, 3), ({"temperature": 1}, 0), ({"top_p": 0.9, "repeat_penalty": 1.2}, 3)],
)
def test_text_is_that_of_logits_on_the_host(
    options: Any, lookup: int, load: Load, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded steps and recorded draws beside direct steps and a sampler that has all logits before it."""
    model = load("llama")
    prompt, sampling = rng.integers(3, 256, 5).tolist() * 3, Sampling(seed=int(rng.integers(1 << 30)), **options)

    def text() -> list[int | None]:
        return [chunk.token_id for chunk in model.generate(prompt, max_tokens=14, sampling=sampling, lookup=lookup)]

    found = text()
    monkeypatch.setattr(device_cache, "_RECORDED_TOKENS", 0)
    monkeypatch.setattr(model.backend, "rows", lambda head: list(model.backend.logits(head)))
    assert found == text()


@pytest.mark.parametrize("family", ["mistral", "opt-350m"])
def test_a_batch_gives_each_text_what_it_has_alone(
    family: str, load: Load, device: Device, rng: np.random.Generator
) -> None:
    """Recorded together over steps in which the caches grow at different times, beside texts read in turn."""
    model, lengths = load(family), [1, 7, 4]
    texts = [rng.integers(0, 320, length + 12) for length in lengths]
    wanted = [model.logits(text) for text in texts]
    caches = [model.new_cache() for _ in texts]
    for text, length, cache in zip(texts, lengths, caches, strict=True):
        model.forward(text[:length], cache)
    batch, replays = model.gather(caches), getattr(device, "replays", 0)
    for step in range(12):
        tokens = [text[length + step] for text, length in zip(texts, lengths, strict=True)]
        found = model.forward_each(tokens, batch)
        for logits, right, length in zip(found, wanted, lengths, strict=True):
            np.testing.assert_allclose(logits, right[length + step], rtol=2e-3, atol=2e-3 * np.abs(right).max())
    assert getattr(device, "replays", replays + 1) > replays
    assert [cache.tokens for cache in caches] == [text.tolist() for text in texts]


def test_texts_of_a_batch_are_those_of_each_alone(load: Load, seed: int) -> None:
    """Drawn from logits that stay on the device, the batch shrinking as texts end."""
    model = load("llama")
    prompts, sampling = [[5, 6, 7], [9], [3] * 11], Sampling(temperature=0.7, seed=seed)
    found: list[list[int | None]] = [[], [], []]
    for number, chunk in model.generate_batch(prompts, max_tokens=9, sampling=sampling, stop=["e"]):
        found[number].append(chunk.token_id)
    for number, prompt in enumerate(prompts):
        own = Sampling(temperature=0.7, seed=seed + number)
        alone = [chunk.token_id for chunk in model.generate(prompt, max_tokens=9, sampling=own, stop=["e"])]
        if found[number] != alone:  # then a sum in another order decided between two tokens
            place = next(i for i, pair in enumerate(zip(found[number], alone, strict=False)) if pair[0] != pair[1])
            assert place > 0


def test_caches_that_do_not_fit_are_refused_with_the_sum(
    load: Load, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    monkeypatch.setattr(device, "free_bytes", lambda: 20_000)
    with pytest.raises(DoesNotFitError, match=r"3 texts at once need room for 120 more tokens .* 256 bytes each 0 MB"):
        model.generate_batch([[1, 2]] * 3, max_tokens=38)


def test_an_interrupt_while_a_step_is_recorded_loses_nothing(
    load: Load, device: Device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = load("llama"), rng.integers(0, 320, 6)
    wanted, cache = in_parts(model, tokens, [1] * 6, {}), model.new_cache()
    model.forward(tokens[:1], cache)

    def interrupted(work: Any) -> Any:
        work()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(tokens[1:2], cache)
    assert cache.tokens == tokens[:1].tolist()
    assert alike([model.forward([token], cache) for token in tokens[1:]], wanted[1:])


def test_the_emulation_records_launches_alone(emulated: EmulatedDevice) -> None:
    """As a capture does: nothing is computed, and nobody may wait."""
    here, there, back = (emulated.pinned((3,), np.float32) for _ in range(3))

    def work() -> None:
        emulated.copy_in(there, here)
        emulated.copy_out(back, there)

    here[:] = 1
    recording = emulated.record(work)
    here[:] = 2
    assert (back == 1).all()
    recording.replay()
    assert (back == 2).all()
    for waiting in (emulated.wait, lambda: emulated.download(there), lambda: emulated.zeros((1,), np.int32)):
        with pytest.raises(EmulationError, match="cannot be recorded"):
            emulated.record(Once(waiting))
        emulated.wait()


class Once:
    """Work that does something only the second time."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.before = work, 0

    def __call__(self) -> None:
        self.before += 1
        if self.before == 2:
            self.work()
