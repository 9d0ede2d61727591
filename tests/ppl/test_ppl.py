"""The protocol, against a loop over single tokens in float64."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ppl.fakes import FakeModel

from billm_format.errors import CorruptFileError, UsageError
from billm_rt import ppl


def reference(model: FakeModel, windows: list[list[int]], scored: list[range]) -> list[float]:
    """-log p of every scored token, from float64 softmax over the logits of its own context."""
    nlls = []
    for window, positions in zip(windows, scored, strict=True):
        for position in positions:
            logits = [float(x) for x in model.context_logits(window[:position])]
            nlls.append(math.log(sum(math.exp(x) for x in logits)) - logits[window[position]])
    return nlls


def softmax(logits: NDArray[np.float32]) -> list[float]:
    weights = [math.exp(float(x)) for x in logits]
    return [weight / sum(weights) for weight in weights]


def standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def check(result: ppl.Result, nlls: list[float], windows: int) -> None:
    mean = sum(nlls) / len(nlls)
    size = len(nlls) // windows
    by_window = [sum(nlls[i * size : (i + 1) * size]) / size for i in range(windows)]
    assert result.tokens == len(nlls)
    assert result.windows == windows
    assert result.nll == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.stderr == pytest.approx(math.exp(mean) * standard_error(by_window), rel=1e-4)
    assert result.stderr_tokens == pytest.approx(math.exp(mean) * standard_error(nlls), rel=1e-6)


@pytest.mark.parametrize("limit", [None, 2])
def test_paper_protocol_scores_all_but_the_first_token_of_each_window(
    rng: np.random.Generator, limit: int | None
) -> None:
    vocab, seqlen = 50, 33
    ids = rng.integers(0, vocab, 5 * seqlen - 1)  # four whole windows; the tail is dropped
    model = FakeModel(rng, vocab)
    parts = ppl.cut(ids, seqlen, limit, "paper", bos=7)
    result = ppl.measure(parts, ppl.model_scorer(model)[0], "paper")
    count = limit or 4
    plain = [ids[i * seqlen : (i + 1) * seqlen].tolist() for i in range(count)]
    check(result, reference(model, plain, [range(1, seqlen)] * count), count)


@pytest.mark.parametrize(("seqlen", "first"), [(32, 17), (33, 17)])
def test_llamacpp_protocol_puts_bos_first_and_scores_the_second_half(
    rng: np.random.Generator, seqlen: int, first: int
) -> None:
    vocab = 40
    ids = rng.integers(0, vocab, 3 * seqlen)
    model = FakeModel(rng, vocab)
    parts = ppl.cut(ids, seqlen, None, "llamacpp", bos=7)
    result = ppl.measure(parts, ppl.model_scorer(model)[0], "llamacpp")
    plain = [[7, *ids[i * seqlen + 1 : (i + 1) * seqlen].tolist()] for i in range(3)]
    check(result, reference(model, plain, [range(first, seqlen)] * 3), 3)


def test_llamacpp_protocol_leaves_windows_alone_when_the_tokenizer_adds_no_bos(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 40, 64)
    parts = ppl.cut(ids, 32, None, "llamacpp", bos=None)
    assert np.array_equal(np.concatenate(parts), ids)


def test_logits_are_taken_in_chunks_and_the_chunks_do_not_show(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, seqlen = 30, 100
    parts = ppl.cut(rng.integers(0, vocab, 2 * seqlen), seqlen, None, "paper")
    model = FakeModel(rng, vocab)
    whole = ppl.measure(parts, ppl.model_scorer(model)[0], "paper")
    assert model.largest_chunk == seqlen - 1
    model.largest_chunk = 0
    monkeypatch.setattr(ppl, "_CHUNK_BYTES", 4 * vocab * 16)
    chunked = ppl.measure(parts, ppl.model_scorer(model)[0], "paper")
    assert model.largest_chunk == 16
    assert chunked.nll == whole.nll


@pytest.mark.parametrize("vocab", [1, 1000, 49_152, 151_936, 10_000_000])
def test_chunks_hold_at_most_32_mib_of_logits_but_never_nothing(vocab: int) -> None:
    rows = ppl.chunk_rows(vocab)
    assert rows >= 16
    assert rows == 16 or rows * vocab * 4 <= 32 << 20


def test_token_nll_of_large_logits_is_exact(rng: np.random.Generator) -> None:
    """No overflow for logits in the thousands; masked entries (-inf) weigh nothing."""
    n, vocab = 13, 500
    logits = (rng.normal(0, 1, (n, vocab)) * 3000).astype(np.float32)
    logits[:, 3] = -np.inf
    targets = rng.integers(4, vocab, n)
    got = ppl.token_nll(logits, targets)
    for row, target, nll in zip(logits.astype(np.float64), targets, got, strict=True):
        top = row.max()
        expected = math.log(sum(math.exp(x - top) for x in row)) + top - row[target]
        assert nll == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_token(rng: np.random.Generator, bad: float) -> None:
    parts = ppl.cut(rng.integers(0, 20, 90), 30, None, "paper")
    model = FakeModel(rng, 20)
    good = ppl.model_scorer(model)[0]

    def scorer(window: NDArray[np.int64], first: int) -> Iterator[NDArray[np.float32]]:
        for logits in good(window, first):
            if window is parts[1]:
                logits[10, 5] = bad
            yield logits

    with pytest.raises(CorruptFileError, match="token 11 of window 1 "):
        ppl.measure(parts, scorer, "paper")


def test_a_perplexity_beyond_float64_is_infinite_not_an_exception() -> None:
    parts = ppl.cut(np.zeros(8, np.int64), 8, None, "paper")
    logits = np.zeros((7, 3), np.float32)
    logits[:, 1] = 5000.0
    result = ppl.measure(parts, lambda *_: iter([logits]), "paper")
    assert result.perplexity == math.inf
    assert result.nll == pytest.approx(5000)
    assert math.isnan(result.stderr)  # one window tells nothing about others


def test_a_scorer_that_yields_too_few_logits_is_noticed() -> None:
    parts = ppl.cut(np.zeros(8, np.int64), 8, None, "paper")
    with pytest.raises(ValueError, match="7 tokens to score, logits for 6"):
        ppl.measure(parts, lambda *_: iter([np.zeros((6, 3), np.float32)]), "paper")


def test_progress_sees_every_window_and_the_running_perplexity(rng: np.random.Generator) -> None:
    seen: list[tuple[int, float]] = []
    parts = ppl.cut(rng.integers(0, 20, 90), 30, None, "paper")
    model = FakeModel(rng, 20)

    def progress(tally: Any) -> None:
        seen.append((len(tally.nlls), tally.running))

    result = ppl.measure(parts, ppl.model_scorer(model)[0], "paper", progress)
    assert [count for count, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == pytest.approx(result.perplexity)
    first = ppl.measure(parts[:1], ppl.model_scorer(model)[0], "paper")
    assert seen[0][1] == pytest.approx(first.perplexity)


def test_divergence_equals_a_loop_over_probabilities(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_model, other_model = FakeModel(rng, 20), FakeModel(rng, 20)
    parts = ppl.cut(rng.integers(0, 20, 90), 30, None, "paper")
    divergence = ppl.Divergence()
    monkeypatch.setattr(ppl, "_CHUNK_BYTES", 4 * 20 * 16)  # two chunks a window
    scorer = ppl.paired(ppl.model_scorer(reference_model)[0], ppl.model_scorer(other_model)[0], divergence)
    result = ppl.measure(parts, scorer, "paper")
    assert result.nll == ppl.measure(parts, ppl.model_scorer(reference_model)[0], "paper").nll
    expected, same = [], 0
    for part in parts:
        for position in range(1, 30):
            p, q = (softmax(m.context_logits(part[:position].tolist())) for m in (reference_model, other_model))
            expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same += p.index(max(p)) == q.index(max(q))
    mean, stderr = divergence.mean()
    assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert stderr == pytest.approx(standard_error([sum(expected[i : i + 29]) / 29 for i in (0, 29, 58)]), rel=1e-4)
    assert divergence.tokens == len(expected)
    assert divergence.top1 == same / len(expected)
    assert max(model.largest_chunk for model in (reference_model, other_model)) == 16


def test_divergence_of_a_model_from_itself_is_nothing(rng: np.random.Generator) -> None:
    logits = (rng.normal(0, 50, (9, 300))).astype(np.float32)
    divergence = ppl.Divergence()
    divergence.begin_window()
    divergence.add(logits, logits + np.float32(3))  # a constant does not change a distribution
    assert abs(divergence.mean()[0]) < 1e-5
    assert math.isnan(divergence.mean()[1])  # one window tells nothing about others
    assert divergence.top1 == 1


def test_a_token_that_the_reference_rules_out_does_not_count(rng: np.random.Generator) -> None:
    reference, other = rng.normal(0, 3, (2, 5, 40)).astype(np.float32)
    masked = reference.copy()
    masked[:, 7] = -np.inf
    divergence = ppl.Divergence()
    divergence.begin_window()
    divergence.add(masked, other)
    expected = []
    for row, other_row in zip(reference, other, strict=True):
        p, q = softmax(np.delete(row, 7)), np.delete(softmax(other_row), 7)
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert divergence.kl[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "seqlen", "message"),
    [
        (99, 100, r"99 tokens, less than one window of 100: take --seqlen 99 or less"),
        (2, 100, r"2 tokens, less than one window of 100: take a longer text"),
        (10, 3, r"--seqlen: wanted at least 4, found 3"),
    ],
)
def test_a_text_without_a_whole_window_is_a_usage_error_with_the_numbers(
    tokens: int, seqlen: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ppl.cut([0] * tokens, seqlen, None, "paper")
