"""The rival methods as plain float64 loops over single weights: oracles that share no code with the real ones.

Nothing here is fast. Every function takes W [n, m] and H [m, m] and returns the weight that stands for W.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


def prepare(W: Matrix, H: Matrix, damp: float) -> tuple[Matrix, Matrix]:
    """Weights of dead inputs are dropped; the upper Cholesky factor of the dampened inverse."""
    W, H = W.copy(), H.copy()
    live = [H[j, j] for j in range(len(H)) if H[j, j] != 0]
    for j in range(len(H)):
        if H[j, j] == 0:
            H[j, j] = sum(live) / len(live)
            W[:, j] = 0
    H = H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    return W, np.linalg.cholesky(np.linalg.inv(H)).T


def sign(x: float) -> float:
    return 1.0 if x > 0 else -1.0 if x < 0 else 0.0


def grid(row: list[float], bits: int, share: float = 1.0) -> Callable[[float], float]:
    """GPTQ's asymmetric grid over one row's weights."""
    low, high = min([*row, 0.0]), max([*row, 0.0])
    if low == 0 and high == 0:
        low, high = -1.0, 1.0
    low, high = share * low, share * high
    scale = (high - low) / (2**bits - 1)
    zero = float(np.round(-low / scale))
    return lambda x: scale * (min(max(float(np.round(x / scale)) + zero, 0), 2**bits - 1) - zero)


def searched(row: list[float], bits: int) -> Callable[[float], float]:
    """The grid of the share of the range, 100 % down to 21 %, with the least sum of |error|^2.4."""
    best, least = grid(row, bits), math.inf
    for step in range(80):
        level = grid(row, bits, 1 - step / 100)
        error = sum(abs(level(x) - x) ** 2.4 for x in row)
        if error < least:
            best, least = level, error
    return best


def rtn(W: Matrix, H: Matrix, bits: int, group: int) -> Matrix:
    Q = np.zeros_like(W)
    for i in range(len(W)):
        for start in range(0, W.shape[1], group):
            part = [float(x) for x in W[i, start : start + group]]
            level = grid(part, bits)
            Q[i, start : start + group] = [level(x) for x in part]
    return Q


def feed_back(W: Matrix, U: Matrix, quantize: Callable[[int, int, Matrix], float]) -> Matrix:
    """Each weight's error is spread at once over all that follow: no blocks. `quantize` sees the row as it is then."""
    n, m = W.shape
    Q = np.zeros_like(W)
    for i in range(n):
        for j in range(m):
            Q[i, j] = quantize(i, j, W[i])
            error = (W[i, j] - Q[i, j]) / U[j, j]
            for later in range(j + 1, m):
                W[i, later] -= error * U[j, later]
    return Q


