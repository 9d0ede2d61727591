"""Models of real widths with random weights: converted, loaded, and compared with Hugging Face's own."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")

from convert.hf_models import save_model, write_text
from runtime.hf_twin import hf_logits, load_weights

import billm_rt
from billm_convert import ConvertSettings, convert
from billm_format.reader import BillmFile

# OPT-125M whole; Qwen3-0.6B's widths, heads and vocabulary in two of its 28 layers.
SHAPES = {
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_real_shape_converts_and_computes_what_transformers_does(family: str, tmp_path: Path, seed: int) -> None:
    twin = save_model(tmp_path / "model", family, seed, **SHAPES[family])
    text = write_text(tmp_path / "text.txt", seed)
    out = tmp_path / "out.billm"
    report = convert(
        tmp_path / "model", out, ConvertSettings("paper", calib=str(text), nsamples=2, seqlen=128, seed=seed)
    )
    assert report.bits_true <= 2.30
    with BillmFile.open(out) as file:
        file.verify()
        load_weights(twin, file)
    tokens = np.random.default_rng(seed).integers(0, SHAPES[family]["vocab_size"], 48).tolist()
    wanted = hf_logits(twin, tokens)
    scale = np.sqrt(np.mean(wanted**2))
    with billm_rt.load(out, exact=True) as model:
        assert np.abs(model.logits(tokens) - wanted).max() < 1e-3 * scale
    with billm_rt.load(out) as model:
        found = model.logits(tokens)
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 2e-3 * scale
