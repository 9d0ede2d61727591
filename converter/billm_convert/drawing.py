"""Windows of every chosen text, drawn or written by the model: to calibrate on, to train on, to judge by."""

from typing import Any

import numpy as np
import torch

from billm_convert.calibration import CalibrationText, Chosen, Tokens, draw_all, draw_windows, shares
from billm_convert.sampling import chat_form, sample_windows, sampling_memory
from billm_convert.settings import SELF, Event, Progress
from billm_convert.source import ModelSource
from billm_convert.tokenizer import TokenizerFiles
from billm_convert.tune_text import HELD_OUT, TuningText, draw_text


class Drawing:
    """Draws from the texts of one conversion, the same windows for the same seed."""

    def __init__(
        self,
        source: ModelSource,
        tokenizer: TokenizerFiles,
        texts: Chosen,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Draw nothing yet."""
        self._source = source
        self._tokenizer = tokenizer
        self._texts = texts
        self._seed = seed
        self._device = device
        self._progress = progress

    def memory(self, windows: int, seqlen: int) -> dict[str, int] | None:
        """Return what writing text takes, by kind, None where none is written; DoesNotFitError for too little room."""
        if all(text.choice != SELF for text in self._texts):
            return None
        plan: dict[str, int] = sampling_memory(self._source, windows, seqlen, self._device)
        return plan

    def calibration(self, windows: int, seqlen: int) -> Tokens:
        """Return int64 [windows, seqlen], every text's share."""

        def draw(text: CalibrationText, share: int) -> Tokens:
            if text.choice == SELF:
                return self._sample(share, seqlen, self._seed)
            return draw_windows(text, self._loaded(), share, seqlen, self._seed)

        return draw_all(self._texts, windows, draw)

    def tuning(self, windows: int, seqlen: int) -> TuningText:
        """Return `windows` to train on and HELD_OUT to judge by, from where the calibration's came from."""
        parts = zip(self._texts, shares(windows, self._texts), shares(HELD_OUT, self._texts), strict=True)
        drawn = [self._tuning(text, training, held_out, seqlen) for text, training, held_out in parts]
        return TuningText(np.concatenate([part for pair in zip(*drawn, strict=True) for part in pair]))

    def _tuning(self, text: CalibrationText, training: int, held_out: int, seqlen: int) -> tuple[Tokens, Tokens]:
        seed = self._seed + 1  # the calibration's windows again would teach less
        if text.choice == SELF:
            drawn = self._sample(training + held_out, seqlen, seed)
            return drawn[:training], drawn[training:]
        return draw_text(text, self._loaded(), training, held_out, seqlen, seed)

    def _loaded(self) -> Any:
        return self._tokenizer.load(self._source.config)

    def _sample(self, windows: int, seqlen: int, seed: int) -> Tokens:
        """Let the full-precision model write int64 [windows, seqlen]."""

        def told(done: int, total: int) -> None:
            self._progress(Event("sampling", done, total))

        form = chat_form(self._loaded())
        self._progress(
            Event("note", text=f"the model writes {'plain text' if form is None else 'conversations'} to learn from")
        )
        tokens: Tokens = sample_windows(self._source, form, windows, seqlen, seed, self._device, told).numpy()
        return tokens
