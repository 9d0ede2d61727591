"""Text from a model, token by token: prompt reuse, stop strings, and a cache that an interrupt leaves consistent."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    if lookup < 0:
        raise UsageError(f"--lookup {lookup}: wanted 0 (off) or more")
    cache = model.new_cache() if cache is None else cache
    ids = _checked(model, prompt, max_tokens, stop, cache)
    reader = _Reader(model, cache, lookup, longest=len(ids) + max_tokens - 1)
    answer = _Answer(model, ids, max_tokens, Sampler(sampling), stop, cache.ctx)
    return _stream(answer, reader)


def generate_batch(
    model: "Model",
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, Chunk]]:
    """Check the arguments now and return the stream of (number of the prompt, chunk) that continues all `prompts`.

    Prompts are read one after the other; from then on a token of every unfinished text is read at a time, which reads
    the weights once for all of them. Each continuation is what `generate` gives for its prompt alone, with `seed` +
    number of the prompt where there is a seed (in NumPy and on a GPU up to rounding, as with `lookup`).
    Raises as `generate` does, and DoesNotFitError where a GPU has no room for all the caches.
    """
    caches = [model.new_cache() for _ in prompts]
    texts = [_checked(model, prompt, max_tokens, stop, cache) for prompt, cache in zip(prompts, caches, strict=True)]
    wanted = [min(len(ids) + max_tokens, cache.ctx) for ids, cache in zip(texts, caches, strict=True)]
    model.require_room(caches, wanted)
    answers = []
    for number, (ids, cache) in enumerate(zip(texts, caches, strict=True)):
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
        answers.append(_Answer(model, ids, max_tokens, Sampler(own), stop, cache.ctx))
    return _stream_batch(model, answers, caches)


def _checked(
    model: "Model", prompt: str | Sequence[int], max_tokens: int, stop: Sequence[str], cache: KVCache
) -> list[int]:
    """Return the prompt's tokens."""
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise UsageError("the prompt is empty: give at least one word")
    if max_tokens < 0:
        raise UsageError(f"--max-tokens {max_tokens}: wanted 0 or more")
    if "" in stop:
        raise UsageError("an empty stop string would stop at once: leave it out")
    if len(ids) > cache.ctx:
        raise DoesNotFitError(
            f"the prompt has {len(ids)} tokens, the context length is {cache.ctx} "
            f"(the model knows up to {model.config.max_position_embeddings}): shorten the prompt or raise --ctx"
        )
    return ids


def _stream(answer: "_Answer", reader: "_Reader") -> Iterator[Chunk]:
    begun = time.perf_counter()
    logits, reused = reader.read_prompt(answer.text)
    answer.prompt_is_read(reused, time.perf_counter() - begun)
    if answer.max_tokens == 0:
        yield answer.nothing()
        return
    while True:
        chunk = answer.add(logits, reader.proposed, reader.accepted)
        yield chunk
        if chunk.finish_reason is not None:
            return
        logits = reader.next_logits(answer.text)


def _stream_batch(model: "Model", answers: list["_Answer"], caches: list[KVCache]) -> Iterator[tuple[int, Chunk]]:
    unfinished = []
    for number, answer in enumerate(answers):
        begun = time.perf_counter()
        logits = model.rows(answer.text, caches[number])[0]
        answer.prompt_is_read(0, time.perf_counter() - begun)
        # Before the next prompt is read: then these logits are gone.
        chunk = answer.nothing() if answer.max_tokens == 0 else answer.add(logits)
        yield number, chunk
        if chunk.finish_reason is None:
            unfinished.append(number)
    batch = None  # of the unfinished ones
    while unfinished:
        last = [answers[number].text[-1] for number in unfinished]
        if len(unfinished) == 1:
            rows = model.rows(last, caches[unfinished[0]])
        else:
            batch = batch or model.gather([caches[number] for number in unfinished])
            rows = model.rows_each(last, batch)
        chunks = [(number, answers[number].add(row)) for number, row in zip(unfinished, rows, strict=True)]
        finished = {number for number, chunk in chunks if chunk.finish_reason is not None}
        if finished:
            unfinished, batch = [number for number in unfinished if number not in finished], None
        yield from chunks


class _Answer:
    """One text that grows: draws its tokens, turns them into letters, and says when it ends."""

    def __init__(
        self, model: "Model", prompt: list[int], max_tokens: int, sampler: Sampler, stop: Sequence[str], ctx: int
    ) -> None:
        self.text, self.max_tokens = list(prompt), max_tokens
        self._prompt_tokens, self._ctx, self._sampler = len(prompt), ctx, sampler
        self._letters, self._held = model.tokenizer.stream(), HeldBack(stop)
        self._eos = set(model.tokenizer.eos_token_ids)
        self._reused, self._prompt_seconds, self._began = 0, 0.0, 0.0

    def prompt_is_read(self, reused: int, seconds: float) -> None:
        """Note what the prompt took: from now on time goes to the answer."""
        self._reused, self._prompt_seconds, self._began = reused, seconds, time.perf_counter()

    def nothing(self) -> Chunk:
        """Return the only chunk of an answer without tokens."""
        return Chunk("", None, "length", self._stats(0, 0))

    def add(self, logits: Logits, proposed: int = 0, accepted: int = 0) -> Chunk:
        """Draw the next token; the numbers of guesses so far are for the stats of the last one."""
        token = self._sampler.sample(logits, self.text)
        self.text.append(token)
        reason: FinishReason | None = None
        if token in self._eos:
            piece, reason = self._letters.flush(), "eos"
        else:
            piece = self._letters.step(token)
            if len(self.text) - self._prompt_tokens == self.max_tokens:
                reason = "length"
            elif len(self.text) > self._ctx:
                reason = "context"
            piece += self._letters.flush() if reason else ""
        piece, stopped = self._held.add(piece)
        if stopped:
            reason = "stop"
        elif reason:
            piece += self._held.flush()
        return Chunk(piece, token, reason, self._stats(proposed, accepted) if reason else None)

    def _stats(self, proposed: int, accepted: int) -> GenerationStats:
        spent, said = time.perf_counter() - self._began, len(self.text) - self._prompt_tokens
        return GenerationStats(self._prompt_tokens, self._reused, self._prompt_seconds, said, spent, proposed, accepted)


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
