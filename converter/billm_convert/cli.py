"""`billm-convert MODEL OUT.billm`: the command. torch and transformers load only when a conversion begins."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billm_convert.settings import (
    ABLATIONS,
    CPU_CALIBRATION,
    DAMP,
    EFFORTS,
    GPU_CALIBRATION,
    RECIPES,
    CheckReport,
    ConvertReport,
    ConvertSettings,
)
from billm_format.command import add_common_options, emit_json, run_command
from billm_format.config import BLOCK_SIZES, EMBEDDING_BITS
from billm_format.errors import EXIT_INTERRUPTED, QualityError, UsageError

SCHEMA, SCHEMA_VERSION = "billm-convert", 1

_EPILOG = """\
While it runs, finished blocks are kept in the folder OUT.billm.work: after a crash, a kill or Ctrl-C the same command
with --resume goes on there and ends in the same bytes. Without --calib the text is WikiText-2 (train), from the folder
that BILLM_DATA names or through the datasets library; where neither has it, the model writes the text itself ("self").

The finished file's perplexity is measured beside the original's on text that calibration did not see (seconds to a
minute), and a collapse is said. Exit codes: 0 success, 1 internal error, 2 bad usage or input, 3 corrupt file, 4 does
not fit, 5 worse than --max-ppl-ratio allows (the file is kept), 130 interrupted.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; nothing heavy is imported for `--help`."""
    parser = argparse.ArgumentParser(
        prog="billm-convert",
        description="Binarize a language model into one .billm file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder (safetensors) or .gguf file")
    parser.add_argument("out", metavar="OUT.billm", type=Path, help="file to write")
    default = ConvertSettings()
    how = parser.add_argument_group("binarization")
    how.add_argument("--recipe", choices=RECIPES, default=default.recipe, help="how to fit (default: %(default)s)")
    how.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default=default.effort,
        help="how long the recipe tuned trains (default: %(default)s)",
    )
    how.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="leave a part of the paper's recipe out: the split, the salient columns, or the compensation",
    )
    how.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        default=default.block_size,
        help="columns that share scales (default: %(default)s)",
    )
    how.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="true bits per weight of the Linears: smaller blocks for the most sensitive of them, within B",
    )
    how.add_argument(
        "--max-salient",
        type=int,
        default=default.max_salient,
        metavar="N",
        help="most salient columns in a block (default: %(default)s)",
    )
    how.add_argument(
        "--damp",
        type=float,
        default=default.damp,
        metavar="X",
        help=f"dampening of the Hessian, as a share of its mean diagonal (default: {_by_recipe(DAMP)})",
    )
    how.add_argument(
        "--embedding-bits",
        type=int,
        choices=EMBEDDING_BITS,
        default=default.embedding_bits,
        help="bits of embeddings and head; 4: a smaller file, quicker, some percent of perplexity worse "
        "(default: %(default)s)",
    )
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calib",
        metavar="TEXT",
        help="wikitext2, ptb, c4, openwebtext, pydoc, self (written by the model itself), or a .txt or .jsonl file; "
        "several, in equal shares, with a comma between them",
    )
    data.add_argument(
        "--nsamples",
        type=int,
        metavar="N",
        help=f"windows (default: {GPU_CALIBRATION[0]} on a GPU, {CPU_CALIBRATION[0]} on a CPU)",
    )
    data.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help=f"tokens in each (default: {GPU_CALIBRATION[1]} on a GPU, {CPU_CALIBRATION[1]} on a CPU)",
    )
    data.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of the draw of windows (default: %(default)s)"
    )
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--no-check", dest="check", action="store_false", help="do not measure the result's perplexity"
    )
    quality.add_argument(
        "--max-ppl-ratio",
        type=float,
        metavar="R",
        help="fail (exit code 5) where the perplexity is more than R times the original's",
    )
    run = parser.add_argument_group("running")
    run.add_argument(
        "--device", default=default.device, metavar="D", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    run.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    run.add_argument("--resume", action="store_true", help="go on with an unfinished conversion")
    run.add_argument("--force", action="store_true", help="start over, and replace OUT if it exists")
    run.add_argument(
        "--report", type=Path, metavar="FOLDER|FILE.json", help="write a page with pictures there, or the figures alone"
    )
    # The words of the authors' code.
    how.add_argument("--percdamp", dest="damp", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    how.add_argument("--blocksize", dest="block_size", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_common_options(parser)
    return parser


def _by_recipe(values: dict[str, float]) -> str:
    return ", ".join(f"{recipe} {value:g}" for recipe, value in values.items())


def run(args: argparse.Namespace) -> int:
    """Convert as `args` say and print the result; return the exit code."""
    fields = ConvertSettings.__dataclass_fields__
    as_json = args.report if args.report is not None and args.report.suffix.lower() == ".json" else None
    values = {**vars(args), "report": None if as_json else args.report}
    settings = ConvertSettings(**{name: value for name, value in values.items() if name in fields})
    if args.report is not None and not args.report.parent.is_dir():
        raise UsageError(f"{args.report}: there is no folder {args.report.parent}; make it first")
    # Read when transformers is imported: its notes and bars are about loading, not about this conversion.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Read when torch is imported: waiting threads should sleep. Spinning takes a third more CPU time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # It tells of the font cache that it makes when it first draws.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from billm_convert import convert
    from billm_convert.report import Display, print_result

    try:
        with Display(quiet=args.quiet) as display:
            report = convert(args.model, args.out, settings, display.show)
    except KeyboardInterrupt:
        print(f"{parser_name()}: interrupted{_how_to_resume(args.out)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if as_json is not None:
        _write_report(as_json, report)
    if args.json:
        emit_json(SCHEMA, SCHEMA_VERSION, report.to_json())
    else:
        print_result(report, table=not args.quiet)
        if settings.report and not args.quiet:
            print(f"report: {settings.report / 'index.html'}")
    if args.json and not args.quiet and report.check and report.check.advice:
        print(f"{parser_name()}: {report.check.advice}", file=sys.stderr)
    if report.check:
        _judge(report.check, settings.max_ppl_ratio)
    return 0


def parser_name() -> str:
    """Return the command's name as its messages give it."""
    return "billm-convert"


def _how_to_resume(out: Path) -> str:
    work = out.with_name(out.name + ".work")
    if not work.exists():
        return ""
    if any(work.glob("block-*")):
        return f"; finished blocks are kept in {work}: run the same command with --resume to go on"
    return " before the first block was finished; run the same command with --resume to go on"


def _judge(check: CheckReport, bound: float | None) -> None:
    """Raise QualityError where the perplexities' ratio exceeds the bound; one that is not finite exceeds any."""
    if bound is not None and not check.ratio <= bound:
        raise QualityError(
            f"the perplexity is {check.ratio:,.2f} times the original's, more than --max-ppl-ratio {bound:g}; the file "
            "was written all the same"
        )


def _write_report(path: Path, report: ConvertReport) -> None:
    payload: dict[str, Any] = {"schema": SCHEMA, "version": SCHEMA_VERSION, **report.to_json()}
    path.write_text(json.dumps(payload, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
