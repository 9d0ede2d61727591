"""Tiny random Hugging Face models of every family, saved as real model folders."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 320
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_OPT_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_THETA = {"rope_theta": 10000.0}

# name -> (model class, configuration class, what differs from the shapes above)
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama-tied-gqa": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, **_THETA}},
    ),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                **_THETA,
            }
        },
    ),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                **_THETA,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"sliding_window": 8}),  # not used: use_sliding_window is off
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "opt": (OPTForCausalLM, OPTConfig, {}),
    "opt-350m": (OPTForCausalLM, OPTConfig, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-final-norm": (OPTForCausalLM, OPTConfig, {"_remove_final_layer_norm": True}),
    "galactica": (OPTForCausalLM, OPTConfig, {"enable_bias": False, "activation_function": "gelu"}),
    "opt-plain-norms": (OPTForCausalLM, OPTConfig, {"layer_norm_elementwise_affine": False}),
}


def tiny_model(name: str, seed: int, **changes: Any) -> PreTrainedModel:
    """Return a float32 model of the family `name` with every parameter random, norms and biases included."""
    model_class, config_class, special = FAMILIES[name]
    shape = _OPT_SHAPE if config_class is OPTConfig else _SHAPE
    torch.manual_seed(seed)
    model = model_class(config_class(**{**shape, **special, **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def save_model(folder: Path, name: str, seed: int, *, max_shard_size: str = "1GB", **changes: Any) -> PreTrainedModel:
    """Save a tiny model with a tokenizer into `folder` and return it."""
    model = tiny_model(name, seed, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return model


def tiny_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer of 310 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the other cat sat there too"] * 4, trainer)
    return tokenizer


def write_text(path: Path, seed: int, words: int = 3000) -> Path:
    """Write a text of random words."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "other", "there", "7", "new", "line.", "Zürich"]
    picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    path.write_text(" ".join(vocabulary[pick] for pick in picks), encoding="utf-8")
    return path
