"""What every recipe takes and gives: a Linear and its Hessian, checked; a binarized Linear with its errors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from billm_convert.hessian import FACTOR_MATRICES
from billm_format.config import BLOCK_SIZES
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear

# Most float32 matrices [rows, cols] that a solver holds at once.
_SOLVER_MATRICES = 14


@dataclass(frozen=True)
class SolverSettings:
    """What every recipe leaves to choose; the defaults are the paper's."""

    block_size: int = 128
    min_salient: int = 3  # of each block's columns
    max_salient: int = 30
    damp: float = 0.01  # lambda as a share of mean(diag H)

    def __post_init__(self) -> None:
        """Raise UsageError unless the numbers can be used."""
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block size {self.block_size}: wanted one of {', '.join(map(str, BLOCK_SIZES))}")
        if not 0 <= self.min_salient <= self.max_salient:
            raise UsageError(
                f"salient columns per block: wanted 0 <= fewest <= most, found {self.min_salient}, {self.max_salient}"
            )
        if not 0 <= self.damp <= 1:
            raise UsageError(f"dampening {self.damp:g}: wanted a share of the mean diagonal, 0 to 1")


@dataclass(frozen=True)
class Searches:
    """What a solver's searches saw: of each block in turn, ||W - B||² / ||W||² by candidate, float64."""

    salient: list[Tensor] = field(default_factory=list)  # [candidates]: 0, 1, 2 ... salient columns (Eq. 5)
    split: list[Tensor] = field(default_factory=list)  # [9]: the break-points (Eq. 11), over non-salient weights


@dataclass(frozen=True)
class SolvedLinear:
    """A binarized Linear, ready for the writer, and what it cost. Errors are over all rows, of the stored weights."""

    packed: PackedLinear  # without bias
    weight: Tensor  # float32 [rows, cols] on the solver's device: `packed.dequantize()`, to the bit
    error: float  # tr(D H Dᵀ) / tr(W H Wᵀ), D = W - B, H without dampening: relative output error
    weight_error: float  # ||D||² / ||W||²
    salient_fraction: float  # of all columns
    sparse_fraction: float  # of the non-salient weights
    damp: float  # what was used: above the settings' where H was not positive definite
    searches: Searches | None = None  # None: the recipe has none, or was not asked to keep them


def solving_memory(rows: int, cols: int) -> int:
    """Return the bytes that solving a Linear, and others that read its input, takes beside weights and Hessian.

    Measured: the tests hold both numbers of matrices.
    """
    return 8 * FACTOR_MATRICES * cols * cols + 4 * _SOLVER_MATRICES * rows * cols


def stored_weight(level: Tensor, step: Tensor, col_scale: Tensor | None = None) -> Tensor:
    """Return what `PackedLinear.dequantize` makes of whole levels [rows, cols], float32: the same products, in order.

    `step` is float16 [rows], `col_scale` float16 [cols].
    """
    weight = level.float() + 0.0  # whole numbers have one zero, floats two
    weight *= step.float()[:, None]
    return weight if col_scale is None else weight.mul_(col_scale.float())


def check_problem(weight: Tensor, hessian: Tensor) -> None:
    """Raise unless shapes fit and every value is finite: UsageError for values, ValueError for shapes."""
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"wanted a float32 weight [rows, cols], found {weight.dtype} {list(weight.shape)}")
    cols = weight.shape[1]
    if hessian.shape != (cols, cols):
        raise ValueError(f"a weight {list(weight.shape)} wants a Hessian [{cols}, {cols}], found {list(hessian.shape)}")
    for what, tensor in (("weight", weight), ("Hessian", hessian)):
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UsageError(
                f"{bad} of {tensor.numel()} values of a Linear's {what} {list(tensor.shape)} are not finite: the model "
                "is damaged, or overflows on the calibration text"
            )


def relative_errors(weight: Tensor, delta: Tensor, hessian: Tensor) -> tuple[float, float]:
    """Return (tr(D H Dᵀ) / tr(W H Wᵀ), ||D||² / ||W||²)."""
    metric = hessian.to(weight)

    def energy(matrix: Tensor) -> float:
        # Rounding can leave a tiny negative where H is singular.
        return max(0.0, float((matrix @ metric).mul_(matrix).sum(dtype=torch.float64)))

    return _quotient(energy(delta), energy(weight)), weight_error(weight, delta)


def weight_error(weight: Tensor, delta: Tensor) -> float:
    """Return ||D||² / ||W||²."""
    delta_square, square = (float(matrix.square().sum(dtype=torch.float64)) for matrix in (delta, weight))
    return _quotient(delta_square, square)


def _quotient(error: float, whole: float) -> float:
    # Where there is nothing to keep, any error is all of it.
    return error / whole if whole > 0 else float(error > 0)
