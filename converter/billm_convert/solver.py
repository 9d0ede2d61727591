"""BiLLM for one Linear: Algorithm 1, with 8-bit scales inside the loop. README.md maps every line to its function."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from billm_convert.binarize import BlockCodes, binarize_block, row_step
from billm_convert.hessian import factor_inverse
from billm_convert.salient import salience, select_columns
from billm_convert.solved import Searches, SolvedLinear, SolverSettings, check_problem, relative_errors
from billm_convert.split import Breakpoint, sparse_group
from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S
from billm_format.packing import PackedLinear, pack_bits


@dataclass(frozen=True)
class PaperSettings(SolverSettings):
    """What the paper leaves to choose, and from `breakpoint` on what serves comparisons and pictures."""

    breakpoint: Breakpoint = "magnitude"  # "percentile": deciles of the weights instead of tenths of the largest one
    search_on: Literal["weights", "salience"] = "weights"  # "salience": both searches on S, as the authors' code does
    compensation: Literal["quotient", "exact", "none"] = "quotient"  # "quotient": Algorithm 1, line 12
    splitting: bool = True  # False: one group of non-salient weights
    keep_searches: bool = False  # return what the searches saw


def solve_linear(weight: Tensor, hessian: Tensor, settings: PaperSettings | None = None) -> SolvedLinear:
    """Binarize `weight` [rows, cols] for inputs whose Hessian is `hessian` [cols, cols] (Algorithm 1).

    Works on the weight's device and in its dtype: float32, or float64 for comparisons. The same input gives the same
    bytes on the same machine. UsageError: values that are not finite, a Hessian that is none. ValueError: shapes.
    """
    settings = settings or PaperSettings()
    check_problem(weight, hessian)
    factor = factor_inverse(hessian, settings.damp)
    upper = factor.upper.to(weight)
    # The steps must be known before the first scale is rounded: a pass with unrounded scales finds the largest ones.
    largest = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for codes in _solve_blocks(weight, upper, settings, None):
        largest = torch.maximum(largest, _largest_scale(codes.scales))
    step = row_step(largest)
    searches = Searches() if settings.keep_searches else None
    codes = _join(list(_solve_blocks(weight, upper, settings, step, searches)))
    error, weight_error = relative_errors(weight, weight - codes.weight, hessian)
    columns = int(codes.salient.sum())
    sparse = int((codes.second & ~codes.salient).sum())
    return SolvedLinear(
        packed=_pack(codes, step, settings.block_size),
        weight=codes.weight.float() + 0.0,  # as a file has it: without negative zeros
        error=error,
        weight_error=weight_error,
        salient_fraction=columns / weight.shape[1],
        sparse_fraction=sparse / (weight.shape[0] * (weight.shape[1] - columns)),
        damp=factor.damp,
        searches=searches,
    )


def _solve_blocks(
    weight: Tensor, upper: Tensor, settings: PaperSettings, step: Tensor | None, searches: Searches | None = None
) -> Iterator[BlockCodes]:
    """Yield the blocks in column order, each solved on weights that make up for the blocks before it."""
    work = weight.clone()
    diagonal = upper.diagonal()
    cols = weight.shape[1]
    for start in range(0, cols, settings.block_size):
        stop = min(start + settings.block_size, cols)
        block = work[:, start:stop]
        sensitivity = salience(block, diagonal[start:stop])
        target = block if settings.search_on == "weights" else sensitivity
        curve = searches.salient if searches else None
        salient = select_columns(target, sensitivity, settings.min_salient, settings.max_salient, curve)
        sparse = torch.zeros_like(target)
        if settings.splitting:
            sparse = sparse_group(target, salient, settings.breakpoint, searches.split if searches else None)
        codes = binarize_block(block, salient, sparse, step)
        _compensate(work, block - codes.weight, upper, start, settings.compensation)
        yield codes


def _compensate(work: Tensor, delta: Tensor, upper: Tensor, start: int, kind: str) -> None:
    """Let the columns of `work` after a block make up for its error W - B (Algorithm 1, lines 12 and 13)."""
    stop = start + delta.shape[1]
    if kind == "none" or stop == work.shape[1]:
        return
    inner = upper[start:stop, start:stop]
    if kind == "quotient":
        error = delta / inner.diagonal()
    else:  # the least-squares answer: unlike the quotient it knows the correlations inside the block
        error = torch.linalg.solve_triangular(inner, delta, upper=True, left=False)
    work[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1)


def _largest_scale(scales: Tensor) -> Tensor:
    """Return the largest magnitude [rows] that the format makes of unrounded scales [rows, 4]."""
    salient = scales[:, ALPHA_O] + scales[:, ALPHA_R]
    return torch.maximum(torch.maximum(scales[:, ALPHA_C], scales[:, ALPHA_S]), salient)


def _join(blocks: list[BlockCodes]) -> BlockCodes:
    """Return the blocks as one of all columns, its scales [rows, blocks, 4]."""
    return BlockCodes(
        sign=torch.cat([codes.sign for codes in blocks], dim=1),
        second=torch.cat([codes.second for codes in blocks], dim=1),
        salient=torch.cat([codes.salient for codes in blocks]),
        scales=torch.stack([codes.scales for codes in blocks], dim=1),
        weight=torch.cat([codes.weight for codes in blocks], dim=1),
    )


def _pack(codes: BlockCodes, step: Tensor, block: int) -> PackedLinear:
    """Turn the codes of all columns into the arrays that the file holds."""
    rows, cols = codes.sign.shape
    return PackedLinear(
        rows=rows,
        cols=cols,
        block=block,
        sign=pack_bits(codes.sign.cpu().numpy()),
        second=pack_bits(codes.second.cpu().numpy()),
        salient=pack_bits(codes.salient.cpu().numpy()),
        scales=codes.scales.to(torch.uint8).cpu().numpy(),
        row_scale=step.cpu().numpy(),
    )
