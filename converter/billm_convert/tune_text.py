"""The text that a model is tuned on: windows to train with, and a few from elsewhere to judge the result by."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_convert.calibration import CalibrationText, Tokens, draw_windows
from billm_rt.tokenizer import Tokenizer

HELD_OUT = 4  # windows
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

    def describe(self) -> dict[str, Any]:
        """Return what the conversion record says about the text."""
        return {
            "windows": self.training,
            "seqlen": int(self.tokens.shape[1]),
            "tokens_sha256": hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest(),
        }


def draw_text(chosen: CalibrationText, tokenizer: Tokenizer, windows: int, seqlen: int, seed: int) -> TuningText:
    """Draw `windows` windows of `seqlen` tokens to train on, and the others from a part of the text of their own."""
    training, held_out = _split(chosen)
    parts: list[Tokens] = [
        draw_windows(training, tokenizer, windows, seqlen, seed),
        draw_windows(held_out, tokenizer, HELD_OUT, seqlen, seed),
    ]
    return TuningText(np.concatenate(parts))


def _split(chosen: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """Return the text without its end, and its end."""
    if chosen.text is None:
        raise ValueError("a sampled text has no parts")
    text = chosen.text
    if len(text.documents) < 1 / _HELD_OUT_SHARE:  # one long file: cut it between two letters
        text = replace(text, documents=tuple(text.joined), joiner="")
    cut = round(len(text.documents) * (1 - _HELD_OUT_SHARE))
    first, last = (replace(text, documents=part) for part in (text.documents[:cut], text.documents[cut:]))
    return replace(chosen, text=first), replace(chosen, text=last)
