"""The `refined` recipe: the paper's planes and scales, fitted to the output error. README.md defines it.

Matrices are transposed here, [cols, rows]: a column of W is then contiguous, and columns are what is worked through.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billm_convert.binarize import row_step
from billm_convert.hessian import InverseFactor, factor_inverse
from billm_convert.salient import salience, select_columns
from billm_convert.settings import MAX_LEVEL
from billm_convert.solved import (
    SolvedLinear,
    SolverSettings,
    check_problem,
    relative_errors,
    stored_weight,
    weight_error,
)
from billm_format.errors import UsageError
from billm_format.packing import PackedLinear, pack_bits

_SPLIT_STEPS = 6  # of Lloyd's algorithm: more do not change the output error

# Added to each scale's own curvature, relatively: two groups with the same columns' signs stay solvable.
_RIDGE = 1e-6

# The four magnitudes (concentrated, sparse, salient small, salient large) in terms of the file's four scales.
_MAGNITUDES = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, -1), (0, 0, 1, 1))


@dataclass(frozen=True)
class RefinedSettings(SolverSettings):
    """What can be chosen; the defaults are what README.md measures."""

    damp: float = 0.05  # more than the paper's
    sweeps: int = 4
    follow: float = 0.5  # how far the weights make up for drifted inputs

    def __post_init__(self) -> None:
        """Raise UsageError unless the numbers can be used."""
        super().__post_init__()
        if self.sweeps < 1:
            raise UsageError(f"sweeps: wanted 1 or more (the first one rounds the scales), found {self.sweeps}")


@dataclass
class _Block:
    """One block of columns: its codes, and its scales in the units of the weights it is fitted to."""

    columns: slice
    salient: Tensor  # bool [n]
    positive: Tensor  # bool [n, rows]
    large: Tensor  # bool [n, rows]: the second magnitude of the column's class, in general the larger one
    scales: Tensor  # [4, rows], in the file's order

    def level(self) -> Tensor:
        """Return what the codes stand for, [n, rows]."""
        return _level(self.positive, self.large, self.salient, _magnitudes(self.scales))


def solve_refined(
    weights: Sequence[Tensor],
    hessian: Tensor,
    settings: RefinedSettings,
    drift: Tensor | None = None,
    hidden_drift: Tensor | None = None,
    block_sizes: Sequence[int] | None = None,
) -> list[SolvedLinear]:
    """Binarize the Linears `weights`, each [rows, cols], that all read the inputs with this Hessian [cols, cols].

    They share one col_scale; `block_sizes` gives each its own, not that of `settings`. `drift` [cols, cols] says
    how these inputs miss the original model's and `hidden_drift` [rows, cols], for a single Linear, how the hidden
    states do that its output is added to (`DriftAccumulator`): the weights first make up for a part of both. Works on
    the weights' device and in their dtype: float32, or float64 for comparisons. The same input gives the same bytes on
    the same machine. UsageError: values that are not finite, a Hessian that is none. ValueError: shapes.
    """
    for weight in weights:
        check_problem(weight, hessian)
    factor = factor_inverse(hessian, settings.damp)
    targets = list(weights)
    if drift is not None:
        targets = [_follow(weight, drift, hidden_drift, factor, settings.follow) for weight in weights]
    col_scale = column_scale(targets)
    sizes = [settings.block_size] * len(targets) if block_sizes is None else block_sizes
    solved = [
        _solve(target, hessian, factor, col_scale, dataclasses.replace(settings, block_size=size))
        for target, size in zip(targets, sizes, strict=True)
    ]
    if drift is None:
        return solved
    return [_judged_by(weight, linear) for weight, linear in zip(weights, solved, strict=True)]


def _follow(weight: Tensor, drift: Tensor, hidden_drift: Tensor | None, factor: InverseFactor, share: float) -> Tensor:
    """Move `weight` by a share of the way to where what it reads now gives what the original model has here.

    Least squares: with inputs X, the original's X̃, and D what the hidden states lack, the whole way is
    (W (X̃ - X) + D) Xᵀ (X Xᵀ + λI)⁻¹. More than a share of it would fit the calibration text alone.
    """
    upper = factor.upper.to(weight)
    wanted = weight @ drift.to(weight)
    if hidden_drift is not None:
        wanted += hidden_drift.to(weight)
    return weight + share * (wanted @ upper.T) @ upper


def _judged_by(weight: Tensor, solved: SolvedLinear) -> SolvedLinear:
    """Return `solved` with the weight error against `weight`: the original, not what the solver aimed at."""
    delta = weight - solved.weight.to(weight)
    return dataclasses.replace(solved, weight_error=weight_error(weight, delta))


def column_scale(weights: Sequence[Tensor]) -> Tensor:
    """Return float16 [cols]: the root mean square of each column over all the weights' rows, their mean being 1."""
    square = sum((weight.double().square().sum(0) for weight in weights), start=torch.zeros((), dtype=torch.float64))
    root = torch.as_tensor(square).sqrt()
    root = root / torch.where(root.mean() > 0, root.mean(), 1.0)
    scale = root.half()
    # A column of zeros, or next to it: any scale will do, and 0 could not be divided by.
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _solve(
    weight: Tensor, hessian: Tensor, factor: InverseFactor, col_scale: Tensor, settings: RefinedSettings
) -> SolvedLinear:
    """Binarize one Linear for weights divided by, and a Hessian multiplied with, the column scale."""
    scale = col_scale.to(weight)
    target = (weight / scale).T.contiguous()
    upper = (factor.upper / col_scale.double()).to(weight)
    blocks = list(_first_pass(target, upper, settings))
    step = row_step(torch.stack([_largest(block.scales) for block in blocks]).amax(0))
    # From here on in whole steps. Where the step is 0 so is the row: any divisor will do.
    unit = torch.where(step > 0, step, 1.0).to(weight)
    target /= unit
    for block in blocks:
        block.scales /= unit
    metric = _metric(hessian, factor.damp, col_scale).to(weight)
    for _ in range(settings.sweeps):
        _sweep(blocks, target, metric)
    return _solved(blocks, weight, hessian, step, col_scale, settings.block_size, factor.damp)


