"""Whole conversions of tiny models: what the file holds, determinism, resuming after kills, clear refusals."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert.hf_models import FAMILIES, save_model, write_text

from billm_convert import ConvertSettings, Event, convert, pipeline, resources
from billm_convert.block import DecoderBlock, Rotary
from billm_convert.cli import main
from billm_convert.report import memory_line
from billm_convert.settings import ABLATIONS, RECIPES, TUNED
from billm_convert.source import open_model
from billm_convert.streams import Stream
from billm_convert.workdir import WorkFolder
from billm_format.errors import EXIT_DOES_NOT_FIT, DoesNotFitError, UsageError
from billm_format.layout import all_tensors
from billm_format.reader import BillmFile

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"nsamples": 3, "seqlen": 24, "block_size": 32, "max_salient": 8}
# Training takes its time even for a tiny model; test_tune.py has shorter ones.
RECIPE_CASES = [pytest.param(name, marks=pytest.mark.slow if name == TUNED else ()) for name in RECIPES]


def small(folder: Path, family: str, seed: int, **changes: Any) -> tuple[Path, ConvertSettings]:
    """Save a model and a text; return the model's folder and settings that convert it in a blink."""
    save_model(folder / "model", family, seed, **changes)
    text = write_text(folder / "text.txt", seed)
    return folder / "model", ConvertSettings(recipe="paper", calib=str(text), seed=seed % 1000, **SIZES)


@pytest.mark.parametrize("recipe", RECIPE_CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_file_holds_the_model(family: str, recipe: str, tmp_path: Path, seed: int) -> None:
    """Dequantized weights put into Hugging Face's own model and the original's errors must agree with the report."""
    folder, settings = small(tmp_path, family, seed)
    report = convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, recipe=recipe))
    source = open_model(folder)
    with BillmFile.open(tmp_path / "out.billm") as file:
        file.verify()
        assert file.config == source.config
        assert file.chat_template() == "{{ messages[0]['content'] }}"
        assert [info for info in file.tensors if not info.startswith("pad.")] == [
            spec.name for spec in all_tensors(file.config, file.quantization)
        ]
        for linear in report.layers:
            stored, original = file.linear(linear.name), source.tensor(f"{linear.name}.weight").numpy()
            weight = stored.dequantize()
            assert weight.shape == original.shape
            error = float(((weight - original) ** 2).sum() / (original**2).sum())
            if recipe != TUNED:  # whose report is of the Linears before their training
                assert error == pytest.approx(linear.weight_error, rel=1e-4)
            assert error < 0.6
            if stored.bias is not None and recipe != TUNED:
                np.testing.assert_array_equal(stored.bias, source.tensor(f"{linear.name}.bias").numpy())
        embedding = file.array("embed.weight") * file.array("embed.scale").astype(np.float32)[:, None]
        wanted = source.tensor("embed.weight").numpy()
        assert np.abs(embedding - wanted).max() <= np.abs(wanted).max() / 127
        norm = source.tensor("layers.1.attn_norm.weight").numpy()
        # Training moves the norms too.
        assert np.array_equal(file.array("layers.1.attn_norm.weight"), norm) == (recipe != TUNED)
    assert not (tmp_path / "out.billm.work").exists()
    assert report.file_bytes == (tmp_path / "out.billm").stat().st_size


