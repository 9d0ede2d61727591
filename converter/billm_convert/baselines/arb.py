"""ARB-LLM RC with the column-group bitmap (Li et al., ICLR 2025): scales of rows and columns, refined in turns.

Written from the paper. It says what is refined and how; how the groups are found it leaves to BiLLM, and so do we:
salient columns as in `authors`, and a border among the others and one among them, each of its own members' quantiles.
"""

import torch
from torch import Tensor

from billm_convert.baselines.authors import group_border, salient_columns_of
from billm_convert.baselines.common import (
    BaselineSettings,
    QuantizedWeight,
    blocks_per_column,
    compensate_blocks,
    masked_mean,
    prepare,
)

_ROUNDS = 15
_TINY = 1e-8  # against division by zero, as in its formulas
_ROW_SCALES = 6  # per row and block: one for both groups of the other columns, two for both of the salient ones


def arb_rc(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    """Binarize four zones of each block, each with its own row and column scales; those in salient columns twice."""
    work, upper = prepare(weight, hessian, settings.damp)
    salient_columns = 0

    def quantize(block: Tensor, diagonal: Tensor) -> Tensor:
        nonlocal salient_columns
        sensitivity = block**2 / diagonal**2
        salient = salient_columns_of(sensitivity)
        salient_columns += int(salient.sum())
        out = torch.zeros_like(block)
        for members, order in ((~salient, 1), (salient, 2)):
            if bool(members.any()):
                above = sensitivity >= group_border(sensitivity, ~members, sensitivity[:, members].flatten())
                out += refine(block, above & members, order) + refine(block, ~above & members, order)
        return out

    out = compensate_blocks(work, upper, settings.block_size, quantize)
    rows, cols = weight.shape
    share = salient_columns / cols
    # Every weight has a sign and a group bit, a salient one a second sign; columns have a scale per group and order.
    columns = 16 * 2 * (1 + share) / rows
    stored = 2 + share + 1 / rows + columns + 16 * _ROW_SCALES * blocks_per_column(cols, settings.block_size)
    return QuantizedWeight(out, 1 + share, stored)


def refine(x: Tensor, zone: Tensor, order: int) -> Tensor:
    """Return the sum over `order` planes of row scale * column scale * sign that stands for x [rows, n] in the zone."""
    target = torch.where(zone, x, 0)
    planes = _start(target, zone, order)
    for _ in range(_ROUNDS):
        for k in range(order):
            others = sum((_plane(*plane) for i, plane in enumerate(planes) if i != k), torch.zeros_like(x))
            row, column, sign = planes[k]
            left = torch.where(zone, x - others, 0)
            row = _fit(left, column * sign, 1)
            planes[k] = row, _fit(left, row * sign, 0), sign
        if order == 2:
            planes = _reassign(target, planes, zone)
    return sum((_plane(*plane) for plane in planes), torch.zeros_like(x))


# row scale [rows, 1], column scale [1, n], sign [rows, n]: +1 or -1 in the zone, 0 outside
_Plane = tuple[Tensor, Tensor, Tensor]


def _plane(row: Tensor, column: Tensor, sign: Tensor) -> Tensor:
    return row * column * sign


def _start(target: Tensor, zone: Tensor, order: int) -> list[_Plane]:
    """Each plane takes what the ones before leave: row scales as means, column scales as means of what they scale."""
    planes: list[_Plane] = []
    left = target
    for _ in range(order):
        row = masked_mean(left.abs(), zone, 1)
        column = masked_mean(left.abs() / torch.where(row > 0, row, 1), zone, 0)
        sign = torch.sign(left) * zone
        planes.append((row, column, sign))
        left = left - _plane(row, column, sign)
    return planes


def _fit(target: Tensor, direction: Tensor, dim: int) -> Tensor:
    """Return the multiples of `direction` [rows, n] along `dim` that come nearest to the target."""
    return (direction * target).sum(dim, keepdim=True) / ((direction * direction).sum(dim, keepdim=True) + _TINY)


def _reassign(target: Tensor, planes: list[_Plane], zone: Tensor) -> list[_Plane]:
    """Return two planes with the signs whose sum is nearest to each target."""
    (row0, column0, _), (row1, column1, _) = planes
    first, second = row0 * column0, row1 * column1
    signs = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=target.dtype, device=target.device)
    distance = torch.stack([(target - a * first - b * second).abs() for a, b in signs])
    best = signs[distance.argmin(0)]
    return [(row0, column0, best[..., 0] * zone), (row1, column1, best[..., 1] * zone)]
