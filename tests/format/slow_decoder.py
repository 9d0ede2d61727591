"""A second reader of `.billm` files, slow and obvious, written from SPEC.md alone and in its order.

Nothing of the project is imported, nor NumPy: lists, `struct` and `json` only. It checks little (the real reader does)
and computes in double precision; it is the oracle for whole files, weights and logits.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Vector = list[float]
Matrix = list[Vector]

FORMATS = {"U8": ("B", 1), "I8": ("b", 1), "F16": ("e", 2), "F32": ("f", 4)}


@dataclass
class SlowLinear:
    """The bytes of a binarized Linear as lists, and its sizes."""

    rows: int
    cols: int
    block: int
    sign: list[int]
    second: list[int]
    salient: list[int]
    scales: list[int]
    row_scale: Vector
    col_scale: Vector
    bias: Vector


def weight(linear: SlowLinear, row: int, col: int) -> float:
    """Section 4, word for word."""
    row_bytes = 4 * -(-linear.cols // 32)
    sign = linear.sign[row * row_bytes + col // 8] >> (col % 8) & 1
    second = linear.second[row * row_bytes + col // 8] >> (col % 8) & 1
    salient = linear.salient[col // 8] >> (col % 8) & 1
    blocks = -(-linear.cols // linear.block)
    first = (row * blocks + col // linear.block) * 4
    alpha_c, alpha_s, alpha_o, alpha_r = linear.scales[first : first + 4]
    if not salient:
        magnitude = alpha_s if second else alpha_c
    elif second != sign:
        magnitude = max(alpha_o - alpha_r, 0)
    else:
        magnitude = min(alpha_o + alpha_r, 255)
    level = magnitude if sign else -magnitude
    return level * linear.row_scale[row] * linear.col_scale[col]


class SlowFile:
    """A `.billm` file, read whole."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header: bytes = content[8 : 8 + length]
        self.data: bytes = content[8 + length :]
        self.entries: dict[str, Any] = json.loads(self.header)
        self.metadata: dict[str, str] = self.entries.pop("__metadata__")
        self.config: dict[str, Any] = json.loads(self.metadata["config"])
        self.quantization: dict[str, Any] = json.loads(self.metadata["quantization"])

    def header_is_whole(self) -> bool:
        """Section 2: the header's own checksum."""
        digits = self.metadata["header_sha256"].encode()
        before, mark, after = self.header.partition(b'"header_sha256":"')
        zeroed = before + mark + b"0" * 64 + after[64:]
        return after[:64] == digits and hashlib.sha256(zeroed).hexdigest().encode() == digits

    def bytes_of(self, name: str) -> bytes:
        """Section 1: the data of one tensor."""
        begin, end = self.entries[name]["data_offsets"]
        return self.data[begin:end]

    def damaged(self) -> list[str]:
        """Return the names of the tensors whose data do not match their checksums."""
        sums = json.loads(self.metadata["checksums"])
        return [name for name in self.entries if hashlib.sha256(self.bytes_of(name)).hexdigest() != sums[name]]

    def values(self, name: str) -> list[Any]:
        """Return the elements of a tensor, row-major."""
        code, size = FORMATS[self.entries[name]["dtype"]]
        content = self.bytes_of(name)
        return list(struct.unpack(f"<{len(content) // size}{code}", content))

    def matrix(self, name: str) -> Matrix:
        """Return a tensor of two dimensions as a list of rows."""
        rows, cols = self.entries[name]["shape"]
        flat = self.values(name)
        return [flat[row * cols : (row + 1) * cols] for row in range(rows)]

    def linear_shapes(self) -> dict[str, tuple[int, int, bool]]:
        """Section 3.3: name -> rows, cols, has bias."""
        c = self.config
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        query, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        shapes = {
            "q_proj": (query, hidden, c["qkv_bias"]),
            "k_proj": (kv, hidden, c["qkv_bias"]),
            "v_proj": (kv, hidden, c["qkv_bias"]),
            "o_proj": (hidden, query, c["o_bias"]),
            "up_proj": (inner, hidden, c["mlp_bias"]),
            "down_proj": (hidden, inner, c["mlp_bias"]),
        }
        if c["gated_mlp"]:
            shapes["gate_proj"] = shapes["up_proj"]
        return shapes

    def linear(self, name: str) -> SlowLinear:
        """Sections 3.4 and 2.2: the parts of one Linear."""
        rows, cols, bias = self.linear_shapes()[name.split(".")[2]]
        return SlowLinear(
            rows=rows,
            cols=cols,
            block=self.quantization["overrides"].get(name, self.quantization["block_size"]),
            sign=self.values(f"{name}.sign"),
            second=self.values(f"{name}.second"),
            salient=self.values(f"{name}.salient"),
            scales=self.values(f"{name}.scales"),
            row_scale=self.values(f"{name}.row_scale"),
            col_scale=self.values(f"{name}.col_scale") if name in self.quantization["col_scales"] else [1.0] * cols,
            bias=self.values(f"{name}.bias") if bias else [0.0] * rows,
        )

    def weights(self, name: str) -> Matrix:
        """Return the dequantized weight of one Linear."""
        linear = self.linear(name)
        return [[weight(linear, row, col) for col in range(linear.cols)] for row in range(linear.rows)]

    def table(self, name: str) -> Matrix:
        """Section 5: `embed` or `head`."""
        rows = self.matrix(f"{name}.weight")
        if self.quantization["embedding_bits"] == 16:
            return rows
        if self.quantization["embedding_bits"] == 4:
            steps = self.matrix(f"{name}.step")
            cols = self.config["embedding_size"]
            rows = [[(code(row, e) - 8) * steps[e // 32][v] for e in range(cols)] for v, row in enumerate(rows)]
        return [[scale * value for value in row] for scale, row in zip(self.values(f"{name}.scale"), rows, strict=True)]

    def logits(self, tokens: list[int]) -> Matrix:
        """Section 6: the logits of every position."""
        c = self.config
        embed = self.table("embed")
        xs = [embed[token] for token in tokens]
        if c["embedding_size"] != c["hidden_size"]:
            xs = [times(self.matrix("project_in.weight"), x) for x in xs]
        if c["position"] == "learned":
            places = self.matrix("pos_embed.weight")
            xs = [plus(x, places[p + c["position_offset"]]) for p, x in enumerate(xs)]
        for layer in range(c["num_hidden_layers"]):
            xs = self.layer(f"layers.{layer}", xs)
        if c["final_norm"]:
            xs = [self.norm("final_norm", x) for x in xs]
        if c["embedding_size"] != c["hidden_size"]:
            xs = [times(self.matrix("project_out.weight"), x) for x in xs]
        head = embed if c["tie_word_embeddings"] else self.table("head")
        return [times(head, x) for x in xs]

    def layer(self, name: str, xs: Matrix) -> Matrix:
        """One decoder layer over all positions."""
        for norm, part in [("attn_norm", self.attention), ("mlp_norm", self.mlp)]:
            if self.config["norm_position"] == "pre":
                ys = part(name, [self.norm(f"{name}.{norm}", x) for x in xs])
                xs = [plus(x, y) for x, y in zip(xs, ys, strict=True)]
            else:
                ys = part(name, xs)
                xs = [self.norm(f"{name}.{norm}", plus(x, y)) for x, y in zip(xs, ys, strict=True)]
        return xs

    def norm(self, name: str, x: Vector) -> Vector:
        """RMSNorm or LayerNorm."""
        gains = self.values(f"{name}.weight")
        if self.config["norm"] == "rmsnorm":
            return rms_norm(x, gains, self.config["norm_eps"])
        mean = sum(x) / len(x)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + self.config["norm_eps"])
        shifts = self.values(f"{name}.bias")
        return [(v - mean) / deviation * gain + shift for v, gain, shift in zip(x, gains, shifts, strict=True)]

    def apply(self, name: str, xs: Matrix) -> Matrix:
        """W x + bias for every position."""
        matrix, bias = self.weights(name), self.linear(name).bias
        return [plus(times(matrix, x), bias) for x in xs]

    def attention(self, name: str, xs: Matrix) -> Matrix:
        """Causal attention of all positions."""
        c = self.config
        queries, keys, values = (
            [self.heads(name, x, part, p) for p, x in enumerate(self.apply(f"{name}.{part}_proj", xs))]
            for part in "qkv"
        )
        group = c["num_attention_heads"] // c["num_key_value_heads"]
        window = c["sliding_window"] or len(xs)
        mixed = []
        for p in range(len(xs)):
            out: Vector = []
            for h in range(c["num_attention_heads"]):
                seen = range(max(0, p - window + 1), p + 1)
                scores = [dot(queries[p][h], keys[k][h // group]) / math.sqrt(c["head_dim"]) for k in seen]
                shares = [math.exp(score - max(scores)) for score in scores]
                for i in range(c["head_dim"]):
                    out.append(
                        sum(s * values[k][h // group][i] for s, k in zip(shares, seen, strict=True)) / sum(shares)
                    )
            mixed.append(out)
        return self.apply(f"{name}.o_proj", mixed)

    def heads(self, name: str, x: Vector, part: str, p: int) -> Matrix:
        """Cut q, k or v into heads; normalize and rotate those of q and k."""
        c = self.config
        size = c["head_dim"]
        heads = [x[start : start + size] for start in range(0, len(x), size)]
        if part == "v":
            return heads
        if c["qk_norm"]:
            gains = self.values(f"{name}.{part}_norm.weight")
            heads = [rms_norm(head, gains, c["norm_eps"]) for head in heads]
        if c["position"] == "rope":
            heads = [rotate(head, p, self.values("rope.inv_freq"), c["rope_scale"]) for head in heads]
        return heads

    def mlp(self, name: str, xs: Matrix) -> Matrix:
        """The two or three Linears behind attention."""
        function = ACTIVATIONS[self.config["activation"]]
        ups = self.apply(f"{name}.up_proj", xs)
        if self.config["gated_mlp"]:
            gates = self.apply(f"{name}.gate_proj", xs)
            inner = [
                [function(g) * u for g, u in zip(gate, up, strict=True)] for gate, up in zip(gates, ups, strict=True)
            ]
        else:
            inner = [[function(u) for u in up] for up in ups]
        return self.apply(f"{name}.down_proj", inner)


def code(row: Vector, col: int) -> int:
    """The 4-bit code of a column: low halves of bytes hold the first sixteen of a group, high halves the others."""
    group, place = divmod(col, 32)
    byte = int(row[16 * group + place % 16])
    return byte % 16 if place < 16 else byte // 16


def rotate(old: Vector, position: int, inv_freq: Vector, scale: float) -> Vector:
    """The rotary embedding of one head: element i with element i + D / 2."""
    half = len(old) // 2
    new = list(old)
    for i in range(half):
        cosine, sine = scale * math.cos(position * inv_freq[i]), scale * math.sin(position * inv_freq[i])
        new[i] = old[i] * cosine - old[i + half] * sine
        new[i + half] = old[i + half] * cosine + old[i] * sine
    return new


def rms_norm(x: Vector, gains: Vector, eps: float) -> Vector:
    """x / sqrt(mean(x^2) + eps) * weight."""
    size = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v / size * gain for v, gain in zip(x, gains, strict=True)]


def dot(a: Vector, b: Vector) -> float:
    """The inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(matrix: Matrix, x: Vector) -> Vector:
    """Matrix times vector."""
    return [dot(row, x) for row in matrix]


def plus(a: Vector, b: Vector) -> Vector:
    """The sum of two vectors."""
    return [x + y for x, y in zip(a, b, strict=True)]


ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
}