def test_each_block_is_calibrated_on_the_binarized_ones_before(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of block 1 are the outputs of block 0 with the weights that the file holds."""
    folder, settings = small(tmp_path, "llama", seed)
    seen: list[torch.Tensor] = []
    observe = DecoderBlock.observe

    def spy(self: DecoderBlock, x: torch.Tensor, capture: Any) -> None:
        seen.append(x.clone())
        observe(self, x, capture)

    monkeypatch.setattr(DecoderBlock, "observe", spy)
    convert(folder, tmp_path / "out.billm", settings)
    assert len(seen) == 2
    source = open_model(folder)
    conversion = pipeline.Conversion(folder, tmp_path / "other.billm", settings, lambda event: None)
    weights = source.layer(0)
    with BillmFile.open(tmp_path / "out.billm") as file:
        for linear in source.config.linears():
            weights[f"{linear}.weight"] = torch.from_numpy(file.linear(f"layers.0.{linear}").dequantize())
    rotary = Rotary(source.tensor("rope.inv_freq"), 1.0, settings.seqlen or 0)
    wanted = DecoderBlock(source.config, weights, rotary).forward(seen[0])
    assert conversion.seqlen == seen[0].shape[1]
    assert torch.allclose(seen[1], wanted, atol=1e-5)
    original = DecoderBlock(source.config, source.layer(0), rotary).forward(seen[0])
    assert not torch.allclose(seen[1], original, atol=1e-2)


def test_same_seed_same_bytes_other_seed_other_windows(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "qwen3", seed)
    first = convert(folder, tmp_path / "a.billm", settings)
    convert(folder, tmp_path / "b.billm", settings)
    other = convert(folder, tmp_path / "c.billm", dataclasses.replace(settings, seed=settings.seed + 1))
    assert (tmp_path / "a.billm").read_bytes() == (tmp_path / "b.billm").read_bytes()
    assert first.calibration["tokens_sha256"] != other.calibration["tokens_sha256"]
    assert str(tmp_path).encode() not in (tmp_path / "a.billm").read_bytes()  # no paths of this machine


def test_record_and_report(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama-tied-gqa", seed)
    events: list[Event] = []
    report = convert(folder, tmp_path / "out.billm", settings, events.append)
    with BillmFile.open(tmp_path / "out.billm") as file:
        record = file.conversion
        assert (report.bits_paper, report.bits_true) == file.bits()
    assert record["settings"]["max_salient"] == 8
    assert record["calibration"]["tokens"] == 72
    assert [layer["name"] for layer in record["layers"]] == [linear.name for linear in report.layers]
    assert len(report.layers) == 14
    finished = [event for event in events if event.linears]
    assert [len(event.linears) for event in finished] == [7, 7]
    shares = [event.done for event in events if event.stage == "blocks"]
    assert shares == sorted(shares)
    assert json.loads(json.dumps(report.to_json()))["bits"]["true"] > 2


def test_ablations_leave_out_what_they_say(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    whole = convert(folder, tmp_path / "whole.billm", settings).layers
    reports = {}
    for name in ABLATIONS:
        report = convert(folder, tmp_path / f"{name}.billm", dataclasses.replace(settings, ablation=name))
        assert report.settings["ablation"] == name
        reports[name] = report.layers
    assert all(linear.sparse > 0 and linear.salient > 0 for linear in whole)
    assert all(linear.sparse == 0 and linear.salient > 0 for linear in reports["salient-only"])
    assert all(linear.sparse > 0 and linear.salient == 0 for linear in reports["splitting-only"])
    first = "layers.0.q_proj"  # reads the same in all of them
    errors = {name: next(linear.error for linear in layers if linear.name == first) for name, layers in reports.items()}
    assert errors["no-compensation"] != next(linear.error for linear in whole if linear.name == first)
    with pytest.raises(UsageError, match="--ablation takes the paper's recipe apart, not refined"):
        dataclasses.replace(settings, recipe="refined", ablation="salient-only")
    with pytest.raises(UsageError, match="--ablation: wanted one of"):
        dataclasses.replace(settings, ablation="nothing")


def test_sixteen_bit_embeddings(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "opt", seed)
    convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, embedding_bits=16))
    with BillmFile.open(tmp_path / "out.billm") as file:
        wanted = open_model(folder).tensor("embed.weight").to(torch.float16).numpy()
        np.testing.assert_array_equal(file.array("embed.weight"), wanted)


@pytest.mark.parametrize("family", ["llama", "llama-tied-gqa", "opt"])
def test_four_bit_embeddings(family: str, tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, family, seed)
    settings = dataclasses.replace(settings, embedding_bits=4)
    convert(folder, tmp_path / "out.billm", settings)
    source = open_model(folder)
    with BillmFile.open(tmp_path / "out.billm") as file:
        file.verify()
        for name in ("embed", "head") if not file.config.tie_word_embeddings else ("embed",):
            wanted = source.tensor(f"{name}.weight").numpy()
            error = np.square(file.table(name).take(slice(None)) - wanted).sum() / np.square(wanted).sum()
            assert error < 0.05  # 4 bits, and what feedback adds
        checksums = file.checksums
    convert(folder, tmp_path / "again.billm", settings)
    with BillmFile.open(tmp_path / "again.billm") as file:
        assert file.checksums == checksums


def test_sharded_equals_single_file(tmp_path: Path, seed: int) -> None:
    single, settings = small(tmp_path, "llama", seed)
    save_model(tmp_path / "sharded", "llama", seed, max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    convert(single, tmp_path / "a.billm", settings)
    convert(tmp_path / "sharded", tmp_path / "b.billm", settings)
    with BillmFile.open(tmp_path / "a.billm") as a, BillmFile.open(tmp_path / "b.billm") as b:
        assert a.checksums == b.checksums


def test_self_calibration_is_seeded(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama-tied-gqa", seed)
    settings = dataclasses.replace(settings, calib="self")
    first = convert(folder, tmp_path / "a.billm", settings)
    second = convert(folder, tmp_path / "b.billm", settings)
    assert first.calibration == second.calibration
    assert first.calibration["tokens"] == 72
    assert first.calibration["sha256"] is None
    assert (tmp_path / "a.billm").read_bytes() == (tmp_path / "b.billm").read_bytes()


def test_the_stage_that_takes_most_memory_is_told(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = small(tmp_path, "llama-tied-gqa", seed)
    settings = dataclasses.replace(settings, calib="self")
    for plan, stage in (({"hidden_states": 10**9}, "binarizing"), ({"hidden_states": 1}, "sampling text")):
        monkeypatch.setattr(resources, "memory_plan", lambda *args, plan=plan, **options: plan)
        report = convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, force=True))
        assert report.memory_stage == stage
        assert f"(computed, most while {stage}: {next(iter(report.memory)).replace('_', ' ')}" in memory_line(report)


# --- killed, interrupted, out of disk ------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for a kill: nothing may catch it."""


def stop_at(share: float) -> Any:
    def watch(event: Event) -> None:
        if event.stage == "blocks" and event.done >= share:
            raise Stop

    return watch


@pytest.mark.parametrize("recipe", RECIPE_CASES)
@pytest.mark.parametrize("family", ["llama-biased", "opt-350m"])
def test_resume_gives_the_same_bytes(family: str, recipe: str, tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, family, seed, num_hidden_layers=3)
    settings = dataclasses.replace(settings, recipe=recipe)
    whole, out = tmp_path / "whole.billm", tmp_path / "out.billm"
    convert(folder, whole, settings)
    resume = dataclasses.replace(settings, resume=True)
    with pytest.raises(Stop):
        convert(folder, out, settings, stop_at(0.3))
    with pytest.raises(Stop):
        convert(folder, out, resume, stop_at(1.95))  # a block is stored, and the text not yet behind it
    assert not out.exists()
    report = convert(folder, out, resume)
    assert report.resumed_blocks == 2
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.billm.work").exists()
    again = convert(folder, out, resume)  # nothing left to do
    assert again.file_bytes == report.file_bytes


@pytest.mark.parametrize("removed", ["nothing", "state", "state and a block"])
def test_killed_between_the_rename_and_the_cleaning_up(
    removed: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out, work = tmp_path / "out.billm", tmp_path / "out.billm.work"

    def remove(self: WorkFolder) -> None:
        if removed != "nothing":
            (work / "state.json").unlink()
        if removed == "state and a block":
            (work / "block-00000.safetensors").unlink()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", remove)
        patch.setattr(WorkFolder, "close", lambda self: os.close(self._lock))
        with pytest.raises(Stop):
            convert(folder, out, settings)
    whole = out.read_bytes()
    report = convert(folder, out, dataclasses.replace(settings, resume=True))
    assert out.read_bytes() == whole
    assert len(report.layers) == 14
    assert not work.exists()
    with pytest.raises(UsageError, match="exists already"):  # another conversion's file is not taken for this one's
        convert(folder, out, dataclasses.replace(settings, resume=True, damp=0.5))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    (tmp_path / "out.billm.work").mkdir()
    (tmp_path / "out.billm.work" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"not billm-convert's \(thesis\.txt\)"):
        convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, force=True))
    assert (tmp_path / "out.billm.work" / "thesis.txt").read_text() == "years"


