"""The model's shape as a `.billm` file states it: one frozen record, checked once, for every family.

The families differ only in the fields of `ModelConfig`; no reader of a file needs to know a family's name.
"""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

BLOCK_SIZES = (32, 64, 128, 256)
EMBEDDING_BITS = (4, 8, 16)

# Bounds that keep every product of two sizes far below 2**63 and every allocation honest.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12


@dataclass(frozen=True)
class ModelConfig:
    """Everything a decoder needs besides its tensors. Sizes are element counts; names are Hugging Face's.

    A decoder layer is `x + attention(norm(x))`, then `x + mlp(norm(x))` when `norm_position` is "pre", and
    `norm(x + attention(x))`, then `norm(x + mlp(x))` when it is "post" (OPT-350M).
    """

    family: str  # where the model comes from ("llama", "opt", ...): information, never interpreted
    vocab_size: int
    hidden_size: int
    embedding_size: int  # width of a token embedding; differs from hidden_size where project_in/project_out exist
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rmsnorm", "layernorm"]
    norm_eps: float
    norm_position: Literal["pre", "post"]
    final_norm: bool
    position: Literal["rope", "learned"]
    position_offset: int  # learned positions: row of pos_embed that position 0 reads (OPT: 2)
    rope_scale: float  # factor on cos and sin (YaRN's attention factor, else 1); the frequencies are a tensor
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on every query and key head, before the rotary embedding (Qwen3)
    sliding_window: int | None  # a query sees itself and the window - 1 tokens before it; None: all of them
    tie_word_embeddings: bool  # the output head is the token embedding
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends an answer

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, unless every value is usable and they fit each other."""
        for name in (
            "vocab_size",
            "hidden_size",
            "embedding_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _in_range(name, getattr(self, name), 1, MAX_SIZE)
        _in_range("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        _in_range("position_offset", self.position_offset, 0, MAX_SIZE)
        if self.sliding_window is not None:
            _in_range("sliding_window", self.sliding_window, 1, MAX_SIZE)
        for name, most in [("norm_eps", 1.0), ("rope_scale", 1e3)]:
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= most):  # anything larger overflows in float32
                raise ValueError(f"config field {name}: wanted a positive number up to {most:g}, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config field num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"config field head_dim: rotary positions want an even number, found {self.head_dim}")
        for name, token in [("bos_token_id", self.bos_token_id), *(("eos_token_ids", t) for t in self.eos_token_ids)]:
            if token is not None:
                _in_range(name, token, 0, self.vocab_size - 1)
        _in_range("num_attention_heads * head_dim", self.query_size, 1, MAX_SIZE)

    @property
    def query_size(self) -> int:
        """Columns of o_proj and rows of q_proj: num_attention_heads * head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Rows of k_proj and of v_proj: num_key_value_heads * head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def has_projections(self) -> bool:
        """Whether project_in and project_out stand between embedding and decoder (OPT-350M)."""
        return self.embedding_size != self.hidden_size

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """Return name -> (rows, cols, has bias) of one decoder layer's Linears, in file order."""
        hidden, inner, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.key_value_size
        shapes = {
            "q_proj": (query, hidden, self.qkv_bias),
            "k_proj": (kv, hidden, self.qkv_bias),
            "v_proj": (kv, hidden, self.qkv_bias),
            "o_proj": (hidden, query, self.o_bias),
        }
        if self.gated_mlp:
            shapes["gate_proj"] = (inner, hidden, self.mlp_bias)
        shapes["up_proj"] = (inner, hidden, self.mlp_bias)
        shapes["down_proj"] = (hidden, inner, self.mlp_bias)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Return the record as the JSON object that the file's metadata holds."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, value: object) -> "ModelConfig":
        """Build the record from parsed JSON; ValueError names a missing, unknown or mistyped field."""
        return record_from_json(cls, value, "config")


@dataclass(frozen=True)
class Quantization:
    """Which block size every Linear has: one for all, and the exceptions by full name ("layers.3.v_proj")."""

    block_size: int
    overrides: dict[str, int] = dataclasses.field(default_factory=dict)
    embedding_bits: int = 8  # 4: groups of 32 columns with a step each; 8: int8 rows with a scale each; 16: float16
    col_scales: tuple[str, ...] = ()  # full names of the Linears that carry a col_scale

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, unless every value is one that the format knows."""
        for where, block in [("block_size", self.block_size), *self.overrides.items()]:
            if block not in BLOCK_SIZES:
                raise ValueError(f"quantization, {where}: wanted one of {BLOCK_SIZES}, found {block!r}")
        if self.embedding_bits not in EMBEDDING_BITS:
            raise ValueError(f"quantization, embedding_bits: wanted 4, 8 or 16, found {self.embedding_bits!r}")
        if len(self._with_col_scale) != len(self.col_scales):
            raise ValueError("quantization, col_scales: wanted every Linear once, found one twice")

    # A set, not the tuple: a file may name tens of thousands of Linears, and each is looked up.
    @functools.cached_property
    def _with_col_scale(self) -> frozenset[str]:
        return frozenset(self.col_scales)

    def has_col_scale(self, linear: str) -> bool:
        """Whether the Linear with this full name carries a col_scale."""
        return linear in self._with_col_scale

    def block_of(self, linear: str) -> int:
        """Return the block size of the Linear with this full name."""
        return self.overrides.get(linear, self.block_size)

    def to_json(self) -> dict[str, Any]:
        """Return the record as the JSON object that the file's metadata holds."""
        return dataclasses.asdict(self) | {"col_scales": list(self.col_scales)}

    @classmethod
    def from_json(cls, value: object) -> "Quantization":
        """Build the record from parsed JSON; ValueError names a missing, unknown or mistyped field."""
        return record_from_json(cls, value, "quantization")


@dataclass(frozen=True)
class TokenizerInfo:
    """What the chat template and the prompt need beside tokenizer.json: the special tokens as text."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    add_bos: bool = False  # whether the original tokenizer puts bos_token in front of a text

    def to_json(self) -> dict[str, Any]:
        """Return the record as the JSON object that the file's metadata holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "TokenizerInfo":
        """Build the record from parsed JSON; ValueError names a missing, unknown or mistyped field."""
        return record_from_json(cls, value, "tokenizer")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"config field {name}: wanted {low} to {high}, found {value}")


_Record = typing.TypeVar("_Record")


def record_from_json(cls: type[_Record], value: object, what: str) -> _Record:
    """Build a frozen dataclass from parsed JSON, every field present, known and of its declared type."""
    if not isinstance(value, dict):
        raise ValueError(f"{what}: wanted a JSON object, found {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    if missing := hints.keys() - value.keys():
        raise ValueError(f"{what}: field {min(missing)} is missing")
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{what}: field {min(unknown)!r} is not one this version knows")
    return cls(**{name: _typed(value[name], hint, f"{what} field {name}") for name, hint in hints.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the annotation `hint` wants it (list -> tuple, int -> float), or raise ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is types.UnionType:
        if value is None:
            return None
        return _typed(value, args[0], where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_typed(item, args[0], where) for item in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {str(key): _typed(item, args[1], where) for key, item in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
    elif type(value) is hint:  # bool is an int to isinstance, never here
        return value
    raise ValueError(f"{where}: wanted {_describe(hint)}, found {value!r:.60}")


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
