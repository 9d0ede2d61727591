"""`billm-ppl`: how well a `.billm` file predicts a text, and what it costs in memory and time."""

import argparse
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from billm_format.command import add_common_options, add_model_options, emit_json, finite, run_command
from billm_format.errors import UsageError
from billm_format.layout import KINDS
from billm_format.reader import BillmFile
from billm_rt import bench, options, ppl, texts
from billm_rt.memory import peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from billm_rt.against import Reference
    from billm_rt.model import Model

SCHEMA, SCHEMA_VERSION = "billm-ppl", 1
_DECODED_TOKENS = 16  # one by one, to see how fast; twice, of which the first time does not count

_EPILOG = """\
examples:
  billm-ppl model.billm                                  WikiText-2 if it is at hand, else pydoc
  billm-ppl model.billm --data notes.txt --seqlen 512
  billm-ppl model.billm --windows 8 --against MODEL_DIR  beside the model it was made from

Named sets come from the folder that the environment variable BILLM_DATA names (wikitext2/test.txt.gz, ptb/test.txt.gz,
c4/validation.jsonl.gz), else through the `datasets` library; pydoc is the part of Python's own reference prose that
`billm-convert --calib pydoc` leaves alone. Perplexities compare only under the same protocol, text and window length.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="billm-ppl",
        description="Measure the perplexity of a .billm file, beside the full-precision model's if asked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FILE.billm", type=Path)
    parser.add_argument("--data", metavar="wikitext2|ptb|c4|pydoc|FILE", help="text to measure on (.txt, .jsonl, .gz)")
    parser.add_argument("--seqlen", type=int, metavar="N", help="tokens per window (default: 2048; llamacpp: 512)")
    parser.add_argument("--windows", type=options.positive, metavar="N", help="the first N windows only (default: all)")
    parser.add_argument("--protocol", choices=sorted(ppl.DESCRIPTIONS), default="paper", help=_protocol_help())
    parser.add_argument(
        "--against", metavar="MODEL", type=Path, help="Hugging Face directory or .gguf: measure it on the same windows"
    )
    parser.add_argument(
        "--kl",
        action=argparse.BooleanOptionalAction,
        help="with --against: also compare both models token by token, reading the file's a second time (default: yes)",
    )
    add_model_options(parser, exact=True)
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """Measure and print; see `build_parser` for the arguments."""
    if args.kl and args.against is None:
        raise UsageError("--kl compares two models: give the other one with --against")
    notes = Notes(args.quiet)
    seqlen = _window_length(args, notes)
    text = _text(args.data, notes)
    tokens = _tokenize_apart(args.model, text.joined)
    parts = _windows(tokens, text, seqlen, args, notes)
    rss_before_load = resident_bytes()
    with options.load_model(args.model, args, ctx=seqlen) as model:
        if model.isa == "numpy":
            notes(model.backend.reason)
        report = _measure(model, text, parts, args, notes)
        report["memory"] |= {"rss_before_load": rss_before_load, "tokenizing_peak_rss": tokens.peak_rss}
        # torch comes in only now, so that none of its memory is counted above.
        if args.against is not None:
            report |= _compare(model, report["perplexity"], parts, args, notes)
    if args.json:
        emit_json(SCHEMA, SCHEMA_VERSION, finite(report))
    else:
        _show(report)


@dataclass(frozen=True)
class Notes:
    """Remarks for people, on stderr."""

    quiet: bool

    def __call__(self, text: str) -> None:
        """Print one remark unless asked not to."""
        if not self.quiet:
            print(f"billm-ppl: {text}", file=sys.stderr)

    @contextmanager
    def progress(self, title: str) -> Iterator[ppl.Progress]:
        """Yield a callback that draws windows done, time left and the running perplexity where stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda _: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        running = TextColumn("perplexity {task.fields[now]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), running)
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None, now="...")
            yield lambda tally: bar.update(
                task, total=tally.total_windows, completed=len(tally.nlls), now=_number(tally.running)
            )


# --- what to measure -----------------------------------------------------------------------------------------------


def _window_length(args: argparse.Namespace, notes: Notes) -> int:
    with BillmFile.open(args.model) as file:
        longest = file.config.max_position_embeddings
    wanted: int = args.seqlen if args.seqlen is not None else ppl.DEFAULT_SEQLEN[args.protocol]
    if wanted <= longest:
        return wanted
    if args.seqlen is not None:
        raise UsageError(f"--seqlen {wanted:,} exceeds the model's context of {longest:,} tokens: take that or less")
    notes(f"windows of {longest:,} tokens, the model's whole context, instead of {wanted:,}")
    return longest


