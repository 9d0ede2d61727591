"""What is asked of a device before anything is loaded: enough, not far too much, one sentence where it is missing."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.emulator import EmulatedDevice
from random_model import FAMILIES, make_random_billm, tiny_config

import billm_rt
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import DoesNotFitError
from billm_format.reader import BillmFile
from billm_rt import bench_cli, ppl_cli
from billm_rt.cuda import cache as device_cache
from billm_rt.cuda import device as cuda_device
from billm_rt.cuda import launch, memory
from billm_rt.cuda_backend import CudaBackend

LIBRARY = memory._LIBRARY_BYTES


@pytest.fixture
def device(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The emulated device with nothing on it, its memory to be set."""
    gc.collect()  # what earlier tests left in cycles
    monkeypatch.setattr(emulated, "most_held", emulated.held)
    monkeypatch.setattr(emulated, "memory", 1 << 40)
    return emulated


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_reckoned_is_what_is_taken(
    family: str,
    device: EmulatedDevice,
    tmp_path: Path,
    seed: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole context and every logit: the weights to the byte, the rest never more than the bound."""
    monkeypatch.setattr(launch, "DENSE_TOKENS", 13)
    monkeypatch.setattr(memory, "_UNIT", 1)
    monkeypatch.setattr(memory, "_LIBRARY_BYTES", 0)
    bits, col_scales = int(rng.choice([4, 8, 16])), ("layers.0.v_proj", "layers.1.down_proj")
    make_random_billm(
        tmp_path / "m.billm",
        tiny_config(family),
        Quantization(block_size=64, embedding_bits=bits, col_scales=col_scales),
        seed,
    )
    before = device.held
    with BillmFile.open(tmp_path / "m.billm") as file:
        kv_bits = int(rng.choice([8, 16]))
        model = billm_rt.Model(file, CudaBackend(device, kv_bits=kv_bits), 48)
        wanted = memory.budget(file, 48, kv_bits, model.backend.chunk)
        descriptors = len(file.config.linears()) * file.config.num_hidden_layers
        loaded = device.held - before - descriptors * launch.LINEAR.itemsize
        assert loaded == sum(wanted.weights.values()) - descriptors
        cache = model.new_cache()
        tokens = rng.integers(0, 320, 48)
        for part in np.split(tokens, [20, 21, 24]):
            model.forward(part, cache, logits="all")
        assert cache.nbytes == wanted.per_token * 48
        assert device.most_held - before <= wanted.total + descriptors * launch.LINEAR.itemsize
        model.close()


def test_a_cache_that_grows_leaves_nothing_behind(
    device: EmulatedDevice, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recorded step holds the old memory, and the pool does not keep it."""
    monkeypatch.setattr(device_cache, "FIRST_CAPACITY", 8)
    make_random_billm(tmp_path / "m.billm", tiny_config("llama"), Quantization(block_size=64), seed)
    with BillmFile.open(tmp_path / "m.billm") as file, billm_rt.Model(file, CudaBackend(device), 64) as model:
        first, second = caches = [model.new_cache() for _ in range(2)]
        batch = model.gather(caches)
        for _ in range(8):  # recorded from the second on, together and alone
            model.forward_each([5, 6], batch)
            first.truncate(len(first) - 1)
            model.forward([7], first)
        old, was = first.nbytes, [weakref.ref(cache.reserve(0)[0].data.base) for cache in caches]
        first.reserve(1)
        assert first.nbytes == 2 * old and device.usage().pool == device.held
        first.truncate(len(first) - 1)
        model.forward_each([5, 6], batch)
        gc.collect()
        assert second.nbytes == 2 * old and [reference() for reference in was] == [None, None]


@pytest.mark.parametrize("ctx", [None, 64])
def test_too_little_memory_is_said_before_anything_is_loaded(
    ctx: int | None, device: EmulatedDevice, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_random_billm(tmp_path / "m.billm", tiny_config(), Quantization(block_size=64), seed)
    before, path = device.held, tmp_path / "m.billm"
    with BillmFile.open(path) as file:
        longest = ctx or file.config.max_position_embeddings
        exactly = memory.budget(file, longest, 16, CudaBackend.chunk).total

    def load(ctx: int | None, missing: int) -> None:
        monkeypatch.setattr(device, "memory", before + exactly - missing)
        with billm_rt.Model(BillmFile.open(path), CudaBackend(device), ctx):
            pass

    with pytest.raises(DoesNotFitError) as caught:
        load(ctx, 1)
    assert device.held == device.most_held == before
    assert "m.billm does not fit on cuda:0: 0 MB of binarized Linears" in str(caught.value)
    assert f"of KV cache for {longest} tokens" in str(caught.value)
    assert str(caught.value).endswith(f"take a context (--ctx) of {longest - 1} tokens or less")
    load(longest - 1, 1)
    load(ctx, 0)
    with pytest.raises(DoesNotFitError, match=r"make \d+ MB, 50 MB are free: use --device cpu$"):
        load(ctx, exactly - LIBRARY)


@pytest.mark.parametrize("command", ["ppl", "bench"])
def test_a_command_ends_with_one_sentence_and_exit_code_4(
    command: str, device: EmulatedDevice, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda index: None)
    monkeypatch.setattr(cuda_device, "CupyDevice", lambda index: device)
    monkeypatch.setattr(device, "memory", 1 << 20)
    make_random_billm(tmp_path / "m.billm")
    arguments = [str(tmp_path / "m.billm"), "--device", "cuda", "--quiet"]
    main = ppl_cli.main if command == "ppl" else bench_cli.main
    assert main([*arguments, *(["--data", "pydoc"] if command == "ppl" else ["--prompt", "9", "--gen", "2"])]) == 4
    error = capsys.readouterr().err
    assert "m.billm does not fit on cuda:0" in error and error.count("\n") == 1


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> ModelConfig:
    """Return a config of LLaMA's shape."""
    return tiny_config(
        hidden_size=hidden, embedding_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=32000,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, max_position_embeddings=4096, **changes,
    )  # fmt: skip


def test_scratch_of_large_models_is_small() -> None:
    """Beside two gigabytes of weights (7B) and twenty (70B)."""
    assert memory.scratch_bytes(llama(4096, 11008, 32, 32, 32), 2048, 512) < 400e6
    assert memory.scratch_bytes(llama(8192, 28672, 80, 64, 8), 4096, 512) < 700e6
    assert memory.cache_bytes(llama(4096, 11008, 32, 32, 32), 16) == 512 << 10
    assert memory.cache_bytes(llama(4096, 11008, 32, 32, 32), 8) == (256 << 10) + 32 * 64 * 4
