"""The recipe "tuned": what a solver found, trained on some hundred windows of text towards the full-precision model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.block import Rotary, embed, finish
from billm_convert.embedding import EmbeddingTable, to_float16
from billm_convert.head_moment import stored_table
from billm_convert.job import Job
from billm_convert.settings import EFFORTS, Event
from billm_convert.tune_block import Rates, TunedModel
from billm_convert.tune_blocks import BlockTuning
from billm_convert.tune_text import TuningText
from billm_convert.tune_train import Trainer, check_finite, logit_distance, product_dtype, reading_order
from billm_format.config import ModelConfig

MODEL_RATES = Rates(vectors=3e-3)
_SAVE_EVERY = 20  # steps of the whole model between two savings of its state
_TELL_EVERY = 5

# number of windows to train on -> the text
Draw = Callable[[int], TuningText]


class Tuning:
    """Both trainings of one model. What is finished lies in the work folder and is not done again."""

    def __init__(self, job: Job) -> None:
        """Do nothing yet."""
        self._job = job
        self._source = job.source
        self._config = job.source.config
        self._effort = EFFORTS[job.settings.effort]
        self._seed = job.settings.seed
        self._device = job.device
        self._work = job.work
        self._products = product_dtype(job.device)

    def blocks(self, draw: Draw) -> BlockTuning | None:
        """Return what trains the blocks in turn; None where the text has been through all of them."""
        stored = self._work.tuning_text()
        if stored is not None and "ends" in stored:
            return None
        if stored is None:
            stored = {"tokens": draw(self._effort.all_windows).tokens}
            self._work.save_tuning_text(stored)
        text = TuningText(stored["tokens"])
        trained, _ = text.split(self._effort.block_windows, self._seed)
        inputs = self._first_inputs(text, stored=True)
        wanted = self._first_inputs(text, stored=False).all()
        return BlockTuning(
            self._source,
            text,
            [inputs[window] for window in (*trained, *text.held_out)] if trained else [],
            torch.split(wanted, 1),
            trained,
            self._rotary(text),
            self._effort,
            self._seed,
            self._device,
        )

    @torch.no_grad()
    def keep_targets(self, blocks: BlockTuning) -> None:
        """Store what full precision makes of the text, which has been through all blocks, just before the head."""
        tables = self._tables(stored=False)
        # float16 [windows, seqlen, embedding_size]
        ends = torch.cat([finish(self._config, tables, window.to(self._device)).cpu() for window in blocks.wanted])
        self._work.save_tuning_text({"tokens": blocks.text.tokens, "ends": to_float16("of final hidden states", ends)})

    def run(self) -> dict[str, Any]:
        """Train the model that `work` holds, leave the final blocks there, return what the record says.

        ValueError before `keep_targets`.
        """
        layers = self._config.num_hidden_layers
        if self._work.finished_blocks("final") == layers + 1:
            record: dict[str, Any] = self._work.block_record(layers, "final")
            return record
        stored = self._work.tuning_text()
        if stored is None or "ends" not in stored:
            raise ValueError("a model is trained when its blocks are: there are no targets yet")
        text = TuningText(stored["tokens"])
        record = {
            "block_steps": self._effort.block_steps,
            "model_steps": self._effort.model_steps,
            "step_windows": self._effort.step_windows,
            **text.describe(),
        }
        model, distances = self._run_model(text, stored["ends"])
        record |= distances
        for layer, block in enumerate(model.blocks):
            self._work.save_block(layer, block.result().tensors(layer), None, "final")
        self._work.save_block(layers, model.final_norm(), record, "final")
        return record

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
        return stored_table(self._source, name, self._job.quantization.embedding_bits, self._work)

    # --- the whole model ---------------------------------------------------------------------------------------------

    def _run_model(self, text: TuningText, wanted: NDArray[np.float16]) -> tuple[TunedModel, dict[str, float]]:
        """Train all vectors at once towards `wanted`; return the model and its losses.

        `wanted` float16 [windows, seqlen, embedding_size] is what full precision has just before the head. The state is
        saved every few steps, and taken up where it was saved last.
        """
        tables, rotary = self._tables(stored=True), self._rotary(text)
        model = TunedModel(
            self._config,
            map(self._job.stored, range(self._config.num_hidden_layers)),
            tables,
            rotary,
            self._device,
            self._products,
        )
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
                check_finite(loss, f"step {trainer.step}")
                torch.autograd.backward(hidden, gradient.div_(len(windows)))
                total += loss / len(windows)
            return total

        steps = self._effort.model_steps
        _, windows = text.split(self._effort.block_windows, self._seed)
        order = reading_order(windows, self._effort.step_windows, steps, self._seed * 1_000_003 - 1)
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
            self._job.progress(Event("tuning model", trainer.step, steps, told))
            if trainer.step % _SAVE_EVERY == 0 and trainer.step < steps:
                self._work.save_training(trainer.state(), {"step": trainer.step, "before": before})
        return model, {"kl_before": before, "kl_after": judge()}


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
