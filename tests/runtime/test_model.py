"""The decoder against itself (one by one, in chunks, after a cut, after an interrupt); the int8 path against NumPy."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from random_model import FAMILIES, make_random_billm, tiny_config

import billm_rt
import billm_rt.reference
from billm_format.config import Quantization
from billm_format.errors import CorruptFileError, DoesNotFitError, UsageError
from billm_format.packing import PackedLinear
from billm_format.reader import BillmFile
from billm_rt import cpu
from billm_rt.backend import choose
from billm_rt.cache import KVCache
from billm_rt.cpu.decoder import NativeLayers
from billm_rt.reference import ReferenceBackend

needs_native = pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")
PATHS = [pytest.param(True, id="exact"), pytest.param(False, id="native", marks=needs_native)]

# Exact: float32 sums in another order. Native: where such a difference tips an int8 code over to its neighbour, it
# grows to a fraction of the int8 noise itself (2 to 4 %), while a wrong position or mask is an error of the order of 1.
TOLERANCE = {True: 1e-5, False: 0.02}


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the root mean square of the difference in units of that of `wanted`."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.fixture(params=sorted(FAMILIES))
def path(request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> Path:
    """A tiny random file of each family."""
    file = tmp_path / "m.billm"
    make_random_billm(file, tiny_config(request.param), Quantization(block_size=32), seed)
    return file


@pytest.fixture
def llama(tmp_path: Path, seed: int) -> Path:
    """A tiny random LLaMA file."""
    make_random_billm(tmp_path / "llama.billm", tiny_config(), Quantization(block_size=64), seed)
    return tmp_path / "llama.billm"


@pytest.mark.parametrize("exact", PATHS)
def test_one_token_at_a_time_equals_the_whole_prompt(path: Path, exact: bool, rng: np.random.Generator) -> None:
    with billm_rt.load(path, exact=exact) as model:
        tokens = rng.integers(0, model.config.vocab_size, 14)
        cache = model.new_cache()
        rows = [model.forward([token], cache) for token in tokens]
        assert cache.tokens == tokens.tolist()
        assert _relative(np.concatenate(rows), model.logits(tokens)) < TOLERANCE[exact]


@pytest.mark.parametrize("exact", PATHS)
def test_chunks_equal_one_pass(
    path: Path, exact: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with billm_rt.load(path, exact=exact) as model:
        tokens = rng.integers(0, model.config.vocab_size, 61)
        wanted = model.logits(tokens)
        monkeypatch.setattr(model.backend, "chunk", 23)
        # Small enough that weights, queries and heads are all cut, with ragged ends.
        monkeypatch.setattr(billm_rt.reference, "_WEIGHT_ELEMENTS", 3000)
        monkeypatch.setattr(billm_rt.reference, "_SCORE_ELEMENTS", 1500)
        monkeypatch.setattr(billm_rt.reference, "_CACHE_ELEMENTS", 900)
        cache = model.new_cache()
        assert _relative(model.forward(tokens, cache, logits="all"), wanted) < TOLERANCE[exact]
        last = model.forward(tokens, model.new_cache(), logits="last")
        assert last.shape == (1, model.config.vocab_size)
        assert _relative(last, wanted[-1:]) < TOLERANCE[exact]
        assert model.forward(tokens, model.new_cache(), logits="none") is None


@pytest.mark.parametrize("exact", PATHS)
def test_truncated_cache_equals_a_fresh_one(llama: Path, exact: bool, rng: np.random.Generator) -> None:
    with billm_rt.load(llama, exact=exact) as model:
        first, second = rng.integers(0, model.config.vocab_size, (2, 40)).tolist()
        cache = model.new_cache()
        model.forward(first, cache)
        cache.truncate(13)
        found = model.forward(second, cache, logits="all")
        assert cache.tokens == first[:13] + second
        assert _relative(found, model.logits(first[:13] + second)[13:]) < TOLERANCE[exact]


def _interrupt_the_second_layer(model: billm_rt.Model, patch: pytest.MonkeyPatch) -> None:
    if isinstance(model._runner, NativeLayers):
        decoder = model._runner._decoder

        class Interrupted:
            def run(self, x: Any, starts: tuple[int, ...], cos: Any, sin: Any, first: int, *rest: Any) -> None:
                if first == 1:
                    raise KeyboardInterrupt
                decoder.run(x, starts, cos, sin, first, *rest)

        patch.setattr(model._runner, "_decoder", Interrupted())
        return
    attention = model.backend.attention

    def interrupted(query: Any, cache: KVCache, layer: int, window: int | None) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return attention(query, cache, layer, window)

    patch.setattr(model.backend, "attention", interrupted)


@pytest.mark.parametrize("exact", PATHS)
def test_interrupt_leaves_the_cache_as_it_was(
    llama: Path, exact: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with billm_rt.load(llama, exact=exact) as model:
        text, lost, rest = rng.integers(0, model.config.vocab_size, (3, 30)).tolist()
        cache = model.new_cache()
        model.forward(text, cache)
        with monkeypatch.context() as patch:
            _interrupt_the_second_layer(model, patch)
            with pytest.raises(KeyboardInterrupt):
                model.forward(lost, cache)
        assert cache.tokens == text
        found = model.forward(rest, cache, logits="all")
        assert _relative(found, model.logits(text + rest)[30:]) < TOLERANCE[exact]


def test_context_length_is_enforced_before_anything_is_read(llama: Path) -> None:
    with billm_rt.load(llama, exact=True, ctx=20) as model:
        cache = model.new_cache()
        model.forward(range(15), cache)
        with pytest.raises(DoesNotFitError, match=r"15 tokens in the cache and 6 new ones make 21.*20"):
            model.forward(range(6), cache)
        assert cache.tokens == list(range(15))
        model.forward(range(5), cache)
        with pytest.raises(DoesNotFitError, match=r"prompt has 21 tokens.*20"):
            model.generate(list(range(21)))


def test_default_context_is_the_models_own(llama: Path) -> None:
    with billm_rt.load(llama, exact=True) as model:
        assert model.ctx == model.config.max_position_embeddings == 128
        model.logits(np.zeros(128, np.int64))
    for ctx in (0, 129):
        with pytest.raises(UsageError, match=f"--ctx {ctx}.*128"):
            billm_rt.load(llama, exact=True, ctx=ctx)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        ([0, 320], "320 is outside"),
        ([-1], "-1 is outside"),
        ([0.5], "integers"),
        ([[1, 2]], "flat"),
    ],
)
def test_bad_token_ids_are_refused(llama: Path, tokens: Any, message: str) -> None:
    with billm_rt.load(llama, exact=True) as model, pytest.raises(UsageError, match=message):
        model.forward(tokens, model.new_cache())


@pytest.mark.parametrize(
    ("device", "threads", "message"),
    [
        ("cuda:x", None, "auto, cpu, cuda or cuda:N"),
        ("tpu", None, "auto, cpu, cuda or cuda:N"),
        ("cpu", 0, "--threads 0"),
        ("cpu", 257, "1 to 256"),
    ],
)
def test_device_that_is_not_there_is_refused(device: str, threads: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(device, threads=threads)


def test_without_the_native_library_the_answers_are_right_and_said_to_be_slow(
    llama: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    tokens = rng.integers(0, 320, 20)
    with billm_rt.load(llama) as model:
        wanted = model.logits(tokens)
    monkeypatch.setattr(cpu, "_reason", "it was taken away")
    with billm_rt.load(llama) as model:
        assert model.isa == "numpy"
        assert "slower: it was taken away" in model.backend.reason
        # The products agree to the bit; what is float32 between them is summed in another order.
        assert _relative(model.logits(tokens), wanted) < 8e-4


def test_missing_and_damaged_files(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        billm_rt.load(tmp_path / "absent.billm")
    data = llama.read_bytes()
    llama.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFileError):
        billm_rt.load(llama)


def test_memory_report_adds_up(llama: Path) -> None:
    with billm_rt.load(llama, exact=True) as model:
        cache = model.new_cache()
        assert model.memory()["kv_cache"] == 0
        model.forward(range(10), cache)
        report = model.memory()
        assert report["kv_cache"] == cache.nbytes > 0
        weights = sum(size for name, size in report.items() if name.startswith("weights."))
        assert weights == llama.stat().st_size
        assert 0 < report["rss"] <= report["peak_rss"]
        del cache
        assert model.memory()["kv_cache"] == 0


@pytest.mark.skipif("avx2" not in cpu.supported_isas(), reason="needs a processor with AVX2")
def test_planes_are_copied_where_decoding_wants_them_in_another_order(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[int] = []
    monkeypatch.setattr(BillmFile, "let_go", lambda file: let_go.append(1))
    before = cpu.isa()
    try:
        cpu.select_isa("avx2")
        with billm_rt.load(llama) as model:
            cache = model.new_cache()
            model.forward(range(10), cache)
            assert model.memory()["copied"] == 0 and not let_go  # a prompt reads the file
            for _ in range(3):
                model.forward([1], cache)
            planes = sum(2 * info.nbytes for name, info in model.file.tensors.items() if name.endswith(".sign"))
            assert planes / 2 < model.memory()["copied"] < 4 * planes
            assert len(let_go) == 1
            model.forward(range(10), cache)
            model.forward([1], cache)
            assert len(let_go) == 2
        cpu.select_isa("portable")
        with billm_rt.load(llama) as model:
            model.forward([1], model.new_cache())
            assert model.memory()["copied"] == 0
        assert len(let_go) == 2
    finally:
        cpu.select_isa(before)


@pytest.mark.skipif("avx2" not in cpu.supported_isas(), reason="needs a processor with AVX2")
def test_without_memory_for_copies_decoding_reads_the_file(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rows = cpu.isa(), []
    try:
        cpu.select_isa("avx2")
        for available in (1 << 40, 1000, 1 << 40):
            memory = SimpleNamespace(available=available)
            monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
            with billm_rt.load(llama) as model:
                cache = model.new_cache()
                rows.append([model.forward(token, cache) for token in ([1, 2, 3], [4], [5], [6, 7])])
                assert (model.memory()["copied"] > 0) == (available > 1000)
                assert ("would let it decode faster" in model.backend.reason) == (available == 1000)
    finally:
        cpu.select_isa(before)
        cpu.allow_copies(True)
    for first, other in zip(rows[0] + rows[0], rows[1] + rows[2], strict=True):
        np.testing.assert_array_equal(first, other)


def test_the_model_is_never_in_memory_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=3000, hidden_size=512, embedding_size=512, intermediate_size=1024, head_dim=64)
    make_random_billm(tmp_path / "m.billm", config, Quantization(block_size=128))
    weights = sum(rows * cols for rows, cols, _ in config.linears().values())
    monkeypatch.setattr(billm_rt.reference, "_WEIGHT_ELEMENTS", 1 << 15)
    with billm_rt.load(tmp_path / "m.billm", exact=True) as model:
        tracemalloc.start()
        model.logits([1, 2, 3])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * weights / 2  # one layer in float32 would be twice that


def test_closed_model_gives_its_file_back(llama: Path) -> None:
    model = billm_rt.load(llama, exact=True)
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.file.array("embed.weight")


class _Emulated(ReferenceBackend):
    """The int8 path in plain NumPy: activations rounded per block, then the dequantized weights."""

    def __init__(self) -> None:
        super().__init__("emulated", "test", "int16")

    def linears(self, x: np.ndarray, group: Any) -> list[np.ndarray]:
        out = []
        for linear in group:
            scale = 1 if linear.col_scale is None else linear.col_scale.astype(np.float32)
            rounded = _round_to_int8(x * scale, linear.block)
            y = rounded @ (linear.levels() * linear.row_scale.astype(np.float32)[:, None]).T
            out.append(y if linear.bias is None else y + linear.bias)
        return out

    def head(self, x: np.ndarray, table: Any) -> np.ndarray:
        block = 32 if table.step is not None else 128
        return super().head(_round_to_int8(x, block) if table.scale is not None else x, table)


def _round_to_int8(x: np.ndarray, block: int) -> np.ndarray:
    out = np.empty_like(x)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        out[:, start : start + block] = np.rint(part / np.where(step == 0, 1, step)) * step
    return out


@needs_native
@pytest.mark.parametrize("embedding_bits", [4, 8, 16])
def test_native_path_is_its_definition(
    path: Path, tmp_path: Path, embedding_bits: int, seed: int, rng: np.random.Generator
) -> None:
    """Sharing one activation between Linears of the same and of different blocks and column scales included."""
    with BillmFile.open(path) as file:
        config = file.config
    quantization = Quantization(
        block_size=64,
        overrides={"layers.0.k_proj": 32, "layers.1.up_proj": 128},
        embedding_bits=embedding_bits,
        col_scales=("layers.0.v_proj", "layers.1.q_proj", "layers.1.k_proj", "layers.1.down_proj"),
    )
    make_random_billm(tmp_path / "q.billm", config, quantization, seed)
    texts = rng.integers(0, config.vocab_size, (15, 4))
    with billm_rt.load(tmp_path / "q.billm", activation_bits=8) as model:
        emulated = billm_rt.Model(model.file, _Emulated())
        errors = [_relative(model.logits(text), emulated.logits(text)) for text in texts]
    # A code on the edge between two integers may fall either way in a few of the texts; in most none does.
    assert np.median(errors) < 1e-5
    assert max(errors) < 0.1


@needs_native
def test_shared_activations_are_quantized_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    quantize = cpu.quantize

    def counted(x: np.ndarray, *rest: Any) -> Any:
        calls.append(x.shape[1])
        return quantize(x, *rest)

    monkeypatch.setattr(cpu, "quantize", counted)
    monkeypatch.setattr(NativeLayers, "can_run", staticmethod(lambda config: False))
    with billm_rt.load(llama, activation_bits=8) as model:
        model.logits([5])
        assert len(calls) == 4 * model.config.num_hidden_layers + 1


def test_linears_with_equal_column_scales_share(llama: Path) -> None:
    from billm_rt.cpu_backend import CpuBackend

    def linear(block: int, scale: Sequence[float] | None) -> PackedLinear:
        planes = np.zeros((1, 8), np.uint8)
        scales = np.zeros((1, 64 // block, 4), np.uint8)
        columns = None if scale is None else np.resize(np.array(scale, np.float16), 64)
        return PackedLinear(1, 64, block, planes, planes, planes[0], scales, np.ones(1, np.float16), columns)

    linears = [linear(64, [1, 2]), linear(64, None), linear(64, [1, 2]), linear(32, None), linear(64, [2, 1])]
    groups = CpuBackend().load_linears(linears)
    assert [[place for place, _ in group.members] for group in groups] == [[0, 2], [1], [3], [4]]


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int8])
def test_cache_returns_what_was_written(dtype: Any, rng: np.random.Generator) -> None:
    config = tiny_config(max_position_embeddings=2000)
    cache = KVCache(config, 2000, dtype)
    written = rng.standard_normal((2, 1500, 2, 16)).astype(np.float32) * np.float32(1000)
    written[:, 7] = 0
    for start, stop in [(0, 1), (1, 300), (300, 1500)]:
        for layer in range(2):
            cache.write(layer, written[0, start:stop], written[1, start:stop])
        cache.commit([0] * (stop - start))
    bound = 0 if dtype == np.float32 else np.abs(written).max() / (2 * np.iinfo(dtype).max) * 1.01
    for layer in range(2):
        seen = []
        for heads, data, scale in cache.read(layer, 3, 1400, limit=2 * 16 * 1397):
            values = data if scale is None else data * scale[..., None]
            assert values.dtype == np.float32
            assert np.abs(values - written.transpose(0, 2, 1, 3)[:, heads, 3:1400]).max() <= bound
            seen += range(2)[heads]
        assert seen == [0, 1]


def test_cache_grows_by_doubling_up_to_the_context(rng: np.random.Generator) -> None:
    cache = KVCache(tiny_config(), 1000)
    sizes = []
    for _ in range(1000):
        row = rng.standard_normal((1, 2, 16)).astype(np.float32)
        for layer in range(2):
            cache.write(layer, row, row)
        cache.commit([0])
        sizes.append(cache.nbytes)
    per_token = 2 * 2 * 2 * 16 * 4
    # Whole groups of sixteen tokens: 1,000 become 1,008.
    assert sorted(set(sizes)) == [256 * per_token, 512 * per_token, 1008 * per_token]
    with pytest.raises(DoesNotFitError):
        cache.require(1)
