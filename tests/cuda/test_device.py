"""`CupyDevice` against a CuPy made of NumPy: what it hands over, in which order, and what it makes of errors."""

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from billm_format.errors import DoesNotFitError
from billm_rt.cuda import device as cuda_device
from billm_rt.cuda.device import CupyDevice
from billm_rt.cuda.launch import Kernel, Size


class Array(np.ndarray):
    """A NumPy array with the parts of a CuPy array that are used."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        whole = self if self.base is None or not isinstance(self.base, np.ndarray) else self.base
        return SimpleNamespace(ptr=self.ctypes.data, mem=SimpleNamespace(ptr=whole.ctypes.data))

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        self[...] = values


class OutOfMemoryError(Exception):
    """As CuPy's."""


class Cublas(ModuleType):
    """gemmEx as BLAS defines it: matrices column by column."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT = 0, 1, 68, -1

    def gemmEx(self, handle: int, ta: int, tb: int, m: int, n: int, k: int, *rest: Any) -> None:  # noqa: N802
        alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algorithm = rest
        assert (a_type, b_type, c_type, compute, algorithm) == (2, 2, 0, 68, -1)
        assert (scalar(alpha), scalar(beta)) == (1, 0)
        left = columns(a, np.float16, lda, m if ta else k).T if ta else columns(a, np.float16, lda, k)
        right = columns(b, np.float16, ldb, k if tb else n).T if tb else columns(b, np.float16, ldb, n)
        columns(c, np.float32, ldc, n)[:m] = left[:m, :k].astype(np.float32) @ right[:k, :n].astype(np.float32)


def columns(address: int, dtype: Any, leading: int, count: int) -> np.ndarray:
    """Return the matrix [leading, count] that lies at an address column by column."""
    nbytes = leading * count * np.dtype(dtype).itemsize
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(count, leading).T


def scalar(address: int) -> float:
    """Return the float32 at an address."""
    return ctypes.c_float.from_address(address).value


class Function:
    """A compiled kernel that records its launches."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __call__(self, grid: Any, block: Any, values: Any, *, shared_mem: int) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.launches.append((grid, block, values, shared_mem))


class Gpu:
    """A device that is the current one while it is entered."""

    cublas_handle, mem_info = 1, (5_000_000, 80_000_000)

    def __init__(self, current: list[int], index: int) -> None:
        self.current, self.index = current, index

    def use(self) -> None:
        pass

    def __enter__(self) -> "Gpu":
        self.current.append(self.index)
        return self

    def __exit__(self, *error: object) -> None:
        self.current.pop()


class GraphPool:
    """A pool that holds a megabyte until it is emptied, which it cannot be while an array of it is read."""

    malloc = "the graph's pool"
    read = False

    def __init__(self) -> None:
        self.held = 1_000_000

    def total_bytes(self) -> int:
        return self.held

    def free_all_blocks(self) -> None:
        self.held *= self.read


class Stream:
    """A stream that keeps a log of what becomes of it; `ptr` is its number."""

    def __init__(self, log: list[Any], ptr: int = 0, non_blocking: bool = False) -> None:
        self.log, self.ptr, self.non_blocking = log, ptr, non_blocking

    def __enter__(self) -> "Stream":
        self.log.append("enter")
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("exit")

    def synchronize(self) -> None:
        self.log.append(f"synchronize {self.ptr}")

    def begin_capture(self) -> None:
        self.log.append("begin")

    def end_capture(self) -> Any:
        self.log.append("end")
        return SimpleNamespace(launch=lambda: self.log.append("launch"))


@contextmanager
def using_allocator(log: list[Any], allocator: Any) -> Iterator[None]:
    """As CuPy's."""
    log.append(allocator)
    try:
        yield
    finally:
        log.append("allocator back")


