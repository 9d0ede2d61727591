"""The rival methods, against plain loops on random problems, and what they count as stored."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from convert import baseline_reference as reference
from convert.solver_problems import correlated_inputs, hessian, one_thread
from numpy.typing import NDArray

from billm_convert.baselines import BASELINES, BaselineSettings, QuantizedWeight, arb
from billm_convert.baselines.authors import residual_binarization
from billm_format.errors import UsageError

Matrix = NDArray[np.float64]
__all__ = ["one_thread"]  # a fixture

ROWS, COLS, BLOCK, DAMP = 5, 44, 16, 0.01
SETTINGS = BaselineSettings(block_size=BLOCK, damp=DAMP)


@pytest.fixture(params=["plain", "outliers", "dead inputs", "few tokens"])
def problem(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[Matrix, Matrix]:
    weight = rng.normal(size=(ROWS, COLS)) * 0.05
    inputs = correlated_inputs(rng, 30 if request.param == "few tokens" else 200, COLS)
    if request.param == "outliers":
        weight[:, rng.permutation(COLS)[:4]] *= 8
        inputs[:, rng.permutation(COLS)[:3]] *= 30
    if request.param == "dead inputs":
        inputs[:, rng.permutation(COLS)[:5]] = 0
    return weight, hessian(inputs)


def run(name: str, problem: tuple[Matrix, Matrix], settings: BaselineSettings = SETTINGS) -> QuantizedWeight:
    return BASELINES[name](torch.from_numpy(problem[0]), torch.from_numpy(problem[1]), settings)


def agree(found: QuantizedWeight, wanted: Matrix) -> None:
    np.testing.assert_allclose(found.weight.numpy(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rounding_to_nearest_equals_the_loop(bits: int, problem: tuple[Matrix, Matrix]) -> None:
    found = run(f"rtn-{bits}", problem)
    agree(found, reference.rtn(*problem, bits, BLOCK))
    assert found.bits_paper == bits
    assert found.bits_stored == pytest.approx(bits + (16 + bits) * 3 / COLS)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_gptq_equals_the_loop(bits: int, problem: tuple[Matrix, Matrix]) -> None:
    found = run(f"gptq-{bits}", problem)
    agree(found, reference.gptq(*problem, bits, BLOCK, DAMP))
    assert found.bits_stored == pytest.approx(bits + (16 + bits) * 3 / COLS)


def test_pb_llm_equals_the_loop(problem: tuple[Matrix, Matrix]) -> None:
    found = run("pb-llm", problem)
    wanted, low = reference.pb_llm(*problem, DAMP)
    agree(found, wanted)
    assert found.bits_paper == pytest.approx(low.mean() + 8 * (1 - low.mean()))
    assert 1.6 < found.bits_paper < 1.8  # a tenth of the weights at 8 bits
    assert found.bits_stored == pytest.approx(found.bits_paper + 1 + 56 / COLS)


def test_the_published_billm_equals_the_loop(problem: tuple[Matrix, Matrix]) -> None:
    found = run("billm-code", problem)
    wanted, columns = reference.billm_code(*problem, BLOCK, DAMP)
    agree(found, wanted)
    assert found.bits_paper == 1 + columns / COLS
    assert found.bits_stored == pytest.approx(2 + 1 / ROWS + 7 * 16 * 3 / COLS)


@pytest.mark.parametrize("order", [1, 2])
def test_arb_refines_a_zone_as_the_loop_does(order: int, rng: np.random.Generator) -> None:
    """Zones with many weights in every row and column: what is left of fewer is rounding, whose sign is anybody's."""
    x = rng.normal(size=(12, 18)) * rng.uniform(0.2, 3, size=(1, 18))
    zone = rng.random((12, 18)) < 0.7
    zone[:, 5] = False  # as for a column of the other class
    found = arb.refine(torch.from_numpy(x), torch.from_numpy(zone), order).numpy()
    np.testing.assert_allclose(found, reference.refined(x, zone, order), rtol=1e-6, atol=1e-9)
    assert not found[~zone].any()
    plain = reference.binarized(np.where(zone, x, 0), zone, order)
    assert ((x - found)[zone] ** 2).sum() < ((x - plain)[zone] ** 2).sum()


def test_arb_rc_equals_the_loop(problem: tuple[Matrix, Matrix], monkeypatch: pytest.MonkeyPatch) -> None:
    """Zones, compensation and bits, every zone binarized in the plain way (see the test above for the real one)."""
    monkeypatch.setattr(arb, "refine", residual_binarization)
    monkeypatch.setattr(reference, "refined", reference.binarized)
    found = run("arb-rc", problem)
    wanted, columns = reference.arb_rc(*problem, BLOCK, DAMP)
    agree(found, wanted)
    share = columns / COLS
    assert found.bits_paper == 1 + share
    assert found.bits_stored == pytest.approx(2 + share + 1 / ROWS + 32 * (1 + share) / ROWS + 6 * 16 * 3 / COLS)


@pytest.mark.parametrize("name", BASELINES)
def test_distinct_values_are_no_more_than_the_bits_allow(name: str, rng: np.random.Generator) -> None:
    """Per row and block, or per row and column where columns have scales of their own."""
    weight, inputs = rng.normal(size=(64, 256)), correlated_inputs(rng, 400, 256)
    found = run(name, (weight, hessian(inputs)), BaselineSettings(block_size=128))
    most = {"rtn": 1, "gptq": 1}.get(name.partition("-")[0])
    for part in torch.split(found.weight, 128, dim=1):
        for row in part:
            values = len(set(row.tolist()))
            if most:
                assert values <= 2 ** int(name[-1])
            elif name == "billm-code":
                assert values <= 2 + 2 + 4


@pytest.mark.parametrize(
    ("better", "worse"),
    [("gptq-3", "gptq-2"), ("gptq-2", "gptq-1"), ("gptq-2", "rtn-2"), ("gptq-3", "rtn-3"), ("arb-rc", "billm-code")],
)
def test_the_order_of_methods(better: str, worse: str, rng: np.random.Generator) -> None:
    """Output error on the Hessian that both were given."""
    weight, h = rng.normal(size=(96, 256)), hessian(correlated_inputs(rng, 800, 256))

    def error(name: str) -> float:
        delta = weight - run(name, (weight, h), BaselineSettings()).weight.numpy()
        return float(np.trace(delta @ h @ delta.T))

    assert error(better) < error(worse)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("change", ["float32", "zeros", "one column", "all dead"])
def test_odd_inputs_give_finite_weights(name: str, change: str, rng: np.random.Generator) -> None:
    weight, inputs = rng.normal(size=(6, 40)), correlated_inputs(rng, 100, 40)
    if change == "zeros":
        weight[2], weight[:, 7] = 0, 0
    if change == "one column":
        weight, inputs = weight[:, :33], inputs[:, :33]  # the last block is one column wide
    if change == "all dead":
        inputs[:] = 0
    kind: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float if change == "float32" else torch.Tensor.double
    w, h = kind(torch.from_numpy(weight)), kind(torch.from_numpy(hessian(inputs)))
    before = w.clone()
    found = BASELINES[name](w, h, BaselineSettings(block_size=32))
    assert found.weight.dtype == w.dtype
    assert found.weight.shape == w.shape
    assert bool(found.weight.isfinite().all())
    assert torch.equal(w, before)
    assert found.bits_stored > found.bits_paper >= 1


def test_settings_without_meaning() -> None:
    for wrong in ({"block_size": 0}, {"damp": -1.0}, {"damp": float("nan")}):
        with pytest.raises(UsageError):
            BaselineSettings(**wrong)  # type: ignore[arg-type]
