"""All decoder layers in one native call: what `model.py` spells out, `src/decoder.c` does without the interpreter."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from billm_format.config import ModelConfig
from billm_format.packing import Table
from billm_rt import cpu
from billm_rt.backend import Array, Layer, Norm
from billm_rt.cache import Texts

if TYPE_CHECKING:
    from billm_rt.cpu_backend import Shared

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of `enum billm_activation`
_MAX_HEAD_DIM = 256  # BILLM_MAX_WIDTH


class NativeLayers:
    """The layers of a model, checked once and run from the file's own memory."""

    def __init__(
        self, config: ModelConfig, layers: Sequence[Layer], activation_bits: int, head: tuple[Any, ...] | None = None
    ) -> None:
        from billm_rt.cpu import _native

        self._count = len(layers)
        self._decoder = _native.Decoder(
            (
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.sliding_window or 0,
            ),
            config.norm_eps,
            config.norm_position == "post",
            config.gated_mlp,
            _ACTIVATIONS.index(config.activation),
            activation_bits,
            tuple(_parts(layer) for layer in layers),
            head,
        )

    @staticmethod
    def can_run(config: ModelConfig) -> bool:
        """Return whether the native library is there and knows heads this wide."""
        return cpu.available() and config.head_dim <= _MAX_HEAD_DIM

    def run(self, x: Array, texts: Texts, rotary: tuple[Array, Array] | None) -> None:
        """Replace x float32 [tokens, hidden_size] by the last layer's output; write the caches, without committing."""
        self._run(x, texts, rotary, None)

    @property
    def few_tokens(self) -> int:
        """How many tokens at once the instruction set reads from planes in its own order; 0: it has none."""
        return cpu.few_tokens()

    def copied_bytes(self) -> int:
        """Return the bytes of planes that the instruction set has put into its own order; none before it decodes."""
        return self._decoder.copied_bytes()

    def _run(self, x: Array, texts: Texts, rotary: tuple[Array, Array] | None, logits: Array | None) -> None:
        tokens, caches = x.shape[0], texts.caches
        cos, sin = (None, None) if rotary is None else (part.reshape(tokens, -1) for part in rotary)
        starts = tuple(map(len, caches))
        rooms = [cache.room_for(tokens // len(caches)) for cache in caches]
        # Layer by layer, and of each layer every text's.
        held = rooms[0] if len(rooms) == 1 else tuple(itertools.chain(*zip(*rooms, strict=True)))
        # A long text goes layer by layer, so that Ctrl-C is heard in between; a token of each in one call.
        step = self._count if tokens == len(caches) else 1
        for first in range(0, self._count, step):
            last = first + step == self._count
            places = held[first * len(caches) : (first + step) * len(caches)]
            self._decoder.run(x, starts, cos, sin, first, places, logits if last else None)


class NativeModel(NativeLayers):
    """The layers, the last norm and a head of 4 or 8 bits: a token costs one native call."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[Layer],
        activation_bits: int,
        norm: Norm | None,
        head: Table,
        head_block: int,
    ) -> None:
        """`head_block`: columns that share an activation scale in front of a head of 8 bits."""
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        parts = (weight, bias, head.weight, head.step, head.scale, head_block)
        super().__init__(config, layers, activation_bits, parts)
        self._vocab_size = config.vocab_size

    def run_to_logits(self, x: Array, texts: Texts, rotary: tuple[Array, Array] | None, *, every: bool) -> Array:
        """As `run`; return the logits float32 [tokens or 1, vocab_size] of every token or of the last."""
        logits = np.empty((x.shape[0] if every else 1, self._vocab_size), np.float32)
        if every or x.shape[0] == 1:
            self._run(x, texts, rotary, logits)
        else:
            self._run(x, texts, rotary, None)
            self._decoder.run(x[-1:], (0,), None, None, 0, (), logits)
        return logits


def _parts(layer: Layer) -> tuple[Any, ...]:
    norms = (layer.attn_norm.weight, layer.attn_norm.bias, layer.mlp_norm.weight, layer.mlp_norm.bias)
    groups = (layer.qkv, layer.o, layer.up, layer.down)
    return *norms, layer.q_norm, layer.k_norm, *(tuple(map(_input, group)) for group in groups)


def _input(shared: "Shared") -> tuple[int, Array | None, tuple[tuple[int, Any], ...]]:
    members = tuple((place, cpu.native_linear(linear)) for place, linear in shared.members)
    return shared.block, shared.col_scale, members
