"""Which tensors a `.billm` file holds, and what each must look like: the tables of SPEC.md as code.

Everything here is arithmetic on `ModelConfig` and `Quantization`; no file is touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from billm_format.config import ModelConfig, Quantization

FORMAT_NAME = "billm"
FORMAT_VERSION = (1, 1)
ALIGNMENT = 64  # bytes, of every tensor's data within the file
PAD_PREFIX = "pad."  # names of the zero-filled tensors that keep the alignment

# safetensors dtype name -> bytes per element; the only dtypes a .billm file uses.
DTYPE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "F32": 4}

# Order of the last axis of `scales`, and of the four magnitudes made from it.
ALPHA_C, ALPHA_S, ALPHA_O, ALPHA_R = range(4)

GROUP = 32  # columns of a 4-bit table that share a step

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as the layout demands it. A length of -1 is free (the tokenizer's files)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # what it counts as in a byte budget: a key of KINDS
    optional: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the data; shapes of free length have none."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


# kind -> what `billm-info` calls it. The bytes of all kinds and the header add up to the file.
KINDS = {
    "sign": "sign plane",
    "second": "second plane (group flag or residual sign)",
    "salient": "salient column index",
    "scales": "scales, 8 bits",
    "row_scale": "row multipliers",
    "col_scale": "column scales",
    "embedding": "token and position embeddings",
    "head": "output head",
    "other": "norms, biases, rotary frequencies, projections",
    "tokenizer": "tokenizer and chat template",
    "padding": "alignment",
}

# The kinds that the true bits per weight of the binarized Linears count (Linear biases are not weights).
LINEAR_KINDS = ("sign", "second", "salient", "scales", "row_scale", "col_scale")


def row_bytes(cols: int) -> int:
    """Bytes of one row of a bit plane: whole 32-bit words, so that every row starts on one."""
    return 4 * ((cols + 31) // 32)


def table_bytes(cols: int) -> int:
    """Bytes of one row of a 4-bit table: whole groups of 16 bytes."""
    return GROUP // 2 * num_blocks(cols, GROUP)


def num_blocks(cols: int, block: int) -> int:
    """Blocks of `block` columns in a row; the last one may be short."""
    return (cols + block - 1) // block


def linear_tensors(name: str, rows: int, cols: int, block: int, *, bias: bool, col_scale: bool) -> Iterator[TensorSpec]:
    """Yield the tensors of the binarized Linear `name` with weight [rows, cols], in file order."""
    yield TensorSpec(f"{name}.sign", "U8", (rows, row_bytes(cols)), "sign")
    yield TensorSpec(f"{name}.second", "U8", (rows, row_bytes(cols)), "second")
    yield TensorSpec(f"{name}.scales", "U8", (rows, num_blocks(cols, block), 4), "scales")
    yield TensorSpec(f"{name}.row_scale", "F16", (rows,), "row_scale")
    yield TensorSpec(f"{name}.salient", "U8", (row_bytes(cols),), "salient")
    if col_scale:
        yield TensorSpec(f"{name}.col_scale", "F16", (cols,), "col_scale")
    if bias:
        yield TensorSpec(f"{name}.bias", "F32", (rows,), "other")


def _norm(name: str, size: int, config: ModelConfig) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", "F32", (size,), "other")
    if config.norm == "layernorm":
        yield TensorSpec(f"{name}.bias", "F32", (size,), "other")


def _embedding(name: str, kind: str, config: ModelConfig, bits: int) -> Iterator[TensorSpec]:
    shape = (config.vocab_size, config.embedding_size)
    if bits == 4:
        yield TensorSpec(f"{name}.weight", "U8", (shape[0], table_bytes(shape[1])), kind)
        yield TensorSpec(f"{name}.step", "I8", (num_blocks(shape[1], GROUP), shape[0]), kind)
        yield TensorSpec(f"{name}.scale", "F16", shape[:1], kind)
    elif bits == 8:
        yield TensorSpec(f"{name}.weight", "I8", shape, kind)
        yield TensorSpec(f"{name}.scale", "F16", shape[:1], kind)
    else:
        yield TensorSpec(f"{name}.weight", "F16", shape, kind)


def global_tensors(config: ModelConfig, quantization: Quantization) -> Iterator[TensorSpec]:
    """Yield the tensors that belong to no decoder layer, in file order."""
    yield TensorSpec(TOKENIZER, "U8", (-1,), "tokenizer")
    yield TensorSpec(CHAT_TEMPLATE, "U8", (-1,), "tokenizer", optional=True)
    yield from _embedding("embed", "embedding", config, quantization.embedding_bits)
    if config.position == "learned":
        rows = config.max_position_embeddings + config.position_offset
        yield TensorSpec("pos_embed.weight", "F16", (rows, config.hidden_size), "embedding")
    else:
        yield TensorSpec("rope.inv_freq", "F32", (config.head_dim // 2,), "other")
    if config.has_projections:
        yield TensorSpec("project_in.weight", "F16", (config.hidden_size, config.embedding_size), "other")
        yield TensorSpec("project_out.weight", "F16", (config.embedding_size, config.hidden_size), "other")
    if config.final_norm:
        yield from _norm("final_norm", config.hidden_size, config)
    if not config.tie_word_embeddings:
        yield from _embedding("head", "head", config, quantization.embedding_bits)


def layer_tensors(config: ModelConfig, quantization: Quantization, layer: int) -> Iterator[TensorSpec]:
    """Yield the tensors of decoder layer `layer`, in file order."""
    prefix = f"layers.{layer}"
    yield from _norm(f"{prefix}.attn_norm", config.hidden_size, config)
    yield from _norm(f"{prefix}.mlp_norm", config.hidden_size, config)
    if config.qk_norm:
        yield TensorSpec(f"{prefix}.q_norm.weight", "F32", (config.head_dim,), "other")
        yield TensorSpec(f"{prefix}.k_norm.weight", "F32", (config.head_dim,), "other")
    for linear, (rows, cols, bias) in config.linears().items():
        name = f"{prefix}.{linear}"
        block = quantization.block_of(name)
        yield from linear_tensors(name, rows, cols, block, bias=bias, col_scale=quantization.has_col_scale(name))


def all_tensors(config: ModelConfig, quantization: Quantization) -> Iterator[TensorSpec]:
    """Yield every tensor of the file except the padding, in file order."""
    yield from global_tensors(config, quantization)
    for layer in range(config.num_hidden_layers):
        yield from layer_tensors(config, quantization, layer)


def linear_names(config: ModelConfig) -> Iterator[str]:
    """Yield the full name ("layers.0.q_proj") of every binarized Linear, in file order."""
    for layer in range(config.num_hidden_layers):
        for linear in config.linears():
            yield f"layers.{layer}.{linear}"


def check_linear_names(config: ModelConfig, quantization: Quantization) -> None:
    """Raise ValueError unless every Linear that `quantization` names is one of the model's."""
    linears = config.linears()
    for field, names in [("overrides", quantization.overrides), ("col_scales", quantization.col_scales)]:
        for name in names:
            layers, _, rest = name.partition(".")
            layer, _, linear = rest.partition(".")
            known = layers == "layers" and linear in linears and layer.isascii() and layer.isdigit()
            # A thousand digits are no layer; a leading zero would be a second name for the same one.
            if not (known and len(layer) < 8 and int(layer) < config.num_hidden_layers and str(int(layer)) == layer):
                raise ValueError(f"quantization, {field}: wanted names of this model's Linears, found {name!r:.60}")
