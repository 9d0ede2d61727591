"""NVRTC through its C interface: CUDA source to machine code of any GPU, on a machine that has none."""

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_USED = re.compile(
    r"Function properties for (?P<name>\w+)\s.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


# What CuPy adds (subnormal float32 are 0), and the report.
OPTIONS = (b"--std=c++17", b"-ftz=true", b"--device-as-default-execution-space", b"--ptxas-options=-v")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    expression: str
    registers: int
    spilled: int  # bytes stored and loaded


def library() -> Path | None:
    """Return the library of the package nvidia-cuda-nvrtc-cu12, None where it is not installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in Path(folder).glob("lib/libnvrtc.so.*[0-9]")), None)


class Nvrtc:
    """The compiler."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def compile(self, text: str, expressions: list[str], arch: str) -> tuple[bytes, list[Usage]]:
        """Return the machine code for "sm_90" and the like, and what each kernel takes; RuntimeError with the log."""
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        try:
            for expression in expressions:
                self._call("AddNameExpression", program, expression.encode())
            options = [*OPTIONS, f"--gpu-architecture={arch}".encode()]
            listed = (ctypes.c_char_p * len(options))(*options)
            failed = self._library.nvrtcCompileProgram(program, len(options), listed)
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode()
            if failed:
                raise RuntimeError(log)
            names = {self._lowered(program, expression): expression for expression in expressions}
            usages = [
                Usage(names[m["name"]], int(m["registers"]), int(m["stores"]) + int(m["loads"]))
                for m in _USED.finditer(log)
            ]
            return self._bytes(program, "CUBIN"), usages
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, expression: str) -> str:
        name = ctypes.c_char_p()
        self._call("GetLoweredName", program, expression.encode(), ctypes.byref(name))
        return (name.value or b"").decode()

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, f"nvrtc{name}")(*arguments)
        if error:
            raise RuntimeError(f"nvrtc{name}: error {error}")
