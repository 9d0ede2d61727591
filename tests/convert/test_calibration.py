"""Windows: drawn as the paper's code draws them, never across documents, with numbers where a text is too short."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from convert.hf_models import save_model, write_text

from billm_convert import calibration
from billm_convert.calibration import CalibrationText, choose_texts, describe, draw_windows, shares
from billm_convert.source import open_model
from billm_format.errors import UsageError
from billm_rt.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_model(tmp_path / "model", "llama", 1)
    source = open_model(tmp_path / "model")
    return source.tokenizer().load(source.config)


def only(name: str) -> CalibrationText:
    (chosen,), note = choose_texts(name)
    assert note is None
    return chosen


def documents(path: Path, seed: int, lengths: list[int]) -> list[str]:
    """Write JSON lines of documents, each of its own letter, and return them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(letter) for _ in range(n)) for letter, n in zip("bdghjk", lengths, strict=False)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return texts


def test_joined_text_is_cut_where_the_papers_code_cuts(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    path = write_text(tmp_path / "t.txt", seed)
    found = draw_windows(only(str(path)), tokenizer, 5, 33, seed)
    ids = tokenizer.encode(path.read_text())
    random.seed(seed)
    wanted = []
    for _ in range(5):
        i = random.randint(0, len(ids) - 33 - 1)
        wanted.append(ids[i : i + 33])
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.int64


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_windows_stay_within_documents(name: str, tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    texts = documents(tmp_path / name, seed, [200, 5, 90, 3, 40])
    found = draw_windows(only(str(tmp_path / name)), tokenizer, 30, 20, seed)
    encoded = [tokenizer.encode(text) for text in texts]
    homes = []
    for window in found.tolist():
        at = [i for i, ids in enumerate(encoded) if any(ids[k : k + 20] == window for k in range(len(ids) - 19))]
        assert len(at) == 1
        homes += at
    assert set(homes) <= {i for i, ids in enumerate(encoded) if len(ids) > 20}
    assert len(set(homes)) > 1
    again = draw_windows(only(str(tmp_path / name)), tokenizer, 30, 20, seed)
    np.testing.assert_array_equal(found, again)


def test_too_short_a_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat")
    with pytest.raises(UsageError, match=r"t\.txt is \d+ tokens long, too short for windows of 500; give --seqlen"):
        draw_windows(only(str(tmp_path / "t.txt")), tokenizer, 2, 500, 0)


def test_no_document_long_enough(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    texts = documents(tmp_path / "t.jsonl", seed, [10, 20, 30])
    longest = max(len(tokenizer.encode(text)) for text in texts)
    with pytest.raises(
        UsageError, match=rf"none of its 3 documents .* longer than 400 tokens \(the longest has {longest}\)"
    ):
        draw_windows(only(str(tmp_path / "t.jsonl")), tokenizer, 2, 400, seed)


def test_fallback_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> object:
        if name == calibration.DEFAULT:
            raise UsageError("WikiText-2 is not at hand")
        return real(name, split)

    real = calibration.texts.load
    monkeypatch.setattr(calibration.texts, "load", load)
    (chosen,), note = choose_texts(None)
    assert chosen.choice == calibration.FALLBACK
    assert note is not None
    assert "because WikiText-2 is not at hand" in note


def test_several_texts_have_equal_shares(tmp_path: Path, seed: int) -> None:
    documents(tmp_path / "one.jsonl", seed, [200, 90])
    write_text(tmp_path / "two.txt", seed)
    chosen, note = choose_texts(f"{tmp_path / 'one.jsonl'},self,{tmp_path / 'two.txt'}")
    assert note is None
    assert [Path(text.choice).name for text in chosen] == ["one.jsonl", "self", "two.txt"]
    assert shares(8, chosen) == [3, 3, 2]
    described = describe(chosen, np.zeros((8, 20), np.int64), seed)
    assert described["name"] == "one.jsonl + text sampled from the full-precision model + two.txt"
    assert described["sha256"] == f"{chosen[0].sha256} + - + {chosen[2].sha256}"
    with pytest.raises(UsageError, match=r"--calib: wanted texts with a comma between them, found 'pydoc,'"):
        choose_texts("pydoc,")
    named = write_text(tmp_path / "a,b.txt", seed)
    assert [text.choice for text in choose_texts(str(named))[0]] == [str(named)]


def test_description_tells_texts_and_windows_apart(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    chosen, _ = choose_texts(str(write_text(tmp_path / "t.txt", seed)))
    first = describe(chosen, draw_windows(chosen[0], tokenizer, 3, 20, seed), seed)
    other = describe(chosen, draw_windows(chosen[0], tokenizer, 3, 20, seed + 1), seed + 1)
    assert first["sha256"] == other["sha256"]
    assert first["tokens_sha256"] != other["tokens_sha256"]
    assert (first["nsamples"], first["seqlen"], first["tokens"]) == (3, 20, 60)
