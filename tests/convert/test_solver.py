"""What must hold of any binarized Linear, whatever the algorithm inside."""

import numpy as np
import pytest
import torch
from convert import paper_reference, solver_problems
from convert.solver_problems import one_thread  # noqa: F401
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.binarize import row_step
from billm_convert.hessian import factor_inverse
from billm_convert.solver import PaperSettings, SolvedLinear, _compensate, _solve_blocks, solve_linear
from billm_format.errors import UsageError
from billm_format.layout import ALPHA_O, ALPHA_R, ALPHA_S
from billm_format.packing import unpack_bits

BLOCK = 32


def _problem(seed: int, rows: int = 48, cols: int = 176, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """A Linear with correlated inputs of unequal size; the last block of 32 is half a block."""
    random = np.random.default_rng(seed)
    inputs = solver_problems.correlated_inputs(random, tokens, cols) * random.lognormal(sigma=0.5, size=cols)
    weight = random.standard_t(5, size=(rows, cols)) * 0.05
    return torch.from_numpy(weight).float(), torch.from_numpy(solver_problems.hessian(inputs)).float()


def _error(weight: Tensor, binarized: NDArray[np.float32], hessian: Tensor) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) in float64."""
    w, h = weight.double().numpy(), hessian.double().numpy()
    delta = w - binarized.astype(np.float64)
    return float(
        np.einsum("ri,ij,rj->", delta, h, delta, optimize=True) / np.einsum("ri,ij,rj->", w, h, w, optimize=True)
    )


def _bytes(solved: SolvedLinear) -> bytes:
    packed = solved.packed
    arrays = (packed.sign, packed.second, packed.salient, packed.scales, packed.row_scale)
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_shapes_and_figures(seed: int, block: int) -> None:
    weight, hessian = _problem(seed)
    solved = solve_linear(weight, hessian, PaperSettings(block))
    packed = solved.packed
    binarized = packed.dequantize()
    assert (packed.rows, packed.cols, packed.block) == (48, 176, block)
    assert packed.scales.shape == (48, packed.num_blocks, 4)
    assert packed.row_scale.dtype == np.float16
    assert binarized.shape == weight.shape
    assert solved.error == pytest.approx(_error(weight, binarized, hessian), rel=1e-4)
    delta = weight.numpy() - binarized
    assert solved.weight_error == pytest.approx(float((delta**2).sum() / (weight.numpy() ** 2).sum()), rel=1e-4)
    salient = unpack_bits(packed.salient, packed.cols)
    assert solved.salient_fraction == pytest.approx(salient.mean())
    assert solved.sparse_fraction == pytest.approx(unpack_bits(packed.second, packed.cols)[:, ~salient].mean())
    assert solved.damp == 0.01


def test_every_block_has_3_to_30_salient_columns(seed: int) -> None:
    weight, hessian = _problem(seed, cols=300)
    salient = unpack_bits(solve_linear(weight, hessian).packed.salient, 300)
    counts = [int(salient[start : start + 128].sum()) for start in range(0, 300, 128)]
    assert all(3 <= count <= 30 for count in counts), counts


@pytest.mark.parametrize("kind", solver_problems.KINDS)
def test_codes_never_saturate(seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    for _ in range(3):
        weight, hessian = (torch.from_numpy(part).float() for part in solver_problems.KINDS[kind](random))
        scales = solve_linear(weight, hessian, PaperSettings(BLOCK)).packed.scales.astype(int)
        assert (scales[..., ALPHA_O] + scales[..., ALPHA_R]).max() <= 255
        assert (scales[..., ALPHA_R] <= scales[..., ALPHA_O]).all()


def test_the_swap_of_planes_is_reached() -> None:
    """A salient column set of one huge weight among tiny ones: the residual's scale is the larger."""
    weight = torch.full((2, 8), 0.01)
    weight[0, 0] = 3.0
    weight[1] = torch.linspace(-1, 1, 8)
    hessian = torch.diag(torch.tensor([9.0, 8.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    plain = weight[0, :3].mean()
    assert (weight[0, :3] - plain).abs().mean() > plain  # else this is no such case
    packed = solve_linear(weight, hessian, PaperSettings(BLOCK, 3, 3)).packed
    assert unpack_bits(packed.salient, 8)[0]
    assert packed.scales[0, 0, ALPHA_R] < packed.scales[0, 0, ALPHA_O]
    # The paper's alpha_o = 3.02 / 3 and alpha_r = 1.329, which only add up to the right values in their own planes.
    assert packed.dequantize()[0, 0] == pytest.approx(1.007 + 1.329, abs=0.02)
    assert packed.dequantize()[0, 1] == pytest.approx(1.007 - 1.329, abs=0.02)


def test_compensation_works_on_the_stored_weights(seed: int) -> None:
    """Replay Algorithm 1, lines 12 and 13, from the packed weights alone: each block must be the binarization of what
    they leave of its columns, which a signed sum of the stored scales shows."""
    weight, hessian = (part.double() for part in _problem(seed))
    packed = solve_linear(weight, hessian, PaperSettings(BLOCK)).packed
    upper = paper_reference.cholesky_of_inverse(hessian.numpy(), 0.01)
    stored, work = packed.dequantize().astype(np.float64), weight.numpy().copy()
    positive = unpack_bits(packed.sign, packed.cols)
    group = unpack_bits(packed.second, packed.cols)
    salient = unpack_bits(packed.salient, packed.cols)
    for block, start in enumerate(range(0, packed.cols, BLOCK)):
        here = slice(start, start + BLOCK)
        rest = ~salient[here]
        assert np.array_equal(positive[:, here][:, rest], work[:, here][:, rest] >= 0)
        for row in range(packed.rows):
            members = rest & ~group[row, here]
            if members.any() and packed.row_scale[row] > 0:
                alpha_c = np.abs(work[row, here][members]).mean() / float(packed.row_scale[row])
                assert abs(alpha_c - packed.scales[row, block, 0]) < 0.501
        error = (work[:, here] - stored[:, here]) / np.diag(upper)[here]
        work[:, start + BLOCK :] -= error @ upper[here, start + BLOCK :]


def test_eight_bit_scales_cost_little(seed: int) -> None:
    """On average over problems: a single one may fall either way, since one other mask changes all that follows."""
    settings, ratios = PaperSettings(), []
    for step in range(8):
        weight, hessian = _problem(seed + step, rows=200, cols=512)
        upper = factor_inverse(hessian, settings.damp).upper.to(weight)
        blocks = [codes.weight for codes in _solve_blocks(weight, upper, settings, None)]
        unrounded = _error(weight, torch.cat(blocks, dim=1).numpy(), hessian)
        ratios.append(np.log(solve_linear(weight, hessian, settings).error / unrounded))
    assert abs(np.mean(ratios)) < 0.04


def test_better_than_signs_and_than_no_compensation(seed: int) -> None:
    weight, hessian = _problem(seed)
    solved = solve_linear(weight, hessian, PaperSettings(BLOCK)).error
    without = solve_linear(weight, hessian, PaperSettings(BLOCK, compensation="none")).error
    signs = weight.sign() * weight.abs().mean(dim=1, keepdim=True)
    assert solved < 0.8 * without
    assert without < 0.8 * _error(weight, signs.numpy(), hessian)


def test_exact_compensation_solves_for_the_rest(seed: int) -> None:
    """Where a last block may take any value, it makes up for the first one as least squares would."""
    weight, hessian = (part.double() for part in _problem(seed, rows=5, cols=64))
    upper = factor_inverse(hessian, 0.01).upper
    delta = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, BLOCK)))
    work = weight.clone()
    _compensate(work, delta, upper, 0, "exact")
    h = hessian.numpy() + 0.01 * float(hessian.diagonal().mean()) * np.eye(64)
    wanted = delta.numpy() @ h[:BLOCK, BLOCK:] @ np.linalg.inv(h[BLOCK:, BLOCK:])
    assert np.allclose((work - weight)[:, BLOCK:].numpy(), wanted)
    assert torch.equal(work[:, :BLOCK], weight[:, :BLOCK])


