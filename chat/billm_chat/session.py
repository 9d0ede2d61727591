"""The conversation: what was said, what of it the model sees, and how an answer is made. Nothing here prints."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from billm_chat.settings import Settings
from billm_format.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from billm_rt import Chunk, Model, Sampling

# Why an answer ended, beyond the runtime's "eos", "stop", "length" and "context".
INTERRUPTED = "interrupted"
LOOP = "loop"

# This share of the context is kept free for an answer. Where it cannot be, the oldest turns are left out until the
# prompt takes at most half, so that a full conversation is computed anew once in many turns and not in every one.
_RESERVED_SHARE = 4

# What counts as a loop: a passage of up to 64 tokens, four times in a row and 64 tokens long in all.
_LONGEST_LOOP, _LOOP_TIMES, _LOOP_TOKENS = 64, 4, 64


@dataclass(frozen=True)
class Message:
    """One half of an exchange: `role` is "user" or "assistant"; an answer says why it ended."""

    role: str
    content: str
    finish_reason: str | None = None


@dataclass
class Turn:
    """How the last answer went; token counts and seconds."""

    prompt_tokens: int
    dropped: int = 0  # messages newly left out of the context before this answer
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    proposed_tokens: int = 0  # by lookup
    accepted_tokens: int = 0
    finish_reason: str = INTERRUPTED
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # without the end-of-text token


@dataclass(frozen=True)
class _Seen:
    """The first `messages` messages rendered, and the tokens the model read or sampled for exactly this text."""

    messages: int
    text: str
    token_ids: tuple[int, ...]


class Session:
    """A conversation with a model. `raw`: no chat template, the model goes on where the text ends."""

    def __init__(
        self, model: "Model", settings: Settings | None = None, *, system: str | None = None, raw: bool = False
    ) -> None:
        self.model = model
        self.settings = settings or Settings()
        self.system = system
        self.raw = raw
        self.messages: list[Message] = []
        self.first = 0  # the messages before this one are left out of the context
        self.attached: list[tuple[str, str]] = []  # (name, text) that go in front of the next message
        self.cache = model.new_cache()
        self.last: Turn | None = None
        self._attempt = 0  # at the last question: a fixed seed must not give /regen the answer it replaces
        self._seen: list[_Seen] = []  # one per answer, each longer than the one before

    # --- what the user does

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a message and return the pieces of the answer as they come (some are empty).

        The answer joins the conversation when the generator ends or is closed, however far it got. Raises
        DoesNotFitError when the message alone exceeds the context; the conversation is then as it was.
        """
        if self.raw:
            content = "".join(attached for _, attached in self.attached) + text
        else:
            content = "\n\n".join([*(f"{name}:\n\n{attached.strip()}" for name, attached in self.attached), text])
        return self._answer_to(self.messages, Message("user", encodable(content)), attempt=0)

    def regenerate(self) -> Generator[str, None, None]:
        """Answer the last message again, in place of its answer; the same contract as `ask`."""
        if not self.messages:
            raise UsageError("there is no answer yet that could be made again")
        end = len(self.messages) - (self.messages[-1].role == "assistant")
        return self._answer_to(self.messages[: end - 1], self.messages[end - 1], attempt=self._attempt + 1)

    def undo(self) -> str:
        """Take the last message and its answer back; return the message."""
        if not self.messages:
            raise UsageError("there is nothing to take back")
        end = len(self.messages) - (self.messages[-1].role == "assistant")
        message = self.messages[end - 1]
        del self.messages[end - 1 :]
        if self.first >= len(self.messages):
            self.first = 0
        return message.content

    def replace_messages(self, messages: Sequence[Message]) -> None:
        """Go on from another conversation; an empty one starts anew. System prompt and settings stay."""
        self.messages = list(messages)
        self.first = 0
        self.last = None
        self.attached.clear()
        self._seen.clear()

    # --- the prompt

    def context_tokens(self) -> int:
        """Tokens of the conversation as the model sees it."""
        return len(self._prompt(self.messages, self.first, answer_follows=False)[1])

    def _prompt(self, messages: Sequence[Message], first: int, *, answer_follows: bool = True) -> tuple[str, list[int]]:
        """Return the messages from `first` on as text and as tokens."""
        tokenizer = self.model.tokenizer
        turns = [{"role": message.role, "content": message.content} for message in messages[first:]]
        if self.raw:
            text = "".join(turn["content"] for turn in turns)
            return text, self._spliced(text, messages) or tokenizer.encode(text)
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        if not turns:
            return "", []
        text = tokenizer.render_chat(turns, add_generation_prompt=answer_follows)
        ids = self._spliced(text, messages)
        return text, ids or tokenizer.apply_chat_template(turns, add_generation_prompt=answer_follows)

    def _spliced(self, text: str, messages: Sequence[Message]) -> list[int] | None:
        """Return the prompt's tokens, those of what the model has seen taken over; None: it must be tokenized anew.

        Sampled tokens need not be those that the tokenizer chooses for the same text. Were an answer tokenized anew,
        the cache would be lost from the first such place on, and the model would not see its answer as it gave it.
        """
        encode, decode = self.model.tokenizer.encode, self.model.tokenizer.decode
        seen = next((seen for seen in reversed(self._seen) if text.startswith(seen.text)), None)
        if seen is None:
            return None
        for message in messages[seen.messages :]:
            # A special token's name, typed by a person: the rendered text cannot tell it from the template's own.
            if encode(message.content, special=True) != encode(message.content, special=False):
                return None
        rest = encode(text[len(seen.text) :], add_bos=False, special=not self.raw)
        # Only a special token, which decodes to nothing, cuts a text where tokens cannot depend on what stands before.
        return [*seen.token_ids, *rest] if not rest or decode(rest[:1]) == "" else None

    def _fitting_prompt(self, messages: Sequence[Message]) -> tuple[str, list[int], int]:
        """Return the prompt's text, its tokens, and the message it starts at: a later one where the context is full."""
        ctx, first = self.model.ctx, self.first
        room = min(self.settings.max_tokens, max(1, ctx // _RESERVED_SHARE))
        text, ids = self._prompt(messages, first)
        if len(ids) + room > ctx:
            while len(ids) > ctx // 2:
                later = next((i for i in range(first + 1, len(messages)) if messages[i].role == "user"), None)
                if later is None:
                    break
                first = later
                text, ids = self._prompt(messages, first)
        if len(ids) >= ctx:
            raise DoesNotFitError(
                f"this message makes a prompt of {len(ids):,} tokens, and the context holds {ctx:,}: "
                "shorten it, or start again with a larger --ctx"
            )
        return text, ids, first

    # --- the answer

    def _answer_to(self, before: Sequence[Message], question: Message, *, attempt: int) -> Generator[str, None, None]:
        messages = [*before, question]
        text, ids, first = self._fitting_prompt(messages)
        turn = Turn(prompt_tokens=len(ids), dropped=first - self.first)
        turn.reused_tokens = min(_common_prefix(self.cache.tokens, ids), len(ids) - 1)
        chunks = self.model.generate(
            ids,
            max_tokens=self.settings.max_tokens,
            sampling=self._sampling(attempt),
            stop=self._stops(),
            cache=self.cache,
            lookup=self.settings.lookup,
        )
        self.messages, self.first, self._attempt, self.last = messages, first, attempt, turn
        self.attached.clear()
        pieces = self._stream(turn, _Seen(len(messages), text, tuple(ids)), chunks)
        next(pieces)  # runs up to the first yield: from here on, closing it records the answer
        return pieces

    def _stream(self, turn: Turn, prompt: _Seen, chunks: Iterator["Chunk"]) -> Generator[str, None, None]:
        read: float | None = None  # when the first token came
        begun = time.perf_counter()
        try:
            yield ""
            begun = time.perf_counter()
            for chunk in chunks:
                read = read or time.perf_counter()
                shown = chunk.text if self.raw or turn.text.strip() else chunk.text.lstrip()
                self._take(turn, chunk)
                yield shown
                if turn.finish_reason == LOOP:
                    break
        except Exception:  # nothing was answered: the question is not part of the conversation either
            self.messages = self.messages[: prompt.messages - 1]
            raise
        finally:
            now = time.perf_counter()
            turn.prompt_seconds = (read or now) - begun
            turn.generation_seconds = now - (read or now)
            if len(self.messages) == prompt.messages:
                self._record(turn, prompt)

    def _take(self, turn: Turn, chunk: "Chunk") -> None:
        turn.text += chunk.text
        turn.generated_tokens += chunk.token_id is not None
        if chunk.token_id is not None and chunk.finish_reason != "eos":
            turn.token_ids.append(chunk.token_id)
        if chunk.stats is not None:
            turn.proposed_tokens, turn.accepted_tokens = chunk.stats.proposed_tokens, chunk.stats.accepted_tokens
        if chunk.finish_reason is not None:
            turn.finish_reason = chunk.finish_reason
        elif self.settings.stop_loops and is_loop(turn.token_ids):
            turn.finish_reason = LOOP

    def _record(self, turn: Turn, prompt: _Seen) -> None:
        """Make the answer part of the conversation, and remember its tokens where they are exactly its text."""
        self.messages.append(Message("assistant", turn.text, turn.finish_reason))
        self._seen = [seen for seen in self._seen if prompt.text.startswith(seen.text)]
        # A stop string leaves tokens without a text; where one was looked for, so may an answer that was broken off.
        exact = turn.finish_reason in ("eos", "length", "context")
        if exact or (turn.finish_reason != "stop" and not self._stops()):
            text, ids = prompt.text + turn.text, (*prompt.token_ids, *turn.token_ids)
            self._seen.append(_Seen(prompt.messages + 1, text, ids))

    def _stops(self) -> tuple[str, ...]:
        return (*self.settings.stop, *(() if self.raw else self.model.tokenizer.chat_stops))

    def _sampling(self, attempt: int) -> "Sampling":
        from billm_rt import Sampling

        settings = self.settings
        return Sampling(
            temperature=settings.temp,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
            repeat_last_n=settings.repeat_last_n,
            seed=None if settings.seed is None else settings.seed + attempt,
        )


def is_loop(token_ids: Sequence[int]) -> bool:
    """Return whether the tokens end in one short passage, repeated over and over."""
    for period in range(1, min(_LONGEST_LOOP, len(token_ids) - 1) + 1):
        length = max(_LOOP_TOKENS, _LOOP_TIMES * period)
        if token_ids[-1] == token_ids[-1 - period] and len(token_ids) >= length:
            tail = token_ids[-length:]
            if tail[period:] == tail[:-period]:
                return True
    return False


def encodable(text: str) -> str:
    """Return `text` with what is no Unicode text (undecodable bytes of a terminal or a file) replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
