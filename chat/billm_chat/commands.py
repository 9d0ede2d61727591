"""The slash commands: what a typed line means, and what each command does to the session. Nothing here prints."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from billm_chat import report, transcript
from billm_chat.session import Session, encodable
from billm_chat.settings import OPTIONS, changed, setting_name, shown, shown_value
from billm_format.errors import UsageError


class Then(Enum):
    """What the loop does after a command."""

    ASK_ON = auto()  # read the next line
    ANSWER_AGAIN = auto()
    LEAVE = auto()


@dataclass(frozen=True)
class Reply:
    """What a command hands back: text to show, what comes next, and text to put in the input line."""

    text: str = ""
    then: Then = Then.ASK_ON
    prefill: str = ""


@dataclass(frozen=True)
class Command:
    """One command; `argument` is "", "word" (from `choices`), "text" or "file", for help and completion."""

    name: str
    usage: str
    help: str
    run: Callable[[Session, str], Reply]
    aliases: tuple[str, ...] = ()
    argument: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """A line that is a command."""

    command: Command
    argument: str


def parse(line: str) -> Call | str:
    """Return the command that the line calls, or the message that it is.

    A command is a slash and one word; a line that begins with two slashes is a message that begins with one, and a
    path ("/usr/bin is ...") is a message. UsageError on an unknown command names the nearest one.
    """
    line = line.strip()
    if line.startswith("//"):
        return line[1:]
    found = re.match(r"/([^\s/]*)(?:\s+(.*))?$", line, re.DOTALL)
    if not found:
        return message(line)
    word, argument = found[1].lower(), (found[2] or "").strip()
    if word not in NAMES:
        near = difflib.get_close_matches(word, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise UsageError(f"there is no command /{found[1]}: {hint} (a message may begin with // for a slash)")
    command = NAMES[word]
    if argument and not command.argument:
        raise UsageError(f"/{word} takes nothing behind it, found {argument!r:.40}")
    return Call(command, argument)


def message(text: str) -> str:
    '''Return a message as it is sent: without the """ around it, and without backslashes in front of line ends.'''
    text = text.strip()
    if text.startswith('"""'):
        return text[3:].removesuffix('"""').strip("\n")
    return text.replace("\\\n", "\n")


def is_unfinished(text: str) -> bool:
    '''Return whether Enter means a new line of this message: an open """ block, or a backslash at the end.'''
    text = text.lstrip()
    if text.startswith('"""'):
        return '"""' not in text[3:]
    return text.endswith("\\")


# --- what the commands do


def _help(session: Session, topic: str) -> Reply:
    if topic:
        command = NAMES.get(topic.removeprefix("/").lower())
        if command is None:
            raise UsageError(f"there is no command {topic!r}; /help lists them")
        also = f"  (also {', '.join('/' + alias for alias in command.aliases)})" if command.aliases else ""
        return Reply(f"{command.usage}  {command.help}{also}")
    lines = [f"{command.usage:<26} {command.help}" for command in COMMANDS]
    return Reply("\n".join([*lines, "", *KEYS]))


def _reset(session: Session, argument: str) -> Reply:
    session.replace_messages([])
    kept = "; the system prompt stays" if session.system else ""
    return Reply(f"The conversation is forgotten{kept}.")


def _system(session: Session, text: str) -> Reply:
    if not text:
        return Reply(f"system prompt: {session.system}" if session.system else "There is no system prompt.")
    if session.raw:
        raise UsageError("--raw has no chat template, so nothing that could carry a system prompt")
    if text.lower() == "off":
        session.system = None
        return Reply("The system prompt is gone.")
    session.system = encodable(message(text))
    return Reply(
        "The system prompt is set" + ("; it holds for the conversation so far, too." if session.messages else ".")
    )


def _undo(session: Session, argument: str) -> Reply:
    return Reply(f"Taken back: {_excerpt(session.undo())}")


def _regen(session: Session, argument: str) -> Reply:
    same = session.settings.temp == 0
    return Reply("The temperature is 0: the same answer will come (/set temp 0.7)." if same else "", Then.ANSWER_AGAIN)


def _edit(session: Session, argument: str) -> Reply:
    return Reply(prefill=session.undo())


def _save(session: Session, argument: str, overwrite: bool = False) -> Reply:
    path = _path(argument, "/save")
    model = session.model.file.path.name
    transcript.save(path, model, session.system, session.messages, session.settings, overwrite=overwrite)
    return Reply(f"Saved {len(session.messages)} messages to {path}")


def _save_over(session: Session, argument: str) -> Reply:
    return _save(session, argument, overwrite=True)


def _load(session: Session, argument: str) -> Reply:
    path = _path(argument, "/load")
    saved = transcript.load(path)
    session.replace_messages(saved.messages)
    session.system = None if session.raw else saved.system
    lines = [f"Loaded {len(saved.messages)} messages from {path}"]
    if saved.model != session.model.file.path.name:
        lines.append(f"(the answers in it are by {saved.model:.100})")
    if saved.messages:
        lines.append(f"last {saved.messages[-1].role} message: {_excerpt(saved.messages[-1].content)}")
    return Reply("\n".join(lines))


