"""All decoder blocks, one in memory at a time, each on what the finished ones before it give."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary
from billm_convert.figures import LinearFigures, linear_figures, save_figures
from billm_convert.recipes import choose_recipe
from billm_convert.settings import (
    FOLLOWED,
    ConvertSettings,
    Event,
    LinearReport,
    Progress,
)
from billm_convert.source import ModelSource
from billm_convert.stored_block import StoredBlock
from billm_convert.streams import FollowedStream, Inputs, Stream, Told
from billm_convert.tune_blocks import BlockTuning
from billm_convert.workdir import WorkFolder
from billm_format.config import Quantization
from billm_format.errors import UsageError


class Binarizing:
    """Leaves finished blocks in the work folder, and does not do those again that are there."""

    def __init__(
        self,
        source: ModelSource,
        quantization: Quantization,
        settings: ConvertSettings,
        device: torch.device,
        work: WorkFolder,
        progress: Progress,
    ) -> None:
        """Take up what the work folder holds."""
        self._source = source
        self._config = source.config
        self._quantization = quantization
        self._settings = settings
        self._device = device
        self._work = work
        self._progress = progress
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
            frequencies = self._source.tensor("rope.inv_freq").to(self._device)
            rotary = Rotary(frequencies, self._config.rope_scale, hidden.shape[1])
        followed = self._settings.recipe in FOLLOWED
        make = partial(FollowedStream, quick=True, again=tuning is not None) if followed else Stream
        stream: Stream = make(self._config, hidden, batch, self._device, place)
        for layer in range(layers):
            weights = {name: value.to(self._device) for name, value in self._source.layer(layer).items()}
            block = DecoderBlock(self._config, weights, rotary)
            original = DecoderBlock(self._config, dict(weights), rotary) if followed else block
            last = layer + 1 == layers
            if layer < self._finished:
                stored = self._stored(layer)
                weights |= stored.weights(self._device)
                stream.advance(block, original, self._told(layer, 0, 1))
                if tuning:
                    tuning.skip(layer, stored)
            elif tuning and isinstance(stream, FollowedStream):
                groups = stream.inputs(block, original, self._told(layer, 0, 0.25))
                solved, reports = self._solve(layer, groups, weights)
                stored, errors = tuning.run(layer, solved, self._told(layer, 0.25, 0.9))
                self._keep(layer, stored, reports, errors)
                changed = stored is not solved
                stream.advance(block, original, self._told(layer, 0.9, 0.95 if changed else 1))
                if changed:
                    weights |= stored.weights(self._device)
                    stream.retrace(block, self._told(layer, 0.95, 1))
            else:
                groups = stream.inputs(block, original, self._told(layer, 0, 0.7))
                self._keep(layer, *self._solve(layer, groups, weights))
                if not last:
                    stream.advance(block, original, self._told(layer, 0.7, 1))
            if not (last or stream.finite()):
                what = f"the hidden states after block {layer} are not finite"
                raise UsageError(f"{what}: the model cannot be calibrated")

    def _stored(self, layer: int) -> StoredBlock:
        tensors = {name: self._work.block_tensor(layer, name) for name in self._work.block_names(layer)}
        return StoredBlock.of_tensors(self._config, self._quantization, layer, tensors)

    def _solve(
        self, layer: int, groups: Iterator[Inputs], weights: dict[str, Tensor]
    ) -> tuple[StoredBlock, list[LinearReport]]:
        """Binarize the block's Linears on what they read, and put them in the originals' place in `weights`."""
        recipe = choose_recipe(self._settings, lambda linear: self._quantization.block_of(f"layers.{layer}.{linear}"))
        norms = {name: value.cpu().numpy() for name, value in weights.items() if "norm" in name}
        packed = {}
        reports = {}
        figures: dict[str, LinearFigures] = {}
        for inputs in groups:
            originals = [weights[f"{linear}.weight"] for linear in inputs.linears]
            together = recipe(originals, inputs)
            for linear, original, solved in zip(inputs.linears, originals, together, strict=True):
                name = f"layers.{layer}.{linear}"
                if self._settings.report:
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
            save_figures(self._work, layer, figures)  # before the block: a finished one has its figures
        return StoredBlock(packed, norms), [reports[linear] for linear in self._config.linears()]

    def _keep(self, layer: int, stored: StoredBlock, reports: list[LinearReport], errors: Sequence[float] = ()) -> None:
        """Store a finished block."""
        record = {"linears": [vars(report) for report in reports], "errors": list(errors)}
        self._work.save_block(layer, stored.tensors(layer), record)
        self.linears += reports
        self.errors.append(list(errors))
        self._step(layer, 0.9 if errors else 0.7, tuple(reports))

    def _told(self, layer: int, start: float, stop: float) -> Told:
        """Return what reports a share of the work between two shares of a block."""
        return lambda share: self._step(layer, start + (stop - start) * share)

    def _step(self, layer: int, share: float, linears: tuple[LinearReport, ...] = ()) -> None:
        self._progress(Event("blocks", layer + share, self._config.num_hidden_layers, linears=linears))