def test_unfinished_work_is_never_silently_reused(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out = tmp_path / "out.billm"
    with pytest.raises(Stop):
        convert(folder, out, settings, stop_at(1.1))
    with pytest.raises(UsageError, match=r"1 of 2 blocks.*--resume.*--force"):
        convert(folder, out, settings)
    changed = dataclasses.replace(settings, damp=0.02, resume=True)
    with pytest.raises(UsageError, match=r"--damp was 0.01 and is 0.02 now"):
        convert(folder, out, changed)
    write_text(Path(str(settings.calib)), seed + 1)
    with pytest.raises(UsageError, match="calibration text"):
        convert(folder, out, dataclasses.replace(settings, resume=True))
    os.utime(folder / "model.safetensors", (1, 1))
    write_text(Path(str(settings.calib)), seed)
    with pytest.raises(UsageError, match="the model's files have changed"):
        convert(folder, out, dataclasses.replace(settings, resume=True))
    convert(folder, out, dataclasses.replace(settings, force=True))
    assert out.exists()


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out = tmp_path / "out.billm"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already: pass --force"):
        convert(folder, out, settings)
    assert out.read_bytes() == b"mine"
    assert not (tmp_path / "out.billm.work").exists()
    with pytest.raises(Stop):
        convert(folder, out, dataclasses.replace(settings, force=True), stop_at(1.1))
    assert out.read_bytes() == b"mine"  # until the new one is whole
    convert(folder, out, dataclasses.replace(settings, resume=True))
    assert out.read_bytes()[8:9] == b"{"


def test_two_runs_do_not_share_a_work_folder(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    refused: list[str] = []

    def second(event: Event) -> None:
        if event.stage == "blocks" and not refused:
            with pytest.raises(UsageError, match="another billm-convert is at work") as caught:
                convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, resume=True))
            refused.append(str(caught.value))

    convert(folder, tmp_path / "out.billm", settings, second)
    assert refused


