"""The loop of a chat: read, answer, and never die of an answer."""

import traceback
from collections.abc import Generator

from billm_chat import commands, report
from billm_chat.session import Session
from billm_chat.terminal import Interrupt, Terminal
from billm_format.errors import BillmError


def chat(session: Session, terminal: Terminal, *, quiet: bool = False, debug: bool = False) -> None:
    """Talk until the user leaves (Ctrl-D, /quit, or Ctrl-C twice at an empty line); no error ends a conversation."""
    if not quiet:
        terminal.say(report.banner(session))
        for warning in report.warnings(session):
            terminal.warn(warning)
        terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    prefill, leaving = "", False
    while True:
        try:
            line = terminal.read(prefill)
        except EOFError:
            return
        except KeyboardInterrupt:
            thrown_away = bool(terminal.typed_text())
            if leaving and not thrown_away:
                return
            leaving = not thrown_away
            if leaving:
                terminal.note("(Ctrl-C again or Ctrl-D leaves)")
            prefill = ""
            continue
        leaving = False
        try:
            prefill, stay = _handle(session, terminal, line)
        except Exception as error:
            prefill, stay = "", True
            if debug:
                traceback.print_exc()
            terminal.error(_sentence(error))
        except KeyboardInterrupt:  # one Ctrl-C more than the answer needed
            prefill, stay = "", True
        if not stay:
            return


def _handle(session: Session, terminal: Terminal, line: str) -> tuple[str, bool]:
    """Do what the line says; return the text to begin the next one with, and whether to stay."""
    if not line.strip():
        return "", True
    meant = commands.parse(line)
    if isinstance(meant, str):
        if meant.strip():
            _answer(session, terminal, session.ask(meant))
        return "", True
    reply = meant.command.run(session, meant.argument)
    terminal.say(reply.text)
    if reply.then is commands.Then.ANSWER_AGAIN:
        _answer(session, terminal, session.regenerate())
    return reply.prefill, reply.then is not commands.Then.LEAVE


def _answer(session: Session, terminal: Terminal, pieces: Generator[str, None, None]) -> None:
    if session.last is not None and session.last.dropped:
        terminal.note(f"(the context is full: the oldest {session.first} messages are left out of it from here on)")
    with Interrupt() as interrupt:
        view = terminal.answer_view(markdown=session.settings.markdown)
        try:
            for piece in pieces:
                view.write(piece)
                interrupt.patient = True
                if interrupt.requested:
                    break
        except KeyboardInterrupt:
            pass
        finally:
            pieces.close()
            view.finish()
    if note := report.ending(session):
        terminal.note(note)
    if session.settings.stats and session.last is not None:
        terminal.note(report.speed(session.last, report.context(session)))
    terminal.gap()


def _sentence(error: Exception) -> str:
    if isinstance(error, BillmError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return "out of memory: /reset, or start again with a smaller --ctx"
    return f"internal error: {type(error).__name__}: {error} (this is a defect: please report it with --debug)"
