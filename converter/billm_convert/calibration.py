"""Calibration windows: which tokens the Hessians are made of, drawn as the paper's code draws them."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_convert.settings import SELF
from billm_format.errors import UsageError
from billm_rt import texts
from billm_rt.tokenizer import Tokenizer

Tokens = NDArray[np.int64]  # [windows, seqlen]

DEFAULT = "wikitext2"
# Where the default is not at hand. Held-out output error on C4 of SmolLM2-135M's Linears, calibrated on 16 x 512 tokens
# of C4 0.065, of the model's own text 0.069, of WikiText-2 0.071, of pydoc (far quicker to have) 0.089.
FALLBACK = SELF

_SEPARATOR = ","  # between texts

# Sets of independent documents: a window never crosses from one into the next. The others are joined.
_DOCUMENT_SETS = ("c4", "openwebtext")


@dataclass(frozen=True)
class CalibrationText:
    """A text chosen for calibration; `text` is None for "self"."""

    choice: str
    text: texts.Text | None

    @property
    def name(self) -> str:
        """What the conversion record says."""
        return "text sampled from the full-precision model" if self.text is None else self.text.name

    @property
    def sha256(self) -> str | None:
        """Digest of the whole text; a sampled one is known by its tokens alone."""
        return None if self.text is None else self.text.sha256


Chosen = tuple[CalibrationText, ...]  # in equal shares


def choose_texts(calib: str | None) -> tuple[Chosen, str | None]:
    """Load the texts that `calib` names; for None the default or, where it is not at hand, the fallback and a note.

    Several have commas between them, unless a file has that very name.
    """
    if calib is not None:
        choices = [calib] if Path(calib).exists() else calib.split(_SEPARATOR)
        if "" in choices:
            raise UsageError(f"--calib: wanted texts with a comma between them, found {calib!r}")
        return tuple(_load(choice) for choice in choices), None
    try:
        return (_load(DEFAULT),), None
    except UsageError as error:
        chosen = CalibrationText(FALLBACK, None)
        note = f"calibrating on {chosen.name} (--calib pydoc is quicker, and worse), because {error}"
        return (chosen,), note


def _load(choice: str) -> CalibrationText:
    return CalibrationText(choice, None if choice == SELF else texts.load(choice, "train"))


def shares(windows: int, chosen: Chosen) -> list[int]:
    """Return how many of `windows` come from each text: as many from each, the first ones making up for a rest."""
    whole, rest = divmod(windows, len(chosen))
    return [whole + (place < rest) for place in range(len(chosen))]


def draw_all(chosen: Chosen, windows: int, draw: Callable[[CalibrationText, int], Tokens]) -> Tokens:
    """Return int64 [windows, seqlen]: every text's share as `draw` has it, one text after the other."""
    parts = zip(chosen, shares(windows, chosen), strict=True)
    return np.concatenate([draw(text, share) for text, share in parts if share])


def draw_windows(chosen: CalibrationText, tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int) -> Tokens:
    """Return `nsamples` windows of `seqlen` tokens, int64 [nsamples, seqlen]; the same seed draws the same ones.

    Raises UsageError with the numbers when the text is too short.
    """
    if chosen.text is None:
        raise ValueError("a sampled text has no windows to draw")
    by_document = chosen.choice in _DOCUMENT_SETS or chosen.choice.removesuffix(".gz").endswith(".jsonl")
    draw = _from_documents if by_document else _from_joined
    return draw(chosen.text, tokenizer, nsamples, seqlen, random.Random(seed))


def _from_joined(text: texts.Text, tokenizer: Tokenizer, nsamples: int, seqlen: int, rng: random.Random) -> Tokens:
    ids = np.array(tokenizer.encode(text.joined), dtype=np.int64)
    if len(ids) <= seqlen:
        raise UsageError(
            f"{text.name} is {len(ids):,} tokens long, too short for windows of {seqlen:,}; give --seqlen "
            f"{max(2, len(ids) // 2)} or less, or a longer text"
        )
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return np.stack([ids[start : start + seqlen] for start in starts])


def _from_documents(text: texts.Text, tokenizer: Tokenizer, nsamples: int, seqlen: int, rng: random.Random) -> Tokens:
    """Draw a random document until one is longer than the window, then a random window of it."""
    lengths: dict[int, int] = {}
    picked: list[NDArray[np.int64]] = []
    while len(picked) < nsamples:
        index = rng.randrange(len(text.documents))
        if lengths.get(index, seqlen + 1) <= seqlen:
            continue
        ids = np.array(tokenizer.encode(text.documents[index]), dtype=np.int64)
        lengths[index] = len(ids)
        if len(ids) > seqlen:
            start = rng.randint(0, len(ids) - seqlen - 1)
            picked.append(ids[start : start + seqlen])
        elif len(lengths) == len(text.documents) and max(lengths.values()) <= seqlen:
            raise UsageError(
                f"{text.name}: none of its {len(lengths):,} documents is longer than {seqlen:,} tokens (the longest "
                f"has {max(lengths.values()):,}); give a smaller --seqlen or another text"
            )
    return np.stack(picked)


def describe(chosen: Chosen, tokens: Tokens, seed: int) -> dict[str, Any]:
    """Return what the conversion record says about the calibration."""
    digests = [text.sha256 for text in chosen]
    return {
        "name": " + ".join(text.name for text in chosen),
        "sha256": " + ".join(digest or "-" for digest in digests) if any(digests) else None,
        "nsamples": tokens.shape[0],
        "seqlen": tokens.shape[1],
        "tokens": int(tokens.size),
        "tokens_sha256": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        "seed": seed,
    }