def copy(to: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    """As cudaMemcpyAsync; kinds 1 and 2 are to and from the device."""
    assert kind in (1, 2) and stream == 7
    ctypes.memmove(to, source, nbytes)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for CuPy; `modules` lists what was compiled."""
    module: Any = ModuleType("cupy")
    module.modules, module.log = [], []

    def compiled(*, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> Any:
        module.modules.append((code, options, name_expressions, Function()))
        return SimpleNamespace(get_function=lambda name: module.modules[-1][3] if name in name_expressions else None)

    properties = {"name": b"A GPU", "multiProcessorCount": 7, "sharedMemPerMultiprocessor": 102400}
    module.RawModule = compiled
    module.empty = lambda shape, dtype: np.full(shape, 0x55, dtype).view(Array)
    module.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(Array)
    module.asnumpy = np.asarray
    sizes = {"free_bytes": 2_000_000, "used_bytes": 3_000_000, "total_bytes": 5_000_000}
    pool = SimpleNamespace(**{name: partial(int, size) for name, size in sizes.items()}, free_all_blocks=lambda: None)
    module.get_default_memory_pool = lambda: pool
    module.current = []
    module.cuda = SimpleNamespace(
        Device=partial(Gpu, module.current),
        Event=lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None),
        get_current_stream=lambda: Stream(module.log, 7),
        Stream=lambda non_blocking: Stream(module.log, 8, non_blocking),
        MemoryPool=GraphPool,
        using_allocator=lambda allocator: using_allocator(module.log, allocator),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=SimpleNamespace(
            getDeviceProperties=lambda index: properties,
            CUDA_R_16F=2,
            CUDA_R_32F=0,
            CUDARuntimeError=RuntimeError,
            memcpyAsync=copy,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
        ),
    )
    cupyx: Any = ModuleType("cupyx")
    cupyx.empty_pinned = np.empty
    for name, value in (("cupy", module), ("cupyx", cupyx), ("cupy_backends.cuda.libs.cublas", Cublas("cublas"))):
        monkeypatch.setitem(sys.modules, name, value)
    return module


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.int64])
@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 700])
def test_uploads_in_pieces(
    dtype: Any, count: int, cupy: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "_STAGING_BYTES", 100)
    array = rng.integers(0, 100, (count, 3)).astype(dtype)
    array.flags.writeable = False  # as a view of the file is
    device = CupyDevice()
    uploaded = device.upload(array)
    assert (uploaded.dtype, uploaded.shape) == (array.dtype, array.shape)
    assert np.array_equal(device.download(uploaded), array)


def test_a_kernel_is_compiled_once_and_gets_its_arguments(cupy: Any) -> None:
    device = CupyDevice()
    assert (device.name, device.multiprocessors, device.shared_per_multiprocessor) == ("A GPU", 7, 102400)
    array = device.zeros((3,), np.float32)
    for shared in (16, 60000):
        size = Size((4, 5, 6), 64, shared)
        device.launch(Kernel("decoder.cu", "add"), size, array, None, np.uint64(3))
    ((code, options, names, function),) = cupy.modules
    assert "#include" not in code and "void add(" in code
    assert (options, names) == (("--std=c++17",), ("add",))
    grid, block, (first, second, third), shared = function.launches[-1]
    assert (grid, block, shared) == ((4, 5, 6), (64, 1, 1), 60000)
    assert first is array and type(second) is np.uintp and second == 0 and type(third) is np.uint64


def test_the_product_of_halves_has_the_right_operands(cupy: Any, rng: np.random.Generator) -> None:
    device = CupyDevice()
    x, weight = (rng.integers(-9, 9, shape).astype(np.float16) for shape in ((5, 8), (3, 8)))
    out = device.empty((5, 3), np.float32)
    device.multiply_halves(device.upload(x), device.upload(weight), out)
    assert np.array_equal(out, x.astype(np.float32) @ weight.astype(np.float32).T)


def test_no_memory_is_said_with_what_is_there(cupy: Any) -> None:
    def full(shape: Any, dtype: Any) -> Any:
        raise OutOfMemoryError("Out of memory allocating 9 bytes")

    device = CupyDevice()
    cupy.empty = full
    with pytest.raises(DoesNotFitError, match=r"allocating 9 bytes; 5 MB of 80 MB are free: take a smaller --ctx"):
        device.empty((9,), np.uint8)


@pytest.mark.parametrize(("status", "kind"), [(3, DoesNotFitError), (13, RuntimeError)])
def test_no_memory_inside_the_library_is_told_from_its_other_errors(
    status: int, kind: type[Exception], cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CUBLASError(RuntimeError):
        def __init__(self, status: int) -> None:
            super().__init__(f"status {status}")
            self.status = status

    def fail(*arguments: Any) -> None:
        raise CUBLASError(status)

    device = CupyDevice()
    monkeypatch.setattr(sys.modules["cupy_backends.cuda.libs.cublas"], "gemmEx", fail)
    x = device.zeros((1, 8), np.float16)
    with pytest.raises(kind, match=f"status {status}"):
        device.multiply_halves(x, x, device.empty((1, 1), np.float32))


def test_free_is_what_the_driver_and_the_pool_have(cupy: Any) -> None:
    assert CupyDevice().free_bytes() == 7_000_000


def test_usage_counts_what_recordings_hold(cupy: Any) -> None:
    device = CupyDevice()
    assert device.usage() == (3_000_000, 5_000_000, 75_000_000)
    recording = device.record(lambda: None)
    assert device.usage() == (4_000_000, 6_000_000, 75_000_000)
    (pool, _) = recording.holds
    pool.read = True  # by somebody who has the result
    del recording
    assert device.usage() == (4_000_000, 6_000_000, 75_000_000)
    pool.read = False
    assert device.usage() == (3_000_000, 5_000_000, 75_000_000)
    assert pool.held == 0


def test_work_goes_to_the_device_whichever_one_is_current(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, where = CupyDevice(3), []
    graph = SimpleNamespace(launch=lambda: where.append(tuple(cupy.current)))
    monkeypatch.setattr(Stream, "end_capture", lambda self: graph)
    array = device.zeros((3,), np.float32)

    def work() -> None:
        where.append(tuple(cupy.current))
        device.launch(Kernel("decoder.cu", "add"), Size((1, 1, 1), 32), array, None, np.uint64(3))

    device.record(work).replay()
    assert where == [(3,), (3,), (3,)] and not cupy.current


def test_copies_from_and_to_page_locked_memory(cupy: Any, rng: np.random.Generator) -> None:
    device = CupyDevice()
    here, back, there = device.pinned((5,), np.int32), device.pinned((3,), np.int32), device.zeros((5,), np.int32)
    here[:] = rng.integers(0, 1000, 5)
    device.copy_in(there, here)
    device.copy_out(back, there[1:4])
    device.wait()
    assert np.array_equal(back, here[1:4]) and cupy.log == ["synchronize 7"]


def test_a_recording_is_a_captured_graph(cupy: Any) -> None:
    """Done once, then captured, on a stream and with memory of its own; what it uses stays alive with it."""
    device = CupyDevice()
    array, here = device.zeros((3,), np.float32), device.pinned((3,), np.float32)

    def work() -> str:
        device.launch(Kernel("decoder.cu", "add"), Size((1, 1, 1), 32), array, None, np.uint64(3))
        device.copy_out(here, array)
        cupy.log.append("work")
        return "result"

    def copied(*arguments: int) -> None:
        assert arguments[2:] == (12, 2, 7)

    cupy.cuda.runtime.memcpyAsync = copied
    recording = device.record(work)
    recording.replay()
    before, capture = ["synchronize 7", "enter", "the graph's pool", "work", "synchronize 8"], ["begin", "work", "end"]
    assert cupy.log == [*before, *capture, "allocator back", "exit", "launch"]
    assert recording.result == "result"
    pool, kept = recording.holds
    assert pool.malloc == "the graph's pool" and [id(held) for held in kept] == [id(array), id(here), id(array)]
    work()
    assert len(recording.holds[1]) == 3


def test_a_recording_does_not_hold_its_own_intermediates(cupy: Any) -> None:
    """Its pool is held anyway, and a layer is to have the memory that the one before it gave back."""
    device, weight = CupyDevice(), CupyDevice().zeros((8,), np.float32)
    between: list[weakref.ref[Any]] = []

    def work() -> Any:
        for _ in range(30):
            out = device.empty((8,), np.float32)
            device.launch(Kernel("decoder.cu", "add"), Size((1, 1, 1), 32), out[2:], weight[2:], np.uint64(3))
            between.append(weakref.ref(out))
        return out

    recording = device.record(work)
    cupy.modules[0][3].launches.clear()  # the stand-in for a kernel holds what it was given
    _, kept = recording.holds
    assert len(kept) == 30 and all(np.shares_memory(held, weight) for held in kept)
    assert [reference() is None for reference in between] == [True] * 59 + [False]


def test_a_capture_that_fails_is_ended(cupy: Any) -> None:
    device, times = CupyDevice(), []

    def work() -> None:
        times.append(1)
        if len(times) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.record(work)
    assert cupy.log[-3:] == ["end", "allocator back", "exit"]
    device.launch(Kernel("decoder.cu", "add"), Size((1, 1, 1), 32), device.zeros((3,), np.float32))
