"""Streams: stop strings, half characters, prompt reuse, and why a stream ends."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import FAMILIES, make_random_billm, tiny_config

import billm_rt
from billm_format.config import Quantization
from billm_format.errors import DoesNotFitError, UsageError
from billm_rt import Chunk, Sampling, cpu
from billm_rt.cache import KVCache
from billm_rt.generate import HeldBack
from billm_rt.lookup import PromptLookup

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(tmp_path: Path, seed: int) -> Any:
    """A tiny random model on the exact path, 128 tokens of context."""
    make_random_billm(tmp_path / "m.billm", tiny_config(), Quantization(block_size=64), seed)
    with billm_rt.load(tmp_path / "m.billm", exact=True) as loaded:
        yield loaded


class Scripted:
    """Stands in for a model: says the given tokens, whatever it reads, and records what it was made to read."""

    def __init__(self, model: billm_rt.Model, script: Sequence[int]) -> None:
        self.config, self.tokenizer, self.new_cache = model.config, model.tokenizer, model.new_cache
        self.script = list(script)
        self.read: list[list[int]] = []

    def rows(self, ids: Sequence[int], cache: KVCache, *, logits: str = "last") -> np.ndarray:
        assert logits == "last" or len(ids) == 1
        self.read.append(list(ids))
        cache.require(len(ids))
        cache.commit(ids)
        row = np.zeros((1, self.config.vocab_size), np.float32)
        row[0, self.script.pop(0)] = 10
        return row


def run(model: Any, prompt: str | Sequence[int] = "hi", **options: Any) -> list[Chunk]:
    from billm_rt.generate import generate

    chunks = list(generate(model, prompt, sampling=options.pop("sampling", GREEDY), **options))
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    assert chunks[-1].stats is not None
    return chunks


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_end_of_text_ends_the_answer_and_is_not_shown(model: Any) -> None:
    said = "Grüße, 你好 🙂🙃!"
    ids = model.tokenizer.encode(said, add_bos=False)
    chunks = run(Scripted(model, [*ids, 257, 0]), max_tokens=500)
    assert text_of(chunks) == said
    assert [chunk.token_id for chunk in chunks] == [*ids, 257]
    assert chunks[-1].finish_reason == "eos"
    assert chunks[-1].stats.generated_tokens == len(ids) + 1
    assert not any("\ufffd" in chunk.text for chunk in chunks)


def test_answer_cut_inside_a_character_shows_the_replacement_character(model: Any) -> None:
    ids = model.tokenizer.encode("a🙂", add_bos=False)
    chunks = run(Scripted(model, ids), max_tokens=len(ids) - 1)
    assert text_of(chunks) == "a\ufffd"
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("stop", [["STOP"], ["zzz", "OP he"], ["ST", "STOP"], ["here", "S"], ["🙃"], [" and"]])
def test_stop_strings_across_tokens(model: Any, stop: list[str]) -> None:
    said = "Go on SSTOSTand 🙂 and 🙃 then STOP here"
    wanted = said[: min(said.find(s) for s in stop if s in said)]
    chunks = run(Scripted(model, model.tokenizer.encode(said, add_bos=False)), stop=stop, max_tokens=500)
    assert text_of(chunks) == wanted
    assert chunks[-1].finish_reason == "stop"


def test_text_that_only_begins_like_a_stop_string_is_shown_in_the_end(model: Any) -> None:
    ids = model.tokenizer.encode("it is USER", add_bos=False)
    for script, reason in [([*ids, 257], "eos"), (ids, "length")]:
        chunks = run(Scripted(model, script), stop=["USER:"], max_tokens=len(script))
        assert text_of(chunks) == "it is USER"
        assert chunks[-1].finish_reason == reason


def test_held_back_text_never_loses_or_leaks(rng: np.random.Generator) -> None:
    """Random texts over two letters, cut at random places, against a search in the whole text."""
    for _ in range(300):
        text = "".join(rng.choice(["a", "b"], 25))
        stops = ["".join(rng.choice(["a", "b"], rng.integers(1, 7))) for _ in range(rng.integers(1, 4))]
        held, shown, stopped, place = HeldBack(stops), "", False, 0
        while place < len(text) and not stopped:
            step = int(rng.integers(1, 5))
            piece, stopped = held.add(text[place : place + step])
            shown, place = shown + piece, place + step
        shown += "" if stopped else held.flush()
        seen = text[:place]  # what had come when the stream stopped
        first = min((seen.find(stop) for stop in stops if stop in seen), default=-1)
        assert stopped == (first >= 0), (text, stops)
        assert shown == (seen[:first] if stopped else text), (text, stops)


def test_context_ends_the_answer(model: Any) -> None:
    chunks = run(model, list(range(120)), max_tokens=500, sampling=Sampling(temperature=1, seed=1))
    while chunks[-1].finish_reason == "eos":  # a random model may say so at any time
        chunks = run(model, list(range(120)), max_tokens=500, sampling=Sampling(temperature=1))
    assert chunks[-1].finish_reason == "context"
    assert len(chunks) == 128 - 120 + 1
    full = run(model, list(range(128)), max_tokens=500)
    assert len(full) == 1
    assert full[-1].finish_reason in ("context", "eos")


def test_stream_equals_a_plain_loop_over_logits(model: Any) -> None:
    ids = model.tokenizer.encode("once upon")
    assert ids[0] == model.tokenizer.bos_token_id == 256
    wanted = list(ids)
    for _ in range(12):
        wanted.append(int(model.logits(wanted)[-1].argmax()))
    found = [chunk.token_id for chunk in run(model, "once upon", max_tokens=12)]
    assert found == wanted[len(ids) :][: len(found)]
    assert len(found) == 12 or found[-1] in model.tokenizer.eos_token_ids


def test_same_seed_same_answer(model: Any, seed: int) -> None:
    def answer(seed: int) -> list[int | None]:
        sampling = Sampling(temperature=100, top_p=0.99, repeat_penalty=1.1, seed=seed)
        return [chunk.token_id for chunk in run(model, "abc", max_tokens=8, sampling=sampling)]

    assert answer(seed) == answer(seed)
    assert len({tuple(answer(seed + i)) for i in range(5)}) > 1


def test_repetition_penalty_sees_prompt_and_answer(model: Any) -> None:
    plain = [chunk.token_id for chunk in run(model, "abc", max_tokens=15)]
    strong = Sampling(temperature=0, repeat_penalty=100, repeat_last_n=-1)
    ids = model.tokenizer.encode("abc")
    chunks = run(model, "abc", max_tokens=15, sampling=strong)
    said = [chunk.token_id for chunk in chunks]
    assert len(set(said)) == len(said)
    assert not set(said) & set(ids)
    assert said != plain or len(set(plain)) == len(plain)


def test_a_cache_is_reused_as_far_as_it_agrees(model: Any) -> None:
    script = model.tokenizer.encode("fine thanks", add_bos=False)
    first = model.tokenizer.encode("how are you")
    cache = model.new_cache()
    fake = Scripted(model, [*script, 257])
    run(fake, first, cache=cache)
    # The end-of-text token was said but never read: nothing comes after it.
    assert cache.tokens == first + script
    second = [*first, *script, 257, 40, 41, 42]
    fake = Scripted(model, [257])
    stats = run(fake, second, cache=cache)[-1].stats
    assert fake.read == [[257, 40, 41, 42]]
    assert (stats.prompt_tokens, stats.reused_tokens) == (len(second), len(first) + len(script))
    edited = [*first[:3], 77]
    fake = Scripted(model, [257])
    run(fake, edited, cache=cache)
    assert fake.read == [[77]]
    assert cache.tokens == edited
    fake = Scripted(model, [257])  # the very same prompt: its last token is read again, for the logits
    assert run(fake, edited, cache=cache)[-1].stats.reused_tokens == 3
    assert fake.read == [[77]]


def test_a_reused_cache_gives_the_answer_of_a_fresh_one(model: Any, rng: np.random.Generator) -> None:
    cache = model.new_cache()
    history: list[int] = [256]
    for _ in range(4):
        history += rng.integers(0, 256, 6).tolist()
        fresh = [chunk.token_id for chunk in run(model, history, max_tokens=8)]
        again = [chunk.token_id for chunk in run(model, history, max_tokens=8, cache=cache)]
        assert again == fresh
        history = history[: -int(rng.integers(1, 3))] + [token for token in again if token != 257]


def test_a_dropped_stream_leaves_a_usable_cache(model: Any) -> None:
    cache = model.new_cache()
    stream = model.generate("count with me", max_tokens=50, sampling=GREEDY, cache=cache)
    seen = [next(stream).token_id for _ in range(3)]
    stream.close()
    ids = model.tokenizer.encode("count with me")
    assert cache.tokens == ids + seen[:2]  # the third was shown, not read yet
    fresh = [chunk.token_id for chunk in run(model, "count with me", max_tokens=6)]
    assert [chunk.token_id for chunk in run(model, "count with me", max_tokens=6, cache=cache)] == fresh


def test_no_tokens_wanted_only_reads_the_prompt(model: Any) -> None:
    cache = model.new_cache()
    (chunk,) = run(model, [1, 2, 3], max_tokens=0, cache=cache)
    assert (chunk.text, chunk.token_id, chunk.finish_reason) == ("", None, "length")
    assert cache.tokens == [1, 2, 3]


def test_bad_arguments_are_refused_before_the_stream_starts(model: Any) -> None:
    for options, message in [
        ({"prompt": []}, "empty"),
        ({"prompt": "a", "max_tokens": -1}, "--max-tokens -1"),
        ({"prompt": "a", "stop": ["x", ""]}, "empty stop string"),
    ]:
        with pytest.raises(UsageError, match=message):
            model.generate(**options)


# --- lookup: tokens read ahead on a guess


def plain_proposal(text: list[int], limit: int) -> list[int]:
    """What `PromptLookup` states, by searching the text from the end."""
    for length in (3, 2, 1):
        tail = text[-length:]
        for place in range(len(text) - 1, length - 1, -1):
            if len(text) >= length and text[place - length : place] == tail:
                while len(text) < place + limit:
                    text = text + text[place:]
                return text[place : place + limit]
    return []


def test_proposals_follow_the_latest_longest_match(rng: np.random.Generator) -> None:
    for letters in (2, 4, 30):
        text = rng.integers(0, letters, int(rng.integers(1, 6))).tolist()
        lookup = PromptLookup()
        for _ in range(60):
            limit = int(rng.integers(0, 9))
            assert lookup.propose(text, limit) == plain_proposal(text, limit), text
            text = text + rng.integers(0, letters, int(rng.integers(0, 4))).tolist()


class Parrot(Scripted):
    """Continues one given text, wherever it is made to read, and records what it was made to read."""

    def rows(self, ids: Sequence[int], cache: KVCache, *, logits: str = "last") -> np.ndarray:
        self.read.append(list(ids))
        cache.require(len(ids))
        first = len(cache)
        cache.commit(ids)
        rows = np.zeros((len(ids), self.config.vocab_size), np.float32)
        for row, place in enumerate(range(first + 1, first + 1 + len(ids))):
            rows[row, self.script[min(place, len(self.script) - 1)]] = 10
        return rows if logits == "all" else rows[-1:]


@pytest.mark.parametrize(
    ("answer", "read", "accepted"),
    [
        ([3, 4, 5, 6, 40, 41, 257], [[3, 4, 5, 6], [40], [41]], 3),  # nothing is known of what follows 40
        ([3, 4, 50, 51, 257], [[3, 4, 5, 6], [50], [51]], 1),
        ([3, 50, 3, 4, 5, 6, 7, 257], [[3, 4, 5, 6], [50], [3, 50, 3, 50], [4, 5, 6, 7]], 3),
    ],
)
def test_what_is_guessed_right_is_not_read_again(
    answer: list[int], read: list[list[int]], accepted: int, model: Any
) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    parrot = Parrot(model, [*prompt, *answer])
    chunks = run(parrot, prompt, lookup=3)
    assert [chunk.token_id for chunk in chunks] == answer
    assert parrot.read == [prompt, *read]
    stats = chunks[-1].stats
    assert (stats.proposed_tokens, stats.accepted_tokens) == (sum(len(ids) - 1 for ids in read), accepted)


@pytest.mark.parametrize("lookup", [1, 4, 50])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 500])
def test_lookup_reads_no_further_than_it_may(model: Any, lookup: int, max_tokens: int) -> None:
    """Neither beyond the context nor beyond the last token wanted, however well it guesses."""
    prompt = [5, 6, 7] * 30
    parrot = Parrot(model, [5, 6, 7] * 100)
    cache = model.new_cache()
    chunks = run(parrot, prompt, cache=cache, lookup=lookup, max_tokens=max_tokens)
    room = model.ctx - len(prompt) + 1
    assert len(chunks) == min(max_tokens, room)
    assert [chunk.token_id for chunk in chunks] == ([5, 6, 7] * 100)[: len(chunks)]
    assert chunks[-1].finish_reason == ("length" if max_tokens < room else "context")
    assert sum(map(len, parrot.read)) == len(cache) == len(prompt) + len(chunks) - 1
    stats = chunks[-1].stats
    assert stats.accepted_tokens == stats.proposed_tokens
    assert len(parrot.read) == len(chunks) - stats.accepted_tokens
    if max_tokens == 500:
        assert len(parrot.read) == 1 + -(-(room - 1) // (1 + lookup))


LOOKUP_SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(temperature=1, top_p=0.95, seed=5),
    "hot": Sampling(temperature=20, min_p=0.02, repeat_penalty=1.05, seed=6),
}


class OneByOne:
    """A model that reads its tokens one at a time, so that no logit depends on what is read together, not by a bit."""

    def __init__(self, model: billm_rt.Model) -> None:
        self.config, self.tokenizer, self.new_cache = model.config, model.tokenizer, model.new_cache
        self.model = model

    def rows(self, ids: Sequence[int], cache: KVCache, *, logits: str = "last") -> np.ndarray:
        rows = [self.model.forward([token], cache) for token in ids]
        return np.concatenate(rows if logits == "all" else rows[-1:])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "kernels"])
@pytest.mark.parametrize("name", LOOKUP_SAMPLINGS)
@pytest.mark.parametrize("family", ["llama-bias", "mistral", "opt"])
def test_lookup_changes_no_token(
    family: str, name: str, exact: bool, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    make_random_billm(tmp_path / "m.billm", tiny_config(family), Quantization(block_size=64), seed)
    options: dict[str, Any] = {"sampling": LOOKUP_SAMPLINGS[name], "max_tokens": 40}
    accepted = proposed = 0
    with billm_rt.load(tmp_path / "m.billm", exact=exact) as loaded:
        model, cache = OneByOne(loaded), loaded.new_cache()
        for lookup in (1, 6) * 5:  # until a random text repeated itself, so that something was proposed
            if proposed and lookup == 1:
                break
            prompt = rng.integers(0, 256, 8).tolist() * 4
            plain = run(model, prompt, **options)
            ahead = run(model, prompt, lookup=lookup, cache=cache, **options)
            assert [(c.token_id, c.text, c.finish_reason) for c in ahead] == [
                (c.token_id, c.text, c.finish_reason) for c in plain
            ]
            assert plain[-1].stats.proposed_tokens == 0
            proposed += ahead[-1].stats.proposed_tokens
            accepted += ahead[-1].stats.accepted_tokens
    assert 0 <= accepted <= proposed > 0
    if (family, name) == ("opt", "greedy"):  # with a tied head, random weights say the last token over and over
        assert accepted > 0


@pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")
@pytest.mark.parametrize("name", LOOKUP_SAMPLINGS)
@pytest.mark.parametrize("embedding_bits", [4, 8, 16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lookup_is_exact_with_the_native_kernels(
    family: str, embedding_bits: int, name: str, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    """Many tokens read together have the logits of each read alone, bit for bit: nothing may part, ever."""
    quantization = Quantization(block_size=64, embedding_bits=embedding_bits)
    make_random_billm(tmp_path / "m.billm", tiny_config(family), quantization, seed)
    with billm_rt.load(tmp_path / "m.billm") as model:
        prompt = rng.integers(0, 256, 8).tolist() * 4
        options: dict[str, Any] = {"sampling": LOOKUP_SAMPLINGS[name], "max_tokens": 60}
        plain = run(model, prompt, **options)
        for lookup in (1, 5, 64):
            ahead = run(model, prompt, lookup=lookup, **options)
            assert [(c.token_id, c.text, c.finish_reason) for c in ahead] == [
                (c.token_id, c.text, c.finish_reason) for c in plain
            ]
            if name == "greedy" and len(plain) == 60:  # it repeats itself long before that, and is guessed
                assert ahead[-1].stats.proposed_tokens > 0


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "opt"])
def test_lookup_in_numpy_differs_by_no_more_than_rounding(
    family: str, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    """BLAS sums many tokens in another order than one: the answer may part only where two tokens tie."""
    make_random_billm(tmp_path / "m.billm", tiny_config(family), Quantization(block_size=64), seed)
    with billm_rt.load(tmp_path / "m.billm", exact=True) as model:
        prompt = rng.integers(0, 256, 8).tolist() * 4
        plain, ahead = (
            [chunk.token_id for chunk in run(model, prompt, max_tokens=60, lookup=lookup)] for lookup in (0, 5)
        )
        parted = next((i for i, (a, b) in enumerate(zip(plain, ahead, strict=False)) if a != b), None)
        if parted is None:
            assert ahead == plain
        else:
            row = model.logits([*prompt, *plain[:parted]])[-1]
            assert abs(row[plain[parted]] - row[ahead[parted]]) < 1e-4 * row.std()


def test_a_stream_with_lookup_dropped_anywhere_leaves_a_usable_cache(model: Any, rng: np.random.Generator) -> None:
    prompt = rng.integers(0, 256, 8).tolist() * 3
    fresh = [chunk.token_id for chunk in run(model, prompt, max_tokens=12)]
    cache = model.new_cache()
    for shown in range(1, 8):
        stream = model.generate(prompt, max_tokens=50, sampling=GREEDY, cache=cache, lookup=4)
        seen = [next(stream).token_id for _ in range(min(shown, len(fresh) - 1))]
        stream.close()
        assert cache.tokens[: len(prompt) + len(seen) - 1] == prompt + seen[:-1]
        assert [chunk.token_id for chunk in run(model, prompt, max_tokens=12, cache=cache)] == fresh


def test_negative_lookup_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="--lookup -1"):
        model.generate("a", lookup=-1)


# --- several texts at once -------------------------------------------------------------------------------------------


def batch_of(model: billm_rt.Model, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[list[Chunk]]:
    """Return each prompt's chunks."""
    found: list[list[Chunk]] = [[] for _ in prompts]
    for number, chunk in model.generate_batch(prompts, **options):
        assert not found[number] or found[number][-1].finish_reason is None
        found[number].append(chunk)
    return found


