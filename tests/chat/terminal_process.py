"""billm-chat in a real pseudo-terminal: type, read what it shows, see how it ends."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

_SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[=>78])")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that runs from the source tree, with its own home."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "format", "chat"))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    # No terminal stands behind the pair to answer questions about the cursor.
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | more


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of billm-chat with these arguments."""
    return [sys.executable, "-m", "billm_chat.cli", *map(str, arguments)]


class TerminalProcess:
    """A running chat; a context manager that leaves no process behind."""

    def __init__(self, *arguments: str | Path, home: Path, **environ: str) -> None:
        self._terminal, inner = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment(HOME=str(home), XDG_STATE_HOME=str(home / "state"), **environ),
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(inner)
        self.raw = ""

    @property
    def shown(self) -> str:
        """All that was printed so far, without control sequences."""
        return _SEQUENCES.sub("", self.raw)

    def type(self, keys: str) -> None:
        """Send keys as a keyboard would (Ctrl-C is "\\x03")."""
        os.write(self._terminal, keys.encode())

    def wait_for(self, text: str, *, after: int = 0, seconds: float = 30) -> int:
        """Read until `text` is shown behind position `after`; return the position behind it."""
        end = time.monotonic() + seconds
        while True:
            place = self.shown.find(text, after)
            if place >= 0:
                return place + len(text)
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} did not come; shown: {self.shown[after:]!r}")

    def wait_for_more(self, count: int, *, after: int, seconds: float = 30) -> None:
        """Read until `count` characters are shown behind position `after`."""
        end = time.monotonic() + seconds
        while len(self.shown) < after + count:
            assert self._read(end - time.monotonic()), f"no more came than {self.shown[after:]!r}"

    def wait_for_exit(self, seconds: float = 30) -> int:
        """Read to the end and return the exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, end - time.monotonic()))

    def terminal_state(self) -> list[object]:
        """Return the terminal's modes, as the shell would find them."""
        import termios

        return termios.tcgetattr(self._terminal)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._terminal], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> "TerminalProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def _take_terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that its Ctrl-C becomes a signal, whatever was inherited."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
