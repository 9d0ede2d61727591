"""The losses and the schedule, and the text that is held out."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from convert.hf_models import save_model, write_text
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from billm_convert.block import attend
from billm_convert.calibration import CalibrationText, choose_texts
from billm_convert.source import open_model
from billm_convert.tune_block import plain_attention
from billm_convert.tune_text import HELD_OUT, TuningText, draw_text
from billm_convert.tune_train import logit_distance, product_dtype, rate_factor, reading_order
from billm_format.errors import UsageError
from billm_rt.texts import Text
from billm_rt.tokenizer import Tokenizer


def test_logit_distance_is_the_divergence_and_its_gradient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(600, 24, generator=generator, requires_grad=True)  # several chunks, the last one short
    wanted = torch.randn(600, 24, generator=generator)
    head, wanted_head = torch.randn(50, 24, generator=generator), torch.randn(50, 24, generator=generator)
    found, gradient = logit_distance(hidden.detach(), wanted, head, wanted_head)
    loss = F.kl_div(
        F.log_softmax(hidden @ head.T, dim=-1),
        F.log_softmax(wanted @ wanted_head.T, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    (expected,) = torch.autograd.grad(loss, hidden)
    assert found == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert logit_distance(wanted, wanted, head, head)[0] == pytest.approx(0, abs=1e-5)


def test_rates_rise_then_fall() -> None:
    for steps in (1, 2, 7, 100):
        factors = [rate_factor(step, steps) for step in range(steps)]
        peak = factors.index(max(factors))
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert all(0 < factor <= 1 for factor in factors)
    assert math.isclose(rate_factor(0, 100), 0.1)


def test_every_window_is_read_before_any_twice(seed: int) -> None:
    text = TuningText(np.zeros((20 + HELD_OUT, 4), np.int64))
    blocks, model = text.split(7, seed)
    assert len(blocks) == 7
    assert sorted(blocks + model) == list(range(20))
    order = reading_order(model, 2, 13, seed)
    read = [window for step in order for window in step]
    assert [len(step) for step in order] == [2] * 13
    assert sorted(read[:13]) == sorted(read[13:]) == sorted(model)


def test_products_are_made_in_a_dtype_that_the_processor_has() -> None:
    assert product_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4)])
def test_plain_attention_is_torchs(heads: int, key_heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, n, 11, 16, generator=generator) for n in (heads, key_heads, key_heads))
    wanted = attend(query, key, value, 0, None)
    torch.testing.assert_close(plain_attention(query, key, value), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_model(tmp_path / "model", "llama", 1)
    source = open_model(tmp_path / "model")
    return source.tokenizer().load(source.config)


def test_held_out_windows_are_of_other_documents(tokenizer: Tokenizer, seed: int) -> None:
    documents = tuple(("cat " if i < 38 else "mat ") * 40 for i in range(40))
    training, held_out = draw_text(CalibrationText("t.jsonl", Text("t", documents, " ")), tokenizer, 30, 8, 24, seed)
    assert training.shape == (30, 24)
    assert held_out.shape == (8, 24)
    none = draw_text(CalibrationText("t.jsonl", Text("t", documents, " ")), tokenizer, 3, 0, 24, seed)[1]
    assert none.shape == (0, 24)  # the share of one text of many
    assert all("mat" not in tokenizer.decode(window) for window in training.tolist())
    assert all("cat" not in tokenizer.decode(window) for window in held_out.tolist())


def test_one_long_file_is_cut_before_its_end(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    path = write_text(tmp_path / "t.txt", seed)
    whole = path.read_text(encoding="utf-8")
    (chosen,), _ = choose_texts(str(path))
    cut = round(0.95 * len(whole))
    for windows, part in zip(draw_text(chosen, tokenizer, 60, 8, 24, seed), (whole[:cut], whole[cut:]), strict=True):
        for window in windows.tolist():
            words = tokenizer.decode(window[1:-1]).strip("\N{REPLACEMENT CHARACTER}")  # a cut may fall within a letter
            assert words in part


def test_no_document_is_read_twice_before_all_have_been(tokenizer: Tokenizer, seed: int) -> None:
    documents = tuple(chr(ord("a") + i % 26) * (20 + i) for i in range(40))
    chosen = CalibrationText("t.jsonl", Text("t", documents, " "))
    count = sum(len(tokenizer.encode(document + " ")) for document in documents[:38]) // 24
    once, _ = draw_text(chosen, tokenizer, count, 2, 24, seed)
    encoded = [token for document in documents[:38] for token in tokenizer.encode(document + " ")]
    left = Counter(encoded) - Counter(once.flatten().tolist())
    assert once.size + left.total() == len(encoded)
    again, _ = draw_text(chosen, tokenizer, 2 * count, 2, 24, seed)
    assert (again[:count] == once).all()
    assert (again[count:] != once).any()


def test_a_text_too_short_to_tune_on_is_refused(tokenizer: Tokenizer) -> None:
    chosen = CalibrationText("t.txt", Text("t", ("cat " * 30,), ""))
    with pytest.raises(UsageError, match=r"too short to tune on in windows of 900; give --seqlen"):
        draw_text(chosen, tokenizer, 3, 8, 900, 0)
