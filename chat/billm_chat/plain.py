"""Text out as it is, safe for terminals; imports nothing, so that one-shot use starts fast."""

import re
import sys
import textwrap
from collections.abc import Callable

# Terminal control characters: a model may write any, and none may act.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return `text` without control characters other than line ends and tabs."""
    return _CONTROLS.sub("", text)


def wrap(text: str, width: int) -> str:
    """Return `text` with long lines cut between words; what stands right of a wide space stays a column there."""
    wrapped = []
    for line in text.split("\n"):
        column = re.match(r" *\S+(?: \S+)* {2,}", line)
        indent = len(column[0]) if column and len(column[0]) <= width // 2 else 0
        cut = textwrap.wrap(
            line, width, subsequent_indent=" " * indent, replace_whitespace=False, break_on_hyphens=False
        )
        wrapped += cut or [""]
    return "\n".join(wrapped)


def write_out(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class PlainView:
    """An answer as it is, for pipes, dumb terminals and `/set markdown off`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._in_line = False

    def write(self, piece: str) -> None:
        """Write the piece without control characters."""
        if piece := printable(piece):
            self._write(piece)
            self._in_line = not piece.endswith("\n")

    def finish(self) -> None:
        """End the last line, if it is open."""
        if self._in_line:
            self._write("\n")
