"""The calibration text on its way through the blocks, and what each Linear of a block reads of it.

The paper's way: all inputs of a block are those of its original weights, on hidden states that the binarized blocks
before it made. `FollowedStream` is closer to what will run: a Linear's inputs come from the Linears before it as they
are stored, in the same block too, and a second stream through the original model tells what they should have been.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from billm_convert.block import HALVES, DecoderBlock, input_groups
from billm_convert.hessian import DriftAccumulator, HessianAccumulator
from billm_format.config import ModelConfig

# The groups whose outputs are added to the hidden states: the last of each half.
_ADDED = ("o", "down")

# Of the memory that is free, what may be taken to save a second computation.
_KEPT_SHARE = 0.25

# Told the share of a piece of work that is done.
Told = Callable[[float], None]


@dataclass(frozen=True)
class Inputs:
    """What a recipe gets to know about the inputs of the Linears `linears`."""

    linears: tuple[str, ...]
    hessian: Tensor  # [cols, cols], `HessianAccumulator.result`
    # How these inputs miss the original model's, [cols, cols], and, where the Linear's output is added to the hidden
    # states, how those do, [rows, cols]: `DriftAccumulator.result`. None: not measured.
    drift: Tensor | None = None
    hidden_drift: Tensor | None = None


class Stream:
    """Hidden states float32 [windows, seqlen, hidden] on the CPU, carried through the binarized blocks in batches."""

    def __init__(self, config: ModelConfig, hidden: Tensor, batch: int, device: torch.device) -> None:
        """Keep `hidden`, which changes as the text advances; `batch` windows go through a block at once."""
        self._config = config
        self._hidden = hidden
        self._batch = batch
        self._device = device

    def inputs(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> Iterator[Inputs]:
        """Yield what each group of Linears reads in the block as it is before any of them is replaced."""
        groups = input_groups(self._config)
        shapes = self._config.linears()
        hessians = {group: HessianAccumulator(shapes[linears[0]][1], self._device) for group, linears in groups.items()}
        batches = self._batches(self._hidden)
        for index, batch in enumerate(batches):
            block.observe(batch.to(self._device), lambda group, x: hessians[group].add(x))
            told(0.6 * (index + 1) / len(batches))
        for index, (group, linears) in enumerate(groups.items()):
            yield Inputs(linears, hessians.pop(group).result())
            told(0.6 + 0.4 * (index + 1) / len(groups))

    def advance(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        """Replace the hidden states by the output of `block`, all its Linears replaced."""
        self._run(self._hidden, block.forward, told)

    def finite(self) -> bool:
        """Whether all hidden states are finite."""
        return bool(torch.isfinite(self._hidden).all())

    def _batches(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return torch.split(hidden, self._batch)

    def _run(self, hidden: Tensor, step: Callable[[Tensor], Tensor], told: Told) -> None:
        batches = self._batches(hidden)
        for index, batch in enumerate(batches):
            batch.copy_(step(batch.to(self._device)))
            told((index + 1) / len(batches))


class FollowedStream(Stream):
    """A stream whose block is replaced Linear by Linear, beside the same text's stream through the original blocks."""

    def __init__(
        self, config: ModelConfig, hidden: Tensor, batch: int, device: torch.device, *, quick: bool = False
    ) -> None:
        """Begin both streams with `hidden`; `quick`: products are made as `quick_products` has them."""
        super().__init__(config, hidden, batch, device)
        self._quick = quick
        self._wanted = hidden.clone()
        self._halves_done = 0  # of the block that is being replaced
        self._measured = False  # the last Linear of the half that is next: then the original's half is done already
        self._kept: list[Tensor] = []  # what that Linear reads, by batch, where there is room for it

    def inputs(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> Iterator[Inputs]:
        """Yield what each group of Linears reads, those before it in `block` being replaced by now."""
        groups = input_groups(self._config)
        done = 0
        for half, names in enumerate(HALVES.values()):
            if half > 0:
                self._advance_half(half - 1, block, original, lambda share: None)
            for group in names:
                yield self._measure(group, groups[group], block, original, _part(told, done, len(groups)))
                done += 1

    def _measure(
        self, group: str, linears: tuple[str, ...], block: DecoderBlock, original: DecoderBlock, told: Told
    ) -> Inputs:
        rows, cols, _ = self._config.linears()[linears[0]]
        hessian = HessianAccumulator(cols, self._device)
        drift = DriftAccumulator(cols, cols, self._device)
        hidden_drift = DriftAccumulator(rows, cols, self._device) if group in _ADDED else None
        keep = hidden_drift is not None and self._room_for(cols)
        pairs = list(zip(self._batches(self._hidden), self._batches(self._wanted), strict=True))
        for index, pair in enumerate(pairs):
            hidden, wanted = (part.to(self._device) for part in pair)
            with quick_products(self._quick):
                x, meant = block.read_by(group, hidden), original.read_by(group, wanted)
            hessian.add(x.flatten(0, 1))
            drift.add((meant - x).flatten(0, 1), x.flatten(0, 1))
            if hidden_drift is not None:
                # Without the first token: in many models its hidden state is a thousand times the others' size, and
                # would be all that is seen. Norms hide that from what Linears read.
                hidden_drift.add((wanted - hidden)[:, 1:].flatten(0, 1), x[:, 1:].flatten(0, 1))
                with quick_products(self._quick):
                    pair[1].copy_(original.written_by(group, wanted, meant))
            if keep:
                self._kept.append(x.cpu())
            told((index + 1) / len(pairs))
        self._measured = hidden_drift is not None
        return Inputs(linears, hessian.result(), drift.result(), hidden_drift.result() if hidden_drift else None)

    def advance(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        """Replace both streams' hidden states by the outputs of their blocks."""
        left = range(self._halves_done, len(HALVES))
        for index, half in enumerate(left):
            self._advance_half(half, block, original, _part(told, index, len(left)))
        self._halves_done = 0

    def _advance_half(self, half: int, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        kept, self._kept = iter(self._kept), []

        def write(x: Tensor) -> Tensor:
            read = next(kept, None)
            if read is None:
                return (block.attention_half, block.mlp_half)[half](x)
            return block.written_by(_ADDED[half], x, read.to(self._device))

        runs = [(self._hidden, write)]
        if not self._measured:
            runs.append((self._wanted, (original.attention_half, original.mlp_half)[half]))
        with quick_products(self._quick):
            for place, (hidden, step) in enumerate(runs):
                self._run(hidden, step, _part(told, place, len(runs)))
        self._measured = False
        self._halves_done = half + 1

    def _room_for(self, cols: int) -> bool:
        """Whether what a half's last Linear reads, `cols` features, may be kept until that Linear is replaced.

        Everything that makes it stays what it is until then: without room it is computed a second time.
        """
        need = self._hidden[..., 0].numel() * cols * self._hidden.element_size()
        return bool(need <= _KEPT_SHARE * psutil.virtual_memory().available)


@contextlib.contextmanager
def quick_products(quick: bool) -> Iterator[None]:
    """Let float32 matrix products, if `quick`, round their factors to bfloat16 where the processor is quick at that."""
    before = torch.get_float32_matmul_precision()
    if quick:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _part(told: Told, index: int, parts: int) -> Told:
    """Return what tells of one of several equal parts as of a share of the whole."""
    return lambda share: told((index + share) / parts)
