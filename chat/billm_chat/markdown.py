"""Markdown as terminal lines, in pieces that can be settled while an answer is still being written."""

import re
from functools import cache
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.syntax import Syntax

# Markup that has only begun to arrive ("**", "```", "1."): shown, it would flash as text, or as a heading.
_ONLY_MARKUP = re.compile(r"\n[ \t]*(?:[-=*_+#>|`~]+|\d{1,9}[.)]?)?[ \t]*$")

STYLE = re.compile(r"\x1b\[[0-9;]*m")

_PADDING = re.compile(r"(?: |\x1b\[[0-9;]*m)+$")


def blocks(text: str) -> list[str]:
    """Split growing Markdown into its top-level blocks; only the last one can be changed by text still to come."""
    starts = [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map]
    lines = text.split("\n")
    ends = [*starts[1:], len(lines)]
    return ["\n".join(lines[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=False)]


def without_begun_markup(text: str) -> str:
    """Return growing text without a last line that holds markup alone, whose meaning is still open."""
    return _ONLY_MARKUP.sub("", "\n" + text)[1:]


def render(text: str, console: Console, width: int) -> list[str]:
    """Return Markdown as lines of at most `width` cells, styled for `console`, no blank ones at either end."""
    with console.capture() as captured:
        console.print(_Answer(text), width=width)
    lines = [_PADDING.sub(lambda found: "".join(STYLE.findall(found[0])), line) for line in captured.get().split("\n")]
    filled = [number for number, line in enumerate(lines) if STYLE.sub("", line).strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


@cache
def _parser() -> MarkdownIt:
    # HTML and link definitions are text here: a terminal's renderer drops them, and answers must not lose words.
    return MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline", "reference"])


class _LeftHeading(Heading):
    """A heading at the left, not centred in a box."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _PlainCode(CodeBlock):
    """Code in the terminal's own colours, without a frame that would be copied along."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, padding=(0, 2)
        )


class _Answer(Markdown):
    """rich's Markdown with links spelt out, line ends kept, and the two elements above."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "code_block": _PlainCode,
        "fence": _PlainCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _parser().parse(text)
        for token in self.parsed:
            for child in token.children or ():
                # Small models mean the line ends they write (verses, addresses, steps).
                if child.type == "softbreak":
                    child.type = "hardbreak"
