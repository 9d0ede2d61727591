"""billm-ppl from its arguments to what it prints, on tiny random files."""

import dataclasses
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import make_random_billm, tiny_config

from billm_format.config import Quantization
from billm_format.reader import BillmFile
from billm_rt import ppl, ppl_cli

ROOT = Path(__file__).parents[2]
PROSE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose context is 128 tokens; its final norm is small, so that its perplexity is an ordinary number."""
    path = tmp_path_factory.mktemp("ppl") / "tiny.billm"
    norm = np.full(tiny_config().hidden_size, 0.05, np.float32)
    make_random_billm(path, seed=3, tensors={"final_norm.weight": norm})
    return path


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture
def tokenized_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for the tokenizer: faster, and what it does is the same."""
    monkeypatch.setattr(ppl_cli, "_tokenize_apart", ppl_cli.tokenize)


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "format"))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "billm_rt.ppl_cli", *map(str, arguments)]


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()  # what fixtures printed
    code = ppl_cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert len(out.splitlines()) == 1
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(value, dict)
    return value


def test_json_holds_the_promised_keys_and_right_values(
    model: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    found = report(capsys, model, "--data", prose, "--exact", "--seqlen", "100")
    assert (found["schema"], found["version"]) == ("billm-ppl", 1)
    with BillmFile.open(model) as file:
        assert (found["bits"]["paper"], found["bits"]["true"]) == file.bits()
        assert found["file_bytes"] == file.nbytes == model.stat().st_size
        sizes = file.sizes_by_kind()
    weights = found["memory"]["weights"]
    assert weights == {kind: size for kind, size in sizes.items() if kind in weights}
    assert found["memory"]["weights_total"] == sum(weights.values())
    assert {*sizes} - {*weights} == {"tokenizer", "padding", "header"}
    for key in ("kv_cache", "rss", "peak_rss", "rss_before_load"):
        assert found["memory"][key] > 0
    assert found["memory"]["peak_rss"] >= found["memory"]["rss"]
    assert found["tokens"] == found["windows"] * 99
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["stderr"] > 0
    assert found["tokens_per_s"] == pytest.approx(found["windows"] * 99 / found["seconds"])
    assert found["decode_tokens_per_s"] > 0
    assert (found["protocol"], found["data"]["name"], found["isa"]) == ("paper", "prose.txt", "exact")


def test_the_perplexity_is_that_of_the_models_logits(
    model: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    import billm_rt

    found = report(capsys, model, "--data", prose, "--exact", "--seqlen", "60", "--windows", "3")
    nlls = []
    with billm_rt.load(model, exact=True) as loaded:
        ids = loaded.tokenizer.encode(PROSE)
        assert ids[0] == loaded.tokenizer.bos_token_id  # once, in front of the text
        for start in (0, 60, 120):
            logits = loaded.logits(ids[start : start + 60]).astype(np.float64)
            for position in range(1, 60):
                row = logits[position - 1]
                nlls.append(np.log(np.exp(row).sum()) - row[ids[start + position]])
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nlls)), rel=1e-5)


