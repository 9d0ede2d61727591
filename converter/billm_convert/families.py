"""Which models can be converted, and how each family's configuration and tensor names map onto the format's."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from billm_format.config import ModelConfig
from billm_format.errors import UsageError

SUPPORTED = {
    "llama": "LLaMA 1, 2, 3, Vicuna, SmolLM2 and others with the LLaMA architecture",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "opt": "OPT, Galactica",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of these do not depend on the text's length

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """A model's shape in the format's terms, with what the format keeps as a tensor."""

    config: ModelConfig
    inv_freq: Tensor | None  # float32 [head_dim / 2]; None: learned positions
    plain_norms: bool = False  # the checkpoint has no norm weights: they are 1, the biases 0


def check_supported(model_type: object, where: str) -> None:
    """Raise UsageError naming what is supported unless `model_type` is."""
    if model_type not in SUPPORTED:
        known = "; ".join(f"{key} ({names})" for key, names in SUPPORTED.items())
        raise UsageError(f"{where}: models of type {model_type!r} are not supported; supported are {known}")


def family_from_hf(hf: Any, eos_token_ids: tuple[int, ...]) -> Family:
    """Translate a Hugging Face configuration; `eos_token_ids` are what ends an answer.

    Raises UsageError where the model has something that the format does not hold.
    """
    check_supported(hf.model_type, "this model")
    try:
        if hf.model_type == "opt":
            return _opt(hf, eos_token_ids)
        return _llama_like(hf, eos_token_ids)
    except ValueError as error:
        raise UsageError(f"config.json does not describe a usable model: {error}") from None


def _common(hf: Any, eos: tuple[int, ...], activation: str) -> dict[str, Any]:
    if activation not in _ACTIVATIONS:
        raise UsageError(f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    bos = hf.bos_token_id
    return {
        "family": str(hf.model_type),
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_hidden_layers": hf.num_hidden_layers,
        "num_attention_heads": hf.num_attention_heads,
        "max_position_embeddings": hf.max_position_embeddings,
        "activation": _ACTIVATIONS[activation],
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        # Some configurations name tokens beyond the vocabulary (-1, or a pad token never added): nothing can emit them.
        "bos_token_id": bos if isinstance(bos, int) and 0 <= bos < hf.vocab_size else None,
        "eos_token_ids": tuple(token for token in eos if 0 <= token < hf.vocab_size),
    }


def _llama_like(hf: Any, eos: tuple[int, ...]) -> Family:
    attention_bias = bool(getattr(hf, "attention_bias", False))
    inv_freq, rope_scale = rope_frequencies(hf)
    config = ModelConfig(
        **_common(hf, eos, hf.hidden_act),
        embedding_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=_head_dim(hf),
        norm="rmsnorm",
        norm_eps=float(hf.rms_norm_eps),
        norm_position="pre",
        final_norm=True,
        position="rope",
        position_offset=0,
        rope_scale=rope_scale,
        gated_mlp=True,
        qkv_bias=True if hf.model_type == "qwen2" else attention_bias,
        o_bias=False if hf.model_type == "qwen2" else attention_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=hf.model_type == "qwen3",
        sliding_window=_sliding_window(hf),
    )
    return Family(config, inv_freq)


def _opt(hf: Any, eos: tuple[int, ...]) -> Family:
    biased = bool(hf.enable_bias)
    config = ModelConfig(
        **_common(hf, eos, hf.activation_function),
        embedding_size=hf.word_embed_proj_dim,
        intermediate_size=hf.ffn_dim,
        num_key_value_heads=hf.num_attention_heads,
        head_dim=_head_dim(hf),
        norm="layernorm",
        norm_eps=1e-5,  # torch.nn.LayerNorm's default, which OPT never changes
        norm_position="pre" if hf.do_layer_norm_before else "post",
        final_norm=bool(hf.do_layer_norm_before and not hf._remove_final_layer_norm),
        position="learned",
        position_offset=2,
        rope_scale=1.0,
        gated_mlp=False,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
        qk_norm=False,
        sliding_window=None,
    )
    return Family(config, None, plain_norms=not hf.layer_norm_elementwise_affine)


def _head_dim(hf: Any) -> int:
    given = getattr(hf, "head_dim", None)
    if given:
        return int(given)
    if hf.hidden_size % hf.num_attention_heads:
        raise ValueError(f"hidden_size {hf.hidden_size} is no multiple of {hf.num_attention_heads} attention heads")
    return int(hf.hidden_size // hf.num_attention_heads)


def _sliding_window(hf: Any) -> int | None:
    window = getattr(hf, "sliding_window", None)
    if not window or getattr(hf, "use_sliding_window", True) is False:
        return None
    kinds = set(getattr(hf, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UsageError(
            f"this model mixes layers with a sliding window of {window} and layers with full attention, which the "
            "format does not hold; set use_sliding_window to false in config.json to convert it with full attention"
        )
    return int(window)


def rope_frequencies(hf: Any) -> tuple[Tensor, float]:
    """Return the rotary frequencies float32 [head_dim / 2] and the factor on cos and sin."""
    parameters = hf.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UsageError(f"rotary positions of type {kind!r} are not supported; supported are {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError("rotary positions on a part of each head (partial_rotary_factor) are not supported")
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
        return inv_freq.to(torch.float32), float(scale)
    size = _head_dim(hf)
    exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
    return 1.0 / (float(parameters["rope_theta"]) ** exponent), 1.0


def canonical_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a source must deliver, `rope.inv_freq` apart."""
    hidden, width = config.hidden_size, config.embedding_size

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
        if config.norm == "layernorm":
            shapes[f"{name}.bias"] = (size,)
        return shapes

    out: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, width)}
    if config.position == "learned":
        out["pos_embed.weight"] = (config.max_position_embeddings + config.position_offset, hidden)
    if config.has_projections:
        out |= {"project_in.weight": (hidden, width), "project_out.weight": (width, hidden)}
    if config.final_norm:
        out |= norm("final_norm", hidden)
    if not config.tie_word_embeddings:
        out["head.weight"] = (config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        out |= norm(f"{prefix}.attn_norm", hidden) | norm(f"{prefix}.mlp_norm", hidden)
        if config.qk_norm:
            out |= {f"{prefix}.q_norm.weight": (config.head_dim,), f"{prefix}.k_norm.weight": (config.head_dim,)}
        for name, (rows, cols, bias) in config.linears().items():
            out[f"{prefix}.{name}.weight"] = (rows, cols)
            if bias:
                out[f"{prefix}.{name}.bias"] = (rows,)
    return out


_LLAMA_GLOBAL = {"embed": "embed_tokens", "final_norm": "norm"}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_OPT_GLOBAL = {"embed": "embed_tokens", "pos_embed": "embed_positions", "final_norm": "final_layer_norm"}
_OPT_LAYER = {
    "attn_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "o_proj": "self_attn.out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(canonical: str, *, opt: bool) -> str:
    """Return a tensor's name in a Hugging Face checkpoint, without the prefix of the base model ("model.")."""
    if match := _LAYER_NAME.fullmatch(canonical):
        layer, part, kind = match.groups()
        return f"layers.{layer}.{(_OPT_LAYER if opt else _LLAMA_LAYER).get(part, f'self_attn.{part}')}.{kind}"
    part, _, kind = canonical.rpartition(".")
    return f"{(_OPT_GLOBAL if opt else _LLAMA_GLOBAL).get(part, part)}.{kind}"


_GGUF_GLOBAL = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
_GGUF_LAYER = {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(canonical: str) -> str:
    """Return a tensor's name in a GGUF file."""
    if match := _LAYER_NAME.fullmatch(canonical):
        layer, part, kind = match.groups()
        return f"blk.{layer}.{_GGUF_LAYER[part]}.{kind}"
    part, _, kind = canonical.rpartition(".")
    return f"{_GGUF_GLOBAL[part]}.{kind}"
