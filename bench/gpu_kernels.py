"""Speed of the GPU products per shape and number of tokens, beside a device copy and cuBLAS in float16.

    PYTHONPATH=.:format python bench/gpu_kernels.py [--device N] [--only TEXT] [--json]

Needs CuPy and nothing of this project installed. Each figure is the median of many runs, timed by CUDA events. A run
walks through copies of the weight that together exceed the second-level cache twice, as the layers of a model do.
Products of few tokens are replayed from a CUDA graph; what uses cuBLAS (which CuPy does not capture) is queued behind a
kernel that holds the stream until all is queued, so that neither counts the time of Python.

GB/s are the bytes of the file that are read; "of copy" is their share of what a device copy moves (reads and writes) in
the same process; "x cuBLAS" is the time of cupy.matmul, float16 weights and activations, over ours.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError
from billm_format.layout import num_blocks, row_bytes
from billm_format.packing import PackedLinear
from billm_rt.cuda import device as cuda_device
from billm_rt.cuda import launch
from billm_rt.cuda.device import CupyDevice
from billm_rt.cuda.linear import LinearGroup

BLOCK = 128
SHAPES = [
    ("LLaMA-70B gate, up", 28672, 8192),
    ("LLaMA-70B down", 8192, 28672),
    ("LLaMA-7B gate, up", 11008, 4096),
    ("LLaMA-7B down", 4096, 11008),
    ("LLaMA-7B q, k, v, o", 4096, 4096),
    ("Qwen2.5-0.5B gate, up", 4864, 896),
    ("SmolLM2-135M gate, up", 1536, 576),
    ("SmolLM2-135M q, o", 576, 576),
]
TOKENS = (1, 2, 4, 8, 32, 64, 512, 2048, 4096)
RUNS = 25
# A stream takes about a thousand launches before it makes its caller wait.
MOST_QUEUED = 100
_HOLD = r"""
extern "C" __global__ void hold(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""

Call = Callable[[], object]


def random_linear(rng: np.random.Generator, rows: int, cols: int) -> PackedLinear:
    """Return a weight whose bytes are random and a tenth of whose columns is salient."""
    stride, blocks = row_bytes(cols), num_blocks(cols, BLOCK)
    sign, second = (np.frombuffer(rng.bytes(rows * stride), np.uint8).reshape(rows, stride) for _ in range(2))
    salient = np.packbits(rng.random(stride * 8) < 0.1)
    scales = np.frombuffer(rng.bytes(rows * blocks * 4), np.uint8).reshape(rows, blocks, 4)
    return PackedLinear(rows, cols, BLOCK, sign, second, salient, scales, np.full(rows, 0.001, np.float16))


def random_values(rows: int, cols: int) -> NDArray[np.float32]:
    """Return normal values, a million of them over and over: what the arithmetic draws depends on its numbers."""
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    return np.resize(values, (rows, cols))


def file_bytes(linear: PackedLinear) -> int:
    """Return the bytes of the file that one product reads."""
    return linear.sign.nbytes + linear.second.nbytes + linear.scales.nbytes + linear.row_scale.nbytes


def copies(nbytes: int, cache: int) -> int:
    """Return how many copies of a weight exceed a cache twice."""
    return 1 + 2 * cache // nbytes


class Timer:
    """Times by CUDA events on one stream, in seconds per call."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._hold = cupy.RawKernel(_HOLD, "hold")

    def graph(self, calls: Sequence[Call]) -> float:
        """Capture the calls once and replay them."""
        with self._stream as stream:
            for call in calls:
                call()
            stream.synchronize()
            stream.begin_capture()
            for call in calls:
                call()
            graph = stream.end_capture()
            return self._median(graph.launch, len(calls), hold=1_000_000)

    def queue(self, calls: Sequence[Call]) -> float:
        """Queue the calls behind a kernel that holds the stream meanwhile."""
        with self._stream:

            def run() -> None:
                for call in calls:
                    call()

            return self._median(run, len(calls), hold=10_000_000 + 100_000 * len(calls))

    def _median(self, run: Call, calls: int, hold: int) -> float:
        events = self._cupy.cuda.Event, self._cupy.cuda.Event
        times = []
        for _ in range(RUNS + 3):
            start, stop = (event() for event in events)
            self._hold((1,), (1,), (np.int64(hold),))  # cycles in which the host gets ahead
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(self._cupy.cuda.get_elapsed_time(start, stop) / 1e3 / calls)
        return statistics.median(times[3:])  # the first ones load and compile


def copy_bandwidth(timer: Timer, nbytes: int = 1 << 30) -> float:
    """Return the bytes per second that a copy inside the device reads and writes."""
    import cupy

    source, target = cupy.zeros(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, nbytes, cupy.cuda.get_current_stream())

    return 2 * nbytes / timer.queue([copy])


def cublas_time(device: CupyDevice, timer: Timer, rows: int, cols: int, tokens: int, cache: int) -> float:
    """Return the time of cupy.matmul in float16."""
    import cupy

    first = device.upload(random_values(rows, cols).astype(np.float16))
    weights = [first, *(first.copy() for _ in range(copies(2 * rows * cols, cache) - 1))]
    x = device.upload(random_values(tokens, cols).astype(np.float16))
    out = cupy.empty((tokens, rows), np.float16)
    calls = [lambda weight=weight: cupy.matmul(x, weight.T, out=out) for weight in weights]
    return timer.queue(calls[:MOST_QUEUED])


def measure(device: CupyDevice, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every shape and number of tokens."""
    import cupy

    rng, timer = np.random.default_rng(0), Timer()
    cache = int(cupy.cuda.runtime.getDeviceProperties(args.device)["l2CacheSize"])
    bandwidth = copy_bandwidth(timer)
    for name, rows, cols in SHAPES:
        if args.only not in name:
            continue
        linear = random_linear(rng, rows, cols)
        nbytes = file_bytes(linear)
        groups = [LinearGroup(device, [linear]) for _ in range(copies(nbytes, cache))]
        for tokens in TOKENS:
            baseline = cublas_time(device, timer, rows, cols, tokens, cache)
            for dtype in (launch.Dtype.FLOAT16, launch.Dtype.FLOAT32):
                numpy_dtype = np.float16 if dtype == launch.Dtype.FLOAT16 else np.float32
                x = device.upload(random_values(tokens, cols).astype(numpy_dtype))
                out = cupy.empty((tokens, rows), numpy_dtype)
                calls = [lambda group=group, x=x, out=out, d=dtype: group.multiply(x, d, out) for group in groups]
                few = tokens < launch.DENSE_TOKENS
                seconds = timer.graph(calls) if few else timer.queue(calls[:MOST_QUEUED])
                yield {
                    "name": name,
                    "rows": rows,
                    "cols": cols,
                    "tokens": tokens,
                    "activations": dtype.name.lower(),
                    "microseconds": round(seconds * 1e6, 2),
                    "gigabytes_per_s": round(nbytes / seconds / 1e9, 1),
                    "share_of_copy": round(nbytes / seconds / bandwidth, 3),
                    "cublas_microseconds": round(baseline * 1e6, 2),
                    "times_faster_than_cublas": round(baseline / seconds, 2),
                }
        del groups
        cupy.get_default_memory_pool().free_all_blocks()


HEADINGS = ("Linear", "out × in", "tokens", "activations", "time, µs", "GB/s", "of copy", "cuBLAS, µs", "× cuBLAS")


def markdown_row(line: dict[str, Any]) -> str:
    """Return one row of the table."""
    cells = (
        line["name"],
        f"{line['rows']} × {line['cols']}",
        line["tokens"],
        line["activations"],
        f"{line['microseconds']:.1f}",
        f"{line['gigabytes_per_s']:,.0f}",
        f"{line['share_of_copy']:.0%}",
        f"{line['cublas_microseconds']:.1f}",
        f"{line['times_faster_than_cublas']:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def benchmark(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table, or one JSON object."""
    why = cuda_device.unavailable_reason(args.device)
    if why is not None:
        raise UsageError(f"--device {args.device}: {why}")
    import cupy

    device = CupyDevice(args.device)
    machine = {
        "device": device.name,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cupy": cupy.__version__,
        "copy_gigabytes_per_s": round(copy_bandwidth(Timer()) / 1e9, 1),
    }
    if not args.json:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
        print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    results = []
    for line in measure(device, args):
        results.append(line)
        if not args.json:
            print(markdown_row(line), flush=True)
    if args.json:
        emit_json("billm-gpu-kernels", 1, machine | {"products": results})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="gpu_kernels")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument("--only", default="", help="measure the shapes whose name holds this text")
    add_common_options(parser)
    return run_command(parser, benchmark, argv)


if __name__ == "__main__":
    raise SystemExit(main())
