"""The Hessian's sums and its factor against float64, and the memory that they take."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from billm_convert.hessian import FACTOR_MATRICES, HessianAccumulator, factor_inverse
from billm_convert.refined import RefinedSettings, solve_refined
from billm_convert.solved import solving_memory
from billm_convert.solver import solve_linear


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._counted | before:
                self._counted.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _peak(work: Callable[[], object]) -> int:
    with PeakMemory() as memory:
        work()
    return memory.peak


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


def test_factoring_takes_the_memory_that_is_planned(seed: int) -> None:
    """A wide Linear's matrices are many gigabytes on a GPU."""
    cols = 256
    x = torch.randn(600, cols, generator=torch.Generator().manual_seed(seed))
    accumulator = HessianAccumulator(cols, "cpu")
    accumulator.add(x)
    assert _peak(accumulator.result) <= FACTOR_MATRICES * 8 * cols * cols
    assert _peak(lambda: factor_inverse(accumulator.result(), 0.01)) <= FACTOR_MATRICES * 8 * cols * cols


@pytest.mark.parametrize("rows", [32, 1024])
def test_solving_takes_the_memory_that_is_planned(rows: int, seed: int) -> None:
    """For two Linears of one input, and for one with all that a recipe can be told; nor is far too much planned."""
    cols = 256
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, cols, generator=generator)
    hessian = 2 * x.T @ x / 600
    pair = list(torch.randn(2, rows, cols, generator=generator))
    planned = solving_memory(rows, cols)
    assert _peak(lambda: [solve_linear(weight, hessian) for weight in pair]) <= planned
    assert _peak(lambda: solve_refined(pair, hessian, RefinedSettings(), hessian)) <= planned
    assert (
        planned / 2 <= _peak(lambda: solve_refined(pair[:1], hessian, RefinedSettings(), hessian, pair[1])) <= planned
    )
