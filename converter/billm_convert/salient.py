"""Which columns of a block are salient (Eq. 3 and 5; `salient` of Algorithm 2)."""

import torch
from torch import Tensor


def salience(block: Tensor, diagonal: Tensor) -> Tensor:
    """Return S [rows, n] of Eq. 3 (Algorithm 2, `salient`, line 1) for a block W [rows, n].

    `diagonal` [n] is the block's part of diag(H^c): the algorithm's denominator, where Eq. 3 writes diag(H⁻¹).
    """
    return (block / diagonal) ** 2


def select_columns(
    target: Tensor, salience: Tensor, fewest: int, most: int, curve: list[Tensor] | None = None
) -> Tensor:
    """Return 1 for salient columns, else 0, [n] in the dtype of `target` (Algorithm 2, `salient`, lines 2 to 13).

    Columns are ordered by their sum of `salience` [rows, n]; of all numbers from `fewest` to `most` the first is taken
    whose one-plane error ||W - (binary(W_sal) ∪ binary(W_uns))||² (Eq. 5) is least, W being `target` [rows, n].
    At least one column always stays non-salient. The relative errors for 0 to `most` columns are appended to `curve`.
    """
    cols = target.shape[1]
    most = min(most, cols - 1)
    fewest = min(fewest, most)
    order = torch.argsort(salience.sum(0), descending=True, stable=True)
    leading = target.index_select(1, order[:most]).abs().double()
    # With alpha the mean of n magnitudes, a row's error is Σw² - (Σ|w|)²/n: sums over the first 0, 1, 2 ... columns say
    # all. The running sums are a product with a triangle of ones: torch's cumsum need not repeat itself on a GPU.
    ones = torch.ones(most, most + 1, dtype=torch.float64, device=target.device).triu(1)
    inside = leading @ ones
    outside = target.abs().sum(1, keepdim=True, dtype=torch.float64) - inside
    count = torch.arange(most + 1, dtype=torch.float64, device=target.device)
    gain = (inside**2 / count.clamp(min=1) + outside**2 / (cols - count)).sum(0)
    best = fewest + torch.argmax(gain[fewest:])
    if curve is not None:
        curve.append(relative_error(target, gain))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(cols, device=order.device)
    return (rank < best).to(target)


def relative_error(target: Tensor, gain: Tensor) -> Tensor:
    """Return ||W - B||² / ||W||² from ||W||² - ||W - B||², float64; 1 where W, `target`, is all zeros."""
    whole = target.square().sum(dtype=torch.float64)
    return 1 - gain / whole.clamp(min=torch.finfo(torch.float64).tiny)
