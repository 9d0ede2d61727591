"""Buffers that do not fit are refused, with both numbers, by the native library and by NumPy alike."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from billm_format.packing import PackedLinear
from billm_rt import cpu
from billm_rt.cpu import QuantizedActivations

ROWS, COLS, BLOCK = 6, 100, 32


@pytest.fixture(params=["native", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "numpy":
        monkeypatch.setattr(cpu, "_reason", "a test says so")
    elif not cpu.available():
        pytest.skip(f"native library: {cpu.unavailable_reason()}")
    yield request.param


@pytest.fixture
def weight(random_linear: Any) -> PackedLinear:
    return random_linear(ROWS, COLS, BLOCK, bias=True)


def activations(tokens: int = 2, cols: int = COLS, block: int = BLOCK) -> QuantizedActivations:
    return cpu.quantize(np.ones((tokens, cols), np.float32), block)


Change = Callable[[Any], Any]

WRONG_FIELDS: list[tuple[str, Change, type[Exception], str]] = [
    ("sign", lambda a: a[:, :-1], ValueError, r"sign: wanted"),
    ("sign", lambda a: a[:-1], ValueError, r"sign: wanted shape \[6, 16\], found \[5, 16\]"),
    ("sign", lambda a: a.astype(np.int8), TypeError, "sign: wanted dtype uint8, found int8"),
    ("sign", lambda a: a.view(np.bool_), TypeError, "sign: wanted dtype uint8, found bool"),
    ("second", lambda a: np.hstack([a, a])[:, ::2], ValueError, "second: wanted a C-contiguous array"),
    ("second", lambda a: np.asfortranarray(a), ValueError, "second: wanted a C-contiguous array"),
    ("second", lambda a: a.reshape(-1), ValueError, r"second: wanted shape \[6, 16\], found \[96\]"),
    ("salient", lambda a: np.append(a, a[:1]), ValueError, r"salient: wanted shape \[16\], found \[17\]"),
    ("scales", lambda a: a[:, :3].copy(), ValueError, r"scales: wanted shape \[6, 4, 4\], found \[6, 3, 4\]"),
    ("scales", lambda a: a.astype(np.float32), TypeError, "scales: wanted dtype uint8, found float32"),
    ("row_scale", lambda a: a[:-1].copy(), ValueError, r"row_scale: wanted shape \[6\], found \[5\]"),
    ("row_scale", lambda a: a.astype(np.float64), TypeError, "row_scale: wanted dtype float"),
    ("row_scale", lambda a: a.view(np.int16), TypeError, "row_scale: wanted dtype float"),
    ("bias", lambda a: a.astype(np.float16), TypeError, "bias: wanted dtype float32, found float16"),
    ("bias", lambda a: np.append(a, a), ValueError, r"bias: wanted shape \[6\], found \[12\]"),
    ("block", lambda _: 16, ValueError, "block"),
    ("rows", lambda _: 7, ValueError, r"sign: wanted shape \[7, 16\], found \[6, 16\]"),
    ("cols", lambda _: 200, ValueError, r"sign: wanted shape \[6, 28\], found \[6, 16\]"),
]


@pytest.mark.parametrize(("field", "change", "error", "message"), WRONG_FIELDS)
def test_wrong_weights(
    backend: str, weight: PackedLinear, field: str, change: Change, error: type[Exception], message: str
) -> None:
    wrong = dataclasses.replace(weight, **{field: change(getattr(weight, field))})
    x = activations(cols=wrong.cols)
    x = dataclasses.replace(x, block=wrong.block)
    with pytest.raises(error, match=message):
        cpu.binary_linear(wrong, x)


WRONG_ACTIVATIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"values": np.zeros((2, COLS - 1), np.int16)}, ValueError, r"x.values: wanted shape \[-1, 100\], found \[2, 99\]"),
    ({"values": np.zeros((2, COLS), np.int8)}, TypeError, "x.values: wanted dtype int16, found int8"),
    ({"bits": 12}, ValueError, "bits: wanted 8 or 16, found 12"),
    ({"values": np.zeros((COLS, 2), np.int16).T}, ValueError, "x.values: wanted a C-contiguous array"),
    ({"values": np.zeros((3, COLS), np.int16)}, ValueError, r"x.scales: wanted shape \[3, 4\], found \[2, 4\]"),
    ({"scales": np.zeros((2, 3), np.float32)}, ValueError, r"x.scales: wanted shape \[2, 4\], found \[2, 3\]"),
    ({"scales": np.zeros((2, 4), np.float64)}, TypeError, "x.scales: wanted dtype float32, found float64"),
    ({"block": 64}, ValueError, "x.block: wanted the weight's block size 32, found 64"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG_ACTIVATIONS)
def test_wrong_activations(
    backend: str, weight: PackedLinear, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cpu.binary_linear(weight, dataclasses.replace(activations(), **fields))


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (16, 8191)])
def test_activations_out_of_range(backend: str, weight: PackedLinear, bits: int, top: int) -> None:
    table, scale = np.ones((5, COLS), np.int8), np.ones(5, np.float16)
    for tokens, place in ((1, (0, 0)), (3, (2, COLS - 1)), (3, (1, 50))):
        for value in (top, -top, top + 1, -top - 1, -32768, 32767):
            x = dataclasses.replace(activations(tokens), bits=bits)
            x.values[...] = 0
            x.values[place] = value
            if abs(value) <= top:
                assert cpu.int8_linear(table, scale, x).any() and cpu.binary_linear(weight, x).any()
                continue
            for product in (lambda x: cpu.int8_linear(table, scale, x), lambda x: cpu.binary_linear(weight, x)):
                with pytest.raises(ValueError, match=f"x.values: wanted -{top} to {top} at {bits} bits, found others"):
                    product(x)


def test_wrong_row_scale(backend: str, weight: PackedLinear) -> None:
    with pytest.raises(ValueError, match=r"row_scale: wanted shape \[6\], found \[7\]"):
        cpu.binary_linear(weight, activations(), np.ones(7, np.float32))
    with pytest.raises(TypeError, match="row_scale: wanted dtype float32, found float16"):
        cpu.binary_linear(weight, activations(), np.ones(6, np.float16))  # type: ignore[arg-type]


def test_wrong_int8_weights(backend: str) -> None:
    table, scale = np.zeros((5, COLS), np.int8), np.ones(5, np.float16)
    assert cpu.int8_linear(table, scale, activations()).shape == (2, 5)
    with pytest.raises(TypeError, match="weight: wanted dtype int8, found uint8"):
        cpu.int8_linear(table.astype(np.uint8), scale, activations())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: wanted a C-contiguous array"):
        cpu.int8_linear(np.asfortranarray(table), scale, activations())
    with pytest.raises(ValueError, match=r"scale: wanted shape \[5\], found \[4\]"):
        cpu.int8_linear(table, scale[:4], activations())
    with pytest.raises(TypeError, match="scale: wanted dtype float"):
        cpu.int8_linear(table, np.ones(5), activations())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x.values: wanted shape \[-1, 100\], found \[2, 99\]"):
        cpu.int8_linear(table, scale, activations(cols=99))


def test_wrong_int4_weights(backend: str) -> None:
    table, step, scale = np.zeros((5, 64), np.uint8), np.zeros((4, 5), np.int8), np.ones(5, np.float16)
    assert cpu.int4_linear(table, step, scale, activations()).shape == (2, 5)
    with pytest.raises(TypeError, match="weight: wanted dtype uint8, found int8"):
        cpu.int4_linear(table.view(np.int8), step, scale, activations())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight: wanted shape \[-1, 64\], found \[5, 63\]"):
        cpu.int4_linear(table[:, :63].copy(), step, scale, activations())
    with pytest.raises(ValueError, match="weight: wanted a C-contiguous array"):
        cpu.int4_linear(np.asfortranarray(table), step, scale, activations())
    with pytest.raises(TypeError, match="step: wanted dtype int8, found uint8"):
        cpu.int4_linear(table, step.view(np.uint8), scale, activations())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step: wanted shape \[4, 5\], found \[5, 4\]"):
        cpu.int4_linear(table, step.reshape(5, 4), scale, activations())
    with pytest.raises(ValueError, match=r"scale: wanted shape \[5\], found \[4\]"):
        cpu.int4_linear(table, step, scale[:4], activations())
    with pytest.raises(ValueError, match=r"x\.block: wanted 32, the columns of a group, found 64"):
        cpu.int4_linear(table, step, scale, activations(block=64))


def test_wrong_input_of_quantize(backend: str) -> None:
    x = np.ones((2, COLS), np.float32)
    with pytest.raises(TypeError, match="x: wanted dtype float32, found float64"):
        cpu.quantize(x.astype(np.float64), BLOCK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: wanted shape"):
        cpu.quantize(x[0], BLOCK)
    with pytest.raises(ValueError, match="x: wanted a C-contiguous array"):
        cpu.quantize(np.asfortranarray(x), BLOCK)
    with pytest.raises(ValueError, match=r"col_scale: wanted shape \[100\], found \[99\]"):
        cpu.quantize(x, BLOCK, np.ones(99, np.float32))
    for block in (0, -32, 16, 100, 512):
        with pytest.raises(ValueError, match=f"block: wanted 32, 64, 128 or 256, found {block}"):
            cpu.quantize(x, block)
    with pytest.raises(ValueError, match="bits: wanted 8 or 16, found 4"):
        cpu.quantize(x, BLOCK, bits=4)


def test_a_weight_that_was_refused_is_refused_again(backend: str, weight: PackedLinear) -> None:
    wrong = dataclasses.replace(weight, sign=weight.sign[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match="sign"):
            cpu.binary_linear(wrong, activations())


def test_checked_weights_go_away_with_the_weight(weight: PackedLinear) -> None:
    cpu.binary_linear(weight, activations())
    before = len(cpu._checked)
    copy = dataclasses.replace(weight)
    cpu.binary_linear(copy, activations())
    assert len(cpu._checked) == before + cpu.available()
    del copy
    assert len(cpu._checked) == before


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="instruction set 'mmx'"):
        cpu.select_isa("mmx")
