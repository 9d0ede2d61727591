"""This runtime beside llama.cpp on one machine: tokens per second and ratios, as a Markdown table.

    PYTHONPATH=.:format python bench/vs_llamacpp.py FILE.billm --llama-bench PATH --gguf A.gguf B.gguf ... \\
        [--threads 1 2] [--rounds 3] [--json]

In every round each program runs once, one after the other, so that whatever else the machine does falls on all of them;
the medians of the rounds are compared, never figures of different runs. Both read a prompt of 512 tokens from an empty
context, and decode 128 tokens from an empty context without sampling. Names of GGUF types are what their makers call
them: the sizes tell the bits.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError

ROOT = Path(__file__).parents[1]

# Load of other programs up to which figures at several threads can be believed.
_QUIET_LOAD = 0.5
_BUSY = (
    "Other programs were running: llama.cpp's threads spin while they wait for each other, so that at more than one "
    "thread its figures are far too low. Repeat this on an idle machine."
)


@dataclass(frozen=True)
class Run:
    """One program's figures in one round."""

    name: str
    nbytes: int  # of the file
    prompt: float  # tokens per second
    decode: float
    build: str  # what ran: a commit, an instruction set


@dataclass(frozen=True)
class Row:
    """One file at one number of threads: medians, and how many times as fast the `.billm` file is."""

    threads: int
    name: str
    nbytes: int
    prompt: float
    decode: float
    prompt_ratio: float
    decode_ratio: float


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="vs_llamacpp")
    parser.add_argument("model", type=Path, metavar="FILE.billm")
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH", help="the program of llama.cpp")
    parser.add_argument("--gguf", type=Path, nargs="+", required=True, metavar="FILE", help="models to compare with")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens to read (default: %(default)s)")
    parser.add_argument("--gen", type=int, default=128, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), default=16, help="(default: %(default)s)")
    add_common_options(parser)
    return parser


def compare(args: argparse.Namespace) -> None:
    """Run everything and print the table, or one JSON object."""
    if missing := [path for path in (args.model, args.llama_bench, *args.gguf) if not path.is_file()]:
        raise UsageError(f"{missing[0]}: no such file")
    before = os.getloadavg()[0]
    runs: dict[int, list[list[Run]]] = {threads: [] for threads in args.threads}
    for number in range(args.rounds):
        for threads in args.threads:
            runs[threads].append(list(_round(args, threads)))
            if not args.quiet:
                print(f"round {number + 1} of {args.rounds}, threads {threads}: done", file=sys.stderr)
    rows = [row for threads, rounds in runs.items() for row in aggregate(threads, rounds)]
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "python": platform.python_version(),
        "billm_rt": f"{_commit()}, {runs[args.threads[0]][0][0].build}, int{args.activation_bits} activations",
        "llama_cpp": runs[args.threads[0]][0][1].build,
        "rounds": args.rounds,
        "prompt": args.prompt,
        "gen": args.gen,
    }
    if args.json:
        samples = {str(threads): [[vars(run) for run in one] for one in rounds] for threads, rounds in runs.items()}
        emit_json("billm-vs-llamacpp", 1, {"machine": machine, "rows": [vars(row) for row in rows], "rounds": samples})
    else:
        print(table(machine, rows))


def _round(args: argparse.Namespace, threads: int) -> Iterator[Run]:
    """Run each program once: this one first."""
    size = ["--prompt", str(args.prompt), "--gen", str(args.gen), "--repeat", "1"]
    options = ["--threads", str(threads), "--activation-bits", str(args.activation_bits), "--json", "--quiet"]
    yield parse_billm(_output([sys.executable, "-m", "billm_rt.bench_cli", args.model, *size, *options]))
    for gguf in args.gguf:
        size = ["-p", str(args.prompt), "-n", str(args.gen), "-r", "1"]
        text = _output([args.llama_bench, "-m", gguf, *size, "-t", str(threads), "-o", "json"])
        yield parse_llama(text, gguf.stat().st_size)


def _output(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"{Path(command[0]).name} ended with code {done.returncode}: {last or 'it said nothing'}")
    return done.stdout


def parse_billm(text: str) -> Run:
    """Return the figures in the output of `billm-bench --json`."""
    report = json.loads(text)
    name, decode = Path(report["file"]).name, report["decode_tokens_per_s"]
    return Run(name, report["file_bytes"], report["prompt_tokens_per_s"], decode, report["isa"])


def parse_llama(text: str, nbytes: int) -> Run:
    """Return the figures in the output of `llama-bench -o json`, of a model in a file of `nbytes`.

    The output is a list with an entry for the prompt and one for decoding. Raises UsageError where either is missing.
    """
    entries: list[dict[str, Any]] = json.loads(text)
    prompts = [entry for entry in entries if entry["n_prompt"] and not entry["n_gen"]]
    decodes = [entry for entry in entries if entry["n_gen"] and not entry["n_prompt"]]
    if len(prompts) != 1 or len(decodes) != 1:
        found = f"{len(prompts)} and {len(decodes)}"
        raise UsageError(f"llama-bench: wanted one figure for the prompt and one for decoding, found {found}")
    (prompt,), (decode,) = prompts, decodes
    name = Path(prompt["model_filename"]).name
    return Run(name, nbytes, prompt["avg_ts"], decode["avg_ts"], prompt["build_commit"])


def aggregate(threads: int, rounds: Sequence[Sequence[Run]]) -> list[Row]:
    """Return a row per file, in the order of the runs, the `.billm` file first: medians, and ratios of medians."""
    by_name: dict[str, list[Run]] = defaultdict(list)
    for one in rounds:
        for run in one:
            by_name[run.name].append(run)
    ours = rounds[0][0].name
    prompts = {name: statistics.median(run.prompt for run in runs) for name, runs in by_name.items()}
    decodes = {name: statistics.median(run.decode for run in runs) for name, runs in by_name.items()}
    return [
        Row(
            threads,
            name,
            runs[0].nbytes,
            prompts[name],
            decodes[name],
            prompts[ours] / prompts[name],
            decodes[ours] / decodes[name],
        )
        for name, runs in by_name.items()
    ]


def table(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the Markdown table under a line that says where, when busy, and of what it was measured."""
    busy = " to ".join(map(str, machine["load"]))
    prompt, gen = f"prompt of {machine['prompt']}, tokens/s", f"decoding {machine['gen']}, tokens/s"
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load {busy}; Python {machine['python']}; "
        f"billm-rt {machine['billm_rt']}; llama.cpp {machine['llama_cpp']}; medians of {machine['rounds']} rounds.",
        "",
        f"| threads | file | MB | {prompt} | billm is | {gen} | billm is |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            str(row.threads),
            row.name,
            f"{row.nbytes / 1e6:.1f}",
            f"{row.prompt:.1f}",
            f"{row.prompt_ratio:.2f} ×",
            f"{row.decode:.1f}",
            f"{row.decode_ratio:.2f} ×",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if machine["load"][0] > _QUIET_LOAD:
        lines += ["", _BUSY]
    return "\n".join(lines)


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of this source tree; "dirty" says that it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), compare, argv)


if __name__ == "__main__":
    raise SystemExit(main())
