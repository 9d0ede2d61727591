"""Tiny random `.billm` files of every family, for the tests of all parts; no real model, no converter, no torch."""

import json
import math
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig, Quantization, TokenizerInfo
from billm_format.layout import CHAT_TEMPLATE, TOKENIZER, TensorSpec, all_tensors
from billm_format.packing import pack_bits, pack_nibbles
from billm_format.writer import write_file

Tensors = dict[str, NDArray[Any]]

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Widths that leave a short last block (and a short last byte's word) for every block size.
_LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "embedding_size": 96,
    "intermediate_size": 168,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "norm_position": "pre",
    "final_norm": True,
    "position": "rope",
    "position_offset": 0,
    "rope_scale": 1.0,
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "o_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_ids": (257,),
}
_OPT: dict[str, Any] = {
    **_LLAMA,
    "family": "opt",
    "num_key_value_heads": 6,
    "norm": "layernorm",
    "position": "learned",
    "position_offset": 2,
    "activation": "relu",
    "gated_mlp": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}

# One shape per family and variant that the converter knows; `tiny_config` takes these names.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-bias": {**_LLAMA, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {**_LLAMA, "family": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
    "qwen2": {**_LLAMA, "family": "qwen2", "qkv_bias": True},
    "qwen3": {**_LLAMA, "family": "qwen3", "qk_norm": True, "head_dim": 24},
    "opt": _OPT,
    "opt-350m": {**_OPT, "norm_position": "post", "final_norm": False, "embedding_size": 40},
}


def tiny_config(family: str = "llama", **changes: Any) -> ModelConfig:
    """Return the tiny config of a family in FAMILIES, with fields changed by name."""
    return ModelConfig(**{**FAMILIES[family], **changes})


def token_name(config: ModelConfig, token: int | None) -> str | None:
    """Return the text of a special token in `tokenizer_json`, None for None."""
    return None if token is None else f"<|{'bos' if token == config.bos_token_id else f'eos{token}'}|>"


def tokenizer_json(config: ModelConfig) -> bytes:
    """Return a working byte-level BPE tokenizer.json of exactly vocab_size tokens: specials, 256 bytes, merges."""
    specials = sorted({t for t in (config.bos_token_id, *config.eos_token_ids) if t is not None})
    if config.vocab_size < 256 + len(specials):
        raise ValueError(f"vocab_size: wanted at least {256 + len(specials)}, found {config.vocab_size}")
    symbols = sorted(_byte_symbols())
    letters = [s for s in symbols if s.isascii() and s.isalpha()] + ["Ġ"]
    pairs = [(a, b) for a in letters for b in letters]
    triples = ((a + b, c) for a, b in pairs for c in letters)
    merges = list(islice(chain(pairs, triples), config.vocab_size - 256 - len(specials)))
    free = (i for i in range(config.vocab_size) if i not in specials)
    vocab = dict(zip([*symbols, *(a + b for a, b in merges)], free, strict=False))
    added = []
    for token in specials:
        name = token_name(config, token)
        vocab[str(name)] = token
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added.append({"id": token, "content": name, **flags})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {**model, "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }
    return json.dumps(document).encode()


def _byte_symbols() -> list[str]:
    """Return the printable stand-ins of the 256 bytes that byte-level BPE uses (as GPT-2 chose them)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def tokenizer_info(config: ModelConfig) -> TokenizerInfo:
    """Return the special tokens of `tokenizer_json` as the file's record states them."""
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    bos = token_name(config, config.bos_token_id)
    return TokenizerInfo(bos_token=bos, eos_token=token_name(config, eos), add_bos=bos is not None)


def random_tensors(config: ModelConfig, quantization: Quantization, seed: int) -> Tensors:
    """Return a random array for every tensor of the layout but the texts, sized so that activations stay near 1."""
    rng = np.random.default_rng(seed)
    specs = [spec for spec in all_tensors(config, quantization) if spec.kind != "tokenizer"]
    columns = {}
    for layer in range(config.num_hidden_layers):
        for linear, (_, cols, _) in config.linears().items():
            columns[f"layers.{layer}.{linear}"] = cols
    tensors = {spec.name: _random_tensor(rng, spec, config, columns) for spec in specs}
    if quantization.embedding_bits == 4:  # a step is a byte of its own, and a code of four bits goes to 8
        for name in {"embed.scale", "head.scale"} & tensors.keys():
            tensors[name] = (tensors[name] / 5).astype(np.float16)
    return tensors


def _random_tensor(
    rng: np.random.Generator, spec: TensorSpec, config: ModelConfig, columns: dict[str, int]
) -> NDArray[Any]:
    owner, _, part = spec.name.rpartition(".")
    cols = columns.get(owner, 0)
    if part in ("sign", "second"):
        planes = np.frombuffer(rng.bytes(math.prod(spec.shape)), np.uint8).reshape(spec.shape)
        return planes & pack_bits(np.ones(cols, bool))  # what pads a row is zeros
    if part == "salient":
        return pack_bits(rng.random(cols) < rng.uniform(0, 0.3))
    if part == "scales":
        outer = rng.integers(0, 171, spec.shape[:-1])
        residual = (outer * rng.random(outer.shape) / 2).astype(np.int64)
        alphas = [rng.integers(0, 256, outer.shape), rng.integers(0, 256, outer.shape), outer, residual]
        return np.stack(alphas, axis=-1).astype(np.uint8)
    if part == "row_scale":
        return (rng.uniform(0.5, 2, spec.shape) / (150 * math.sqrt(cols))).astype(np.float16)
    if part == "col_scale":
        return rng.uniform(0.5, 2, spec.shape).astype(np.float16)
    if part == "inv_freq":
        return (1e4 ** -(np.arange(spec.shape[0]) / spec.shape[0])).astype(np.float32)
    if spec.kind in ("embedding", "head") and spec.dtype == "U8":
        return pack_nibbles(rng.integers(0, 16, (spec.shape[0], config.embedding_size), np.uint8))
    if spec.dtype == "I8":
        return rng.integers(-127, 128, spec.shape).astype(np.int8)
    if part == "scale":
        return rng.uniform(0.01, 0.03, spec.shape).astype(np.float16)
    if part == "weight" and spec.dtype == "F32":
        return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)  # a norm
    if spec.dtype == "F32":
        return (rng.standard_normal(spec.shape) / 10).astype(np.float32)  # a bias
    spread = math.sqrt(spec.shape[1]) if owner.startswith("project") else 1.0
    return (rng.standard_normal(spec.shape) / spread).astype(np.float16)


def make_random_billm(
    path: Path,
    config: ModelConfig | None = None,
    quantization: Quantization | None = None,
    seed: int = 0,
    *,
    chat_template: str | None = CHAT,
    tensors: Tensors | None = None,
) -> Tensors:
    """Write a valid random file at `path` and return its tensors (those of `tensors` as they were given)."""
    config = config or tiny_config()
    quantization = quantization or Quantization(block_size=32)
    arrays = {**random_tensors(config, quantization, seed), **(tensors or {})}
    texts = {TOKENIZER: tokenizer_json(config)}
    if chat_template is not None:
        texts[CHAT_TEMPLATE] = chat_template.encode()
    write_file(
        path,
        config=config,
        quantization=quantization,
        tokenizer_info=tokenizer_info(config),
        conversion={"recipe": "random", "seed": seed},
        tensors={**texts, **{name: lambda array=array: array for name, array in arrays.items()}},
    )
    return arrays