def _text(data: str | None, notes: Notes) -> texts.Text:
    if data is not None:
        return texts.load(data, "test")
    try:
        return texts.load("wikitext2", "test")
    except UsageError as error:
        text = texts.load("pydoc", "test")
        notes(f"measuring on {text.name}, because {error}")
        return text


@dataclass(frozen=True)
class Tokens:
    """A tokenized text."""

    ids: ppl.Ids
    bos: int | None  # the token that the tokenizer puts in front of a text, if it does
    peak_rss: int | None  # of the process that did it; None: this one


def tokenize(path: Path, text: str) -> Tokens:
    """Tokenize `text` in one piece, as the paper's code does, by the tokenizer of the file at `path`."""
    from billm_rt.tokenizer import Tokenizer

    with BillmFile.open(path) as file:
        tokenizer = Tokenizer(file.tokenizer_json(), file.tokenizer_info, file.config, file.chat_template())
    # As the paper's code has it: the names of special tokens in the text are those tokens (PTB is full of "<unk>").
    ids = np.array(tokenizer.encode(text, special=True), dtype=np.int64)
    return Tokens(ids, tokenizer.bos_token_id if tokenizer.add_bos else None, peak_resident_bytes())


def _tokenize_apart(path: Path, text: str) -> Tokens:
    """Tokenize in a process of its own: a text of a megabyte takes the library hundreds, which nobody wants counted."""
    spawn = multiprocessing.get_context("spawn")
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to answer
    try:
        with ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=ignore_interrupts) as pool:
            return pool.submit(tokenize, path, text).result()
    except (OSError, BrokenExecutor):  # no processes to be had here
        return replace(tokenize(path, text), peak_rss=None)


def _windows(tokens: Tokens, text: texts.Text, seqlen: int, args: argparse.Namespace, notes: Notes) -> list[ppl.Ids]:
    parts = ppl.cut(tokens.ids, seqlen, args.windows, args.protocol, tokens.bos)
    if args.windows is not None and len(parts) < args.windows:
        notes(f"{text.name} has {len(parts)} whole windows of {seqlen:,} tokens, not {args.windows}")
    return parts


# --- measuring -----------------------------------------------------------------------------------------------------


def _measure(
    model: "Model", text: texts.Text, parts: list[ppl.Ids], args: argparse.Namespace, notes: Notes
) -> dict[str, Any]:
    scorer, cache = ppl.model_scorer(model)
    with notes.progress(args.model.name) as progress:
        result = ppl.measure(parts, scorer, args.protocol, progress)
    held, kv_bytes, on_device = model.memory(), cache.nbytes, model.device_memory()
    # Last: a step of one token may take memory of its own.
    _, decoding = bench.measure(model, [cache], 1, min(_DECODED_TOKENS, len(parts[0]) - 1), repeat=1)
    weights = {kind: held[f"weights.{kind}"] for kind in KINDS if kind not in ("tokenizer", "padding")}
    paper, true = model.file.bits()
    return {
        "file": str(args.model),
        "file_bytes": model.file.nbytes,
        "data": {"name": text.name, "sha256": text.sha256},
        "protocol": args.protocol,
        "seqlen": len(parts[0]),
        **asdict(result),
        "decode_tokens_per_s": decoding.median,
        "bits": {"paper": paper, "true": true},
        "memory": {
            "weights": weights,
            "weights_total": sum(weights.values()),
            "copied": model.memory()["copied"],
            "kv_cache": kv_bytes,
            "rss": held["rss"],
            "peak_rss": held["peak_rss"],
            "device": on_device or None,
        },
        "load_seconds": model.load_seconds,
        **options.describe(model),
    }


def _compare(
    model: "Model", ours: float, parts: list[ppl.Ids], args: argparse.Namespace, notes: Notes
) -> dict[str, Any]:
    from billm_rt import against

    reference: Reference = against.load(args.against, model.config.vocab_size, args.threads, args.device)
    divergence = ppl.Divergence() if args.kl is not False else None
    other = ppl.model_scorer(model)[0] if divergence else None
    with notes.progress(args.against.name) as progress:
        result = against.evaluate(reference, parts, args.protocol, progress, divergence, other)
    report: dict[str, Any] = {
        "model": str(args.against),
        "device": reference.device,
        **asdict(result),
        "file_bytes": reference.file_bytes,
        "weights_bytes": reference.weights_bytes,
    }
    if divergence is not None:
        mean, stderr = divergence.mean()
        report |= {"kl": mean, "kl_stderr": stderr, "top1": divergence.top1}
    return {"against": report, "ratio": ours / result.perplexity}


