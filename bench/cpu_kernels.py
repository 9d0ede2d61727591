"""Speed of the CPU products per shape: decoding (one token) and prompts (512 tokens), at 8 and at 16 bits.

    PYTHONPATH=.:format python bench/cpu_kernels.py [--threads N] [--isa NAME] [--json]

Decoding walks through copies of the weight that together exceed the caches, as the layers of a model do; GB/s counts
the bytes of the file that are read, beside their share of the read bandwidth that the same threads reach on plain
memory, in pieces of the same size. Times are lower quartiles: what a busy machine adds is no property of a kernel.
The last column compares with NumPy's float32 product of the dequantized weight, also from copies that exceed the
caches; its BLAS takes its own number of threads from OMP_NUM_THREADS.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError
from billm_format.layout import num_blocks, row_bytes
from billm_format.packing import PackedLinear
from billm_rt import cpu

BLOCK = 128
LINEARS = [
    ("SmolLM2-135M q, o", 576, 576),
    ("SmolLM2-135M k, v", 192, 576),
    ("SmolLM2-135M gate, up", 1536, 576),
    ("SmolLM2-135M down", 576, 1536),
    ("Qwen2.5-0.5B q, o", 896, 896),
    ("Qwen2.5-0.5B gate, up", 4864, 896),
    ("Qwen2.5-0.5B down", 896, 4864),
    ("LLaMA-7B q, k, v, o", 4096, 4096),
    ("LLaMA-7B gate, up", 11008, 4096),
]
HEAD = ("SmolLM2-135M head, int8", 49152, 576)


def typical_time(call: Callable[[int], object], seconds: float) -> float:
    """Return the lower quartile of the durations of call(0), call(1), ... over about `seconds`, after a warm-up."""
    call(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times)[0]


def piecewise_bandwidth(threads: int, megabytes: int, piece: int) -> float:
    """Return the bytes per second that `threads` threads read from memory, `piece` bytes at a time, of `megabytes`."""
    words = piece // 8
    pieces = [np.array_split(part, threads) for part in np.ones((1 + (megabytes << 20) // piece, words), np.uint64)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = typical_time(lambda i: list(pool.map(np.bitwise_or.reduce, pieces[i % len(pieces)])), 1.0)
    return words * 8 / seconds


def random_linears(rng: np.random.Generator, rows: int, cols: int, megabytes: int) -> list[PackedLinear]:
    """Return weights of one shape that together fill about `megabytes`."""
    stride, blocks = row_bytes(cols), num_blocks(cols, BLOCK)
    sizes = (rows * stride, rows * stride, rows * blocks * 4)
    salient = np.packbits(rng.random(stride * 8) < 0.1)
    weights = []
    for _ in range(1 + (megabytes << 20) // sum(sizes)):
        sign, second, scales = (np.frombuffer(rng.bytes(size), np.uint8) for size in sizes)
        planes = sign.reshape(rows, stride), second.reshape(rows, stride)
        scale = np.full(rows, 0.001, np.float16)
        weights.append(PackedLinear(rows, cols, BLOCK, *planes, salient, scales.reshape(rows, blocks, 4), scale))
    return weights


def numpy_time(rng: np.random.Generator, rows: int, cols: int, tokens: int, args: argparse.Namespace) -> float:
    """Return the time of NumPy's float32 product of this shape."""
    copies = 1 + (args.working_set << 20) // (rows * cols * 4) if tokens == 1 else 1
    weight = rng.standard_normal((rows, cols), np.float32)
    weights = [weight.copy() for _ in range(copies)]
    x = rng.standard_normal((tokens, cols), np.float32)
    return typical_time(lambda i: x @ weights[i % copies].T, args.seconds)


Product = Callable[[Any, cpu.QuantizedActivations], Any]


