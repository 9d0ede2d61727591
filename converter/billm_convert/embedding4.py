"""Tables of 4 bits: steps by search, codes with error feedback in the metric of what the table multiplies.

Rounded one by one, 4-bit rows cost SmolLM2-135M 15 % of perplexity, nearly all of it in the head: what it multiplies is
anything but white. With H the second moment of that, an error e of a row costs e H e, so each column's error is made up
for by the columns behind it, as GPTQ does. A tied table is read as an embedding, too, where every column counts alike:
hence an identity beside H.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_format.errors import UsageError
from billm_format.layout import GROUP
from billm_format.packing import pack_nibbles

# Steps tried in a group, as shares of the one that just reaches the largest value with a code of -8.
_SHARES = np.linspace(0.55, 1.1, 12).tolist()
_MOST = 127  # the largest step that is chosen
_ROOM = 1.15  # feedback makes values grow, and the steps with them
_CHUNK_VALUES = 1 << 22  # values solved at once: 16 MB, several times over

# How much an identity counts beside H, in units of the median of its diagonal. For a head alone it only keeps H
# invertible; in a tied table it stands for the embedding (measured in bench/RESULTS.md).
HEAD_IDENTITY, TIED_IDENTITY = 0.01, 1.0


def solve_table(value: Tensor, metric: Tensor) -> dict[str, NDArray[Any]]:
    """Quantize float32 [rows, cols] to 4 bits so that e metric e is small for the error e of every row.

    `metric` is float32 [cols, cols], positive definite, and on the device that is to do the work. Returns `weight`,
    `step` and `scale` of a `Table`. UsageError for values too large for the format.
    """
    feedback = torch.linalg.cholesky(torch.linalg.inv(metric.double()), upper=True).float()
    step = max(1, _CHUNK_VALUES // value.shape[1])
    parts = [_solve_rows(part.to(metric.device), feedback) for part in torch.split(value, step)]
    axes = {"weight": 0, "step": 1, "scale": 0}
    return {name: np.concatenate([part[name] for part in parts], axis) for name, axis in axes.items()}


def metric_of(moment: Tensor, identity: float) -> Tensor:
    """Return the moment [cols, cols] in units of the median of its diagonal, plus `identity` times the identity."""
    median = moment.diagonal().median().clamp(min=torch.finfo(torch.float32).tiny)
    return moment / median + identity * torch.eye(moment.shape[0], device=moment.device)


def _solve_rows(value: Tensor, feedback: Tensor) -> dict[str, NDArray[Any]]:
    """Solve some rows; `feedback` is the upper Cholesky factor of the metric's inverse."""
    scale = _row_scales(value)
    rest = value.clone()
    codes, steps = torch.empty_like(value, dtype=torch.uint8), []
    for start in range(0, value.shape[1], GROUP):
        group = slice(start, min(start + GROUP, value.shape[1]))
        factor = feedback[group, group]
        step = _best_step(rest[:, group], scale, factor.diagonal())
        errors = torch.empty_like(rest[:, group])
        for j in range(factor.shape[0]):
            column = rest[:, start + j]
            code = _codes(column, step * scale)
            codes[:, start + j] = (code + 8).to(torch.uint8)
            errors[:, j] = (column - code * step * scale) / factor[j, j]
            rest[:, start + j + 1 : group.stop] -= errors[:, j, None] * factor[j, j + 1 :]
        rest[:, group.stop :] -= errors @ feedback[group, group.stop :]
        steps.append(step.to(torch.int8).cpu().numpy())
    packed = pack_nibbles(codes.cpu().numpy())
    return {"weight": packed, "step": np.stack(steps), "scale": scale.cpu().numpy().astype(np.float16)}


def _row_scales(value: Tensor) -> Tensor:
    """Return a scale per row, a float16 in float32, with which the steps of all groups fit their range."""
    exact = value.abs().amax(dim=1).cpu().numpy() * np.float32(_ROOM / (8 * _MOST))
    with np.errstate(over="ignore"):
        scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    scale[exact == 0] = 1
    if not np.isfinite(scale).all():
        raise UsageError(f"an embedding holds values up to {float(value.abs().max()):g}, too large for 4 bits")
    return torch.from_numpy(scale.astype(np.float32)).to(value.device)


def _codes(value: Tensor, step: Tensor) -> Tensor:
    """Return the whole numbers -8..7 of which `step` times makes nearly `value`; zeros where the step is."""
    return torch.where(step == 0, 0.0, torch.round(value / step).clamp(-8, 7))


def _best_step(value: Tensor, scale: Tensor, spread: Tensor) -> Tensor:
    """Return the steps [rows], whole numbers, that round value [rows, group] with the least error.

    A column's error counts by the inverse square of `spread` [group]: what is left of it after feedback.
    """
    reach, place = value.abs().max(dim=1)
    sign = torch.sign(value.gather(1, place[:, None])[:, 0])
    best, least = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for share in (*_SHARES, *(-share for share in _SHARES)):  # a step's sign says which end of the codes is the longer
        step = torch.round(-sign * reach * (share / 8) / scale).clamp(-_MOST, _MOST)
        missed = value - _codes(value, (step * scale)[:, None]) * (step * scale)[:, None]
        error = (missed / spread).square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best
