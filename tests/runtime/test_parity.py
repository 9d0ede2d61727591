"""Every family against Hugging Face's own implementation with the dequantized weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import tiny_config

pytest.importorskip("torch", reason="parity with Hugging Face needs torch (pip install billm-rt[convert])")
pytest.importorskip(
    "transformers", reason="parity with Hugging Face needs transformers (pip install billm-rt[convert])"
)
from runtime.hf_twin import LINEAR, LLAMA3, YARN, hf_logits, make_twins

import billm_rt
from billm_format.config import ModelConfig, Quantization
from billm_rt import cpu

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", {}, None),
    "llama3-rope": ("llama", {}, LLAMA3),
    "linear-rope": ("llama", {"tie_word_embeddings": False}, LINEAR),
    "yarn-rope": ("llama", {}, YARN),
    "llama-biases": ("llama-bias", {}, None),
    "multi-query": ("llama", {"num_key_value_heads": 1}, None),
    "mistral-window": ("mistral", {}, None),
    "qwen2": ("qwen2", {}, None),
    "qwen3": ("qwen3", {}, None),
    "opt": ("opt", {}, None),
    "opt-gelu": ("opt", {"activation": "gelu"}, None),
    "opt-350m": ("opt-350m", {}, None),
}


def _quantization(config: ModelConfig, rng: np.random.Generator) -> Quantization:
    """Return a random block size, an exception to it, 8 or 16 bit tables, and column scales on some Linears."""
    names = [f"layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in config.linears()]
    return Quantization(
        block_size=int(rng.choice([32, 64, 128])),
        overrides={str(rng.choice(names)): 64},
        embedding_bits=int(rng.choice([4, 8, 16])),
        col_scales=tuple(name for name in names if rng.random() < 0.5),
    )


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("case", CASES)
def test_exact_path_equals_hugging_face(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    family, changes, rope = CASES[case]
    config = tiny_config(family, **changes)
    twin = make_twins(tmp_path / "m.billm", config, _quantization(config, rng), int(rng.integers(1 << 30)), rope)
    tokens = rng.integers(0, config.vocab_size, 60).tolist()
    wanted = hf_logits(twin, tokens)
    with billm_rt.load(tmp_path / "m.billm", exact=True) as model:
        found = model.logits(tokens)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape == (60, config.vocab_size)
    assert np.abs(found - wanted).max() < 1e-4 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("case", CASES)
def test_16_bit_activations_are_all_but_exact(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The step of 16 bits, of which 14 are used, is 64 times finer: 0.6 % noise becomes 0.01 %, and 2 to 4 % 0.06 %."""
    family, changes, rope = CASES[case]
    config = tiny_config(family, **changes)
    twin = make_twins(tmp_path / "m.billm", config, _quantization(config, rng), int(rng.integers(1 << 30)), rope)
    tokens = rng.integers(0, config.vocab_size, 60).tolist()
    with billm_rt.load(tmp_path / "m.billm") as model:
        assert _error(model.logits(tokens), hf_logits(twin, tokens)) < 2e-3


@pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")
@pytest.mark.parametrize("case", CASES)
def test_int8_activations_stay_close(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Rounding a block of Gaussian activations to int8 adds about 0.6 % noise: absmax is 2.5 to 3 sigma, the step is
    absmax / 127, the noise step / sqrt(12). Nine such roundings lie on the way to a logit of these two-layer models;
    adding up as independent noise, each amplified about twice by softmax and norms, they make 2 to 4 %.
    """
    family, changes, rope = CASES[case]
    config = tiny_config(family, **changes)
    quantization = dataclasses.replace(_quantization(config, rng), embedding_bits=8)
    twin = make_twins(tmp_path / "m.billm", config, quantization, int(rng.integers(1 << 30)), rope)
    tokens = rng.integers(0, config.vocab_size, 60).tolist()
    with billm_rt.load(tmp_path / "m.billm", activation_bits=8) as model:
        error = _error(model.logits(tokens), hf_logits(twin, tokens))
    print(f"relative error of the logits: {error:.4f}")
    assert 1e-4 < error < 0.05
