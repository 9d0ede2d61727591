"""The tokenizer as one tokenizer.json, its special tokens and the chat template, whatever the model ships them as."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.processors import TemplateProcessing

from billm_format.config import ModelConfig, TokenizerInfo
from billm_format.errors import UsageError
from billm_rt.tokenizer import Tokenizer as RuntimeTokenizer

# GGUF's names of splittings in which every digit stands alone, which transformers leaves out (as of 5.23): white space
# before a number would be cut differently ("\n\n1." starts every numbered list).
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the `.billm` file holds of a tokenizer."""

    tokenizer_json: bytes
    info: TokenizerInfo
    chat_template: str | None

    def load(self, config: ModelConfig) -> RuntimeTokenizer:
        """Return the tokenizer just as the runtime will see it, so that calibration and use agree."""
        return RuntimeTokenizer(self.tokenizer_json.decode(), self.info, config, self.chat_template)


def tokenizer_from_hf(path: Path, config: ModelConfig) -> TokenizerFiles:
    """Read a Hugging Face folder's tokenizer: tokenizer.json, else tokenizer.model, else vocab.json with merges.txt."""
    settings = _optional_json(path / "tokenizer_config.json")
    if (file := path / "tokenizer.json").is_file():
        data = file.read_bytes()
    elif (path / "tokenizer.model").is_file():
        data = _from_sentencepiece(path, settings)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        data = _from_transformers(path)
    else:
        raise UsageError(
            f"{path} holds no tokenizer: wanted tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        )
    return _finish(path, data, settings, _special_tokens(path, settings), _chat_template(path, settings), config)


def tokenizer_from_gguf(path: Path, config: ModelConfig, add_bos: bool | None, splitting: str | None) -> TokenizerFiles:
    """Build the tokenizer from a GGUF file's metadata, by transformers; `add_bos` is what the metadata say.

    `splitting` is GGUF's name for how text is cut before merging ("llama-bpe", "smollm"); transformers knows most.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # transformers raises types of many libraries here
        raise UsageError(
            f"{path}: transformers cannot build its tokenizer ({' '.join(str(error).split())[:300]})"
        ) from error
    backend = loaded.backend_tokenizer
    if splitting in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    special = {name: getattr(loaded, name) for name in _SPECIAL}
    settings = {} if add_bos is None else {"add_bos_token": bool(add_bos)}
    data = backend.to_str().encode()
    return _finish(path, data, settings, special, loaded.chat_template, config)


def _finish(
    path: Path,
    data: bytes,
    settings: dict[str, Any],
    special: dict[str, str | None],
    template: str | None,
    config: ModelConfig,
) -> TokenizerFiles:
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UsageError(f"{path}: tokenizer.json cannot be loaded ({error})") from None
    # Added tokens may lie beyond the embedding (a [PAD] that the model never got): no ordinary text leads to them.
    if (size := tokenizer.get_vocab_size(with_added_tokens=False)) > config.vocab_size:
        raise UsageError(
            f"{path}: the tokenizer has {size:,} tokens but the model's embedding only {config.vocab_size:,} rows: "
            "they do not belong together"
        )
    for name, token in special.items():
        if token is not None and tokenizer.token_to_id(token) is None:
            raise UsageError(f"{path}: {name} is {token!r}, which the tokenizer does not have")
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        ids = tokenizer.encode("a").ids
        bos = special["bos_token"]
        add_bos = bos is not None and ids[:1] == [tokenizer.token_to_id(bos)]
    return TokenizerFiles(data, TokenizerInfo(**special, add_bos=add_bos), template)


def _optional_json(file: Path) -> dict[str, Any]:
    from billm_convert.source import read_json

    return read_json(file) if file.is_file() else {}


def _special_tokens(path: Path, settings: dict[str, Any]) -> dict[str, str | None]:
    """Return the special tokens as text; tokenizer_config.json wins over the older special_tokens_map.json."""
    older = _optional_json(path / "special_tokens_map.json")
    out: dict[str, str | None] = {}
    for name in _SPECIAL:
        value = settings.get(name, older.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        out[name] = value if isinstance(value, str) and value else None
    return out


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template: the file beside the tokenizer, else the setting (of several the "default" one)."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def _from_transformers(path: Path) -> bytes:
    from transformers import AutoTokenizer

    try:
        text: str = AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises types of many libraries here
        raise UsageError(
            f"{path}: transformers cannot load the tokenizer ({' '.join(str(error).split())[:300]})"
        ) from error
    return text.encode()


def _from_sentencepiece(path: Path, settings: dict[str, Any]) -> bytes:
    """Turn a SentencePiece model into a fast tokenizer, and prove on a sample of strings that both encode alike."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    file = path / "tokenizer.model"
    try:
        slow = SentencePieceProcessor(model_file=str(file))
        fast: Tokenizer = LlamaTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    except Exception as error:  # transformers and protobuf raise types of their own
        raise UsageError(f"{file} cannot be turned into a tokenizer ({' '.join(str(error).split())[:300]})") from None
    # A space goes in front of every stretch of plain text, one that begins with a space included. That is what
    # SentencePiece itself does; transformers' own scheme leaves out the second of two leading spaces.
    fast.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    fast.pre_tokenizer = None
    bos = _special_tokens(path, settings)["bos_token"]
    if bos is None or not settings.get("add_bos_token", True):
        fast.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    _compare(file, fast, slow)
    return fast.to_str().encode()


def _compare(file: Path, fast: Tokenizer, slow: Any) -> None:
    for text in sample_strings():
        wanted, found = slow.encode(text), fast.encode(text, add_special_tokens=False).ids
        if wanted != found:
            raise UsageError(
                f"{file} could not be turned into a fast tokenizer: it encodes {text[:60]!r} as {wanted[:12]}, the "
                f"fast one as {found[:12]}; put a tokenizer.json that belongs to the model beside it"
            )


def sample_strings() -> list[str]:
    """Return strings that tell tokenizers apart: white space, scripts, emoji, digits, code, random mixes."""
    fixed = [
        "Hello world", " Hello", "  two leading", "trailing ", "a  b   c    d", " ", "   ", "\n", "\n\n", "\ttab\tbed",
        "line\nbreak\r\nand more\n", "Don't stop: it's 'quoted', \"twice\"!", "1234567890 3.14159 1,000,000 2^10",
        "def f(x):\n    return {x: [y for y in range(10)]}  # comment", "<html><body class=\"a\">&amp;</body></html>",
        "déjà vu, naïve, Zürich, Ærø", "Привет, мир", "你好，世界", "こんにちは世界", "안녕하세요", "שלום עולם",
        "مرحبا بالعالم",
        "नमस्ते दुनिया", "😀 👩‍👩‍👧 🇨🇭 ☃️", "e\u0301 vs é, ﬁ vs fi, Å vs Å",
        "\u00a0non-breaking\u2003em\u200bzero", "▁ the mark itself ▁▁",
        "http://example.org/a?b=c&d=%20", "CamelCaseAndSNAKE_case", "....... !!!! ???? -----", "\x00\x01\x7f control",
        "the quick brown fox jumps over the lazy dog " * 5,
    ]  # fmt: skip
    rng = random.Random(0)
    alphabet = "aeinorst AEST  \n\t.,'\"-_0123456789éßж中あ😀▁"
    return fixed + ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(100)]
