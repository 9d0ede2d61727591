"""A terminal's screen, as much of one as the chat needs: an oracle for what a reader sees, scrollback included."""

import re

from rich.cells import cell_len

_SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(\r\n|[\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Rows of text; the last `height` of them are the screen, those above cannot be reached any more."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [""]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        """Take in text and the control sequences that the chat uses; anything else fails the test."""
        place = 0
        for found in _SEQUENCE.finditer(text):
            assert found.start() == place, f"not understood: {text[place : place + 20]!r}"
            place = found.end()
            parameters, letter, line_end, characters = found.groups()
            if characters:
                self._print(characters)
            elif line_end == "\r":
                self.column = 0
            elif line_end:  # the terminal driver makes \r\n of \n
                self._down()
            elif letter == "A":
                self.row = max(self.row - int(parameters or 1), len(self.rows) - self.height, 0)
            elif letter == "J":
                assert parameters in ("", "0")
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            else:
                assert letter == "m", f"not understood: {found[0]!r}"
        assert place == len(text), f"not understood: {text[place : place + 20]!r}"

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append("")

    def _print(self, characters: str) -> None:
        for character in characters:
            if cell_len(self.rows[self.row][: self.column] + character) > self.width:
                self._down()
            row = self.rows[self.row]
            self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
            self.column += 1

    def text(self) -> str:
        """Return all that was ever shown, without space at line ends and at the end."""
        return "\n".join(row.rstrip() for row in self.rows).rstrip()
