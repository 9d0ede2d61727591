"""The command: options, exit codes, JSON, and a `--help` that costs nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from convert.hf_models import save_model, write_text

from billm_convert.binarizing import Binarizing
from billm_convert.cli import build_parser, main
from billm_convert.embedding import quantize_rows
from billm_convert.report import Display
from billm_convert.resources import choose_device
from billm_convert.settings import Event
from billm_format.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def argv(tmp_path: Path, seed: int) -> list[str]:
    save_model(tmp_path / "model", "llama-tied-gqa", seed)
    text = write_text(tmp_path / "text.txt", seed)
    sizes = ["--calib", str(text), "--nsamples", "2", "--seqlen", "20", "--block-size", "32", "--max-salient", "6"]
    return [str(tmp_path / "model"), str(tmp_path / "out.billm"), *sizes]


def test_json_and_report(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--json", "--report", str(tmp_path / "r.json")]) == 0
    captured = capsys.readouterr()
    out = json.loads(captured.out)
    assert (out["schema"], out["version"]) == ("billm-convert", 1)
    assert out["seconds"] > 0
    assert out["peak_bytes"] > 1e6
    assert out["bits"]["true"] > out["bits"]["paper"] >= 1
    assert len(out["layers"]) == 14
    assert set(out["layers"][0]) >= {"name", "error", "salient", "sparse"}
    assert json.loads((tmp_path / "r.json").read_text()) == out
    assert "block 1/2: error" in captured.err


def test_quiet_prints_results_only(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "bits per weight as the paper counts" in captured.out
    assert "true" in captured.out


def test_ctrl_c_before_the_first_block_keeps_the_text(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Binarizing, "run", interrupt)
        assert main(argv) == 130
    said = "interrupted before the first block was finished; run the same command with --resume to go on"
    assert said in capsys.readouterr().err
    assert list((tmp_path / "out.billm.work").glob("tokens*"))
    assert main([*argv, "--resume"]) == 0
    assert "going on after 0 of 2 blocks" in capsys.readouterr().err


def test_table_has_every_linear(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    for heading in ("q", "k", "v", "o", "gate", "up", "down", "salient", "sparse"):
        assert heading in out
    assert "peak memory" in out


def test_a_long_stage_tells_its_tenths_where_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=False) as display:
        for done in range(1, 41):
            display.show(Event("sampling", done, 40))
        for done in (1, 25):
            display.show(Event("sampling", done, 100))
        display.show(Event("writing", 5, 10))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *(f"sampling text: {tenths}0 %" for tenths in range(1, 11)),
        "sampling text: 20 %",
    ]
    assert all(line.endswith(" left") for line in lines)
    with Display(quiet=True) as display:
        display.show(Event("sampling", 20, 40))
    assert capsys.readouterr().err == ""


def test_choices_are_said_aloud(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    del argv[argv.index("--nsamples") : argv.index("--block-size")]
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "calibrating on 32 windows of 1,024 tokens (the paper has 128 x 2,048" in err
    assert "windows cut to 128 tokens: that is the model's whole context" in err


def test_errors_are_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, message in [
        (["--damp", "7"], "--damp: wanted a share"),
        (["--max-salient", "33"], "--max-salient: wanted 0 to the block size 32"),
        (["--nsamples", "0"], "--nsamples: wanted 1 or more, found 0"),
        (["--resume", "--force"], "give one of them"),
        (["--calib", "nothing.txt"], "no such text file"),
        (["--report", str(tmp_path / "no" / "r.json")], "there is no folder"),
        (["--device", "tpu"], "wanted auto, cpu, cuda or cuda:N"),
    ]:
        assert main([*argv, *extra]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1, err
    assert main([argv[0], str(tmp_path), *argv[2:]]) == 2
    assert "is a folder; give the name of the file" in capsys.readouterr().err
    assert main([argv[0], str(tmp_path / "no" / "x.billm"), *argv[2:]]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_words_of_the_authors_code() -> None:
    args = build_parser().parse_args(["m", "o", "--percdamp", "0.05", "--blocksize", "64"])
    assert (args.damp, args.block_size) == (0.05, 64)
    assert "percdamp" not in build_parser().format_help()


def test_help_is_light() -> None:
    code = "import sys; from billm_convert.cli import build_parser; build_parser().format_help(); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "format", "converter"))
    best = 9.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        )
        best = min(best, time.monotonic() - began)
        assert done.stdout.strip() == "[]"
    print(f"best of 3: {best:.3f} s")
    assert best < 1.0  # 0.1 s when the machine is idle


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for wrong in ("tpu", "cuda:x", "cuda:", "gpu"):
        with pytest.raises(UsageError, match="--device"):
            choose_device(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device here; use --device cpu"):
            choose_device("cuda")


def test_rows_quantize_within_half_a_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(300, 40, generator=generator) * torch.logspace(-9, 4, 300)[:, None]
    value[17] = 0
    codes, scale = quantize_rows(value)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max() <= 127
    step = scale.astype(np.float32)[:, None]
    assert (np.abs(codes * step - value.numpy()) <= 0.5001 * step).all()
    normal = value.abs().amax(dim=1).numpy() > 127 * 2.0**-13  # below, float16's own steps are coarse
    assert (np.abs(codes).max(axis=1)[normal] == 127).all()
