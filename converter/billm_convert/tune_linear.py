"""A binarized Linear that can be trained: continuous numbers in front of what the file stores.

Three things move: the four scales of every (row, block), the row multiplier and the column scale; and for every weight
a *latent* number from which its two bits follow (the nearest level). What a forward pass multiplies is always the
rounded, storable weight; gradients pass straight through every rounding.

Products are made with `TunedLinear.weight`, which is made of all this once a step; its gradient is handed down to them
once a step as well (`collect`), however many windows of text have added to it.

Latents and scales are in the file's own unit, the row's float16 step: levels are whole numbers from -255 to 255.

In either class a weight is `sign * (mid - half)` or `sign * (mid + half)`: for a salient column mid and half are
alpha_o and alpha_r themselves, for the others alpha_c and alpha_s are mid -+ half. So one rule serves both classes: a
latent at most mid in size takes the smaller magnitude, any other the larger one.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from billm_convert.settings import MAX_LEVEL
from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S
from billm_format.packing import PackedLinear, pack_bits, unpack_bits

# How far a latent starts from the border between two levels, at least, in steps: ties must not change a code.
_CLEAR = 0.25


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, exactly; its gradient goes to `value` as if nothing had been rounded."""
    return value + (rounded - value).detach()  # both are near, so neither operation rounds


def nearest_levels(latent: Tensor, middle: Tensor, half: Tensor) -> Tensor:
    """Return `sign(latent) * (middle +- half)`, all [rows, cols]: plus where |latent| > middle. Overwrites half."""
    side = torch.sub(middle, latent.abs())  # negative: the larger magnitude
    magnitude = torch.copysign(half, side, out=half).neg_().add_(middle)
    return torch.copysign(magnitude, latent, out=magnitude)


class Vector:
    """A vector that is trained in units of its own size, so that one learning rate suits large and small ones."""

    def __init__(self, start: NDArray[Any], device: torch.device, *, relative: bool, half: bool = False) -> None:
        """Begin at `start` [n]; `half`: what is used is rounded to float16.

        `relative`: every entry is its own unit (scales, norms); else their root mean square is everybody's (biases).
        """
        self._start = torch.from_numpy(start.astype(np.float32)).to(device)
        self._unit = self._start if relative else self._start.square().mean().sqrt()
        self._half = half
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def __call__(self) -> Tensor:
        """Return the vector float32 [n] as the file will hold it."""
        value = self._start - self._unit * self.change  # a difference: a sum would make a start of -0.0 a 0.0
        return straight_through(value, value.half().float()) if self._half else value

    def receive(self, gradient: Tensor) -> None:
        """Add the gradient [n] of the vector to that of what is trained."""
        own = self._unit * gradient
        self.change.grad = -own if self.change.grad is None else self.change.grad - own


def _not_zero(divisor: Tensor) -> Tensor:
    # What is divided is 0 where a multiplier is.
    return torch.where(divisor == 0, 1.0, divisor)


def _rounded(value: Tensor) -> Tensor:
    return straight_through(value, value.round())


