"""Whole tiny decoders, emulated and on a GPU: logits of the float32 reference, tokens of the CPU back end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import FAMILIES, make_random_billm, tiny_config

import billm_rt
from billm_format.config import Quantization
from billm_format.reader import BillmFile
from billm_rt.cuda import launch
from billm_rt.cuda.device import Device
from billm_rt.cuda_backend import CudaBackend


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the root mean square of the difference in units of that of `wanted`."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def on_device(path: Path, device: Device, kv_bits: int = 16) -> billm_rt.Model:
    """Load a file on the device."""
    return billm_rt.Model(BillmFile.open(path), CudaBackend(device, kv_bits=kv_bits))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_of_every_family(
    family: str,
    device: Device,
    tmp_path: Path,
    seed: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One token, a few, many (another attention, another product), in turn; blocks and column scales mixed."""
    monkeypatch.setattr(launch, "DENSE_TOKENS", 13)
    quantization = Quantization(
        block_size=int(rng.choice([32, 64, 128, 256])),
        overrides={"layers.0.k_proj": 32, "layers.1.up_proj": 128},
        embedding_bits=int(rng.choice([4, 8, 16])),
        col_scales=("layers.0.v_proj", "layers.1.q_proj", "layers.1.k_proj", "layers.1.down_proj"),
    )
    make_random_billm(tmp_path / "m.billm", tiny_config(family), quantization, seed)
    tokens = rng.integers(0, 320, 1 + 3 + 10 + 14)
    with billm_rt.load(tmp_path / "m.billm", exact=True) as exact, on_device(tmp_path / "m.billm", device) as model:
        wanted = exact.logits(tokens)
        cache: Any = model.new_cache()
        parts = [model.forward(part, cache, logits="all") for part in np.split(tokens, [1, 4, 14])]
        # Keys and values are binary16, and so are the activations of the many.
        assert relative(np.concatenate(parts), wanted) < 4e-3
        assert cache.tokens == tokens.tolist()
        cache.truncate(13)
        assert relative(model.forward(tokens[13:17], cache, logits="all"), wanted[13:17]) < 4e-3


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen3"])
def test_a_cache_of_8_bits_is_that_of_the_cpu(
    family: str, device: Device, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    """Both are as far from the exact logits, and nearer to each other but for codes that rounding tips over."""
    path = tmp_path / "m.billm"
    make_random_billm(path, tiny_config(family), Quantization(block_size=64), seed)
    tokens = rng.integers(0, 320, 12 + 5 + 1)
    with (
        billm_rt.load(path, exact=True) as exact,
        billm_rt.load(path, device="cpu", kv_bits=8) as cpu,
        on_device(path, device, kv_bits=8) as model,
    ):
        wanted, there, cache = exact.logits(tokens), cpu.logits(tokens), model.new_cache()
        parts = [model.forward(part, cache, logits="all") for part in np.split(tokens, [12, 17])]
        found = np.concatenate(parts)
        assert relative(found, wanted) < 3e-2
        assert relative(found, there) < 1e-2


def greedy(model: billm_rt.Model, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that continue a prompt, the likeliest each time."""
    cache, read, said = model.new_cache(), prompt, []
    for _ in range(count):
        logits = model.forward(read, cache)
        assert logits is not None
        read = [int(logits[0].argmax())]
        said += read
    return said


def test_greedy_text_is_that_of_the_cpu(device: Device, tmp_path: Path, seed: int) -> None:
    make_random_billm(tmp_path / "m.billm", tiny_config(), Quantization(block_size=128), seed)
    with billm_rt.load(tmp_path / "m.billm", device="cpu") as cpu, on_device(tmp_path / "m.billm", device) as model:
        prompt = [1, 2, 3, 4, 5]
        texts = [greedy(m, prompt, 24) for m in (cpu, model)]
        if texts[0] != texts[1]:  # then the two best tokens must have been a rounding error apart
            length = next(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
            logits = np.sort(cpu.logits(prompt + texts[0][:length])[-1])
            assert logits[-1] - logits[-2] < 5e-3 * np.abs(logits).max()
