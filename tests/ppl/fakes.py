"""A language model of a few lines for the tests of the protocol: its logits depend on every token of the context."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FakeCache:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def nbytes(self) -> int:
        return 8 * len(self.tokens)

    def truncate(self, length: int) -> None:
        del self.tokens[length:]


class FakeModel:
    """Logits after a context: a table's row of the last token plus one that a sum over the whole context picks."""

    def __init__(self, rng: np.random.Generator, vocab_size: int) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.last = rng.normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)
        self.whole = rng.normal(0, 2, (97, vocab_size)).astype(np.float32)
        self.largest_chunk = 0

    def context_logits(self, context: list[int]) -> NDArray[np.float32]:
        mixed = sum((position + 1) * token for position, token in enumerate(context))
        return self.last[context[-1]] + self.whole[mixed % 97]

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def forward(self, token_ids: Any, cache: Any, logits: str) -> Any:
        rows = []
        for token in token_ids:
            cache.tokens.append(int(token))
            if logits == "all":
                rows.append(self.context_logits(cache.tokens))
        self.largest_chunk = max(self.largest_chunk, len(rows))
        return np.stack(rows) if logits == "all" else None
