"""`billm-eval`: zero-shot accuracies of a `.billm` file or of a full-precision model, by the same prompts and rules."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from billm_format.command import add_common_options, add_model_options, emit_json, finite, run_command
from billm_format.errors import UsageError
from billm_rt import eval_tasks, options
from billm_rt.eval_score import BillmReader, Reader, Score, evaluate

SCHEMA, SCHEMA_VERSION = "billm-eval", 1

_EPILOG = f"""\
tasks: {", ".join(eval_tasks.TASKS)}

Prompts, scoring (log-likelihood of each answer; acc_norm: divided by its length in characters) and standard errors are
those of lm-evaluation-harness without examples. Items come from the folder that BILLM_DATA names
(zeroshot/piqa-validation.jsonl.gz, ...), else through the `datasets` library. On a fixed --limit a difference of less
than two standard errors means little.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="billm-eval",
        description="Measure zero-shot accuracy on common tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="FILE|MODEL_DIR", type=Path, help=".billm file; else Hugging Face directory or .gguf"
    )
    parser.add_argument(
        "--tasks", metavar="A,B,...", default=",".join(eval_tasks.PAPER), help="default: the paper's (%(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only (default: all)")
    add_model_options(parser, exact=True)
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """Score every task and print; see `build_parser` for the arguments."""
    for option, value in (("limit", args.limit), ("threads", args.threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{option}: wanted at least 1, found {value}")
    # All items before any model: a name that is none or a missing file should not cost a load.
    tasks = {name: eval_tasks.load(name, args.limit) for name in dict.fromkeys(args.tasks.split(","))}
    with _reader(args) as (reader, described):
        scores = {}
        for name, items in tasks.items():
            with _progress(name, len(items), args.quiet) as progress:
                scores[name] = evaluate(reader, items, eval_tasks.TASKS[name].metrics, progress)
    report = {
        "model": str(args.model),
        **described,
        "limit": args.limit,
        "tasks": {name: asdict(score) for name, score in scores.items()},
    }
    if args.json:
        emit_json(SCHEMA, SCHEMA_VERSION, finite(report))
    else:
        _show(report, scores)


@contextmanager
def _reader(args: argparse.Namespace) -> Iterator[tuple[Reader, dict[str, Any]]]:
    """Yield the model and what to say of how it runs."""
    if args.model.is_dir() or args.model.suffix == ".gguf":
        from billm_rt import against

        reader = against.load_reader(args.model, args.threads, args.device)
        yield reader, {"device": reader.device, "isa": "torch", "activations": "float32"}
        return
    with options.load_model(args.model, args) as model:
        yield BillmReader(model), options.describe(model)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Yield what draws a bar where stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _show(report: dict[str, Any], scores: dict[str, Score]) -> None:
    print(f"{report['model']}, zero-shot; ran on {report['device']} ({report['isa']}), {report['activations']}")
    print(f"{'task':<14} {'items':>6}  {'acc':<15}  {'acc_norm':<15}  chance")
    for name, score in scores.items():
        acc, norm = _share(score.acc, score.acc_stderr), _share(score.acc_norm, score.acc_norm_stderr)
        last = _share(score.chance, None)
        if score.perplexity is not None:
            last = f"(perplexity of the last word {score.perplexity:,.2f} ± {score.perplexity_stderr:,.2f})"
        print(f"{name:<14} {score.items:>6,}  {acc:<15}  {norm:<15}  {last}".rstrip())
    if len(scores) > 1:
        mean = sum(score.acc for score in scores.values()) / len(scores)
        print(f"{'mean':<14} {'':>6}  {mean:.2%}")


def _share(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if error is None else f"{value:.2%} ± {error:.2%}"


if __name__ == "__main__":
    sys.exit(main())
