"""billm-chat: the options, one-shot use, and the way into the chat."""

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billm_chat.settings import OPTIONS, Settings, shown_value, stop_string
from billm_format.command import add_common_options, add_model_options, emit_json, run_command
from billm_format.errors import UsageError

if TYPE_CHECKING:
    from billm_chat.session import Session

JSON_SCHEMA = "billm-chat"

# Standard input that says nothing for so long gets a hint: the program may be waiting for nobody.
_PATIENCE_SECONDS = 3.0

_EPILOG = """\
examples:
  billm-chat model.billm                                a conversation
  billm-chat model.billm -p "Name three rivers"         one answer, as plain text
  cat notes.txt | billm-chat model.billm -p "Sum up"    the piped text, then the question
exit codes: 0 done, 1 internal error, 2 wrong use, 3 damaged file, 4 does not fit, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its help needs neither the runtime nor the terminal libraries."""
    parser = argparse.ArgumentParser(
        prog="billm-chat",
        description="Talk to a .billm model: in the terminal, or one question from a script.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the .billm file")
    parser.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help=argparse.SUPPRESS)
    ask = parser.add_argument_group("one-shot use (also with piped standard input)")
    ask.add_argument("-p", "--prompt", metavar="TEXT", help="answer TEXT and leave; -: standard input")
    ask.add_argument("-f", "--file", metavar="FILE", help="answer the text in FILE, in front of --prompt if both")
    _add_conversation(parser.add_argument_group("conversation"))
    _add_sampling(parser.add_argument_group("sampling (defaults for small binarized models)"))
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "-c",
        "--ctx",
        "--ctx-size",
        type=int,
        metavar="N",
        help="context in tokens (default: the model's, at most 4096)",
    )
    add_model_options(machine, exact=False)
    add_common_options(parser)
    return parser


def _add_conversation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="system prompt")
    group.add_argument("--system-file", metavar="FILE", help="system prompt from a file")
    group.add_argument("--raw", action="store_true", help="no chat template: go on where the text ends")
    group.add_argument("--no-markdown", action="store_true", help="show answers as they are written")
    group.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next time")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    defaults = Settings()
    for name, option in OPTIONS.items():
        if option.flags:
            default = getattr(defaults, name)
            group.add_argument(
                *option.flags,
                dest=name,
                type=_argument(option.parse),
                default=default,
                metavar="X",
                help=f"{option.help} (default: {shown_value(default)})",
            )
    group.add_argument(
        "--stop",
        action="append",
        type=_argument(stop_string),
        metavar="TEXT",
        help=OPTIONS["stop"].help + "; repeatable",
    )
    group.add_argument("--no-stop-loops", action="store_true", help="let an answer repeat itself over and over")


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser whose refusal argparse prints as it is."""

    def argument(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


def run(args: argparse.Namespace) -> None:
    """Do what the options say; raises the BillmError family."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    if args.model is None and args.model_option is None:
        raise UsageError("which model? billm-chat MODEL.billm (--help shows all options)")
    if args.model is not None and args.model_option is not None:
        raise UsageError(f"two models were given, {args.model} and {args.model_option}: give one")
    if args.raw and (args.system or args.system_file):
        raise UsageError("--raw has no chat template, so nothing that could carry --system")
    session = _session(args)  # first: a model that is not there is what to say, whatever standard input holds
    prompt = _one_shot_prompt(args)
    if prompt is None and args.json:
        raise UsageError("--json wants a question: give --prompt, --file, or text on standard input")
    if prompt is None:
        _chat(session, args)
    elif args.json:
        _answer_json(session, prompt)
    else:
        _answer_text(session, prompt, quiet=args.quiet)


def _session(args: argparse.Namespace) -> "Session":
    from billm_chat.session import Session, encodable
    from billm_rt import options

    system = args.system
    if args.system_file is not None:
        if system is not None:
            raise UsageError("--system and --system-file are two system prompts: give one")
        system = _text_of(args.system_file).strip()
    settings = replace(
        Settings(**{name: getattr(args, name) for name, option in OPTIONS.items() if option.flags}),
        stop=tuple(args.stop or ()),
        stop_loops=not args.no_stop_loops,
        markdown=not args.no_markdown,
    )
    path = args.model if args.model is not None else args.model_option
    model = options.load_model(path, args, ctx=args.ctx)
    return Session(model, settings, system=None if system is None else encodable(system), raw=args.raw)


def _chat(session: "Session", args: argparse.Namespace) -> None:
    from billm_chat.repl import chat
    from billm_chat.terminal import Terminal, quiet_keyboard, state_folder

    history = None if args.no_history else state_folder() / "chat_history"
    with quiet_keyboard():
        chat(session, Terminal(history=history), quiet=args.quiet, debug=args.debug)


# --- one-shot


def _one_shot_prompt(args: argparse.Namespace) -> str | None:
    """Return the question: the file, standard input and --prompt, in this order; None: a conversation is wanted."""
    terminal_in = sys.stdin is not None and sys.stdin.isatty()
    given = args.prompt is not None or args.file is not None
    if terminal_in and sys.stdout.isatty() and not given:
        return None
    parts = [] if args.file is None else [_text_of(args.file)]
    if not terminal_in or args.prompt == "-" or not given:
        parts.append(_standard_input(quiet=args.quiet))
    if args.prompt not in (None, "-"):
        parts.append(args.prompt)
    separator = "" if args.raw else "\n\n"
    text = separator.join(part if args.raw else part.strip("\n") for part in parts if part.strip())
    if not text:
        raise UsageError("there is nothing to answer: the prompt is empty")
    return text


def _standard_input(*, quiet: bool) -> str:
    if sys.stdin is None:
        return ""
    try:
        ready = bool(select.select([sys.stdin], [], [], _PATIENCE_SECONDS)[0])
    except (OSError, ValueError):  # not a thing that can be waited for
        ready = True
    if not ready and not quiet:
        print("billm-chat: waiting for the end of standard input (< /dev/null if there is none)", file=sys.stderr)
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace")


def _text_of(path: str) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None


def _answer_text(session: "Session", prompt: str, *, quiet: bool) -> None:
    from billm_chat import report
    from billm_chat.plain import PlainView, write_out

    view = PlainView(write_out)
    try:
        for piece in session.ask(prompt):
            view.write(piece)
    finally:
        view.finish()
    if not quiet and (note := report.one_shot_ending(session)):
        print(f"billm-chat: {note}", file=sys.stderr)


def _answer_json(session: "Session", prompt: str) -> None:
    text = "".join(session.ask(prompt))
    turn = session.last
    if turn is None:
        raise RuntimeError("an answer leaves its figures behind")
    emit_json(
        JSON_SCHEMA,
        1,
        {
            "model": os.fspath(session.model.file.path),
            "text": text,
            "finish_reason": turn.finish_reason,
            "prompt_tokens": turn.prompt_tokens,
            "prompt_seconds": turn.prompt_seconds,
            "generated_tokens": turn.generated_tokens,
            "generation_seconds": turn.generation_seconds,
            "proposed_tokens": turn.proposed_tokens,
            "accepted_tokens": turn.accepted_tokens,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
