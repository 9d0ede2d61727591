"""The layer's Hessian from calibration inputs, and the Cholesky factor of its inverse (Algorithm 1, lines 1 and 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from billm_format.errors import UsageError

# Widest strip of H that one product fills; strips right of the diagonal alone are computed, the rest is mirrored.
_STRIP = 256

# Dampening is raised tenfold up to here before a Hessian counts as unusable (1: as large as the mean diagonal).
_MAX_DAMP = 1.0

# Most float64 matrices [cols, cols] that factoring, and working with the factor, takes at once.
FACTOR_MATRICES = 3


class HessianAccumulator:
    """Sums H = 2 X Xᵀ over batches of one Linear's inputs (Algorithm 1, line 1).

    The result is divided by the number of tokens. A factor on H changes nothing that the solver does: dampening is
    relative to H's diagonal, salience is compared within a matrix, errors are quotients. The mean keeps numbers sane.
    """

    def __init__(self, cols: int, device: torch.device | str) -> None:
        """Start from zero for inputs of `cols` features on `device`."""
        self._sum = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs x [tokens, cols] of any float dtype; ValueError on another width."""
        cols = self._sum.shape[0]
        if x.ndim != 2 or x.shape[1] != cols:
            raise ValueError(f"inputs of a Hessian: wanted shape [tokens, {cols}], found {list(x.shape)}")
        x = x.detach().to(self._sum)
        for start in range(0, cols, _STRIP):
            self._sum[start : start + _STRIP, start:].addmm_(x[:, start : start + _STRIP].T, x[:, start:])
        self._tokens += x.shape[0]

    def result(self) -> Tensor:
        """Return H float32 [cols, cols], symmetric to the bit; ValueError before any token was added."""
        if self._tokens == 0:
            raise ValueError("a Hessian needs at least one token, found none")
        upper = torch.triu(self._sum)
        return (upper + torch.triu(upper, diagonal=1).T) * (2.0 / self._tokens)


class DriftAccumulator:
    """Sums 2 D Xᵀ over batches: what is to be made up for, D, by a Linear that reads X."""

    def __init__(self, rows: int, cols: int, device: torch.device | str) -> None:
        """Start from zero for D of `rows` features and inputs of `cols` features on `device`."""
        self._sum = torch.zeros(rows, cols, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, difference: Tensor, x: Tensor) -> None:
        """Add D [tokens, rows] for the inputs x [tokens, cols]."""
        self._sum.addmm_(difference.T, x)
        self._tokens += x.shape[0]

    def result(self) -> Tensor:
        """Return the mean over all tokens, float32 [rows, cols]; ValueError before any token was added."""
        if self._tokens == 0:
            raise ValueError("a drift needs at least one token, found none")
        return self._sum * (2.0 / self._tokens)


@dataclass(frozen=True)
class InverseFactor:
    """H^c of Algorithm 1, line 2, and the dampening it took."""

    upper: Tensor  # [cols, cols], upper triangular, upperᵀ upper = (H + damp mean(diag H) I)⁻¹
    damp: float


def factor_inverse(hessian: Tensor, damp: float) -> InverseFactor:
    """Return the upper Cholesky factor of (H + λI)⁻¹, float64, with λ = damp * mean(diag H).

    Where the dampened H is not positive definite in float64, `damp` is raised tenfold until it is; an H of zeros counts
    as the identity. UsageError when nothing up to λ = mean(diag H) helps: then H is no Hessian.
    """
    while True:
        # H = R Rᵀ with R upper triangular is a Cholesky factorisation with rows and columns reversed, and gives
        # H⁻¹ = R⁻ᵀ R⁻¹: the factor wanted is R⁻¹, and the inverse itself is never formed.
        lower, info = torch.linalg.cholesky_ex(_dampened_reversed(hessian, damp))
        if not int(info):
            break
        if damp >= _MAX_DAMP:
            raise UsageError(
                f"the Hessian [{hessian.shape[0]}, {hessian.shape[1]}] of a Linear is not positive definite even with "
                f"dampening {damp:g}: the calibration inputs are unusable; check the weights, or take other text"
            )
        damp = min(max(damp * 10, 1e-4), _MAX_DAMP)
    # Solved in its own memory, for which columns must lie together. Such matrices can be many gigabytes: no more than
    # FACTOR_MATRICES are held at once.
    inverse = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device).T
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return InverseFactor(inverse.flip(0, 1), damp)


def _dampened_reversed(hessian: Tensor, damp: float) -> Tensor:
    """Return H + λI in float64, rows and columns reversed."""
    matrix = hessian.to(torch.float64)
    mean = matrix.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dampened = matrix.flip(0, 1)
    dampened.diagonal().add_(damp * mean)
    return dampened
