"""The text that a model is tuned on: windows to train with, and a few from elsewhere to judge the result by."""

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_convert.calibration import CalibrationText
from billm_format.errors import UsageError
from billm_rt.texts import Text
from billm_rt.tokenizer import Tokenizer

HELD_OUT = 8  # windows
_HELD_OUT_SHARE = 0.05  # of the text: its end


@dataclass(frozen=True)
class TuningText:
    """Windows of tokens, int64 [windows, seqlen]; nothing is trained on the last HELD_OUT."""

    tokens: NDArray[np.int64]

    @property
    def training(self) -> int:
        """Number of windows to train on: the first ones."""
        return len(self.tokens) - HELD_OUT

    @property
    def held_out(self) -> range:
        """The other windows."""
        return range(self.training, len(self.tokens))

    def split(self, blocks: int, seed: int) -> tuple[list[int], list[int]]:
        """Return `blocks` windows to train blocks on, drawn from all there are to train on, and the others."""
        drawn = random.Random(seed).sample(range(self.training), self.training)
        return drawn[:blocks], drawn[blocks:]

    def describe(self) -> dict[str, Any]:
        """Return what the conversion record says about the text."""
        return {
            "windows": self.training,
            "seqlen": int(self.tokens.shape[1]),
            "tokens_sha256": hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest(),
        }


def draw_text(
    chosen: CalibrationText, tokenizer: Tokenizer, training: int, held_out: int, seqlen: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw windows to train on, int64 [training, seqlen], and [held_out, seqlen] from a part of the text of their own.

    Raises UsageError with the numbers when the text is too short.
    """
    rng = random.Random(seed)
    beginning, end = _split(chosen)
    return _cut(beginning, tokenizer, training, seqlen, rng), _cut(end, tokenizer, held_out, seqlen, rng)


def _cut(text: Text, tokenizer: Tokenizer, windows: int, seqlen: int, rng: random.Random) -> NDArray[np.int64]:
    """Return int64 [windows, seqlen]: the documents one after the other in random order; none twice before all once."""
    encoded = [np.array(tokenizer.encode(document + text.joiner), np.int64) for document in text.documents]
    tokens = sum(len(ids) for ids in encoded)
    if tokens < seqlen:
        raise UsageError(
            f"{text.name}: a part of {tokens:,} tokens is too short to tune on in windows of {seqlen:,}; give "
            f"--seqlen {max(2, tokens // 2)} or less, or a longer text"
        )
    rounds: list[NDArray[np.int64]] = []
    while not rounds or sum(len(found) for found in rounds) < windows:
        whole = np.concatenate(rng.sample(encoded, len(encoded)))
        rounds.append(whole[: len(whole) // seqlen * seqlen].reshape(-1, seqlen))
    return np.concatenate(rounds)[:windows]


def _split(chosen: CalibrationText) -> tuple[Text, Text]:
    """Return the text without its end, and its end."""
    if chosen.text is None:
        raise ValueError("a sampled text has no parts")
    text = chosen.text
    if len(text.documents) < 1 / _HELD_OUT_SHARE:  # one long file: cut it between two letters
        whole = text.joined
        cut = round(len(whole) * (1 - _HELD_OUT_SHARE))
        return replace(text, documents=(whole[:cut],), joiner=""), replace(text, documents=(whole[cut:],), joiner="")
    cut = round(len(text.documents) * (1 - _HELD_OUT_SHARE))
    return replace(text, documents=text.documents[:cut]), replace(text, documents=text.documents[cut:])
