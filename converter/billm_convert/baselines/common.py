"""What the rival methods share: their settings and result, GPTQ's error feedback, and masked binarization."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from billm_convert.hessian import factor_inverse
from billm_format.errors import UsageError


@dataclass(frozen=True)
class BaselineSettings:
    """What all methods leave to choose."""

    block_size: int = 128  # columns that share scales; GPTQ's group
    damp: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that cannot be used."""
        if self.block_size < 1:
            raise UsageError(f"block size {self.block_size}: wanted 1 or more")
        if not 0 <= self.damp <= 1:
            raise UsageError(f"dampening {self.damp:g}: wanted a share of the mean diagonal, 0 to 1")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as a method would store it, dequantized, and its size in bits per weight."""

    weight: Tensor  # [rows, cols] in the dtype of the original
    bits_paper: float  # as the method's own paper counts
    bits_stored: float  # everything: codes, masks, scales, means


def prepare(weight: Tensor, hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return a copy of the weight [rows, cols] to work on, and the upper factor [cols, cols] of the inverse Hessian.

    As GPTQ's code does, which all of these methods build on: inputs that are always zero lose their weights.
    """
    dead = hessian.diagonal() == 0
    matrix = hessian.to(torch.float64)
    if bool(dead.any()):
        # Any positive number will do; the mean leaves the dampening of the others as it was.
        live = matrix.diagonal()[~dead]
        filler = live.mean() if len(live) else torch.ones((), dtype=matrix.dtype, device=matrix.device)
        matrix = matrix + torch.diag(dead * filler)
    work = weight.clone()
    work[:, dead] = 0
    return work, factor_inverse(matrix, damp).upper.to(weight)


def feed_back(
    work: Tensor,
    upper: Tensor,
    block_size: int,
    quantize: Callable[[int, Tensor], Tensor],
    begin_block: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Quantize column by column, each error made up for by the columns that follow (GPTQ); changes `work`.

    `quantize(j, column)` gets the column [rows] as it is then; `begin_block` gets each block before its first column.
    """
    out = torch.empty_like(work)
    for start in range(0, work.shape[1], block_size):
        block = work[:, start : start + block_size]
        stop = start + block.shape[1]
        if begin_block:
            begin_block(block)
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            column = block[:, i].clone()
            out[:, start + i] = quantize(start + i, column)
            errors[:, i] = (column - out[:, start + i]) / upper[start + i, start + i]
            block[:, i:] -= torch.outer(errors[:, i], upper[start + i, start + i : stop])
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return out


def compensate_blocks(
    work: Tensor, upper: Tensor, block_size: int, quantize: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Quantize block by block, the blocks that follow making up for the error as BiLLM has it; changes `work`.

    `quantize(block, diagonal)` gets a block [rows, n] as it is then and its part of the factor's diagonal [n].
    """
    out = torch.empty_like(work)
    for start in range(0, work.shape[1], block_size):
        stop = min(start + block_size, work.shape[1])
        diagonal = upper.diagonal()[start:stop]
        block = work[:, start:stop]
        out[:, start:stop] = quantize(block, diagonal)
        work[:, stop:] -= ((block - out[:, start:stop]) / diagonal) @ upper[start:stop, stop:]
    return out


def masked_mean(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the mean of x [rows, n] where the bool `mask` holds, along `dim`, which is kept; 0 where it never does."""
    return torch.where(mask, x, 0).sum(dim, keepdim=True) / mask.sum(dim, keepdim=True).clamp(min=1)


def blocks_per_column(cols: int, block_size: int) -> float:
    """Return the number of blocks over the number of columns: what one value per row and block costs a weight."""
    return -(-cols // block_size) / cols
