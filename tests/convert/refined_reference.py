"""The refined recipe as plain loops in float64, to be read beside the converter's README. Nothing here is fast.

An oracle: it shares no code with the recipe. Levels are looked for by trying all four, scales by solving equations one
unknown at a time. `margin` in the result says by how much the closest decision was taken, as a share: below about 1e-9
two honest float64 programs may decide differently.
"""

import math
from dataclasses import dataclass

import numpy as np
from convert.paper_reference import BiLLM, Quantizer, cholesky_of_inverse
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LLOYD_STEPS = 6
RIDGE = 1e-6


@dataclass
class Result:
    """Every decision; a level is a code [1 or -1, 0 or 1]: sign and whether the larger magnitude of its class."""

    salient: list[bool]  # [m]
    sign: NDArray[np.int64]  # [n, m]
    large: NDArray[np.bool_]  # [n, m]
    alpha: Matrix  # [n, blocks, 4]: alpha_c, alpha_s, alpha_o, alpha_r in units of the row
    unit: NDArray[np.float16]  # [n]
    column_scale: NDArray[np.float16]  # [m]
    margin: float


class Refined:
    """One run for one Linear."""

    def __init__(self, W: Matrix, H: Matrix, c: Matrix, beta: int, damp: float, fewest: int, most: int) -> None:
        self.n, self.m = W.shape
        self.W = W / c
        self.Hd = (H + damp * np.mean(np.diag(H)) * np.eye(self.m)) * np.outer(c, c)
        self.U = cholesky_of_inverse(self.Hd, 0.0)
        self.choice = BiLLM(Quantizer(), fewest, most, percentile=False)
        self.starts = list(range(0, self.m, beta))
        self.columns = [list(range(b, min(b + beta, self.m))) for b in self.starts]
        self.salient = [False] * self.m
        self.sign = np.ones((self.n, self.m), dtype=np.int64)
        self.large = np.zeros((self.n, self.m), dtype=bool)
        self.alpha = np.zeros((self.n, len(self.starts), 4))
        self.margin = math.inf

    # --- what codes and scales mean

    def magnitude(self, alpha: Matrix, j: int, large: bool) -> float:
        """The magnitude of a level of column j."""
        c, s, o, r = (float(a) for a in alpha)
        if self.salient[j]:
            return o + r if large else o - r
        return s if large else c

    def level(self, i: int, block: int, j: int) -> float:
        """What the codes of W[i, j] stand for."""
        return float(self.sign[i, j]) * self.magnitude(self.alpha[i, block], j, bool(self.large[i, j]))

    def take_nearest(self, i: int, block: int, j: int, wanted: float, size: float) -> None:
        """Choose the codes whose level is nearest to `wanted`."""
        best = math.inf
        for large in (False, True):
            for sign in (1, -1):
                far = abs(wanted - sign * self.magnitude(self.alpha[i, block], j, large))
                if far < best:
                    best = far
                    self.sign[i, j], self.large[i, j] = sign, large
        # With both magnitudes the same or zero several codes mean the same; the rule is: > the middle, >= 0.
        small, big = (self.magnitude(self.alpha[i, block], j, large) for large in (False, True))
        self.sign[i, j] = 1 if wanted >= 0 else -1
        self.large[i, j] = (abs(wanted) > (small + big) / 2) != (small > big)
        if size > 0:
            self.margin = min(self.margin, abs(abs(wanted) - (small + big) / 2) / size)
            if wanted != 0:
                self.margin = min(self.margin, abs(wanted) / size)
            assert abs(abs(wanted - self.level(i, block, j)) - best) <= 1e-9 * size  # the rule is the nearest

    # --- scales

    def fit(self, i: int, block: int, S: Matrix, wanted: Matrix, whole: bool) -> None:
        """Least squares for the four scales of a (row, block): level S level - 2 level wanted, S [b, b]."""
        js = self.columns[block]
        A = np.zeros((len(js), 4))
        for k, j in enumerate(js):
            for scale in range(4):
                unit = np.eye(4)[scale]
                A[k, scale] = float(self.sign[i, j]) * self.magnitude(unit, j, bool(self.large[i, j]))
        N, b = A.T @ S @ A, A.T @ wanted
        for k in range(4):
            N[k, k] = N[k, k] * (1 + RIDGE) if N[k, k] > 0 else 1.0
        old = np.round(self.alpha[i, block]) if whole else self.alpha[i, block].copy()
        new = np.zeros(4)
        for k in (3, 2, 1, 0):
            # The scales after k are settled; those before it will be whatever is best.
            free = np.linalg.solve(N[: k + 1, : k + 1], b[: k + 1] - N[: k + 1, k + 1 :] @ new[k + 1 :])
            new[k] = max(0.0, float(free[k]))
            if whole:
                self.margin = min(self.margin, abs(free[k] - math.floor(free[k]) - 0.5) / max(abs(free[k]), 1.0))
                new[k] = min(255, max(0, round(float(free[k]))))
        new[3] = min(new[3], new[2])
        if whole:
            new[3] = min(new[3], 255 - new[2])
        after, before = (float(x @ N @ x - 2 * x @ b) for x in (new, old))
        if not np.array_equal(new, old):
            self.margin = min(self.margin, abs(after - before) / max(abs(after), abs(before), 1e-300))
        self.alpha[i, block] = new if after < before else old

    # --- first pass

    def first_pass(self) -> None:
        """Blocks in order, each making up for those before it, columns likewise inside a block."""
        W = self.W.copy()
        for block, js in enumerate(self.columns):
            for j in self.choice.salient(W[:, js], np.diag(self.U)[js]):
                self.salient[js[j]] = True
            inner = self.U[np.ix_(js, js)]
            S = np.linalg.inv(inner.T @ inner)
            for i in range(self.n):
                size = float(np.abs(W[i]).max())
                self.split(i, block, W[i], size)
                work = W[i, js].copy()
                for k, j in enumerate(js):
                    self.take_nearest(i, block, j, float(work[k]), size)
                    error = (work[k] - self.level(i, block, j)) / inner[k, k]
                    for later in range(k + 1, len(js)):
                        work[later] -= error * inner[k, later]
                self.fit(i, block, S, S @ W[i, js], whole=False)
            rest = list(range(js[-1] + 1, self.m))
            if rest:
                levels = np.array([[self.level(i, block, j) for j in js] for i in range(self.n)])
                delta = W[:, js] - levels
                ahead = self.Hd[js[0] :, js[0] :]  # of the columns that are not settled before this block
                k = len(js)
                W[:, rest] += delta @ ahead[:k, k:] @ np.linalg.inv(ahead[k:, k:])
        self.margin = min(self.margin, self.choice.margin)

    def split(self, i: int, block: int, w: Matrix, size: float) -> None:
        """Weighted 2-means on the magnitudes of a row's block, for either class."""
        pairs = []
        for salient in (False, True):
            js = [j for j in self.columns[block] if self.salient[j] == salient]
            weights = {j: 1 / self.U[j, j] ** 2 for j in js}

            def mean(members: list[int], otherwise: float, weights: dict[int, float] = weights) -> float:
                whole = sum(weights[j] for j in members)
                return sum(weights[j] * abs(w[j]) for j in members) / whole if members else otherwise

            border = small = large = mean(js, 0.0)
            for _ in range(LLOYD_STEPS):
                for j in js:
                    if size > 0:
                        self.margin = min(self.margin, abs(abs(w[j]) - border) / size)
                small = mean([j for j in js if abs(w[j]) <= border], border)
                large = mean([j for j in js if abs(w[j]) > border], border)
                border = (small + large) / 2
            pairs.append((small, large))
        (c, s), (small, large) = pairs
        self.alpha[i, block] = [c, s, (large + small) / 2, (large - small) / 2]

    # --- sweeps

    def units(self) -> NDArray[np.float16]:
        """Each row's unit: the least float16 in which its largest magnitude is at most 240 (of 255)."""
        result = np.zeros(self.n, dtype=np.float16)
        for i in range(self.n):
            largest = max(max(c, s, o + r) for c, s, o, r in self.alpha[i])
            unit = np.float16(largest / 240)
            while float(unit) < np.float32(largest / 240):
                unit = np.nextafter(unit, np.float16(np.inf))
            result[i] = unit
            if largest > 0:
                near = (unit, np.nextafter(unit, np.float16(0)))
                self.margin = min([self.margin, *(abs(float(value) * 240 / largest - 1) for value in near)])
        return result

    def sweep(self) -> None:
        """Scales, then codes, block by block, everything else being what it is. W and alpha are in units by now."""
        for block, js in enumerate(self.columns):
            for i in range(self.n):
                inner = self.Hd[np.ix_(js, js)]
                level = self.levels(i)
                others = level.copy()
                others[js] = 0
                # The block's levels x are to minimise (w - others - x) Hd (w - others - x).
                self.fit(i, block, inner, (self.Hd @ (self.W[i] - others))[js], whole=True)
                size = float(np.abs(self.W[i]).max())
                for j in js:
                    level = self.levels(i)
                    wanted = level[j] + float(self.Hd[j] @ (self.W[i] - level)) / self.Hd[j, j]
                    self.take_nearest(i, block, j, wanted, size)

    def levels(self, i: int) -> Matrix:
        """What all codes of a row stand for."""
        return np.array([self.level(i, block, j) for block, js in enumerate(self.columns) for j in js])


