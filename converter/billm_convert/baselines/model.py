"""A whole model by a rival method: a Hugging Face folder in float16, which transformers runs like the original.

Blocks are calibrated one after the other on the quantized ones before, as in a conversion, and each is a shard of the
folder as soon as it is done: a run that was interrupted goes on there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from billm_convert.baselines import Baseline, BaselineSettings
from billm_convert.block import DecoderBlock, Rotary, embed, input_groups
from billm_convert.embedding import to_float16
from billm_convert.families import hf_name
from billm_convert.hessian import HessianAccumulator
from billm_convert.source import ModelSource
from billm_format.errors import UsageError

_INDEX = "model.safetensors.index.json"
_SMALL_FILES = {".json", ".jinja", ".model", ".txt"}


def fake_quantize(
    source: ModelSource,
    tokens: NDArray[np.int64],
    baseline: Baseline,
    settings: BaselineSettings,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[float, float]:
    """Write the model that `baseline` makes of `source`, a Hugging Face folder, and return its bits per weight.

    `tokens` [windows, seqlen] calibrate; embeddings, head and norms stay as they are. The bits are those of the Linears
    as the method's paper counts and with everything stored. `progress` is called with blocks done and blocks in all.
    Whoever goes on with a folder must give the same arguments. UsageError for a model that is no such folder.
    """
    if not source.path.is_dir():
        raise UsageError(f"{source.path}: wanted a Hugging Face model folder")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(source, tokens, baseline, settings, folder, device)
    layers = source.config.num_hidden_layers
    for layer in range(layers):
        run.block(layer)
        progress(layer + 1, layers)
    run.finish()
    return _mean_bits(folder, layers)


class _Run:
    """The hidden states of the calibration text, moving from block to block."""

    def __init__(
        self,
        source: ModelSource,
        tokens: NDArray[np.int64],
        baseline: Baseline,
        settings: BaselineSettings,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._source, self._config, self._folder, self._device = source, source.config, folder, device
        self._baseline, self._settings = baseline, settings
        self._rotary = None
        if self._config.position == "rope":
            frequencies = source.tensor("rope.inv_freq").to(device)
            self._rotary = Rotary(frequencies, self._config.rope_scale, tokens.shape[1])
        tables = {n: source.tensor(n) for n in source.names() if n.startswith(("project_in.", "pos_embed."))}
        rows = source.tensor("embed.weight")[torch.from_numpy(tokens)]
        self._hidden = embed(self._config, tables, rows).contiguous()

    @torch.inference_mode()
    def block(self, layer: int) -> None:
        """Quantize a block, or take it from its shard, and run the calibration text through it."""
        weights = {name: value.to(self._device) for name, value in self._source.layer(layer).items()}
        block = DecoderBlock(self._config, weights, self._rotary)
        shard = _shard(self._folder, layer)
        names = {name: self._stored_name(f"layers.{layer}.{name}") for name in self._kept(list(weights))}
        if not shard.exists():
            bits = self._solve(block, weights)
            stored = {stored: _half(name, weights[name]) for name, stored in names.items()}
            _save(stored, shard, {"format": "pt", "bits": json.dumps(bits)})
        # From the shard either way: the blocks that follow see its float16 whether this one is new or not.
        stored = load_file(shard)
        weights.update({name: stored[names[name]].float().to(self._device) for name in names})
        for window in torch.split(self._hidden, 1):
            window.copy_(block.forward(window.to(self._device)))

    def _solve(self, block: DecoderBlock, weights: dict[str, Tensor]) -> list[tuple[int, float, float]]:
        """Put quantized weights in the originals' place; return (weights, bits of the paper, bits stored) of each."""
        hessians = {
            group: HessianAccumulator(self._config.linears()[linears[0]][1], self._device)
            for group, linears in input_groups(self._config).items()
        }
        for window in torch.split(self._hidden, 1):
            block.observe(window.to(self._device), lambda group, x: hessians[group].add(x))
        bits = []
        for group, linears in input_groups(self._config).items():
            hessian = hessians.pop(group).result()
            for linear in linears:
                found = self._baseline(weights[f"{linear}.weight"], hessian, self._settings)
                weights[f"{linear}.weight"] = found.weight
                bits.append((found.weight.numel(), found.bits_paper, found.bits_stored))
        return bits

    def finish(self) -> None:
        """Add what is not in a block, the index of the shards and the small files: now the folder is a model."""
        rest = _shard(self._folder, self._config.num_hidden_layers)
        names = [n for n in self._kept(self._source.names()) if not n.startswith("layers.")]
        outside = {self._stored_name(name): _half(name, self._source.tensor(name)) for name in names}
        _save(outside, rest, {"format": "pt"})
        where: dict[str, str] = {}
        for layer in range(self._config.num_hidden_layers + 1):
            shard = _shard(self._folder, layer)
            with safe_open(shard, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), shard.name)
        for file in self._source.files():
            if file.suffix in _SMALL_FILES and not file.name.endswith(".index.json"):
                shutil.copy(file, self._folder / file.name)
        (self._folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    def _kept(self, names: list[str]) -> list[str]:
        """Return the names of tensors that a checkpoint has."""
        plain = self._source.family.plain_norms
        return [name for name in names if name != "rope.inv_freq" and not (plain and "norm." in name)]

    def _stored_name(self, name: str) -> str:
        opt = self._config.family == "opt"
        return "lm_head.weight" if name == "head.weight" else f"model.{'decoder.' * opt}{hf_name(name, opt=opt)}"


def is_finished(folder: Path) -> bool:
    """Return whether a run of `fake_quantize` has come to its end there."""
    return (folder / _INDEX).exists()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}.safetensors"


def _half(name: str, value: Tensor) -> Tensor:
    return torch.from_numpy(to_float16(name, value.cpu())).contiguous()


def _save(tensors: dict[str, Tensor], shard: Path, metadata: dict[str, str]) -> None:
    """Write a shard under another name first: it is whole or not there."""
    unfinished = shard.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.rename(shard)


def _mean_bits(folder: Path, layers: int) -> tuple[float, float]:
    """Return the Linears' mean bits per weight, weighted by their sizes."""
    figures: list[tuple[int, float, float]] = []
    for layer in range(layers):
        with safe_open(_shard(folder, layer), framework="pt") as file:
            figures += json.loads(file.metadata()["bits"])
    total = sum(size for size, _, _ in figures)
    paper, stored = (sum(figure[0] * figure[column] for figure in figures) / total for column in (1, 2))
    return paper, stored
