"""The quality gate: its figures are billm-ppl's, a collapse is said, a bound that is missed is exit code 5."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.hf_models import FAMILIES, save_model, write_text

from billm_convert import CheckReport, ConvertSettings, convert, gate
from billm_convert.cli import main
from billm_convert.source import open_model
from billm_format.errors import CorruptFileError, UsageError
from billm_rt import against, ppl, ppl_cli, texts

SIZES: dict[str, Any] = {"nsamples": 2, "seqlen": 20, "block_size": 32, "max_salient": 6}


@pytest.fixture
def argv(tmp_path: Path, seed: int) -> list[str]:
    save_model(tmp_path / "model", "llama-tied-gqa", seed)
    text = write_text(tmp_path / "text.txt", seed)
    sizes = ["--calib", str(text), "--nsamples", "2", "--seqlen", "20", "--block-size", "32", "--max-salient", "6"]
    return [str(tmp_path / "model"), str(tmp_path / "out.billm"), *sizes]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_original_scores_as_transformers_does(family: str, tmp_path: Path, seed: int) -> None:
    model = save_model(tmp_path / "model", family, seed).float().eval()
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(model.config.vocab_size, (30,), generator=generator).numpy() for _ in range(3)]
    scorer = gate.streamed_reference(open_model(tmp_path / "model"), parts, torch.device("cpu")).scorer
    for part in (parts[2], parts[0], parts[1]):
        for first in (1, 16):
            found = torch.cat([torch.from_numpy(chunk.copy()) for chunk in scorer(part, first)])
            with torch.inference_mode():
                wanted = model(torch.from_numpy(part)[None]).logits[0, first - 1 : -1]
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-3)


def test_the_figures_are_those_of_billm_ppl(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert found["text"] == texts.load("pydoc", "test").name
    assert (found["windows"], found["seqlen"]) == (4, 128)  # the model's whole context
    options = ["--data", "pydoc", "--seqlen", "128", "--windows", "4", "--against", argv[0], "--no-kl"]
    assert ppl_cli.main([argv[1], *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(report["perplexity"], rel=1e-9)
    assert found["original"] == pytest.approx(report["against"]["perplexity"], rel=1e-4)
    assert found["ratio"] == pytest.approx(report["ratio"], rel=1e-4)
    assert found["collapsed"] == (found["ratio"] > 10)


def test_the_file_is_checked_where_the_runtime_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, wanted in ((None, "cuda:1"), ("CuPy is not installed", "cpu")):
        monkeypatch.setattr(gate, "unavailable_reason", lambda index, reason=reason: reason if index == 1 else "other")
        assert gate._runtime_device(torch.device("cuda", 1)) == wanted
    assert gate._runtime_device(torch.device("cpu")) == "cpu"


def test_a_missed_bound_is_exit_code_5_and_the_file_stays(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--quiet", "--max-ppl-ratio", "1e-6", "--report", str(tmp_path / "r.json")]) == 5
    out, err = capsys.readouterr()
    assert "more than --max-ppl-ratio 1e-06; the file was written all the same" in err
    assert err.count("\n") == 1
    assert "perplexity" in out
    assert Path(argv[1]).exists()
    assert json.loads((tmp_path / "r.json").read_text())["check"]["ratio"] > 1e-6
    assert main([*argv, "--quiet", "--resume", "--max-ppl-ratio", "1e9"]) == 0  # checked again, not converted again


def test_no_check_leaves_it_out(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--no-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"] is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-ppl-ratio", "0"], "--max-ppl-ratio: wanted a number above 0"),
        (["--max-ppl-ratio", "nan"], "--max-ppl-ratio: wanted a number above 0"),
        (["--max-ppl-ratio", "3", "--no-check"], "give one of them"),
    ],
)
def test_bounds_without_meaning(
    argv: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not Path(argv[1]).exists()


def checked(monkeypatch: pytest.MonkeyPatch, argv: list[str], perplexity: float, original: float) -> None:
    """Let both measurements come out as given."""
    results = iter([perplexity, original])

    def measure(*args: Any) -> ppl.Result:
        value = next(results)
        return ppl.Result(value, math.nan, math.nan, math.nan, 1, 1, 1.0, 1.0)

    monkeypatch.setattr(ppl, "measure", measure)
    monkeypatch.setattr(against, "measure", measure)


@pytest.mark.parametrize(
    ("perplexity", "collapsed"), [(299.0, False), (301.0, True), (math.inf, True), (math.nan, True)]
)
def test_a_collapse_is_said_with_the_next_step(
    argv: list[str],
    perplexity: float,
    collapsed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checked(monkeypatch, argv, perplexity, 30.0)
    assert main([*argv, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert ("the model has collapsed" in out) == collapsed
    assert ("--nsamples" in out) == collapsed
    checked(monkeypatch, argv, perplexity, 30.0)
    assert main([*argv, "--force", "--json", "--max-ppl-ratio", "1000"]) == (0 if math.isfinite(perplexity) else 5)
    captured = capsys.readouterr()
    found = json.loads(captured.out)["check"]
    assert found["collapsed"] == collapsed
    assert found["perplexity"] == (perplexity if math.isfinite(perplexity) else None)
    assert ("the model has collapsed" in captured.err) == collapsed


def test_the_advice_names_a_smaller_block_only_where_there_is_one() -> None:
    assert "--block-size 64" in gate._advice(ConvertSettings(block_size=128))
    assert "--block-size" not in gate._advice(ConvertSettings(block_size=32))


def test_held_out_text_is_of_the_same_kind_and_never_the_calibrations(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILLM_DATA", str(data_dir))
    assert gate.held_out_text(["wikitext2"]).name == "WikiText-2 test"
    assert gate.held_out_text(["c4", "wikitext2"]).name.startswith("C4 validation")
    assert gate.held_out_text(["openwebtext", "self", "c4"]).name.startswith("C4 validation")
    for choice in ("pydoc", "openwebtext", "self", "some/notes.txt"):
        assert "unseen fifth" in gate.held_out_text([choice]).name


def test_without_any_text_the_conversion_goes_on_unless_a_bound_was_given(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> texts.Text:
        raise UsageError("no text at all")

    save_model(tmp_path / "model", "llama", seed)
    settings = ConvertSettings(calib=str(write_text(tmp_path / "text.txt", seed)), **SIZES)
    monkeypatch.setattr(gate, "held_out_text", missing)
    said: list[str] = []
    report = convert(tmp_path / "model", tmp_path / "a.billm", settings, lambda event: said.append(event.text))
    assert report.check is None
    assert "the result will not be checked against the original: no text at all" in said
    with pytest.raises(UsageError, match="no text at all"):
        convert(tmp_path / "model", tmp_path / "b.billm", dataclasses.replace(settings, max_ppl_ratio=3.0))


def test_logits_that_are_not_finite_are_no_perplexity(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that overflows in the file's model is found by the check, and the message says where to look."""
    model = save_model(tmp_path / "model", "llama", seed)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    settings = ConvertSettings(calib=str(write_text(tmp_path / "text.txt", seed)), **SIZES)
    with pytest.raises(CorruptFileError, match="are not finite numbers"):
        convert(tmp_path / "model", tmp_path / "out.billm", settings)


def test_a_report_without_a_finite_ratio_is_json() -> None:
    record = CheckReport("t", 1, 4, math.inf, 3.0, math.inf, True, "x", 1.0).to_json()
    assert json.loads(json.dumps(record, allow_nan=False))["ratio"] is None