def gptq(W: Matrix, H: Matrix, bits: int, group: int, damp: float) -> Matrix:
    W, U = prepare(W, H, damp)
    grids: dict[tuple[int, int], Callable[[float], float]] = {}

    def quantize(i: int, j: int, row: Matrix) -> float:
        if j % group == 0:
            grids[i, j // group] = searched([float(x) for x in row[j : j + group]], bits)
        return grids[i, j // group](float(row[j]))

    return feed_back(W, U, quantize)


def pb_llm(W: Matrix, H: Matrix, damp: float) -> tuple[Matrix, Mask]:
    n, m = W.shape
    high = [grid([float(x) for x in W[i]], 8) for i in range(n)]
    W, U = prepare(W, H, damp)
    S = np.array([[W[i, j] ** 2 / U[j, j] ** 2 for j in range(m)] for i in range(n)])
    threshold = sorted(S.flatten())[int(S.size * 0.9)]
    low: Mask = threshold >= S
    means, scales = [], []
    for i in range(n):
        binary = [W[i, j] if low[i, j] else 0.0 for j in range(m)]
        means.append(sum(binary) / m)
        scales.append(sum(abs(x - means[i]) for x in binary) / m)

    def quantize(i: int, j: int, row: Matrix) -> float:
        return means[i] + scales[i] * sign(row[j] - means[i]) if low[i, j] else high[i](float(row[j]))

    return feed_back(W, U, quantize), low


def by_blocks(W: Matrix, U: Matrix, block: int, quantize: Callable[[Matrix, Matrix], Matrix]) -> Matrix:
    """BiLLM's compensation: errors over the factor's diagonal, spread over the blocks that follow."""
    n, m = W.shape
    Q = np.zeros_like(W)
    for b in range(0, m, block):
        end = min(b + block, m)
        Q[:, b:end] = quantize(W[:, b:end].copy(), np.diag(U)[b:end])
        for i in range(n):
            for j in range(b, end):
                error = (W[i, j] - Q[i, j]) / U[j, j]
                for later in range(end, m):
                    W[i, later] -= error * U[j, later]
    return Q


def binarized(X: Matrix, mask: Mask, order: int) -> Matrix:
    """`order` times: each row's mean and mean distance from it over its masked values."""
    out = np.zeros_like(X)
    for i in range(len(X)):
        members = [j for j in range(X.shape[1]) if mask[i, j]]
        for _ in range(order if members else 0):
            left = {j: X[i, j] - out[i, j] for j in members}
            mean = sum(left.values()) / len(members)
            scale = sum(abs(x - mean) for x in left.values()) / len(members)
            for j in members:
                out[i, j] += mean + scale * sign(left[j] - mean)
    return out


def salient(S: Matrix) -> list[int]:
    n, m = S.shape
    order = sorted(range(m), key=lambda j: -sum(S[i, j] for i in range(n)))
    best, least = 0, math.inf
    for count in range(1, min(50, m)):
        mask = np.zeros((n, m), bool)
        mask[:, order[:count]] = True
        error = float(((S - binarized(S, mask, 2) - binarized(S, ~mask, 2)) ** 2).mean())
        if error < least:
            best, least = count, error
    return order[:best]


def border(S: Matrix, among: Mask, values: list[float]) -> float:
    """Of the 81 quantiles of `values` the one that splits `among` for the least error."""
    best, least = 0.0, math.inf
    for p in np.quantile(np.array(values), np.linspace(0.10, 0.90, 81)):
        below, above = among & (p > S), among & (p <= S)
        error = float(((S * among - binarized(S, below, 1) - binarized(S, above, 1)) ** 2).mean())
        if error < least:
            best, least = float(p), error
    return best


def masks(S: Matrix) -> tuple[Mask, Mask]:
    """Masks of the salient columns and of the others."""
    chosen = np.zeros(S.shape, bool)
    chosen[:, salient(S)] = True
    return chosen, ~chosen


def billm_code(W: Matrix, H: Matrix, block: int, damp: float) -> tuple[Matrix, int]:
    W, U = prepare(W, H, damp)
    columns = 0

    def quantize(X: Matrix, diagonal: Matrix) -> Matrix:
        nonlocal columns
        S = X**2 / diagonal**2
        chosen, others = masks(S)
        columns += int(chosen[0].sum())
        p = border(S, others, list((S * others).flatten()))
        once = binarized(X, others & (p > S), 1) + binarized(X, others & (p <= S), 1)
        return once + binarized(X, chosen, 2)

    return by_blocks(W, U, block, quantize), columns


def arb_rc(W: Matrix, H: Matrix, block: int, damp: float) -> tuple[Matrix, int]:
    W, U = prepare(W, H, damp)
    columns = 0

    def quantize(X: Matrix, diagonal: Matrix) -> Matrix:
        nonlocal columns
        S = X**2 / diagonal**2
        chosen, others = masks(S)
        columns += int(chosen[0].sum())
        out = np.zeros_like(X)
        for members, order in ((others, 1), (chosen, 2)):
            p = border(S, members, [float(s) for s in S[members]])
            for zone in (members & (p > S), members & (p <= S)):
                out += refined(X, zone, order)
        return out

    return by_blocks(W, U, block, quantize), columns


def refined(X: Matrix, zone: Mask, order: int, rounds: int = 15) -> Matrix:
    """ARB-RC on one zone: r[k][i] * c[k][j] * B[k][i, j], summed over planes k."""
    n, m = X.shape
    cells = [(i, j) for i in range(n) for j in range(m) if zone[i, j]]
    r, c, B = np.zeros((order, n)), np.zeros((order, m)), np.zeros((order, n, m))

    def left(k: int, i: int, j: int, among: range) -> float:
        return float(X[i, j] - sum(r[o, i] * c[o, j] * B[o, i, j] for o in among if o != k))

    for k in range(order):
        rest = {(i, j): left(k, i, j, range(k)) for i, j in cells}
        for i in range(n):
            row = [abs(rest[cell]) for cell in cells if cell[0] == i]
            r[k, i] = sum(row) / len(row) if row else 0.0
        for j in range(m):
            # A row that the planes before hold exactly has nothing left, and a scale of 0.
            column = [abs(rest[cell]) / (r[k, cell[0]] or 1.0) for cell in cells if cell[1] == j]
            c[k, j] = sum(column) / len(column) if column else 0.0
        for i, j in cells:
            B[k, i, j] = sign(rest[i, j])
    for _ in range(rounds):
        for k in range(order):
            rest = {(i, j): left(k, i, j, range(order)) for i, j in cells}
            for i in range(n):
                row_cells = [cell for cell in cells if cell[0] == i]
                r[k, i] = _fit([(c[k, j] * B[k, i, j], rest[i, j]) for _, j in row_cells])
            for j in range(m):
                column_cells = [cell for cell in cells if cell[1] == j]
                c[k, j] = _fit([(r[k, i] * B[k, i, j], rest[i, j]) for i, _ in column_cells])
        for i, j in cells if order == 2 else []:
            choices: Any = [(a, b) for a in (-1, 1) for b in (-1, 1)]
            B[0, i, j], B[1, i, j] = min(
                choices, key=lambda s: abs(X[i, j] - s[0] * r[0, i] * c[0, j] - s[1] * r[1, i] * c[1, j])
            )
    return np.array([[sum(r[k, i] * c[k, j] * B[k, i, j] for k in range(order)) for j in range(m)] for i in range(n)])


def _fit(pairs: list[tuple[float, float]]) -> float:
    return sum(d * t for d, t in pairs) / (sum(d * d for d, _ in pairs) + 1e-8)
