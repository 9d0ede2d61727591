"""billm-eval from its arguments to what it prints, on tiny random models."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval.raw_rows import RAW

from billm_rt import eval_cli
from billm_rt.eval_tasks import TASKS


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The items are the two of RAW."""

    def load_dataset(path: str, name: str | None = None, split: str = "") -> Any:
        return iter(RAW[path, name])

    monkeypatch.delenv("BILLM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()  # what fixtures printed
    code = eval_cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(value, dict)
    return value


def test_a_file_and_its_dequantized_model_score_alike(
    twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = twins
    names = ",".join(TASKS)
    ours = report(capsys, path, "--tasks", names, "--exact")
    theirs = report(capsys, folder, "--tasks", names)
    assert (ours["schema"], ours["version"]) == ("billm-eval", 1)
    assert list(ours["tasks"]) == list(TASKS)
    for name, score in ours["tasks"].items():
        other = theirs["tasks"][name]
        assert score["items"] == 2
        assert (score["acc_norm"] is None) == ("acc_norm" not in TASKS[name].metrics)
        for key in ("acc", "acc_stderr", "acc_norm", "chance"):
            assert score[key] == other[key], (name, key)
    found, wanted = ours["tasks"]["lambada"], theirs["tasks"]["lambada"]
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-3)
    assert (ours["activations"], theirs["activations"], theirs["isa"]) == ("float32", "float32", "torch")


def test_one_item_has_no_standard_error(twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, twins[0], "--tasks", "piqa,piqa", "--limit", "1")
    assert list(found["tasks"]) == ["piqa"]
    assert (found["limit"], found["tasks"]["piqa"]["items"]) == (1, 1)
    assert found["tasks"]["piqa"]["acc_stderr"] is None


def test_the_table(twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_cli.main([str(twins[0]), "--tasks", "boolq,hellaswag,lambada"]) == 0
    out, err = capsys.readouterr()
    assert "zero-shot; ran on cpu" in out
    assert "perplexity of the last word" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["boolq", "hellaswag", "lambada", "mean"]
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poker"], "found 'poker'"),
        (["--limit", "0"], "--limit: wanted at least 1"),
        (["--threads", "-1"], "--threads: wanted at least 1"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_cli.main(["nowhere.billm", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_full_precision_model_runs_where_it_was_asked_to(
    twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: {"cuda:1": (1000, 2000)}[place])
    for device, code, message in (
        ("tpu", 2, "--device tpu: wanted auto, cpu, cuda or cuda:N"),
        ("cuda:2", 2, "which runs the full-precision model, sees 2 CUDA devices, counted from 0; use --device cpu"),
        ("cuda:1", 4, "0.0 GB of memory on cuda:1 are free"),
    ):
        assert eval_cli.main([str(twins[1]), "--tasks", "piqa", "--device", device]) == code
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_missing_file_and_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_cli.main([str(tmp_path / "none.billm"), "--tasks", "piqa"]) == 2
    assert "no such file" in capsys.readouterr().err
    pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")
    assert eval_cli.main([str(tmp_path), "--tasks", "piqa"]) == 2
    err = capsys.readouterr().err
    assert "transformers cannot load it" in err
    assert "--against" not in err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, billm_rt.eval_cli as c\nc.build_parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'rich', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
