"""`billm-info FILE`: what is inside a `.billm` file, how many bits it really takes, and whether it is intact."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from billm_format.command import add_common_options, emit_json, run_command

Row = tuple[str, ...]

_HEADER = "header: names, config, checksums"
_SHOWN_VALUE = 100  # characters of a conversion record's value


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    made = argparse.ArgumentParser(prog="billm-info", description="Show what a .billm file holds.")
    made.add_argument("file", metavar="FILE", help="a .billm file")
    made.add_argument(
        "--verify", action="store_true", help="compare every tensor with its checksum (reads all of FILE)"
    )
    made.add_argument("--layers", action="store_true", help="show every binarized Linear")
    add_common_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (3: the file is damaged)."""
    return run_command(parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """Show the file that `args` names; raises BillmError."""
    from billm_format.info import describe
    from billm_format.reader import BillmFile

    with BillmFile.open(args.file) as file:
        if args.verify:
            progress = _Progress(quiet=args.quiet)
            try:
                file.verify(progress)
            finally:
                progress.clear()
        payload = describe(file, layers=args.layers) | {"verified": args.verify}
    if args.json:
        emit_json("billm-info", 1, payload)
    elif sys.stdout.isatty():
        _print_rich(payload)
    else:
        print("\n".join(plain_lines(payload)))


class _Progress:
    """A percentage on stderr while a large file is hashed, where there is someone to see it."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._next = time.monotonic() + 0.5

    def __call__(self, done: int, total: int) -> None:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            sys.stderr.write(f"\rverifying: {100 * done // max(1, total)} % of {_size(total)}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def sections(payload: dict[str, Any]) -> Iterator[tuple[str, Row, list[Row]]]:
    """Yield (title, column names, rows) of every table that `billm-info` shows for `info.describe`'s payload."""
    yield "Model", (), _model_rows(payload)
    yield "Bits per weight", (), _bit_rows(payload)
    yield "Size", ("what", "bytes", "share"), _size_rows(payload)
    yield "Conversion", (), _conversion_rows(payload["conversion"])
    if "linears" in payload:
        names = ("Linear", "rows", "cols", "block", "salient", "sparse", "error")
        yield "Binarized Linears", names, [_linear_row(row) for row in payload["linears"]]


def _model_rows(payload: dict[str, Any]) -> list[Row]:
    config, quantization = payload["config"], payload["quantization"]
    depth, width, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    blocks = sorted({quantization["block_size"], *quantization["overrides"].values()})
    verified = "all checksums match" if payload["verified"] else "header only (--verify checks the data)"
    return [
        ("file", f"{payload['path']}, format {payload['format_version']}"),
        ("checked", verified),
        ("family", config["family"]),
        ("parameters", f"{payload['parameters']:,}"),
        (
            "layers",
            f"{depth} of width {width}, MLP {inner}",
        ),
        ("heads", f"{heads} of width {config['head_dim']}, {groups} for keys and values"),
        ("vocabulary", f"{config['vocab_size']:,} tokens"),
        ("context", f"{config['max_position_embeddings']:,} tokens"),
        ("block size", ", ".join(map(str, blocks))),
        ("column scales", f"{len(quantization['col_scales'])} Linears"),
        ("embeddings", f"{quantization['embedding_bits']} bits, head {'tied' if _tied(config) else 'its own'}"),
    ]


def _tied(config: dict[str, Any]) -> bool:
    return bool(config["tie_word_embeddings"])


def _bit_rows(payload: dict[str, Any]) -> list[Row]:
    bits = payload["bits"]
    return [
        ("Linears, true", f"{bits['true']:.3f} (all their planes, indices and scales)"),
        ("Linears, paper's", f"{bits['paper']:.3f} (N_param of Eq. 14: no group flags, no scales, no index)"),
        ("whole file", f"{bits['file']:.3f} (with embeddings, head, norms, tokenizer)"),
    ]


def _size_rows(payload: dict[str, Any]) -> list[Row]:
    from billm_format.layout import KINDS

    names, total = KINDS | {"header": _HEADER}, payload["file_bytes"]
    rows = [
        (names[kind], f"{size:,}", f"{100 * size / total:.1f} %") for kind, size in payload["sizes"].items() if size
    ]
    return [*rows, ("file", f"{total:,}", _size(total))]


def _conversion_rows(conversion: dict[str, Any]) -> list[Row]:
    """Show the record's own fields, whatever they are, objects field by field; `layers` has a table of its own."""
    rows: list[Row] = []
    for key, value in conversion.items():
        if isinstance(value, dict):
            rows += [(f"{key}: {inner}", _text(item)) for inner, item in value.items()]
        elif key != "layers":
            rows.append((key, _text(value)))
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _linear_row(row: dict[str, Any]) -> Row:
    error = "not recorded" if row["error"] is None else f"{row['error']:.4f}"
    sizes = (str(row["rows"]), str(row["cols"]), str(row["block"]))
    return (row["name"], *sizes, f"{100 * row['salient']:.1f} %", f"{100 * row['sparse']:.1f} %", error)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _clean(cell: str) -> str:
    """Make a cell safe to print: a file's texts must not steer the terminal."""
    from billm_format.header import printable

    return printable(cell, _SHOWN_VALUE) + ("..." if len(cell) > _SHOWN_VALUE else "")


def plain_lines(payload: dict[str, Any]) -> Iterator[str]:
    """Yield the tables as aligned text, for a pipe or a file."""
    for title, names, rows in sections(payload):
        cells = [names] * bool(names) + [tuple(map(_clean, row)) for row in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
        yield f"{title}:"
        for row in cells:
            first, *others = (
                cell.rjust(width) if names and column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  " + "  ".join([first, *others]).rstrip()


def _print_rich(payload: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, names, rows in sections(payload):
        table = Table(title=title, title_justify="left", show_header=bool(names), box=None, padding=(0, 2, 0, 0))
        for column, name in enumerate(names or ("", "")):
            table.add_column(name, justify="right" if names and column else "left")
        for row in rows:
            table.add_row(*(Text(_clean(cell)) for cell in row))
        console.print(table)
        console.print()


if __name__ == "__main__":
    sys.exit(main())