def said(chunks: list[Chunk]) -> tuple[Any, ...]:
    """Return what does not depend on the clock."""
    stats = chunks[-1].stats
    assert stats is not None
    return [(chunk.text, chunk.token_id, chunk.finish_reason) for chunk in chunks], stats.generated_tokens


@pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("seeded", [False, True])
def test_a_batch_says_what_each_prompt_gets_alone(
    family: str, seeded: bool, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    """Prompts of different lengths, one of which fills its context first; with the native kernels to the last token."""
    config = tiny_config(family, max_position_embeddings=40)
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=64), seed)
    sampling = Sampling(temperature=1.5, seed=seed) if seeded else GREEDY
    prompts = [rng.integers(3, 256, length).tolist() for length in (3, 36, 1, 12)]
    with billm_rt.load(tmp_path / "m.billm") as model:
        found = batch_of(model, prompts, max_tokens=20, sampling=sampling, stop=["x"])
        for number, prompt in enumerate(prompts):
            own = replace(sampling, seed=seed + number) if seeded else sampling
            alone = list(model.generate(prompt, max_tokens=20, sampling=own, stop=["x"]))
            assert said(found[number]) == said(alone)
        assert found[1][-1].finish_reason in ("context", "eos", "stop")


def test_a_batch_in_numpy_reads_every_text_into_its_own_cache(model: Any, rng: np.random.Generator) -> None:
    texts = [rng.integers(0, 320, length) for length in (5, 1, 9)]
    caches = [model.new_cache() for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        if len(text) > 1:
            model.forward(text[:-1], cache)
    rows = model.rows_each([text[-1] for text in texts], model.gather(caches))
    for row, text, cache in zip(rows, texts, caches, strict=True):
        np.testing.assert_allclose(row, model.logits(text)[-1], rtol=1e-4, atol=1e-4)
        assert cache.tokens == text.tolist()


def test_a_batch_of_one_and_of_none(model: Any) -> None:
    assert batch_of(model, []) == []
    (alone,) = batch_of(model, ["hi"], max_tokens=3, sampling=GREEDY)
    assert said(alone) == said(list(model.generate("hi", max_tokens=3, sampling=GREEDY)))
    (nothing,) = batch_of(model, ["hi"], max_tokens=0)
    assert [chunk.finish_reason for chunk in nothing] == ["length"]


def test_a_batch_with_a_bad_prompt_is_refused_before_anything_is_read(model: Any) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        model.generate_batch(["hi", []])
    with pytest.raises(DoesNotFitError, match="the prompt has 300 tokens"):
        model.generate_batch(["hi", [3] * 300])


def test_a_batch_wants_caches_that_differ_and_a_token_for_each(model: Any) -> None:
    cache = model.new_cache()
    for caches in ([], [cache], [cache, cache]):
        with pytest.raises(ValueError, match="two or more, all different"):
            model.gather(caches)
    with pytest.raises(UsageError, match="wanted one for each of 2 texts, found 1"):
        model.rows_each([1], model.gather([cache, model.new_cache()]))
