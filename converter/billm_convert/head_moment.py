"""What 4-bit tables are solved for: the second moment of what the head multiplies, on some of the calibration text."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.block import DecoderBlock, Rotary, embed, finish
from billm_convert.embedding import EmbeddingTable
from billm_convert.embedding4 import HEAD_IDENTITY, TIED_IDENTITY, metric_of, solve_table
from billm_convert.hessian import HessianAccumulator
from billm_convert.source import ModelSource
from billm_convert.workdir import WorkFolder
from billm_format.packing import Table

_TOKENS = 8192  # of the calibration text, as whole windows: a table has few columns


def stored_table(source: ModelSource, name: str, bits: int, work: WorkFolder) -> EmbeddingTable:
    """Return "embed" or "head" as the file will hold it; at 4 bits, `solve_tables` must have been called."""
    parts = work.table(name) if bits == 4 else None
    solved = None if parts is None else Table(cols=source.shape(f"{name}.weight")[1], **parts)
    return EmbeddingTable(source, name, bits, solved)


def solve_tables(source: ModelSource, tokens: NDArray[np.int64], work: WorkFolder, device: torch.device) -> None:
    """Leave 4-bit embedding and head in the work folder, unless they are there; tokens [windows, seqlen]."""
    names = ["embed"] if source.config.tie_word_embeddings else ["embed", "head"]
    if all(work.table(name) is not None for name in names):
        return
    moment = head_moment(source, tokens[: max(1, _TOKENS // tokens.shape[1])], device)
    for name in names:
        if name == "embed" and len(names) == 2:
            metric = torch.eye(moment.shape[0], device=device)
        else:
            metric = metric_of(moment, HEAD_IDENTITY if name == "head" else TIED_IDENTITY)
        work.save_table(name, solve_table(source.tensor(f"{name}.weight"), metric))


@torch.inference_mode()
def head_moment(source: ModelSource, tokens: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return the mean of 2 h hᵀ, float32 [embedding_size, embedding_size], over all positions but the windows' first.

    h is what the full-precision model gives to its head, tokens [windows, seqlen]. The mean is left on the device.
    """
    config = source.config
    tables = {
        name: source.tensor(name).to(device)
        for name in source.names()
        if name.startswith(("pos_embed.", "project_", "final_norm."))
    }
    rows = EmbeddingTable(source, "embed", 16).lookup(torch.from_numpy(tokens))
    hidden = [embed(config, tables, window[None].to(device)) for window in rows]
    rotary = None
    if config.position == "rope":
        rotary = Rotary(source.tensor("rope.inv_freq").to(device), config.rope_scale, tokens.shape[1])
    for layer in range(config.num_hidden_layers):
        block = DecoderBlock(config, {name: value.to(device) for name, value in source.layer(layer).items()}, rotary)
        hidden = [block.forward(window) for window in hidden]
    moment = HessianAccumulator(config.embedding_size, device)
    for window in hidden:
        moment.add(finish(config, tables, window)[0, 1:])
    return moment.result()
