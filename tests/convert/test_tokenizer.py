"""Tokenizers of every form become one tokenizer.json that encodes as the original does."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from convert.hf_models import save_model, tiny_tokenizer
from tokenizers import Tokenizer

from billm_convert import ConvertSettings, convert
from billm_convert.source import open_model
from billm_convert.tokenizer import sample_strings
from billm_format.errors import UsageError
from billm_format.reader import BillmFile

WORDS = [
    "the",
    "of",
    "and",
    "cat",
    "sat",
    "there",
    "other",
    "line",
    "new",
    "42",
    "def",
    "return",
    "print",
    "hello",
    "world",
    "model",
    "tokens",
    "Zürich",
    "naïve",
    "über",
]


def train_sentencepiece(folder: Path, seed: int, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a LLaMA-like SentencePiece model of 400 pieces into `folder`."""
    rng = random.Random(seed)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(400)))
    like_llama = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), **(like_llama | options)
    )
    corpus.unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentencepiece_model(folder: Path, seed: int, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Save a LLaMA whose tokenizer is a tokenizer.model alone."""
    save_model(folder, "llama", seed, vocab_size=400)
    (folder / "tokenizer.json").unlink()
    settings = {
        "add_bos_token": True, "add_eos_token": False, "legacy": False, "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return train_sentencepiece(folder, seed, **options)


def test_sentencepiece_becomes_a_fast_tokenizer(tmp_path: Path, seed: int) -> None:
    slow = sentencepiece_model(tmp_path / "m", seed)
    files = open_model(tmp_path / "m").tokenizer()
    fast = Tokenizer.from_str(files.tokenizer_json.decode())
    rng = random.Random(seed)
    texts = sample_strings() + ["".join(rng.choices(" \n\tabcé中😀<>/s_▁12'", k=30)) for _ in range(300)]
    for text in texts:
        if "<s>" in text or "</s>" in text:
            continue  # control tokens are no text to SentencePiece
        assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text), repr(text)
    assert fast.encode("hello").ids == [1, *slow.encode("hello")]
    assert fast.decode(slow.encode("hello world  there\n 😀")) == "hello world  there\n 😀"
    assert files.info.add_bos
    assert (files.info.bos_token, files.info.eos_token) == ("<s>", "</s>")


def test_sentencepiece_goes_through_the_conversion(tmp_path: Path, seed: int) -> None:
    slow = sentencepiece_model(tmp_path / "m", seed)
    text = tmp_path / "t.txt"
    text.write_text(" ".join(random.Random(seed).choices(WORDS, k=400)))
    convert(
        tmp_path / "m", tmp_path / "o.billm", ConvertSettings(calib=str(text), nsamples=2, seqlen=32, block_size=32)
    )
    with BillmFile.open(tmp_path / "o.billm") as file:
        assert Tokenizer.from_str(file.tokenizer_json()).encode(" two", add_special_tokens=False).ids == slow.encode(
            " two"
        )
        assert file.tokenizer_info.add_bos


def test_sentencepiece_that_cannot_be_turned_is_refused(tmp_path: Path, seed: int) -> None:
    """A normalizer that folds characters is not LLaMA's: say so rather than encode otherwise."""
    sentencepiece_model(tmp_path / "m", seed, normalization_rule_name="nmt_nfkc_cf")
    with pytest.raises(
        UsageError, match=r"could not be turned into a fast tokenizer: it encodes .* put a tokenizer.json"
    ):
        open_model(tmp_path / "m").tokenizer()
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="cannot be turned into a tokenizer"):
        open_model(tmp_path / "m").tokenizer()


def test_vocabulary_and_merges(tmp_path: Path, seed: int) -> None:
    """OPT ships GPT-2's two files; its beginning-of-text token is </s>."""
    save_model(tmp_path, "opt", seed)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in parts["merges"]) + "\n"
    )
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "unk_token": "</s>", "bos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>", "pad_token": "<unk>"}))
    source = open_model(tmp_path)
    files = source.tokenizer()
    text = "the cat sat, über\n\n  42"
    assert files.load(source.config).encode(text) == [2, *tiny_tokenizer().encode(text).ids]


def test_tokenizer_json_is_kept_byte_for_byte(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    assert open_model(tmp_path).tokenizer().tokenizer_json == (tmp_path / "tokenizer.json").read_bytes()


def test_chat_template_from_the_settings(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for given, wanted in [
        ("{{ one }}", "{{ one }}"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ two }}"}], "{{ two }}"),
        (None, None),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": given}))
        assert open_model(tmp_path).tokenizer().chat_template == wanted


@pytest.mark.parametrize(("stated", "wanted"), [(True, True), (False, False), (None, False)])
def test_add_bos_as_stated_else_as_the_tokenizer_does(
    stated: bool | None, wanted: bool, tmp_path: Path, seed: int
) -> None:
    save_model(tmp_path, "llama", seed)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": stated}))
    assert open_model(tmp_path).tokenizer().info.add_bos is wanted


def test_unusable_tokenizers(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<gone>"}))
    with pytest.raises(UsageError, match="eos_token is '<gone>', which the tokenizer does not have"):
        open_model(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be loaded"):
        open_model(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"holds no tokenizer: wanted tokenizer\.json"):
        open_model(tmp_path).tokenizer()


def test_tokenizer_of_another_model(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed, vocab_size=200)
    with pytest.raises(UsageError, match=r"the tokenizer has \d+ tokens but the model's embedding only 200 rows"):
        open_model(tmp_path).tokenizer()
