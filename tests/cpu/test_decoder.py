"""The native decoder layers: against the same model op by op, against themselves cut otherwise, and refusals."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import FAMILIES, make_random_billm, tiny_config

import billm_rt
from billm_format.config import Quantization
from billm_rt import cpu
from billm_rt.cache import KVCache
from billm_rt.cpu.decoder import NativeLayers

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")

CONTEXT = 300  # four blocks of keys and a ragged fifth
# Both paths round activations to integers; a sum in another order tips one in a few hundred of them over.
CLOSE = 8e-4


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs."""
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture(params=sorted(FAMILIES))
def path(request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> Path:
    """A tiny random file of each family; Linears that read one input do not all share its quantization."""
    config = tiny_config(request.param, max_position_embeddings=CONTEXT)
    quantization = Quantization(
        block_size=32, overrides={"layers.0.k_proj": 64}, col_scales=("layers.0.v_proj", "layers.1.down_proj")
    )
    make_random_billm(tmp_path / "m.billm", config, quantization, seed)
    return tmp_path / "m.billm"


def _load(path: Path, **options: Any) -> billm_rt.Model:
    return billm_rt.load(path, ctx=CONTEXT, **options)


def _op_by_op(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> billm_rt.Model:
    with monkeypatch.context() as patch:
        patch.setattr(NativeLayers, "can_run", staticmethod(lambda config: False))
        return _load(path, **options)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_layers_equal_the_loop_of_the_model(
    isa: str, path: Path, kv_bits: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = rng.integers(0, 320, CONTEXT)
    # A key or value on the border between two integers: the coarser they are, the more it counts where it falls.
    close = CLOSE if kv_bits == 16 else 20 * CLOSE
    with _load(path, kv_bits=kv_bits) as model, _op_by_op(path, monkeypatch, kv_bits=kv_bits) as loop:
        assert model.isa == isa
        assert _difference(model.logits(tokens), loop.logits(tokens)) < close


def test_a_small_cache_holds_half_the_bytes_and_gives_nearly_the_same(path: Path, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 320, CONTEXT)
    results, sizes = [], []
    for bits in (16, 8):
        with _load(path, kv_bits=bits) as model:
            cache = model.new_cache()
            results.append(model.forward(tokens, cache, logits="all"))
            sizes.append(cache.nbytes)
    scales = 2 * sizes[1] - sizes[0]  # float32 in both
    assert 0 < scales < sizes[1] / 2
    assert 1e-5 < _difference(results[1], results[0]) < 0.05


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_tokens_one_by_one_in_chunks_and_after_a_cut_give_the_same_bits(
    isa: str, path: Path, kv_bits: int, rng: np.random.Generator
) -> None:
    tokens = rng.integers(0, 320, CONTEXT)
    with _load(path, kv_bits=kv_bits) as model:
        wanted = model.logits(tokens)
        cache = model.new_cache()
        model.forward(rng.integers(0, 320, 217), cache)
        cache.truncate(0)
        parts = []
        for start, stop in [(0, 1), (1, 60), (60, 61), (61, 128), (128, 130), (130, 299), (299, 300)]:
            parts.append(model.forward(tokens[start:stop], cache, logits="all"))
        assert np.array_equal(np.concatenate(parts), wanted)
        cache.truncate(100)
        one_by_one = [model.forward([token], cache) for token in tokens[100:]]
        assert np.array_equal(np.concatenate(one_by_one), wanted[100:])


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_batch_gives_each_text_the_bits_that_it_has_alone(
    isa: str, path: Path, kv_bits: int, rng: np.random.Generator
) -> None:
    """Texts of different lengths, one of them empty, over steps in which their caches grow."""
    lengths = [0, 1, 17, 140, 255]
    with _load(path, kv_bits=kv_bits) as model:
        texts = [rng.integers(0, 320, length + 6) for length in lengths]
        wanted = [model.logits(text) for text in texts]
        caches = [model.new_cache() for _ in texts]
        for text, length, cache in zip(texts, lengths, caches, strict=True):
            if length:
                model.forward(text[:length], cache)
        batch = model.gather(caches)
        for step in range(6):
            tokens = [text[length + step] for text, length in zip(texts, lengths, strict=True)]
            rows = model.rows_each(tokens, batch)
            for row, logits, length in zip(rows, wanted, lengths, strict=True):
                assert np.array_equal(row, logits[length + step])
        assert [cache.tokens for cache in caches] == [text.tolist() for text in texts]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_heads_of_every_kind(
    isa: str, family: str, bits: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token alone, the last of several and all of them: the same logits, and those of the model op by op."""
    config = tiny_config(family, max_position_embeddings=CONTEXT)
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=32, embedding_bits=bits))
    tokens = rng.integers(0, 320, 9)
    with _load(tmp_path / "m.billm") as model:
        every = model.logits(tokens)
        last = model.forward(tokens, model.new_cache())
        cache = model.new_cache()
        alone = [model.forward([token], cache) for token in tokens]
    assert last is not None and np.array_equal(last[0], every[-1])
    assert np.array_equal(np.concatenate(alone), every)
    with _op_by_op(tmp_path / "m.billm", monkeypatch) as model:
        assert _difference(every, model.logits(tokens)) < CLOSE


def test_logits_want_a_head(tmp_path: Path) -> None:
    config = tiny_config()
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=32, embedding_bits=16))
    with billm_rt.load(tmp_path / "m.billm") as model:
        assert isinstance(model._runner, NativeLayers)
        with pytest.raises(ValueError, match="made without a head"):
            model._runner._decoder.run(
                np.ones((1, 96), np.float32), (0,), None, None, 0, (), np.empty((1, 320), np.float32)
            )


def test_threads_change_nothing(path: Path, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 320, 150)
    before, results = cpu.threads(), []
    for threads in (1, 2, 5):
        with _load(path, threads=threads) as model:
            cache = model.new_cache()
            results.append([model.forward(tokens, cache, logits="all"), model.forward([7], cache)])
    cpu.set_threads(before)
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("width", [8, 16, 40, 64, 128, 256])
def test_heads_of_every_width(
    isa: str, width: int, kv_bits: int, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven heads a group: rows by fours, and what is left over."""
    config = tiny_config(head_dim=width, num_attention_heads=14, max_position_embeddings=CONTEXT)
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=128), seed)
    tokens = np.random.default_rng(seed).integers(0, 320, 140)
    options = {"kv_bits": kv_bits}
    close = CLOSE if kv_bits == 16 else 20 * CLOSE
    with (
        _load(tmp_path / "m.billm", **options) as model,
        _op_by_op(tmp_path / "m.billm", monkeypatch, **options) as loop,
    ):
        assert _difference(model.logits(tokens), loop.logits(tokens)) < close


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(isa: str, activation: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(activation=activation, max_position_embeddings=CONTEXT)
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=32), seed)
    with _load(tmp_path / "m.billm") as model, _op_by_op(tmp_path / "m.billm", monkeypatch) as loop:
        assert _difference(model.logits(range(9)), loop.logits(range(9))) < CLOSE


def test_a_damaged_norm_shows_as_not_a_number(tmp_path: Path, seed: int) -> None:
    """Infinities must not pass as quiet zeros: the sampler refuses what is not a number."""
    config = tiny_config(max_position_embeddings=CONTEXT)
    huge = np.full(config.hidden_size, 3e38, np.float32)
    make_random_billm(tmp_path / "m.billm", config, seed=seed, tensors={"layers.1.mlp_norm.weight": huge})
    with _load(tmp_path / "m.billm") as model:
        assert np.isnan(model.logits([1, 2, 3])).all()


def test_wide_heads_take_the_loop(tmp_path: Path) -> None:
    config = tiny_config(head_dim=264)
    make_random_billm(tmp_path / "m.billm", config)
    assert not NativeLayers.can_run(config)
    with billm_rt.load(tmp_path / "m.billm") as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


Run = Callable[..., None]
_CACHES = KVCache(tiny_config(), 64, np.int16).room_for(64)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    """The native call and arguments that it takes."""
    config = tiny_config()
    make_random_billm(tmp_path / "m.billm", config)
    with billm_rt.load(tmp_path / "m.billm") as model:
        arguments = {
            "x": np.ones((3, 96), np.float32),
            "starts": (0,),
            "cos": np.ones((3, 8), np.float32),
            "sin": np.zeros((3, 8), np.float32),
            "first": 0,
            "caches": _CACHES,
            "logits": None,
        }

        def call(**changes: Any) -> None:
            assert isinstance(model._runner, NativeLayers)
            model._runner._decoder.run(*{**arguments, **changes}.values())

        yield call, arguments


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": np.ones((3, 95), np.float32)}, ValueError),
        ({"x": np.ones((3, 96))}, TypeError),
        ({"x": np.ones((96, 3), np.float32).T}, ValueError),
        ({"cos": None}, ValueError),
        ({"cos": np.ones((2, 8), np.float32)}, ValueError),
        ({"sin": np.ones((3, 8), np.float16)}, TypeError),
        ({"starts": (-1,)}, ValueError),
        ({"starts": (62,)}, ValueError),
        ({"starts": ("0",)}, TypeError),
        ({"starts": 0}, TypeError),
        ({"starts": ()}, ValueError),
        ({"starts": (0, 0)}, ValueError),  # three tokens of two texts
        ({"starts": (0, 0, 0)}, ValueError),  # a cache too few
        ({"starts": (0, 0, 63), "caches": _CACHES[:1] * 3}, None),
        ({"starts": (0, 0, 64), "caches": _CACHES[:1] * 3}, ValueError),
        ({"first": 1}, ValueError),
        ({"first": -1}, ValueError),
        ({"logits": np.ones((3, 319), np.float32)}, ValueError),
        ({"logits": np.ones((1, 320), np.float32)}, ValueError),
        ({"logits": np.ones((3, 320))}, TypeError),
        ({"caches": [1]}, TypeError),
        ({"caches": (1,)}, TypeError),
        ({"caches": ((np.zeros((2, 2, 8, 16), np.int16), np.zeros((2, 2, 8), np.float32)),)}, ValueError),
        ({"caches": ((np.zeros((2, 2, 16, 15), np.int16), np.zeros((2, 2, 16), np.float32)),)}, ValueError),
        ({"caches": ((np.zeros((2, 2, 16, 16), np.int16), np.zeros((2, 2, 32), np.float32)),)}, ValueError),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    run: tuple[Run, dict[str, Any]], changes: dict[str, Any], error: type[Exception] | None
) -> None:
    call, arguments = run
    call()
    if error is None:  # what is just within bounds
        call(**changes)
        return
    before = arguments["x"].copy()
    with pytest.raises(error):
        call(**changes)
    assert np.array_equal(arguments["x"], before)
