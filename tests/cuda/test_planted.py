"""Errors planted into copies of the kernels: each must show against the reference that the true kernel meets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cuda import references
from cuda.emulator import EmulatedDevice
from cuda.test_kernels import fill, mixed, store, values_of
from random_linear import RandomLinear
from random_model import tiny_config

from billm_format.packing import Table
from billm_rt.cuda import launch
from billm_rt.cuda.cache import DeviceBatch, DeviceCache
from billm_rt.cuda.launch import Kernel
from billm_rt.cuda.linear import LinearGroup
from billm_rt.cuda.logits import DeviceLogits
from billm_rt.cuda_backend import CudaBackend
from billm_rt.sampling import Sampling

Check = Callable[[EmulatedDevice, RandomLinear, np.random.Generator], float]


def gemv(device: EmulatedDevice, random_linear: RandomLinear, rng: np.random.Generator) -> float:
    """Return the error of a product whose last block is short and whose rows do not fill a tile."""
    linear = random_linear(41, 300, 128, col_scale=True)
    x = rng.standard_normal((2, 300)).astype(np.float32)
    return references.error(LinearGroup(device, [linear]).multiply(x), references.products(x, [linear]))


def head(device: EmulatedDevice, random_linear: RandomLinear, rng: np.random.Generator) -> float:
    """Return the error of a product with rows of bytes."""
    weight, x = rng.integers(-127, 128, (19, 64), np.int8), rng.standard_normal((1, 64)).astype(np.float32)
    backend = CudaBackend(device)
    table = backend.load_table(Table(weight, weight.shape[1], np.ones(19, np.float16)))
    return references.error(backend.logits(backend.head(x, table)), x.astype(np.float64) @ weight.astype(np.float64).T)


def attention(bits: int) -> Check:
    """Return a check of one query over 70 keys, the last of which is written first."""

    def check(device: EmulatedDevice, random_linear: RandomLinear, rng: np.random.Generator) -> float:
        config = tiny_config(num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_hidden_layers=1)
        cache = DeviceCache(config, 128, device, bits)
        held = fill(cache, 16, 69, 1, device, rng)
        qkv = rng.standard_normal((1, 96)).astype(np.float32)
        query, key, value = qkv.astype(np.float64).reshape(3, 2, 1, 16)
        store(device, qkv, (None, None, None, None), cache.view, config)
        there = values_of(held, device)[:, :, :70]
        step = np.abs([key, value]).max() / (2000 if bits == 16 else 250)
        if np.abs(there[:, :, 69:] - np.stack([key, value])).max() > step:
            return 1
        wanted = references.attention(query.reshape(1, 2, 16), there[0], there[1], 69, 0)
        return references.error(mixed(device, qkv, cache.view, config), wanted.reshape(1, 32))

    return check


def texts(device: EmulatedDevice, random_linear: RandomLinear, rng: np.random.Generator) -> float:
    """Return the error of one query of the second of two texts."""
    config = tiny_config(num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_hidden_layers=1)
    caches = [DeviceCache(config, 128, device) for _ in range(2)]
    held = [fill(cache, 16, past, 1, device, rng) for cache, past in zip(caches, (5, 69), strict=True)]
    batch = DeviceBatch(device, caches)
    batch._steps.pasts[...] = 5, 69
    qkv = rng.standard_normal((2, 96)).astype(np.float32)
    store(device, qkv, (None, None, None, None), batch.view, config)
    there, new = values_of(held[1], device)[:, :, :70], qkv[1].astype(np.float64).reshape(3, 2, 16)
    if np.abs(there[:, :, 69] - new[1:]).max() > np.abs(new).max() / 2000:
        return 1
    wanted = references.attention(new[:1], there[0], there[1], 69, 0)
    return references.error(mixed(device, qkv, batch.view, config)[1:], wanted.reshape(1, 32))


def sampling(device: EmulatedDevice, random_linear: RandomLinear, rng: np.random.Generator) -> float:
    """Return the share of a survey's groups and of its list that is wrong."""
    logits = rng.standard_normal(2000).astype(np.float32)
    logits[33] = 9
    rows = DeviceLogits(device, logits.size)
    rows.array[0] = logits
    found = rows.survey(0, Sampling(temperature=1, top_k=40, repeat_penalty=2), np.array([33]))
    logits[33] = 4.5
    sums = np.add.reduceat(np.exp(logits - logits.max()), np.arange(0, 2000, found.size))
    wrong = ~np.isclose(found.sums, sums, rtol=1e-4)
    missing = np.setdiff1d(np.argsort(logits)[-40:], found.ids)
    return float(wrong.mean()) + missing.size / 40


GEMV = launch.gemv_shape(2, 2, 128).kernel
HEAD = launch.multiply_kernel(np.dtype(np.int8), 64, 1)
SAMPLE = [launch.SURVEY, launch.WEIGH, launch.CHOOSE, launch.COLLECT]
ATTEND = [
    *(Kernel("attention.cu", f"attend_few<1, 1, {name}>") for name in ("u16", "i8")),
    launch.COMBINE,
    *(launch.rotate_and_store(np.dtype(dtype)) for dtype in (np.float16, np.int8)),
]
OF_TEXT, OF_FIRST = (
    f"Cache cache = caches[{index}];\n    int position = *cache.past + token %% per_text, %s"
    for index in ("token / per_text", "0")
)


@pytest.mark.parametrize(
    ("check", "kernels", "true", "planted"),
    [
        pytest.param(gemv, [GEMV], "tile * TILE_ROWS + g + 8, linear", "tile * TILE_ROWS + g + 7, linear", id="row"),
        pytest.param(gemv, [GEMV], "lane / 8 % 2) + lane / 16", "lane / 8 % 2) + lane / 8 % 2", id="column"),
        pytest.param(gemv, [GEMV], "linear.scales + row[half] * num", "linear.scales + row[0] * num", id="scales"),
        pytest.param(gemv, [GEMV], "~(s0 | salient[i])", "~(s0 & salient[i])", id="class"),
        pytest.param(head, [HEAD], "values[start + i]) * few", "values[start]) * few", id="head"),
        pytest.param(attention(16), ATTEND, "min(first + each, position + 1)", "position", id="key"),
        pytest.param(attention(8), ATTEND, "warp_sum(sum) * scale", "warp_sum(sum)", id="key scale"),
        pytest.param(
            attention(8), ATTEND, "*= cache.value_scale[of_head", "*= cache.key_scale[of_head", id="value scale"
        ),
        pytest.param(attention(8), ATTEND, "number / by", "number * by", id="code"),
        pytest.param(texts, ATTEND, OF_TEXT % "begin", OF_FIRST % "begin", id="text"),
        pytest.param(texts, ATTEND, OF_TEXT % "half", OF_FIRST % "half", id="cache"),
        pytest.param(sampling, SAMPLE, "logit / ask->penalty", "logit * ask->penalty", id="penalty"),
        pytest.param(sampling, SAMPLE, "min((group + 1) * size, vocab)", "(group + 1) * size", id="sum"),
        pytest.param(sampling, SAMPLE, "all[i] > mine ||", "all[i] < mine ||", id="rank"),
        pytest.param(sampling, SAMPLE, "found->bound)) return", "found->best)) return", id="list"),
    ],
)
def test_a_planted_error_shows(
    check: Check,
    kernels: list[Kernel],
    true: str,
    planted: str,
    emulated: EmulatedDevice,
    random_linear: RandomLinear,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    assert check(emulated, random_linear, rng) < 1e-4
    assert not check(EmulatedDevice(tmp_path, kernels, [(true, planted)]), random_linear, rng) < 1e-2
