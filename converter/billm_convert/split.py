"""Splitting non-salient weights into a concentrated and a sparse group (Eq. 9 to 13; `seg_search` of Algorithm 2)."""

from typing import Literal

import torch
from torch import Tensor

Breakpoint = Literal["magnitude", "percentile"]

_TENTHS = 10


def sparse_group(target: Tensor, salient: Tensor, kind: Breakpoint) -> Tensor:
    """Return bool [rows, n], True for the sparse group |w| > p*; salient columns are False.

    `target` is W [rows, n], `salient` bool [n] with at least one False. p* is the first of nine candidates with the
    least error of Eq. 11, both groups binarized per row: tenths of max |w| over the non-salient weights of the block
    ("magnitude", Algorithm 2, `seg_search`, line 4), or their deciles ("percentile", the text of section 3.2).
    """
    magnitude = target.abs()
    # Outside every group: beyond each candidate, and nothing to any sum.
    candidates = _candidates(magnitude.masked_fill(salient, -1.0), ~salient, kind)
    magnitude = magnitude.masked_fill(salient, 0.0)
    total = magnitude.sum(1)
    size = (~salient).sum()
    gains = []
    for p in candidates:
        concentrated = (magnitude <= p) & ~salient
        count = concentrated.sum(1)
        inside = (magnitude * concentrated).sum(1)
        # As for salient columns: a row's error is Σw² less (Σ|w|)²/n of each group.
        gain = inside**2 / count.clamp(min=1) + (total - inside) ** 2 / (size - count).clamp(min=1)
        gains.append(gain.sum(dtype=torch.float64))
    best = candidates[torch.argmax(torch.stack(gains))]
    return (magnitude > best) & ~salient


def _candidates(magnitude: Tensor, members: Tensor, kind: Breakpoint) -> Tensor:
    """Return the nine break-points to try; entries of `magnitude` [rows, n] outside `members` [n] are negative."""
    tenths = torch.arange(1, _TENTHS, device=magnitude.device)
    if kind == "magnitude":
        return (tenths.double() / _TENTHS * magnitude.max()).to(magnitude)
    ordered = magnitude.flatten().sort().values
    number = members.sum() * magnitude.shape[0]
    # The decile i is the least weight with at least i tenths of all weights at or below it.
    place = (tenths * number + _TENTHS - 1) // _TENTHS - 1
    return ordered[ordered.numel() - number + place]
