"""The calibration text on its way through the blocks, and what each Linear of a block reads of it.

The paper's way: all inputs of a block are those of its original weights, on hidden states that the binarized blocks
before it made. `FollowedStream` is closer to what will run: a Linear's inputs come from the Linears before it as they
are stored, in the same block too, and a second stream through the original model tells what they should have been.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from billm_convert.block import HALVES, DecoderBlock, input_groups
from billm_convert.hessian import DriftAccumulator, HessianAccumulator
from billm_convert.resources import free_memory
from billm_convert.solved import solving_memory
from billm_format.config import ModelConfig

# The groups whose outputs are added to the hidden states: the last of each half.
_ADDED = ("o", "down")

# Of the device's memory that solving leaves free, what may be taken to save a second computation.
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
    """Hidden states float32 [windows, seqlen, hidden], carried through the binarized blocks in batches."""

    def __init__(
        self, config: ModelConfig, hidden: Tensor, batch: int, device: torch.device, place: torch.device
    ) -> None:
        """Keep `hidden` at `place`, the device or the host; `batch` windows go through a block at once.

        What is on the CPU is kept as it is, and changes as the text advances.
        """
        self._config = config
        self._device = device
        self._place = place
        self._hidden = [self._settled(part) for part in torch.split(hidden, batch)]

    def inputs(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> Iterator[Inputs]:
        """Yield what each group of Linears reads in the block as it is before any of them is replaced."""
        groups = input_groups(self._config)
        shapes = self._config.linears()
        hessians = {group: HessianAccumulator(shapes[linears[0]][1], self._device) for group, linears in groups.items()}
        for index, batch in enumerate(self._hidden):
            block.observe(self._on_device(batch), lambda group, x: hessians[group].add(x))
            told(0.6 * (index + 1) / len(self._hidden))
        for index, (group, linears) in enumerate(groups.items()):
            yield Inputs(linears, hessians.pop(group).result())
            told(0.6 + 0.4 * (index + 1) / len(groups))

    def advance(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        """Replace the hidden states by the output of `block`, all its Linears replaced."""
        self._run(self._hidden, block.forward, told)

    def finite(self) -> bool:
        """Whether all hidden states are finite."""
        return all(bool(torch.isfinite(self._on_device(batch)).all()) for batch in self._hidden)

    def _settled(self, batch: Tensor) -> Tensor:
        """Return a batch where hidden states are kept."""
        return batch.to(self._place) if self._place == self._device else batch.pin_memory()

    def _on_device(self, batch: Tensor) -> Tensor:
        # Nothing but the device ever reads or writes the batches: its own order of work is enough, nobody need wait.
        return batch.to(self._device, non_blocking=True)

    def _run(self, batches: list[Tensor], step: Callable[[Tensor], Tensor], told: Told) -> None:
        for index, batch in enumerate(batches):
            batch.copy_(step(self._on_device(batch)), non_blocking=True)
            told((index + 1) / len(batches))


class FollowedStream(Stream):
    """A stream whose block is replaced Linear by Linear, beside the same text's stream through the original blocks."""

    def __init__(
        self,
        config: ModelConfig,
        hidden: Tensor,
        batch: int,
        device: torch.device,
        place: torch.device,
        *,
        quick: bool = False,
        again: bool = False,
    ) -> None:
        """Begin both streams with `hidden`; `quick`: products are made as `quick_products` has them.

        `again`: what a block reads is kept until the next one, for `retrace`.
        """
        super().__init__(config, hidden, batch, device, place)
        self._quick = quick
        # What the block that is being replaced reads.
        self._before = [self._settled(part.clone()) for part in self._hidden] if again else []
        self._wanted = [self._settled(part.clone()) for part in self._hidden]
        self._halves_done = 0  # of the block that is being replaced
        self._measured = False  # the last Linear of the half that is next: then the original's half is done already
        self._kept: list[Tensor] = []  # what that Linear reads, by batch, where there is room for it

    def inputs(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> Iterator[Inputs]:
        """Yield what each group of Linears reads, those before it in `block` being replaced by now."""
        groups = input_groups(self._config)
        for before, batch in zip(self._before, self._hidden, strict=False):  # empty: not wanted again
            before.copy_(self._on_device(batch), non_blocking=True)
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
        keep = hidden_drift is not None and self._room_for(rows, cols)
        pairs = list(zip(self._hidden, self._wanted, strict=True))
        for index, pair in enumerate(pairs):
            hidden, wanted = map(self._on_device, pair)
            with quick_products(self._quick):
                x, meant = block.read_by(group, hidden), original.read_by(group, wanted)
                hessian.add(x.flatten(0, 1))
                drift.add((meant - x).flatten(0, 1), x.flatten(0, 1))
                if hidden_drift is not None:
                    # Without the first token: in many models its hidden state is a thousand times the others' size, and
                    # would be all that is seen. Norms hide that from what Linears read.
                    hidden_drift.add((wanted - hidden)[:, 1:].flatten(0, 1), x[:, 1:].flatten(0, 1))
                    pair[1].copy_(original.written_by(group, wanted, meant), non_blocking=True)
            if keep:
                self._kept.append(x)
            told((index + 1) / len(pairs))
        self._measured = hidden_drift is not None
        return Inputs(linears, hessian.result(), drift.result(), hidden_drift.result() if hidden_drift else None)

    def advance(self, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        """Replace both streams' hidden states by the outputs of their blocks."""
        left = range(self._halves_done, len(HALVES))
        for index, half in enumerate(left):
            self._advance_half(half, block, original, _part(told, index, len(left)))
        self._halves_done = 0

    def retrace(self, block: DecoderBlock, told: Told) -> None:
        """Replace the hidden states by what `block`, changed since `advance`, makes of what it reads."""
        with quick_products(self._quick):
            for index, (batch, before) in enumerate(zip(self._hidden, self._before, strict=True)):
                batch.copy_(block.forward(self._on_device(before)), non_blocking=True)
                told((index + 1) / len(self._hidden))

    def _advance_half(self, half: int, block: DecoderBlock, original: DecoderBlock, told: Told) -> None:
        kept, self._kept = iter(self._kept), []

        def write(x: Tensor) -> Tensor:
            read = next(kept, None)
            if read is None:
                return (block.attention_half, block.mlp_half)[half](x)
            return block.written_by(_ADDED[half], x, read)

        runs = [(self._hidden, write)]
        if not self._measured:
            runs.append((self._wanted, (original.attention_half, original.mlp_half)[half]))
        with quick_products(self._quick):
            for place, (hidden, step) in enumerate(runs):
                self._run(hidden, step, _part(told, place, len(runs)))
        self._measured = False
        self._halves_done = half + 1

    def _room_for(self, rows: int, cols: int) -> bool:
        """Whether what a half's last Linear [rows, cols] reads may be kept until that Linear is replaced.

        Everything that makes it stays what it is until then: without room it is computed a second time.
        """
        need = sum(batch[..., 0].numel() * cols * batch.element_size() for batch in self._hidden)
        return need <= _KEPT_SHARE * (free_memory(self._device) - solving_memory(rows, cols))


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
