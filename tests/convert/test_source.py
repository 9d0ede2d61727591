"""Opening models: GGUF twins of Hugging Face models, configuration variants, and a clear refusal of everything else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from convert.hf_models import save_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from billm_convert.families import canonical_tensors, gguf_name
from billm_convert.gguf_source import unpermute
from billm_convert.source import open_model
from billm_format.errors import UsageError

# --- GGUF ------------------------------------------------------------------------------------------------------------


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """Reorder LLaMA's query or key rows as GGUF stores them: rows i and i + head_dim / 2 become neighbours."""
    out = np.empty_like(value)
    size = value.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = value[head * size + i]
            out[head * size + 2 * i + 1] = value[head * size + i + size // 2]
    return out


def write_gguf(path: Path, folder: Path, architecture: str, **extra: Any) -> None:
    """Write the model in `folder` as a GGUF file with a real tokenizer."""
    source = open_model(folder)
    config = source.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in extra.items():
        getattr(writer, key)(*value) if isinstance(value, tuple) else getattr(writer, key)(value)
    add_tokenizer(writer, config.vocab_size)
    for name in canonical_tensors(config):
        value = source.tensor(name).numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = permute(value, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.F16 if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    tokenizer = json.loads(tiny_tokenizer().to_str())
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    tokens += [f"<pad{i}>" for i in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}!")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llama", "llama"),
        ("llama-tied-gqa", "llama"),
        ("llama-biased", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_gguf_equals_its_twin(family: str, architecture: str, tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "hf", family, seed)
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", architecture)
    hf, from_gguf = open_model(tmp_path / "hf"), open_model(tmp_path / "model.gguf")
    for field in ("bos_token_id", "eos_token_ids", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        assert getattr(from_gguf.config, field) == getattr(hf.config, field), field
    for field in ("num_key_value_heads", "head_dim", "vocab_size", "num_hidden_layers", "sliding_window", "family"):
        assert getattr(from_gguf.config, field) == getattr(hf.config, field), field
    for name in hf.names():
        wanted = hf.tensor(name)
        assert torch.allclose(from_gguf.tensor(name), wanted, rtol=1e-3, atol=1e-6), name
    assert torch.equal(from_gguf.tensor("embed.weight", 5, 9), from_gguf.tensor("embed.weight")[5:9])
    assert torch.equal(
        from_gguf.tensor("layers.0.q_proj.weight", 5, 9), from_gguf.tensor("layers.0.q_proj.weight")[5:9]
    )


def test_gguf_tokenizer_and_template(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "hf", "llama", seed)
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", "llama", add_add_bos_token=True)
    source = open_model(tmp_path / "model.gguf")
    files = source.tokenizer()
    assert files.chat_template == "{{ messages[0]['content'] }}!"
    assert (files.info.bos_token, files.info.eos_token, files.info.add_bos) == ("<s>", "</s>", True)
    text = "the cat sat on the mat, Zürich 42"
    assert files.load(source.config).encode(text) == [1, *tiny_tokenizer().encode(text).ids]


@pytest.mark.parametrize(
    ("splitting", "wanted"), [("smollm", ["x", "ĊĊ", "4", "2"]), ("default", ["x", "Ċ", "Ċ", "42"])]
)
def test_gguf_splits_digits_as_the_model_was_trained(
    splitting: str, wanted: list[str], tmp_path: Path, seed: int
) -> None:
    save_model(tmp_path / "hf", "llama", seed)
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", "llama", add_tokenizer_pre=splitting)
    tokenizer = Tokenizer.from_str(open_model(tmp_path / "model.gguf").tokenizer().tokenizer_json.decode())
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("x\n\n42")] == wanted


def test_gguf_rope_scaling(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "hf", "llama-linear", seed)
    scaling = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.5}
    write_gguf(tmp_path / "linear.gguf", tmp_path / "hf", "llama", **scaling)
    wanted = open_model(tmp_path / "hf").tensor("rope.inv_freq")
    assert torch.allclose(open_model(tmp_path / "linear.gguf").tensor("rope.inv_freq"), wanted)


def test_gguf_llama3_frequencies_come_as_divisors(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "hf", "llama3", seed)
    wanted = open_model(tmp_path / "hf").tensor("rope.inv_freq")
    plain = 10000.0 ** -(torch.arange(0, 12, 2) / 12)
    divisors = (plain / wanted).numpy().astype(np.float32)
    assert divisors.max() > 2
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", "llama", add_tensor=("rope_freqs.weight", divisors))
    assert torch.allclose(open_model(tmp_path / "model.gguf").tensor("rope.inv_freq"), wanted)


def test_unpermute_undoes_the_reordering(seed: int) -> None:
    value = np.random.default_rng(seed).normal(size=(24, 5)).astype(np.float32)
    np.testing.assert_array_equal(unpermute(torch.from_numpy(permute(value, 3)), 3).numpy(), value)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.add_context_length(5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"'gemma' is not supported; supported are llama, qwen2, qwen3"):
        open_model(tmp_path / "x.gguf")


def test_damaged_gguf(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "hf", "llama", seed)
    write_gguf(tmp_path / "whole.gguf", tmp_path / "hf", "llama")
    data = (tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(seed)
    for cut in [5, 40, *rng.integers(24, len(data) - 64, 5).tolist()]:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(UsageError, match=r"damaged GGUF|lacks"):
            open_model(tmp_path / "cut.gguf")
    (tmp_path / "html.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match="not a GGUF file"):
        open_model(tmp_path / "html.gguf")


# --- configurations --------------------------------------------------------------------------------------------------


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text())
    for key, change in changes.items():
        value.pop(key, None) if change is None else value.update({key: change})
    file.write_text(json.dumps(value))


def test_older_rope_settings(tmp_path: Path, seed: int) -> None:
    """transformers before 5 wrote rope_theta and rope_scaling, with the type under "type"."""
    save_model(tmp_path, "llama-linear", seed)
    new = open_model(tmp_path).tensor("rope.inv_freq")
    edit(
        tmp_path / "config.json",
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 2.5},
    )
    assert torch.equal(open_model(tmp_path).tensor("rope.inv_freq"), new)
    edit(tmp_path / "config.json", rope_scaling=None, rope_theta=500.0)
    plain = torch.tensor([500.0 ** -(i / 12) for i in range(0, 12, 2)])
    assert torch.allclose(open_model(tmp_path).tensor("rope.inv_freq"), plain)


def test_every_end_of_answer_is_found(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    edit(tmp_path / "config.json", eos_token_id=[2, 11, 5000])
    assert open_model(tmp_path).config.eos_token_ids == (7, 2, 9, 11)


def test_checkpoint_of_the_base_model(tmp_path: Path, seed: int) -> None:
    """Saved without the head, tensors have no "model." in front."""
    model = tiny_model("llama-tied-gqa", seed)
    save_model(tmp_path, "llama-tied-gqa", seed)
    model.base_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "embed_tokens.weight" in stored
    assert torch.equal(
        open_model(tmp_path).tensor("layers.1.k_proj.weight"), stored["layers.1.self_attn.k_proj.weight"]
    )


def test_only_the_rows_asked_for(tmp_path: Path, seed: int) -> None:
    model = save_model(tmp_path, "llama", seed)
    rows = open_model(tmp_path).tensor("head.weight", 300, 900)
    assert torch.equal(rows, model.lm_head.weight.detach()[300:])


def test_bfloat16_weights(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    stored = {k: v.to(torch.bfloat16) for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    value = open_model(tmp_path).tensor("layers.0.v_proj.weight")
    assert value.dtype == torch.float32
    assert torch.equal(value, stored["model.layers.0.self_attn.v_proj.weight"].float())


# --- refusals --------------------------------------------------------------------------------------------------------


def spoil_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    stored = load_file(file)
    if value is None:
        del stored[name]
    else:
        stored[name] = value
    save_file(stored, file, metadata={"format": "pt"})


Q0 = "model.layers.0.self_attn.q_proj.weight"
CONFIG_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("other family", {"model_type": "gpt_neox"}, r"type 'gpt_neox' are not supported; supported are llama .*opt \(OPT"),
    ("no type", {"model_type": None}, "not supported; supported are"),
    ("quantized", {"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(method gptq\)"),
    ("classifier", {"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ("rope", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic' .* yarn"),
    ("activation", {"hidden_act": "relu2"}, "activation 'relu2' is not supported"),
    ("heads", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
    (
        "partial",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "a part of",
    ),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in CONFIG_REFUSALS], ids=[c[0] for c in CONFIG_REFUSALS])
def test_unusable_configurations(changes: dict[str, Any], message: str, tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UsageError, match=message):
        open_model(tmp_path)


def test_mixed_sliding_layers(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "qwen2-window", seed, max_window_layers=1)
    with pytest.raises(UsageError, match="mixes layers with a sliding window of 8"):
        open_model(tmp_path)


def test_unusable_tensors(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "good", "llama", seed)

    def spoiled(value: torch.Tensor | None) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        spoil_tensor(tmp_path / "bad", Q0, value)
        return tmp_path / "bad"

    with pytest.raises(UsageError, match=rf"lacks 1 tensors: {Q0}"):
        open_model(spoiled(None))
    with pytest.raises(UsageError, match=rf"{Q0} has the shape \[48, 47\], the configuration says \[48, 48\]"):
        open_model(spoiled(torch.zeros(48, 47)))
    with pytest.raises(UsageError, match=rf"{Q0} is stored as I8"):
        open_model(spoiled(torch.zeros(48, 48, dtype=torch.int8)))
    nan = torch.zeros(48, 48)
    nan[3, 4:6] = torch.nan
    source = open_model(spoiled(nan))
    with pytest.raises(UsageError, match=rf"{Q0} holds 2 values that are no finite number"):
        source.tensor("layers.0.q_proj.weight")


def test_missing_shards_are_named(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UsageError, match=rf"lacks 1 of its \d+ weight files: {gone.name}"):
        open_model(tmp_path)


def test_truncated_weights(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UsageError, match="damaged or not a safetensors file"):
        open_model(tmp_path)


def test_folders_that_are_no_model(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UsageError, match="no such folder or file"):
        open_model(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        open_model(tmp_path)
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"neither a folder nor a \.gguf file"):
        open_model(tmp_path / "file.bin")
    save_model(tmp_path / "m", "llama", seed)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="re-save it as safetensors"):
        open_model(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        open_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not readable as JSON"):
        open_model(tmp_path / "m")


def test_hub_name_instead_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"hf download some-org/Model-1\.5B --local-dir Model-1\.5B"):
        open_model("some-org/Model-1.5B")
