"""A binarized Linear that can be trained: continuous numbers in front of what the file stores.

Three things move: the four scales of every (row, block), the row multiplier and the column scale; and for every weight
a *latent* number from which its two bits follow (the nearest level). What a forward pass multiplies is always the
rounded, storable weight; gradients pass straight through every rounding.

All of it is in the file's own unit, the row's float16 step: levels are whole numbers from -255 to 255.

In either class a weight is `sign * (mid - half)` or `sign * (mid + half)`: for a salient column mid and half are
alpha_o and alpha_r themselves, for the others alpha_c and alpha_s are mid -+ half. So one rule serves both classes: a
latent at most mid in size takes the smaller magnitude, any other the larger one.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from billm_format.layout import ALPHA_C, ALPHA_O, ALPHA_R, ALPHA_S
from billm_format.packing import PackedLinear, pack_bits, unpack_bits

_MAX_CODE = 255

# How far a latent starts from the border between two levels, at least, in steps: ties must not change a code.
_CLEAR = 0.25


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, exactly; its gradient goes to `value` as if nothing had been rounded."""
    return value + (rounded - value).detach()  # both are near, so neither operation rounds


class StoredProduct(torch.autograd.Function):
    """x [tokens, cols] times the weight [rows, cols] that latents, scales, row multipliers and column scales stand for.

    mid and half are [rows, 2 * blocks]; `places` [2 * blocks, cols] is 1 where a column reads them: a product with it
    spreads a value over its columns, one with its transpose sums over them. Gradients: that of a level goes straight to
    its latent; all others are exact, codes held fixed. Only what comes in is kept for the backward pass: levels would
    take as much memory again as the latents, scaled inputs and unscaled outputs as the activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        mid: Tensor,
        half: Tensor,
        rows: Tensor,
        cols: Tensor | None,
        places: Tensor,
    ) -> Tensor:
        """Return the product [tokens, rows]; `rows` are the row multipliers, `cols` the column scales."""
        ctx.save_for_backward(x, latent, mid, half, rows, cols, places)
        levels = nearest_levels(latent, mid @ places, half @ places)
        return ((x if cols is None else x * cols) @ levels.T).mul_(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order of the inputs."""
        x, latent, mid, half, rows, cols, places = ctx.saved_tensors
        middle = mid @ places
        levels = nearest_levels(latent, middle, half @ places)
        for_x, for_cols = (grads[0] * rows) @ levels, None
        for_level = grads[0].T @ (x if cols is None else x * cols)
        if cols is not None:
            for_cols = (for_x * x).sum(dim=0)
            for_x *= cols
        for_rows = levels.mul_(for_level).sum(dim=1)
        for_level *= rows[:, None]
        one = torch.ones((), dtype=latent.dtype, device=latent.device)
        signed = torch.copysign(one, latent, out=levels).mul_(for_level)
        for_mid = signed @ places.T
        side = middle.sub_(latent.abs())
        for_half = signed.mul_(torch.copysign(one, side, out=side)) @ places.T
        return for_x, for_level, for_mid, for_half.neg_(), for_rows, for_cols, None


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


def _rounded(value: Tensor) -> Tensor:
    return straight_through(value, value.round())


class TunedLinear:
    """The trainable numbers of one Linear, started from what a solver found."""

    def __init__(self, start: PackedLinear, col_scale: Vector | None, device: torch.device) -> None:
        """Begin at `start`, exactly: before any step, `pack` returns it byte for byte.

        `col_scale` [cols] is an object of its own because Linears that read the same input share it.
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

    def _first_latents(self, device: torch.device) -> Tensor:
        """Return the start's levels, moved off the borders between codes where scales of 0 put them there."""
        positive, second, salient = self._start_bits(device)
        larger = torch.where(salient, second == positive, second ^ self._spread(self._swapped))
        middle, half = self.mid.detach() @ self._places, self.half.detach() @ self._places
        beyond, within = (middle + half).maximum(middle + _CLEAR), (middle - half).minimum(middle - _CLEAR).clamp(min=0)
        magnitude = torch.where(larger, beyond, within)
        return torch.where(positive, magnitude, -magnitude)

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
        """Apply the Linear as the file will hold it to x [..., cols]."""
        mid, half = self.stored_codes()
        cols = None if self.col_scale is None else self.col_scale()
        parts = x.flatten(0, -2), self.latent, mid, half, self.row_scale(), cols, self._places
        y: Tensor = StoredProduct.apply(*parts)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias()

    @torch.no_grad()
    def project(self) -> None:
        """Bring scales that a step has carried out of the format's range back into it."""
        self.mid.clamp_(0, _MAX_CODE)
        self.half.copy_(self.half.clamp(min=0).minimum(self.mid).minimum(_MAX_CODE - self.mid))

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


def _places(start: PackedLinear) -> Tensor:
    """Return 1 where a column reads entry i of mid and half, float32 [2 * blocks, cols]: plain blocks, then salient."""
    salient: NDArray[np.bool_] = unpack_bits(start.salient, start.cols)
    row = np.arange(start.cols) // start.block + salient * start.num_blocks
    out = np.zeros((2 * start.num_blocks, start.cols), np.float32)
    out[row, np.arange(start.cols)] = 1
    return torch.from_numpy(out)
