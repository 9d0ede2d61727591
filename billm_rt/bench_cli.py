"""`billm-bench`: how fast a `.billm` file runs here, and what it takes."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billm_format.command import add_common_options, add_model_options, emit_json, run_command
from billm_format.errors import UsageError
from billm_rt import options

if TYPE_CHECKING:
    from billm_rt.bench import Speed
    from billm_rt.model import Model

SCHEMA, SCHEMA_VERSION = "billm-bench", 1

_EPILOG = """\
examples:
  billm-bench model.billm
  billm-bench model.billm --prompt 64 --gen 32 --repeat 3 --threads 1 --json

Each run starts from an empty context, as in llama-bench; the median counts. The machine's read bandwidth is the best of
many passes over memory that exceeds its caches; a share above 100 % says that the weights stay in the caches. Keys and
values are not counted as read: their part is a few percent at 128 tokens. With --batch N a step reads the weights once
for a token of each of N texts, and the speed is that of all of them together.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="billm-bench",
        description="Measure how fast a .billm file reads prompts and decodes, and the memory it takes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FILE.billm", type=Path)
    parser.add_argument(
        "--prompt", type=options.positive, default=512, metavar="N", help="tokens of the prompt (default: 512)"
    )
    parser.add_argument(
        "--gen", type=options.positive, default=128, metavar="N", help="tokens to decode (default: 128)"
    )
    parser.add_argument(
        "--batch", type=options.positive, default=1, metavar="N", help="texts that are decoded at once (default: 1)"
    )
    parser.add_argument("--repeat", type=options.positive, default=5, metavar="N", help="runs of each (default: 5)")
    add_model_options(parser, exact=False)
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """Measure and print; see `build_parser` for the arguments."""
    from billm_rt import bench

    with _load(args) as model:
        caches = [model.new_cache() for _ in range(args.batch)]  # alive until the report is made, which counts them
        model.require_room(caches, [max(args.prompt, args.gen)] + [args.gen] * (args.batch - 1))
        with _progress(args, 2 * (args.repeat + 1)) as done:
            speeds = bench.measure(model, caches, args.prompt, args.gen, args.repeat, done)
        report = _report(model, *speeds, args)
    if args.json:
        emit_json(SCHEMA, SCHEMA_VERSION, report)
    else:
        _show(report)


def _load(args: argparse.Namespace) -> "Model":
    from billm_format.reader import BillmFile

    with BillmFile.open(args.model) as file:
        longest = file.config.max_position_embeddings
    for option, tokens in (("--prompt", args.prompt), ("--gen", args.gen)):
        if tokens > longest:
            raise UsageError(
                f"{option} {tokens:,} exceeds the model's context of {longest:,} tokens: take that or less"
            )
    return options.load_model(args.model, args, ctx=max(args.prompt, args.gen))


@contextmanager
def _progress(args: argparse.Namespace, runs: int) -> Iterator[Callable[[], None]]:
    """Yield a callback that draws the runs done where stderr is a terminal."""
    if args.quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(args.model.name, total=runs)
        yield lambda: bar.advance(task)


def _report(model: "Model", prompt: "Speed", decode: "Speed", args: argparse.Namespace) -> dict[str, Any]:
    from billm_rt import bench, cpu

    memory = model.memory()
    # Before the bandwidth's own memory comes in.
    mapped = bench.resident_part(model.file.path)
    in_file = model.file.nbytes if mapped is None else mapped
    per_token = bench.weight_bytes_per_token(model.file)
    on_cpu = model.device == "cpu"  # what follows of memory and threads is the machine's, not a GPU's
    bandwidth = bench.read_bandwidth(cpu.threads()) if on_cpu else None
    return {
        "file": str(args.model),
        "file_bytes": model.file.nbytes,
        "prompt_tokens": prompt.tokens,
        "prompt_tokens_per_s": prompt.median,
        "prompt_samples": prompt.samples,
        "decode_texts": args.batch,
        "decode_tokens": decode.tokens,
        "decode_tokens_per_s": decode.median,
        "decode_samples": decode.samples,
        "load_seconds": model.load_seconds,
        "resident_bytes": memory["rss"],
        "memory": {
            "file": in_file,
            "copied": memory["copied"],
            "kv_cache": memory["kv_cache"],
            "rest": memory["rss"] - in_file - memory["copied"] - (memory["kv_cache"] if on_cpu else 0),
        },
        "device_memory": model.device_memory() or None,
        "weight_bytes_per_token": per_token,
        "read_bytes_per_s": bandwidth,
        "bandwidth_share": per_token * decode.median / args.batch / bandwidth if bandwidth else None,
        "threads": cpu.threads() if on_cpu else None,
        **options.describe(model),
    }


def _show(report: dict[str, Any]) -> None:
    if report["isa"] == "numpy":
        print("The native library is missing: right answers, many times slower.")
    print(f"{Path(report['file']).name}, {_bytes(report['file_bytes'])}")
    for what, value in _rows(report):
        print(f"{what:<20} {value}")


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"prompt of {report['prompt_tokens']:,}", _speed(report["prompt_tokens_per_s"], report["prompt_samples"])
    texts = report["decode_texts"]
    what = f"decoding {report['decode_tokens'] // texts:,}" + (f" x {texts} texts" if texts > 1 else "")
    yield what, _speed(report["decode_tokens_per_s"], report["decode_samples"])
    read = report["weight_bytes_per_token"]
    rate = read * report["decode_tokens_per_s"] / texts
    yield "weights per token", f"{_bytes(read)}, so {rate / 1e9:.2f} GB/s while decoding"
    if report["read_bytes_per_s"] is not None:
        limit = report["read_bytes_per_s"] / 1e9
        share = f"decoding reaches {report['bandwidth_share']:.0%} of it"
        yield "memory reads", f"{limit:.2f} GB/s by the same threads: {share}"
    memory = report["memory"]
    parts = [
        f"{_bytes(memory['file'])} file",
        f"{_bytes(memory['kv_cache'])} KV cache",
        f"{_bytes(memory['rest'])} rest",
    ]
    if memory["copied"]:
        parts.insert(1, f"{_bytes(memory['copied'])} planes put in order")
    held = report["device_memory"]
    if held:
        weights = sum(size for kind, size in held.items() if kind.startswith("weights."))
        both = f"{_bytes(weights)} weights, {parts.pop(1)}, {_bytes(held['scratch'])} scratch"
        yield "on the device", f"{_bytes(held['pool'])} held: {both}; {_bytes(held['card'])} in use with other programs"
    yield "process, resident", f"{_bytes(report['resident_bytes'])}: {', '.join(parts)}"
    yield "load time", f"{report['load_seconds']:.3f} s"
    count = report["threads"]
    threads = f"{count} thread{'s'[: count > 1]}, " if count else ""
    yield "ran on", f"{report['device']} ({report['isa']}), {threads}{report['activations']} activations"


def _speed(median: float, samples: Sequence[float]) -> str:
    text = f"{median:,.1f} tokens/s"
    return f"{text}, median of {len(samples)} ({min(samples):,.1f} to {max(samples):,.1f})" if samples[1:] else text


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
