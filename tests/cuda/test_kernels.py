"""Each kernel, emulated and on a GPU, against float64 NumPy on fresh random inputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda import references
from cuda.emulator import EmulatedDevice, EmulationError
from random_linear import RandomLinear
from random_model import tiny_config

from billm_format.config import ModelConfig
from billm_format.packing import PackedLinear, Table
from billm_rt.backend import Norm
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceBatch, DeviceCache, KeysValues, View
from billm_rt.cuda.device import Device
from billm_rt.cuda.layers import attend, normalize
from billm_rt.cuda.linear import LinearGroup
from billm_rt.cuda_backend import CudaBackend, DeviceTable

# The emulation is at 2e-7; tensor cores cut off what their float32 sums cannot hold.
FLOAT32 = 3e-5
COLS = (1, 31, 33, 96, 127, 160, 257, 576, 896)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Return float32 values as the nearest bfloat16 in uint16, ties away from zero."""
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 in uint16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def multiply(device: Device, group: LinearGroup, x: np.ndarray, dtype: launch.Dtype = launch.Dtype.FLOAT32) -> Any:
    """Return the group's products of x, there and back."""
    return device.download(group.multiply(device.upload(x), dtype))


def check_16_bits(device: Device, group: LinearGroup, x: np.ndarray, linears: list[PackedLinear]) -> None:
    """Hold the group's products of x, rounded to either type of 16 bits, against the reference."""
    halves = x.astype(np.float16)
    found = multiply(device, group, halves, launch.Dtype.FLOAT16)
    assert found.dtype == np.float16
    assert references.error(found, references.products(halves, linears)) < 1e-3
    found = from_bfloat16(multiply(device, group, bfloat16(x), launch.Dtype.BFLOAT16))
    assert references.error(found, references.products(from_bfloat16(bfloat16(x)), linears)) < 5e-3


