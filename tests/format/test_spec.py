"""SPEC.md and the code say the same: its tables are parsed and compared, its example is decoded."""

import dataclasses
import math
import random
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import FAMILIES, tiny_config
from slow_decoder import SlowLinear, code, weight

from billm_format import layout
from billm_format.config import (
    BLOCK_SIZES,
    EMBEDDING_BITS,
    MAX_LAYERS,
    MAX_SIZE,
    ModelConfig,
    Quantization,
    TokenizerInfo,
)
from billm_format.header import MAX_COMMAS, MAX_DEPTH, MAX_HEADER_BYTES
from billm_format.packing import PackedLinear, Table, pack_nibbles, unpack_nibbles

SPEC = (Path(__file__).resolve().parents[2] / "format" / "SPEC.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text of the section whose heading begins with `title`."""
    match = re.search(rf"^#+ {re.escape(title)}[^\n]*\n(.*?)(?=^#+ |\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert match, f"SPEC.md has no section {title}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """Return the cells of the rows of the table in `text`, heading left out, backticks removed."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows[2:]]


def shape_of(text: str, names: dict[str, Any]) -> tuple[int, ...]:
    """Evaluate a shape cell; `any` is a free length."""
    inner = re.sub(r"ceil\((\w+) / (\w+)\)", r"-(-\1 // \2)", text.strip("[]"))
    return tuple(eval(f"({inner},)", {}, names | {"any": -1, "row_bytes": lambda cols: 4 * -(-cols // 32)}))


def expected_specs(config: ModelConfig, quantization: Quantization) -> list[layout.TensorSpec]:
    """Return the layout that SPEC.md's tables describe, in their order."""
    names: dict[str, Any] = {**vars(config), "embedding_bits": quantization.embedding_bits, "always": True}
    names |= {"optional": True, "V": config.vocab_size, "H": config.hidden_size, "E": config.embedding_size}
    names |= {"I": config.intermediate_size, "D": config.head_dim}
    names |= {"Q": config.num_attention_heads * config.head_dim, "KV": config.num_key_value_heads * config.head_dim}
    specs = []

    def add(lines: list[list[str]], prefix: str, **more: Any) -> None:
        for name, dtype, shape, kind, condition in lines:
            if eval(condition, {}, names | more):
                full = prefix + name.removeprefix("layers.N.") if name.startswith("layers.N.") else prefix + name
                sizes = shape_of(shape, names | more)
                specs.append(layout.TensorSpec(full, dtype, sizes, kind, optional=condition == "optional"))

    add(table(section("3.1")), "")
    per_linear = table(section("3.4"))
    for row in per_linear:
        row[4] = {"the Linear is in col_scales": "listed", "the Linear has a bias": "biased"}.get(row[4], row[4])
    for layer in range(config.num_hidden_layers):
        add(table(section("3.2")), f"layers.{layer}.")
        for linear, rows, cols, bias, condition in table(section("3.3")):
            if eval(condition, {}, names):
                full = f"layers.{layer}.{linear}"
                sizes = {"rows": names[rows], "cols": names[cols]}
                sizes["block"] = quantization.overrides.get(full, quantization.block_size)
                add(per_linear, full, **sizes, biased=names[bias], listed=full in quantization.col_scales)
    return specs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", EMBEDDING_BITS)
def test_tensor_tables_are_the_layout(family: str, bits: int) -> None:
    config = tiny_config(family)
    quantization = Quantization(64, {"layers.1.down_proj": 32}, bits, ("layers.0.v_proj",))
    assert list(layout.all_tensors(config, quantization)) == expected_specs(config, quantization)


@pytest.mark.parametrize(
    ("title", "record"), [("2.1", ModelConfig), ("2.2", Quantization), ("2.3", TokenizerInfo)], ids=lambda v: str(v)
)
def test_record_tables_name_every_field(title: str, record: type) -> None:
    assert [row[0] for row in table(section(title))] == [field.name for field in dataclasses.fields(record)]


def test_record_tables_state_the_values_that_the_code_takes() -> None:
    rows = {row[0]: row[1] for row in table(section("2.1"))}
    for name, hint in typing.get_type_hints(ModelConfig).items():
        if typing.get_origin(hint) is typing.Literal:
            assert tuple(rows[name].split(", ")) == typing.get_args(hint)
        elif hint is bool:
            assert rows[name] == "boolean"
        elif hint is float:
            assert rows[name].startswith("number, 0 < x <= ")
    powers = {int(base) ** int(power) for row in rows.values() for base, power in re.findall(r"(\d+)\^(\d+)", row)}
    assert powers == {MAX_SIZE}
    assert rows["num_hidden_layers"] == f"1 to {MAX_LAYERS}"
    blocks = {row[0]: row[1] for row in table(section("2.2"))}
    assert blocks["block_size"] == ", ".join(map(str, BLOCK_SIZES))
    assert blocks["embedding_bits"] == ", ".join(map(str, EMBEDDING_BITS))


def test_bounds_are_those_of_the_code() -> None:
    text = section("1.")
    assert f"{MAX_HEADER_BYTES:,} bytes" in text
    assert f"{MAX_COMMAS:,} commas" in text
    assert f"at most {MAX_DEPTH} levels" in section("2.4")
    assert f"version {'.'.join(map(str, layout.FORMAT_VERSION))}" in SPEC.splitlines()[0]


def test_kinds_are_those_of_the_code() -> None:
    used = {row[3] for title in ("3.1", "3.2", "3.4") for row in table(section(title))}
    assert used | {"padding"} == set(layout.KINDS)


# ---- the worked example


def example(title: str = "10. ") -> dict[str, bytes]:
    """Return the bytes of the tensors of a section's example."""
    parts: dict[str, bytes] = {}
    block = re.search(r"```example\n(.*?)```", section(title), re.DOTALL)
    assert block
    for line in block[1].splitlines():
        name, _, digits = line.partition(" ")
        parts[name] = parts.get(name, b"") + bytes.fromhex(digits)
    return parts


def example_weights() -> dict[tuple[int, int], float]:
    """Return (row, column) -> weight as the example's table states them, every weight once."""
    weights: dict[tuple[int, int], float] = {}
    for row, columns, _, _, _, formula in table(section("10. ")):
        product, _, value = formula.rpartition(" = ")
        assert math.prod(float(factor) for factor in product.split(" * ")) == float(value), formula
        first, _, last = columns.partition(" to ")
        for column in range(int(first), int(last or first) + 1):
            assert (int(row), column) not in weights
            weights[int(row), column] = float(value)
    assert len(weights) == 2 * 36
    return weights


def test_worked_example_with_the_package() -> None:
    parts = example()
    packed = PackedLinear(
        rows=2,
        cols=36,
        block=32,
        sign=np.frombuffer(parts["sign"], np.uint8).reshape(2, 8),
        second=np.frombuffer(parts["second"], np.uint8).reshape(2, 8),
        salient=np.frombuffer(parts["salient"], np.uint8),
        scales=np.frombuffer(parts["scales"], np.uint8).reshape(2, 2, 4),
        row_scale=np.frombuffer(parts["row_scale"], "<f2"),
        col_scale=np.frombuffer(parts["col_scale"], "<f2"),
    )
    dense = packed.dequantize()
    assert {(r, j): float(dense[r, j]) for r in range(2) for j in range(36)} == example_weights()


def test_worked_example_with_the_slow_decoder() -> None:
    parts = example()
    halves = {name: np.frombuffer(parts[name], "<f2").astype(float).tolist() for name in ("row_scale", "col_scale")}
    planes = {name: list(parts[name]) for name in ("sign", "second", "salient", "scales")}
    slow = SlowLinear(rows=2, cols=36, block=32, bias=[0.0, 0.0], **planes, **halves)
    assert {(r, j): weight(slow, r, j) for r in range(2) for j in range(36)} == example_weights()


def table_entries() -> np.ndarray:
    """Return the entries of the 4-bit example as its table states them, every one once."""
    entries = np.full((2, 36), np.nan)
    for row, columns, digits, formula in table(section("10.1 ")):
        product, _, value = formula.rpartition(" = ")
        assert eval(product) == float(value) and product.startswith(f"({digits} - 8)"), formula
        first, _, last = columns.partition(" to ")
        places = entries[int(row), int(first) : int(last or first) + 1]
        assert np.isnan(places).all()
        places[...] = float(value)
    assert np.isfinite(entries).all()
    return entries


def test_worked_example_of_a_4_bit_table() -> None:
    parts = example("10.1 ")
    weight, step = np.frombuffer(parts["weight"], np.uint8).reshape(2, 32), np.frombuffer(parts["step"], np.int8)
    packed = Table(weight, 36, np.frombuffer(parts["scale"], "<f2"), step.reshape(2, 2))
    np.testing.assert_array_equal(packed.take(slice(None)), table_entries())
    np.testing.assert_array_equal(packed.take(np.array([1, 0])), table_entries()[::-1])
    codes = unpack_nibbles(weight, 36)
    np.testing.assert_array_equal(pack_nibbles(codes), weight)
    assert [[code(row, e) for e in range(36)] for row in weight.tolist()] == codes.tolist()


def test_nibbles_survive_packing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for cols in (1, 15, 16, 17, 31, 32, 33, 64, 100):
        codes = rng.integers(0, 16, (5, cols), np.uint8)
        packed = pack_nibbles(codes)
        assert packed.shape == (5, layout.table_bytes(cols))
        np.testing.assert_array_equal(unpack_nibbles(packed, cols), codes)


def test_meaning_table_holds_for_all_scale_bytes() -> None:
    """Every combination of codes: the package against the slow decoder, saturation included."""
    seed = random.randrange(2**32)
    rng = np.random.default_rng(seed)
    rows, cols, block = 16, 70, 32
    raw = {
        "sign": rng.integers(0, 256, (rows, 12), np.uint8),
        "second": rng.integers(0, 256, (rows, 12), np.uint8),
        "salient": rng.integers(0, 256, 12, np.uint8),
        "scales": rng.integers(0, 256, (rows, 3, 4), np.uint8),
        "row_scale": rng.uniform(-1, 1, rows).astype(np.float16),
        "col_scale": rng.uniform(-1, 1, cols).astype(np.float16),
    }
    packed = PackedLinear(rows=rows, cols=cols, block=block, **raw)
    flat = {name: array.reshape(-1).tolist() for name, array in raw.items()}
    slow = SlowLinear(rows=rows, cols=cols, block=block, bias=[], **flat)
    wanted = np.array([[weight(slow, r, j) for j in range(cols)] for r in range(rows)])
    np.testing.assert_allclose(packed.dequantize(), wanted, rtol=1e-6, err_msg=f"seed {seed}")
