"""Uniform grids, a scale and a zero per row and group: rounding to nearest, and GPTQ (Frantar et al., ICLR 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from billm_convert.baselines.common import (
    BaselineSettings,
    QuantizedWeight,
    blocks_per_column,
    feed_back,
    prepare,
)

# Of GPTQ's own search for the range (its code's option "mse"): shares of the whole range, and the error's power.
_RANGES = tuple(1 - step / 100 for step in range(80))
_POWER = 2.4


@dataclass(frozen=True)
class Grid:
    """Levels scale * (q - zero), q = 0 ... largest, one scale and zero per row [rows, 1]."""

    scale: Tensor
    zero: Tensor
    largest: int

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest level of every value of x [rows, n]."""
        return self.scale * ((torch.round(x / self.scale) + self.zero).clamp(0, self.largest) - self.zero)


def asymmetric_grid(x: Tensor, bits: int, share: float = 1.0) -> Grid:
    """Return the grid that spans each row of x [rows, n] and 0, as in GPTQ's code; a row of zeros gets -1 to 1.

    `share`: of that range, less than 1 to cut its ends off.
    """
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = share * torch.where(empty, -1, low), share * torch.where(empty, 1, high)
    scale = (high - low) / (2**bits - 1)
    return Grid(scale, torch.round(-low / scale), 2**bits - 1)


def searched_grid(x: Tensor, bits: int) -> Grid:
    """Return the grid with the share of the range that rounds each row of x [rows, n] best.

    Without this GPTQ at 2 bits is no rival: on SmolLM2-135M its held-out output error is 0.085, with it 0.050.
    """
    grids = [asymmetric_grid(x, bits, share) for share in _RANGES]
    errors = torch.cat([(grid.round(x) - x).abs().pow(_POWER).sum(1, keepdim=True) for grid in grids], dim=1)
    best = errors.argmin(1, keepdim=True)
    scale = torch.cat([grid.scale for grid in grids], dim=1).gather(1, best)
    return Grid(scale, torch.cat([grid.zero for grid in grids], dim=1).gather(1, best), 2**bits - 1)


def round_to_nearest(bits: int, weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    """Round every weight to its group's grid; the Hessian plays no part."""
    parts = [asymmetric_grid(part, bits).round(part) for part in torch.split(weight, settings.block_size, dim=1)]
    return _sized(torch.cat(parts, dim=1), bits, settings)


def gptq(bits: int, weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    """Round column by column with error feedback; a group's grid suits its weights as they are when it begins."""
    work, upper = prepare(weight, hessian, settings.damp)
    grid: list[Grid] = []

    def quantize(_: int, column: Tensor) -> Tensor:
        return grid[-1].round(column[:, None])[:, 0]

    def begin(block: Tensor) -> None:
        grid.append(searched_grid(block, bits))

    return _sized(feed_back(work, upper, settings.block_size, quantize, begin), bits, settings)


def _sized(weight: Tensor, bits: int, settings: BaselineSettings) -> QuantizedWeight:
    # A group stores a 16-bit scale and a zero of as many bits as a weight.
    stored = bits + (16 + bits) * blocks_per_column(weight.shape[1], settings.block_size)
    return QuantizedWeight(weight, float(bits), stored)
