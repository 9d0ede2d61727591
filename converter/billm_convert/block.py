"""The full-precision decoder in torch, one block at a time: what calibration runs.

Functional on purpose: weights come in as a dict under the format's names and leave when the block is done.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from billm_format.config import ModelConfig

# Called with the name of a group of Linears that read the same input, and that input [tokens, cols].
Capture = Callable[[str, Tensor], None]


# The groups of `input_groups` in each half of a block, in the order in which they are reached.
HALVES = {"attention": ("qkv", "o"), "mlp": ("mlp", "down")}


def input_groups(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return capture name -> the Linears that read this input, in file order."""
    mlp = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
    return {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "mlp": mlp, "down": ("down_proj",)}


class Rotary:
    """cos and sin of the rotary positions 0..length-1."""

    def __init__(self, inv_freq: Tensor, scale: float, length: int) -> None:
        """Tabulate from the frequencies float32 [head_dim / 2]."""
        angles = torch.arange(length, dtype=torch.float32, device=inv_freq.device)[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        self._cos, self._sin = angles.cos() * scale, angles.sin() * scale

    def __call__(self, x: Tensor, past: int) -> Tensor:
        """Rotate x [batch, heads, tokens, head_dim] whose first token stands at position `past`."""
        half = x.shape[-1] // 2
        rows = slice(past, past + x.shape[-2])
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self._cos[rows] + turned * self._sin[rows]


class KeyValues:
    """One block's keys and values for a text that grows token by token, in memory reserved for all of it at once."""

    def __init__(self, capacity: int) -> None:
        """Reserve nothing before the first `extend`, then `capacity` positions."""
        self._capacity = capacity
        self._store: tuple[Tensor, Tensor] | None = None
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append both [batch, kv heads, tokens, head_dim]; return views of everything so far."""
        if self._store is None:
            shape = (*key.shape[:2], self._capacity, key.shape[3])
            self._store = key.new_empty(shape), value.new_empty(shape)
        start, self.length = self.length, self.length + key.shape[2]
        for store, new in zip(self._store, (key, value), strict=True):
            store[:, :, start : self.length] = new
        return self._store[0][:, :, : self.length], self._store[1][:, :, : self.length]


class DecoderBlock:
    """One decoder layer with its weights: float32 tensors named "q_proj.weight", "attn_norm.weight", ..."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], rotary: Rotary | None) -> None:
        """Keep references; `weights` may be changed between calls."""
        self._config = config
        self.weights = weights
        self._rotary = rotary

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        """Run x [batch, tokens, hidden] and return the output, same shape; `past` holds what came before, and grows."""
        return self.mlp_half(self.attention_half(x, past))

    def attention_half(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        """Run the first half of the block, attention with what surrounds it, on x [batch, tokens, hidden]."""
        return self.written_by("o", x, self._mix(self._pre_norm("attn_norm", x), past, None))

    def mlp_half(self, x: Tensor) -> Tensor:
        """Run the second half on the first's output."""
        return self.written_by("down", x, self._mlp_inner(self._pre_norm("mlp_norm", x), None))

    def read_by(self, group: str, x: Tensor) -> Tensor:
        """Return what a group of Linears reads, [batch, tokens, cols], x being the input of the half they are in."""
        if group in HALVES["attention"]:
            x = self._pre_norm("attn_norm", x)
            return x if group == "qkv" else self._mix(x, None, None)
        x = self._pre_norm("mlp_norm", x)
        return x if group == "mlp" else self._mlp_inner(x, None)

    def written_by(self, group: str, x: Tensor, read: Tensor) -> Tensor:
        """Return the output of a half: `read` is what its last group, "o" or "down", reads, x the half's input."""
        norm = "attn_norm" if group == "o" else "mlp_norm"
        return self._post_norm(norm, x + self._linear(f"{group}_proj", read))

    def observe(self, x: Tensor, capture: Capture) -> None:
        """Show `capture` every Linear's input for x [batch, tokens, hidden]; the block's own output is not computed."""
        x = self.written_by("o", x, self._mix(self._pre_norm("attn_norm", x), None, capture))
        self._mlp_inner(self._pre_norm("mlp_norm", x), capture)

    def _mix(self, x: Tensor, past: KeyValues | None, capture: Capture | None) -> Tensor:
        """Return what the heads gather, [batch, tokens, query_size]."""
        config = self._config
        if capture:
            capture("qkv", x.flatten(0, 1))
        batch, tokens, _ = x.shape
        query = self._heads("q_proj", x, config.num_attention_heads)
        key = self._heads("k_proj", x, config.num_key_value_heads)
        value = self._heads("v_proj", x, config.num_key_value_heads)
        if config.qk_norm:
            query = F.rms_norm(query, (config.head_dim,), self.weights["q_norm.weight"], config.norm_eps)
            key = F.rms_norm(key, (config.head_dim,), self.weights["k_norm.weight"], config.norm_eps)
        start = 0 if past is None else past.length
        if self._rotary is not None:
            query, key = self._rotary(query, start), self._rotary(key, start)
        if past is not None:
            key, value = past.extend(key, value)
        mixed = self._attend(query, key, value, start)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, config.query_size)
        if capture:
            capture("o", mixed.flatten(0, 1))
        return mixed

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        return attend(query, key, value, start, self._config.sliding_window)

    def _mlp_inner(self, x: Tensor, capture: Capture | None) -> Tensor:
        if capture:
            capture("mlp", x.flatten(0, 1))
        if self._config.gated_mlp:
            inner = activate(self._linear("gate_proj", x), self._config.activation).mul_(self._linear("up_proj", x))
        else:
            inner = activate(self._linear("up_proj", x), self._config.activation)
        if capture:
            capture("down", inner.flatten(0, 1))
        return inner

    def _heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        return self._linear(name, x).view(*x.shape[:2], heads, self._config.head_dim).transpose(1, 2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _pre_norm(self, name: str, x: Tensor) -> Tensor:
        return normalize(self._config, self.weights, name, x) if self._config.norm_position == "pre" else x

    def _post_norm(self, name: str, x: Tensor) -> Tensor:
        return normalize(self._config, self.weights, name, x) if self._config.norm_position == "post" else x


def normalize(config: ModelConfig, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply the model's kind of norm with the weights `name`.weight and, for LayerNorm, `name`.bias."""
    weight = weights[f"{name}.weight"]
    if config.norm == "layernorm":
        return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], config.norm_eps)
    return F.rms_norm(x, tuple(weight.shape), weight, config.norm_eps)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the MLP's activation."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def attend(query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None) -> Tensor:
    """Attend causally; query token i stands at position start + i of `key` and `value`."""
    tokens, positions = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and tokens > 1:
        # There torch has no kernel in float32 for heads that share keys: it would write out every head's scores.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    if window is None or window >= positions:
        if start == 0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        if tokens == 1:
            # The newest token sees everything, so the heads that share keys can pose as tokens: nothing is expanded.
            shared = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
            # On a GPU the result need not lie in memory as the query does: a view may not do.
            return F.scaled_dot_product_attention(shared, key, value).reshape(query.shape)
    at = torch.arange(start, start + tokens, device=query.device)[:, None]
    seen = torch.arange(positions, device=query.device)
    mask = seen <= at
    if window is not None:
        mask &= seen > at - window
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def embed(config: ModelConfig, tables: Mapping[str, Tensor], token_rows: Tensor, start: int = 0) -> Tensor:
    """Turn the tokens' embeddings [batch, tokens, embedding_size] into the first block's input [batch, tokens, hidden].

    `tables` holds "project_in.weight" and "pos_embed.weight" where the model has them; token 0 stands at `start`.
    """
    x = token_rows
    if config.has_projections:
        x = F.linear(x, tables["project_in.weight"])
    if config.position == "learned":
        first = start + config.position_offset
        x = x + tables["pos_embed.weight"][first : first + x.shape[1]]
    return x


def finish(config: ModelConfig, tables: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Turn the last block's output [..., hidden] into what the head multiplies [..., embedding_size]."""
    if config.final_norm:
        x = normalize(config, tables, "final_norm", x)
    if config.has_projections:
        x = F.linear(x, tables["project_out.weight"])
    return x
