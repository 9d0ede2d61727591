"""The writer: the same bytes for the same input, one tensor at a time, and never half a file at the final name."""

import errno
import fcntl
import itertools
import os
import runpy
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from random_model import make_random_billm, random_tensors, tiny_config, tokenizer_json
from safetensors.numpy import load_file

from billm_format import BillmFile, DoesNotFitError, Quantization, TokenizerInfo, UsageError, write_file
from billm_format import writer as writer_module
from billm_format.layout import ALIGNMENT, FORMAT_VERSION

CONFIG = tiny_config("llama", num_hidden_layers=1)
QUANTIZATION = Quantization(block_size=64)


def sources(seed: int = 0) -> dict[str, Any]:
    arrays = random_tensors(CONFIG, QUANTIZATION, seed)
    return {"tokenizer.json": tokenizer_json(CONFIG), **{name: lambda a=array: a for name, array in arrays.items()}}


def write(path: Path, tensors: dict[str, Any], conversion: dict[str, Any] | None = None, **more: Any) -> int:
    return write_file(
        path,
        config=CONFIG,
        quantization=QUANTIZATION,
        tokenizer_info=TokenizerInfo(),
        conversion=conversion or {},
        tensors=tensors,
        **more,
    )


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a.billm", "b.billm"):
        make_random_billm(tmp_path / name, seed=5)
    make_random_billm(tmp_path / "c.billm", seed=6)
    first, second, other = ((tmp_path / name).read_bytes() for name in ("a.billm", "b.billm", "c.billm"))
    assert first == second != other


def test_golden_files_are_what_their_script_writes(vectors: Path, tmp_path: Path) -> None:
    """Fails when the writer's bytes change: then the format's version must change, and these files stay as they are."""
    script = runpy.run_path(str(vectors.parent / "make_vectors.py"))
    version = "v" + ".".join(map(str, FORMAT_VERSION))  # files of older versions can be read, not written
    for name, model in script["VERSIONS"][version].items():
        made = script["write"](tmp_path, name, *model)
        script["write_expected"](made)
        assert made.read_bytes() == (vectors.parent / version / made.name).read_bytes()
        expected = made.with_suffix(".expected.safetensors")
        kept = load_file(vectors.parent / version / expected.name)
        for tensor, array in load_file(expected).items():  # not bytes: another machine's exp may differ in the last bit
            np.testing.assert_allclose(array, kept[tensor], rtol=1e-6, atol=1e-6)