def _metric(hessian: Tensor, damp: float, col_scale: Tensor) -> Tensor:
    """Return the dampened Hessian in terms of weights divided by the column scale, float64."""
    metric = hessian.to(torch.float64, copy=True)
    scale = col_scale.double()
    metric.diagonal().add_(damp * metric.diagonal().mean())
    return metric.mul_(scale[:, None]).mul_(scale)


# --- first pass: blocks in column order, unrounded scales ------------------------------------------------------------


def _first_pass(target: Tensor, upper: Tensor, settings: RefinedSettings) -> Iterator[_Block]:
    """Yield the blocks of `target` [cols, rows], each fitted to weights that make up for the blocks before it.

    `upper` is the factor of the inverse Hessian (`InverseFactor.upper`).
    """
    work = target.clone()
    cols = target.shape[0]
    for start in range(0, cols, settings.block_size):
        stop = min(start + settings.block_size, cols)
        here, inner = work[start:stop], upper[start:stop, start:stop]
        diagonal = inner.diagonal()
        chosen = select_columns(here.T, salience(here.T, diagonal), settings.min_salient, settings.max_salient)
        block = _assign(here, inner, chosen.bool(), _split(here, chosen, diagonal.square().reciprocal()))
        block.columns = slice(start, stop)
        # The least error that all later columns can still reach is ||D root||²: root rootᵀ is the block's Schur metric.
        identity = torch.eye(stop - start, dtype=inner.dtype, device=inner.device)
        root = torch.linalg.solve_triangular(inner, identity, upper=True)
        metric = root @ root.T
        block.scales = _fit(block, metric, metric @ here)
        error = root.T @ (here - block.level())
        work[stop:].addmm_(upper[start:stop, stop:].T, error, alpha=-1)
        yield block


def _split(here: Tensor, salient: Tensor, importance: Tensor) -> Tensor:
    """Return scales [4, rows] by splitting each row's magnitudes in two, in either class (2-means, Lloyd's algorithm).

    `salient` is 1 or 0 [n], `importance` [n] the weight of a column's error.
    """
    magnitude = here.abs()
    pairs = []
    for members in (1 - salient, salient):
        weight = (importance * members)[:, None].expand_as(magnitude)
        border = small = large = _mean(magnitude, weight, torch.zeros_like(magnitude[0]))
        for _ in range(_SPLIT_STEPS):
            above = weight * torch.gt(magnitude, border, out=torch.empty_like(magnitude))
            small, large = _mean(magnitude, weight - above, border), _mean(magnitude, above, border)
            border = (small + large) / 2
        pairs.append((small, large))
    (concentrated, sparse), (small, large) = pairs
    return torch.stack((concentrated, sparse, (large + small) / 2, (large - small) / 2))


