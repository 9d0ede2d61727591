"""`--calib self`: text that the full-precision model writes, for machines with no other text at hand.

A model with a chat template writes conversations, both sides of them: the template alone, with nothing in it, makes an
instruction-tuned model ask what it was trained to be asked (Xu et al., 2024, "Magpie", arXiv 2406.08464). Any other
model writes plain text.

The whole model is in memory here, in float32: the one part of a conversion whose memory grows with the model.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from billm_convert.block import DecoderBlock, KeyValues, Rotary, embed, finish
from billm_convert.resources import free_memory
from billm_convert.source import ModelSource
from billm_format.errors import DoesNotFitError, UsageError
from billm_rt.tokenizer import Tokenizer

_BATCH = 96  # most windows written at once: reading the weights once serves them all

# Tokens after which a turn ends although the model would go on.
_LONGEST_QUESTION, _LONGEST_ANSWER = 96, 384
# Questions are drawn as the model has them, so that no two are alike; answers as somebody who chats would draw them.
_QUESTION_TEMPERATURE, _ANSWER_TEMPERATURE = 1.0, 0.7


@dataclass(frozen=True)
class ChatForm:
    """What a chat template puts around the turns of a conversation, as tokens."""

    opening: tuple[int, ...]  # before the first question
    answer: tuple[int, ...]  # between a question and its answer
    question: tuple[int, ...]  # between an answer and the next question
    ends: frozenset[int]  # tokens with which a model ends a turn


def chat_form(tokenizer: Tokenizer) -> ChatForm | None:
    """Return the form of the model's conversations; None where it has no template, or one that cannot be cut up."""
    if not tokenizer.has_chat_template:
        return None
    marks = "QqZ0", "QqZ1", "QqZ2"
    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
    try:
        text = tokenizer.render_chat(turns, add_generation_prompt=False)
        asked = tokenizer.render_chat(turns[:1], add_generation_prompt=True)
    except UsageError:
        return None
    if [text.count(mark) for mark in marks] != [1, 1, 1] or asked.count(marks[0]) != 1:
        return None
    before, after = text.split(marks[1])
    pieces = before.split(marks[0])[0], asked.split(marks[0])[1], after.split(marks[2])[0]
    opening, answer, question = (tuple(tokenizer.encode(piece, add_bos=False, special=True)) for piece in pieces)
    if not (opening and answer and question):
        return None
    # A separator's first token ends a turn if it is no text (<|im_end|>), not if it is some ("[" of "[/INST]").
    first = {piece[0] for piece in (answer, question) if not tokenizer.decode(piece[:1])}
    return ChatForm(opening, answer, question, frozenset(first | set(tokenizer.eos_token_ids)))


