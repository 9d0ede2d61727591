"""The kernels on the CPU: their sources compiled by the C++ compiler, emulation.h in the place of intrinsics.cuh."""

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_rt.cuda.device import Recording, Usage
from billm_rt.cuda.launch import Kernel, Size
from billm_rt.cuda.source import source

_EMULATION = Path(__file__).with_name("emulation.h")
_ENTRY = """
#include <map>
#include <string>
extern "C" const char* emulate(
    const char* name, const unsigned* grid, const unsigned* block, size_t shared, void** values
) {
    static const std::map<std::string, void (*)(void**)> kernels = {
        %s
    };
    auto kernel = kernels.find(name);
    return kernel == kernels.end() ? "no such kernel" : emulated::launch(kernel->second, grid, block, shared, values);
}
"""


def compiler() -> str | None:
    """Return the C++ compiler, None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


# Around every array; a multiple of the strictest alignment that a kernel relies on.
_MARGIN = 256
_SCALARS = {np.int32: ctypes.c_int32, np.uint64: ctypes.c_uint64, np.float32: ctypes.c_float}


class EmulationError(Exception):
    """A launch did what the device would not forgive."""


class EmulatedDevice:
    """What `cuda.device.CupyDevice` is on a GPU, on NumPy arrays."""

    name = "emulated"
    multiprocessors = 2
    shared_per_multiprocessor = 100 << 10
    memory = 1 << 40  # bytes

    def __init__(self, folder: Path, kernels: Sequence[Kernel], edits: Sequence[tuple[str, str]] = ()) -> None:
        """Compile `kernels` into `folder`; `edits` are replacements (each must hit once) in their text, for a test."""
        self._memory: list[tuple[weakref.ref[NDArray[np.uint8]], int]] = []
        self._recorded: list[Callable[[], None]] | None = None  # while a recording is made
        self.replays = 0
        self.held = self.most_held = 0  # bytes of the arrays that are alive, now and at most
        self._pooled = 0  # at most since the last trim
        files: dict[str, list[str]] = {}
        for kernel in kernels:
            files.setdefault(kernel.file, []).append(kernel.expression)
        emulation = {"intrinsics.cuh": _EMULATION.read_text().replace("#pragma once\n", "")}
        texts = {file: source(file, emulation) for file in files}
        for old, new in edits:
            hits = sum(text.count(old) for text in texts.values())
            if hits != 1:
                raise ValueError(f"{old!r} is {hits} times in {', '.join(files)}")
            texts = {file: text.replace(old, new) for file, text in texts.items()}
        self._libraries = {file: self._build(folder, file, texts[file], names) for file, names in files.items()}

    def _build(self, folder: Path, file: str, text: str, expressions: list[str]) -> ctypes.CDLL:
        entries = [f'{{"{name}", [](void** v) {{ emulated::unpack({name}, v); }}}}' for name in expressions]
        text += _ENTRY % ",\n        ".join(entries)
        stem = folder / f"{file}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        library = stem.with_suffix(".so")
        if not library.exists():
            stem.with_suffix(".cpp").write_text(text)
            options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
            command = [str(compiler()), *options, str(stem.with_suffix(".cpp")), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        loaded = ctypes.CDLL(str(library))
        loaded.emulate.restype = ctypes.c_char_p
        return loaded

    def record(self, work: Callable[[], Any]) -> Recording:
        """Do the work, then do it again without any of its launches and copies being done: replays do them."""
        work()
        self._recorded = recorded = []
        try:
            result = work()
        finally:
            self._recorded = None

        def replay() -> None:
            self.replays += 1
            for launch in recorded:
                launch()

        return Recording(result, replay, None)

    def _do(self, work: Callable[[], None]) -> None:
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def _refuse_while_recording(self) -> None:
        if self._recorded is not None:
            raise EmulationError("what waits for the device cannot be recorded")

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a copy."""
        self._refuse_while_recording()
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself."""
        self._refuse_while_recording()
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return memory full of what nobody should read (NaN as floats), between margins that nobody should write."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.full(_MARGIN + nbytes + _MARGIN, 0xFF, np.uint8)
        self._memory.append((weakref.ref(memory), nbytes))
        self._account(nbytes)
        weakref.finalize(memory, self._account, -nbytes)
        return memory[_MARGIN : _MARGIN + nbytes].view(dtype).reshape(shape)

    def _account(self, nbytes: int) -> None:
        self.held += nbytes
        self.most_held, self._pooled = max(self.most_held, self.held), max(self._pooled, self.held)

    def free_bytes(self) -> int:
        """Return what is left of `memory`."""
        return self.memory - self.held

    def usage(self) -> Usage:
        """Return the arrays, and a pool that keeps what it once had."""
        return Usage(self.held, self._pooled, self._pooled)

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy at once."""
        self._refuse_while_recording()
        target[...] = source

    def trim(self) -> None:
        """Leave nothing in the pool but arrays that are alive."""
        self._pooled = self.held

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return zeros, between the same margins."""
        self._refuse_while_recording()
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def check_margins(self) -> None:
        """Raise EmulationError if a kernel wrote before or behind an array that is still there."""
        for reference, nbytes in self._memory:
            memory = reference()
            if memory is not None and not (memory[:_MARGIN] == 0xFF).all() & (memory[_MARGIN + nbytes :] == 0xFF).all():
                raise EmulationError(f"a write outside an array of {nbytes} bytes")
        self._memory.clear()

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return any array."""
        return np.empty(shape, dtype)

    def copy_in(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy at once."""
        self._do(lambda: np.copyto(target, source))

    def copy_out(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy at once."""
        self._do(lambda: np.copyto(target, source))

    def wait(self) -> None:
        """Return: nothing is ever under way."""
        self._refuse_while_recording()

    def multiply_halves(self, x: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
        """out = x weight^T."""
        self._refuse_while_recording()
        out[:] = x.astype(np.float32) @ weight.astype(np.float32).T

    def pointer(self, array: NDArray[Any]) -> int:
        """Return the address of the first element."""
        return int(array.ctypes.data)

    def launch(self, kernel: Kernel, size: Size, *arguments: Any) -> None:
        """Run a kernel; EmulationError where it did what the device would not forgive."""
        boxes = [_boxed(value) for value in arguments]
        values = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        grid, block = (ctypes.c_uint * 3)(*size.grid), (ctypes.c_uint * 3)(size.threads, 1, 1)
        emulate = self._libraries[kernel.file].emulate

        def run(boxes: Any = boxes, arrays: Any = arguments) -> None:  # both stay alive with it
            error = emulate(kernel.expression.encode(), grid, block, ctypes.c_size_t(size.shared), values)
            if error:
                raise EmulationError(f"{kernel.expression}: {error.decode()}")

        self._do(run)


def _boxed(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return _SCALARS[type(value)](value.item())
