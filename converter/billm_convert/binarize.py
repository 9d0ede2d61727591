"""Row-wise binarization of one block of columns (Eq. 2, 4, 6 and 12; `binary` and `res_approximation` of Algorithm 2).

A file holds scales as 8-bit codes in units of one float16 step per row. They are rounded here, where they are made:
what is computed from a scale afterwards sees the value that the file will hold. A step of None leaves them unrounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billm_convert.settings import MAX_LEVEL
from billm_format.errors import UsageError
from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S

# What is left free above a row's largest scale before rounding: 15 steps of 255, for what rounding itself changes later
# in the row. Measured on a real model, it spares nearly all rows the clamp and costs nothing.
_ROOM = 15 / 255


@dataclass(frozen=True)
class BlockCodes:
    """One binarized block of columns: what the file stores of it, and the weights that this stands for."""

    sign: Tensor  # bool [rows, cols of the block], True: +
    second: Tensor  # bool, same shape; salient column: residual sign (True: +), else: group flag (True: sparse)
    salient: Tensor  # bool [cols of the block]
    scales: Tensor  # [rows, 4] in the file's order, in units of the step (whole numbers), or unrounded
    weight: Tensor  # [rows, cols of the block], B of Algorithm 1, line 11


def binary_scale(magnitude: Tensor, members: Tensor) -> Tensor:
    """Return alpha [rows] of Eq. 4 (`binary` of Algorithm 2, line 1): each row's mean of |w| over its members.

    `magnitude` is |W| [rows, n], `members` 1 or 0 in its dtype, [n] or [rows, n]; a row without members gets 0.
    """
    total = magnitude @ members if members.ndim == 1 else (magnitude * members).sum(1)
    return total / members.sum(-1).clamp(min=1)


def is_positive(weight: Tensor) -> Tensor:
    """Return 1 where sign(w) = +1, else 0, in the weight's dtype (Eq. 2: zero counts as positive).

    Masks are numbers in this package: torch.where and bool arithmetic take many times as long on a CPU.
    """
    return torch.ge(weight, 0, out=torch.empty_like(weight))


def row_step(largest: Tensor) -> Tensor:
    """Return each row's float16 step [rows]: the least one in which `largest` [rows] leaves room below MAX_LEVEL.

    That is 240 steps. A row of zeros gets 0. UsageError where float16 is too small for the step.
    """
    wanted = (largest / round((1 - _ROOM) * MAX_LEVEL)).float()
    step = wanted.half()
    # A positive float16's successor is the next integer of its bits, subnormals included.
    step = torch.where(step.float() < wanted, (step.view(torch.int16) + 1).view(torch.float16), step)
    if not bool(step.isfinite().all()):
        raise UsageError(
            f"a Linear's weights reach about {float(largest.max()):.3g}, more than a float16 row multiplier can hold: "
            "the model is damaged"
        )
    return step


def binarize_block(block: Tensor, salient: Tensor, sparse: Tensor, step: Tensor | None) -> BlockCodes:
    """Binarize a block [rows, n]: Algorithm 1, lines 7 and 9 to 11.

    `salient` [n] and `sparse` [rows, n], 0 in salient columns, are 1 or 0 in the block's dtype; `step` is float16
    [rows], or None.
    """
    magnitude, positive = block.abs(), is_positive(block)
    sign = 2 * positive - 1
    concentrated = (1 - salient) - sparse
    alpha_c = _stored(binary_scale(magnitude, concentrated), step)
    alpha_s = _stored(binary_scale(magnitude, sparse), step)
    # Eq. 6. The residual is taken from the stored alpha_o: its own scale then mends part of the rounding.
    alpha_o = _stored(binary_scale(magnitude, salient), step)
    residual = block - _weight(sign * alpha_o[:, None], step)
    residual_positive = is_positive(residual)
    alpha_r = _stored(binary_scale(residual.abs(), salient), step)
    if step is not None:
        alpha_r = torch.minimum(alpha_r, MAX_LEVEL - alpha_o)  # the format saturates the sum there
    level = sign * (concentrated * alpha_c[:, None] + sparse * alpha_s[:, None] + salient * alpha_o[:, None])
    level += (2 * residual_positive - 1) * salient * alpha_r[:, None]
    # alpha_r > alpha_o happens in rows with one huge weight; the format wants the larger plane first.
    larger, smaller = torch.maximum(alpha_o, alpha_r), torch.minimum(alpha_o, alpha_r)
    swap = (alpha_r > alpha_o)[:, None] & (positive != residual_positive) & salient.bool()
    second = residual_positive * salient + sparse
    scales = torch.empty(block.shape[0], 4, dtype=block.dtype, device=block.device)
    for place, alpha in ((ALPHA_C, alpha_c), (ALPHA_S, alpha_s), (ALPHA_O, larger), (ALPHA_R, smaller)):
        scales[:, place] = alpha
    return BlockCodes(positive.bool() ^ swap, second.bool() ^ swap, salient.bool(), scales, _weight(level, step))


def _stored(alpha: Tensor, step: Tensor | None) -> Tensor:
    """Round scales [rows] to whole steps, 0 to 255."""
    if step is None:
        return alpha
    # Where the step is 0 the row was all zero when steps were chosen, and so is alpha: any divisor will do.
    return torch.round(alpha / torch.where(step > 0, step, 1.0).to(alpha)).clamp(max=MAX_LEVEL)


def _weight(level: Tensor, step: Tensor | None) -> Tensor:
    """Turn levels [rows, n] into weights as `PackedLinear.dequantize` does: one float32 product each."""
    return level if step is None else (level.float() * step.float()[:, None]).to(level.dtype)
