"""bench/quality.py on a tiny model: right figures, nothing measured twice, tables."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from eval.raw_rows import RAW

torch = pytest.importorskip("torch", reason="needs torch (pip install billm-rt[convert])")

ROOT = Path(__file__).parents[2]
METHODS = ["paper", "rtn-3", "pb-llm"]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality", ROOT / "bench" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def argv(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from convert.hf_models import save_model, write_text

    def load_dataset(path: str, name: str | None = None, split: str = "") -> Any:
        return iter(RAW[path, name])

    monkeypatch.delenv("BILLM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    save_model(tmp_path / "model", "llama-tied-gqa", seed)
    text = str(write_text(tmp_path / "text.txt", seed))
    sizes = ["--nsamples", "2", "--calib-seqlen", "24", "--seqlen", "32", "--windows", "3", "--block-sizes", "32", "64"]
    common = ["--data", text, "--calib", text, *sizes, "--quiet", "--tasks", "piqa", "lambada"]
    return [str(tmp_path / "model"), str(tmp_path / "out"), "--methods", *METHODS, *common]


def report(quality: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, int], Any]:
    capsys.readouterr()
    assert quality.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {(record["method"], record["block_size"] or 0): record for record in found["methods"]}


def test_figures_and_tables(
    quality: ModuleType, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from billm_convert.source import open_model
    from billm_format.reader import BillmFile

    found = report(quality, argv, capsys)
    blocks = [(method, size) for method in ("paper", "rtn-3") for size in (32, 64)]
    assert list(found) == [("full precision", 0), *blocks, ("pb-llm", 0)]
    source = open_model(argv[0])
    ids = source.tokenizer().load(source.config).encode((tmp_path / "text.txt").read_text())
    windows = torch.tensor(ids[: 3 * 32]).view(3, 32)
    model = AutoModelForCausalLM.from_pretrained(argv[0], dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -logits.gather(-1, windows[:, 1:, None]).mean()
    label = "text.txt, 3 x 32"
    figures = found["full precision", 0]["perplexity"][label]
    assert figures["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert found["rtn-3", 32]["perplexity"][label]["perplexity"] != figures["perplexity"]
    with BillmFile.open(tmp_path / "out" / "paper-64.billm") as file:
        assert tuple(found["paper", 64]["bits"].values()) == file.bits()
    assert found["rtn-3", 64]["bits"]["stored"] < found["rtn-3", 32]["bits"]["stored"]
    for record in found.values():
        assert set(record["zeroshot"]) == {"piqa", "lambada"}
    table = (tmp_path / "out" / "quality.md").read_text()
    assert table.count("| rtn-3 | 64 |") == 2
    assert "| method | block | bits, paper's count | bits, all stored | text.txt, 3 x 32 |" in table
    assert not (tmp_path / "out" / "rtn-3-32").exists()  # a rival's model goes when it is measured


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(
    quality: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    real = quality.ppl.measure, quality.evaluate

    def measure(*args: Any) -> Any:
        measured.append("perplexity")
        return real[0](*args)

    def evaluate(*args: Any) -> Any:
        measured.append("zeroshot")
        if len(measured) == 8:
            raise KeyboardInterrupt
        return real[1](*args)

    monkeypatch.setattr(quality.ppl, "measure", measure)
    monkeypatch.setattr(quality, "evaluate", evaluate)
    assert quality.main(argv) == 130
    found = report(quality, argv, capsys)
    assert len(measured) == 6 * 3 + 1  # six entries, a text and two tasks each, one begun twice
    assert report(quality, argv, capsys) == found
    assert len(measured) == 6 * 3 + 1


def test_ablations_and_what_methods_cost(
    quality: ModuleType, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv[argv.index("--methods") + 1 : argv.index("--data")] = ["paper", "rtn-1", "--ablation"]
    found = report(quality, argv, capsys)
    parts = ["paper, salient-only", "paper, splitting-only", "paper, no-compensation"]
    assert list(found)[1:] == [(method, size) for method in ("paper", "rtn-1", *parts) for size in (32, 64)]
    values = {key: record["perplexity"]["text.txt, 3 x 32"]["perplexity"] for key, record in found.items()}
    assert len(set(values.values())) == len(values)
    assert found["paper, splitting-only", 32]["bits"]["paper"] == 1
    assert found["full precision", 0]["cost"] is None
    costs = [record["cost"] for key, record in found.items() if key[1]]
    assert all(cost["cpu_seconds"] > 0 and cost["seconds"] > 0 for cost in costs)
    assert "| paper, salient-only | 64 |" in (tmp_path / "out" / "quality.md").read_text()
    assert {key: record["cost"] for key, record in report(quality, argv, capsys).items()} == {
        key: record["cost"] for key, record in found.items()
    }


def test_figures_of_other_settings_are_not_mixed(
    quality: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv[argv.index("--methods") + 1 : argv.index("--data")] = ["rtn-3"]
    assert quality.main(argv) == 0
    assert quality.main([*argv, "--seed", "7"]) == 2
    assert "holds figures for seed 0, not 7: name another folder" in capsys.readouterr().err
    assert quality.main([*argv, "--target-bits", "2.9"]) == 2
    assert "holds figures for target_bits None, not 2.9" in capsys.readouterr().err
    more = report(quality, [*argv, "--limit", "1"], capsys)
    assert set(more["rtn-3", 32]["zeroshot"]) == {"piqa", "lambada", "piqa, first 1", "lambada, first 1"}


def test_two_runs_do_not_share_a_folder(
    quality: ModuleType, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with quality._alone(tmp_path / "out"):
        assert quality.main(argv) == 2
    assert "another run is at work in" in capsys.readouterr().err


def test_target_bits_are_for_our_recipes(
    quality: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv[argv.index("--methods") + 1 : argv.index("--data")] = ["paper", "rtn-3"]
    found = report(quality, argv, capsys)
    target = (found["paper", 64]["bits"]["stored"] + found["paper", 32]["bits"]["stored"]) / 2
    argv[1] += "-target"
    aimed = report(quality, [*argv, "--block-sizes", "64", "--target-bits", str(target)], capsys)
    assert found["paper", 64]["bits"]["stored"] < aimed["paper", 64]["bits"]["stored"] <= target
    assert aimed["rtn-3", 64]["bits"] == found["rtn-3", 64]["bits"]
