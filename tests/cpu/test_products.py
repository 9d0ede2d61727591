"""Products against their definition in int64 and float32, for every instruction set, bit for bit."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from billm_format.packing import PackedLinear, nibble_levels
from billm_rt import cpu
from billm_rt.cpu import QuantizedActivations, fallback

BLOCKS = (32, 64, 128, 256)
TOKENS = (0, 1, 2, 3, 7, 8, 9, 33, 100)
COLS = sorted(
    {edge + by for edge in (32, 64, 128, 256, 512, 768) for by in (-32, -1, 0, 1, 32)} - {0} | {1, 40, 576, 896}
)


def product(level: NDArray[Any], x: QuantizedActivations) -> NDArray[np.float32]:
    """The definition: exact sums over blocks, then float32 steps in the order of the blocks."""
    acc = np.zeros((x.values.shape[0], level.shape[0]), np.float32)
    for b, start in enumerate(range(0, level.shape[1], x.block)):
        columns = slice(start, start + x.block)
        isum = x.values[:, columns].astype(np.int64) @ level[:, columns].astype(np.int64).T
        acc = acc + x.scales[:, b, None] * isum.astype(np.float32)
    return acc


def expected_binary(weight: PackedLinear, x: QuantizedActivations) -> NDArray[np.float32]:
    out = product(weight.levels(), x) * weight.row_scale.astype(np.float32)
    return out if weight.bias is None else out + weight.bias


def random_activations(
    rng: np.random.Generator, tokens: int, cols: int, block: int, bits: int | None = None
) -> QuantizedActivations:
    """Of 8 or 16 bits by chance, the ends of the range and low bytes of -128 (16 bits) among them."""
    bits = bits or int(rng.choice([8, 16]))
    top = fallback.top(bits)
    values = rng.integers(-top, top + 1, (tokens, cols), dtype=np.int16)
    edges = [-top, top] if bits == 8 else [-top, top, 128, -128, 31 * 256 - 128, -31 * 256 + 128, 31 * 256 - 129]
    values = np.where(rng.random(values.shape) < 0.2, rng.choice(np.array(edges, np.int16), values.shape), values)
    scales = rng.uniform(0, 0.05, (tokens, -(-cols // block))).astype(np.float32)
    return QuantizedActivations(values, scales, block, bits)


def test_the_native_library_is_present() -> None:
    if os.environ.get("BILLM_NATIVE") == "0":
        assert cpu.isa() == "numpy" and not cpu.available()
    else:
        assert cpu.available(), f"build it: {cpu.unavailable_reason()}"
        assert cpu.isa() == cpu.supported_isas()[0] and cpu.supported_isas()[-1] == "portable"


@pytest.mark.parametrize("block", BLOCKS)
def test_binary_linear_is_its_definition(isa: str, block: int, random_linear: Any, rng: np.random.Generator) -> None:
    for cols in COLS:
        for tokens in rng.choice(TOKENS, 3, replace=False):
            rows, bias = int(rng.integers(1, 70)), bool(rng.integers(2))
            weight = random_linear(rows, cols, block, bias=bias)
            x = random_activations(rng, int(tokens), cols, block)
            out = cpu.binary_linear(weight, x)
            assert out.dtype == np.float32
            np.testing.assert_array_equal(out, expected_binary(weight, x), f"{weight.rows} x {cols}, {tokens} tokens")


@pytest.mark.parametrize("block", BLOCKS)
def test_int8_linear_is_its_definition(isa: str, block: int, rng: np.random.Generator) -> None:
    for cols in COLS:
        for tokens in rng.choice(TOKENS, 3, replace=False):
            rows = int(rng.integers(1, 70))
            weight = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
            scale = rng.uniform(0, 1, rows).astype(rng.choice(["float16", "float32"]))
            x = random_activations(rng, int(tokens), cols, block)
            wanted = product(weight, x) * scale.astype(np.float32)
            np.testing.assert_array_equal(
                cpu.int8_linear(weight, scale, x), wanted, f"{rows} x {cols}, {tokens} tokens"
            )


def random_codes(rng: np.random.Generator, rows: int, cols: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """A 4-bit table; what lies behind its last column must not matter and is anything."""
    groups = -(-cols // 32)
    weight = rng.integers(0, 256, (rows, 16 * groups), dtype=np.uint8)
    step = rng.integers(-128, 128, (groups, rows), dtype=np.int8)
    return weight, np.where(rng.random(step.shape) < 0.1, -128, step).astype(np.int8)


@pytest.mark.parametrize("cols", COLS)
def test_int4_linear_is_its_definition(isa: str, cols: int, rng: np.random.Generator) -> None:
    for tokens in rng.choice(TOKENS, 3, replace=False):
        rows = int(rng.integers(1, 70))
        weight, step = random_codes(rng, rows, cols)
        scale = rng.uniform(0, 1, rows).astype(rng.choice(["float16", "float32"]))
        x = random_activations(rng, int(tokens), cols, 32)
        wanted = product(nibble_levels(weight, step, cols), x) * scale.astype(np.float32)
        out = cpu.int4_linear(weight, step, scale, x)
        np.testing.assert_array_equal(out, wanted, f"{rows} x {cols}, {tokens} tokens")


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("cols", [31, 320, 1000])
def test_int4_sums_at_the_end_of_their_range(isa: str, rows: int, tokens: int, cols: int) -> None:
    groups = -(-cols // 32)
    for activation in (127, -127, 8191, -8191, 7936, -7936, 128, -128):
        bits = 8 if abs(activation) <= 127 else 16
        x = QuantizedActivations(
            np.full((tokens, cols), activation, np.int16), np.ones((tokens, groups), np.float32), 32, bits
        )
        for byte in (0x00, 0xFF):
            for steps in (-128, 127):
                weight = np.full((rows, 16 * groups), byte, np.uint8)
                step = np.full((groups, rows), steps, np.int8)
                out = cpu.int4_linear(weight, step, np.ones(rows, np.float32), x)
                np.testing.assert_array_equal(out, product(nibble_levels(weight, step, cols), x))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_row_and_token_is_written(isa: str, rows: int, tokens: int, random_linear: Any, rng: Any) -> None:
    weight, x = random_linear(rows, 320, 128), random_activations(rng, tokens, 320, 128)
    np.testing.assert_array_equal(cpu.binary_linear(weight, x), expected_binary(weight, x))


def test_long_rows_and_many_tokens(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    """Several stretches of columns, and more tokens than are packed at a time."""
    for rows, cols, tokens in ((5, 5000, 600), (3, 40_001, 70), (40, 9000, 1)):
        weight, x = random_linear(rows, cols, 128), random_activations(rng, tokens, cols, 128)
        np.testing.assert_array_equal(cpu.binary_linear(weight, x), expected_binary(weight, x))


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("activation", [127, -127, 8191, -8191, 128, -128, 7936, -7936])
@pytest.mark.parametrize("salient", [0x00, 0xFF])
def test_sums_at_the_end_of_their_range(isa: str, tokens: int, activation: int, salient: int) -> None:
    for cols, block in ((256, 256), (1000, 256), (512, 32)):
        stride, blocks = 4 * -(-cols // 32), -(-cols // block)
        ones = np.full((3, stride), 255, np.uint8)
        scales = np.full((3, blocks, 4), 255, np.uint8)
        column = np.full(stride, salient, np.uint8)
        weight = PackedLinear(3, cols, block, ones, ones, column, scales, np.ones(3, np.float16))
        values = np.full((tokens, cols), activation, np.int16)
        bits = 8 if abs(activation) <= 127 else 16
        x = QuantizedActivations(values, np.ones((tokens, blocks), np.float32), block, bits)
        assert (weight.levels() == 255).all()
        for planes in (ones, ~ones):  # every level 255, then -255
            signed = dataclasses.replace(weight, sign=planes, second=planes if salient else ones)
            np.testing.assert_array_equal(cpu.binary_linear(signed, x), expected_binary(signed, x))
        lowest = np.full((3, cols), -128, np.int8)
        out = cpu.int8_linear(lowest, np.ones(3, np.float32), x)
        np.testing.assert_array_equal(out, product(lowest, x))


@pytest.mark.parametrize("tokens", [1, 5])
def test_salient_magnitudes_saturate(isa: str, tokens: int, random_linear: Any, rng: np.random.Generator) -> None:
    """alpha_o + alpha_r above 255 counts as 255, alpha_o - alpha_r below 0 as 0, whatever the writer meant."""
    weight = random_linear(20, 160, 64)
    weight.salient[:] = 255
    weight.scales[...] = rng.choice(np.array([0, 1, 100, 127, 128, 200, 254, 255], np.uint8), weight.scales.shape)
    x = random_activations(rng, tokens, 160, 64)
    np.testing.assert_array_equal(cpu.binary_linear(weight, x), expected_binary(weight, x))


def test_zero_scales_give_the_bias(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    weight = random_linear(9, 96, 32, bias=True)
    weight.scales[...] = 0
    for tokens in (1, 4):
        out = cpu.binary_linear(weight, random_activations(rng, tokens, 96, 32))
        np.testing.assert_array_equal(out, np.tile(weight.bias, (tokens, 1)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_row_scale_stands_in_for_the_weights_own(isa: str, tokens: int, random_linear: Any, rng: Any) -> None:
    weight, x = random_linear(21, 100, 32, bias=True), random_activations(rng, tokens, 100, 32)
    row_scale = rng.standard_normal(21).astype(np.float32)
    wanted = product(weight.levels(), x) * row_scale + weight.bias
    np.testing.assert_array_equal(cpu.binary_linear(weight, x, row_scale), wanted)
    np.testing.assert_array_equal(cpu.binary_linear(weight, x), expected_binary(weight, x))  # and only for that call


def test_every_float16_row_scale(isa: str) -> None:
    scale = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = QuantizedActivations(np.ones((1, 1), np.int16), np.ones((1, 1), np.float32), 32)
    out = cpu.int8_linear(np.ones((1 << 16, 1), np.int8), scale, x)
    np.testing.assert_array_equal(out[0], scale.astype(np.float32))


def test_unaligned_and_read_only_memory(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    """A weight is a view of a memory map: read-only, and aligned to nothing if a file says so."""

    def shifted(array: NDArray[Any]) -> NDArray[Any]:
        raw = np.frombuffer(b"\xff" * 3 + array.tobytes(), np.uint8)[3:]
        return raw.view(array.dtype).reshape(array.shape)

    weight = random_linear(19, 200, 64, bias=True)
    fields = {name: shifted(getattr(weight, name)) for name in ("sign", "second", "salient", "scales")}
    moved = PackedLinear(19, 200, 64, row_scale=weight.row_scale, bias=weight.bias, **fields)
    for tokens in (1, 5):
        x = random_activations(rng, tokens, 200, 64)
        np.testing.assert_array_equal(cpu.binary_linear(moved, x), expected_binary(weight, x))


def test_a_token_alone_equals_the_token_in_a_prompt(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    weight, x = random_linear(50, 576, 128), rng.standard_normal((9, 576)).astype(np.float32)
    together = cpu.binary_linear(weight, cpu.quantize(x, 128))
    alone = [cpu.binary_linear(weight, cpu.quantize(row[None], 128))[0] for row in x]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_products_approximate_the_float_product(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    """End to end, col_scale included: 8 bits cost less than one percent, 16 bits less than four ten-thousandths."""
    weight, x = random_linear(64, 512, 128), rng.standard_normal((5, 512)).astype(np.float32)
    col_scale = rng.uniform(0.5, 2, 512).astype(np.float32)
    exact = (x.astype(np.float64) * col_scale) @ weight.dequantize().astype(np.float64).T
    for bits, bound in ((8, 0.01), (16, 4e-4)):
        out = cpu.binary_linear(weight, cpu.quantize(x, 128, col_scale, bits))
        assert np.linalg.norm(out - exact) < bound * np.linalg.norm(exact)


# ---- quantize ----


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("block", BLOCKS)
def test_quantize_is_its_definition(isa: str, block: int, bits: int, rng: np.random.Generator) -> None:
    for cols in (1, 31, 40, 128, 129, 576):
        x = (rng.standard_normal((4, cols)) * 10.0 ** rng.integers(-9, 9, (4, 1))).astype(np.float32)
        x[1] = 0
        col_scale = rng.uniform(0.1, 3, cols).astype(np.float32) if rng.integers(2) else None
        scaled = x if col_scale is None else x * col_scale
        out = cpu.quantize(x, block, col_scale, bits)
        assert out.bits == bits and out.values.dtype == np.int16
        for token in range(4):
            for b, start in enumerate(range(0, cols, block)):
                part = scaled[token, start : start + block]
                scale = np.abs(part).max() / np.float32(127 if bits == 8 else 8191)
                assert out.scales[token, b] == scale
                wanted = np.round(part / scale) if scale else np.zeros_like(part)
                np.testing.assert_array_equal(out.values[token, start : start + block], wanted)


def test_quantize_rounds_halves_to_even(isa: str) -> None:
    for bits, top in ((8, 127), (16, 8191)):
        x = np.array([[top, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, top - 0.5, 0.5 - top]], np.float32)
        out = cpu.quantize(x, 32, bits=bits)
        assert out.scales[0, 0] == 1
        assert out.values[0].tolist() == [top, 0, 2, 2, 0, -2, -2, top - 1, 1 - top]


@pytest.mark.parametrize("bits", [8, 16])
def test_quantize_of_the_smallest_and_of_no_numbers(isa: str, bits: int, random_linear: Any) -> None:
    top = fallback.top(bits)
    x = np.zeros((6, 64), np.float32)
    x[0, 3], x[1, 40] = np.nan, -np.inf
    x[2] = np.float32(1e-45)  # the scale underflows to zero
    x[3] = np.float32(2.5e-43 if bits == 8 else 1.7e-41)  # the scale is subnormal, far too coarse for so many steps
    x[4, :32] = 1e30
    out = cpu.quantize(x, 32, bits=bits)
    assert np.isnan(out.scales).tolist() == [[True, False], [False, True], *[[False, False]] * 4]
    assert not out.values[:3].any() and np.abs(out.values[3:5].astype(int)).max(axis=1).tolist() == [top, top]
    products = cpu.binary_linear(random_linear(3, 64, 32), out)
    assert np.isnan(products[:2]).all() and np.isfinite(products[2:]).all()


def test_numpy_gives_the_same_bits(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    for tokens, rows, cols, block in ((0, 4, 40, 32), (1, 600, 100, 64), (5, 33, 576, 128), (3, 1, 1, 256)):
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        if tokens:
            x[0, : cols // 2] = rng.choice([0, np.nan, np.inf, 1e-45, 2.5e-43])
        col_scale = rng.uniform(0, 2, cols).astype(np.float32)
        bits = int(rng.choice([8, 16]))
        native, plain = cpu.quantize(x, block, col_scale, bits), fallback.quantize(x, block, col_scale, bits)
        np.testing.assert_array_equal(native.values, plain.values)
        np.testing.assert_array_equal(native.scales, plain.scales)
        weight = random_linear(rows, cols, block, bias=True)
        np.testing.assert_array_equal(cpu.binary_linear(weight, native), fallback.binary_linear(weight, plain, None))
        table = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
        np.testing.assert_array_equal(
            cpu.int8_linear(table, weight.row_scale, native), fallback.int8_linear(table, weight.row_scale, plain)
        )
        codes, step = random_codes(rng, rows, cols)
        x32 = cpu.quantize(x, 32, None, bits)
        np.testing.assert_array_equal(
            cpu.int4_linear(codes, step, weight.row_scale, x32),
            fallback.int4_linear(codes, step, weight.row_scale, x32),
        )