def sample_windows(
    source: ModelSource,
    form: ChatForm | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Return int64 [nsamples, seqlen] that the model wrote; `progress` gets (tokens done, tokens in all).

    With a `form` every window is a conversation. Without, it is text sampled at temperature 1 that begins with the
    model's beginning-of-text token, where it has one, and a random token: left to itself a model says the same things
    again and again. DoesNotFitError where the model does not fit in memory, with a window beside it.
    """
    at_once = _at_once(source, nsamples, seqlen, device)
    model = _Model(source, seqlen, device)
    # One number for every token, so that what is written does not depend on how many windows are written at once.
    numbers = torch.rand(nsamples, seqlen, generator=torch.Generator().manual_seed(seed))
    done: list[Tensor] = []
    for batch in torch.split(numbers, at_once):
        report = partial(_add_progress, progress, len(done) * at_once * seqlen, nsamples * seqlen)
        done.append(_sample(model, form, batch, report))
    return torch.cat(done)


def sampling_memory(source: ModelSource, nsamples: int, seqlen: int, device: torch.device) -> dict[str, int]:
    """Return the bytes that `sample_windows` takes, by kind; DoesNotFitError as there, before any work is done."""
    at_once = _at_once(source, nsamples, seqlen, device)
    return {
        "weights": _weight_bytes(source),
        "keys_and_values": at_once * _window_bytes(source, seqlen),
        "logits": 3 * 4 * at_once * source.config.vocab_size,  # and what a token is drawn by
    }


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


class _Conversation:
    """One window of turns, token by token: what a template wants takes the place of what the model would write."""

    def __init__(self, form: ChatForm) -> None:
        self._form = form
        self._wanted = deque(form.opening)
        self._asking = True
        self._left = _LONGEST_QUESTION

    def next(self, drawn: int) -> int:
        """Return the next token, the model having drawn `drawn`."""
        if not self._wanted and (drawn in self._form.ends or self._left == 0):
            self._wanted.extend(self._form.answer if self._asking else self._form.question)
            self._asking = not self._asking
            self._left = _LONGEST_QUESTION if self._asking else _LONGEST_ANSWER
        if self._wanted:
            return self._wanted.popleft()
        self._left -= 1
        return drawn

    @property
    def temperature(self) -> float:
        """At which the next token is to be drawn."""
        return _QUESTION_TEMPERATURE if self._asking else _ANSWER_TEMPERATURE


def _sample(model: _Model, form: ChatForm | None, numbers: Tensor, progress: Callable[[int], None]) -> Tensor:
    """Write a window for each row of `numbers` float32 [batch, seqlen], uniform in [0, 1)."""
    config = model.config
    batch, seqlen = numbers.shape
    conversations = [] if form is None else [_Conversation(form) for _ in range(batch)]
    if conversations:
        tokens = torch.tensor([[conversation.next(-1)] for conversation in conversations])
    else:
        tokens = (numbers[:, :1] * config.vocab_size).long()
        if config.bos_token_id is not None and seqlen > 1:
            tokens = torch.cat((torch.full((batch, 1), config.bos_token_id), tokens), dim=1)
    past = [KeyValues(seqlen) for _ in range(config.num_hidden_layers)]
    fed = 0
    while tokens.shape[1] < seqlen:
        logits = model.next_logits(tokens[:, fed:], fed, past)
        fed = tokens.shape[1]
        if conversations:
            logits /= torch.tensor([[conversation.temperature] for conversation in conversations])
        drawn = _draw(logits, numbers[:, fed : fed + 1])
        for row, conversation in enumerate(conversations):
            drawn[row, 0] = conversation.next(int(drawn[row, 0]))
        tokens = torch.cat((tokens, drawn), dim=1)
        progress(batch * tokens.shape[1])
    return tokens


def _draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return int64 [batch, 1] drawn from softmax(logits [batch, vocab]) by `numbers` [batch, 1], uniform in [0, 1).

    By inverting the distribution function: torch.multinomial draws a number for every entry of the vocabulary, a tenth
    of the time of a step.
    """
    reached = logits.softmax(dim=-1).cumsum_(dim=-1)
    return torch.searchsorted(reached, numbers * reached[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)


def _at_once(source: ModelSource, nsamples: int, seqlen: int, device: torch.device) -> int:
    """Return how many windows are written at once: there must be room beside the weights for one at least."""
    weights, window = _weight_bytes(source), _window_bytes(source, seqlen)
    free = free_memory(device)
    if weights + window > free:
        raise DoesNotFitError(
            f"--calib self needs the whole model in memory: {weights / 1e9:.1f} GB of weights + {window / 1e9:.1f} GB "
            f"of a window's keys and values, {free / 1e9:.1f} GB are free; give a text instead (--calib pydoc needs "
            "none at hand)"
        )
    # Half of what is left: logits and what they are drawn by want some, and other programs too.
    return min(nsamples, _BATCH, max(1, int((free - weights) / 2 // window)))


def _weight_bytes(source: ModelSource) -> int:
    return 4 * sum(torch.Size(source.shape(name)).numel() for name in source.names() if name != "rope.inv_freq")


def _window_bytes(source: ModelSource, seqlen: int) -> int:
    """Return what the keys and values of a window take."""
    return 2 * 4 * source.config.num_hidden_layers * seqlen * source.config.key_value_size
