"""Likelihoods and accuracies, against loops over single tokens in float64."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ppl.fakes import FakeModel

from billm_format.errors import CorruptFileError, UsageError
from billm_rt import eval_score
from billm_rt.eval_score import BillmReader, Likelihood
from billm_rt.eval_tasks import Item

VOCAB = 40


class CountingModel(FakeModel):
    """A fake model with a context length, a tokenizer of single characters, and a count of what it read."""

    def __init__(self, rng: np.random.Generator, ctx: int = 64) -> None:
        super().__init__(rng, VOCAB)
        self.ctx = ctx
        self.read = 0
        self.tokenizer = SimpleNamespace(encode=lambda text, special: [0, *(ord(c) % (VOCAB - 1) + 1 for c in text)])

    def forward(self, token_ids: Any, cache: Any, logits: str) -> Any:
        self.read += len(token_ids)
        assert len(cache.tokens) + len(token_ids) <= self.ctx
        return super().forward(token_ids, cache, logits)


def loop(model: FakeModel, context: list[int], continuation: list[int]) -> Likelihood:
    """Every token from its whole context, in float64."""
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        logits = [float(x) for x in model.context_logits(context + continuation[:place])]
        total += logits[token] - math.log(sum(math.exp(x) for x in logits))
        greedy = greedy and token == logits.index(max(logits))
    return Likelihood(total, greedy)


def draw(rng: np.random.Generator, count: int) -> list[int]:
    tokens: list[int] = rng.integers(0, VOCAB, count).tolist()
    return tokens


def test_likelihoods_equal_the_loop_whatever_was_read_before(rng: np.random.Generator) -> None:
    model = CountingModel(rng)
    reader = BillmReader(model)  # type: ignore[arg-type]
    context = draw(rng, 20)
    for _ in range(60):
        kept = int(rng.integers(1, 21))  # often a shared beginning, of any length
        context = context[:kept] + draw(rng, int(rng.integers(0, 12)))
        continuation = draw(rng, int(rng.integers(1, 6)))
        found, wanted = eval_score.likelihood(reader, context, continuation), loop(model, context, continuation)
        assert found.total == pytest.approx(wanted.total, rel=1e-5)
        assert found.greedy == wanted.greedy


def test_greedy_continuations_are_recognised(rng: np.random.Generator) -> None:
    model = CountingModel(rng)
    reader = BillmReader(model)  # type: ignore[arg-type]
    text = draw(rng, 10)
    for _ in range(5):
        text.append(int(model.context_logits(text).argmax()))
    assert eval_score.likelihood(reader, text[:10], text[10:]).greedy
    second = int(model.context_logits(text[:14]).argsort()[-2])
    assert not eval_score.likelihood(reader, text[:10], [*text[10:14], second]).greedy


def test_a_shared_context_is_read_once(rng: np.random.Generator) -> None:
    model = CountingModel(rng)
    reader = BillmReader(model)  # type: ignore[arg-type]
    context, choices = draw(rng, 30), [draw(rng, 4) for _ in range(4)]
    for choice in choices:
        eval_score.likelihood(reader, context, choice)
    # The context but its last token once; for each choice that token and all but the choice's own last.
    assert model.read == 29 + 4 * 4


def test_a_text_beyond_the_context_loses_its_beginning(rng: np.random.Generator) -> None:
    model = CountingModel(rng, ctx=16)
    reader = BillmReader(model)  # type: ignore[arg-type]
    context, continuation = draw(rng, 30), draw(rng, 5)
    wanted = loop(model, (context + continuation)[-17:][:12], continuation)
    assert eval_score.likelihood(reader, context, continuation).total == pytest.approx(wanted.total, rel=1e-5)
    long = draw(rng, 40)  # only its last 16 tokens can be scored
    wanted = loop(model, long[-17:-16], long[-16:])
    assert eval_score.likelihood(reader, context, long).total == pytest.approx(wanted.total, rel=1e-5)


def test_white_space_before_the_cut_belongs_to_the_continuation(rng: np.random.Generator) -> None:
    reader = BillmReader(CountingModel(rng))  # type: ignore[arg-type]
    whole = reader.encode("abc  def")
    for context, continuation in (("abc", "  def"), ("abc ", " def"), ("abc  ", "def")):
        assert eval_score.encode_pair(reader, context, continuation) == (whole[:4], whole[4:])
    for context, continuation in (("", "abc"), ("  ", "abc"), ("abc", "")):
        with pytest.raises(UsageError, match="nothing to score"):
            eval_score.encode_pair(reader, context, continuation)


def test_logits_that_are_not_finite_are_an_error(rng: np.random.Generator) -> None:
    model = CountingModel(rng)
    model.last[:, 3] = np.nan
    with pytest.raises(CorruptFileError, match="not finite"):
        eval_score.likelihood(BillmReader(model), [1, 2], [4])  # type: ignore[arg-type]


def test_accuracies_equal_their_definition(rng: np.random.Generator) -> None:
    items, found, hits, norm_hits = [], [], [], []
    for _ in range(200):
        count = int(rng.integers(2, 6))
        lengths = tuple(int(n) for n in rng.integers(1, 30, count))
        totals = [float(x) for x in -rng.exponential(10, count)]
        gold = int(rng.integers(count))
        items.append(Item((("c", " x"),) * count, gold, lengths))
        found.append([Likelihood(total, False) for total in totals])
        hits.append(totals.index(max(totals)) == gold)
        norms = [total / length for total, length in zip(totals, lengths, strict=True)]
        norm_hits.append(norms.index(max(norms)) == gold)
    score = eval_score.summarize(items, found, ("acc", "acc_norm"), 1.0)
    for value, error, right in (
        (score.acc, score.acc_stderr, hits),
        (score.acc_norm, score.acc_norm_stderr, norm_hits),
    ):
        p = sum(right) / 200
        assert value == pytest.approx(p)
        assert error == pytest.approx(math.sqrt(p * (1 - p) / 199))
    assert score.chance == pytest.approx(sum(1 / len(item.pairs) for item in items) / 200)
    plain = eval_score.summarize(items, found, ("acc",), 1.0)
    assert (plain.acc, plain.acc_norm, plain.perplexity) == (score.acc, None, None)


def test_the_last_words_perplexity_and_greedy_accuracy(rng: np.random.Generator) -> None:
    items = [Item((("c", " x"),), 0, (1,))] * 50
    totals = [float(x) for x in -rng.exponential(3, 50)]
    found = [[Likelihood(total, place % 5 == 0)] for place, total in enumerate(totals)]
    score = eval_score.summarize(items, found, ("acc", "perplexity"), 1.0)
    assert score.acc == 0.2
    assert score.perplexity == pytest.approx(math.exp(-sum(totals) / 50))
    assert score.perplexity_stderr == pytest.approx(score.perplexity * np.std(totals, ddof=1) / math.sqrt(50))
    assert score.chance is None
    hopeless = eval_score.summarize(items, [[Likelihood(-1e6, False)]] * 50, ("acc", "perplexity"), 1.0)
    assert hopeless.perplexity == math.inf


def test_evaluate_scores_every_choice_in_its_own_context(rng: np.random.Generator) -> None:
    model = CountingModel(rng)
    reader = BillmReader(model)  # type: ignore[arg-type]
    items = []
    for number in range(20):
        contexts = [f"item {number} {option}" for option in ("one", "two")]
        items.append(Item(tuple((context, " rest of it") for context in contexts), number % 2, (1, 1)))
    right = 0
    for item in items:
        totals = []
        for context, continuation in item.pairs:
            ids, first = reader.encode(context + continuation), len(reader.encode(context))
            totals.append(loop(model, ids[:first], ids[first:]).total)
        right += totals.index(max(totals)) == item.gold
    done: list[int] = []
    assert eval_score.evaluate(reader, items, ("acc",), done.append).acc == right / 20
    assert done == list(range(1, 21))
