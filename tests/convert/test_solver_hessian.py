"""The Hessian's sums and its factor against float64."""

import numpy as np
import pytest
import torch

from billm_convert.hessian import HessianAccumulator, factor_inverse


@pytest.mark.parametrize("cols", [1, 40, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_sums_over_batches(seed: int, cols: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    accumulator = HessianAccumulator(cols, "cpu")
    batches = [torch.randn(tokens, cols, generator=generator).to(dtype) for tokens in (1, 37, 300)]
    for batch in batches:
        accumulator.add(batch)
    x = torch.cat(batches).double().numpy()
    result = accumulator.result()
    assert result.dtype == torch.float32
    assert torch.equal(result, result.T)
    wanted = 2 * x.T @ x / len(x)
    assert np.abs(result.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_huge_channels_do_not_drown_the_rest(seed: int) -> None:
    """One token with norms a thousand times the others', as real models have: each entry keeps its own precision."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 96, generator=generator)
    x[0, :3] = 20000.0
    accumulator = HessianAccumulator(96, "cpu")
    for batch in x.split(500):
        accumulator.add(batch)
    wanted = 2 * x.double().T @ x.double() / len(x)
    size = wanted.diagonal().sqrt()
    assert ((accumulator.result() - wanted).abs() / torch.outer(size, size)).max() < 1e-5


def test_wants_tokens_of_its_width() -> None:
    accumulator = HessianAccumulator(8, "cpu")
    with pytest.raises(ValueError, match="at least one token"):
        accumulator.result()
    with pytest.raises(ValueError, match=r"\[tokens, 8\], found \[3, 9\]"):
        accumulator.add(torch.zeros(3, 9))


def test_factor_of_the_inverse(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(300, 50)) @ random.normal(size=(50, 50))
    hessian = x.T @ x / 300
    factor = factor_inverse(torch.from_numpy(hessian), 0.02)
    upper = factor.upper.numpy()
    dampened = hessian + 0.02 * np.trace(hessian) / 50 * np.eye(50)
    assert factor.damp == 0.02
    assert np.array_equal(upper, np.triu(upper))
    assert (np.diag(upper) > 0).all()
    assert np.allclose(upper.T @ upper @ dampened, np.eye(50), atol=1e-9)
