"""Conversations as JSON files: written whole or not at all, and checked before use."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from billm_chat.session import Message
from billm_chat.settings import Settings
from billm_format.errors import UsageError

SCHEMA = "billm-chat-transcript"
VERSION = 1

_MAX_BYTES = 64 << 20  # a conversation is never larger; a wrong file may be


@dataclass(frozen=True)
class Transcript:
    """A saved conversation; `model` is the file name of the model that answered."""

    model: str
    system: str | None
    messages: tuple[Message, ...]


def save(
    path: Path, model: str, system: str | None, messages: Sequence[Message], settings: Settings, *, overwrite: bool
) -> None:
    """Write the conversation to `path` in one step; UsageError if the file exists and `overwrite` is not given."""
    document = {
        "schema": SCHEMA,
        "version": VERSION,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "system": system,
        "settings": settings.to_json(),
        "messages": [
            {"role": message.role, "content": message.content}
            | ({} if message.finish_reason is None else {"finish_reason": message.finish_reason})
            for message in messages
        ],
    }
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give a file name")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another name, or /save! {path} to overwrite it")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such folder")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream, ensure_ascii=False, indent=1)
            stream.write("\n")
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: Path) -> Transcript:
    """Return the conversation in the file at `path`; UsageError says what in it is not as `save` writes it."""
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MB: not a saved conversation")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UsageError(f"{path} is not JSON: not a saved conversation") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f'{path} is not a saved conversation: its "schema" is not "{SCHEMA}"')
    if document.get("version") != VERSION:
        raise UsageError(f"{path}: wanted version {VERSION}, found {document.get('version')!r:.40}")
    system = document.get("system")
    if system is not None:
        system = _text(system, f"{path}: system")
    listed = document.get("messages")
    if not isinstance(listed, list):
        raise UsageError(f"{path}: messages: wanted a list, found {type(listed).__name__}")
    messages = tuple(_message(entry, number, path) for number, entry in enumerate(listed, start=1))
    return Transcript(str(document.get("model")), system, messages)


def _message(entry: Any, number: int, path: Path) -> Message:
    where = f"{path}: message {number}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: wanted an object, found {type(entry).__name__}")
    role = ("assistant", "user")[number % 2]
    if entry.get("role") != role:
        raise UsageError(f"{where}: wanted the role {role!r}, found {entry.get('role')!r:.40}")
    reason = entry.get("finish_reason")
    return Message(
        role,
        _text(entry.get("content"), f"{where}, content"),
        None if reason is None else _text(reason, f"{where}, finish_reason"),
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: wanted text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: holds half of a surrogate pair, which is no text") from None
    return value