def test_windows_default_to_the_context_and_say_so(
    model: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    assert ppl_cli.main([str(model), "--data", str(prose), "--exact", "--windows", "1000"]) == 0
    out, err = capsys.readouterr()
    assert "windows of 128 tokens, the model's whole context, instead of 2,048" in err
    assert "whole windows of 128 tokens, not 1000" in err
    assert "prose.txt: " in out
    assert ppl_cli.main([str(model), "--data", str(prose), "--exact", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_without_wikitext_pydoc_is_measured_and_named(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    tokenized_here: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BILLM_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert ppl_cli.main([str(model), "--exact", "--windows", "1"]) == 0
    out, err = capsys.readouterr()
    assert "reference prose (pydoc), unseen fifth" in out
    assert "because WikiText-2 test is not at hand" in err


def test_llamacpp_protocol_is_named_and_scores_half(
    model: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    found = report(
        capsys, model, "--data", prose, "--exact", "--protocol", "llamacpp", "--seqlen", "64", "--windows", "3"
    )
    assert found["protocol"] == "llamacpp"
    assert found["tokens"] == 3 * 31


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--seqlen", "129"], 2, "--seqlen 129 exceeds the model's context of 128 tokens"),
        (["--seqlen", "2"], 2, "--seqlen: wanted at least 4"),
        (["--data", "none.txt"], 2, "none.txt: no such text file"),
        (["--kl"], 2, "give the other one with --against"),
        (["--against", "nowhere"], 2, "--against nowhere: no such model directory"),
        (["--device", "cuda"], 2, "--device cuda"),
        (["--threads", "100000"], 2, "--threads"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    model: Path,
    prose: Path,
    capsys: pytest.CaptureFixture[str],
    tokenized_here: None,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert ppl_cli.main([str(model), "--quiet", "--windows", "1", "--data", str(prose), *arguments]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--windows", "0"], ["--threads", "x"], ["--protocol", "mine"]])
def test_the_parser_refuses_what_has_no_meaning(model: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ppl_cli.main([str(model), *arguments])
    assert caught.value.code == 2


def test_missing_damaged_and_short_inputs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    assert ppl_cli.main([str(tmp_path / "none.billm")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "cut.billm").write_bytes(model.read_bytes()[:3000])
    assert ppl_cli.main([str(tmp_path / "cut.billm")]) == 3
    (tmp_path / "short.txt").write_text("ten words")
    assert ppl_cli.main([str(model), "--data", str(tmp_path / "short.txt"), "--quiet"]) == 2
    assert "less than one window of 128" in capsys.readouterr().err


def test_logits_that_are_no_numbers_end_with_exit_code_3(
    tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None
) -> None:
    """Every stored value is finite; only their products are not."""
    path = tmp_path / "bad.billm"
    make_random_billm(path, tensors={"final_norm.weight": np.full(tiny_config().hidden_size, 3e38, np.float32)})
    assert ppl_cli.main([str(path), "--data", str(prose), "--exact", "--json", "--quiet"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "are not finite numbers" in err


def test_a_perplexity_beyond_float64_is_null_in_json(
    model: Path,
    prose: Path,
    capsys: pytest.CaptureFixture[str],
    tokenized_here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ppl.measure
    monkeypatch.setattr(
        ppl, "measure", lambda *args: dataclasses.replace(real(*args), perplexity=math.inf, stderr=math.nan)
    )
    found = report(capsys, model, "--data", prose, "--exact", "--windows", "1")
    assert found["perplexity"] is None
    assert found["stderr"] is None
    assert ppl_cli.main([str(model), "--data", str(prose), "--exact", "--windows", "1"]) == 0
    assert "beyond all bounds ± unknown" in capsys.readouterr().out


def test_a_pipe_gets_plain_text_and_the_tokenizer_a_process_of_its_own(model: Path, prose: Path) -> None:
    done = subprocess.run(
        command(model, "--data", prose, "--exact", "--windows", "2"), capture_output=True, env=environment(), check=True
    )
    assert b"\x1b" not in done.stdout + done.stderr
    assert "perplexity ± std. error" in done.stdout.decode()
    assert "tokenizing the text" in done.stdout.decode()
    assert b"Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(model: Path, prose: Path) -> None:
    process = subprocess.Popen(
        command(model, "--data", prose, "--exact", "--windows", "1", "--quiet"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_terminal_gets_a_table_and_a_progress_bar(model: Path, prose: Path) -> None:
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        command(model, "--data", prose, "--exact"), stdin=inner, stdout=inner, stderr=inner, env=environment()
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # what Linux says at the end
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert "perplexity ± std. error" in text
    assert "protocol paper" in text


def test_help_needs_neither_torch_nor_rich() -> None:
    code = (
        "import sys, billm_rt.ppl_cli as c\n"
        "c.build_parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'rich', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=True)
    assert done.stdout.strip() == b"[]"


def twins(path: Path, seed: int) -> Any:
    """Write a random file at `path` and return Hugging Face's model with its weights; logits are of ordinary size."""
    from runtime.hf_twin import make_twins

    config, quantization = tiny_config(tie_word_embeddings=False), Quantization(block_size=32)
    twin = make_twins(path, config, quantization, seed)
    with BillmFile.open(path) as file:
        norm = file.array("final_norm.weight") * np.float32(0.1)
        changed = {"final_norm.weight": norm, "rope.inv_freq": file.array("rope.inv_freq").copy()}
    make_random_billm(path, config, quantization, seed, tensors=changed)
    twin.model.norm.weight.data *= 0.1
    return twin


def test_against_the_dequantized_model_the_exact_path_agrees_to_a_ten_thousandth(
    tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None, seed: int
) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")
    path, folder = tmp_path / "m.billm", tmp_path / "hf"
    twins(path, seed).save_pretrained(folder)
    common = (path, "--data", prose, "--windows", "4", "--against", folder)
    exact = report(capsys, *common, "--exact")
    assert exact["ratio"] == pytest.approx(1, abs=1e-4)
    assert exact["ratio"] == exact["perplexity"] / exact["against"]["perplexity"]
    assert abs(exact["against"]["kl"]) < 1e-5
    assert exact["against"]["top1"] > 0.99 and exact["against"]["device"] == "cpu"
    assert exact["against"]["tokens"] == exact["tokens"]
    assert exact["against"]["file_bytes"] == (folder / "model.safetensors").stat().st_size
    fast = report(capsys, *common, "--activation-bits", "8", "--no-kl")
    assert fast["ratio"] == pytest.approx(1, abs=2e-2)  # 8-bit activations
    assert fast["against"]["nll"] == pytest.approx(exact["against"]["nll"], rel=1e-6)
    assert "kl" not in fast["against"]
    finer = report(capsys, *common, "--kl")
    assert 0 < finer["against"]["kl"] < 1e-5
    assert finer["against"]["kl_stderr"] > 0
    assert finer["ratio"] == pytest.approx(1, abs=1e-4)
    small = report(capsys, *common, "--kl", "--kv-bits", "8")
    assert finer["against"]["kl"] < small["against"]["kl"] < 1e-3
    assert small["memory"]["kv_cache"] < 0.75 * finer["memory"]["kv_cache"]
    found = exact, fast, finer, small
    assert [report["activations"] for report in found] == ["float32", "int8", "int16", "int16"]
    assert [report["kv_cache_type"] for report in found] == ["float32", "int16", "int16", "int8"]


def test_against_refuses_another_vocabulary_and_folders_without_a_model(
    model: Path, tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None, seed: int
) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install billm-rt[convert])")
    from runtime.hf_twin import make_twins

    folder = tmp_path / "hf"
    make_twins(tmp_path / "m.billm", tiny_config(vocab_size=400), Quantization(block_size=32), seed).save_pretrained(
        folder
    )
    common = [str(model), "--data", str(prose), "--windows", "1", "--quiet", "--against"]
    assert ppl_cli.main([*common, str(folder)]) == 2
    assert "has a vocabulary of 400 tokens, the .billm file one of 320" in capsys.readouterr().err
    assert ppl_cli.main([*common, str(tmp_path)]) == 2
    assert "transformers cannot load it" in capsys.readouterr().err
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    assert ppl_cli.main([*common, str(tmp_path / "broken.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_against_without_torch_names_the_extra_to_install(
    model: Path, prose: Path, capsys: pytest.CaptureFixture[str], tokenized_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert ppl_cli.main([str(model), "--data", str(prose), "--quiet", "--against", str(model.parent)]) == 2
    assert "pip install 'billm-rt[convert]'" in capsys.readouterr().err