# --- printing ------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str]  # what, ours, the reference's


def _show(report: dict[str, Any]) -> None:
    count = report["windows"]
    title = f"{report['data']['name']}: {count:,} window{'s'[: count > 1]} of {report['seqlen']:,} tokens"
    protocol = f"protocol {report['protocol']}: {ppl.DESCRIPTIONS[report['protocol']]}"
    rows = [*_quality_rows(report), *_cost_rows(report)]
    headings = ("", Path(report["file"]).name, "full precision (float32)" if "against" in report else "")
    _print_table(f"{title}\n{protocol}", headings, rows)


def _quality_rows(report: dict[str, Any]) -> Iterator[Row]:
    other = report.get("against")
    yield _row(
        "perplexity ± std. error", lambda r: f"{_number(r['perplexity'])} ± {_number(r['stderr'])}", report, other
    )
    if other:
        yield "ratio", f"{_number(report['ratio'])} × full precision", ""
    if other and "kl" in other:
        yield "KL divergence", f"{_number(other['kl'])} ± {_number(other['kl_stderr'])} nats per token", ""
        yield "same first choice", f"{other['top1']:.1%} of the tokens", ""
    yield _row("tokens scored", lambda r: f"{r['tokens']:,}", report, other)
    yield _row("tokens/s, reading", lambda r: f"{r['tokens_per_s']:,.1f}", report, other)
    yield "tokens/s, decoding", f"{report['decode_tokens_per_s']:,.1f}", ""


def _cost_rows(report: dict[str, Any]) -> Iterator[Row]:
    memory, bits, other = report["memory"], report["bits"], report.get("against")
    yield _row("file size", lambda r: _bytes(r["file_bytes"]), report, other)
    yield "bits per weight", f"{bits['true']:.3f} true, {bits['paper']:.3f} by the paper's count", ""
    total = _bytes(other["weights_bytes"]) if other else ""
    where = "mapped from the file" if report["device"] == "cpu" else f"mapped from the file, and on {report['device']}"
    yield "weights in memory", f"{_bytes(memory['weights_total'])}, {where}:", total
    for kind, size in memory["weights"].items():
        if size:
            yield f"  {KINDS[kind]}", _bytes(size), ""
    if memory["copied"]:
        yield "planes put in order", f"{_bytes(memory['copied'])}, when decoding begins", ""
    yield "KV cache", _bytes(memory["kv_cache"]), ""
    if memory["device"]:
        yield from _device_rows(report["device"], memory["device"])
    before = f"{_bytes(memory['rss_before_load'])} before loading"
    yield "process, resident", f"{_bytes(memory['rss'])}, at most {_bytes(memory['peak_rss'])}, {before}", ""
    if memory["tokenizing_peak_rss"] is not None:
        yield "tokenizing the text", f"{_bytes(memory['tokenizing_peak_rss'])} at most, in a process of its own", ""
    yield "load time", f"{report['load_seconds']:.3f} s", ""
    ours = f"{report['device']} ({report['isa']}), {report['activations']} activations"
    yield "ran on", ours, f"{other['device']} (torch), float32" if other else ""


def _device_rows(name: str, held: dict[str, int]) -> Iterator[Row]:
    weights = sum(size for kind, size in held.items() if kind.startswith("weights."))
    yield f"on {name}", f"{_bytes(held['pool'])} held, {_bytes(held['card'])} in use with other programs:", ""
    for what, size in (("weights", weights), ("KV cache", held["kv_cache"]), ("scratch", held["scratch"])):
        yield f"  {what}", _bytes(size), ""


def _row(what: str, cell: Callable[[dict[str, Any]], str], ours: dict[str, Any], other: dict[str, Any] | None) -> Row:
    return what, cell(ours), cell(other) if other else ""


def _print_table(title: str, headings: Row, rows: list[Row]) -> None:
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, title=Text(title), title_justify="left")
        for heading in headings if headings[2] else headings[:2]:
            table.add_column(Text(heading))
        for row in rows:
            table.add_row(*map(Text, row[: len(table.columns)]))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(2)]
    print(title)
    for what, ours, other in (headings, *rows):
        print(f"{what:<{widths[0]}}  {ours:<{widths[1]}}  {other}".rstrip())


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "beyond all bounds" if value > 0 else "unknown"
    return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:,.{4 if abs(value) < 100 else 1}f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _protocol_help() -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in ppl.DESCRIPTIONS.items()) + " (default: paper)"


if __name__ == "__main__":
    sys.exit(main())
