"""Every way a file can be broken, each refused for its own reason, in a sentence that names field and values."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forge import Forge, assemble, swap_fields
from refusal import refused

from billm_format import BillmFile, UsageError

Q = "layers.0.q_proj"

# ---- what people save under the name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes: the file is empty"),
        (b"\x10\0\0", "at least 10 bytes, found 3 bytes"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML or XML page"),
        (b"\n\n  <html>", "HTML or XML page"),
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "PyTorch checkpoint"),
        (b"\x80\x02}q\x00X\x05\0\0\0modelq\x01", "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
        (random.Random(1).randbytes(5000), "not a .billm file"),
        (bytes(5000), "not a .billm file"),
    ],
)
def test_other_files_are_called_by_their_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    path.write_bytes(content)
    refused(path, re.escape(message))


def test_ordinary_safetensors_are_called_by_their_name(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.billm", metadata={"format": "pt"})
    assert "billm-convert" in refused(tmp_path / "model.billm", "an ordinary safetensors file")
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.billm")
    refused(tmp_path / "model.billm", "an ordinary safetensors file")


# ---- the table of broken headers: a change of the parts, header checksum made to match again


def entry(name: str, **fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.entries[name].update(fields)


def config(**fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.metadata["config"].update(fields)


def quantization(**fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.metadata["quantization"].update(fields)


def metadata(**fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.metadata.update(fields)


def without(key: str, part: str = "metadata") -> Callable[[Forge], None]:
    return lambda forge: getattr(forge, part).pop(key)


def shift(name: str, by: int) -> Callable[[Forge], None]:
    def change(forge: Forge) -> None:
        offsets = forge.entries[name]["data_offsets"]
        forge.entries[name]["data_offsets"] = [offset + by for offset in offsets]

    return change


def extra(name: str, **fields: Any) -> Callable[[Forge], None]:
    """Add a tensor of 8 bytes behind the last one."""

    def change(forge: Forge) -> None:
        forge.data[name] = bytes(8)
        forge.entries[name] = {"dtype": "U8", "shape": [8], "data_offsets": [0, 0]}
        forge.place()
        forge.entries[name].update(fields)

    return change


def grow(name: str, by: int) -> Callable[[Forge], None]:
    """Make a one-dimensional tensor longer and move all behind it: everything but the layout stays right."""

    def change(forge: Forge) -> None:
        forge.data[name] += bytes(by)
        forge.entries[name]["shape"][0] += by
        forge.place()

    return change


def drop(name: str) -> Callable[[Forge], None]:
    def change(forge: Forge) -> None:
        for part in (forge.data, forge.entries, forge.metadata["checksums"]):
            del part[name]
        forge.place()

    return change


def rename(old: str, new: str) -> Callable[[Forge], None]:
    def change(forge: Forge) -> None:
        for part in (forge.data, forge.entries, forge.metadata["checksums"]):
            part[new] = part.pop(old)
        forge.place()

    return change


BROKEN: dict[str, tuple[Callable[[Forge], Any], str]] = {
    "no format": (without("format"), "metadata format: wanted 'billm', found None"),
    "other format": (metadata(format="pt"), "metadata format: wanted 'billm', found 'pt'"),
    "metadata not text": (metadata(more=3), "metadata 'more': wanted text, found int"),
    "no version": (without("billm_version"), "metadata billm_version: wanted it to be there"),
    "newer major": (metadata(billm_version="2.0"), "billm_version: wanted 1.x, found 2.0; update billm-rt"),
    "older major": (metadata(billm_version="0.9"), "billm_version: wanted 1.x, found 0.9; convert"),
    "version no number": (metadata(billm_version="1"), "wanted two numbers, MAJOR.MINOR, found '1'"),
    "version padded": (metadata(billm_version="01.0"), "wanted two numbers, MAJOR.MINOR, found '01.0'"),
    "no config": (without("config"), "metadata config: wanted it to be there"),
    "config no object": (metadata(config="[1]"), "metadata config: wanted a JSON object"),
    "config field missing": (lambda f: f.metadata["config"].pop("norm"), "config: field norm is missing"),
    "config field unknown": (config(experts=8), "config: field 'experts' is not one this version knows"),
    "config type": (config(hidden_size="36"), "config field hidden_size: wanted int, found '36'"),
    "config bool": (config(num_hidden_layers=True), "config field num_hidden_layers: wanted int, found True"),
    "config float": (config(vocab_size=24.0), "config field vocab_size: wanted int, found 24.0"),
    "config huge float": (config(norm_eps=10**400), "config field norm_eps: wanted float"),
    "config choice": (config(norm="batchnorm"), "config field norm: wanted one of 'rmsnorm', 'layernorm'"),
    "config zero": (config(hidden_size=0), "config field hidden_size: wanted 1 to 16777216, found 0"),
    "config negative": (config(head_dim=-2), "config field head_dim: wanted 1 to 16777216, found -2"),
    "config heads": (config(num_key_value_heads=3), "num_key_value_heads: 3 does not divide num_attention_heads 2"),
    "config odd rope": (config(head_dim=7), "head_dim: rotary positions want an even number, found 7"),
    "config eps": (config(norm_eps=0), "norm_eps: wanted a positive number up to 1, found 0.0"),
    "config eos": (config(eos_token_ids=[24]), "config field eos_token_ids: wanted 0 to 23, found 24"),
    "config bos": (config(bos_token_id=-1), "config field bos_token_id: wanted 0 to 23, found -1"),
    "config product": (
        config(num_attention_heads=2**22),
        r"num_attention_heads \* head_dim: wanted 1 to 16777216, found 25165824",
    ),
    "many layers": (config(num_hidden_layers=4096), r"tensor layers.2.attn_norm.weight: wanted F32 \[36\], found no"),
    "too many layers": (config(num_hidden_layers=4097), "num_hidden_layers: wanted 1 to 4096, found 4097"),
    "wider": (config(hidden_size=2**24), r"project_in.weight: wanted F16 \[16777216, 36\], found no such tensor"),
    "other vocabulary": (config(vocab_size=25), r"tensor embed.weight: wanted I8 \[25, 36\], found I8 \[24, 36\]"),
    "untied": (config(tie_word_embeddings=False), "tensor head.weight: wanted .* found no such tensor"),
    "no qk_norm": (config(qk_norm=False), "tensor 'layers.0.q_norm.weight': wanted no such tensor"),
    "block size": (quantization(block_size=48), "quantization, block_size: wanted one of"),
    "other blocks": (quantization(block_size=128), r"q_proj.scales: wanted U8 \[12, 1, 4\], found U8 \[12, 2, 4\]"),
    "override of none": (quantization(overrides={"layers.2.q_proj": 64}), "overrides: wanted names of this model's"),
    "override padded": (quantization(overrides={"layers.01.q_proj": 64}), "overrides: wanted names of this model's"),
    "override 9^999": (quantization(overrides={f"layers.{'9' * 999}.q_proj": 64}), "overrides: wanted names"),
    "override value": (quantization(overrides={Q: 33}), f"quantization, {Q}: wanted one of .*, found 33"),
    "column scale of none": (quantization(col_scales=["embed"]), "col_scales: wanted names of this model's Linears"),
    "column scale twice": (quantization(col_scales=[Q, Q]), "col_scales: wanted every Linear once"),
    "column scale missing": (quantization(col_scales=[Q]), f"tensor {Q}.col_scale: wanted F16"),
    "embedding bits": (quantization(embedding_bits=5), "embedding_bits: wanted 4, 8 or 16, found 5"),
    "other embedding": (quantization(embedding_bits=4), r"embed.weight: wanted U8 \[24, 32\], found I8 \[24, 36\]"),
    "tokenizer record": (lambda f: f.metadata["tokenizer"].update(add_bos=1), "add_bos: wanted bool, found 1"),
    "surrogate": (lambda f: f.metadata["tokenizer"].update(bos_token="\ud800"), "tokenizer: .* lone surrogate"),
    "conversion no object": (metadata(conversion="3"), "metadata conversion: wanted a JSON object"),
    "conversion NaN": (metadata(conversion='{"error": NaN}'), "conversion: .*the number NaN"),
    "conversion infinite": (metadata(conversion='{"error": 1e999}'), "conversion: .*the number 1e999"),
    "conversion deep": (metadata(conversion='{"a":' * 17 + "1" + "}" * 17), "records of up to 16 levels"),
    "conversion deeper": (metadata(conversion='{"a":' + "[" * 90000 + "]" * 90000 + "}"), "nested too deeply"),
    "conversion duplicate": (metadata(conversion='{"a": 1, "a": 2}'), "key 'a' twice"),
    "conversion digits": (metadata(conversion='{"a": ' + "9" * 5000 + "}"), "conversion: wanted a JSON object"),
    "conversion commas": (metadata(conversion='{"a": [' + "1," * 2100000 + "1]}"), "more than 2097152 values"),
    "checksum missing": (lambda f: f.metadata["checksums"].pop("embed.scale"), "'embed.scale': .* found none"),
    "checksum of none": (lambda f: f.metadata["checksums"].update(x="0" * 64), "'x': .* found one for no tensor"),
    "checksum no digits": (lambda f: f.metadata["checksums"].update({"embed.scale": "g" * 64}), "64 hexadecimal"),
    "checksum number": (lambda f: f.metadata["checksums"].update({"embed.scale": 7}), "64 hexadecimal digits, found 7"),
    "dtype unknown": (
        entry(f"{Q}.sign", dtype="F64"),
        "q_proj.sign', dtype: wanted one of U8, I8, F16, F32, found 'F64'",
    ),
    "dtype no text": (entry(f"{Q}.sign", dtype=["U8"]), r"dtype: wanted one of .*, found \['U8'\]"),
    "dtype other": (entry(f"{Q}.sign", dtype="I8"), r"q_proj.sign: wanted U8 \[12, 8\], found I8 \[12, 8\]"),
    "shape turned": (entry(f"{Q}.sign", shape=[8, 12]), r"q_proj.sign: wanted U8 \[12, 8\], found U8 \[8, 12\]"),
    "shape flat": (entry(f"{Q}.sign", shape=[96]), r"q_proj.sign: wanted U8 \[12, 8\], found U8 \[96\]"),
    "shape too large": (entry(f"{Q}.sign", shape=[13, 8]), r"104 bytes \(U8 \[13, 8\]\), found 96 bytes"),
    "shape too small": (
        lambda f: f.entries["tokenizer.json"]["shape"].__setitem__(0, 100),
        r"'tokenizer.json': wanted 100 bytes \(U8 \[100\]\), found \d+ bytes",
    ),
    "shape huge": (entry(f"{Q}.sign", shape=[2**61, 8]), r"wanted \d+ bytes .*, found 96 bytes"),
    "shape over 64 bits": (entry(f"{Q}.sign", shape=[2**64, 8]), "shape: wanted up to three sizes"),
    "shape zero": (entry(f"{Q}.sign", shape=[0, 8]), "shape: wanted up to three sizes of 1 or more"),
    "shape negative": (entry(f"{Q}.sign", shape=[-12, -8]), "shape: wanted up to three sizes of 1 or more"),
    "shape of floats": (entry(f"{Q}.sign", shape=[12.0, 8]), "shape: wanted up to three sizes"),
    "shape of text": (entry(f"{Q}.sign", shape="[12, 8]"), "shape: wanted up to three sizes"),
    "shape long": (entry(f"{Q}.sign", shape=[1] * 5000), "shape: wanted up to three sizes"),
    "offsets reversed": (entry(f"{Q}.sign", data_offsets=[96, 0]), "data_offsets: wanted two places in order"),
    "offsets negative": (entry(f"{Q}.sign", data_offsets=[-96, 0]), "data_offsets: wanted two places in order"),
    "offsets three": (entry(f"{Q}.sign", data_offsets=[0, 96, 96]), "data_offsets: wanted two places in order"),
    "offsets far": (entry(f"{Q}.sign", data_offsets=[2**60, 2**60 + 96]), "data_offsets: wanted a start at .* gap"),
    "overlap": (shift(f"{Q}.second", -32), "data_offsets: wanted a start at .*(overlapping|gap)"),
    "gap": (shift(f"{Q}.second", 32), "data_offsets: wanted a start at .*(overlapping|gap)"),
    "same data twice": (lambda f: f.entries[f"{Q}.second"].update(f.entries[f"{Q}.sign"]), "overlapping the tensor"),
    "offsets swapped": (
        swap_fields("data_offsets", f"{Q}.sign", "layers.0.up_proj.sign"),
        r"wanted 320 bytes \(U8 \[40, 8\]\), found 96 bytes",
    ),
    "entry unknown key": (entry(f"{Q}.sign", more=1), "wanted an object with dtype, shape and data_offsets"),
    "entry no object": (lambda f: f.entries.update({f"{Q}.sign": [1]}), "wanted an object with dtype, shape and"),
    "name not ASCII": (rename("pad.0", "päd.0"), "a name of printable ASCII characters"),
    "name with escape": (rename("pad.0", "pad.\x1b[2J"), "a name of printable ASCII characters"),
    "tensor missing": (drop(f"{Q}.row_scale"), f"tensor {Q}.row_scale: wanted F16 .12., found no such tensor"),
    "tensor unknown": (extra("extra.weight"), "'extra.weight': wanted no such tensor for this config, found one"),
    "padding long": (grow("pad.0", 64), r"'pad.0': wanted U8 \[1 to 63\], found U8"),
    "padding in two axes": (extra("pad.999", shape=[2, 4]), r"'pad.999': wanted U8 \[1 to 63\], found U8 \[2, 4\]"),
    "padding without number": (extra("pad.x"), "'pad.x': wanted no such tensor"),
    "padding missing": (drop("pad.0"), "wanted data at a multiple of 64, found data at byte"),
    "norm longer": (grow("tokenizer.json", 1), "wanted data at a multiple of 64, found data at byte"),
    "trailing tensor short": (lambda f: f.data.update({list(f.data)[-1]: b""}), "bytes are missing"),
    "trailing bytes": (lambda f: f.data.update(more=b"123"), "found .* bytes, 3 too many"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_header_is_refused_for_its_reason(name: str, victim: Path) -> None:
    change, message = BROKEN[name]
    forge = Forge.of(victim)
    change(forge)
    victim.write_bytes(forge.build())
    started = time.perf_counter()
    refused(victim, message)
    assert time.perf_counter() - started < 2


def test_forge_changes_nothing_by_itself(victim: Path) -> None:
    """The table above means nothing if taking apart and putting together already broke the file."""
    forge = Forge.of(victim)
    forge.place()
    victim.write_bytes(forge.build())
    with BillmFile.open(victim) as file:
        file.verify()


EDITS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not UTF-8": (lambda raw: raw.replace(b"llama", b"\xff\xfe\xfdxx", 1), "header: wanted a JSON object"),
    "cut JSON": (lambda raw: raw[:-1], "header: wanted a JSON object"),
    "two objects": (lambda raw: raw + b"{}", "header: wanted a JSON object"),
    "a NUL behind": (lambda raw: raw + b"\0", "header: wanted a JSON object"),
    "tensor twice": (lambda raw: raw[:-1] + b"," + raw[raw.index(b'"embed.scale":{"') : -1] + b"}", "twice"),
    "metadata twice": (lambda raw: b'{"__metadata__":{},' + raw[1:], "key '__metadata__' twice"),
    "metadata a list": (lambda raw: b'{"__metadata__":[]}', "__metadata__: wanted an object"),
    "hash mark twice": (lambda raw: raw[:-1] + b',"header_sha256":"0"}', "header_sha256: wanted it once"),
    "hash key elsewhere": (
        lambda raw: (
            raw.replace(b'"header_sha256"', b'"header_sha257"')[:-1] + b',"x":{"header_sha256":"' + b"0" * 64 + b'"}}'
        ),
        "metadata header_sha256: wanted 64 hexadecimal digits, once",
    ),
    "hash key missing": (lambda raw: raw.replace(b'"header_sha256"', b'"header_sha257"'), "metadata header_sha256"),
    "deep": (lambda raw: raw[:-1] + b',"a":' + b"[" * 100000 + b"]" * 100000 + b"}", "nested too deeply"),
    "deep entry": (lambda raw: raw[:-1] + b',"a":' + b"[" * 900 + b"]" * 900 + b"}", "too deeply|wanted an obj"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_broken_header_text_is_refused(name: str, victim: Path) -> None:
    edit, message = EDITS[name]
    victim.write_bytes(Forge.of(victim).build(edit))
    refused(victim, message)


@pytest.mark.parametrize(
    "length", [0, 1, 2, 9, 10**8, 10**8 + 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_hostile_header_lengths(length: int, victim: Path) -> None:
    content = victim.read_bytes()
    victim.write_bytes(length.to_bytes(8, "little") + content[8:])
    started = time.perf_counter()
    refused(victim, "header|file size")
    assert time.perf_counter() - started < 0.5


def test_any_header_length_but_the_right_one(victim: Path) -> None:
    content = victim.read_bytes()
    right = int.from_bytes(content[:8], "little")
    for length in {right - 64, right - 1, right + 1, right + 64, len(content) - 8, len(content) - 7, right // 2}:
        victim.write_bytes(length.to_bytes(8, "little") + content[8:])
        refused(victim, "header")


# ---- versions


def test_newer_minor_version_may_add_tensors_and_keys(victim: Path) -> None:
    forge = Forge.of(victim)
    forge.metadata |= {"billm_version": "1.7", "later": "{"}
    pad = (-sum(map(len, forge.data.values()))) % 64
    if pad:
        forge.data["pad.777"] = bytes(pad)
        forge.entries["pad.777"] = {"dtype": "U8", "shape": [pad]}
    forge.data["later.weight"] = bytes(8)
    forge.entries["later.weight"] = {"dtype": "U8", "shape": [8]}
    forge.place()
    victim.write_bytes(forge.build())
    with BillmFile.open(victim) as file:
        assert file.version == (1, 7)
        file.verify()
        assert sum(file.sizes_by_kind().values()) == file.nbytes


def test_newer_minor_version_with_a_field_that_must_be_understood(victim: Path) -> None:
    forge = Forge.of(victim)
    forge.metadata["billm_version"] = "1.7"
    forge.metadata["config"]["experts"] = 8
    victim.write_bytes(forge.build())
    refused(victim, "'experts' is not one this version knows; the file is of version 1.7, this reader of 1.1: update")


def test_unknown_metadata_keys_are_ignored(victim: Path) -> None:
    forge = Forge.of(victim)
    forge.metadata["license"] = "Apache-2.0"
    victim.write_bytes(forge.build())
    BillmFile.open(victim).close()


# ---- bombs


def test_a_tiny_file_that_promises_a_giant_is_refused_at_once(victim: Path) -> None:
    forge = Forge.of(victim)
    giant = {"num_hidden_layers": 4096, "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12}
    forge.metadata["config"].update(giant, vocab_size=2**24, intermediate_size=2**24, max_position_embeddings=2**24)
    names = [f"layers.{i}.{part}" for i in range(4096) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    forge.metadata["quantization"].update(col_scales=names, overrides=dict.fromkeys(names, 32))
    victim.write_bytes(forge.build())
    started = time.perf_counter()
    refused(victim, "tensor embed.weight: wanted I8")
    assert time.perf_counter() - started < 1


def test_a_header_of_a_hundred_megabytes_of_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "bomb.billm"
    path.write_bytes(assemble(b'{"a":[' + b"[]," * 5_000_000 + b"1]}", b""))
    started = time.perf_counter()
    refused(path, "more than 2097152 values")
    assert time.perf_counter() - started < 1


def test_unreadable_file_is_a_usage_error(victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        BillmFile.open(victim)


def test_messages_do_not_carry_control_characters(victim: Path) -> None:
    forge = Forge.of(victim)
    forge.metadata["config"]["norm"] = "\x1b[2Jgone"
    victim.write_bytes(forge.build())
    assert "\x1b" not in refused(victim, "config field norm")