@pytest.mark.parametrize("options", [{"search_on": "salience"}, {"search_on": "salience", "breakpoint": "percentile"}])
def test_searching_on_salience_changes_the_masks(seed: int, options: dict[str, str]) -> None:
    weight, hessian = _problem(seed)
    paper = solve_linear(weight, hessian, PaperSettings(BLOCK))
    other = solve_linear(weight, hessian, PaperSettings(BLOCK, **options))  # type: ignore[arg-type]
    assert _bytes(paper) != _bytes(other)
    assert other.error == pytest.approx(_error(weight, other.packed.dequantize(), hessian), rel=1e-4)


def test_without_the_split_every_non_salient_weight_has_one_scale(seed: int) -> None:
    weight, hessian = _problem(seed)
    solved = solve_linear(weight, hessian, PaperSettings(BLOCK, splitting=False))
    salient = unpack_bits(solved.packed.salient, solved.packed.cols)
    assert salient.any()
    assert solved.sparse_fraction == 0
    assert not solved.packed.scales[..., ALPHA_S].any()
    assert not unpack_bits(solved.packed.second, solved.packed.cols)[:, ~salient].any()
    assert solved.error > solve_linear(weight, hessian, PaperSettings(BLOCK)).error


def test_same_input_same_bytes(seed: int) -> None:
    weight, hessian = _problem(seed)
    before = weight.clone(), hessian.clone()
    first = solve_linear(weight, hessian, PaperSettings(BLOCK))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert _bytes(first) == _bytes(solve_linear(weight.clone(), hessian.clone(), PaperSettings(BLOCK)))


