"""`billm-info` as people and scripts see it, and what importing the package costs."""

import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import pytest
from forge import Forge
from random_model import make_random_billm
from slow_decoder import SlowFile

from billm_format import BillmFile
from billm_format.info import describe
from billm_format.info_cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_json_has_the_keys_that_scripts_rely_on(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(golden), "--json", "--layers", "--verify"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["version"]) == ("billm-info", 1)
    assert shown["file_bytes"] == golden.stat().st_size == sum(shown["sizes"].values())
    assert 1 < shown["bits"]["paper"] < 2 < shown["bits"]["true"] < shown["bits"]["file"]
    assert shown["verified"] is True
    slow = SlowFile(golden)
    assert {row["name"]: (row["dtype"], row["shape"]) for row in shown["tensors"]} == {
        name: (entry["dtype"], entry["shape"]) for name, entry in slow.entries.items()
    }
    assert shown["config"] == slow.config


def test_fractions_are_those_of_the_planes(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    path = tmp_path / "model.billm"
    make_random_billm(path, seed=seed)
    slow = SlowFile(path)
    with BillmFile.open(path) as file:
        rows = describe(file, layers=True)["linears"]
    for row in rows[5:8]:  # down_proj is among them, whose rows end in unused bits
        linear = slow.linear(row["name"])
        width = len(linear.salient)
        others = [j for j in range(linear.cols) if not linear.salient[j // 8] >> j % 8 & 1]
        flagged = sum(linear.second[r * width + j // 8] >> j % 8 & 1 for r in range(linear.rows) for j in others)
        assert row["salient"] == pytest.approx(1 - len(others) / linear.cols)
        assert row["sparse"] == pytest.approx(flagged / (linear.rows * len(others)))


def test_recorded_errors_are_shown_and_strange_records_do_no_harm(
    victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge = Forge.of(victim)
    good = {"name": "layers.0.q_proj", "error": 0.0312}
    strange = [3, {"name": 4, "error": 1}, {"name": "x"}, {"name": "layers.0.k_proj", "error": 10**400}]
    forge.metadata["conversion"] |= {"layers": [good, *strange], "[red]x": "\x1b[2J[bold]"}
    victim.write_bytes(forge.build())
    assert main([str(victim), "--layers"]) == 0
    out = capsys.readouterr().out
    assert "0.0312" in out and out.count("not recorded") == 13
    assert "\x1b" not in out and "[red]x" in out


def test_parameters_are_counted_as_the_original_model_has_them(vectors: Path) -> None:
    with BillmFile.open(vectors / "opt.billm") as file:
        shown = describe(file)
    linears = 4 * 36 * 36 + 2 * 36 * 40 + 4 * 36 + 40 + 36
    rest = 2 * 24 * 20 + 18 * 36 + 2 * 36 * 20 + 2 * 2 * 36
    assert shown["parameters"] == linears + rest


def test_plain_text_shows_both_bit_widths_and_sizes_that_add_up(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden)]) == 0
    out = capsys.readouterr().out
    with BillmFile.open(golden) as file:
        paper, true = file.bits()
    assert f"{true:.3f}" in out and f"{paper:.3f}" in out
    lines = out.partition("Size:")[2].partition("Conversion:")[0].splitlines()
    columns = [line.split("  ") for line in lines if line.strip()][1:]
    counts = [int(next(cell for cell in row[2:] if cell.strip()).replace(",", "")) for row in columns]
    assert sum(counts[:-1]) == counts[-1] == golden.stat().st_size
    assert "header only" in out


def test_verify_ends_with_exit_code_3_and_names_the_tensor(victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert main([str(victim), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is False
    assert main([str(victim), "--json", "--verify"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("billm-info: ") and captured.err.count("\n") == 1
    assert "1 of 158 tensors" in captured.err and "final_norm" not in captured.err


def test_exit_codes_of_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.billm")]) == 2
    (tmp_path / "empty.billm").touch()
    assert main([str(tmp_path / "empty.billm")]) == 3
    assert capsys.readouterr().err.count("\n") == 2


def test_tables_on_a_terminal(golden: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "format"), "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-m", "billm_format.info_cli", str(golden), "--layers", "--verify"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        out += part
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in out and b"layers.0.q_proj" in out and b"Bits per weight" in out


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, billm_format; print(sorted({'numpy', 'rich', 'json'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "format")}
    done = subprocess.run([sys.executable, "-S", "-c", script], env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_public_names_are_there() -> None:
    import billm_format

    for name in billm_format.__all__:
        assert getattr(billm_format, name).__name__ == name
    assert dir(billm_format) == sorted(billm_format.__all__)
    with pytest.raises(AttributeError):
        _ = billm_format.nothing
