"""Text from a model, token by token: prompt reuse, stop strings, and a cache that an interrupt leaves consistent."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from billm_format.errors import DoesNotFitError, UsageError
from billm_rt.cache import KVCache
from billm_rt.lookup import PromptLookup
from billm_rt.sampling import Logits, Sampler, Sampling

if TYPE_CHECKING:
    from billm_rt.model import Model

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationStats:
    """What one answer cost."""

    prompt_tokens: int  # tokens of the whole prompt
    reused_tokens: int  # those of them that the cache already held
    prompt_seconds: float  # reading the others
    generated_tokens: int
    generation_seconds: float  # from the first token to the last
    proposed_tokens: int = 0  # guessed, and read along with another token
    accepted_tokens: int = 0  # those of them that came, each a reading less


@dataclass(frozen=True)
class Chunk:
    """One token's worth of a stream. `text` may be empty: half a character, or what may become a stop string."""

    text: str
    token_id: int | None  # None: no token was made (max_tokens 0)
    finish_reason: FinishReason | None = None  # set on the last chunk only, as is `stats`
    stats: GenerationStats | None = None


def generate(
    model: "Model",
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling,
    stop: Sequence[str] = (),
    cache: KVCache | None = None,
    lookup: int = 0,
) -> Iterator[Chunk]:
    """Check the arguments now and return the stream of chunks that continues `prompt`.

    A `str` is encoded as plain text, with the beginning-of-text token where the model wants one. With a `cache`, the
    longest prefix it shares with the prompt is not read again and the rest of it is forgotten; at every moment
    `cache.tokens` is what the cache holds, so a stream may be dropped or interrupted anywhere and the cache used on.
    The end-of-text token and a stop string (first match ends the answer) are not part of the text.

    With `lookup`, up to so many tokens are guessed from the text so far and read together with the last one: quicker
    where the answer repeats what was said, slower where it does not. Every token is still drawn from the model's own
    logits with the same random numbers, and with the native kernels logits do not depend, not by a bit, on how many
    tokens are read together: the answer is exactly the same. (In NumPy they do, in the last digits: there the answer
    may part where two tokens tie.) The cache may end with guesses that failed.
    Raises UsageError on bad arguments, DoesNotFitError on a prompt that exceeds the context length.
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise UsageError("the prompt is empty: give at least one word")
    if max_tokens < 0:
        raise UsageError(f"--max-tokens {max_tokens}: wanted 0 or more")
    if lookup < 0:
        raise UsageError(f"--lookup {lookup}: wanted 0 (off) or more")
    if "" in stop:
        raise UsageError("an empty stop string would stop at once: leave it out")
    cache = model.new_cache() if cache is None else cache
    if len(ids) > cache.ctx:
        raise DoesNotFitError(
            f"the prompt has {len(ids)} tokens, the context length is {cache.ctx} "
            f"(the model knows up to {model.config.max_position_embeddings}): shorten the prompt or raise --ctx"
        )
    reader = _Reader(model, cache, lookup, longest=len(ids) + max_tokens - 1)
    return _stream(model, ids, max_tokens, Sampler(sampling), tuple(stop), reader)


def _stream(
    model: "Model", ids: list[int], max_tokens: int, sampler: Sampler, stop: tuple[str, ...], reader: "_Reader"
) -> Iterator[Chunk]:
    begun = time.perf_counter()
    logits, reused = reader.read_prompt(ids)
    prompt_read = time.perf_counter()

    text, held = model.tokenizer.stream(), HeldBack(stop)
    history, eos = list(ids), set(model.tokenizer.eos_token_ids)

    def stats() -> GenerationStats:
        spent = time.perf_counter() - prompt_read
        said = len(history) - len(ids)
        return GenerationStats(len(ids), reused, prompt_read - begun, said, spent, reader.proposed, reader.accepted)

    if max_tokens == 0:
        yield Chunk("", None, "length", stats())
        return
    while True:
        token = sampler.sample(logits, history)
        history.append(token)
        reason: FinishReason | None = None
        if token in eos:
            piece, reason = text.flush(), "eos"
        else:
            piece = text.step(token)
            if len(history) - len(ids) == max_tokens:
                reason = "length"
            elif len(history) > reader.ctx:
                reason = "context"
            piece += text.flush() if reason else ""
        piece, stopped = held.add(piece)
        if stopped:
            reason = "stop"
        elif reason:
            piece += held.flush()
        if reason:
            yield Chunk(piece, token, reason, stats())
            return
        yield Chunk(piece, token)
        logits = reader.next_logits(history)


class _Reader:
    """Reads the text into the cache, one token after the other or, with `lookup`, guessed ones along with it."""

    def __init__(self, model: "Model", cache: KVCache, lookup: int, longest: int) -> None:
        """`longest`: how many tokens of the text can be worth reading."""
        self.ctx = cache.ctx
        self.proposed = self.accepted = 0
        self._model, self._cache, self._most_guesses = model, cache, lookup
        self._longest = min(longest, cache.ctx)
        self._lookup = PromptLookup()
        self._ahead: deque[tuple[int, Logits]] = deque()  # each guess in the cache, and the logits behind it

    def read_prompt(self, ids: list[int]) -> tuple[Logits, int]:
        """Read what the cache does not hold of the prompt; return the logits [vocab_size] and how much it held."""
        # The last prompt token is always read, for its logits.
        reused = min(_common_prefix(self._cache.tokens, ids), len(ids) - 1)
        self._cache.truncate(reused)
        return self._model.rows(ids[reused:], self._cache)[0], reused

    def next_logits(self, text: list[int]) -> Logits:
        """Return the logits [vocab_size] behind `text`, of which all but the last token was there at the last call."""
        if self._ahead:
            guess, row = self._ahead.popleft()
            if guess == text[-1]:
                self.accepted += 1
                return row
            self._ahead.clear()
            self._cache.truncate(len(text) - 1)
        limit = min(self._most_guesses, self._longest - len(text))
        guesses = self._lookup.propose(text, limit) if limit > 0 else []
        self.proposed += len(guesses)
        first, *rest = self._model.rows([text[-1], *guesses], self._cache, logits="all")
        self._ahead.extend(zip(guesses, rest, strict=True))
        return first


class HeldBack:
    """Passes text on, but keeps back an end that may yet become one of the stop strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text that is safe to show, whether a stop string was found; if so, the text ends before it)."""
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return what was kept back: nothing more is coming."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
