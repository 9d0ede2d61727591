"""One decoder-only transformer for every family: what differs between them is a field of `ModelConfig`, not a class."""

import time
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from billm_format.errors import UsageError
from billm_format.reader import BillmFile
from billm_rt.backend import Array, Backend, FusedHead, FusedLayers, Layer, LayerOps, Norm, choose
from billm_rt.cache import CacheBatch, KVCache, Texts
from billm_rt.generate import Chunk, generate, generate_batch
from billm_rt.memory import memory_report
from billm_rt.sampling import Logits, Sampling
from billm_rt.tokenizer import Tokenizer

_DEFAULT_CTX = 4096


class Model:
    """A `.billm` file ready to run; made by `load`. A context manager: leaving it closes the file."""

    def __init__(self, file: BillmFile, backend: Backend, ctx: int | None = None) -> None:
        self.file = file
        self.config = file.config
        self.backend = backend
        self.ctx = _context_length(ctx, file.config.max_position_embeddings)
        self.load_seconds = 0.0
        backend.require(file, self.ctx)
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._embed_table = backend.load_table(file.table("embed"))
        self._head_table = (
            self._embed_table if self.config.tie_word_embeddings else backend.load_table(file.table("head"))
        )
        self._positions = self._inv_freq = self._project_in = self._project_out = self._final_norm = None
        if self.config.position == "learned":
            self._positions = backend.load_table(file.table("pos_embed"))
        else:
            self._inv_freq = backend.load_tensor(file.array("rope.inv_freq"))
        if self.config.has_projections:
            self._project_in = backend.load_tensor(file.array("project_in.weight"))
            self._project_out = backend.load_tensor(file.array("project_out.weight"))
        if self.config.final_norm:
            self._final_norm = self._norm_of("final_norm")
        self._layers = [self._layer(f"layers.{i}") for i in range(self.config.num_hidden_layers)]
        self._runner = backend.fuse(self.config, self._layers, self._final_norm, self._head_table)
        # Once, as asking a protocol takes longer than some layers.
        self._fused_head = self._runner if isinstance(self._runner, FusedHead) else None
        self._fused_layers = self._runner if isinstance(self._runner, FusedLayers) else None
        self._has_read_planes = True  # of the file, since its pages were let go of

    @property
    def device(self) -> str:
        """Where the model runs: "cpu", "cuda:0"."""
        return self.backend.device

    @property
    def isa(self) -> str:
        """The instruction set or path in use: "avx2", "numpy", "exact", "cuda" ..."""
        return self.backend.isa

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; parsed at first use, which takes longer than all the rest of loading."""
        file = self.file
        return Tokenizer(file.tokenizer_json(), file.tokenizer_info, file.config, file.chat_template())

    def new_cache(self) -> KVCache:
        """Return an empty cache that grows with what is read, up to `ctx` tokens."""
        cache = self.backend.new_cache(self.config, self.ctx)
        self._caches.add(cache)
        return cache

    def gather(self, caches: Sequence[KVCache]) -> CacheBatch:
        """Return two or more caches of this model, all different, as a batch for `rows_each`."""
        return self.backend.gather(caches)

    def require_room(self, caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
        """Raise DoesNotFitError where a GPU has no room for the caches to grow to their `lengths` in tokens."""
        self.backend.require_room(self.config, caches, lengths)

    def forward(
        self, token_ids: ArrayLike, cache: KVCache, *, logits: Literal["last", "all", "none"] = "last"
    ) -> Array | None:
        """Read `token_ids` behind what `cache` holds and return float32 logits [1 or tokens, vocab_size], or None.

        Long inputs go through in chunks, so that only the logits of "all" grow with their length. Raises UsageError on
        ids outside the vocabulary and DoesNotFitError past the context length, before anything is computed.
        """
        out = [self.backend.logits(head) for head in self._heads(token_ids, cache, logits)]
        if logits == "none":
            return None
        return out[0] if len(out) == 1 else np.concatenate(out)

    def rows(self, token_ids: ArrayLike, cache: KVCache, *, logits: Literal["last", "all"] = "last") -> list[Logits]:
        """As `forward`, for a `Sampler`: the logits of each token, on the device where that is.

        Those of few tokens are valid until the model reads on.
        """
        return [row for head in self._heads(token_ids, cache, logits) for row in self.backend.rows(head)]

    def forward_each(self, token_ids: ArrayLike, batch: CacheBatch) -> Array:
        """Read one token behind each cache of a batch, all at once; return float32 logits [texts, vocab_size].

        Raises as `forward` does, before anything is computed.
        """
        return self.backend.logits(self._read_each(token_ids, batch))

    def rows_each(self, token_ids: ArrayLike, batch: CacheBatch) -> list[Logits]:
        """As `forward_each`, for a `Sampler`, see `rows`."""
        return list(self.backend.rows(self._read_each(token_ids, batch)))

    def _read_each(self, token_ids: ArrayLike, batch: CacheBatch) -> Any:
        ids = self._checked(token_ids)
        if ids.size != len(batch.caches):
            raise UsageError(f"token ids: wanted one for each of {len(batch.caches)} texts, found {ids.size}")
        for cache in batch.caches:
            cache.require(1)
        return self._read(ids, batch, "all")

    def _heads(self, token_ids: ArrayLike, cache: KVCache, logits: Literal["last", "all", "none"]) -> Iterator[Any]:
        """Read the tokens in chunks and yield what the back end has for logits, each to be used before the next."""
        ids = self._checked(token_ids)
        cache.require(ids.size)
        chunk = self.backend.chunk
        for start in range(0, ids.size, chunk):
            ends = start + chunk >= ids.size
            head = self._read(ids[start : start + chunk], cache, "none" if logits == "last" and not ends else logits)
            if head is not None:
                yield head

    def logits(self, token_ids: ArrayLike) -> Array:
        """Return the logits float32 [tokens, vocab_size] of every position of a text read from its start."""
        result = self.forward(token_ids, self.new_cache(), logits="all")
        return result if result is not None else np.empty((0, self.config.vocab_size), np.float32)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        cache: KVCache | None = None,
        lookup: int = 0,
    ) -> Iterator[Chunk]:
        """Stream the continuation of `prompt`; see `billm_rt.generate.generate`."""
        sampling = sampling or Sampling()
        return generate(self, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, cache=cache, lookup=lookup)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, Chunk]]:
        """Stream the continuations of several prompts at once; see `billm_rt.generate.generate_batch`."""
        return generate_batch(self, prompts, max_tokens=max_tokens, sampling=sampling or Sampling(), stop=stop)

    def memory(self) -> dict[str, int]:
        """Return bytes: the file's parts as mapped, copies, live KV caches, what the process holds, `device.<kind>`."""
        device = {f"device.{kind}": size for kind, size in self.device_memory().items()}
        return memory_report(self.file, self._caches, self._copied_bytes()) | device

    def _copied_bytes(self) -> int:
        return 0 if self._fused_layers is None else self._fused_layers.copied_bytes()

    def device_memory(self) -> dict[str, int]:
        """Return the bytes on a device of its own, see `Backend.device_memory`; empty on the CPU."""
        return self.backend.device_memory(self.file, sum(cache.nbytes for cache in self._caches))

    def close(self) -> None:
        """Let go of the file; the model cannot be used afterwards."""
        self._layers.clear()
        for name in [name for name in vars(self) if name.startswith("_") and name != "_caches"]:
            delattr(self, name)
        self.file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the decoder, top to bottom

    def _read(self, ids: NDArray[np.int64], texts: Texts, logits: Literal["last", "all", "none"]) -> Any:
        """Run one chunk through the model, count it as held, and return what the back end has for logits."""
        if isinstance(texts, CacheBatch):
            places = np.array([len(cache) for cache in texts.caches])
        else:
            places = np.arange(len(texts), len(texts) + ids.size)

        def step(ids: Any, positions: Any) -> Any:
            x, table = self._input(ids, positions, places)
            if logits != "none" and self._fused_head is not None:
                return self._fused_head.run_to_logits(x, texts, table, every=logits == "all")
            if self._fused_layers is not None:
                self._fused_layers.run(x, texts, table)
            elif not isinstance(self._runner, FusedLayers):
                x = self._run_layers(x, self._runner, texts, table)
            return None if logits == "none" else self._logits(x if logits == "all" else x[-1:])

        # Overflow to infinity is part of the arithmetic (exp in SiLU); what it must not do is print.
        with np.errstate(all="ignore"):
            head = self.backend.take_step(step, logits, ids, places + self.config.position_offset, texts)
        self._let_go_of_planes(ids.size)
        if isinstance(texts, CacheBatch):
            for cache, token in zip(texts.caches, ids.tolist(), strict=True):
                cache.commit([token])
        else:
            texts.commit(ids.tolist())
        return head

    def _let_go_of_planes(self, tokens: int) -> None:
        """Take the file's planes out of the process's memory once copies of them are what `tokens` tokens have read."""
        layers = self._fused_layers
        if layers is None or tokens > layers.few_tokens:
            self._has_read_planes = True
        elif self._has_read_planes and layers.copied_bytes():
            self._has_read_planes = False
            self.file.let_go()

    def _input(self, ids: Any, positions: Any, places: NDArray[np.int64]) -> tuple[Array, tuple[Array, Array] | None]:
        """Return what the first layer reads, [tokens, hidden_size], and the rotary table, if positions are rotary."""
        backend = self.backend
        x: Array = backend.embed(ids, self._embed_table)
        if self._project_in is not None:
            x = backend.dense(x, self._project_in)
        if self._inv_freq is not None:
            return x, backend.rotary_table(places, self._inv_freq, self.config.rope_scale)
        return backend.add(x, backend.embed(positions, self._positions)), None

    def _run_layers(self, x: Array, ops: LayerOps, texts: Texts, table: tuple[Array, Array] | None) -> Array:
        pre = self.config.norm_position == "pre"
        for index, layer in enumerate(self._layers):
            x = x + self._attention(self._norm(x, layer.attn_norm) if pre else x, index, layer, ops, texts, table)
            x = x if pre else self._norm(x, layer.attn_norm)
            x = x + self._mlp(self._norm(x, layer.mlp_norm) if pre else x, layer, ops)
            x = x if pre else self._norm(x, layer.mlp_norm)
        return x

    def _attention(
        self, x: Array, index: int, layer: Layer, ops: LayerOps, texts: Texts, table: tuple[Array, Array] | None
    ) -> Array:
        config = self.config
        query, key, value = (y.reshape(x.shape[0], -1, config.head_dim) for y in ops.linears(x, layer.qkv))
        if layer.q_norm is not None and layer.k_norm is not None:
            query = ops.rms_norm(query, layer.q_norm, config.norm_eps)
            key = ops.rms_norm(key, layer.k_norm, config.norm_eps)
        if table is not None:
            query, key = ops.rotate(query, table), ops.rotate(key, table)
        mixed, count = [], x.shape[0] // len(texts.caches)
        for place, cache in enumerate(texts.caches):
            rows = slice(place * count, (place + 1) * count)
            cache.write(index, key[rows], value[rows])
            mixed.append(ops.attention(query[rows], cache, index, config.sliding_window))
        return ops.linears(np.concatenate(mixed), layer.o)[0]

    def _mlp(self, x: Array, layer: Layer, ops: LayerOps) -> Array:
        first, *rest = ops.linears(x, layer.up)
        inner = ops.activate(first, self.config.activation)
        for up in rest:  # a gated MLP: `first` was the gate
            inner *= up
        return ops.linears(inner, layer.down)[0]

    def _logits(self, hidden: Array) -> Any:
        if self._final_norm is not None:
            hidden = self._norm(hidden, self._final_norm)
        if self._project_out is not None:
            hidden = self.backend.dense(hidden, self._project_out)
        return self.backend.head(hidden, self._head_table)

    def _norm(self, x: Array, norm: Norm) -> Array:
        eps = self.config.norm_eps
        out: Array
        if norm.bias is None:
            out = self.backend.rms_norm(x, norm.weight, eps)
        else:
            out = self.backend.layer_norm(x, norm.weight, norm.bias, eps)
        return out

    # ---- from the file to the back end

    def _layer(self, prefix: str) -> Layer:
        tensor, linears = self._tensor, self._linears
        return Layer(
            attn_norm=self._norm_of(f"{prefix}.attn_norm"),
            mlp_norm=self._norm_of(f"{prefix}.mlp_norm"),
            q_norm=tensor(f"{prefix}.q_norm.weight") if self.config.qk_norm else None,
            k_norm=tensor(f"{prefix}.k_norm.weight") if self.config.qk_norm else None,
            qkv=linears(prefix, "q_proj", "k_proj", "v_proj"),
            o=linears(prefix, "o_proj"),
            up=linears(prefix, *(("gate_proj", "up_proj") if self.config.gated_mlp else ("up_proj",))),
            down=linears(prefix, "down_proj"),
        )

    def _tensor(self, name: str) -> Array:
        tensor: Array = self.backend.load_tensor(self.file.array(name))
        return tensor

    def _norm_of(self, name: str) -> Norm:
        bias = self._tensor(f"{name}.bias") if self.config.norm == "layernorm" else None
        return Norm(self._tensor(f"{name}.weight"), bias)

    def _linears(self, prefix: str, *names: str) -> Any:
        return self.backend.load_linears([self.file.linear(f"{prefix}.{name}") for name in names])

    def _checked(self, token_ids: ArrayLike) -> NDArray[np.int64]:
        ids = np.asarray(token_ids)
        if ids.size == 0:
            raise UsageError("there is nothing to read: the list of tokens is empty")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"token ids: wanted a flat list of integers, found {ids.dtype} of shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise UsageError(f"token id {worst} is outside the vocabulary (0 to {self.config.vocab_size - 1})")
        return ids.astype(np.int64)


