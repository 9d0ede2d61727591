"""Training in turn: everything in a block, as soon as it is solved and before the next one is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary
from billm_convert.settings import Effort
from billm_convert.source import ModelSource
from billm_convert.stored_block import StoredBlock
from billm_convert.streams import Told
from billm_convert.tune_block import QuickBlock, Rates, TunedBlock
from billm_convert.tune_text import TuningText
from billm_convert.tune_train import block_loss, check_finite, product_dtype, reading_order, tune_block

# Between those measured on SmolLM2-135M, see README.md: latents at 2 and at 5 are within 2 % of each other.
BLOCK_RATES = Rates(latents=3.0, codes=1.5, vectors=4e-3)


class BlockTuning:
    """The tuning text on its way through the blocks, as they are stored and as they were, and their training on it.

    Each block reads what the stored ones before it give, and is trained towards the full-precision block's output on
    full-precision inputs. What judges are the held-out windows: a block that is no better there stays as it was.
    """

    def __init__(
        self,
        source: ModelSource,
        text: TuningText,
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        trained: Sequence[int],
        rotary: Rotary | None,
        effort: Effort,
        seed: int,
        device: torch.device,
    ) -> None:
        """Begin with what the first block reads, float32 [1, seqlen, hidden] for each window of `text`.

        `inputs` are embeddings as stored, of the windows `trained` and the held-out ones behind them, none without
        steps; `wanted` are those of full precision, of all. Both lie on the CPU, belong to this object and change.
        """
        self.text = text
        self._source = source
        self._hidden = inputs
        self.wanted = wanted
        self._targets = [wanted[window] for window in (*trained, *text.held_out)]
        self._judging = len(text.held_out)
        self._rotary = rotary
        self._effort = effort
        self._seed = seed
        self._device = device
        self._products = product_dtype(device)

    @torch.no_grad()
    def run(self, layer: int, stored: StoredBlock, told: Told) -> tuple[StoredBlock, list[float]]:
        """Train block `layer` and take the text through it.

        Returns it and its error (`BlockLoss`) on the held-out windows, before and after; without steps, `stored` itself
        and none. UsageError when training diverges.
        """
        self._advance_wanted(layer)
        if not self._hidden:
            return stored, []
        loss = block_loss(self._source, layer, self._device)
        block = self._block(stored, everything=True)
        training = len(self._hidden) - self._judging

        def judge() -> float:
            pairs = list(zip(self._hidden[training:], self._targets[training:], strict=True))
            losses = [float(loss(block.forward(x.to(self._device)), y.to(self._device))) for x, y in pairs]
            return sum(losses) / len(losses)

        before = judge()
        steps, each = self._effort.block_steps, self._effort.step_windows
        order = reading_order(range(training), each, steps, self._seed * 1_000_003 + layer)
        tune_block(block, loss, self._hidden, self._targets, BLOCK_RATES, order, self._device, told)
        after = judge()
        check_finite(after, f"block {layer}")
        if after < before:
            stored = block.result()
        else:
            after = before
        self._advance(self._block(stored), self._hidden)
        return stored, [before, after]

    @torch.no_grad()
    def skip(self, layer: int, stored: StoredBlock) -> None:
        """Take the text through a block that is finished."""
        self._advance_wanted(layer)
        self._advance(self._block(stored), self._hidden)

    def _block(self, stored: StoredBlock, *, everything: bool = False) -> TunedBlock:
        config = self._source.config
        return TunedBlock(config, stored, self._rotary, self._device, self._products, everything=everything)

    def _advance_wanted(self, layer: int) -> None:
        weights = {name: value.to(self._device) for name, value in self._source.layer(layer).items()}
        self._advance(QuickBlock(self._source.config, weights, self._rotary, self._products), self.wanted)

    def _advance(self, block: DecoderBlock, windows: Sequence[Tensor]) -> None:
        for window in windows:
            window.copy_(block.forward(window.to(self._device)))