def forked(run: Callable[[], int], stderr: int | None = None) -> int:
    """Run in a child process, its stderr to a descriptor; return its id. Starting torch anew would take seconds."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(stderr if stderr is not None else os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os._exit(run())
    finally:
        os._exit(99)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(tmp_path: Path, rng: random.Random, kills: int, start: Callable[[Path], int], pace: float) -> None:
    """Kill a conversion, begun by `start`, at random moments of its work; then let it finish, and compare the bytes."""
    whole, out, work = (tmp_path / name for name in ("whole.billm", "out.billm", "out.billm.work"))
    assert status(start(whole)) == 0
    killed_in_work = 0
    for _ in range(kills):
        child = start(out)
        while not work.exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, pace))
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            killed_in_work += status(child) == -signal.SIGKILL
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            if not work.exists():
                out.unlink()  # it was through: again from the start
    assert status(start(out)) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("out.billm?*"))  # no leftovers
    print(f"{killed_in_work} of {kills} kills hit the work")
    assert killed_in_work > 0


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_then_resumed(kills: int, tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama-tied-gqa", seed, num_hidden_layers=6)
    resume = dataclasses.replace(settings, resume=True)

    def start(out: Path) -> int:
        return forked(lambda: int(not convert(folder, out, resume).file_bytes))

    kill_and_resume(tmp_path, random.Random(seed), kills, start, pace=0.5)


@pytest.mark.slow
def test_command_killed_at_random_moments_then_resumed(tmp_path: Path, seed: int) -> None:
    """The same through the command itself, each run a fresh interpreter."""
    folder, settings = small(tmp_path, "qwen2", seed, num_hidden_layers=40)
    options = ["--calib", str(settings.calib), "--seed", str(settings.seed), "-t", "1", "--quiet", "--resume"]
    for name, value in SIZES.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "format", "converter"))

    def start(out: Path) -> int:
        command = [sys.executable, "-m", "billm_convert.cli", str(folder), str(out), *options]
        return os.posix_spawn(sys.executable, command, os.environ | {"PYTHONPATH": paths})

    kill_and_resume(tmp_path, random.Random(seed), 20, start, pace=3.0)


@pytest.mark.parametrize(
    ("moment", "calib", "said"),
    [
        ("block 2/", None, r"interrupted; finished blocks are kept in .* with --resume to go on"),
        ("the model writes", "self", r"interrupted\n$"),
    ],
)
def test_ctrl_c_says_how_to_go_on(moment: str, calib: str | None, said: str, tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed, num_hidden_layers=30)
    out = tmp_path / "out.billm"
    read, write = os.pipe()
    argv = [str(folder), str(out), "--calib", calib or str(settings.calib), "--nsamples", "3", "--seqlen", "24"]

    def start() -> int:
        # A test run in the background inherits Ctrl-C as ignored; a person's shell would not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(argv)

    child = forked(start, write)
    os.close(write)
    with os.fdopen(read) as stderr:
        for line in stderr:
            if line.startswith(moment):
                os.kill(child, signal.SIGINT)
                break
        rest = stderr.read()
    assert status(child) == 130
    assert re.search(said, rest)
    assert "Traceback" not in rest
    assert not out.exists()
    assert (tmp_path / "out.billm.work").is_dir() == ("kept" in said)


def test_disk_that_is_too_small_is_refused_with_the_sum(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(DoesNotFitError, match=r"needs \d+ MB of disk .* 1 MB are free"):
        convert(folder, tmp_path / "out.billm", settings)
    assert not (tmp_path / "out.billm").exists()


def test_disk_that_fills_up_keeps_finished_blocks(tmp_path: Path, seed: int) -> None:
    """A limit on the size of files stands for a full disk: a write fails half way."""
    folder, settings = small(tmp_path, "llama", seed)
    out, work = tmp_path / "out.billm", tmp_path / "out.billm.work"
    convert(folder, tmp_path / "whole.billm", settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink(event: Event) -> None:
        if event.stage == "blocks" and event.done > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))

    try:
        with pytest.raises(DoesNotFitError, match=r"while writing [\d,]+ bytes; 1 finished blocks are kept.*--resume"):
            convert(folder, out, settings, shrink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    assert sorted(file.name for file in work.glob("block*")) == ["block-00000.safetensors"]
    convert(folder, out, dataclasses.replace(settings, resume=True))
    assert out.read_bytes() == (tmp_path / "whole.billm").read_bytes()


def test_a_device_that_is_full_is_one_sentence_and_loses_nothing(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = small(tmp_path, "llama-tied-gqa", seed)
    out = tmp_path / "out.billm"
    convert(folder, tmp_path / "whole.billm", settings)
    argv = [str(folder), str(out), "--recipe", "paper", "--calib", str(settings.calib), "--seed", str(settings.seed)]
    argv += [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "advance", full)
        assert main([*argv, "--quiet"]) == EXIT_DOES_NOT_FIT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ran out of memory while binarizing; 1 of 2 blocks are finished and kept: make room" in error
    assert "--resume" in error
    assert main([*argv, "--quiet", "--resume"]) == 0
    assert out.read_bytes() == (tmp_path / "whole.billm").read_bytes()


def test_too_little_memory_is_refused_with_the_sum(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    with pytest.raises(DoesNotFitError, match=r"GB of memory \(hidden states [\d.]+ \+ .*--nsamples"):
        convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, nsamples=10**9))
