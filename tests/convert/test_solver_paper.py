"""The solver against the paper as plain loops: same masks, same codes, same scales, same weights."""

import numpy as np
import pytest
import torch
from convert import paper_reference, solver_problems
from convert.solver_problems import one_thread  # noqa: F401

from billm_convert.solver import PaperSettings, SolvedLinear, solve_linear
from billm_format.packing import unpack_bits

BLOCK = 32


def _assert_same(solved: SolvedLinear, wanted: paper_reference.Result, unit: np.ndarray) -> None:
    packed = solved.packed
    salient = np.array(wanted.salient)
    assert unpack_bits(packed.salient, packed.cols).tolist() == wanted.salient
    assert np.array_equal(unpack_bits(packed.sign, packed.cols), wanted.sign)
    assert np.array_equal(
        unpack_bits(packed.second, packed.cols), np.where(salient, wanted.residual_sign, wanted.sparse)
    )
    assert np.array_equal(packed.row_scale, unit)
    assert np.array_equal(packed.scales, wanted.alpha)
    assert np.array_equal(packed.dequantize(), wanted.B.astype(np.float32))
    assert solved.weight.numpy().tobytes() == packed.dequantize().tobytes()
    assert solved.salient_fraction == pytest.approx(salient.mean())
    assert solved.sparse_fraction == pytest.approx(wanted.sparse[:, ~salient].mean())


@pytest.mark.parametrize("breakpoint_", ["magnitude", "percentile"])
@pytest.mark.parametrize("kind", solver_problems.KINDS)
def test_same_decisions_as_the_paper(kind: str, breakpoint_: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    compared = 0
    for _ in range(6):
        weight, hessian = solver_problems.KINDS[kind](random)
        fewest = int(random.integers(0, 6))
        most = fewest + int(random.integers(0, 26))
        wanted, unit = paper_reference.solve(
            weight, hessian, BLOCK, fewest=fewest, most=most, percentile=breakpoint_ == "percentile"
        )
        settings = PaperSettings(BLOCK, fewest, most, breakpoint=breakpoint_)
        solved = solve_linear(torch.from_numpy(weight), torch.from_numpy(hessian), settings)
        if wanted.margin < 1e-9:
            continue  # a tie: two honest programs may differ
        _assert_same(solved, wanted, unit)
        compared += 1
    assert compared >= 3, "too many ties for the comparison to mean anything"


def test_same_decisions_in_float32(seed: int) -> None:
    """In the precision of production, wherever no decision was close."""
    random = np.random.default_rng(seed)
    compared = 0
    for _ in range(30):
        weight = random.normal(size=(3, 40)).astype(np.float32)
        hessian = solver_problems.hessian(solver_problems.correlated_inputs(random, 50, 40)).astype(np.float32)
        wanted, unit = paper_reference.solve(weight.astype(np.float64), hessian.astype(np.float64), BLOCK)
        if wanted.margin > 2e-5:
            solved = solve_linear(torch.from_numpy(weight), torch.from_numpy(hessian), PaperSettings(BLOCK))
            _assert_same(solved, wanted, unit)
            compared += 1
    assert compared >= 2, "too many close decisions for the comparison to mean anything"