@pytest.mark.parametrize("shape", list(launch.gemv_shapes()), ids=str)
def test_gemv_of_every_shape(
    shape: launch.GemvShape, device: Device, random_linear: RandomLinear, rng: np.random.Generator
) -> None:
    """Ragged rows and columns, several Linears a launch, magnitudes far apart, tokens that do not fill the shape."""
    for cols in rng.choice(COLS, 3, replace=False).tolist():
        rows = rng.integers(1, 70, int(rng.integers(1, 4))).tolist()
        linears = [
            random_linear(n, cols, shape.block, col_scale=bool(rng.integers(2)), bias=bool(rng.integers(2)))
            for n in rows
        ]
        tokens = int(rng.integers(shape.rows // 2 + 1, shape.rows + 1))
        x = (rng.standard_normal((tokens, cols)) * 10.0 ** rng.uniform(-2, 1, (tokens, cols))).astype(np.float32)
        group = LinearGroup(device, linears)
        if shape.split == 2:
            assert references.error(multiply(device, group, x), references.products(x, linears)) < FLOAT32
            continue
        check_16_bits(device, group, x, linears)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_gemv_in_chunks_of_columns(
    block: int, device: Device, random_linear: RandomLinear, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """With little shared memory the columns pass in chunks, and a thread block has several tiles of rows."""
    monkeypatch.setattr(device, "shared_per_multiprocessor", 27 << 10)
    monkeypatch.setattr(device, "multiprocessors", 1)
    linear = random_linear(170, 1537, block)
    x = rng.standard_normal((3, 1537)).astype(np.float32)
    assert (
        references.error(multiply(device, LinearGroup(device, [linear]), x), references.products(x, [linear])) < FLOAT32
    )


def test_huge_and_tiny_activations(device: Device, random_linear: RandomLinear, rng: np.random.Generator) -> None:
    """A few columns carry nearly everything, as in LLaMA's hidden states; others are tiny."""
    linear = random_linear(40, 300, 128)
    x = rng.standard_normal((3, 300)).astype(np.float32)
    x[0, 17], x[0, 250] = 2e5, -7e4
    x[1] *= np.float32(1e-28)
    x[2] = 0
    found, wanted = multiply(device, LinearGroup(device, [linear]), x), references.products(x, [linear])
    for token in (0, 1):
        assert references.error(found[token], wanted[token]) < FLOAT32
    assert not found[2].any()


def test_not_a_number_stays_one(device: Device, random_linear: RandomLinear) -> None:
    x = np.ones((2, 128), np.float32)
    x[1, 5] = np.nan
    found = multiply(device, LinearGroup(device, [random_linear(20, 128, 128)]), x)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


@pytest.mark.parametrize("cols", [40, 100, 577])
def test_products_of_many_rows(
    cols: int, device: Device, random_linear: RandomLinear, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """The scratch holds less than a Linear, so that it is filled several times."""
    monkeypatch.setattr(launch, "DENSE_TOKENS", 5)
    monkeypatch.setattr(launch, "_SCRATCH_BYTES", 17 * 2 * launch.scratch_width(cols))
    linears = [
        random_linear(n, cols, int(block), col_scale=block < 100, bias=True) for n, block in ((40, 32), (23, 128))
    ]
    x = (rng.standard_normal((6, cols)) * 100).astype(np.float32)
    group = LinearGroup(device, linears)
    assert references.error(multiply(device, group, x), references.products(x, linears)) < 1e-3
    check_16_bits(device, group, x, linears)


def test_unpacked_levels_are_exact(device: Device, random_linear: RandomLinear) -> None:
    linear = random_linear(9, 75, 32)
    group = LinearGroup(device, [linear])
    levels = device.empty((4, 80), np.float16)
    numbers = map(np.int32, (3, 4, 80, 32))
    device.launch(launch.UNPACK, launch.per_element(4 * 10), group._parts[0].descriptors, levels, *numbers)
    levels = device.download(levels)
    assert np.array_equal(levels[:, :75], linear.levels(3, 7))
    assert not levels[:, 75:].any()


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
@pytest.mark.parametrize("width", [32, 40, 64, 51])
def test_tables(dtype: Any, width: int, device: Device, rng: np.random.Generator) -> None:
    rows = 83
    weight = (rng.standard_normal((rows, width)) * 40).astype(dtype)
    scale = rng.uniform(0.01, 0.02, rows).astype(np.float16) if dtype == np.int8 else None
    wide = weight.astype(np.float64) * (1 if scale is None else scale.astype(np.float64)[:, None])
    backend = CudaBackend(device)
    table: DeviceTable = backend.load_table(Table(weight, weight.shape[1], scale))
    ids = rng.integers(0, rows, 5)
    assert (
        references.error(device.download(backend.embed(device.upload(ids.astype(np.int32)), table)), wide[ids]) < 1e-6
    )
    for tokens in (1, 2, 8, 11):
        x = rng.standard_normal((tokens, width)).astype(np.float32)
        assert (
            references.error(backend.logits(backend.head(device.upload(x), table)), x.astype(np.float64) @ wide.T)
            < 1e-6
        )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_norms_with_residual(with_bias: bool, keep: bool, device: Device, rng: np.random.Generator) -> None:
    x, delta = (rng.standard_normal((3, 301)) + 2).astype(np.float32), rng.standard_normal((3, 301)).astype(np.float32)
    weight, bias = rng.standard_normal((2, 301)).astype(np.float32)
    norm = Norm(device.upload(weight), device.upload(bias) if with_bias else None)
    total = x.astype(np.float64) + delta
    changed = device.upload(x)
    out = device.download(normalize(device, changed, norm, 1e-5, device.upload(delta), keep=keep))
    assert references.error(out, references.normed(total, weight, bias if with_bias else None, 1e-5)) < 1e-5
    assert references.error(device.download(changed), total if keep else out.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [0, 1])
def test_activations(function: Any, gated: int, device: Device, rng: np.random.Generator) -> None:
    from billm_rt.reference import ReferenceBackend

    both = (rng.standard_normal((3, 77 * (1 + gated))) * 3).astype(np.float32)
    out = device.empty((3, 77), np.float32)
    number = ("silu", "gelu", "gelu_tanh", "relu").index(function)
    numbers = map(np.int32, (3, 77, number, gated))
    device.launch(launch.ACTIVATE, launch.per_element(out.size), device.upload(both), out, *numbers)
    wanted = ReferenceBackend("", "").activate(both[:, :77].copy(), function) * (both[:, 77:] if gated else 1)
    assert references.error(device.download(out), wanted.astype(np.float64)) < 1e-5


def fill(
    cache: DeviceCache, width: int, past: int, tokens: int, device: Device, rng: np.random.Generator
) -> KeysValues:
    """Put `past` random tokens into the only layer and return it, with room for `tokens` more."""
    held = cache.reserve(past + tokens)[0]
    cache.past[...] = past
    cache.commit([0] * past)
    shape = (*held.data.shape[:2], past, width)
    if held.scale is None:
        held.data[..., :past, :width] = device.upload(rng.standard_normal(shape).astype(np.float16))
    else:
        held.data[..., :past, :width] = device.upload(rng.integers(-127, 128, shape, np.int8))
        held.scale[..., :past] = device.upload(rng.uniform(0.001, 0.02, shape[:3]).astype(np.float32))
    return held


def values_of(held: KeysValues, device: Device) -> np.ndarray:
    """Return the keys and values that a layer stands for, float64 [2, kv_heads, capacity, padded]."""
    data = device.download(held.data).astype(np.float64)
    return data if held.scale is None else data * device.download(held.scale)[..., None]


def mixed(device: Device, qkv: Any, view: View, config: ModelConfig) -> np.ndarray:
    """Return what attention makes of the queries."""
    out = device.empty((qkv.shape[0], config.query_size), np.float32)
    attend(device, qkv, 0, view, config, out)
    return device.download(out)


def store(device: Device, qkv: Any, weights: Sequence[Any], view: View, config: ModelConfig) -> None:
    """Put keys and values into the only layer; `weights`: norms of queries and keys, cosines and sines, or None."""
    heads, kv_heads, tokens = config.num_attention_heads, config.num_key_value_heads, qkv.shape[0]
    size = launch.per_head(heads + 2 * kv_heads, tokens)
    numbers = map(np.int32, (tokens // view.texts, heads, kv_heads, config.head_dim, view.padded))
    kernel = launch.rotate_and_store(view.dtype)
    device.launch(kernel, size, qkv, *weights, view.layers[0], *numbers, np.float32(1e-5))


@pytest.mark.parametrize("width", [16, 24, 64, 80, 128, 200, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("bits", [16, 8])
def test_cache_and_attention(
    bits: int, width: int, heads: int, kv_heads: int, device: Device, rng: np.random.Generator
) -> None:
    """Keys turned and written behind those held, then read by few queries and by many, with and without window."""
    past = int(rng.integers(0, 150))
    normed = bool(rng.integers(2))
    for tokens, window in ((1, 0), (3, int(rng.integers(1, 90))), (19, 0), (35, int(rng.integers(1, 90)))):
        config = tiny_config(
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, sliding_window=window or None,
            num_hidden_layers=1, qk_norm=normed,
        )  # fmt: skip
        cache = DeviceCache(config, 300, device, bits)
        held = fill(cache, width, past, tokens, device, rng)
        qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * width)).astype(np.float32)
        q_norm, k_norm = rng.uniform(0.5, 2, (2, width)).astype(np.float32) if normed else (None, None)
        angle = rng.uniform(-3, 3, (past + tokens, width // 2))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        split = qkv.astype(np.float64).reshape(tokens, -1, width)
        query, key, value = np.split(split, [heads, heads + kv_heads], axis=1)
        if normed:
            query, key = references.normed(query, q_norm, None, 1e-5), references.normed(key, k_norm, None, 1e-5)
        query, key = references.turned(query, angle[past:]), references.turned(key, angle[past:])

        there = device.upload(qkv)
        norms = (device.upload(norm) if normed else None for norm in (q_norm, k_norm))
        store(device, there, (*norms, device.upload(cos), device.upload(sin)), cache.view, config)
        assert references.error(device.download(there)[:, : heads * width], query.reshape(tokens, -1)) < 1e-5
        numbers_held = values_of(held, device)
        for new, wanted in zip(numbers_held[:, :, past : past + tokens, :width], (key, value), strict=True):
            largest = np.abs(wanted).max(axis=-1) if bits == 8 else np.abs(wanted).max()
            # Half a step of a head's own scale; of a binary16 half its last digit.
            assert (
                np.abs(new.transpose(1, 0, 2) - wanted).max(axis=-1) <= largest / (253 if bits == 8 else 1000)
            ).all()
        assert not numbers_held[:, :, past + tokens :].any() and not numbers_held[..., width:].any()

        found = mixed(device, there, cache.view, config)
        seen = numbers_held[:, :, : past + tokens, :width]
        wanted = references.attention(query, seen[0], seen[1], past, window)
        assert references.error(found, wanted.reshape(tokens, -1)) < 1e-4


@pytest.mark.parametrize("bits", [16, 8])
def test_texts_side_by_side(bits: int, device: Device, rng: np.random.Generator) -> None:
    """A token behind each of some caches of different lengths and room, all by one launch of each kernel."""
    heads, kv_heads, width, texts = 6, 2, 24, int(rng.integers(2, 12))
    window = int(rng.choice([0, 40]))
    config = tiny_config(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, sliding_window=window or None,
        num_hidden_layers=1,
    )  # fmt: skip
    caches = [DeviceCache(config, int(rng.integers(200, 600)), device, bits) for _ in range(texts)]
    pasts = rng.integers(0, 150, texts)
    held = [fill(cache, width, past, 1, device, rng) for cache, past in zip(caches, pasts.tolist(), strict=True)]
    batch = DeviceBatch(device, caches)
    batch._steps.pasts[...] = device.upload(pasts.astype(np.int32))
    qkv = rng.standard_normal((texts, (heads + 2 * kv_heads) * width)).astype(np.float32)
    there = device.upload(qkv)
    store(device, there, (None, None, None, None), batch.view, config)
    found = mixed(device, there, batch.view, config)
    for text, past in enumerate(pasts.tolist()):
        query, key, value = np.split(qkv[text].astype(np.float64).reshape(1, -1, width), [heads, heads + kv_heads], 1)
        seen = values_of(held[text], device)[:, :, : past + 1, :width]
        assert np.abs(seen[:, :, past] - np.stack([key[0], value[0]])).max() < np.abs(qkv).max() / 250
        wanted = references.attention(query, seen[0], seen[1], past, window)
        assert references.error(found[text : text + 1], wanted.reshape(1, -1)) < 1e-4


@pytest.mark.parametrize("bits", [16, 8])
def test_the_cache_grows_and_an_interrupt_leaves_it_whole(
    bits: int, emulated: EmulatedDevice, monkeypatch: Any
) -> None:
    cache = DeviceCache(tiny_config(num_hidden_layers=3, head_dim=20), 1000, emulated, bits)
    for layer, held in enumerate(cache.reserve(200)):
        assert held.data.shape == (2, 2, 256, 24) and held.data.dtype == cache.dtype
        held.data[:, :, :200] = layer + 1
        if held.scale is not None:
            held.scale[:, :, :200] = layer + 2
    cache.commit([0] * 200)
    zeros, asked = emulated.zeros, []

    def interrupted(shape: Any, dtype: Any) -> Any:
        asked.append(shape)
        if len(asked) == (2 if bits == 16 else 4):
            raise KeyboardInterrupt
        return zeros(shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(emulated, "zeros", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.reserve(100)
    for layer, held in enumerate(cache.reserve(100)):
        assert held.capacity == 512
        assert (held.data[:, :, :200] == layer + 1).all() and not held.data[:, :, 200:].any()
        assert held.scale is None or (held.scale[:, :, :200] == layer + 2).all()
    assert len(cache) == 200
    assert cache.nbytes == 3 * 2 * 2 * 512 * (24 * 2 if bits == 16 else 24 + 4)
    assert cache.reserve(700)[0].capacity == 1000


def test_what_the_device_would_not_forgive_is_an_error(emulated: EmulatedDevice, random_linear: RandomLinear) -> None:
    """The emulation itself: too little shared memory, a write outside an array."""
    group = LinearGroup(emulated, [random_linear(20, 128, 128)])
    part, shape = group._parts[0], launch.gemv_shape(1, 2, 128)
    x, out = np.ones((1, 128), np.float32), emulated.empty((1, 20), np.float32)
    plan = launch.gemv_plan(shape, 128, part.tiles, 32 << 10)
    numbers = list(map(np.int32, (1, 20, 0, plan.chunk_words, plan.slices)))
    size = launch.Size((part.ctas, 1, 1), launch.GEMV_THREADS, plan.shared - 4)
    with pytest.raises(EmulationError, match="shared memory"):
        emulated.launch(shape.kernel, size, part.descriptors, x, out, *numbers)
    short = emulated.empty((1, 19), np.float32)
    emulated.launch(shape.kernel, size._replace(shared=plan.shared), part.descriptors, x, short, *numbers)
    with pytest.raises(EmulationError, match="outside"):
        emulated.check_margins()
