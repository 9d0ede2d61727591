"""A GPU through CuPy: memory from its pool, kernels compiled by NVRTC and cached by it on disk, the caller's stream."""

import importlib.util
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from billm_format.errors import DoesNotFitError
from billm_rt.cuda.launch import Kernel, Size
from billm_rt.cuda.source import source

# How CuPy's other errors say it: the runtime's and the driver's for code, cuBLAS's for its workspace.
_OUT_OF_MEMORY = {("CUDARuntimeError", 2), ("CUDADriverError", 2), ("CUBLASError", 3)}

_OPTIONS = ("--std=c++17",)
# Two page-locked buffers of this size carry what is uploaded: the copy from the file into one overlaps the other's.
_STAGING_BYTES = 32 << 20
# What a block may have without asking for it.
_PLAIN_SHARED = 48 << 10

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class Recording:
    """Launches and copies that are done again by one call."""

    result: Any  # what the work returned: arrays that every replay writes
    replay: Callable[[], None]
    holds: Any  # the memory that it works on


class Usage(NamedTuple):
    """Bytes of device memory."""

    arrays: int  # in use, what recordings work on included
    pool: int  # held by this process's pools, in use or not
    card: int  # in use on the whole card as the driver sees it, by this process and others


class Device(Protocol):
    """Where the kernels run. Arrays are those of a NumPy-like library; only kernels compute on them."""

    name: str
    multiprocessors: int
    shared_per_multiprocessor: int  # bytes

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of the array on the device."""
        ...

    def download(self, array: Any) -> NDArray[Any]:
        """Return a device array as a NumPy array, after all work before it."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array whose elements mean nothing yet."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array of zeros."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a page-locked array on the host, for `copy_in` and `copy_out`."""
        ...

    def copy_in(self, target: Any, source: NDArray[Any]) -> None:
        """Copy a page-locked array to the device without waiting: it must stay as it is until then."""
        ...

    def copy_out(self, target: NDArray[Any], source: Any) -> None:
        """Copy from the device to a page-locked array, there after the next `wait`."""
        ...

    def wait(self) -> None:
        """Wait for all work so far."""
        ...

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record the launches and copies of `work`, which is done at least once meanwhile; replay for the result.

        Their arguments, sizes and addresses stay what they are; what the arrays and page-locked memory hold does not.
        """
        ...

    def free_bytes(self) -> int:
        """Return how much memory can still be had."""
        ...

    def usage(self) -> Usage:
        """Return how much memory is taken."""
        ...

    def trim(self) -> None:
        """Give what is held and not in use back to the driver."""
        ...

    def copy(self, target: Any, source: Any) -> None:
        """Copy from a device array to another of its shape."""
        ...

    def pointer(self, array: Any) -> int:
        """Return the address of the array's first element."""
        ...

    def launch(self, kernel: Kernel, size: Size, *arguments: Any) -> None:
        """Run a kernel: arrays and None become pointers, NumPy scalars values of their type."""
        ...

    def multiply_halves(self, x: Any, weight: Any, out: Any) -> None:
        """out = x weight^T: float16 [tokens, width] and [rows, width], float32 sums [tokens, rows]."""
        ...


def unavailable_reason(index: int = 0) -> str | None:
    """Return in a few words why GPU number `index` cannot be used, None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'billm-rt[cuda12]' or 'billm-rt[cuda13]')"
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        return f"CuPy cannot be loaded: {str(error).strip().splitlines()[-1]}"
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
        if index >= count:
            return f"there are {count} CUDA devices, counted from 0"
        capability = cupy.cuda.Device(index).compute_capability
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if int(capability) >= 80 else f"its compute capability is {capability}, wanted 80 (Ampere) or later"


class _Capture:
    """What the launches of a graph under way read and write that is not the memory of its own pool."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self._own: set[int] = set()  # addresses in the graph's pool, which never gives them to anybody else

    def own(self, array: Any) -> None:
        """Note an array that comes from the graph's pool."""
        self._own.add(array.data.mem.ptr)

    def keep(self, *arguments: Any) -> None:
        """Keep what is not the graph's own: that would take the memory of every layer at once."""
        for value in arguments:
            if isinstance(value, np.generic):
                continue
            memory = getattr(value.data, "mem", None)  # page-locked arrays have none
            if memory is None or memory.ptr not in self._own:
                self.kept.append(value)


