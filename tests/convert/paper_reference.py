"""Algorithms 1 and 2 of the BiLLM paper as plain loops in float64, to be read beside the paper. Nothing here is fast.

An oracle for the solver: it shares no code with it and no idea of how to be quick. Names are the paper's. What the
paper does not write down is marked (ours). `margin` in the result says by how much the closest decision was taken, as
a share: below about 1e-9 two honest float64 programs may decide differently.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass
class Result:
    """The matrix B and every decision on the way to it."""

    B: Matrix
    salient: list[bool]  # [m]
    sparse: NDArray[np.bool_]  # [n, m]
    sign: NDArray[np.bool_]  # [n, m]; True: +
    residual_sign: NDArray[np.bool_]  # [n, m]; salient columns only
    alpha: Matrix  # [n, blocks, 4]: alpha_c, alpha_s, alpha_o, alpha_r (multiples of the row's unit if quantized)
    margin: float = math.inf


@dataclass
class Quantizer:
    """Scales as whole multiples, 0 to 255, of one float16 unit per row; without units they stay as they are (ours)."""

    unit: NDArray[np.float16] | None = None
    margins: list[float] = field(default_factory=list)

    def code(self, row: int, alpha: float) -> float:
        """Return alpha in units of the row."""
        if self.unit is None:
            return alpha
        if self.unit[row] == 0:
            return 0.0
        multiple = alpha / float(self.unit[row])
        self.margins.append(abs(multiple - math.floor(multiple) - 0.5) / max(multiple, 1.0))
        return float(min(round(multiple), 255))

    def value(self, row: int, code: float) -> float:
        """Return the scale or weight that a code of the row stands for: one float32 product."""
        if self.unit is None:
            return code
        return float(np.float32(code) * np.float32(self.unit[row]))


def sign(w: float) -> int:
    """Eq. 2."""
    return 1 if w >= 0 else -1


def binary_alpha(weights: list[float]) -> float:
    """Algorithm 2, binary, line 1, for one row's members; no members: 0 (ours)."""
    return sum(abs(w) for w in weights) / len(weights) if weights else 0.0


def binary_error(weights: list[float]) -> float:
    """||w - binary(w)||² of one row's members."""
    alpha = binary_alpha(weights)
    return sum((w - alpha * sign(w)) ** 2 for w in weights)


