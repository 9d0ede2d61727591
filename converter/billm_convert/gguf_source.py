"""Read a full-precision (or already quantized) model from one GGUF file, tensor by tensor."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from billm_convert.families import ROPE_TYPES, SUPPORTED, Family, family_from_hf, gguf_name
from billm_convert.source import ModelSource
from billm_convert.tokenizer import TokenizerFiles, tokenizer_from_gguf
from billm_format.config import ModelConfig
from billm_format.errors import UsageError

# GGUF's architecture -> the configuration class whose meaning it has. Mistral files call themselves "llama".
_ARCHITECTURES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


class GgufSource(ModelSource):
    """A `.gguf` file, memory-mapped; quantized tensors are dequantized as they are read."""

    def __init__(self, path: Path) -> None:
        """Read metadata and the tensor table; UsageError names whatever is missing or does not fit."""
        self._reader = _open(path)
        self._fields = self._reader.fields
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = self._value(path, "general.architecture")
        if self._architecture not in _ARCHITECTURES:
            raise UsageError(
                f"{path}: GGUF architecture {self._architecture!r} is not supported; supported are "
                f"{', '.join(_ARCHITECTURES)} (as a Hugging Face folder also {', '.join(SUPPORTED)})"
            )
        if int(self._optional("split.count", 1)) > 1:
            raise UsageError(
                f"{path} is one part of a split GGUF model; join the parts first (llama-gguf-split --merge)"
            )
        super().__init__(path, self._family(path))
        self._check()

    def _value(self, path: Path, key: str) -> Any:
        if key not in self._fields:
            raise UsageError(f"{path}: the GGUF metadata lacks {key}")
        return self._fields[key].contents()

    def _optional(self, key: str, default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def _family(self, path: Path) -> Family:
        prefix = self._architecture
        if int(self._optional(f"{prefix}.expert_count", 0)):
            raise UsageError(f"{path}: mixtures of experts are not supported")
        if "token_embd.weight" not in self._tensors:
            raise UsageError(f"{path}: the model lacks the tensor token_embd.weight")
        heads = self._value(path, f"{prefix}.attention.head_count")
        hidden = self._value(path, f"{prefix}.embedding_length")
        head_dim = self._optional(f"{prefix}.attention.key_length", None) or hidden // heads
        if (rotated := self._optional(f"{prefix}.rope.dimension_count", head_dim)) != head_dim:
            raise UsageError(
                f"{path}: rotary positions on {rotated} of {head_dim} values of each head are not supported"
            )
        hf = _ARCHITECTURES[prefix](
            vocab_size=self._shape_of("token_embd.weight")[0],
            hidden_size=hidden,
            intermediate_size=self._value(path, f"{prefix}.feed_forward_length"),
            num_hidden_layers=self._value(path, f"{prefix}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._optional(f"{prefix}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._value(path, f"{prefix}.context_length"),
            rms_norm_eps=self._value(path, f"{prefix}.attention.layer_norm_rms_epsilon"),
            rope_parameters=self._rope(path),
            tie_word_embeddings="output.weight" not in self._tensors,
            bos_token_id=self._optional("tokenizer.ggml.bos_token_id", None),
            eos_token_id=self._optional("tokenizer.ggml.eos_token_id", None),
        )
        ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        eos = dict.fromkeys(int(self._optional(key, -1)) for key in ends if key in self._fields)
        family = family_from_hf(hf, tuple(eos))
        inv_freq = family.inv_freq
        if "rope_freqs.weight" in self._tensors and inv_freq is not None:
            # Llama 3's scaling arrives as ready-made divisors of the frequencies.
            inv_freq = inv_freq / torch.from_numpy(np.array(self._tensors["rope_freqs.weight"].data, np.float32))
        return Family(self._with_found_biases(family.config), inv_freq)

    def _with_found_biases(self, config: ModelConfig) -> ModelConfig:
        """GGUF has no flags for biases: what is there counts (Qwen2's are required)."""
        return dataclasses.replace(
            config,
            qkv_bias=config.qkv_bias or "blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            sliding_window=self._optional(f"{self._architecture}.attention.sliding_window", None) or None,
        )

    def _rope(self, path: Path) -> dict[str, Any]:
        prefix = f"{self._architecture}.rope"
        out: dict[str, Any] = {"rope_type": "default", "rope_theta": self._optional(f"{prefix}.freq_base", 10000.0)}
        kind = self._optional(f"{prefix}.scaling.type", "none")
        if kind == "none":
            return out
        if kind not in ROPE_TYPES:
            raise UsageError(
                f"{path}: rotary positions of type {kind!r} are not supported; supported are {', '.join(ROPE_TYPES)}"
            )
        out |= {"rope_type": kind, "factor": float(self._value(path, f"{prefix}.scaling.factor"))}
        if kind == "yarn":
            out["original_max_position_embeddings"] = self._value(path, f"{prefix}.scaling.original_context_length")
        return out

    def _stored_name(self, name: str) -> str:
        return gguf_name(name)

    def _shape_of(self, stored_name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[stored_name].shape))

    def _stored_shape(self, stored_name: str) -> tuple[int, ...] | None:
        return self._shape_of(stored_name) if stored_name in self._tensors else None

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        permuted = self._architecture == "llama" and (".q_proj." in name or ".k_proj." in name)
        tensor = self._tensors[gguf_name(name)]
        rows = slice(None) if permuted else slice(start, stop)
        try:
            value = gguf.dequantize(np.asarray(tensor.data[rows]), tensor.tensor_type)
        except NotImplementedError:
            raise UsageError(
                f"{self.path}: tensor {tensor.name} has the type {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantize; take a GGUF file of another type (F16, Q8_0)"
            ) from None
        out = torch.from_numpy(np.array(value, dtype=np.float32))
        if permuted:
            heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
            out = unpermute(out, heads)[start:stop]
        return out

    def tokenizer(self) -> TokenizerFiles:
        """Return the tokenizer as the file will hold it."""
        add_bos = self._optional("tokenizer.ggml.add_bos_token", None)
        return tokenizer_from_gguf(self.path, self.config, add_bos, self._optional("tokenizer.ggml.pre", None))

    def files(self) -> list[Path]:
        """Return the one file."""
        return [self.path]

    def identity(self) -> str:
        """Return a hex digest of metadata and tensor table."""
        digest = hashlib.sha256()
        for key, field in sorted(self._fields.items()):
            digest.update(key.encode())
            for part in field.data:
                digest.update(field.parts[part].tobytes())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {self._shape_of(name)} {tensor.tensor_type.name}".encode())
        return digest.hexdigest()


def unpermute(value: Tensor, heads: int) -> Tensor:
    """Undo GGUF's reordering of LLaMA's query and key rows [heads * head_dim, ...].

    GGUF pairs neighbouring rows for the rotary embedding; Hugging Face and the format pair row i with i + head_dim / 2.
    """
    split = value.reshape(heads, -1, 2, *value.shape[1:])
    return split.transpose(1, 2).reshape(value.shape)


def _open(path: Path) -> gguf.GGUFReader:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader checks little: a truncated file ends in whatever NumPy raises
        raise UsageError(f"{path} is a damaged GGUF file ({error}); download it again") from None