def _there(
    method: "Callable[Concatenate[CupyDevice, P], T]",
) -> "Callable[Concatenate[CupyDevice, P], T]":
    """Have the device's methods work on it whichever one is current: that is every thread's own affair."""

    @wraps(method)
    def on_device(self: "CupyDevice", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._device:
            return method(self, *args, **kwargs)

    return on_device


class CupyDevice:
    """One GPU. Work goes to the stream that is CuPy's current one there when a method is called."""

    def __init__(self, index: int = 0) -> None:
        self._cupy = cupy = import_module("cupy")
        self._device = cupy.cuda.Device(index)
        self._device.use()  # what else this thread does with its arrays is meant there
        self._runtime = cupy.cuda.runtime
        self._pinned = import_module("cupyx").empty_pinned
        properties = self._runtime.getDeviceProperties(index)
        self.name = properties["name"].decode()
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.shared_per_multiprocessor = int(properties["sharedMemPerMultiprocessor"])
        self._kernels: dict[Kernel, Any] = {}
        self._pools: list[Any] = []  # of recordings
        self._retired: list[Any] = []  # those whose recordings are gone
        self._capture: _Capture | None = None  # of the graph that is being captured
        self._staging: list[tuple[Any, Any]] = []  # (page-locked bytes, event behind the last copy from them)

    @_there
    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of the array on the device, through page-locked memory."""
        out = self.empty(array.shape, array.dtype)
        if array.nbytes == 0:
            return out
        cupy, stream = self._cupy, self._cupy.cuda.get_current_stream()
        target = out.reshape(-1).view(np.uint8)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if not self._staging:
            self._staging = [(self.pinned((_STAGING_BYTES,), np.uint8), cupy.cuda.Event()) for _ in range(2)]
        for start in range(0, data.size, _STAGING_BYTES):
            buffer, copied = self._staging[0]
            self._staging.reverse()
            copied.synchronize()
            part = data[start : start + _STAGING_BYTES]
            buffer[: part.size] = part
            target[start : start + part.size].set(buffer[: part.size], stream=stream)
            copied.record(stream)
        return out

    @_there
    def download(self, array: Any) -> NDArray[Any]:
        """Return a device array as a NumPy array, after all work before it."""
        found: NDArray[Any] = self._cupy.asnumpy(array)
        return found

    @_there
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array from CuPy's pool; DoesNotFitError where the device has no memory left."""
        out = self._allocated(lambda: self._cupy.empty(shape, dtype))
        if self._capture is not None:
            self._capture.own(out)
        return out

    @_there
    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array of zeros; DoesNotFitError as `empty`."""
        return self._allocated(lambda: self._cupy.zeros(shape, dtype))

    @_there
    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a page-locked array."""
        array: NDArray[Any] = self._pinned(shape, dtype)
        return array

    @_there
    def copy_in(self, target: Any, source: NDArray[Any]) -> None:
        """Copy to the device, in the order of the current stream."""
        self._copy(target.data.ptr, source.ctypes.data, source.nbytes, self._runtime.memcpyHostToDevice)
        self._keep(target, source)

    @_there
    def copy_out(self, target: NDArray[Any], source: Any) -> None:
        """Copy to the host, in the order of the current stream."""
        self._copy(target.ctypes.data, source.data.ptr, source.nbytes, self._runtime.memcpyDeviceToHost)
        self._keep(target, source)

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        # Not the methods of arrays: those refuse while a graph is captured, and page-locked memory may be copied then.
        self._runtime.memcpyAsync(to, source, nbytes, kind, self._cupy.cuda.get_current_stream().ptr)

    def _keep(self, *arguments: Any) -> None:
        if self._capture is not None:
            self._capture.keep(*arguments)

    @_there
    def wait(self) -> None:
        """Wait for the current stream."""
        self._cupy.cuda.get_current_stream().synchronize()

    @_there
    def record(self, work: Callable[[], Any]) -> Recording:
        """Capture a CUDA graph; it is launched on what is the current stream then.

        What `work` allocates comes from a pool of the graph's own: nobody else gets memory that a replay writes, and a
        layer can have what the one before it gave back. Done once before the capture, it compiles what it needs and
        leaves the pool with all the memory that it takes.
        """
        cuda = self._cupy.cuda
        pool, capture = cuda.MemoryPool(), _Capture()
        self.wait()
        self._free_retired()
        with cuda.Stream(non_blocking=True) as stream, cuda.using_allocator(pool.malloc):
            work()
            stream.synchronize()
            stream.begin_capture()
            self._capture = capture
            try:
                result = work()
            except BaseException:
                with suppress(self._runtime.CUDARuntimeError, RuntimeError):
                    stream.end_capture()
                raise
            finally:
                self._capture = None
            graph = stream.end_capture()

        def replay() -> None:
            with self._device:
                graph.launch()

        self._pools.append(pool)
        recording = Recording(result, replay, (pool, capture.kept))
        weakref.finalize(recording, self._retired.append, pool)
        return recording

    def _free_retired(self) -> None:
        """Free what recordings that are gone have left, results that are still read apart: no pool does of itself."""
        for pool in tuple(self._retired):
            pool.free_all_blocks()
            if not pool.total_bytes():
                self._retired.remove(pool)
                self._pools.remove(pool)

    @_there
    def free_bytes(self) -> int:
        """Return what the driver has free and what the pool holds without using it."""
        free, _ = self._device.mem_info
        return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    @_there
    def usage(self) -> Usage:
        """Return what the pools and the driver say."""
        pool, (free, total) = self._cupy.get_default_memory_pool(), self._device.mem_info
        self._free_retired()
        recorded = sum(int(own.total_bytes()) for own in self._pools)
        return Usage(int(pool.used_bytes()) + recorded, int(pool.total_bytes()) + recorded, int(total) - int(free))

    @_there
    def trim(self) -> None:
        """Empty CuPy's pool of what is free; the driver waits for the work that still uses it."""
        self._free_retired()
        self._cupy.get_default_memory_pool().free_all_blocks()

    @_there
    def copy(self, target: Any, source: Any) -> None:
        """Copy, in the order of the current stream."""
        target[...] = source

    def pointer(self, array: Any) -> int:
        """Return the address of the array's first element."""
        return int(array.data.ptr)

    @_there
    def launch(self, kernel: Kernel, size: Size, *arguments: Any) -> None:
        """Run a kernel on the current stream; its first use compiles it, or finds it in CuPy's cache."""
        function = self._kernels.get(kernel)
        if function is None:
            module = self._cupy.RawModule(
                code=source(kernel.file), options=_OPTIONS, name_expressions=(kernel.expression,)
            )
            function = self._kernels[kernel] = self._allocated(lambda: module.get_function(kernel.expression))
        if size.shared > _PLAIN_SHARED and function.max_dynamic_shared_size_bytes < size.shared:
            function.max_dynamic_shared_size_bytes = size.shared
        values = tuple(np.uintp(0) if value is None else value for value in arguments)
        self._keep(*values)
        function(size.grid, (size.threads, 1, 1), values, shared_mem=size.shared)

    @_there
    def multiply_halves(self, x: Any, weight: Any, out: Any) -> None:
        """out = x weight^T by cuBLAS, float16 products in float32 sums."""
        cublas = import_module("cupy_backends.cuda.libs.cublas")
        half, single = self._cupy.cuda.runtime.CUDA_R_16F, self._cupy.cuda.runtime.CUDA_R_32F
        (tokens, width), rows = x.shape, weight.shape[0]
        one, zero = np.ones((), np.float32), np.zeros((), np.float32)
        handle = self._allocated(lambda: self._device.cublas_handle)
        # cuBLAS counts columns first, so that out is its transpose there: [rows, tokens] = weight x^T.
        self._allocated(lambda: cublas.gemmEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, rows, tokens, width,
            one.ctypes.data, weight.data.ptr, half, width, x.data.ptr, half, width,
            zero.ctypes.data, out.data.ptr, single, rows, cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
        ))  # fmt: skip

    def _allocated(self, allocate: Callable[[], T]) -> T:
        try:
            return allocate()
        except Exception as error:
            full = isinstance(error, self._cupy.cuda.memory.OutOfMemoryError)
            if not full and (type(error).__name__, getattr(error, "status", None)) not in _OUT_OF_MEMORY:
                raise
            free, total = self._device.mem_info
            raise DoesNotFitError(
                f"{self.name}: {error}; {free / 1e6:,.0f} MB of {total / 1e6:,.0f} MB are free: "
                "take a smaller --ctx, or --device cpu"
            ) from error