def test_a_factor_on_the_hessian_changes_nothing(seed: int) -> None:
    weight, hessian = _problem(seed)
    settings = PaperSettings(BLOCK)
    assert _bytes(solve_linear(weight, hessian, settings)) == _bytes(solve_linear(weight, hessian * 1024, settings))


@pytest.mark.parametrize(("weight_factor", "hessian_factor", "error"), [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_nothing_to_keep(seed: int, weight_factor: float, hessian_factor: float, error: float) -> None:
    weight, hessian = _problem(seed)
    solved = solve_linear(weight * weight_factor, hessian * hessian_factor, PaperSettings(BLOCK))
    assert solved.error == error
    assert np.isfinite(solved.packed.dequantize()).all()
    if weight_factor == 0:
        assert not solved.packed.dequantize().any()


def test_dampening_is_raised_where_it_must_be(seed: int) -> None:
    weight, hessian = _problem(seed, tokens=40)
    hessian[3] = hessian[:, 3] = 0
    solved = solve_linear(weight, hessian, PaperSettings(BLOCK, damp=0.0))
    assert 0 < solved.damp < 0.01
    assert np.isfinite(solved.error)


def test_row_step_is_the_least_that_fits(seed: int) -> None:
    random = np.random.default_rng(seed)
    largest = torch.from_numpy(10.0 ** random.uniform(-9, 6, size=500)).float()
    step = row_step(largest).float()
    below = torch.from_numpy(np.nextafter(row_step(largest).numpy(), np.float16(0))).float()
    assert (step >= largest / 240).all()
    assert (below < largest / 240).all()
    assert row_step(torch.zeros(3)).tolist() == [0, 0, 0]


def test_refusals(seed: int) -> None:
    weight, hessian = _problem(seed)
    with pytest.raises(ValueError, match=r"Hessian \[176, 176\], found \[175, 175\]"):
        solve_linear(weight, hessian[1:, 1:])
    with pytest.raises(ValueError, match="float32"):
        solve_linear(weight.half(), hessian)
    damaged = weight.clone()
    damaged[1, 2], damaged[3, 4] = torch.nan, torch.inf
    with pytest.raises(UsageError, match=r"2 of 8448 values of a Linear's weight \[48, 176\]"):
        solve_linear(damaged, hessian)
    with pytest.raises(UsageError, match=r"Hessian .* not finite"):
        solve_linear(weight, hessian * torch.inf)
    with pytest.raises(UsageError, match="not positive definite"):
        solve_linear(weight, -hessian)
    with pytest.raises(UsageError, match="float16 row multiplier"):
        solve_linear(weight * 1e12, hessian)
    for settings in ({"block_size": 100}, {"min_salient": 4, "max_salient": 3}, {"damp": 2.0}, {"damp": float("nan")}):
        with pytest.raises(UsageError):
            PaperSettings(**settings)  # type: ignore[arg-type]
