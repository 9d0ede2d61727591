"""Training as part of a conversion: it helps, keeps to the format, and goes on after a kill as if nothing had been."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert.hf_models import FAMILIES, save_model, write_text

from billm_convert import ConvertSettings, Event, convert, drawing, settings
from billm_convert.cli import main
from billm_convert.report import tuning_line
from billm_convert.settings import Effort
from billm_convert.stored_block import StoredBlock
from billm_convert.tune_block import Rates, TunedBlock
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.layout import all_tensors
from billm_format.reader import BillmFile

SIZES: dict[str, Any] = {"nsamples": 3, "seqlen": 64, "block_size": 32, "max_salient": 8}


class Stop(BaseException):
    """Stands for a kill: nothing may catch it."""


def small(
    folder: Path, family: str, seed: int, monkeypatch: pytest.MonkeyPatch, effort: Effort, **changes: Any
) -> ConvertSettings:
    """Save a model and a text; return settings that convert and tune it in a blink."""
    save_model(folder / "model", family, seed, **changes)
    text = write_text(folder / "text.txt", seed)
    monkeypatch.setitem(settings.EFFORTS, "fast", effort)
    return ConvertSettings(recipe="tuned", effort="fast", calib=str(text), seed=seed % 1000, **SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_brings_every_family_nearer_to_full_precision(
    family: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(
        tmp_path, family, seed, monkeypatch, Effort(windows=256, block_steps=6, model_steps=80, step_windows=4)
    )
    report = convert(tmp_path / "model", tmp_path / "out.billm", options)
    assert report.tuning is not None
    before, after = report.tuning["kl_before"], report.tuning["kl_after"]
    print(f"{before:.3f} -> {after:.3f}")
    assert after < before  # a little: "refined" leaves less to gain in a tiny random model than in a real one
    with BillmFile.open(tmp_path / "out.billm") as file:
        file.verify()
        assert [info for info in file.tensors if not info.startswith("pad.")] == [
            spec.name for spec in all_tensors(file.config, file.quantization)
        ]
        assert file.conversion["tuning"] == report.tuning


@pytest.mark.parametrize("family", ["opt-350m", "qwen3", "llama-biased"])
def test_begins_at_the_start_to_the_byte(
    family: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without steps the result is what the solver found, whether or not it goes through a model in training."""
    options = small(tmp_path, family, seed, monkeypatch, Effort(windows=2, block_steps=0, model_steps=0))
    convert(tmp_path / "model", tmp_path / "tuned.billm", options)
    convert(tmp_path / "model", tmp_path / "start.billm", dataclasses.replace(options, recipe="refined"))
    with BillmFile.open(tmp_path / "tuned.billm") as tuned, BillmFile.open(tmp_path / "start.billm") as start:
        assert tuned.checksums == start.checksums
        config, names = start.config, [name for name in start.tensors if name.startswith("layers.0.")]
        tensors = {name: start.array(name) for name in names}
        first = StoredBlock.of_tensors(config, start.quantization, 0, tensors)
        wanted = {name: value.tobytes() for name, value in tensors.items()}
        for everything in (False, True):
            block = TunedBlock(config, first, None, torch.device("cpu"), torch.float32, everything=everything)
            assert {name: value.tobytes() for name, value in block.result().tensors(0).items()} == wanted


@pytest.mark.parametrize("family", ["opt-350m", "llama-biased"])
def test_the_whole_models_training_leaves_planes_and_scales(
    family: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(
        tmp_path, family, seed, monkeypatch, Effort(windows=256, block_steps=0, model_steps=40, step_windows=4)
    )
    report = convert(tmp_path / "model", tmp_path / "tuned.billm", options)
    assert report.tuning is not None
    assert report.tuning["kl_after"] < report.tuning["kl_before"]
    convert(tmp_path / "model", tmp_path / "start.billm", dataclasses.replace(options, recipe="refined"))
    with BillmFile.open(tmp_path / "tuned.billm") as tuned, BillmFile.open(tmp_path / "start.billm") as start:
        changed = {name for name in start.checksums if tuned.checksums[name] != start.checksums[name]}
    assert any("norm" in name for name in changed)
    assert {name.rpartition(".")[2] for name in changed if "norm" not in name} == {
        "row_scale",
        "col_scale",
        "bias",
    }


def test_blocks_are_trained_in_turn(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every window is read once: twelve windows read twenty times are learnt by heart instead, at one seed in many.
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=240, block_steps=120, model_steps=0))
    report = convert(tmp_path / "model", tmp_path / "out.billm", options)
    assert report.tuning is not None
    before, after = np.mean(report.tuning["block_errors"], axis=0)
    print(f"{before:.4f} -> {after:.4f}")
    assert after < before  # a little: "refined" leaves less to gain in a tiny random model than in a real one
    assert f"mean {before:.4f} -> {after:.4f}" in tuning_line(report.tuning)
    assert report.tuning["kl_before"] == report.tuning["kl_after"]
    convert(tmp_path / "model", tmp_path / "start.billm", dataclasses.replace(options, recipe="refined"))
    with BillmFile.open(tmp_path / "out.billm") as tuned, BillmFile.open(tmp_path / "start.billm") as start:
        for kind in ("sign", "second", "scales", "row_scale", "col_scale"):
            assert (tuned.array(f"layers.0.q_proj.{kind}") != start.array(f"layers.0.q_proj.{kind}")).any(), kind
        assert (tuned.array("layers.0.q_proj.salient") == start.array("layers.0.q_proj.salient")).all()


