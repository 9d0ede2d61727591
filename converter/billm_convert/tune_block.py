"""A decoder block, and a whole model, that can be trained in the form in which the file holds them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from billm_convert.block import DecoderBlock, KeyValues, Rotary, finish, input_groups
from billm_convert.stored_block import StoredBlock
from billm_convert.tune_linear import ScaledLinear, TunedLinear, Vector
from billm_format.config import ModelConfig
from billm_format.packing import PackedLinear

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rates:
    """Learning rates of the three kinds of numbers, each in its own unit."""

    vectors: float  # relative: row multipliers, column scales, norms, biases
    latents: float = 0.0  # in steps: a row's largest scale starts at about 240
    codes: float = 0.0  # in steps as well


class QuickBlock(DecoderBlock):
    """A decoder layer whose matrix products have factors of another dtype; its hidden states stay float32."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], rotary: Rotary | None, products: torch.dtype
    ) -> None:
        """Take `weights` as `DecoderBlock` does."""
        ours = {f"{linear}.{part}" for linear in config.linears() for part in ("weight", "bias")}
        super().__init__(
            config, {name: value.to(products) if name in ours else value for name, value in weights.items()}, rotary
        )
        self._products = products

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return super()._linear(name, x.to(self._products))

    def _pre_norm(self, name: str, x: Tensor) -> Tensor:
        return super()._pre_norm(name, x).to(self._products)  # once for all Linears that read it

    def _heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        return super()._heads(name, x, heads).float()  # norms and rotations of them are not products

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        if self._products == torch.float32 or self._config.sliding_window or start > 0:
            return super()._attend(query, key, value, start)
        return plain_attention(*(x.to(self._products) for x in (query, key, value)))


class TunedBlock(QuickBlock):
    """One decoder layer that can be trained: everything in it (`TunedLinear`), or vectors alone (`ScaledLinear`)."""

    def __init__(
        self,
        config: ModelConfig,
        start: StoredBlock,
        rotary: Rotary | None,
        device: torch.device,
        products: torch.dtype,
        *,
        everything: bool = False,
    ) -> None:
        """Begin exactly at `start`; factors of products have the dtype `products`."""
        super().__init__(config, {}, rotary, products)
        self.norms = {name: norm_vector(name, value, device) for name, value in start.norms.items()}
        self.linears: dict[str, TunedLinear | ScaledLinear] = {}
        self._col_scales: list[Vector] = []
        for names in input_groups(config).values():
            shared = _shared_col_scale([start.linears[name] for name in names], device)
            if shared is not None:
                self._col_scales.append(shared)
            kind = TunedLinear if everything else ScaledLinear
            for name in names:
                self.linears[name] = kind(start.linears[name], shared, device, products)

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        """Run x [batch, tokens, hidden] through the block as the file will hold it."""
        self.weights = {name: vector() for name, vector in self.norms.items()}
        return super().forward(x, past)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.linears[name](x)

    def _coded(self) -> Iterator[TunedLinear]:
        return (linear for linear in self.linears.values() if isinstance(linear, TunedLinear))

    def latents(self) -> list[nn.Parameter]:
        """Return the latent of every weight, where codes are trained."""
        return [linear.latent for linear in self._coded()]

    def codes(self) -> list[nn.Parameter]:
        """Return what the scale codes are made of, where they are trained."""
        return [part for linear in self._coded() for part in (linear.mid, linear.half)]

    def vectors(self) -> list[nn.Parameter]:
        """Return the changes of row multipliers, column scales, norms and biases."""
        linears = self.linears.values()
        biases = [linear.bias for linear in linears if linear.bias is not None]
        vectors = [*(linear.row_scale for linear in linears), *self._col_scales, *biases, *self.norms.values()]
        return [vector.change for vector in vectors]

    def collect(self) -> None:
        """Hand the gradients of weights down to what they are made of."""
        for linear in self._coded():
            linear.collect()

    def project(self) -> None:
        """Bring every scale back into the format's range after a step."""
        for linear in self._coded():
            linear.project()

    @torch.no_grad()
    def result(self) -> StoredBlock:
        """Return the block as the file stores it."""
        return StoredBlock(
            {name: self.linears[name].pack() for name in self._config.linears()},
            {name: vector().cpu().numpy() for name, vector in self.norms.items()},
        )


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally, scores written out.

    On short windows and in 16 bits this takes half the processor time of torch's own, whose gradient is slow.
    """
    batch, heads, tokens, size = query.shape
    groups = batch * key.shape[1]
    mask = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    mask = mask.repeat(heads // key.shape[1], 1)  # the heads that share keys pose as more tokens
    keys = key.reshape(groups, tokens, size).transpose(1, 2)
    scores = torch.baddbmm(mask, query.reshape(groups, -1, size), keys, alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), value.reshape(groups, tokens, size)).view(query.shape)


class TunedModel:
    """All blocks' vectors and the final norm; planes, scale codes, embeddings, head and other tables stay."""

    def __init__(
        self,
        config: ModelConfig,
        starts: Iterable[StoredBlock],
        tables: Mapping[str, Tensor],
        rotary: Rotary | None,
        device: torch.device,
        products: torch.dtype,
    ) -> None:
        """Begin exactly at `starts`; `tables` are what `finish` wants, the final norm's start among them."""
        self._config = config
        self._tables = tables
        self.blocks = [TunedBlock(config, start, rotary, device, products) for start in starts]
        self._final = {
            name: norm_vector(name, value.cpu().numpy(), device)
            for name, value in tables.items()
            if name.startswith("final_norm.")
        }

    def hidden(self, x: Tensor) -> Tensor:
        """Turn the first block's input [batch, tokens, hidden] into what the head multiplies."""
        for block in self.blocks:
            x = block.forward(x)
        return finish(self._config, {**self._tables, **{name: vector() for name, vector in self._final.items()}}, x)

    def vectors(self) -> list[nn.Parameter]:
        """Return the changes of the final norm."""
        return [vector.change for vector in self._final.values()]

    @torch.no_grad()
    def final_norm(self) -> dict[str, Float32]:
        """Return the final norm as the file stores it."""
        return {name: vector().cpu().numpy() for name, vector in self._final.items()}


def norm_vector(name: str, value: Float32, device: torch.device) -> Vector:
    """Return a norm's weight or bias as a trainable vector."""
    return Vector(value, device, relative=name.endswith(".weight"))


def _shared_col_scale(linears: list[PackedLinear], device: torch.device) -> Vector | None:
    """Return the column scale of Linears that read the same input; ValueError where they do not agree on one."""
    first = linears[0].col_scale
    for other in linears[1:]:
        second = other.col_scale
        if (first is None) != (second is None) or not (
            first is None or second is None or np.array_equal(first, second)
        ):
            raise ValueError("Linears that read the same input: wanted one column scale for all, found several")
    return None if first is None else Vector(first, device, relative=True, half=True)


def parameter_groups(
    blocks: list[TunedBlock], vectors: list[nn.Parameter], rates: Rates
) -> Iterator[dict[str, object]]:
    """Yield an optimizer's groups: the blocks' numbers and `vectors` beside them."""
    yield {"params": [latent for block in blocks for latent in block.latents()], "lr": rates.latents}
    yield {"params": [code for block in blocks for code in block.codes()], "lr": rates.codes}
    yield {"params": [*(v for block in blocks for v in block.vectors()), *vectors], "lr": rates.vectors}
