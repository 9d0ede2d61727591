"""Row-wise binarization of one block of columns (Eq. 2, 4, 6 and 12; `binary` and `res_approximation` of Algorithm 2).

A file holds scales as 8-bit codes in units of one float16 step per row. They are rounded here, where they are made:
what is computed from a scale afterwards sees the value that the file will hold. A step of None leaves them unrounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billm_format.errors import UsageError
from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S

MAX_CODE = 255


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

    `magnitude` is |W| [rows, n], `members` bool [n] or [rows, n]; a row without members gets 0.
    """
    count = members.sum(-1).clamp(min=1)
    return (magnitude * members).sum(-1) / count


def signs(weight: Tensor) -> Tensor:
    """Return bool, True where sign(w) = +1 (Eq. 2: zero counts as positive)."""
    return weight >= 0


def row_step(largest: Tensor) -> Tensor:
    """Return each row's float16 step [rows]: the least one in which `largest` [rows] is at most 255 steps.

    A row of zeros gets 0. UsageError where float16 is too small for the step.
    """
    wanted = (largest / MAX_CODE).float()
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

    `salient` is bool [n]; `sparse` bool [rows, n], False in salient columns; `step` float16 [rows], or None.
    """
    magnitude, positive = block.abs(), signs(block)
    alpha_c = _stored(binary_scale(magnitude, ~(sparse | salient)), step)
    alpha_s = _stored(binary_scale(magnitude, sparse), step)
    # Eq. 6. The residual is taken from the stored alpha_o: its own scale then mends part of the rounding.
    alpha_o = _stored(binary_scale(magnitude, salient), step)
    residual = block - _weight(_signed(alpha_o[:, None], positive), step)
    residual_positive = signs(residual)
    alpha_r = _stored(binary_scale(residual.abs(), salient), step)
    if step is not None:
        alpha_r = torch.minimum(alpha_r, MAX_CODE - alpha_o)  # the format saturates the sum there
    # alpha_r > alpha_o happens in rows with one huge weight; the format wants the larger plane first.
    swap = (alpha_r > alpha_o)[:, None] & salient
    sign = torch.where(swap, residual_positive, positive)
    second = torch.where(salient, torch.where(swap, positive, residual_positive), sparse)
    alpha_o, alpha_r = torch.maximum(alpha_o, alpha_r), torch.minimum(alpha_o, alpha_r)
    level = torch.where(
        salient,
        alpha_o[:, None] + _signed(alpha_r[:, None], second == sign),
        torch.where(sparse, alpha_s[:, None], alpha_c[:, None]),
    )
    scales = torch.empty(block.shape[0], 4, dtype=block.dtype, device=block.device)
    for place, alpha in ((ALPHA_C, alpha_c), (ALPHA_S, alpha_s), (ALPHA_O, alpha_o), (ALPHA_R, alpha_r)):
        scales[:, place] = alpha
    return BlockCodes(sign, second, salient, scales, _weight(_signed(level, sign), step))


def _stored(alpha: Tensor, step: Tensor | None) -> Tensor:
    """Round scales [rows] to whole steps, 0 to 255."""
    if step is None:
        return alpha
    # Where the step is 0 the row was all zero when steps were chosen, and so is alpha: any divisor will do.
    return torch.round(alpha / torch.where(step > 0, step, 1.0).to(alpha)).clamp(max=MAX_CODE)


def _weight(level: Tensor, step: Tensor | None) -> Tensor:
    """Turn levels [rows, n] into weights as `PackedLinear.dequantize` does: one float32 product each."""
    return level if step is None else (level.float() * step.float()[:, None]).to(level.dtype)


def _signed(value: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, value, -value)