class BiLLM:
    """One run of Algorithm 1."""

    def __init__(self, quantizer: Quantizer, fewest: int, most: int, percentile: bool) -> None:
        self.quantizer, self.fewest, self.most, self.percentile = quantizer, fewest, most, percentile
        self.margin = math.inf

    def first_least(self, errors: list[float], whole: float) -> int:
        """The index that a loop with `if error < e` ends with."""
        best = 0
        for i, error in enumerate(errors):
            if error < errors[best]:
                best = i
        for error in errors:
            # Equal to the last bit: candidates that make the same groups. Then the first counts, here and elsewhere.
            if whole > 0 and error != errors[best]:
                self.margin = min(self.margin, abs(error - errors[best]) / whole)
        return best

    def salient(self, W: Matrix, diagonal: Matrix) -> list[int]:
        """Algorithm 2, salient."""
        n, m = W.shape
        S = np.zeros((n, m))
        for i in range(n):
            for j in range(m):
                S[i, j] = W[i, j] ** 2 / diagonal[j] ** 2  # line 1
        sums = [float(sum(abs(S[i, j]) for i in range(n))) for j in range(m)]
        row_s = sorted(range(m), key=lambda j: -sums[j])  # line 2: the best come first
        for a, b in itertools.pairwise(row_s):
            if sums[a] > 0:
                self.margin = min(self.margin, (sums[a] - sums[b]) / sums[a])
        most = min(self.most, m - 1)  # 3 to 30 columns; one column at least stays non-salient (ours)
        fewest = min(self.fewest, most)
        errors = []
        for count in range(fewest, most + 1):  # lines 5 to 12
            chosen = set(row_s[:count])
            e = 0.0
            for i in range(n):
                e += binary_error([W[i, j] for j in range(m) if j in chosen])
                e += binary_error([W[i, j] for j in range(m) if j not in chosen])
            errors.append(e)
        best = fewest + self.first_least(errors, float((W**2).sum()))
        return sorted(row_s[:best])

    def seg_search(self, W: Matrix, columns: list[int]) -> float:
        """Algorithm 2, seg_search, on the non-salient columns."""
        n = W.shape[0]
        weights = sorted(abs(W[i, j]) for i in range(n) for j in columns)
        candidates, errors = [], []
        for tenth in range(1, 10):  # line 3, read as 0.1 to 0.9
            p = tenth / 10 * weights[-1]  # line 4
            if self.percentile:
                p = weights[-(-tenth * len(weights) // 10) - 1]  # a tenth, two tenths ... are at most p
            e = 0.0
            for i in range(n):
                e += binary_error([W[i, j] for j in columns if abs(W[i, j]) <= p])
                e += binary_error([W[i, j] for j in columns if abs(W[i, j]) > p])
            candidates.append(p)
            errors.append(e)
        p = candidates[self.first_least(errors, float((W**2).sum()))]
        for weight in weights:
            # A percentile is itself one of the weights, the same number in both places: no tie.
            if p > 0 and not (self.percentile and weight == p):
                self.margin = min(self.margin, abs(weight - p) / p)
        return p

    def run(self, W: Matrix, Hc: Matrix, beta: int) -> Result:
        """Algorithm 1, lines 3 to 15, on the Cholesky factor Hc."""
        n, m = W.shape
        W = W.copy()
        blocks = math.ceil(m / beta)
        sizes = np.abs(W).max(axis=1)
        no = np.zeros((n, m), dtype=bool)
        out = Result(np.zeros((n, m)), [False] * m, no, no.copy(), no.copy(), np.zeros((n, blocks, 4)))
        for block, b in enumerate(range(0, m, beta)):
            end = min(b + beta, m)
            Wb = W[:, b:end].copy()  # line 5
            row_s = self.salient(Wb, np.diag(Hc)[b:end])  # line 6
            rest = [j for j in range(end - b) if j not in row_s]
            p = self.seg_search(Wb, rest)  # line 8
            for j in row_s:
                out.salient[b + j] = True
            for i in range(n):
                self.binarize_row(out, i, block, b, Wb[i], row_s, rest, p, float(sizes[i]))
            for i in range(n):
                for j in range(b, end):
                    E = (W[i, j] - out.B[i, j]) / Hc[j, j]  # line 12
                    for later in range(end, m):
                        W[i, later] -= E * Hc[j, later]  # line 13
        out.margin = min([self.margin, *self.quantizer.margins])
        return out

    def binarize_row(
        self,
        out: Result,
        i: int,
        block: int,
        b: int,
        w: Matrix,
        row_s: list[int],
        rest: list[int],
        p: float,
        size: float,
    ) -> None:
        """Lines 7 and 9 to 11 for one row."""
        q = self.quantizer
        sparse = [j for j in rest if abs(w[j]) > p]
        concentrated = [j for j in rest if abs(w[j]) <= p]
        alpha_c = q.code(i, binary_alpha([w[j] for j in concentrated]))
        alpha_s = q.code(i, binary_alpha([w[j] for j in sparse]))
        alpha_o = q.code(i, binary_alpha([w[j] for j in row_s]))  # Algorithm 2, res_approximation, line 1
        R = {j: w[j] - sign(w[j]) * q.value(i, alpha_o) for j in row_s}  # line 2
        alpha_r = q.code(i, binary_alpha(list(R.values())))  # line 3
        if q.unit is not None:
            alpha_r = min(alpha_r, 255 - alpha_o)
        for j, group in [*((j, alpha_c) for j in concentrated), *((j, alpha_s) for j in sparse)]:
            out.B[i, b + j] = q.value(i, sign(w[j]) * group)
            out.sign[i, b + j] = sign(w[j]) > 0
            out.sparse[i, b + j] = j in sparse
        for j in row_s:
            out.B[i, b + j] = q.value(i, sign(w[j]) * alpha_o + sign(R[j]) * alpha_r)  # line 4
            planes = [sign(w[j]) > 0, sign(R[j]) > 0]
            if alpha_r > alpha_o:  # the same sum with its terms swapped (ours)
                planes.reverse()
            out.sign[i, b + j], out.residual_sign[i, b + j] = planes
        for value in [*w, *R.values()]:
            if value != 0:
                self.margin = min(self.margin, abs(value) / size)
        out.alpha[i, block] = [alpha_c, alpha_s, max(alpha_o, alpha_r), min(alpha_o, alpha_r)]


def cholesky_of_inverse(H: Matrix, damp: float) -> Matrix:
    """Algorithm 1, line 2: the upper factor of (H + lambda I)⁻¹, lambda = damp * mean(diag H)."""
    lam = damp * float(np.mean(np.diag(H)))
    return np.linalg.cholesky(np.linalg.inv(H + lam * np.eye(len(H)))).T


def units(
    W: Matrix, Hc: Matrix, beta: int, fewest: int, most: int, percentile: bool
) -> tuple[NDArray[np.float16], float]:
    """Each row's unit: the least float16 that makes its largest scale, of an unquantized run, at most 240 (ours)."""
    plain = BiLLM(Quantizer(), fewest, most, percentile).run(W, Hc, beta)
    margin = plain.margin
    result = np.zeros(len(W), dtype=np.float16)
    for i in range(len(W)):
        largest = max(max(c, s, o + r) for c, s, o, r in plain.alpha[i])
        unit = np.float16(largest / 240)
        while float(unit) < np.float32(largest / 240):
            unit = np.nextafter(unit, np.float16(np.inf))
        result[i] = unit
        if largest > 0:
            below = np.nextafter(unit, np.float16(0))
            gaps = [abs(float(near) * 240 / largest - 1) for near in (unit, below)]
            margin = min([margin, *gaps])
    return result, margin


def solve(
    W: Matrix, H: Matrix, beta: int, *, damp: float = 0.01, fewest: int = 3, most: int = 30, percentile: bool = False
) -> tuple[Result, NDArray[np.float16]]:
    """Run Algorithm 1 with quantized scales; returns the result and the rows' units."""
    Hc = cholesky_of_inverse(H, damp)
    unit, margin = units(W, Hc, beta, fewest, most, percentile)
    result = BiLLM(Quantizer(unit), fewest, most, percentile).run(W, Hc, beta)
    result.margin = min(result.margin, margin)
    return result, unit
