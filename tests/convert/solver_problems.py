"""Random Linears and Hessians for the solver's tests: every trouble that real ones bring, and some they do not."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Random = np.random.Generator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to waiting for a second thread than they gain, tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hessian(inputs: Matrix) -> Matrix:
    """2 X Xᵀ over inputs [tokens, cols], as a mean."""
    return 2 * inputs.T @ inputs / len(inputs)


def correlated_inputs(random: Random, tokens: int, cols: int) -> Matrix:
    """Inputs whose features share a few directions, as hidden states do."""
    return random.normal(size=(tokens, 4)) @ random.normal(size=(4, cols)) + 0.5 * random.normal(size=(tokens, cols))


def _plain(random: Random) -> tuple[Matrix, Matrix]:
    return random.normal(size=(6, 64)), hessian(random.normal(size=(200, 64)))


def _correlated(random: Random) -> tuple[Matrix, Matrix]:
    return random.normal(size=(7, 70)) * 0.02, hessian(correlated_inputs(random, 300, 70))


def _outliers(random: Random) -> tuple[Matrix, Matrix]:
    weight = random.normal(size=(8, 75))
    weight[:, random.permutation(75)[:6]] *= 10
    inputs = correlated_inputs(random, 100, 75)
    inputs[:, random.permutation(75)[:3]] *= 100
    return weight, hessian(inputs)


def _heavy_tails(random: Random) -> tuple[Matrix, Matrix]:
    # One huge weight in a row's salient columns makes alpha_r exceed alpha_o: the planes swap.
    return random.standard_t(1.2, size=(8, 64)), hessian(correlated_inputs(random, 100, 64))


def _few_tokens(random: Random) -> tuple[Matrix, Matrix]:
    return random.normal(size=(5, 66)), hessian(random.normal(size=(20, 66)))  # singular


def _dead_inputs(random: Random) -> tuple[Matrix, Matrix]:
    inputs = correlated_inputs(random, 100, 64)
    inputs[:, random.permutation(64)[:9]] = 0
    return random.normal(size=(6, 64)), hessian(inputs)


def _zero_weights(random: Random) -> tuple[Matrix, Matrix]:
    weight = random.normal(size=(6, 70))
    weight[2] = 0
    weight[:, :40] *= random.random(size=(6, 40)) < 0.5
    return weight, hessian(random.normal(size=(200, 70)))


def _tiny_values(random: Random) -> tuple[Matrix, Matrix]:
    # Below what float16 holds well: the steps are subnormal numbers.
    scale = 10.0 ** -random.integers(3, 9, size=(6, 1))
    return random.normal(size=(6, 40)) * scale, hessian(random.normal(size=(100, 40)))


def _tiny_shape(random: Random) -> tuple[Matrix, Matrix]:
    rows, cols = int(random.integers(1, 4)), int(random.integers(1, 37))
    return random.normal(size=(rows, cols)), hessian(random.normal(size=(64, cols)))


KINDS: dict[str, Callable[[Random], tuple[Matrix, Matrix]]] = {
    function.__name__.strip("_"): function
    for function in (
        _plain,
        _correlated,
        _outliers,
        _heavy_tails,
        _few_tokens,
        _dead_inputs,
        _zero_weights,
        _tiny_values,
        _tiny_shape,
    )
}
