"""The terminal: notes and answers out, lines in. Knows no model and no conversation."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from billm_chat.markdown import STYLE, blocks, render, without_begun_markup
from billm_chat.plain import PlainView, printable, wrap, write_out

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# Answers are repainted at most this often, and drawing takes at most this share of the time.
_REPAINT_SECONDS = 0.05
_REPAINT_SHARE = 0.1


class AnswerView(Protocol):
    """Shows one answer as it comes."""

    def write(self, piece: str) -> None:
        """Show more of the answer."""

    def finish(self) -> None:
        """Show what is left and end the line."""


class LiveLines:
    """Lines at the end of the screen that can still change; the cursor stays behind the last one.

    Only what differs is written, in one go, so nothing flickers. What has left the screen is out of reach: its owner
    forgets those lines, and they stay in the scrollback as they are, once.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.lines: list[str] = []
        self._behind_line = False  # no live lines, and the cursor stands behind one that was left as it is
        self._behind_line = False  # there are no live lines, and the cursor stands behind one that was left

    def paint(self, lines: list[str], columns: int) -> None:
        """Make the live lines these; each must fit in `columns`."""
        old = self.lines
        same = next((i for i, (a, b) in enumerate(zip(old, lines, strict=False)) if a != b), min(len(old), len(lines)))
        if same == len(old) - 1 and len(lines) > same and lines[same].startswith(old[same]):
            new = lines[same][len(old[same]) :] + "".join("\n" + line for line in lines[same + 1 :])
        elif same == len(old):
            new = "".join("\n" + line for line in lines[same:])
            new = new if old or self._behind_line else new[1:]
        else:
            # A terminal that became narrower has wrapped the old lines: count the rows they take now.
            rows = sum(max(1, -(-cell_len(STYLE.sub("", line)) // columns)) for line in old[same:])
            up = f"\x1b[{rows - 1}A" if rows > 1 else ""
            new = f"\r{up}\x1b[J" + "\n".join(lines[same:])
            if same == len(lines) and lines:  # nothing takes the place of what went: back to the line above
                new = f"\r{up}\x1b[J\x1b[A" + lines[-1]
        if new:
            self._write(new)
        self.lines = list(lines)
        self._behind_line = self._behind_line and not lines

    def forget(self, count: int) -> None:
        """Leave the first `count` lines as they are."""
        del self.lines[:count]
        self._behind_line = not self.lines


class MarkdownView:
    """An answer as formatted Markdown that grows.

    Blocks that nothing can change any more are left behind; the last one is painted anew as it grows. Of a block
    taller than the screen, the lines that scroll out of it stay as they were first painted.
    """

    def __init__(self, console: Console, write: Callable[[str], object], size: Callable[[], tuple[int, int]]) -> None:
        self._console, self._size = console, size
        self._live = LiveLines(write)
        self._write = write
        self._text = ""  # of the last block, and of what came since the last repaint
        self._gone = 0  # lines of the last block that have scrolled out of reach
        self._next_paint = 0.0
        self._live.paint(["…"], 80)

    def write(self, piece: str) -> None:
        """Take the piece in, and repaint unless that was done just now."""
        self._text += printable(piece).replace("\t", "    ")
        begun = time.monotonic()
        if begun >= self._next_paint and self._text.strip():
            self._paint(without_begun_markup)
            took = time.monotonic() - begun
            self._next_paint = begun + took + max(_REPAINT_SECONDS, took / _REPAINT_SHARE)

    def finish(self) -> None:
        """Paint everything and go to the next line."""
        self._paint(lambda text: text)
        if self._live.lines != [""]:
            self._write("\n")

    def _paint(self, shown: Callable[[str], str]) -> None:
        columns, rows = self._size()
        width = max(columns - 1, 10)  # a full last column would leave the cursor in doubt
        # Markup that has only begun stays out of this too: behind a list, "3" looks like a paragraph that ends it.
        clear = shown(self._text)
        *settled, last = blocks(clear)
        done = [line for block in settled for line in (*render(block, self._console, width), "")]
        shift = 0 if settled else self._gone
        done, lines = done[self._gone :], render(last, self._console, width)[shift:]
        self._live.paint([*done, *lines] or [""], columns)
        self._live.forget(len(done))
        over = max(0, len(self._live.lines) - max(rows - 1, 1))
        self._live.forget(over)
        self._text, self._gone = last + self._text[len(clear) :], shift + over


class Interrupt:
    """Turns Ctrl-C into a request to stop: `requested` is looked at between two tokens.

    Until the first token (a long prompt may be read) and at the second Ctrl-C, KeyboardInterrupt is raised at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.patient = False  # set when the first token is there

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.patient:
            raise KeyboardInterrupt
        self.requested = True


class Terminal:
    """What the chat prints and reads."""

    def __init__(self, *, history: Path | None = None) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False)
        self._can_repaint = self.console.is_terminal and not self.console.is_dumb_terminal
        self._history = history
        self._prompt: PromptSession[str] | None = None

    def say(self, text: str, style: str = "") -> None:
        """Print lines of our own, wrapped between words."""
        if text:
            self.console.print(Text(wrap(printable(text), self.console.width), style=style))

    def note(self, text: str) -> None:
        """Print something by the way."""
        self.say(text, "dim")

    def warn(self, text: str) -> None:
        """Print something the user should know."""
        self.say(text, "yellow")

    def error(self, text: str) -> None:
        """Print what went wrong."""
        self.say(text, "red")

    def gap(self) -> None:
        """Print an empty line."""
        self.console.print()

    def answer_view(self, *, markdown: bool) -> AnswerView:
        """Return the view for one answer."""
        if markdown and self._can_repaint:
            return MarkdownView(self.console, write_out, lambda: self.console.size)
        return PlainView(write_out)

    def read(self, prefill: str = "") -> str:
        """Return the next message or command; EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        if self._prompt is None:
            from billm_chat.line_input import prompt_session

            self._prompt = prompt_session(self._history)
            return self._prompt.prompt(default=prefill, placeholder="a message, or /help")
        return self._prompt.prompt(default=prefill, placeholder="")

    def typed_text(self) -> str:
        """Return what stands in the input line (after Ctrl-C: what was thrown away)."""
        return self._prompt.default_buffer.text if self._prompt else ""


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep what is typed between two input lines off the screen, for the next one to receive; Ctrl-C stays a signal."""
    import termios

    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = [*before]
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def state_folder() -> Path:
    """Return where this platform keeps what programs remember of a user."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "billm"
    # The specification wants relative paths ignored.
    named = os.environ.get("XDG_STATE_HOME", "")
    return (Path(named) if named.startswith("/") else Path.home() / ".local" / "state") / "billm"
