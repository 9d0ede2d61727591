"""All decoder blocks, one in memory at a time, each on what the finished ones before it give."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary
from billm_convert.figures import LinearFigures, linear_figures, save_figures
from billm_convert.job import Job
from billm_convert.recipes import choose_recipe
from billm_convert.settings import FOLLOWED, Event, LinearReport
from billm_convert.stored_block import StoredBlock
from billm_convert.streams import FollowedStream, Inputs, Stream, Told
from billm_convert.tune_blocks import BlockTuning
from billm_format.errors import UsageError


class Binarizing:
    """Leaves finished blocks in the work folder, and does not do those again that are there."""

    def __init__(self, job: Job) -> None:
        """Take up what the work folder holds."""
        self._job = job
        self._config = job.source.config
        work = job.work
        self._finished = work.finished_blocks()
        records = [work.block_record(layer) for layer in range(self._finished)]
        self.linears = [LinearReport(**linear) for record in records for linear in record["linears"]]
        # Of each block, before and after its own training, on the windows that judge; empty where there was none.
        self.errors: list[list[float]] = [record["errors"] for record in records]

    @torch.no_grad()  # not inference_mode: training reads what is made here
    def run(self, hidden: Tensor, batch: int, place: torch.device, tuning: BlockTuning | None) -> None:
        """Binarize every block, and train it in turn with `tuning`.

        `hidden` float32 [windows, seqlen, hidden] is what the first block reads; `batch` windows go through one at
        once; `place` is where hidden states are kept. UsageError for a model or a text that cannot be calibrated.
        """
        layers = self._config.num_hidden_layers
        rotary = None
        if self._config.position == "rope":
            frequencies = self._job.source.tensor("rope.inv_freq").to(self._job.device)
            rotary = Rotary(frequencies, self._config.rope_scale, hidden.shape[1])
        followed = self._job.settings.recipe in FOLLOWED
        make = partial(FollowedStream, quick=True, again=tuning is not None) if followed else Stream
        stream: Stream = make(self._config, hidden, batch, self._job.device, place)
        for layer in range(layers):
            weights = {name: value.to(self._job.device) for name, value in self._job.source.layer(layer).items()}
            block = DecoderBlock(self._config, weights, rotary)
            original = DecoderBlock(self._config, dict(weights), rotary) if followed else block
            if layer < self._finished:
                stored = self._job.stored(layer)
                weights |= stored.weights(self._job.device)
                stream.advance(block, original, self._told(layer, 0, 1))
                if tuning:
                    tuning.skip(layer, stored)
            else:
                self._replace(layer, stream, block, original, weights, tuning)
            if not stream.finite():
                what = f"the hidden states after block {layer} are not finite"
                raise UsageError(f"{what}: the model cannot be calibrated")

    def _replace(
        self,
        layer: int,
        stream: Stream,
        block: DecoderBlock,
        original: DecoderBlock,
        weights: dict[str, Tensor],
        tuning: BlockTuning | None,
    ) -> None:
        """Binarize a block, whose `weights` change, train it, keep it, and take the text through it."""
        solving, training = (0.25, 0.9) if tuning else (0.7, 0.7)  # shares of the work, when they are done
        solved, reports = self._solve(layer, stream.inputs(block, original, self._told(layer, 0, solving)), weights)
        stored, errors = solved, list[float]()
        if tuning:
            stored, errors = tuning.run(layer, solved, self._told(layer, solving, training))
        self._keep(layer, stored, reports, errors)
        self._step(layer, training, tuple(reports))
        if layer + 1 == self._config.num_hidden_layers:
            return
        changed = stored is not solved
        stream.advance(block, original, self._told(layer, training, 0.95 if changed else 1))
        if changed and isinstance(stream, FollowedStream):
            weights |= stored.weights(self._job.device)
            stream.retrace(block, self._told(layer, 0.95, 1))

    def _solve(
        self, layer: int, groups: Iterator[Inputs], weights: dict[str, Tensor]
    ) -> tuple[StoredBlock, list[LinearReport]]:
        """Binarize the block's Linears on what they read, and put them in the originals' place in `weights`."""
        recipe = choose_recipe(
            self._job.settings, lambda linear: self._job.quantization.block_of(f"layers.{layer}.{linear}")
        )
        norms = {name: value.cpu().numpy() for name, value in weights.items() if "norm" in name}
        packed = {}
        reports = {}
        figures: dict[str, LinearFigures] = {}
        for inputs in groups:
            originals = [weights[f"{linear}.weight"] for linear in inputs.linears]
            together = recipe(originals, inputs)
            for linear, original, solved in zip(inputs.linears, originals, together, strict=True):
                name = f"layers.{layer}.{linear}"
                if self._job.settings.report:
                    figures[name] = linear_figures(original, inputs.hessian, solved.searches)
                bias = weights.get(f"{linear}.bias")
                packed[linear] = replace(solved.packed, bias=None if bias is None else bias.cpu().numpy())
                weights[f"{linear}.weight"] = solved.weight
                reports[linear] = LinearReport(
                    name=name,
                    error=solved.error,
                    weight_error=solved.weight_error,
                    salient=solved.salient_fraction,
                    sparse=solved.sparse_fraction,
                    damp=solved.damp,
                )
        if figures:
            save_figures(self._job.work, layer, figures)  # before the block: a finished one has its figures
        return StoredBlock(packed, norms), [reports[linear] for linear in self._config.linears()]

    def _keep(self, layer: int, stored: StoredBlock, reports: list[LinearReport], errors: list[float]) -> None:
        """Store a finished block."""
        record = {"linears": [vars(report) for report in reports], "errors": errors}
        self._job.work.save_block(layer, stored.tensors(layer), record)
        self.linears += reports
        self.errors.append(errors)

    def _told(self, layer: int, start: float, stop: float) -> Told:
        """Return what reports a share of the work between two shares of a block."""
        return lambda share: self._step(layer, start + (stop - start) * share)

    def _step(self, layer: int, share: float, linears: tuple[LinearReport, ...] = ()) -> None:
        then = "the whole model is tuned" if self._job.settings.recipe == "tuned" else ""
        self._job.progress(Event("blocks", layer + share, self._config.num_hidden_layers, linears=linears, then=then))
