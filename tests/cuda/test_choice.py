"""Which back end `--device` chooses, and what it says where there is no GPU; no GPU is needed to ask."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cuda.emulator import EmulatedDevice
from random_model import make_random_billm, tiny_config

import billm_rt
from billm_format.config import Quantization
from billm_format.errors import UsageError
from billm_rt import bench_cli, ppl_cli
from billm_rt.backend import choose
from billm_rt.cuda import device as cuda_device
from billm_rt.cuda import memory
from billm_rt.cuda_backend import CudaBackend

# The real one, before conftest.py hides GPUs.
unavailable_reason = cuda_device.unavailable_reason


def fake_cupy(monkeypatch: pytest.MonkeyPatch, count: int | None, capability: str = "90") -> None:
    """Put a CuPy in place that sees `count` devices; None: a driver that is not there."""

    class CUDARuntimeError(RuntimeError):
        pass

    def devices() -> int:
        if count is None:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return count

    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=devices, CUDARuntimeError=CUDARuntimeError),
        Device=lambda index: SimpleNamespace(compute_capability=capability),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'billm-rt[cuda12]'" in str(unavailable_reason())


@pytest.mark.parametrize(
    ("count", "capability", "index", "message"),
    [
        (None, "90", 0, "no CUDA device: cudaErrorNoDevice"),
        (0, "90", 0, "there are 0 CUDA devices"),
        (2, "90", 2, "there are 2 CUDA devices, counted from 0"),
        (1, "75", 0, "compute capability is 75"),
    ],
)
def test_what_is_missing_is_said(
    count: int | None, capability: str, index: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cupy(monkeypatch, count, capability)
    assert message in str(unavailable_reason(index))


def test_a_gpu_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy(monkeypatch, 2, "80")
    assert unavailable_reason(1) is None


def test_a_gpu_is_taken_where_it_is_asked_for(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda index: None if index == 0 else "none such")
    monkeypatch.setattr(cuda_device, "CupyDevice", lambda index: emulated)
    for name in ("cuda", "cuda:0"):
        found = choose(name)
        assert isinstance(found, CudaBackend)
        assert (found.device, found.isa, found.reason) == ("cuda:0", "cuda", "emulated")
    with pytest.raises(UsageError, match="--device cuda:1: none such; use --device cpu"):
        choose("cuda:1")
    assert [choose("cuda", kv_bits=bits).kv_type for bits in (16, 8)] == ["float16", "int8"]
    assert choose("auto").device == choose("cpu").device == "cpu"


def test_exact_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda index: None)
    assert choose("auto", exact=True).isa == "exact"
    with pytest.raises(UsageError, match="exact path runs on the CPU alone"):
        choose("cuda", exact=True)


def test_a_command_without_a_gpu_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_random_billm(tmp_path / "m.billm")
    assert ppl_cli.main([str(tmp_path / "m.billm"), "--device", "cuda", "--quiet", "--data", "pydoc"]) == 2
    error = capsys.readouterr().err
    assert "--device cuda: " in error and "use --device cpu" in error and error.count("\n") == 1


def test_heads_that_are_too_wide_are_refused(emulated: EmulatedDevice, tmp_path: Path) -> None:
    make_random_billm(tmp_path / "m.billm", tiny_config(head_dim=258), Quantization(block_size=32))
    with billm_rt.load(tmp_path / "m.billm", device="cpu") as model, pytest.raises(UsageError, match="258 elements"):
        billm_rt.Model(model.file, CudaBackend(emulated))


def test_billm_bench_on_a_gpu_says_nothing_of_the_processor(
    emulated: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda index: None)
    monkeypatch.setattr(cuda_device, "CupyDevice", lambda index: emulated)
    make_random_billm(tmp_path / "m.billm")
    arguments = [str(tmp_path / "m.billm"), "--device", "cuda:2", "--prompt", "9", "--gen", "2", "--repeat", "1"]
    assert bench_cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "cuda:2 (cuda), float32 activations" in out
    assert re.search(r"on the device +\d+\.\d MB held: \d\.\d MB weights, 0\.0 MB KV cache, \d+\.\d MB scratch; ", out)
    assert "thread" not in out and "memory reads" not in out
    assert bench_cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["threads"], report["bandwidth_share"]) == ("cuda:2", None, None)
    assert report["memory"]["kv_cache"] == report["device_memory"]["kv_cache"] > 0


def test_billm_ppl_on_a_gpu_says_what_lies_there(
    emulated: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda index: None)
    monkeypatch.setattr(cuda_device, "CupyDevice", lambda index: emulated)
    monkeypatch.setattr(memory, "_UNIT", 1)  # the emulation rounds nothing up
    make_random_billm(tmp_path / "m.billm")
    (tmp_path / "text.txt").write_text("what a text " * 9)
    arguments = [str(tmp_path / "m.billm"), "--device", "cuda", "--data", str(tmp_path / "text.txt"), "--seqlen", "30"]
    assert ppl_cli.main([*arguments, "--windows", "1", "--quiet"]) == 0
    assert re.search(r"\non cuda:0 .* MB held, .* MB in use with other programs:\n  weights ", capsys.readouterr().out)
    assert ppl_cli.main([*arguments, "--windows", "1", "--quiet", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["memory"]["device"]
    weights = sum(size for kind, size in held.items() if kind.startswith("weights."))
    assert held["kv_cache"] > 0 and 0 < weights + held["kv_cache"] + held["scratch"] <= held["pool"]