def load(
    path: str | Path,
    device: str = "auto",
    *,
    threads: int | None = None,
    exact: bool = False,
    ctx: int | None = None,
    activation_bits: int = 16,
    kv_bits: int = 16,
) -> Model:
    """Open a `.billm` file and return the model; weights stay mapped, nothing is unpacked.

    `device`: "auto" (the CPU, until the GPU back end is proven), "cpu", "cuda" or "cuda:N". `threads`: of the native
    kernels (default: their own choice). `exact`: float32 NumPy instead of integer activations, very slow. `ctx`:
    context length in tokens (default: the model's, at most 4096). `kv_bits`: 16, or 8 for half the memory of the KV
    cache (not with `exact`, which keeps float32). On the CPU, `activation_bits`: 16, all but exact, or 8, faster (see
    `cpu_backend`). Raises UsageError on bad arguments, a missing file or a device that is not there, and
    CorruptFileError on a damaged file; on a GPU DoesNotFitError, before anything is
    loaded, where the weights and a KV cache of `ctx` tokens exceed the free memory.
    """
    begun = time.perf_counter()
    backend = choose(device, exact=exact, threads=threads, activation_bits=activation_bits, kv_bits=kv_bits)
    model = Model(BillmFile.open(Path(path)), backend, ctx)
    model.load_seconds = time.perf_counter() - begun
    return model


def _context_length(ctx: int | None, longest: int) -> int:
    if ctx is None:
        return min(_DEFAULT_CTX, longest)
    if not 1 <= ctx <= longest:
        raise UsageError(f"--ctx {ctx}: wanted 1 to {longest}, the longest context that this model knows")
    return ctx
