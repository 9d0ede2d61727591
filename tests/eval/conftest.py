"""A tiny random file and the same model as a Hugging Face folder, tokenizer included."""

import json
from pathlib import Path

import pytest
from random_model import tiny_config, token_name, tokenizer_json


@pytest.fixture
def twins(tmp_path: Path, seed: int) -> tuple[Path, Path]:
    """Return the `.billm` file and the folder of the model that it stands for."""
    pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")
    from runtime.hf_twin import make_twins
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    from billm_format.config import Quantization

    config = tiny_config(max_position_embeddings=256)
    path, folder = tmp_path / "m.billm", tmp_path / "hf"
    make_twins(path, config, Quantization(block_size=32), seed).save_pretrained(folder)
    bos, eos = token_name(config, config.bos_token_id), token_name(config, config.eos_token_ids[0])
    tokenizer = Tokenizer.from_str(tokenizer_json(config).decode())
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(str(bos), config.bos_token_id)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path, folder
