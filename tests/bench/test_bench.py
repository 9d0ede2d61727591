"""billm-bench: what is timed, what is counted as read, and the command from its arguments to what it prints."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_model import make_random_billm, tiny_config

from billm_format.reader import BillmFile
from billm_rt import bench, bench_cli

SMALL = ("--prompt", "40", "--gen", "9", "--repeat", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose context is 128 tokens."""
    path = tmp_path_factory.mktemp("bench") / "tiny.billm"
    make_random_billm(path, seed=3)
    return path


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the bandwidth short: its figure is the machine's business."""
    monkeypatch.setattr(bench, "_buffer_size", lambda: 8 << 20)
    monkeypatch.setattr(bench, "_BANDWIDTH_SECONDS", 0.0)


class Timed:
    """A model, its cache and a clock in one: every forward takes a known time, and is recorded."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=50)
        self.held: list[int] = []
        self.caches: list[Timed] = []  # of a batch, which this is as well
        self.forwards: list[tuple[int, int]] = []  # (tokens held before, tokens read)
        self.now = 100.0

    def truncate(self, length: int) -> None:
        del self.held[length:]

    def forward(self, ids: np.ndarray, cache: "Timed") -> None:
        assert cache is self
        self._read(len(self.held), ids)
        self.held += ids.tolist()

    def gather(self, caches: "list[Timed]") -> "Timed":
        self.caches = caches
        return self

    def forward_each(self, ids: np.ndarray, batch: "Timed") -> None:
        assert batch is self and len(ids) == len(self.caches)
        self._read(len(self.caches[-1].held), ids)
        for cache, token in zip(self.caches, ids.tolist(), strict=True):
            cache.held.append(token)

    def _read(self, before: int, ids: np.ndarray) -> None:
        assert all(0 <= token < 50 for token in ids)
        self.forwards.append((before, len(ids)))
        self.now += 0.5 * len(self.forwards)  # later runs take longer

    def perf_counter(self) -> float:
        return self.now


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, done = Timed(), []
    monkeypatch.setattr(bench.time, "perf_counter", timed.perf_counter)
    prompt, decode = bench.measure(timed, [timed], 20, 3, 2, lambda: done.append(timed.now))  # type: ignore[arg-type,list-item]
    one_round = [(0, 20), (0, 1), (1, 1), (2, 1)]
    assert timed.forwards == one_round * 3
    assert len(done) == 2 * 3
    # The first round, forwards 1 to 4, does not count.
    assert (prompt.tokens, prompt.samples) == (20, (20 / 2.5, 20 / 4.5))
    assert (decode.tokens, decode.samples) == (3, (3 / (0.5 * (6 + 7 + 8)), 3 / (0.5 * (10 + 11 + 12))))
    assert prompt.median == (20 / 2.5 + 20 / 4.5) / 2


def test_tokens_of_all_texts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, other = Timed(), Timed()
    monkeypatch.setattr(bench.time, "perf_counter", timed.perf_counter)
    prompt, decode = bench.measure(timed, [timed, other], 20, 3, 1)  # type: ignore[arg-type,list-item]
    assert timed.forwards == [(0, 20), (0, 2), (1, 2), (2, 2)] * 2
    assert (prompt.tokens, prompt.samples) == (20, (20 / 2.5,))
    assert (decode.tokens, decode.samples) == (6, (6 / (0.5 * (6 + 7 + 8)),))


@pytest.mark.parametrize("family", ["llama", "llama-bias", "opt", "opt-350m"])
def test_bytes_read_per_token(family: str, tmp_path: Path) -> None:
    """All of the file but tokenizer, padding, header, and what of the tables is only looked up."""
    config = tiny_config(family)
    make_random_billm(tmp_path / "m.billm", config, seed=1)
    with BillmFile.open(tmp_path / "m.billm") as file:
        sizes = file.sizes_by_kind()
        wanted = sum(sizes.values()) - sizes["tokenizer"] - sizes["padding"] - sizes["header"]
        for name in ["pos_embed.weight"] + ([] if config.tie_word_embeddings else ["embed.weight", "embed.scale"]):
            if name in file.tensors:
                array = file.array(name)
                wanted -= array.nbytes - array[0].nbytes
        assert bench.weight_bytes_per_token(file) == wanted
        assert ("pos_embed.weight" in file.tensors) == (config.position == "learned")


def test_bandwidth_counts_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a sum of the same memory: nothing reads it ten times as fast, or fifty times as slowly."""
    values = np.ones(4 << 20, np.uint64)
    begun = bench.time.perf_counter()
    values.sum()
    plain = values.nbytes / (bench.time.perf_counter() - begun)
    for threads in (1, 3):
        assert plain / 50 < bench.read_bandwidth(threads, values.nbytes) < plain * 10 * threads


