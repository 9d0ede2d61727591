"""The quality gate: after a conversion a short perplexity beside the original's, so that no collapse goes unseen.

Protocol, scoring and tokens are `billm_rt`'s, so that `billm-ppl` gives the same figures. Only the original is read
in another way here: through the converter's own blocks, one in memory at a time, whatever the model's size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

import billm_rt
from billm_convert.block import DecoderBlock, Rotary, embed, finish
from billm_convert.settings import RECIPES, CheckReport, ConvertSettings
from billm_convert.source import ModelSource
from billm_format.config import BLOCK_SIZES
from billm_format.errors import UsageError
from billm_rt import against, ppl, texts
from billm_rt.cuda.device import unavailable_reason

WINDOWS, SEQLEN = 4, 512

# Of the perplexities. Text is still fluent below 2 or 3 times the original's; at 10 a model has lost its language.
COLLAPSE_RATIO = 10.0

_CHARACTERS_PER_TOKEN = 16  # far more than any tokenizer's mean on prose: enough text, and not all of it


def held_out_text(choices: Sequence[str]) -> texts.Text:
    """Return text of the kind of the first calibration text of which there is more, else pydoc's unseen fifth.

    Calibration never sees it. Raises UsageError when there is neither.
    """
    for choice in choices:
        if choice in texts.NAMES:
            # openwebtext has no such split, of others only the training split may be at hand.
            with contextlib.suppress(UsageError):
                return texts.load(choice, "test")
    return texts.load("pydoc", "test")


def check(
    source: ModelSource, out: Path, text: texts.Text, settings: ConvertSettings, device: torch.device
) -> CheckReport:
    """Return the perplexities of the file `out` and of the model that it was made from on the first windows of `text`.

    The file runs in `billm_rt` as it will for users. Raises UsageError when the text is empty and CorruptFileError when
    logits are not finite.
    """
    with billm_rt.load(out, _runtime_device(device), threads=settings.threads) as model:
        # As in billm-ppl: the names of special tokens in the text are those tokens.
        beginning = _beginning(text, WINDOWS * SEQLEN * _CHARACTERS_PER_TOKEN)
        ids = model.tokenizer.encode(beginning, special=True)
        seqlen = min(SEQLEN, model.config.max_position_embeddings, len(ids))
        parts = ppl.cut(ids, seqlen, WINDOWS, "paper")
        found = ppl.measure(parts, ppl.model_scorer(model)[0], "paper")
    original = against.evaluate(streamed_reference(source, parts, device), parts, "paper")
    collapsed = not found.perplexity <= COLLAPSE_RATIO * original.perplexity
    return CheckReport(
        text=text.name,
        windows=len(parts),
        seqlen=seqlen,
        perplexity=found.perplexity,
        original=original.perplexity,
        ratio=found.perplexity / original.perplexity,
        collapsed=collapsed,
        advice=_advice(settings) if collapsed else None,
        seconds=found.seconds + original.seconds,
    )


def _runtime_device(device: torch.device) -> str:
    """Return the device by the runtime's name for it, "cpu" where the runtime cannot use it: it has its own needs."""
    if device.type == "cpu" or unavailable_reason(device.index):
        return "cpu"
    torch.cuda.empty_cache()  # what torch holds in reserve is room for the model
    return str(device)


def _advice(settings: ConvertSettings) -> str:
    others = [recipe for recipe in RECIPES if recipe != settings.recipe]
    smaller = [size for size in BLOCK_SIZES if size < settings.block_size]
    steps = [f"--recipe {' or '.join(others)}"] if others else []
    steps += [f"--block-size {max(smaller)}"] if smaller else []
    steps += ["more calibration text (--nsamples)", "text closer to its use (--calib)"]
    return (
        f"the model has collapsed: its perplexity is more than {COLLAPSE_RATIO:g} times the original's, and what it "
        f"writes will make no sense; try {', '.join(steps[:-1])} or {steps[-1]}; a larger model suffers less"
    )


def streamed_reference(source: ModelSource, parts: list[ppl.Ids], device: torch.device) -> against.Reference:
    """Return the original as the scorer of these windows, which must all be of one length, and of no others.

    All windows pass through one decoder block after the other; the hidden states behind the last one are kept, and
    the head multiplies them when a window is scored. In memory: one block, then the head, both in float32.
    """
    hidden = {part.tobytes(): states for part, states in zip(parts, _run(source, parts, device), strict=True)}
    config = source.config
    tables = {
        name: source.tensor(name).to(device)
        for name in source.names()
        if name.startswith(("final_norm.", "project_out."))
    }
    head = source.tensor("embed.weight" if config.tie_word_embeddings else "head.weight").to(device)
    rows = ppl.chunk_rows(config.vocab_size)

    def score(window: ppl.Ids, first: int) -> Iterator[ppl.Float32]:
        with torch.inference_mode():
            states = finish(config, tables, hidden[window.tobytes()][first - 1 : -1].to(device))
            for start in range(0, len(states), rows):
                yield F.linear(states[start : start + rows], head).cpu().numpy()

    weights = 4 * sum(torch.Size(source.shape(name)).numel() for name in source.names() if name != "rope.inv_freq")
    return against.Reference(score, sum(file.stat().st_size for file in source.files()), weights, str(device))


@torch.inference_mode()
def _run(source: ModelSource, parts: list[ppl.Ids], device: torch.device) -> Tensor:
    """Return the hidden states behind the last block, float32 [windows, seqlen, hidden] on the CPU."""
    config, tokens = source.config, torch.from_numpy(np.stack(parts))
    wanted, where = torch.unique(tokens, return_inverse=True)
    rows = torch.cat([source.tensor("embed.weight", token, token + 1) for token in wanted.tolist()])
    tables = {name: source.tensor(name) for name in source.names() if name.startswith(("pos_embed.", "project_in."))}
    hidden = embed(config, tables, rows[where])
    rotary = None
    if config.position == "rope":
        rotary = Rotary(source.tensor("rope.inv_freq").to(device), config.rope_scale, tokens.shape[1])
    for layer in range(config.num_hidden_layers):
        weights = {name: value.to(device) for name, value in source.layer(layer).items()}
        block = DecoderBlock(config, weights, rotary)
        for window in torch.split(hidden, 1):
            window.copy_(block.forward(window.to(device)))
    return hidden


def _beginning(text: texts.Text, characters: int) -> str:
    """Return whole documents from the start of `text`, joined, of at least so many characters if it has them."""
    taken, size = 0, 0
    while taken < len(text.documents) and size < characters:
        size += len(text.documents[taken]) + len(text.joiner)
        taken += 1
    return text.joiner.join(text.documents[:taken])
