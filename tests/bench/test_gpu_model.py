"""The bench of whole models, as far as no GPU is needed: on the CPU, beside transformers, and what is missing."""

import json
from typing import Any

import pytest

from bench import gpu_model
from billm_rt.model import load

SMALL = ["--shape", "tiny", "--context", "9", "--gen", "4", "--repeat", "1"]


def test_a_file_of_every_layer_alike(tmp_path: Any) -> None:
    config = gpu_model.SHAPES["tiny"]
    gpu_model.write_random(tmp_path / "m.billm", config)
    with load(tmp_path / "m.billm") as model:
        model.file.verify()
        assert model.config == config
        first, last = (
            model.file.array(f"layers.{layer}.down_proj.sign") for layer in (0, config.num_hidden_layers - 1)
        )
        assert (first == last).all()


def test_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")
    arguments = [*SMALL, "--device", "cpu", "--batch", "1", "3"]
    assert gpu_model.main([*arguments, "--json", "--quiet"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [(line["what"].split(",")[0], line["texts"]) for line in lines] == [
        ("billm-rt", 1), ("billm-rt", 3), ("transformers", 1), ("transformers", 3),
    ]  # fmt: skip
    assert all(line["decode_tokens_per_s"] > 0 and line["prompt_tokens_per_s"] > 0 for line in lines), lines
    row = gpu_model.table(lines).splitlines()[4]
    ratio = lines[0]["decode_tokens_per_s"] / lines[2]["decode_tokens_per_s"]
    assert row.startswith("| tiny | transformers, eager float32 | 1 |") and f"| {ratio:.2f} × |" in row


def test_what_cannot_be_compared_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Missing:
        def __init__(self, *args: Any) -> None:
            raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(gpu_model, "_Twin", Missing)
    assert gpu_model.main([*SMALL, "--device", "cpu", "--batch", "1"]) == 0
    shown = capsys.readouterr()
    assert "| tiny | transformers, eager float32 | 1 | RuntimeError: no compiler here |" in shown.out
    assert "tiny: billm-rt" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:7"], "--device cuda:7: "),
        (["--device", "cpu", "--batch", "0"], "--batch: wanted 1 or more texts"),
        (["--device", "cpu", "--gen", "4090"], "together at most 4,096 tokens"),
        (["--device", "cpu", "--repeat", "0"], "--repeat: wanted 1 or more"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_model.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_model.main([*SMALL, "--batch", "1", "2", "--json", "--quiet"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert len(lines) == 6 and all("decode_tokens_per_s" in line for line in lines[:4]), lines
