"""The recipe "tuned": what a solver found, trained on some hundred windows of text towards the full-precision model."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary, embed, finish
from billm_convert.embedding import EmbeddingTable, to_float16
from billm_convert.head_moment import stored_table
from billm_convert.settings import EFFORTS, ConvertSettings, Event, Progress
from billm_convert.source import ModelSource
from billm_convert.tune_block import (
    BlockStart,
    QuickBlock,
    Rates,
    TunedBlock,
    TunedModel,
    block_start,
    block_tensors,
)
from billm_convert.tune_linear import in_steps
from billm_convert.tune_text import HELD_OUT, TuningText
from billm_convert.tune_train import Trainer, block_loss, logit_distance, product_dtype, tune_block
from billm_convert.workdir import Kind, WorkFolder
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import UsageError

# Measured on SmolLM2-135M, in the steps of today's levels of 8 bits. Block 14, held-out error after 50 steps, 0.1005
# before: 0.0936 with latents kept, 0.0887 with latents at 8 and 0.0912 at 16; from the levels instead of the original
# weights 0.0911; with torch's own epsilon in AdamW 0.0897.
BLOCK_RATES = Rates(latents=8.0, codes=0.8, vectors=2e-3)
MODEL_RATES = Rates(vectors=3e-3)
_SAVE_EVERY = 20  # steps of the whole model between two savings of its state
_TELL_EVERY = 5

# number of windows to train on -> the text
Draw = Callable[[int], TuningText]


class Tuning:
    """Both trainings of one model. What is finished lies in the work folder and is not done again."""

    def __init__(
        self,
        source: ModelSource,
        quantization: Quantization,
        settings: ConvertSettings,
        device: torch.device,
        work: WorkFolder,
        progress: Progress,
    ) -> None:
        """Start from the blocks that the solver has left in `work`."""
        self._source = source
        self._config = source.config
        self._quantization = quantization
        self._effort = EFFORTS[settings.effort]
        self._seed = settings.seed
        self._device = device
        self._work = work
        self._progress = progress
        self._products = product_dtype(device)

    def run(self, draw: Draw) -> dict[str, Any]:
        """Train what is not trained yet, leave the final blocks in the work folder, return what the record says."""
        layers = self._config.num_hidden_layers
        if self._work.finished_blocks("final") == layers + 1:
            record: dict[str, Any] = self._work.block_record(layers, "final")
            return record
        stored = self._work.tuning_text()
        if stored is None:
            text = draw(self._effort.windows)
            stored = {"tokens": text.tokens, "ends": self._run_blocks(text)}
            self._work.save_tuning_text(stored)
        text = TuningText(stored["tokens"])
        record = {
            "block_steps": self._effort.block_steps,
            "model_steps": self._effort.model_steps,
            "step_windows": self._effort.step_windows,
            **text.describe(),
            "block_errors": [self._work.block_record(i, "tuned") for i in range(self._work.finished_blocks("tuned"))],
        }
        final_norm: dict[str, NDArray[np.float32]] = {}
        if self._effort.model_steps:
            model, distances = self._run_model(text, stored["ends"])
            record |= distances
            final_norm = model.final_norm()
            blocks: Iterable[BlockStart] = (block.result() for block in model.blocks)
        else:
            blocks = self._blocks()
        for layer, block in enumerate(blocks):
            self._work.save_block(layer, block_tensors(layer, block), None, "final")
        self._work.save_block(layers, final_norm, record, "final")
        return record

    def _blocks(self) -> Iterator[BlockStart]:
        """Yield the blocks as the whole model's training finds them."""
        kind: Kind = "tuned" if self._effort.block_steps else "block"
        for layer in range(self._config.num_hidden_layers):
            yield self._load(layer, kind)

    def _load(self, layer: int, kind: Kind) -> BlockStart:
        names = self._work.block_names(layer, kind)
        tensors = {name: self._work.block_tensor(layer, name, kind) for name in names}
        return block_start(self._config, self._quantization, layer, tensors)

    # --- block by block ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run_blocks(self, text: TuningText) -> NDArray[np.float16]:
        """Train block after block, each on what the tuned ones before it give.

        Returns what full precision makes of the text, just before the head: float16 [windows, seqlen, embedding_size].
        """
        wanted = self._first_inputs(text, stored=False).all()
        trained = self._trained_windows(text)
        inputs = self._first_inputs(text, stored=True)
        hidden = torch.cat([inputs[window] for window in trained]) if trained else None
        layers = self._config.num_hidden_layers
        finished = self._work.finished_blocks("tuned")
        for layer in range(layers):
            weights = {name: value.to(self._device) for name, value in self._source.layer(layer).items()}
            self._advance(QuickBlock(self._config, weights, self._rotary(text), self._products), wanted)
            told = ""
            if hidden is not None:
                block = self._trainable(text, layer, "tuned" if layer < finished else "block")
                if layer >= finished:
                    block, errors = self._tune_block(text, layer, block, hidden, wanted[trained])
                    self._work.save_block(layer, block_tensors(layer, block.result()), errors, "tuned")
                    told = f"error {errors[0]:.4f} -> {errors[1]:.4f}"
                self._advance(block, hidden)
            self._progress(Event("tuning blocks" if trained else "targets", layer + 1, layers, told))
        tables = self._tables(stored=False)
        ends = [finish(self._config, tables, window.to(self._device)).cpu() for window in wanted]
        return to_float16("of final hidden states", torch.stack(ends))

    def _trained_windows(self, text: TuningText) -> list[int]:
        """Return the windows that blocks are tuned on, and the held-out ones behind them; none without block steps."""
        read = self._effort.block_steps * self._effort.step_windows
        return [*range(min(text.training, read)), *text.held_out] if read else []

    def _trainable(self, text: TuningText, layer: int, kind: Kind) -> TunedBlock:
        """Return a block of which everything can be trained; latents begin near the original weights."""
        start, weights = self._load(layer, kind), self._source.layer(layer)
        hints = {name: in_steps(weights[f"{name}.weight"], linear) for name, linear in start.linears.items()}
        return TunedBlock(self._config, start, self._rotary(text), self._device, self._products, hints)

    def _tune_block(
        self, text: TuningText, layer: int, block: TunedBlock, hidden: Tensor, wanted: Tensor
    ) -> tuple[TunedBlock, list[float]]:
        """Train one block to turn `hidden` into `wanted`; return it and its held-out error before and after.

        Where that is no better, the block comes back as it was.
        """
        loss = block_loss(self._source, layer, self._device)
        training = len(hidden) - HELD_OUT

        def judge() -> float:
            output = block.forward(hidden[training:].to(self._device))
            return float(loss(output, wanted[training:].to(self._device)))

        before = judge()
        order = self._order(training, self._effort.block_steps, layer)
        tune_block(block, loss, hidden, wanted, BLOCK_RATES, order)
        after = judge()
        _check_finite(after, f"block {layer}")
        if after < before:
            return block, [before, after]
        return self._trainable(text, layer, "block"), [before, before]

    def _advance(self, block: DecoderBlock, hidden: Tensor) -> None:
        for windows in torch.split(hidden, self._effort.step_windows):
            windows.copy_(block.forward(windows.to(self._device)))

    def _order(self, windows: int, steps: int, salt: int) -> list[list[int]]:
        """Return which windows each step reads: all of them in a random order, then all in another."""
        rng = random.Random(self._seed * 1_000_003 + salt)
        order: list[int] = []
        each = self._effort.step_windows
        while len(order) < steps * each:
            order += rng.sample(range(windows), windows)
        return [order[step * each : (step + 1) * each] for step in range(steps)]

    # --- tables ------------------------------------------------------------------------------------------------------

    def _rotary(self, text: TuningText) -> Rotary | None:
        if self._config.position != "rope":
            return None
        return Rotary(
            self._source.tensor("rope.inv_freq").to(self._device), self._config.rope_scale, text.tokens.shape[1]
        )

    def _tables(self, *, stored: bool) -> dict[str, Tensor]:
        """Return what stands before and behind the blocks, embedding and head apart; `stored`: as in the file."""
        out = {}
        for name in self._source.names():
            if name.startswith(("pos_embed.", "project_", "final_norm.")):
                value = self._source.tensor(name)
                if stored and not name.startswith("final_norm."):
                    value = torch.from_numpy(to_float16(name, value).astype(np.float32))
                out[name] = value.to(self._device)
        return out

    def _first_inputs(self, text: TuningText, *, stored: bool) -> "_FirstInputs":
        """Return the first block's inputs, from the tables as the file holds them or in (nearly) full precision."""
        table = self._table("embed") if stored else EmbeddingTable(self._source, "embed", 16)
        tables = {name: value.cpu() for name, value in self._tables(stored=stored).items()}
        return _FirstInputs(self._config, table, tables, text)

    def _head(self, *, stored: bool) -> Tensor:
        """Return the output head float32 [vocab, embedding_size]."""
        name = "embed" if self._config.tie_word_embeddings else "head"
        value = self._table(name).dequantized() if stored else self._source.tensor(f"{name}.weight")
        return value.to(self._device, self._products)

    def _table(self, name: str) -> EmbeddingTable:
        return stored_table(self._source, name, self._quantization.embedding_bits, self._work)

    # --- the whole model ---------------------------------------------------------------------------------------------

    def _run_model(self, text: TuningText, wanted: NDArray[np.float16]) -> tuple[TunedModel, dict[str, float]]:
        """Train all vectors at once towards `wanted`, as `_run_blocks` returned it; return the model and its losses.

        The state is saved every few steps, and taken up where it was saved last.
        """
        tables, rotary = self._tables(stored=True), self._rotary(text)
        model = TunedModel(self._config, self._blocks(), tables, rotary, self._device, self._products)
        inputs = self._first_inputs(text, stored=True)
        heads = self._head(stored=True), self._head(stored=False)

        def distance(window: int) -> tuple[float, Tensor, Tensor]:
            hidden = model.hidden(inputs[window].to(self._device))[0]
            goal = torch.from_numpy(wanted[window]).to(self._device)
            return (*logit_distance(hidden.detach(), goal, *heads), hidden)

        def judge() -> float:
            with torch.no_grad():
                return sum(distance(window)[0] for window in text.held_out) / len(text.held_out)

        def learn(windows: Sequence[int]) -> float:
            """Add a step's gradients, window by window: that bounds the memory of activations; return its loss."""
            total = 0.0
            for window in windows:
                loss, gradient, hidden = distance(window)
                _check_finite(loss, f"step {trainer.step}")
                torch.autograd.backward(hidden, gradient.div_(len(windows)))
                total += loss / len(windows)
            return total

        steps = self._effort.model_steps
        order = self._order(text.training, steps, -1)
        trainer = Trainer(model.blocks, model.vectors(), MODEL_RATES, steps)
        saved = self._work.training()
        if saved is None:
            before = judge()
        else:
            trainer.load(saved[0], saved[1]["step"])
            before = saved[1]["before"]
        losses: list[float] = []
        while trainer.step < steps:
            losses = [*losses, learn(order[trainer.step])][-_TELL_EVERY:]
            trainer.update()
            told = f"KL {sum(losses) / len(losses):.3f}" if trainer.step % _TELL_EVERY == 0 else ""
            self._progress(Event("tuning model", trainer.step, steps, told))
            if trainer.step % _SAVE_EVERY == 0 and trainer.step < steps:
                self._work.save_training(trainer.state(), {"step": trainer.step, "before": before})
        return model, {"kl_before": before, "kl_after": judge()}


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise UsageError(f"training failed at {where}: the loss is not finite; take another text or another recipe")


class _FirstInputs:
    """What the first block reads, window by window, on the CPU: only the embeddings that occur are kept."""

    def __init__(
        self, config: ModelConfig, table: EmbeddingTable, tables: Mapping[str, Tensor], text: TuningText
    ) -> None:
        self._config = config
        self._tables = tables
        occurring, self._where = torch.unique(torch.from_numpy(text.tokens), return_inverse=True)
        self._rows = table.lookup(occurring)

    def __getitem__(self, window: int) -> Tensor:
        """Return float32 [1, seqlen, hidden]."""
        return embed(self._config, self._tables, self._rows[self._where[window]][None])

    def all(self) -> Tensor:
        """Return every window's, float32 [windows, seqlen, hidden]."""
        first = self[0]
        out = first.new_empty(len(self._where), *first.shape[1:])
        for window, place in enumerate(out):
            place.copy_(self[window][0])
        return out