def measure(
    rng: np.random.Generator, name: str, weights: Sequence[Any], product: Product, nbytes: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Measure `product` of copies of one weight, each `nbytes` in the file: decoding, then a prompt, 8 and 16 bits."""
    rows, cols = (weights[0].rows, weights[0].cols) if isinstance(weights[0], PackedLinear) else weights[0].shape
    bandwidth = piecewise_bandwidth(cpu.threads(), args.working_set, nbytes)
    for tokens in (1, args.tokens):
        used = weights if tokens == 1 else weights[:1]
        baseline = numpy_time(rng, rows, cols, tokens, args)
        for bits in (8, 16):
            x = cpu.quantize(rng.standard_normal((tokens, cols), np.float32), BLOCK, bits=bits)
            for weight in used:
                product(weight, x)  # the first use checks a weight: not what is measured
            seconds = typical_time(partial(lambda used, x, i: product(used[i % len(used)], x), used, x), args.seconds)
            yield {
                "name": name,
                "rows": rows,
                "cols": cols,
                "tokens": tokens,
                "bits": bits,
                "microseconds": round(seconds * 1e6, 2),
                "giga_macs_per_s": round(rows * cols * tokens / seconds / 1e9, 2),
                "gigabytes_per_s": round(nbytes / seconds / 1e9, 2) if tokens == 1 else None,
                "share_of_bandwidth": round(nbytes / seconds / bandwidth, 3) if tokens == 1 else None,
                "times_faster_than_numpy": round(baseline / seconds, 2),
            }


def products(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every shape."""
    for name, rows, cols in LINEARS:
        if args.only not in name:
            continue
        linears = random_linears(rng, rows, cols, args.working_set)
        nbytes = 2 * linears[0].sign.nbytes + linears[0].scales.nbytes + linears[0].row_scale.nbytes
        yield from measure(rng, name, linears, cpu.binary_linear, nbytes, args)
    name, rows, cols = HEAD
    if args.only not in name:
        return
    count = 1 + (args.working_set << 20) // (rows * cols)
    tables = [np.frombuffer(rng.bytes(rows * cols), np.int8).reshape(rows, cols) for _ in range(count)]
    scale = np.full(rows, 0.001, np.float16)
    yield from measure(rng, name, tables, lambda table, x: cpu.int8_linear(table, scale, x), rows * (cols + 2), args)


def benchmark(args: argparse.Namespace) -> None:
    """Measure every shape and print the table, or one JSON object."""
    rng = np.random.default_rng(0)
    try:
        cpu.set_threads(args.threads or cpu.threads())
        cpu.select_isa(args.isa or cpu.isa())
    except ValueError as error:
        raise UsageError(str(error)) from error
    machine = {"isa": cpu.isa(), "threads": cpu.threads()}
    if not args.json:
        print(f"{machine['isa']}, {machine['threads']} threads")
        columns = (
            f"{'rows x cols':>13} {'tokens':>6} {'bits':>4} {'time':>12} {'G MAC/s':>8} {'GB/s':>7} {'of read':>7}"
        )
        print(f"{'':25} {columns} {'vs NumPy':>9}")
    results = []
    for line in products(rng, args):
        results.append(line)
        if not args.json:
            print_line(line)
    if args.json:
        emit_json("billm-cpu-kernels", 2, machine | {"products": results})


def print_line(line: dict[str, Any]) -> None:
    """Print one row of the table."""
    share = line["share_of_bandwidth"]
    print(
        f"{line['name']:25} {line['rows']:>5} x {line['cols']:<5} {line['tokens']:>6} {line['bits']:>4} "
        f"{line['microseconds']:>9.1f} us {line['giga_macs_per_s']:>8.1f} {line['gigabytes_per_s'] or '':>7} "
        f"{'' if share is None else f'{share:.0%}':>7} {line['times_faster_than_numpy']:>8.1f}x",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="cpu_kernels")
    parser.add_argument("-t", "--threads", type=int, help="threads (default: all)")
    parser.add_argument("--isa", help=f"instruction set, here one of: {', '.join(cpu.supported_isas())}")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each figure (default: 0.5)")
    parser.add_argument(
        "--working-set", type=int, default=256, help="megabytes that decoding walks through (default: 256)"
    )
    parser.add_argument("--only", default="", help="measure the shapes whose name holds this text")
    add_common_options(parser)
    return run_command(parser, benchmark, argv)


if __name__ == "__main__":
    raise SystemExit(main())
