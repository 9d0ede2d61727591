"""Guessing what comes next from the text so far: answers that repeat a prompt are read several tokens at a time."""

from collections.abc import Sequence

# The last n tokens are searched for in the text, the longest first: the longer the match, the better the guess.
_LONGEST_MATCH = 3


class PromptLookup:
    """Finds where the end of a growing text stood before, by an index of all its runs of 1 to 3 tokens."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens -> the place behind its last occurrence

    def propose(self, text: Sequence[int], limit: int) -> list[int]:
        """Return up to `limit` tokens that may follow `text`, which must go on from the text of the call before.

        They are those that followed the latest place where its last three tokens stood, else its last two, else its
        last one, over and over if there are fewer than `limit`; empty if even that token is new.
        """
        self._extend(text)
        for length in range(min(_LONGEST_MATCH, len(text)), 0, -1):
            place = self._after.get(tuple(self._text[-length:]))
            if place is not None:
                followed = self._text[place : place + limit]
                return [followed[i % len(followed)] for i in range(limit)]
        return []

    def _extend(self, text: Sequence[int]) -> None:
        # The runs that end at the last token stay out: they would find themselves, with nothing behind them.
        for end in range(max(len(self._text), 1), len(text)):
            for length in range(1, min(_LONGEST_MATCH, end) + 1):
                self._after[tuple(text[end - length : end])] = end
        self._text.extend(text[len(self._text) :])