def test_data_is_aligned_and_padded_only_where_it_must_be(tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    size = write(path, sources())
    assert size == path.stat().st_size
    with BillmFile.open(path) as file:
        assert file.header_bytes % ALIGNMENT == 0
        infos = list(file.tensors.values())
        for before, info in itertools.pairwise(infos):
            if info.kind == "padding":
                assert before.nbytes % ALIGNMENT and info.nbytes == -before.nbytes % ALIGNMENT
            else:
                assert info.offset % ALIGNMENT == 0
        assert infos[-1].kind != "padding"


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    arrays = random_tensors(CONFIG, QUANTIZATION, 1)
    alive: list[weakref.ref[NDArray[Any]]] = []
    calls: list[str] = []

    def make(name: str) -> NDArray[Any]:
        assert not [ref for ref in alive if ref() is not None], f"{calls[-1]} is still held when {name} is asked for"
        array = arrays[name].copy()
        alive.append(weakref.ref(array))
        calls.append(name)
        return array

    tensors = {name: lambda name=name: make(name) for name in arrays}
    write(tmp_path / "model.billm", {"tokenizer.json": b"{}", **tensors})
    assert calls == list(arrays)  # each once, in file order


def test_foreign_byte_order_and_strides_are_written_right(tmp_path: Path) -> None:
    arrays = random_tensors(CONFIG, QUANTIZATION, 1)
    strange = {name: np.asfortranarray(array).astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    for name, given in [("a.billm", arrays), ("b.billm", strange)]:
        write(tmp_path / name, {"tokenizer.json": b"{}", **{n: lambda a=a: a for n, a in given.items()}})
    assert (tmp_path / "a.billm").read_bytes() == (tmp_path / "b.billm").read_bytes()


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "model.billm"
    size = write(path, sources(), progress=lambda done, total: seen.append((done, total)))
    with BillmFile.open(path) as file:
        assert seen[-1] == (size - file.header_bytes,) * 2
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("layers.0.q_proj.sign", np.zeros((96, 12), np.int8), r"wanted U8 \[96, 12\], found int8 \[96, 12\]"),
        ("layers.0.q_proj.sign", np.zeros((12, 96), np.uint8), r"wanted U8 \[96, 12\], found uint8 \[12, 96\]"),
        ("layers.0.q_proj.row_scale", np.zeros(96, np.float32), r"wanted F16 \[96\], found float32 \[96\]"),
        ("final_norm.weight", np.zeros(96), r"wanted F32 \[96\], found float64 \[96\]"),
        ("embed.weight", np.zeros((320, 96), np.uint8), r"wanted I8 \[320, 96\], found uint8 \[320, 96\]"),
        ("tokenizer.json", np.zeros((4, 4), np.uint8), r"wanted U8 \[4\], found uint8 \[4, 4\]"),
    ],
)
def test_wrong_arrays_are_refused_and_leave_nothing(
    name: str, array: NDArray[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"tensor {name}: {message}"):
        write(tmp_path / "model.billm", sources() | {name: lambda: array})
    assert not list(tmp_path.iterdir())


def test_wrong_names_and_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    missing = sources()
    del missing["final_norm.weight"]
    for tensors, message in [
        (missing, r"tensor final_norm.weight: wanted F32 \[96\], found no such tensor"),
        (sources() | {"head.weight": b"123"}, r"tensor head.weight: this config has no such tensor"),
        (sources() | {"chat_template.jinja": b""}, r"chat_template.jinja: wanted at least one byte"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(path, tensors)
    for conversion in ({"error": float("nan")}, {"error": float("inf")}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(path, sources(), conversion)
    with pytest.raises(Exception, match="lone surrogate"):
        write(path, sources(), {"source": "\udcff"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the source failed"), MemoryError()])
def test_a_failing_source_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    path.write_bytes(b"old")

    def fail() -> NDArray[Any]:
        assert path.with_name("model.billm.tmp").exists()
        raise error

    with pytest.raises(type(error)):
        write(path, sources() | {"layers.0.down_proj.sign": fail})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.billm"]
    assert path.read_bytes() == b"old"


def test_the_rename_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is on the disk before the final name exists, and the folder is synced after it does."""
    path = tmp_path / "model.billm"
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(descriptor: int) -> None:
        events.append(f"sync, {'renamed' if path.exists() else 'not yet'}")
        fsync(descriptor)

    def recording_replace(self: Path, target: Path) -> Path:
        with BillmFile.open(self) as file:
            file.verify()
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    write(path, sources())
    assert events == ["sync, not yet", "rename", "sync, renamed"]


def test_a_full_disk_is_told_with_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    with pytest.raises(DoesNotFitError, match=r"wanted \d+ bytes of disk, found 10 free"):
        write(tmp_path / "model.billm", sources())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Iterator[IO[bytes]]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "_write_data", full)
    with pytest.raises(DoesNotFitError, match=r"No space left on device while writing \d+ bytes"):
        write(tmp_path / "model.billm", sources())
    assert not list(tmp_path.iterdir())


def test_a_killed_writers_rest_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    path.with_name("model.billm.tmp").write_bytes(b"x" * 10_000_000)
    write(path, sources())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.billm"]
    with BillmFile.open(path) as file:
        file.verify()


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "model.billm"
    with path.with_name("model.billm.tmp").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing it"):
            write(path, sources())
        assert path.with_name("model.billm.tmp").exists()


def test_bad_places_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        write(tmp_path, sources())
    with pytest.raises(UsageError, match="there is no folder"):
        write(tmp_path / "none" / "model.billm", sources())
    (tmp_path / "link.billm.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / "link.billm", sources())
    assert not (tmp_path / "victim").exists()
