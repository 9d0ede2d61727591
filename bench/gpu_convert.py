"""Time and memory of converting decoder blocks of well-known shapes, random weights standing in for real ones.

    PYTHONPATH=.:format:converter:tests python bench/gpu_convert.py [--shape NAME] [--recipe paper refined] [--json]

A model of `--layers` blocks is made in a temporary folder and converted as `billm-convert` would do it, with the
windows and tokens of the paper. "whole model" is the time of the later blocks (the first one's holds what is done once)
times the blocks that the shape really has: reckoned, not measured. The text is Python's own reference prose, in tokens
of about a letter: how long a conversion takes does not depend on it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from convert.hf_models import save_model

from billm_convert import ConvertSettings, Event, convert
from billm_convert.settings import COL_SCALED
from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError

# Widths as `transformers` names them, and how many blocks the model really has.
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "tiny": ({}, 2),
    "smollm2-135m": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        30,
    ),
    "llama-2-7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
        32,
    ),
    "llama-2-70b": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
        80,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="gpu_convert")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="(default: %(default)s)")
    parser.add_argument("--recipe", nargs="+", choices=("paper", *COL_SCALED[:1]), default=["paper", "refined"])
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="blocks to convert (default: 3)")
    parser.add_argument("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens in each (default: 2048)")
    parser.add_argument("--device", default="cuda", metavar="D", help="cuda, cuda:N or cpu (default: cuda)")
    add_common_options(parser)
    return parser


def measure(args: argparse.Namespace) -> None:
    """Convert with every recipe and print a line of each, or one JSON object."""
    if args.layers < 2:
        raise UsageError("--layers: wanted 2 or more, as the first block's time is not like the others'")
    widths, blocks = SHAPES[args.shape]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(
            model, "llama", 0, num_hidden_layers=args.layers, max_position_embeddings=max(args.seqlen, 128), **widths
        )
        for recipe in args.recipe:
            lines.append(_convert(model, Path(folder, f"{recipe}.billm"), recipe, blocks, args))
            if not args.quiet:
                print(_line(lines[-1]), file=sys.stderr)
    if args.json:
        emit_json("billm-gpu-convert", 1, {"shape": args.shape, "nsamples": args.nsamples, "lines": lines})
    else:
        print(*map(_line, lines), sep="\n")


def _convert(model: Path, out: Path, recipe: str, blocks: int, args: argparse.Namespace) -> dict[str, Any]:
    finished = [time.perf_counter()]

    def watch(event: Event) -> None:
        if event.linears:
            finished.append(time.perf_counter())

    settings = ConvertSettings(
        recipe=recipe, calib="pydoc", nsamples=args.nsamples, seqlen=args.seqlen, device=args.device, check=False
    )
    report = convert(model, out, settings, watch)
    first, *later = (end - begin for begin, end in pairwise(finished))
    block = statistics.median(later)
    return {
        "shape": args.shape,
        "recipe": recipe,
        "device": report.device,
        "first_block_seconds": first,
        "block_seconds": block,
        "whole_model_seconds": first + block * (blocks - 1),
        "blocks": blocks,
        "device_peak_bytes": report.device_peak_bytes,
    }


def _line(line: dict[str, Any]) -> str:
    on_device = line["device_peak_bytes"]
    memory = "" if on_device is None else f"; peak {on_device / 1e9:.1f} GB on the device"
    return (
        f"{line['shape']}, {line['recipe']}, {line['device']}: {line['block_seconds']:.1f} s a block (first "
        f"{line['first_block_seconds']:.1f}), so {line['whole_model_seconds'] / 60:.1f} min for all {line['blocks']}"
        f"{memory}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
