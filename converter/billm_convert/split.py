"""Splitting non-salient weights into a concentrated and a sparse group (Eq. 9 to 13; `seg_search` of Algorithm 2)."""

from typing import Literal

import torch
from torch import Tensor

from billm_convert.salient import relative_error

Breakpoint = Literal["magnitude", "percentile"]

_TENTHS = 10


def sparse_group(target: Tensor, salient: Tensor, kind: Breakpoint, curve: list[Tensor] | None = None) -> Tensor:
    """Return 1 for the sparse group |w| > p*, else 0, [rows, n] in the dtype of `target`; salient columns are 0.

    `target` is W [rows, n], `salient` [n] 1 or 0, with at least one 0. p* is the first of nine candidates with the
    least error of Eq. 11, both groups binarized per row: tenths of max |w| over the non-salient weights of the block
    ("magnitude", Algorithm 2, `seg_search`, line 4), or their deciles ("percentile", the text of section 3.2). The
    candidates' relative errors are appended to `curve`.
    """
    # Salient weights become zeros: never sparse, nothing to any sum, and too many in each row's count, by as many.
    magnitude = target.abs() * (1 - salient)
    surplus = salient.sum()
    size = salient.numel() - surplus
    total = magnitude.sum(1)
    candidates = _candidates(magnitude, size.long() * magnitude.shape[0], kind)
    concentrated = torch.empty_like(magnitude)
    gains = []
    for p in candidates:
        torch.le(magnitude, p, out=concentrated)
        count = concentrated.sum(1) - surplus
        inside = (magnitude * concentrated).sum(1)
        # As for salient columns: a row's error is Σw² less (Σ|w|)²/n of each group.
        gain = inside**2 / count.clamp(min=1) + (total - inside) ** 2 / (size - count).clamp(min=1)
        gains.append(gain.sum(dtype=torch.float64))
    found = torch.stack(gains)
    if curve is not None:
        curve.append(relative_error(magnitude, found))
    best = candidates[torch.argmax(found)]
    return torch.gt(magnitude, best, out=concentrated)


def _candidates(magnitude: Tensor, number: Tensor, kind: Breakpoint) -> Tensor:
    """Return the nine break-points to try for the `number` non-salient weights; all others are 0 in `magnitude`."""
    tenths = torch.arange(1, _TENTHS, device=magnitude.device)
    if kind == "magnitude":
        return (tenths.double() / _TENTHS * magnitude.max()).to(magnitude)
    ordered = magnitude.flatten().sort().values
    # The decile i is the least weight with at least i tenths of all weights at or below it.
    place = (tenths * number + _TENTHS - 1) // _TENTHS - 1
    return ordered[ordered.numel() - number + place]
