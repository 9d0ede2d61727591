"""The input line: history, completion, several lines. The only module that imports prompt_toolkit."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from billm_chat import commands

PROMPT = ">>> "
_CONTINUED = "... "


class CommandCompleter(Completer):
    """Completes commands, their fixed words, and file names where a command wants one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what the text before the cursor may become."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        word, space, argument = text[1:].partition(" ")
        if not space:
            yield from _words(word, sorted(commands.NAMES), "/")
            return
        command = commands.NAMES.get(word.lower())
        if command is None:
            return
        argument = argument.lstrip()
        if command.argument == "file":
            yield from self._paths.get_completions(Document(argument, len(argument)), complete_event)
        elif command.choices and " " not in argument:
            yield from _words(argument, command.choices)


def _words(begun: str, words: Iterable[str], prefix: str = "") -> Iterator[Completion]:
    for word in words:
        if word.startswith(begun.lower()):
            yield Completion(word, start_position=-len(begun), display=prefix + word)


def prompt_session(history: Path | None) -> PromptSession[str]:
    """Return the session that reads lines; `history`: the file that keeps them, None: until the end only."""
    return PromptSession(
        FormattedText([("class:prompt", PROMPT)]),
        prompt_continuation=lambda width, line, wrapped: "" if wrapped else FormattedText([("class:more", _CONTINUED)]),
        style=Style.from_dict({"prompt": "bold ansicyan", "more": "ansibrightblack"}),
        history=_history(history),
        completer=CommandCompleter(),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        enable_suspend=True,
        enable_open_in_editor=False,
        reserve_space_for_menu=4,
    )


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Conversations are private: the file must not be readable by others even for a moment.
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()  # a read-only home is no reason not to chat
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @Condition
    def whole() -> bool:
        return not commands.is_unfinished(get_app().current_buffer.text)

    @keys.add("enter", filter=whole & ~has_completions)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("enter", filter=has_completions)
    def _take_completion(event: KeyPressEvent) -> None:
        event.current_buffer.complete_state = None

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
