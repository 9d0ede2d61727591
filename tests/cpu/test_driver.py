"""The kernels on other machines: NEON under an emulator, AVX-512 over emulated intrinsics, and all with sanitizers.

`driver.c` compares each instruction set with the portable one, bit for bit, its operands at the edge of unmapped pages;
`pool_stress.c` drives the thread pool from several threads. What a missing compiler or emulator hides is skipped aloud.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "billm_rt" / "cpu" / "src"
FLAGS = ("-std=gnu11", "-ffp-contract=off", "-pthread", "-Wno-psabi", f"-I{SOURCES}")
X86 = (
    *("dispatch", "arrange", "memory", "pool", "portable", "avx2", "lookup", "avx512", "avx512_lookup", "avx512_table"),
    *("float_portable", "float_avx2", "float_avx512"),
)
ARM = ("dispatch", "arrange", "memory", "pool", "portable", "neon", "float_portable", "float_neon")
AVX512 = (
    *("-O2", "-mavx2", "-mfma", "-mbmi2"),
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi", "vbmi2")),
)
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 machine")


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def build(compiler: str, program: Path, main: str, library: tuple[str, ...], *flags: str) -> Path:
    files = [SOURCES / f"{name}.c" for name in library]
    command = [compiler, *FLAGS, *flags, *map(str, files), str(TESTS / main), "-o", str(program), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert done.stdout.endswith("agree\n"), done.stdout


def need_simde() -> None:
    need("gcc")
    probe = subprocess.run(["gcc", "-E", "-"], input="#include <simde/x86/avx512.h>", capture_output=True, text=True)
    if probe.returncode:
        pytest.skip("the SIMDe headers are not installed (libsimde-dev)")
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX2")


def need_vbmi() -> None:
    need("gcc")
    if "avx512_vbmi2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX-512 VBMI")


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine's own tests run the NEON kernels")
def test_neon_under_an_emulator(tmp_path: Path, seed: int) -> None:
    need("aarch64-linux-gnu-gcc", "qemu-aarch64")
    flags = ("-O2", "-static", "-march=armv8.2-a+dotprod")
    program = build("aarch64-linux-gnu-gcc", tmp_path / "driver", "driver.c", ARM, *flags)
    run("qemu-aarch64", program, seed, 200, "neon-dotprod")


@on_x86
def test_avx512_over_emulated_intrinsics(tmp_path: Path, seed: int) -> None:
    need_simde()
    program = build("gcc", tmp_path / "driver", "driver.c", X86, "-O1", "-mavx2", "-DBILLM_SIMDE")
    run(program, seed, 500, "avx512-vbmi", "avx512-vnni", "avx2")


@on_x86
def test_avx_vnni_over_emulated_intrinsics(tmp_path: Path, seed: int) -> None:
    need_simde()
    flags = ("-O1", "-mavx2", "-DBILLM_SIMDE", "-DBILLM_AVXVNNI")
    run(build("gcc", tmp_path / "driver", "driver.c", (*X86, "avxvnni"), *flags), seed, 500, "avx-vnni", "avx2")


@on_x86
def test_avx_vnni_at_the_edge_of_memory(tmp_path: Path, seed: int) -> None:
    """The processor's own instructions."""
    need_simde()
    if "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX-VNNI")
    flags = ("-O1", "-DBILLM_SIMDE", "-DBILLM_AVXVNNI", "-mavx2", "-mavxvnni")
    program = build("gcc", tmp_path / "driver", "driver.c", (*X86, "avxvnni"), *flags)
    run(program, seed, 1000, "avx-vnni", "avx2")


@on_x86
def test_amx_at_the_edge_of_memory(tmp_path: Path, seed: int) -> None:
    """Not emulated anywhere: needs the processor."""
    need("gcc")
    if "amx_int8" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AMX")
    flags = (*AVX512, "-DBILLM_AMX", "-mamx-tile", "-mamx-int8")
    run(build("gcc", tmp_path / "driver", "driver.c", (*X86, "amx"), *flags), seed, 1000, "amx-int8", "avx512-vnni")


@on_x86
def test_avx512_at_the_edge_of_memory(tmp_path: Path, seed: int) -> None:
    """The processor's own instructions."""
    need_vbmi()
    run(build("gcc", tmp_path / "driver", "driver.c", X86, *AVX512), seed, 2000, "avx512-vbmi", "avx512-vnni")


@pytest.mark.slow
@on_x86
def test_avx512_with_sanitizers(tmp_path: Path, seed: int) -> None:
    """The processor's own instructions."""
    need_vbmi()
    for sanitize, rounds in (("address,undefined", 400), ("thread", 30)):
        flags = (*AVX512, "-O1", "-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all")
        program = build("gcc", tmp_path / sanitize, "driver.c", X86, *flags)
        run(program, seed, rounds, "avx512-vbmi", "avx512-vnni", "avx2")


@pytest.mark.slow
@on_x86
def test_kernels_with_address_and_undefined_behaviour_sanitizers(tmp_path: Path, seed: int) -> None:
    need_simde()
    sanitize = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    emulate = ("-mavx2", "-DBILLM_SIMDE", "-DBILLM_AVXVNNI")
    program = build("gcc", tmp_path / "driver", "driver.c", (*X86, "avxvnni"), *emulate, *sanitize)
    run(program, seed, 2000, "avx512-vbmi", "avx512-vnni", "avx-vnni", "avx2")


@pytest.mark.slow
@on_x86
def test_pool_with_thread_sanitizer(tmp_path: Path, seed: int) -> None:
    need_simde()
    flags = ("-g", "-O1", "-fsanitize=thread")
    run(build("gcc", tmp_path / "stress", "pool_stress.c", ("pool",), *flags), 300)
    program = build("gcc", tmp_path / "driver", "driver.c", X86, *flags, "-mavx2", "-DBILLM_SIMDE")
    run(program, seed, 300, "avx512-vbmi", "avx2")


def test_pool_under_stress(tmp_path: Path) -> None:
    need("cc")
    run(build("cc", tmp_path / "stress", "pool_stress.c", ("pool",), "-O2"), 1000)
