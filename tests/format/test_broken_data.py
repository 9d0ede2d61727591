"""Damage behind a header that is right: flipped bytes, lost ends, swapped tensors, values that no checksum can tell."""

import os
import random
from pathlib import Path

import pytest
from forge import Forge, swap_fields
from random_model import random_tensors, tiny_config
from refusal import refused

from billm_format import BillmFile, CorruptFileError, Quantization, TokenizerInfo, write_file

Q = "layers.0.q_proj"

SMALLEST = {
    "vocab_size": 4,
    "hidden_size": 8,
    "embedding_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "bos_token_id": None,
    "eos_token_ids": (3,),
}


# ---- chance damage


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A whole file in which no tensor is longer than 64 bytes."""
    config = tiny_config("llama", **SMALLEST)
    quantization = Quantization(32, col_scales=(Q,))
    arrays = random_tensors(config, quantization, seed=1)
    path = tmp_path / "smallest.billm"
    write_file(
        path,
        config=config,
        quantization=quantization,
        tokenizer_info=TokenizerInfo(),
        conversion={},
        tensors={"tokenizer.json": b"{}", **{name: lambda array=array: array for name, array in arrays.items()}},
    )
    return path


def test_every_flipped_byte_of_the_header_is_seen_at_open(smallest: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    content = smallest.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    with smallest.open("r+b", buffering=0) as file:
        for place in range(end):
            flipped = content[place] ^ rng.randrange(1, 256)
            os.pwrite(file.fileno(), bytes([flipped]), place)
            try:
                BillmFile.open(smallest)
            except CorruptFileError:
                os.pwrite(file.fileno(), content[place : place + 1], place)
            else:
                pytest.fail(f"byte {place} changed to {flipped}, and the file opened (seed {seed})")
    BillmFile.open(smallest).close()


def test_every_flipped_byte_of_the_data_is_seen_by_verify(smallest: Path) -> None:
    """Byte i of all tensors at once: exactly the tensors that have one must be named."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    content = smallest.read_bytes()
    with BillmFile.open(smallest) as file:
        tensors = list(file.tensors.values())
        assert file.header_bytes + sum(info.nbytes for info in tensors) == len(content)
    for i in range(max(info.nbytes for info in tensors)):
        damaged = bytearray(content)
        hit = [info for info in tensors if i < info.nbytes]
        for info in hit:
            damaged[info.offset + i] ^= rng.randrange(1, 256)
        smallest.write_bytes(damaged)
        with BillmFile.open(smallest) as file, pytest.raises(CorruptFileError) as caught:
            file.verify()
        named = str(caught.value).partition("checksums: ")[2].partition(";")[0].split(", ")
        assert named == [info.name for info in hit], f"byte {i}, seed {seed}"


def test_truncation_at_every_tensor_boundary_tells_what_is_missing(smallest: Path) -> None:
    content = smallest.read_bytes()
    with BillmFile.open(smallest) as file:
        bounds = {0, 8, file.header_bytes} | {info.offset + info.nbytes for info in file.tensors.values()}
        header = file.header_bytes
    for length in sorted({bound + step for bound in bounds for step in (-1, 0, 1)}):
        if not 0 <= length < len(content):
            continue
        smallest.write_bytes(content[:length])
        message = refused(smallest, "file|header")
        if length >= header:
            assert f"{len(content) - length} bytes are missing" in message
        elif length > 9:
            assert f"at least {header - length} bytes are missing" in message
    smallest.write_bytes(content + b"\0")
    refused(smallest, "1 too many")


def test_swapped_tensors_are_both_named(copy: Path) -> None:
    forge = Forge.of(copy)
    first, second = "layers.0.k_proj.sign", "layers.0.v_proj.sign"
    forge.data[first], forge.data[second] = forge.data[second], forge.data[first]
    copy.write_bytes(forge.build())
    with BillmFile.open(copy) as file, pytest.raises(CorruptFileError, match=f"2 of .*: {first}, {second};"):
        file.verify()