def column_scale(weights: list[Matrix]) -> NDArray[np.float16]:
    """Each column's root mean square, their mean being 1; a column of zeros, or nearly, has 1."""
    root = np.sqrt(sum((W**2).sum(axis=0) for W in weights))
    mean = float(np.mean(root))
    scale = (root / mean if mean > 0 else root).astype(np.float32).astype(np.float16)
    return np.where(scale > 0, scale, np.float16(1))


def follow(W: Matrix, H: Matrix, drift: Matrix, hidden_drift: Matrix, damp: float, share: float) -> Matrix:
    """The weights that make up for a share of both drifts."""
    dampened = H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    return W + share * (W @ drift + hidden_drift) @ np.linalg.inv(dampened)


def solve(
    W: Matrix, H: Matrix, c: NDArray[np.float16], beta: int, *, damp: float, fewest: int, most: int, sweeps: int
) -> Result:
    """Run the recipe on one Linear with the column scale c."""
    run = Refined(W, H, c.astype(np.float64), beta, damp, fewest, most)
    run.first_pass()
    unit = run.units()
    for i in range(run.n):
        divisor = float(unit[i]) or 1.0
        run.W[i] /= divisor
        run.alpha[i] /= divisor
    for _ in range(sweeps):
        run.sweep()
    return Result(run.salient, run.sign, run.large, run.alpha, unit, c, run.margin)
