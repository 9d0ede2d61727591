"""How the error of a binarized model adds up: its hidden states beside the original's, block after block."""

from collections.abc import Mapping

import torch
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary
from billm_convert.source import ModelSource
from billm_convert.stored_block import StoredBlock
from billm_convert.tune_train import block_loss
from billm_convert.workdir import Kind, WorkFolder
from billm_format.config import Quantization


@torch.inference_mode()
def depth_errors(
    source: ModelSource, quantization: Quantization, work: WorkFolder, stages: Mapping[str, Kind], hidden: Tensor
) -> dict[str, list[float]]:
    """Return for each of `stages`, label -> kind of finished blocks, the hidden states' error behind every block.

    `hidden` float32 [windows, seqlen, hidden], on the device to compute on, is what the first block reads. Errors are
    relative and squared, of the states as the norm that reads them sees them (`BlockLoss`).
    """
    config = source.config
    rotary = None
    if config.position == "rope":
        frequencies = source.tensor("rope.inv_freq").to(hidden.device)
        rotary = Rotary(frequencies, config.rope_scale, hidden.shape[1])
    wanted, found = hidden, dict.fromkeys(stages, hidden)
    errors: dict[str, list[float]] = {label: [] for label in stages}
    for layer in range(config.num_hidden_layers):
        weights = {name: value.to(hidden.device) for name, value in source.layer(layer).items()}
        wanted = DecoderBlock(config, weights, rotary).forward(wanted)
        loss = block_loss(source, layer, hidden.device)
        for label, kind in stages.items():
            stored = StoredBlock.read(work, config, quantization, layer, kind).weights(hidden.device)
            found[label] = DecoderBlock(config, {**weights, **stored}, rotary).forward(found[label])
            errors[label].append(float(loss(found[label], wanted)))
    return errors
