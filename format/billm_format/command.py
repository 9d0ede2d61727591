"""What every command shares: one line per error, the exit codes, `--debug`, JSON with a schema.

A command is a parser, a pure function and a `main` of a few lines that hands both to `run_command`.
"""

import argparse
import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from billm_format.errors import EXIT_DOES_NOT_FIT, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, BillmError


def add_common_options(parser: argparse.ArgumentParser, *, json_output: bool = True) -> None:
    """Add the options that mean the same in every command: --json, --quiet, --debug, --version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("billm-rt")
    except PackageNotFoundError:
        installed = "source tree"
    if json_output:
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    parser.add_argument("-q", "--quiet", action="store_true", help="print results only: no progress, no notes")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed}")


def add_model_options(parser: argparse._ActionsContainer, *, exact: bool) -> None:
    """Add --threads, --device, --activation-bits and --kv-bits (and --exact) to a parser or a group of one."""
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (now: cpu), cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="8: faster, about one percent of perplexity worse (default: 16, all but exact)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="of the KV cache; 8: half the memory for long texts (default: 16, all but exact)",
    )
    if exact:
        parser.add_argument("--exact", action="store_true", help="float32 activations and KV cache (slow)")


def emit_json(schema: str, version: int, payload: dict[str, Any]) -> None:
    """Print `payload` as one JSON object on stdout, preceded by its schema's name and version."""
    json.dump({"schema": schema, "version": version, **payload}, sys.stdout, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def finite(value: Any) -> Any:
    """Return `value` with every number that JSON cannot hold (a perplexity beyond float64, say) as null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, run `command` and return the exit code; every error becomes one line on stderr.

    0 success, 1 internal error, 2 usage or bad input, 3 corrupt file, 4 does not fit, 5 quality bound missed,
    130 interrupted.
    """
    args = parser.parse_args(argv)
    debug: bool = args.debug
    try:
        code = command(args) or 0
        sys.stdout.flush()
        return code
    except BillmError as error:
        return _fail(parser.prog, str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail(parser.prog, "interrupted", EXIT_INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours. Keep the interpreter's own flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        return _fail(parser.prog, f"out of memory ({error or 'an allocation failed'})", EXIT_DOES_NOT_FIT, debug)
    except OSError as error:
        code = EXIT_DOES_NOT_FIT if error.errno in (errno.ENOSPC, errno.EDQUOT) else EXIT_USAGE
        where = f"{error.filename}: " if error.filename else ""
        return _fail(parser.prog, f"{where}{error.strerror or error}", code, debug)
    except Exception as error:
        hint = "" if debug else " (this is a defect: please report it with the output of --debug)"
        return _fail(parser.prog, f"internal error: {type(error).__name__}: {error}{hint}", EXIT_INTERNAL, debug)


def _fail(prog: str, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{prog}: {message}", file=sys.stderr)
    return code
