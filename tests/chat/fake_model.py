"""A model that answers what the test scripts, with one token a character: the runtime's interface, none of its work."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from billm_rt import Chunk, GenerationStats, Sampling

EOS = 0
_END = "\x03"  # the text of the end token, a special one: no message can hold it


class FakeTokenizer:
    """Token = code point; EOS is a special token named "<end>"."""

    has_chat_template = True
    chat_stops: tuple[str, ...] = ()
    eos_token_ids = (EOS,)

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        if special:
            text = text.replace("<end>", _END)
        return [EOS if character == _END else ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token != EOS)

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        text = "".join(f"[{message['role'][0]}]{message['content']}<end>" for message in messages)
        return text + ("[a]" if add_generation_prompt else "")

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [*self.encode(f"[{message['role'][0]}]{message['content']}"), EOS]
        return ids + (self.encode("[a]") if add_generation_prompt else [])


class FakeCache:
    """What the model has read."""

    def __init__(self) -> None:
        self.tokens: list[int] = []


class FakeModel:
    """Answers with `script(question number)`; the prompts it was given and the tokens it had to read are recorded."""

    def __init__(self, script: Callable[[int], str | Exception], ctx: int = 1000) -> None:
        self.script = script
        self.ctx = ctx
        self.tokenizer = FakeTokenizer()
        self.isa, self.device, self.load_seconds = "avx2", "cpu", 0.01
        self.prompts: list[str] = []
        self.read: list[int] = []
        self.samplings: list[Sampling] = []
        self.lookups: list[int] = []
        self.file: Any = SimpleNamespace(
            path=Path("fake.billm"),
            nbytes=52_300_000,
            bits=lambda: (1.08, 2.33),
            conversion={"recipe": "paper"},
            quantization=SimpleNamespace(block_size=128),
        )
        shapes = {"q_proj": (64, 64, False)}
        self.config: Any = SimpleNamespace(
            family="llama",
            vocab_size=1000,
            embedding_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=2000,
            linears=lambda: shapes,
        )

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def memory(self) -> dict[str, int]:
        return {"weights.sign": 30_000_000, "kv_cache": 4_000_000, "rss": 90_000_000, "peak_rss": 95_000_000}

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        cache: FakeCache | None = None,
        lookup: int = 0,
    ) -> Iterator[Chunk]:
        self.lookups.append(lookup)
        assert len(prompt) < self.ctx
        cache = cache or FakeCache()
        answer = self.script(len(self.prompts))
        self.prompts.append("".join("<end>" if token == EOS else chr(token) for token in prompt))
        self.samplings.append(sampling)
        return self._stream(list(prompt), answer, max_tokens, stop, cache)

    def _stream(
        self, prompt: list[int], answer: str | Exception, max_tokens: int, stop: Sequence[str], cache: FakeCache
    ) -> Iterator[Chunk]:
        shared = 0
        while shared < min(len(prompt) - 1, len(cache.tokens)) and prompt[shared] == cache.tokens[shared]:
            shared += 1
        self.read.append(len(prompt) - shared)
        if isinstance(answer, Exception):
            raise answer
        cache.tokens[:] = prompt
        for count, character in enumerate([*answer, None], start=1):
            stats = GenerationStats(len(prompt), shared, 0.1, count, 0.2, 8, 6)
            if character is None:
                yield Chunk("", EOS, "eos", stats)
            elif any(answer[:count].endswith(text) for text in stop):
                yield Chunk("", ord(character), "stop", stats)
                return
            elif count == max_tokens or len(cache.tokens) == self.ctx:
                yield Chunk(character, ord(character), "length" if count == max_tokens else "context", stats)
                return
            else:
                yield Chunk(character, ord(character))
                cache.tokens.append(ord(character))
