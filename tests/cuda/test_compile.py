"""Every kernel becomes machine code for every GPU generation from Ampere on, and none spills its registers."""

from collections.abc import Iterable

import pytest
from cuda.nvrtc import Nvrtc, Usage, library

from billm_rt.cuda.launch import GEMV_THREADS, WARP, all_kernels, gemv_shapes
from billm_rt.cuda.source import source

# A100; RTX 30; RTX 40; H100; RTX 50. One is enough for every quick run.
ARCHS = [
    pytest.param("sm_80", marks=pytest.mark.slow),
    pytest.param("sm_86", marks=pytest.mark.slow),
    pytest.param("sm_89", marks=pytest.mark.slow),
    "sm_90",
    pytest.param("sm_120", marks=pytest.mark.slow),
]
# Registers of a multiprocessor, handed out to warps in steps.
REGISTERS, STEP = 65536, 256


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    """The compiler."""
    path = library()
    if path is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12 (part of the dev extra on Linux)")
    return Nvrtc(path)


def files() -> dict[str, list[str]]:
    """Return the expressions of every file."""
    found: dict[str, list[str]] = {}
    for kernel in all_kernels():
        found.setdefault(kernel.file, []).append(kernel.expression)
    return found


def show(arch: str, usages: Iterable[Usage]) -> None:
    """Print the table; `pytest -rP` shows it."""
    for usage in sorted(usages, key=lambda usage: usage.expression):
        print(f"{arch} {usage.expression:24} {usage.registers:4} registers {usage.spilled:5} bytes spilled")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file", sorted(files()))
def test_every_kernel_compiles_and_none_spills(nvrtc: Nvrtc, file: str, arch: str) -> None:
    expressions = files()[file]
    code, usages = nvrtc.compile(source(file), expressions, arch)
    show(arch, usages)
    assert code.startswith(b"\x7fELF")
    assert sorted(usage.expression for usage in usages) == sorted(expressions)
    assert [usage for usage in usages if usage.spilled] == []
    if file == "gemv.cu":
        resident = {shape.kernel.expression: (shape.resident, GEMV_THREADS) for shape in gemv_shapes()}
        for usage in usages:
            blocks, threads = resident[usage.expression]
            of_warp = -(-usage.registers * WARP // STEP) * STEP
            assert blocks * threads // WARP * of_warp <= REGISTERS, usage


def test_an_error_in_a_source_is_an_error_here(nvrtc: Nvrtc) -> None:
    broken = source("decoder.cu").replace("float factor = rsqrtf", "float factor = no_such_function")
    with pytest.raises(RuntimeError, match="no_such_function"):
        nvrtc.compile(broken, ["normalize"], "sm_90")
