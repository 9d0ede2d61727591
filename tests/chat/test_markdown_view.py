"""Streamed Markdown on a simulated screen: whatever the pieces, the reader ends with the whole answer, once."""

import random
import re
from collections.abc import Callable

import pytest
from chat.screen import Screen
from rich.console import Console

from billm_chat import terminal
from billm_chat.markdown import blocks, render
from billm_chat.plain import PlainView, printable, wrap
from billm_chat.terminal import LiveLines, MarkdownView

ANSWER = """\
An **answer** with `code`, and a first item that is long enough to be wrapped on every terminal of any width:

1. First *point*, which goes on and on until it must be wrapped somewhere in the middle of the line
2. Second point
   - nested one
   - nested two

## A heading

Setext heading
--------------

```python
def double(n: int) -> int:
    return 2 * n
```

| river | length |
|-------|-------:|
| Elbe  | 1094 |
| Rhine | 1233 |

Use the <b> tag, see [docs](https://example.org/a/b). [1]: https://example.org/1
Roses are red,
Violets are blue.

> a quoted text

---

Done — 日本語のテキスト.
"""

TALL = (
    "Code:\n\n```text\n" + "".join(f"line {i}\n" for i in range(40)) + "```\n\n"
    "A list:\n\n" + "".join(f"- item {i} with **bold** words\n" for i in range(40)) + "\nThe end.\n"
)

BLOCKS = [
    "A paragraph of *some* words that may have to be wrapped.",
    "# Heading",
    "- one\n- two\n  continued",
    "3. three\n4. four",
    "```c\nint x;\n\nint y;\n```",
    "> quote\n> more",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "    indented code",
    "***",
    "Half *open and `code",
    "<div>\nhtml\n</div>",
    "[1]: https://example.org",
    "Ünï 👍 çödé 漢字",
]


@pytest.fixture(autouse=True)
def paint_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repaint at every piece: the clock must not decide what is tested."""
    monkeypatch.setattr(terminal, "_REPAINT_SECONDS", 0.0)
    monkeypatch.setattr(terminal, "_REPAINT_SHARE", float("inf"))


def console(width: int) -> Console:
    return Console(force_terminal=True, color_system="truecolor", width=width, height=24, legacy_windows=False)


def show(text: str, width: int, height: int, pieces: list[str]) -> str:
    screen = Screen(width, height)
    view = MarkdownView(console(width), screen.write, lambda: (width, height))
    for piece in pieces:
        view.write(piece)
    view.finish()
    assert screen.column == 0, "the cursor is at the start of a line"
    return screen.text()


def static(text: str, width: int) -> str:
    """The answer rendered at once, block by block."""
    parts = [render(block, console(width), width - 1) for block in blocks(text)]
    lines = [line for part in parts if part for line in [*part, ""]]
    return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines).rstrip()


def cut(text: str, source: random.Random, longest: int) -> list[str]:
    pieces = []
    while text:
        size = source.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize(("width", "longest"), [(40, 3), (60, 7), (100, 40), (60, 10_000)])
def test_streamed_equals_rendered_at_once(seed: int, width: int, longest: int) -> None:
    pieces = cut(ANSWER, random.Random(seed), longest)
    assert show(ANSWER, width, 50, pieces) == static(ANSWER, width)


def test_random_documents_in_random_pieces(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(15):
        text = "\n\n".join(source.choices(BLOCKS, k=source.randint(1, 6))) + source.choice(["", "\n"])
        width = source.randint(30, 90)
        got = show(text, width, 60, cut(text, source, 9))
        assert got == static(text, width), repr(text)


@pytest.mark.parametrize("height", [5, 24])
def test_answer_taller_than_the_screen_is_in_the_scrollback_once(seed: int, height: int) -> None:
    text = show(TALL, 60, height, cut(TALL, random.Random(seed), 40))
    for i in range(40):
        assert len(re.findall(rf"\bline {i}$", text, re.MULTILINE)) == 1
        assert len(re.findall(rf"• item {i} with bold words$", text, re.MULTILINE)) == 1
    assert text.endswith("The end.") and "**" not in text


def test_unclosed_fence_is_code_and_ends_with_the_answer() -> None:
    text = "So:\n\n```c\nint *a = *b;\nreturn **a;"
    assert show(text, 40, 24, list(text)) == "So:\n\n  int *a = *b;\n  return **a;"


def test_no_word_is_lost() -> None:
    text = "<p>html</p>\n\n<!-- note -->\n\n[1]: https://example.org 'title'"
    assert show(text, 60, 24, list(text)).split() == text.split()


def test_nothing_said_leaves_no_trace() -> None:
    assert show("", 40, 24, []) == show("  \n", 40, 24, [" ", " \n"]) == ""


def test_repaint_writes_only_what_changed() -> None:
    written: list[str] = []
    live = LiveLines(written.append)
    live.paint(["one", "two", "thr"], 80)
    live.paint(["one", "two", "three", "four"], 80)
    live.paint(["one", "2", "three", "four"], 80)
    live.paint(["one", "2", "three", "four"], 80)
    assert written == ["one\ntwo\nthr", "ee\nfour", "\r\x1b[2A\x1b[J2\nthree\nfour"]


def test_narrowed_terminal_is_repainted_over_the_wrapped_lines() -> None:
    screen = Screen(20, 24)
    live = LiveLines(screen.write)
    live.paint(["x" * 35, "y"], 20)  # painted when the terminal was wider; these rows are what it made of it
    live.paint(["z" * 19, "zzz"], 20)
    assert screen.text() == "z" * 19 + "\nzzz"


CONTROLS = "a\x1b[2Jb\x07c\x08d\re\x9bf\x7fg\tindent\nend"


@pytest.mark.parametrize("make", [lambda write: PlainView(write), None])
def test_control_characters_of_the_model_do_nothing(
    make: Callable[[Callable[[str], object]], PlainView] | None,
) -> None:
    written: list[str] = []
    if make is None:
        plain_console = Console(force_terminal=True, no_color=True, width=80, height=24)
        view: PlainView | MarkdownView = MarkdownView(plain_console, written.append, lambda: (80, 24))
    else:
        view = make(written.append)
    for character in CONTROLS:
        view.write(character)
    view.finish()
    text = "".join(written)
    assert "\x1b[2J" not in text and not set(text) & set("\x07\x08\x9b\x7f")
    assert printable(CONTROLS) == "a[2Jbcdefg\tindent\nend"


def test_wrapped_columns_stay_columns() -> None:
    text = "/save FILE      save the conversation, whole\n\na line of many words without columns\nab  c"
    assert wrap(text, 32).split("\n") == [
        "/save FILE      save the",
        "                conversation,",
        "                whole",
        "",
        "a line of many words without",
        "columns",
        "ab  c",
    ]