def _set(session: Session, argument: str) -> Reply:
    if not argument:
        return Reply(report.settings(session))
    name, _, value = argument.partition(" ")
    if not value.strip():
        field = setting_name(name)
        return Reply(f"{shown(field)} {shown_value(getattr(session.settings, field))}: {OPTIONS[field].help}")
    session.settings = changed(session.settings, name, value.strip())
    field = setting_name(name)
    return Reply(f"{shown(field)} is now {shown_value(getattr(session.settings, field))}")


def _show(session: Session, topic: str) -> Reply:
    topics: dict[str, Callable[[Session], str]] = {
        "info": report.info,
        "params": report.settings,
        "template": report.template,
        "memory": report.memory,
        "history": _history,
    }
    if topic not in topics:
        raise UsageError(f"/show {topic}: wanted one of {', '.join(topics)}" if topic else f"/show {'|'.join(topics)}")
    return Reply(topics[topic](session))


def _stats(session: Session, argument: str) -> Reply:
    if not argument:
        return Reply(report.stats(session))
    session.settings = changed(session.settings, "stats", argument)
    return Reply(
        "Speed and context follow every answer." if session.settings.stats else "No more figures after answers."
    )


def _read(session: Session, argument: str) -> Reply:
    path = _path(argument, "/read")
    # A token has seldom more than a handful of bytes: what is much larger than the context need not be read whole.
    limit = 64 * session.model.ctx
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"{path} is far larger than the context of {session.model.ctx:,} tokens: give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    tokens = len(session.model.tokenizer.encode(text))
    if tokens >= session.model.ctx:
        raise UsageError(
            f"{path} has {tokens:,} tokens, and the context holds {session.model.ctx:,}: give a part of it"
        )
    session.attached.append((path.name, text))
    return Reply(f"{path.name} ({tokens:,} tokens) goes in front of your next message.")


def _tokens(session: Session, text: str) -> Reply:
    if not text:
        return Reply(report.context(session))
    ids = session.model.tokenizer.encode(encodable(text), add_bos=False)
    return Reply(f"{len(ids):,} tokens: {' '.join(map(str, ids))}")


def _quit(session: Session, argument: str) -> Reply:
    return Reply(then=Then.LEAVE)


def _history(session: Session) -> str:
    lines = [f"system: {session.system}"] if session.system else []
    for index, said in enumerate(session.messages):
        left_out = " (left out of the context)" if index < session.first else ""
        lines.append(f"{said.role}{left_out}: {said.content.strip()}")
    return "\n".join(lines) or "Nothing has been said yet."


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError(f"{command} wants a file name")
    try:
        return Path(argument.strip("\"'").replace("\0", "")).expanduser()
    except RuntimeError as error:  # ~someone, who has no home
        raise UsageError(f"{argument}: {error}") from None


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:69] + "…"


COMMANDS = (
    Command("help", "/help [COMMAND]", "this list, or one command", _help, ("?", "h"), "text"),
    Command("reset", "/reset", "forget the conversation", _reset, ("clear",)),
    Command("system", "/system [TEXT|off]", "show or set the system prompt", _system, (), "text"),
    Command("undo", "/undo", "take the last message and its answer back", _undo),
    Command("regen", "/regen", "answer the last message again", _regen, ("retry",)),
    Command("edit", "/edit", "take the last message back into the input line", _edit),
    Command("save", "/save FILE", "save the conversation (/save! overwrites)", _save, (), "file"),
    Command("load", "/load FILE", "go on with a saved conversation", _load, (), "file"),
    Command("read", "/read FILE", "put a text file in front of the next message", _read, (), "file"),
    Command("set", "/set [NAME VALUE]", "show or change the settings", _set, (), "word", tuple(map(shown, OPTIONS))),
    Command(
        "show",
        "/show TOPIC",
        "info, params, template, memory or history",
        _show,
        (),
        "word",
        ("info", "params", "template", "memory", "history"),
    ),
    Command("stats", "/stats [on|off]", "speed and memory, now or always", _stats, (), "word", ("on", "off")),
    Command("tokens", "/tokens [TEXT]", "tokens of the conversation, or of a text", _tokens, (), "text"),
    Command("quit", "/quit", "leave", _quit, ("exit", "bye", "q")),
)

KEYS = (
    "Ctrl-C stops an answer, twice at an empty line leaves; Ctrl-D leaves; Tab completes.",
    'Several lines: Alt-Enter, a backslash at the end, """ around them, or paste them.',
)

NAMES: dict[str, Command] = {
    **{name: command for command in COMMANDS for name in (command.name, *command.aliases)},
    "save!": Command("save!", "/save! FILE", "save the conversation over a file", _save_over, (), "file"),
}
