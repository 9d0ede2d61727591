"""Chat for minutes on one file and watch the memory: it must stop growing once the context has been full.

    PYTHONPATH=.:format:chat BILLM_DATA=... python bench/soak.py FILE.billm [--minutes 10] [--bound 16] [--threads N]

Turns are drawn at random: short questions, long passages of a text that push old turns out of the context, answers made
again, questions taken back, conversations begun anew, all on one KV cache. A first conversation fills the context; what
is resident after it is the baseline. A line a minute; ends with exit code 1 once more than the bound of megabytes has
come on top of the baseline.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import billm_rt
from billm_chat.session import Session
from billm_chat.settings import Settings
from billm_format.command import add_common_options, run_command
from billm_format.errors import UsageError
from billm_rt import texts
from billm_rt.memory import resident_bytes

_LONGEST_ANSWER = 48


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="soak")
    parser.add_argument("model", type=Path, metavar="FILE.billm")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--bound", type=float, default=16, metavar="MB", help="allowed growth (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=1024, metavar="N", help="context in tokens (default: %(default)s)")
    parser.add_argument("--data", default="wikitext2", help="text that the turns are from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of turns and answers (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    add_common_options(parser, json_output=False)
    return parser


def soak(args: argparse.Namespace) -> int:
    """Chat until the time is over or the bound is exceeded; return the exit code."""
    text = texts.load(args.data, "test").joined
    if len(text) < 10 * args.ctx:
        raise UsageError(f"{args.data}: {len(text):,} characters are too few to fill a context of {args.ctx:,} tokens")
    with billm_rt.load(args.model, threads=args.threads, ctx=args.ctx) as model:
        session = Session(model, Settings(max_tokens=_LONGEST_ANSWER, stop_loops=False, lookup=4))
        return watch(turns(session, text, random.Random(args.seed)), args.minutes * 60, args.bound * 1e6, args.quiet)


def turns(session: Session, text: str, rng: random.Random) -> Iterator[str]:
    """Take one turn after the other and yield what each was; "ready" once the context has been full."""

    def passage(tokens: int) -> str:
        start = rng.randrange(len(text) - 8 * tokens)
        return text[start : start + 3 * tokens]  # a token is three characters or more

    ctx = session.model.ctx
    while not session.first:  # the first message that is left out
        finish(session.ask(passage(ctx // 6)))
        yield "filling"
    yield "ready"
    while True:
        kind = rng.choices(("short", "long", "again", "undo", "anew"), (6, 3, 2, 2, 1))[0]
        if kind == "short":
            finish(session.ask(passage(8)))
        elif kind == "long":
            finish(session.ask(passage(ctx // 4)))
        elif kind == "anew":
            session.replace_messages(())
        elif session.messages:
            if kind == "again":
                finish(session.regenerate())
            else:
                session.undo()
        yield kind


def finish(pieces: Iterator[str]) -> None:
    """Take an answer to its end."""
    for _ in pieces:
        pass


def watch(steps: Iterator[str], seconds: float, bound: float, quiet: bool) -> int:
    """Measure after every step; print a line a minute; return 1 once `bound` bytes are exceeded, 0 after `seconds`."""
    baseline = most = 0
    begun = time.monotonic()
    next_line = begun + 60
    for count, step in enumerate(steps, start=1):
        now, resident = time.monotonic(), resident_bytes()
        if step == "ready":
            baseline = most = resident
            begun, next_line = now, now + 60
            print(f"baseline {baseline / 1e6:.1f} MB after {count} steps", flush=True)
        most = max(most, resident)
        grown = most - baseline
        if baseline and grown > bound:
            print(f"FAILED: {grown / 1e6:.1f} MB more than the baseline after {count} steps, allowed {bound / 1e6:g}")
            return 1
        if now >= next_line and not quiet:
            minutes = (now - begun) / 60
            print(f"{minutes:5.1f} min, {count} steps: {resident / 1e6:.1f} MB, at most {most / 1e6:.1f}", flush=True)
            next_line += 60
        if baseline and now - begun >= seconds:
            break
    print(f"passed: at most {(most - baseline) / 1e6:.1f} MB more than the baseline, allowed {bound / 1e6:g}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), soak, argv)


if __name__ == "__main__":
    raise SystemExit(main())