class TunedLinear:
    """The trainable numbers of one Linear, started from what a solver found."""

    def __init__(
        self,
        start: PackedLinear,
        col_scale: Vector | None,
        device: torch.device,
        products: torch.dtype,
    ) -> None:
        """Begin at `start`, exactly: before any step, `pack` returns it byte for byte.

        `col_scale` [cols] is an object of its own because Linears that read the same input share it. `products` is the
        dtype that factors of matrix products have. Latents begin at the levels, or where a level lies on a border
        between two as near to it as leaves the code what it is.
        """
        self._start = start
        self.col_scale = col_scale
        self.bias = None if start.bias is None else Vector(start.bias, device, relative=False)
        self.row_scale = Vector(start.row_scale, device, relative=True, half=True)
        self._places = _places(start).to(device)
        scales = torch.from_numpy(start.scales.astype(np.float32)).to(device)
        alpha_c, alpha_s, alpha_o, alpha_r = (scales[..., i] for i in (ALPHA_C, ALPHA_S, ALPHA_O, ALPHA_R))
        # A sparse group without members has scale 0: then the concentrated group is the larger one.
        self._swapped = alpha_s < alpha_c
        self.mid = nn.Parameter(torch.cat(((alpha_c + alpha_s) / 2, alpha_o), dim=1))
        self.half = nn.Parameter(torch.cat(((alpha_s - alpha_c).abs() / 2, alpha_r), dim=1))
        self.latent = nn.Parameter(self._first_latents(device))
        self.weight = nn.Parameter(torch.empty(start.rows, start.cols, dtype=products, device=device))
        self.refresh()

    def _first_latents(self, device: torch.device) -> Tensor:
        """Return the start's levels, off the borders between them."""
        positive, second, salient = self._start_bits(device)
        larger = torch.where(salient, second == positive, second ^ self._spread(self._swapped))
        middle, half = self.mid.detach() @ self._places, self.half.detach() @ self._places
        margin = (middle / 2).clamp(max=_CLEAR)
        within = (middle - half).clamp(margin, middle - margin)
        beyond = (middle + half).maximum(middle + _CLEAR)
        return torch.copysign(torch.where(larger, beyond, within), torch.where(positive, 1.0, -1.0))

    def _start_bits(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sign and second planes, bool [rows, cols], and the salient columns, bool [cols]."""
        start = self._start
        planes = (unpack_bits(plane, start.cols) for plane in (start.sign, start.second, start.salient))
        sign, second, salient = (torch.from_numpy(bits).to(device) for bits in planes)
        return sign, second, salient

    def _spread(self, per_block: Tensor) -> Tensor:
        """Return [rows, cols] from [rows, blocks]."""
        block_of_col = torch.arange(self._start.cols, device=per_block.device) // self._start.block
        return per_block[:, block_of_col]

    def stored_codes(self) -> tuple[Tensor, Tensor]:
        """Return mid and half [rows, 2 * blocks] as the rounded scales make them; gradients pass straight through."""
        plain = self.mid.shape[1] // 2
        smaller = _rounded(self.mid[:, :plain] - self.half[:, :plain])
        larger = _rounded(self.mid[:, :plain] + self.half[:, :plain])
        mid = torch.cat(((smaller + larger) / 2, _rounded(self.mid[:, plain:])), dim=1)
        half = torch.cat(((larger - smaller) / 2, _rounded(self.half[:, plain:])), dim=1)
        return mid, half

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the Linear as the file will hold it to x [..., cols]; returns the dtype of products."""
        y = functional.linear(x.to(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias().to(y.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Bring scales that a step has carried out of their range back into it, and make the weight anew."""
        self.mid.clamp_(0, MAX_LEVEL)
        self.half.copy_(self.half.clamp(min=0).minimum(self.mid).minimum(MAX_LEVEL - self.mid))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weight: wanted whenever anything that it is made of has changed."""
        mid, half = self.stored_codes()
        weight = nearest_levels(self.latent, mid @ self._places, half @ self._places)
        weight.mul_(self.row_scale()[:, None])
        self.weight.copy_(weight if self.col_scale is None else weight.mul_(self.col_scale()))

    @torch.no_grad()
    def collect(self) -> None:
        """Hand the weight's gradient down to what it is made of.

        That of a level goes straight to its latent; all others are exact, codes held fixed.
        """
        if self.weight.grad is None:
            return
        gradient = self.weight.grad.float()
        self.weight.grad = None
        share = gradient * self.weight
        rows = self.row_scale()
        self.row_scale.receive(share.sum(dim=1) / _not_zero(rows))
        gradient.mul_(rows[:, None])
        if self.col_scale is not None:
            cols = self.col_scale()
            self.col_scale.receive(share.sum(dim=0) / _not_zero(cols))
            gradient.mul_(cols)
        self.latent.grad = gradient
        mid, _ = self.stored_codes()
        side = torch.addmm(self.latent.abs(), mid, self._places, beta=-1)  # negative: the larger magnitude
        signed = torch.copysign(gradient, gradient * self.latent, out=share)
        self.mid.grad = signed @ self._places.T
        self.half.grad = -(torch.copysign(signed, side.mul_(signed), out=side) @ self._places.T)

    @torch.no_grad()
    def pack(self) -> PackedLinear:
        """Return the Linear as the file stores it."""
        start = self._start
        mid, half = self.stored_codes()
        blocks = start.num_blocks
        smaller, larger = (mid - half)[:, :blocks], (mid + half)[:, :blocks]
        scales = torch.empty(start.rows, blocks, 4, device=mid.device)
        scales[..., ALPHA_C] = torch.where(self._swapped, larger, smaller)
        scales[..., ALPHA_S] = torch.where(self._swapped, smaller, larger)
        scales[..., ALPHA_O], scales[..., ALPHA_R] = mid[:, blocks:], half[:, blocks:]
        positive = ~torch.signbit(self.latent)
        is_larger = self.latent.abs() > mid @ self._places
        salient = self._start_bits(mid.device)[2]
        second = torch.where(salient, is_larger == positive, is_larger ^ self._spread(self._swapped))
        return PackedLinear(
            rows=start.rows,
            cols=start.cols,
            block=start.block,
            sign=pack_bits(positive.cpu().numpy()),
            second=pack_bits(second.cpu().numpy()),
            salient=start.salient,
            scales=scales.to(torch.uint8).cpu().numpy(),
            row_scale=self.row_scale().half().cpu().numpy(),
            col_scale=None if self.col_scale is None else self.col_scale().half().cpu().numpy(),
            bias=None if self.bias is None else self.bias().cpu().numpy(),
        )


class ScaledLinear:
    """A Linear whose two planes and scale codes stay what they are: row multipliers, column scale and bias are trained.

    Nothing is kept of a weight but its level, in the dtype of products, and no gradient of a weight is ever made.
    """

    def __init__(
        self, start: PackedLinear, col_scale: Vector | None, device: torch.device, products: torch.dtype
    ) -> None:
        """Begin at `start`; `col_scale` and `products` are as for `TunedLinear`."""
        self._start = start
        self._levels = torch.from_numpy(start.levels()).to(device, products)  # at most 255: exact in bfloat16 too
        self.col_scale = col_scale
        self.bias = None if start.bias is None else Vector(start.bias, device, relative=False)
        self.row_scale = Vector(start.row_scale, device, relative=True, half=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the Linear as the file will hold it to x [..., cols]; returns the dtype of products."""
        if self.col_scale is not None:
            x = x * self.col_scale()
        y = functional.linear(x.to(self._levels.dtype), self._levels) * self.row_scale()
        return (y if self.bias is None else y + self.bias()).to(self._levels.dtype)

    @torch.no_grad()
    def pack(self) -> PackedLinear:
        """Return the Linear as the file stores it."""
        return replace(
            self._start,
            row_scale=self.row_scale().half().cpu().numpy(),
            col_scale=None if self.col_scale is None else self.col_scale().half().cpu().numpy(),
            bias=None if self.bias is None else self.bias().cpu().numpy(),
        )


def _places(start: PackedLinear) -> Tensor:
    """Return 1 where a column reads entry i of mid and half, float32 [2 * blocks, cols]: plain blocks, then salient."""
    salient: NDArray[np.bool_] = unpack_bits(start.salient, start.cols)
    row = np.arange(start.cols) // start.block + salient * start.num_blocks
    out = np.zeros((2 * start.num_blocks, start.cols), np.float32)
    out[row, np.arange(start.cols)] = 1
    return torch.from_numpy(out)