def _mean(magnitude: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
    """Return each row's weighted mean [rows] of magnitudes [n, rows]; `otherwise` where all weights are 0."""
    whole = weight.sum(0)
    return torch.where(whole > 0, (magnitude * weight).sum(0) / whole, otherwise)


def _assign(here: Tensor, inner: Tensor, salient: Tensor, scales: Tensor) -> _Block:
    """Code a block column by column, each making up for the columns before it as GPTQ does."""
    pairs = _magnitudes(scales)[salient.long()]
    positive = torch.empty(here.shape, dtype=torch.bool, device=here.device)
    large = torch.empty_like(positive)
    error = torch.empty_like(here)
    for j, pair in enumerate(pairs):
        wanted = here[j] - inner[:j, j] @ error[:j]
        level = _nearest(wanted, pair, positive[j], large[j])
        error[j] = (wanted - level) / inner[j, j]
    return _Block(slice(0), salient, positive, large, scales)


# --- sweeps: all columns known, rounded scales ------------------------------------------------------------------------


def _sweep(blocks: list[_Block], target: Tensor, metric: Tensor) -> None:
    """Fit every block's scales, in whole steps, and then its codes, all other blocks being what they are.

    The first sweep rounds the scales; from then on no row's error, tr(D metric Dᵀ), can grow.
    """
    level = torch.cat([block.level() for block in blocks])
    # Half of the error's gradient, in terms of -level: metric (W - B).
    slope = metric @ (target - level)
    for block in blocks:
        here = block.columns
        inner, before = metric[here, here], level[here]
        block.scales = _fit(block, inner, slope[here] + inner @ before, whole=True)
        after = block.level()
        change = after - before
        change += _descend(block, inner, slope[here] - inner @ change, after)
        slope.addmm_(metric[:, here], change, alpha=-1)


def _descend(block: _Block, inner: Tensor, slope: Tensor, level: Tensor) -> Tensor:
    """Take every column's best codes in turn, the others being what they are; return the change of level [n, rows]."""
    change = torch.empty_like(level)
    for j, pair in enumerate(_magnitudes(block.scales)[block.salient.long()]):
        wanted = level[j] + (slope[j] - inner[:j, j] @ change[:j]) / inner[j, j]
        change[j] = _nearest(wanted, pair, block.positive[j], block.large[j]) - level[j]
    return change


# --- levels and scales ------------------------------------------------------------------------------------------------


def _magnitudes(scales: Tensor) -> Tensor:
    """Turn scales [4, rows] into magnitudes [2, 2, rows]: class (1: salient), and small or large."""
    concentrated, sparse, outer, residual = scales
    return torch.stack((concentrated, sparse, outer - residual, outer + residual)).view(2, 2, -1)


def _level(positive: Tensor, large: Tensor, salient: Tensor, magnitudes: Tensor) -> Tensor:
    small, big = (torch.where(salient[:, None], magnitudes[1, k], magnitudes[0, k]) for k in (0, 1))
    level = torch.where(large, big, small)
    return torch.where(positive, level, -level)


def _nearest(wanted: Tensor, pair: Tensor, positive: Tensor, large: Tensor) -> Tensor:
    """Return the nearest of the four levels ±pair[0], ±pair[1] for each of `wanted` [rows]; fill in its codes."""
    torch.ge(wanted, 0, out=positive)
    torch.gt(wanted.abs(), (pair[0] + pair[1]) / 2, out=large)
    large ^= pair[0] > pair[1]  # a fit can turn the two around
    level = torch.where(large, pair[1], pair[0])
    return torch.where(positive, level, -level)


def _fit(block: _Block, metric: Tensor, wanted: Tensor, *, whole: bool = False) -> Tensor:
    """Return the scales [4, rows] with the least error for the block's codes: levelᵀ metric level - 2 levelᵀ wanted.

    `metric` is [n, n], `wanted` [n, rows]. The normal equations are solved from the last scale to the first; with
    `whole`, each is rounded as it is found, and those after it make up for that (Babai's nearest plane).
    """
    curvature, pull = _normal_equations(block, metric, wanted)
    own = curvature.diagonal(dim1=-2, dim2=-1)
    own.copy_(torch.where(own > 0, own * (1 + _RIDGE), 1.0))  # a group without members: its scale is 0
    lower = torch.linalg.cholesky_ex(curvature).L
    rest = torch.linalg.solve_triangular(lower, pull[:, :, None], upper=False)[:, :, 0]
    fitted = torch.zeros_like(rest)
    for k in (3, 2, 1, 0):
        value = (rest[:, k] - (lower[:, k + 1 :, k] * fitted[:, k + 1 :]).sum(1)) / lower[:, k, k]
        fitted[:, k] = value.round().clamp(0, MAX_LEVEL) if whole else value.clamp(min=0)
    concentrated, sparse, outer, residual = fitted.T
    residual = torch.minimum(residual, outer)  # what the format wants
    if whole:
        residual = torch.minimum(residual, MAX_LEVEL - outer)
    scales = torch.stack((concentrated, sparse, outer, residual))
    # Where the format's bounds were in the way, the old scales can be the better ones.
    old = block.scales.round() if whole else block.scales
    better = _error(curvature, pull, scales) < _error(curvature, pull, old)
    return torch.where(better, scales, old)


def _error(curvature: Tensor, pull: Tensor, scales: Tensor) -> Tensor:
    """Return each row's error [rows], a constant apart, from its normal equations."""
    return torch.einsum("ir,rij,jr->r", scales, curvature, scales) - 2 * torch.einsum("ri,ir->r", pull, scales)


def _normal_equations(block: _Block, metric: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the curvature [rows, 4, 4] and the pull [rows, 4] of the four scales."""
    sign = block.positive.to(wanted) * 2 - 1
    salient = block.salient.to(wanted)[:, None]
    large = block.large.to(wanted)
    # Each magnitude's signs, 0 where it does not stand.
    parts = [sign * members for members in ((1 - large) * (1 - salient), large * (1 - salient), (1 - large) * salient)]
    parts.append(sign * large * salient)
    bent = [metric @ part for part in parts]
    rows = wanted.shape[1]
    curvature = wanted.new_empty(rows, 4, 4)
    for i in range(4):
        for j in range(i + 1):
            curvature[:, i, j] = curvature[:, j, i] = (parts[i] * bent[j]).sum(0)
    pull = torch.stack([(part * wanted).sum(0) for part in parts], dim=1)
    change = _change(wanted.dtype, wanted.device)
    return change.T @ curvature @ change, pull @ change


@functools.cache
def _change(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return _MAGNITUDES on the device, where it is brought but once: a GPU would be waited for each time."""
    return torch.tensor(_MAGNITUDES, dtype=dtype, device=device)


def _largest(scales: Tensor) -> Tensor:
    """Return the largest magnitude [rows] that the format makes of unrounded scales [4, rows]."""
    return torch.maximum(torch.maximum(scales[0], scales[1]), scales[2] + scales[3])


# --- the result -------------------------------------------------------------------------------------------------------


def _solved(
    blocks: list[_Block],
    weight: Tensor,
    hessian: Tensor,
    step: Tensor,
    col_scale: Tensor,
    block_size: int,
    damp: float,
) -> SolvedLinear:
    """Pack the blocks and measure the stored weights."""
    # Contiguous again: the writer stores arrays as they lie in memory.
    positive = torch.cat([block.positive for block in blocks]).T.contiguous()
    large = torch.cat([block.large for block in blocks]).T.contiguous()
    salient = torch.cat([block.salient for block in blocks])
    # In salient columns the second plane is the residual's sign: the same as the first where the sum is the larger one.
    second = torch.where(salient, large == positive, large)
    rows, cols = weight.shape
    packed = PackedLinear(
        rows=rows,
        cols=cols,
        block=block_size,
        sign=pack_bits(positive.cpu().numpy()),
        second=pack_bits(second.cpu().numpy()),
        salient=pack_bits(salient.cpu().numpy()),
        scales=torch.stack([block.scales.T for block in blocks], dim=1).to(torch.uint8).cpu().numpy(),
        row_scale=step.cpu().numpy(),
        col_scale=col_scale.cpu().numpy(),
    )
    level = torch.cat([block.level() for block in blocks]).T.contiguous()
    stored = stored_weight(level, step, col_scale)
    delta = weight - stored.to(weight)
    output, own = relative_errors(weight, delta, hessian)
    columns = int(salient.sum())
    sparse = int((large & ~salient).sum())
    return SolvedLinear(
        packed=packed,
        weight=stored,
        error=output,
        weight_error=own,
        salient_fraction=columns / cols,
        sparse_fraction=sparse / (rows * (cols - columns)),
        damp=damp,
    )