def test_swapped_offsets_are_seen_at_open_or_by_verify(copy: Path) -> None:
    forge = Forge.of(copy)
    swap_fields("data_offsets", "layers.0.k_proj.sign", "layers.0.v_proj.sign")(forge)
    swapped = forge.header()
    original = copy.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    copy.write_bytes(original[:8] + swapped.ljust(start - 8) + original[start:])
    refused(copy, "header: wanted sha256")
    copy.write_bytes(forge.build())
    with BillmFile.open(copy) as file, pytest.raises(CorruptFileError, match=r"2 of .*v_proj.sign, .*k_proj.sign"):
        file.verify()


# ---- values that no checksum can tell


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("layers.1.q_proj.row_scale", 2, b"\x00\x7c", r"row_scale: wanted finite numbers, found inf"),
        ("layers.0.down_proj.col_scale", 2, b"\x01\xfe", r"col_scale: wanted finite numbers, found nan"),
        ("final_norm.weight", 4, b"\x00\x00\x80\xff", "final_norm.weight: wanted finite numbers, found -inf"),
        ("embed.scale", 0, b"\xff\x7f", "embed.scale: wanted finite numbers, found nan"),
        ("pad.0", 1, b"\x01", "pad.0: wanted zeros"),
        ("layers.0.q_proj.sign", 4, b"\xff", "q_proj.sign: wanted zeros after column 35, found a set bit"),
        ("layers.0.q_proj.second", 95, b"\x80", "q_proj.second: wanted zeros after column 35"),
        ("layers.0.q_proj.salient", 5, b"\x01", "q_proj.salient: wanted zeros after column 35"),
        ("tokenizer.json", 3, b"\xff", "tokenizer.json: wanted UTF-8 text, found byte 3"),
        ("chat_template.jinja", 0, b"\x80", "chat_template.jinja: wanted UTF-8 text, found byte 0"),
    ],
)
def test_forbidden_values_under_right_checksums(
    name: str, place: int, value: bytes, message: str, victim: Path
) -> None:
    forge = Forge.of(victim)
    data = forge.data[name]
    forge.data[name] = data[:place] + value + data[place + len(value) :]
    forge.place()
    victim.write_bytes(forge.build())
    with BillmFile.open(victim) as file:
        if forge.entries[name]["dtype"].startswith("F"):
            with pytest.raises(CorruptFileError, match=message):
                file.array(name)
        with pytest.raises(CorruptFileError, match=message):
            file.verify()


@pytest.mark.parametrize(("place", "byte"), [(16 + 4, 0x01), (16 + 0, 0x10), (24 * 32 - 1, 0x80)])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_codes_behind_the_last_column_are_found_by_verify(
    name: str, place: int, byte: int, vectors: Path, tmp_path: Path
) -> None:
    path = tmp_path / "codes.billm"
    forge = Forge.of(vectors.parent / "v1.1" / "llama-4bit.billm")
    data = bytearray(forge.data[name])
    data[place] |= byte
    forge.data[name] = bytes(data)
    forge.place()
    path.write_bytes(forge.build())
    with BillmFile.open(path) as file:
        with pytest.raises(CorruptFileError, match=rf"{name}: wanted zeros after column 35, found another code"):
            file.verify()
        table = file.table(name.removesuffix(".weight"))
        assert table.take(slice(None)).shape == (24, 36)


def test_infinite_matrix_is_found_by_verify(vectors: Path, tmp_path: Path) -> None:
    path = tmp_path / "opt.billm"
    forge = Forge.of(vectors / "opt.billm")
    forge.data["pos_embed.weight"] = forge.data["pos_embed.weight"][:-2] + b"\x00\x7c"
    forge.place()
    path.write_bytes(forge.build())
    with BillmFile.open(path) as file:
        file.array("pos_embed.weight")
        with pytest.raises(CorruptFileError, match=r"pos_embed\.weight: wanted finite numbers, found inf"):
            file.verify()
