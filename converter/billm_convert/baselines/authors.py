"""BiLLM as its authors' published code computes it, which is not what the paper says: see `converter/README.md`."""

import torch
from torch import Tensor

from billm_convert.baselines.common import (
    BaselineSettings,
    QuantizedWeight,
    blocks_per_column,
    compensate_blocks,
    masked_mean,
    prepare,
)

_MOST_COLUMNS = 50  # one more than are tried
_VALUES = 7  # stored per row and block: a mean and a scale of both groups; two scales and a mean of the salient columns


def billm_as_published(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    """Binarize with means: salient columns twice, the others in two groups; masks and searches on w² / diag(H^c)²."""
    work, upper = prepare(weight, hessian, settings.damp)
    salient_columns = 0

    def quantize(block: Tensor, diagonal: Tensor) -> Tensor:
        nonlocal salient_columns
        sensitivity = block**2 / diagonal**2
        salient = salient_columns_of(sensitivity)
        # Quantiles of the whole block, salient columns counting as zeros: that is what the code takes.
        border = group_border(sensitivity, salient, (sensitivity * ~salient).flatten())
        salient_columns += int(salient.sum())
        below, above, twice = _groups(sensitivity, salient, border)
        once = residual_binarization(block, below, 1) + residual_binarization(block, above, 1)
        return once + residual_binarization(block, twice, 2)

    out = compensate_blocks(work, upper, settings.block_size, quantize)
    rows, cols = weight.shape
    # A salient weight has two signs, any other a sign and a group bit: two bits all the same.
    stored = 2 + 1 / rows + 16 * _VALUES * blocks_per_column(cols, settings.block_size)
    return QuantizedWeight(out, 1 + salient_columns / cols, stored)


def residual_binarization(x: Tensor, mask: Tensor, order: int) -> Tensor:
    """Return the sum of `order` binarizations of what is left of x [rows, n], each mean + scale * sign, in the mask."""
    total = torch.zeros_like(x)
    for _ in range(order):
        left = x - total
        mean = masked_mean(left, mask, 1)
        centred = left - mean
        total = total + (torch.sign(centred) * masked_mean(centred.abs(), mask, 1) + mean) * mask
    return total


def salient_columns_of(sensitivity: Tensor) -> Tensor:
    """Return the salient columns, bool [n]: the number that the sensitivity [rows, n] itself is binarized best with."""
    cols = sensitivity.shape[1]
    order = sensitivity.sum(0).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(cols, device=order.device)
    errors = []
    counts = range(1, min(_MOST_COLUMNS, cols))
    for count in counts:
        salient = (rank < count).expand_as(sensitivity)
        found = residual_binarization(sensitivity, salient, 2) + residual_binarization(sensitivity, ~salient, 2)
        errors.append((sensitivity - found).square().mean())
    if not errors:  # a block of one column
        return torch.ones_like(rank, dtype=torch.bool)
    return rank < counts[int(torch.stack(errors).argmin())]


def group_border(sensitivity: Tensor, salient: Tensor, values: Tensor) -> Tensor:
    """Return the border between two groups of the sensitivity [rows, n] outside the columns `salient` [n].

    Of 81 quantiles of `values` it is the one with which the sensitivity itself is binarized best.
    """
    borders = _quantiles(values, torch.linspace(0.10, 0.90, 81, dtype=values.dtype, device=values.device))
    errors = []
    for border in borders:
        below, above, _ = _groups(sensitivity, salient, border)
        found = residual_binarization(sensitivity, below, 1) + residual_binarization(sensitivity, above, 1)
        errors.append((sensitivity * ~salient - found).square().mean())
    return borders[int(torch.stack(errors).argmin())]


def _quantiles(flat: Tensor, shares: Tensor) -> Tensor:
    # torch.quantile refuses large inputs.
    ordered = flat.sort().values
    place = shares * (len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _groups(sensitivity: Tensor, salient: Tensor, border: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks of the group below the border, the one above, and the salient columns, bool [rows, n]."""
    others = (~salient).expand_as(sensitivity)
    above = sensitivity * ~salient >= border
    return ~above & others, above & others, salient.expand_as(sensitivity)
