"""A tiny random `.billm` file and Hugging Face's own model with the same, dequantized, weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from random_model import make_random_billm

from billm_format.config import ModelConfig, Quantization
from billm_format.reader import BillmFile

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

torch.set_num_threads(1)  # tiny matrices: threads cost more than they give

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
}
_OPT_NAMES = {"o_proj": "self_attn.out_proj", "up_proj": "fc1", "down_proj": "fc2"}


def make_twins(
    path: Path, config: ModelConfig, quantization: Quantization, seed: int, rope: dict[str, Any] | None = None
) -> Any:
    """Write a random file at `path` and return the torch module, in eval mode and float32, that it stands for."""
    model = _empty(config, rope)
    tensors = {}
    if config.position == "rope":
        rotary = model.model.rotary_emb
        tensors["rope.inv_freq"] = rotary.inv_freq.numpy().astype(np.float32)
        config = dataclasses.replace(config, rope_scale=float(rotary.attention_scaling))
    make_random_billm(path, config, quantization, seed, tensors=tensors)
    with BillmFile.open(path) as file:
        load_weights(model, file)
    return model


def load_weights(model: Any, file: BillmFile) -> None:
    """Put the dequantized weights of `file` into a torch module of its shape."""
    state = _opt_state(file) if file.config.family == "opt" else _llama_state(file)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if file.config.tie_word_embeddings else set())


def hf_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Return float32 [tokens, vocab] of the torch module."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def _empty(config: ModelConfig, rope: dict[str, Any] | None) -> Any:
    make_config, make_model = _CLASSES[config.family]
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    if config.family == "opt":
        extra: dict[str, Any] = {
            "ffn_dim": config.intermediate_size,
            "word_embed_proj_dim": config.embedding_size,
            "do_layer_norm_before": config.norm_position == "pre",
            "_remove_final_layer_norm": not config.final_norm,
            "activation_function": config.activation,
        }
    else:
        extra = {
            "intermediate_size": config.intermediate_size,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.qkv_bias and config.o_bias,
            "mlp_bias": config.mlp_bias,
            "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        }
        if config.family == "mistral":
            extra["sliding_window"] = config.sliding_window
    return make_model(make_config(**common, **extra)).float().eval()


def _linear(file: BillmFile, name: str, hf_name: str) -> dict[str, np.ndarray]:
    linear = file.linear(name)
    state = {f"{hf_name}.weight": linear.dequantize()}
    return state if linear.bias is None else {**state, f"{hf_name}.bias": linear.bias}


def _llama_state(file: BillmFile) -> dict[str, np.ndarray]:
    config = file.config
    state = {
        "model.embed_tokens.weight": file.table("embed").take(slice(None)),
        "model.norm.weight": file.array("final_norm.weight"),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = file.table("head").take(slice(None))
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        state[f"{theirs}.input_layernorm.weight"] = file.array(f"{ours}.attn_norm.weight")
        state[f"{theirs}.post_attention_layernorm.weight"] = file.array(f"{ours}.mlp_norm.weight")
        if config.qk_norm:
            state[f"{theirs}.self_attn.q_norm.weight"] = file.array(f"{ours}.q_norm.weight")
            state[f"{theirs}.self_attn.k_norm.weight"] = file.array(f"{ours}.k_norm.weight")
        for name in config.linears():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            state |= _linear(file, f"{ours}.{name}", f"{theirs}.{block}.{name}")
    return state


def _opt_state(file: BillmFile) -> dict[str, np.ndarray]:
    config, root = file.config, "model.decoder"
    state = {
        f"{root}.embed_tokens.weight": file.table("embed").take(slice(None)),
        f"{root}.embed_positions.weight": file.array("pos_embed.weight").astype(np.float32),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = file.table("head").take(slice(None))
    if config.final_norm:
        state |= _layer_norm(file, "final_norm", f"{root}.final_layer_norm")
    if config.has_projections:
        for name in ("project_in", "project_out"):
            state[f"{root}.{name}.weight"] = file.array(f"{name}.weight").astype(np.float32)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"{root}.layers.{i}"
        state |= _layer_norm(file, f"{ours}.attn_norm", f"{theirs}.self_attn_layer_norm")
        state |= _layer_norm(file, f"{ours}.mlp_norm", f"{theirs}.final_layer_norm")
        for name in config.linears():
            state |= _linear(file, f"{ours}.{name}", f"{theirs}.{_OPT_NAMES.get(name, f'self_attn.{name}')}")
    return state


def _layer_norm(file: BillmFile, ours: str, theirs: str) -> dict[str, np.ndarray]:
    return {f"{theirs}.{part}": file.array(f"{ours}.{part}") for part in ("weight", "bias")}
