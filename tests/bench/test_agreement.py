"""The comparison of two ways of running a file: it says what is so, and sees what is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import make_random_billm, tiny_config

from bench import agreement
from billm_rt.model import Model


@pytest.fixture
def arguments(tmp_path: Path, seed: int) -> list[str]:
    """A random model and a text, short enough for its context of 512."""
    make_random_billm(tmp_path / "m.billm", tiny_config(max_position_embeddings=512), seed=seed)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ["--data", str(tmp_path / "text.txt"), "--seqlen", "50", "--windows", "2", "--tokens", "9"]
    return [str(tmp_path / "m.billm"), "--ways", "cpu", "exact", *options]


def test_the_native_path_agrees_with_the_exact_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logit_error"] < 1e-2 and found["ratio"] == pytest.approx(1, abs=1e-2)
    assert all(max(difference["gaps"]) < 0.1 for difference in found["differences"])
    assert agreement.main(arguments) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_way_that_errs_is_seen(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Model.forward

    def wrong(self: Model, *rest: Any, **more: Any) -> Any:
        logits = right(self, *rest, **more)
        return -logits if self.isa == "exact" else logits

    monkeypatch.setattr(Model, "forward", wrong)
    assert agreement.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [difference["token"] for difference in found["differences"]] == list(range(9))
    assert np.min([difference["gaps"] for difference in found["differences"]]) > 0
    assert agreement.main(arguments) == 0
    assert "the first of 9 different choices is token 0" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--ways", "cpu", "cuda:77"], "--device cuda:77"),
        (["--seqlen", "600"], "the model's context is 512 tokens: give a smaller --seqlen"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ):
        assert agreement.main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