def test_a_block_that_training_spoils_stays_as_it_was(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from billm_convert import tune_blocks

    monkeypatch.setattr(tune_blocks, "BLOCK_RATES", Rates(latents=1e4, codes=1e4, vectors=0.5))
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=8, block_steps=4, model_steps=0))
    report = convert(tmp_path / "model", tmp_path / "out.billm", options)
    assert report.tuning is not None
    assert all(before == after for before, after in report.tuning["block_errors"])
    convert(tmp_path / "model", tmp_path / "start.billm", dataclasses.replace(options, recipe="refined"))
    with BillmFile.open(tmp_path / "out.billm") as tuned, BillmFile.open(tmp_path / "start.billm") as start:
        assert tuned.checksums == start.checksums


def test_texts_are_mixed_in_equal_shares(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both what a solver reads and what is trained on."""
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=5, block_steps=0, model_steps=2))
    convert(tmp_path / "model", tmp_path / "one.billm", options)
    mixed = dataclasses.replace(options, calib=f"{options.calib},self")
    report = convert(tmp_path / "model", tmp_path / "two.billm", mixed)
    assert report.calibration["name"] == "text.txt + text sampled from the full-precision model"
    assert report.settings["calib"] == "text.txt,self"
    assert report.calibration["tokens"] == SIZES["nsamples"] * SIZES["seqlen"]
    assert report.tuning is not None
    assert report.tuning["windows"] == 5
    with BillmFile.open(tmp_path / "one.billm") as one, BillmFile.open(tmp_path / "two.billm") as two:
        assert one.checksums != two.checksums


@pytest.mark.parametrize("family", ["llama-biased", "opt"])
def test_resume_gives_the_same_bytes(family: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from billm_convert import tune

    monkeypatch.setattr(tune, "_SAVE_EVERY", 3)
    options = small(tmp_path, family, seed, monkeypatch, Effort(windows=5, block_steps=3, model_steps=8))
    whole, out = tmp_path / "whole.billm", tmp_path / "out.billm"
    convert(tmp_path / "model", whole, options)
    resume = dataclasses.replace(options, resume=True)
    for stage, done in [
        ("blocks", 0.5),
        ("blocks", 1.1),
        ("blocks", 1.9),  # the last block is stored, and what full precision makes of the text is not
        ("tuning model", 2),
        ("tuning model", 7),
        ("writing", 1),
    ]:

        def watch(event: Event, stage: str = stage, done: float = done) -> None:
            if event.stage == stage and event.done >= done:
                raise Stop

        with pytest.raises(Stop):
            convert(tmp_path / "model", out, resume, watch)
    convert(tmp_path / "model", out, resume)
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.billm.work").exists()


def test_too_little_memory_is_refused_before_the_work_begins(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=10**8, block_steps=0, model_steps=1))
    with pytest.raises(
        DoesNotFitError, match=r"training weights [\d.]+ \+ .*training text [\d.]+\).*give .*, --effort fast, or"
    ):
        convert(tmp_path / "model", tmp_path / "out.billm", options)
    assert not (tmp_path / "out.billm.work").exists()  # the next attempt begins as the first did


def test_room_for_writing_text_to_train_on_is_checked_before_the_work_begins(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=50, block_steps=0, model_steps=1))
    asked: list[int] = []

    def sampling_memory(source: object, windows: int, *rest: object) -> dict[str, int]:
        asked.append(windows)
        if windows == 50:
            raise DoesNotFitError("no room")
        return {"weights": 1}

    monkeypatch.setattr(drawing, "sampling_memory", sampling_memory)
    with pytest.raises(DoesNotFitError, match="no room"):
        convert(tmp_path / "model", tmp_path / "out.billm", dataclasses.replace(options, calib="self"))
    assert asked == [SIZES["nsamples"], 50]


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(UsageError, match="--effort: wanted one of fast, normal, max, found 'huge'"):
        ConvertSettings(effort="huge")


def test_the_command_shows_progress_and_the_outcome(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=4, block_steps=2, model_steps=20))
    argv = [str(tmp_path / "model"), str(tmp_path / "out.billm"), "--recipe", "tuned", "--effort", "fast"]
    argv += ["--calib", str(options.calib), "--nsamples", "3", "--seqlen", "24", "--block-size", "32"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "tuned for 2 steps a block (held-out error, mean " in shown.out
    assert "), 20 of the whole model (held-out KL" in shown.out
    assert shown.err.count("tuning the model: KL ") == 4
    assert re.search(r"^block 2/2: .* left, then the whole model is tuned$", shown.err, re.MULTILINE)
    assert re.search(r"^tuning the model: .* left$", shown.err, re.MULTILINE)


def test_a_training_that_fails_says_so(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from billm_convert import tune

    options = small(tmp_path, "llama", seed, monkeypatch, Effort(windows=4, block_steps=0, model_steps=9))
    monkeypatch.setattr(tune, "MODEL_RATES", Rates(vectors=math.inf))
    with pytest.raises(UsageError, match="training failed at step 1: the loss is not finite"):
        convert(tmp_path / "model", tmp_path / "out.billm", options)
    assert not (tmp_path / "out.billm").exists()
