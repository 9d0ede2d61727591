"""The bench of conversions, as far as no GPU is needed: a tiny shape on the CPU."""

import json

import pytest

pytest.importorskip("torch", reason="needs torch (pip install billm-rt[convert])")
pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")

from bench import gpu_convert

SMALL = ["--shape", "tiny", "--layers", "3", "--nsamples", "2", "--seqlen", "24"]


def test_figures_and_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_convert.main([*SMALL, "--device", "cpu", "--json", "--quiet"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["recipe"] for line in lines] == ["paper", "refined"]
    for line in lines:
        assert line["whole_model_seconds"] == pytest.approx(line["first_block_seconds"] + line["block_seconds"])
        assert line["device_peak_bytes"] is None
        assert f"tiny, {line['recipe']}, cpu" in gpu_convert._line(line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--layers", "1"], "--layers: wanted 2 or more"), (["--device", "cuda:9"], "--device cuda:9: ")],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_convert.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
