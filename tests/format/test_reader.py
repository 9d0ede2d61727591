"""The reader against the slow decoder, the safetensors library and the golden files."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import FAMILIES, make_random_billm, tiny_config, tokenizer_json
from safetensors import safe_open
from safetensors.numpy import load_file
from slow_decoder import SlowFile

from billm_format import BillmFile, CorruptFileError, UsageError
from billm_format.config import BLOCK_SIZES, EMBEDDING_BITS, ModelConfig, Quantization
from billm_format.layout import ALIGNMENT, KINDS, linear_names


def random_shape(rng: random.Random) -> tuple[ModelConfig, Quantization]:
    """Return a tiny random model of any family: odd widths, short last blocks, every optional part on or off."""
    heads = rng.choice([1, 2, 4])
    hidden = rng.choice([8, 31, 32, 33, 65, 130])
    changes: dict[str, Any] = {
        "hidden_size": hidden,
        "embedding_size": rng.choice([hidden, hidden, 24]),
        "intermediate_size": rng.choice([5, 64, 100, 257]),
        "num_hidden_layers": rng.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads]),
        "head_dim": rng.choice([2, 6, 20]),
        **{name: rng.random() < 0.5 for name in ("gated_mlp", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")},
        **{name: rng.random() < 0.5 for name in ("final_norm", "tie_word_embeddings")},
        "norm": rng.choice(["rmsnorm", "layernorm"]),
        "norm_position": rng.choice(["pre", "post"]),
        "activation": rng.choice(["silu", "gelu", "gelu_tanh", "relu"]),
        "sliding_window": rng.choice([None, 3]),
    }
    config = tiny_config(rng.choice(list(FAMILIES)), **changes)
    names = list(linear_names(config))
    overrides = {name: rng.choice(BLOCK_SIZES) for name in names if rng.random() < 0.2}
    scaled = tuple(name for name in names if rng.random() < 0.3)
    return config, Quantization(rng.choice(BLOCK_SIZES), overrides, rng.choice(EMBEDDING_BITS), scaled)


@pytest.mark.parametrize("turn", range(12))
def test_random_files_read_as_the_slow_decoder_reads_them(turn: int, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    config, quantization = random_shape(rng)
    path = tmp_path / "random.billm"
    given = make_random_billm(path, config, quantization, seed, chat_template=rng.choice([None, "{{ bos_token }}é"]))
    slow = SlowFile(path)
    assert slow.header_is_whole() and not slow.damaged()
    with BillmFile.open(path) as file:
        file.verify()
        assert (file.config, file.quantization) == (config, quantization)
        assert file.tokenizer_json().encode() == tokenizer_json(config)
        for name, array in given.items():
            np.testing.assert_array_equal(file.array(name), array)
            assert file.array(name).dtype == array.dtype
        for name in rng.sample(list(linear_names(config)), 3):
            linear, oracle = file.linear(name), slow.linear(name)
            assert (linear.rows, linear.cols, linear.block) == (oracle.rows, oracle.cols, oracle.block)
            np.testing.assert_allclose(linear.dequantize(), slow.weights(name), rtol=1e-6)
            assert (linear.bias is None) or linear.bias.tolist() == oracle.bias


def test_sizes_add_up_and_bits_are_those_of_the_planes(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    config, quantization = random_shape(random.Random(seed))
    path = tmp_path / "random.billm"
    make_random_billm(path, config, quantization, seed)
    slow = SlowFile(path)
    weights = salient = stored = 0
    for name in linear_names(config):
        linear = slow.linear(name)
        weights += linear.rows * linear.cols
        salient += linear.rows * sum(linear.salient[j // 8] >> j % 8 & 1 for j in range(linear.cols))
        parts = [f"{name}.{part}" for part in ("sign", "second", "salient", "scales", "row_scale", "col_scale")]
        stored += sum(len(slow.bytes_of(part)) for part in parts if part in slow.entries)
    with BillmFile.open(path) as file:
        sizes = file.sizes_by_kind()
        assert sum(sizes.values()) == file.nbytes == path.stat().st_size
        assert sizes.keys() == KINDS.keys() | {"header"}
        assert file.bits() == pytest.approx((1 + salient / weights, 8 * stored / weights))


def test_safetensors_opens_it(golden: Path) -> None:
    arrays = load_file(golden)
    with BillmFile.open(golden) as file, safe_open(golden, "numpy") as other:
        assert f"v{other.metadata()['billm_version']}" == golden.parent.name
        assert arrays.keys() == file.tensors.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.array(name), array)


def test_golden_files_keep_their_values(golden: Path) -> None:
    expected = load_file(golden.with_suffix(".expected.safetensors"))
    with BillmFile.open(golden) as file:
        file.verify()
        assert file.conversion["note"] == "golden file, ünïcode"
        names = list(linear_names(file.config))
        assert set(names) < expected.keys()
        for name in names:
            np.testing.assert_array_equal(file.linear(name).dequantize(), expected[name])
        for name in {"embed", "head"} & expected.keys():
            np.testing.assert_array_equal(file.table(name).take(slice(None)), expected[name])
            np.testing.assert_array_equal(file.table(name).take(np.array([5, 0, 5])), expected[name][[5, 0, 5]])


def test_golden_files_hold_a_working_tokenizer(golden: Path) -> None:
    from tokenizers import Tokenizer

    with BillmFile.open(golden) as file:
        tokenizer = Tokenizer.from_str(file.tokenizer_json())
        assert tokenizer.get_vocab_size() == file.config.vocab_size
    assert tokenizer.encode("w5 w9 nothing").ids == [5, 9, 0]


def test_arrays_are_aligned_read_only_views_that_outlive_the_file(golden: Path) -> None:
    with BillmFile.open(golden) as file:
        info = file.tensors["layers.0.up_proj.sign"]
        view = file.array(info.name)
        data = golden.read_bytes()[info.offset : info.offset + info.nbytes]
        for name in file.tensors:
            array = file.array(name)
            assert not array.flags.writeable and not array.flags.owndata
            assert array.ctypes.data % ALIGNMENT == 0 or name.startswith("pad.")
    assert view.tobytes() == data
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def test_pages_that_were_let_go_of_come_back(golden: Path) -> None:
    with BillmFile.open(golden) as file:
        before = {name: file.array(name).copy() for name in file.tensors}
        views = {name: file.array(name) for name in file.tensors}
        file.let_go()
        for name, view in views.items():
            np.testing.assert_array_equal(view, before[name])
            np.testing.assert_array_equal(file.array(name), before[name])


def test_unknown_names_are_key_errors(golden: Path) -> None:
    with BillmFile.open(golden) as file:
        for ask in (file.array, file.linear):
            with pytest.raises(KeyError):
                ask("layers.9.q_proj")


def test_opening_looks_at_no_data_but_verify_does(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    copy.write_bytes(content)
    with BillmFile.open(copy) as file, pytest.raises(CorruptFileError, match="do not match their checksums"):
        file.verify()


def test_verify_reports_its_progress(golden: Path) -> None:
    seen: list[tuple[int, int]] = []
    with BillmFile.open(golden) as file:
        file.verify(lambda done, total: seen.append((done, total)))
        assert seen[-1] == (file.nbytes - file.header_bytes,) * 2
    assert seen == sorted(seen)


def test_no_file_there_is_a_usage_error(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, message in [("none", "no such file"), (".", "a directory"), ("pipe", "not a regular file")]:
        with pytest.raises(UsageError, match=message):
            BillmFile.open(tmp_path / name)
