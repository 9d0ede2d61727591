"""`--calib self`: text that the full-precision model writes, for machines with no other text at hand.

The whole model is in memory here, in float32: the one part of a conversion whose memory grows with the model.
"""

from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from billm_convert.block import DecoderBlock, KeyValues, Rotary, embed, finish
from billm_convert.source import ModelSource
from billm_format.errors import DoesNotFitError

_BATCH = 32  # windows written at once: reading the weights once serves them all


def sample_windows(
    source: ModelSource,
    nsamples: int,
    seqlen: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Return int64 [nsamples, seqlen] sampled at temperature 1; `progress` gets (tokens done, tokens in all).

    A window begins with the model's beginning-of-text token, where it has one, and a random token: an instruction-tuned
    model left to itself says the same things again and again. DoesNotFitError where the model does not fit in memory.
    """
    _check_memory(source, min(nsamples, _BATCH), seqlen, device)
    model = _Model(source, seqlen, device)
    generator = torch.Generator().manual_seed(seed)
    done: list[Tensor] = []
    for start in range(0, nsamples, _BATCH):
        report = partial(_add_progress, progress, start * seqlen, nsamples * seqlen)
        done.append(_sample(model, min(_BATCH, nsamples - start), seqlen, generator, report))
    return torch.cat(done)


def _add_progress(progress: Callable[[int, int], None], before: int, total: int, tokens: int) -> None:
    progress(before + tokens, total)


class _Model:
    """Every block and table of the model on the device."""

    def __init__(self, source: ModelSource, seqlen: int, device: torch.device) -> None:
        self.config = source.config
        config = source.config
        names = [name for name in source.names() if not name.startswith("layers.")]
        self.tables = {name: source.tensor(name).to(device) for name in names}
        rotary = None
        if config.position == "rope":
            rotary = Rotary(self.tables["rope.inv_freq"], config.rope_scale, seqlen)
        self.blocks = [
            DecoderBlock(config, {n: t.to(device) for n, t in source.layer(i).items()}, rotary)
            for i in range(config.num_hidden_layers)
        ]
        self.head = self.tables["embed.weight" if config.tie_word_embeddings else "head.weight"]
        self.device = device

    def next_logits(self, tokens: Tensor, start: int, past: list[KeyValues]) -> Tensor:
        """Feed tokens [batch, n] at position `start`; return the last one's logits [batch, vocab] on the CPU."""
        x = embed(self.config, self.tables, self.tables["embed.weight"][tokens.to(self.device)], start)
        for index, block in enumerate(self.blocks):
            x = block.forward(x, past[index])
        return F.linear(finish(self.config, self.tables, x[:, -1]), self.head).cpu()


def _sample(
    model: _Model, batch: int, seqlen: int, generator: torch.Generator, progress: Callable[[int], None]
) -> Tensor:
    config = model.config
    tokens = torch.randint(config.vocab_size, (batch, 1), generator=generator)
    if config.bos_token_id is not None and seqlen > 1:
        tokens = torch.cat((torch.full((batch, 1), config.bos_token_id), tokens), dim=1)
    past = [KeyValues(seqlen) for _ in range(config.num_hidden_layers)]
    fed = 0
    while tokens.shape[1] < seqlen:
        logits = model.next_logits(tokens[:, fed:], fed, past)
        fed = tokens.shape[1]
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
        progress(batch * tokens.shape[1])
    return tokens


def _check_memory(source: ModelSource, batch: int, seqlen: int, device: torch.device) -> None:
    config = source.config
    weights = 4 * sum(torch.Size(source.shape(name)).numel() for name in source.names() if name != "rope.inv_freq")
    cache = 2 * 4 * config.num_hidden_layers * batch * seqlen * config.key_value_size
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if weights + cache > free:
        raise DoesNotFitError(
            f"--calib self needs the whole model in memory: {weights / 1e9:.1f} GB of weights + {cache / 1e9:.1f} GB "
            f"of keys and values, {free / 1e9:.1f} GB are free; give a text instead (--calib pydoc needs none at hand)"
        )
