"""The comparison with llama.cpp: its recorded output, the medians, and the whole with a program that repeats it."""

import json
import shlex
from pathlib import Path

import pytest
from random_model import make_random_billm

from bench import vs_llamacpp
from bench.vs_llamacpp import Run, aggregate, parse_billm, parse_llama
from billm_format.errors import UsageError

# What llama-bench (0c1e57098) printed of a 135M model: -p 512 -n 128 -t 1 -r 3 -o json
RECORD = Path(__file__).with_name("llama_bench.json")


def test_recorded_output_is_understood() -> None:
    run = parse_llama(RECORD.read_text(), 91_726_912)
    assert run == Run("smollm2-135m-Q4_0.gguf", 91_726_912, 214.731219, 33.946633, "0c1e57098")


@pytest.mark.parametrize("kept", [slice(1), slice(1, 2), slice(0)])
def test_a_missing_figure_is_an_error(kept: slice) -> None:
    entries = json.loads(RECORD.read_text())
    with pytest.raises(UsageError, match="wanted one figure for the prompt and one for decoding"):
        parse_llama(json.dumps(entries[kept]), 1)


def test_own_output_is_understood() -> None:
    report = {
        "file": "/models/a.billm",
        "file_bytes": 5,
        "prompt_tokens_per_s": 7.5,
        "decode_tokens_per_s": 2.5,
        "isa": "avx2",
    }
    assert parse_billm(json.dumps(report)) == Run("a.billm", 5, 7.5, 2.5, "avx2")


def test_rows_hold_medians_and_their_ratios() -> None:
    def one_round(ours: float, theirs: float, third: float) -> list[Run]:
        return [
            Run("m.billm", 10, 100 * ours, ours, "avx2"),
            Run("b.gguf", 20, 100 * theirs, 2 * theirs, "abc"),
            Run("a.gguf", 30, third, third, "abc"),
        ]

    rows = aggregate(2, [one_round(1, 4, 5), one_round(9, 2, 1000), one_round(3, 1, 10)])
    assert [(row.threads, row.name, row.nbytes) for row in rows] == [
        (2, "m.billm", 10),
        (2, "b.gguf", 20),
        (2, "a.gguf", 30),
    ]
    assert [(row.prompt, row.decode) for row in rows] == [(300, 3), (200, 4), (10, 10)]
    assert [(row.prompt_ratio, row.decode_ratio) for row in rows] == [(1, 1), (1.5, 0.75), (30, 0.3)]


@pytest.mark.parametrize(("load", "warned"), [(0.2, False), (0.7, True)])
def test_a_busy_machine_is_said_to_be_one(load: float, warned: bool) -> None:
    machine = dict.fromkeys(("processor", "cores", "python", "billm_rt", "llama_cpp", "rounds", "prompt", "gen"), 1)
    rows = aggregate(2, [[Run("m.billm", 10, 1, 1, "avx2"), Run("b.gguf", 20, 1, 1, "abc")]])
    assert ("idle machine" in vs_llamacpp.table(machine | {"load": [load, 2.0]}, rows)) == warned


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A model, two stand-ins for GGUF files, and stand-ins for llama-bench: one repeats the record, one fails."""
    make_random_billm(tmp_path / "tiny.billm", seed=3)
    for name in ("one", "two"):
        # The program prints the record under the name of the model that it is given after -m.
        (tmp_path / f"{name}.gguf").write_bytes(bytes(3_000_000))
    record = shlex.quote(str(RECORD))
    scripts = {
        "repeats": f'test "$1 $3 $5 $7 $9" = "-m -p -n -r -t" && sed "s#smollm2-135m-Q4_0.gguf#$2#" {record}',
        "fails": "echo loading >&2; echo model is broken >&2; exit 7",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    names = ("tiny.billm", "one.gguf", "two.gguf", "repeats", "fails", "missing")
    return {name.partition(".")[0]: str(tmp_path / name) for name in names}


SMALL = ("--prompt", "8", "--gen", "4", "--rounds", "2")


def test_the_whole(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    models = (files["tiny"], "--llama-bench", files["repeats"], "--gguf", files["one"], files["two"])
    assert vs_llamacpp.main([*models, *SMALL, "--threads", "1", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = ["tiny.billm", "one.gguf", "two.gguf"]
    assert [(row["threads"], row["name"]) for row in report["rows"]] == [(n, name) for n in (1, 2) for name in names]
    for ours, *others in (report["rows"][:3], report["rows"][3:]):
        assert ours["decode_ratio"] == ours["prompt_ratio"] == 1
        for row in others:
            assert (row["prompt"], row["decode"], row["nbytes"]) == (214.731219, 33.946633, 3_000_000)
            assert row["prompt_ratio"] == pytest.approx(ours["prompt"] / 214.731219)
            assert row["decode_ratio"] == pytest.approx(ours["decode"] / 33.946633)
    assert [[run["name"] for run in one] for one in report["rounds"]["2"]] == [names, names]
    assert report["machine"]["llama_cpp"] == "0c1e57098"

    assert vs_llamacpp.main([*models, *SMALL, "--threads", "1", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    where, _, header, rule, *rows = out.partition("\n\nOther programs")[0].splitlines()
    assert "llama.cpp 0c1e57098" in where and "medians of 2 rounds" in where
    assert "prompt of 8" in header and "decoding 4" in header
    assert {line.count("|") for line in (header, rule, *rows)} == {8} and len(rows) == 3
    assert rows[1].startswith("| 1 | one.gguf | 3.0 | 214.7 | ")


@pytest.mark.parametrize(
    ("program", "gguf", "message"),
    [
        ("missing", "one", "no such file"),
        ("repeats", "missing", "no such file"),
        ("fails", "one", "ended with code 7: model is broken"),
    ],
)
def test_failures_are_one_line(
    program: str, gguf: str, message: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [files["tiny"], "--llama-bench", files[program], "--gguf", files[gguf], *SMALL, "--quiet"]
    assert vs_llamacpp.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