def test_buffer_exceeds_the_cache_and_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 << 30))
    for cache, wanted in ((0, 256 << 20), (64 << 20, 256 << 20), (480 << 20, 960 << 20), (3 << 30, 2 << 30)):
        monkeypatch.setattr(bench, "last_level_cache", lambda size=cache: size)
        assert bench._buffer_size() == wanted


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        code = bench_cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # how argparse leaves
        code = int(exit.code or 0)
    return code, *capsys.readouterr()


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, *SMALL, "--threads", "1", "--json")
    report: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["schema"], report["version"]) == ("billm-bench", 1)
    assert (report["prompt_tokens"], report["decode_tokens"], report["threads"]) == (40, 9, 1)
    for what in ("prompt", "decode"):
        samples = report[f"{what}_samples"]
        assert len(samples) == 3 and report[f"{what}_tokens_per_s"] == sorted(samples)[1] > 0
    memory = report["memory"]
    assert sum(memory.values()) == report["resident_bytes"] > 1e7
    assert 0 < memory["file"] <= report["file_bytes"] + 4096 and memory["kv_cache"] > 0
    share = report["weight_bytes_per_token"] * report["decode_tokens_per_s"] / report["read_bytes_per_s"]
    assert report["bandwidth_share"] == pytest.approx(share)
    assert report["load_seconds"] > 0 and report["activations"] == "int16"
    import billm_rt

    with billm_rt.load(model) as loaded:
        assert report["isa"] == loaded.isa


def test_batch(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model, *SMALL, "--batch", "3", "--json")
    report = json.loads(out)
    assert (code, report["decode_texts"], report["decode_tokens"]) == (0, 3, 27)
    share = report["weight_bytes_per_token"] * report["decode_tokens_per_s"] / 3 / report["read_bytes_per_s"]
    assert report["bandwidth_share"] == pytest.approx(share)
    assert "decoding 9 x 3 texts" in run(capsys, model, *SMALL, "--batch", "3")[1]


def test_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, *SMALL, "--activation-bits", "8")
    assert (code, err) == (0, "")
    assert out.startswith("tiny.billm, ")
    for part in ("prompt of 40", "decoding 9", "median of 3", "GB/s", "KV cache", "load time", "int8 activations"):
        assert part in out
    assert "median" not in run(capsys, model, "--prompt", "2", "--gen", "2", "--repeat", "1")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["NONE"], 2, "no such file"),
        (["CUT"], 3, "bytes"),
        (["MODEL", "--prompt", "129"], 2, "--prompt 129 exceeds the model's context of 128 tokens"),
        (["MODEL", "--prompt", "8", "--gen", "200"], 2, "--gen 200"),
        (["MODEL", "--gen", "0"], 2, "at least 1"),
        (["MODEL", *SMALL, "--device", "abacus"], 2, "--device"),
    ],
)
def test_errors_are_one_line_and_a_code(
    arguments: list[str], code: int, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.billm").write_bytes(model.read_bytes()[:5000])
    names = {"MODEL": model, "NONE": tmp_path / "none.billm", "CUT": tmp_path / "cut.billm"}
    found, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("billm-bench: ")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from billm_rt.bench_cli import build_parser; text = build_parser().format_help()\n"
        "assert 'examples:' in text\n"
        "print(*{'rich', 'tokenizers', 'jinja2', 'psutil', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr + done.stdout
