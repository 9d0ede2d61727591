"""`--report FOLDER`: the page and its pictures, from whole conversions of tiny models."""

import base64
import contextlib
import dataclasses
import io
import re
import resource
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert import solver_problems
from convert.hf_models import save_model
from convert.test_pipeline import SIZES, Stop, small, stop_at
from matplotlib.figure import Figure
from PIL import Image

from billm_convert import ConvertReport, Event, convert
from billm_convert import pictures as pictures_module
from billm_convert.block import DecoderBlock, Rotary
from billm_convert.cli import main
from billm_convert.depth import depth_errors
from billm_convert.figures import HESSIAN_BINS, SEARCHED_BLOCKS, WEIGHT_BINS, linear_figures
from billm_convert.settings import TUNED
from billm_convert.solver import PaperSettings, solve_linear
from billm_convert.source import open_model
from billm_convert.workdir import WorkFolder
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.packing import unpack_bits
from billm_format.reader import BillmFile

ALWAYS = {"sizes", "errors", "depth", "salient-counts", "salient-columns", "distributions-0", "distributions-1"}
SEARCHES = {"search-salient", "search-split"}
_VOID = {"meta", "img"}


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the slow half of drawing, for tests that do not look at pictures."""

    def sketch(figure: Figure, name: str, title: str, caption: str, alt: str) -> pictures_module.Picture:
        return pictures_module.Picture(name, title, caption, alt, f"a sketch of {name}".encode())

    monkeypatch.setattr(pictures_module, "_picture", sketch)


class Page(HTMLParser):
    """A page taken apart, every tag closed in its turn."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.source = (folder / "index.html").read_text(encoding="utf-8")
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, heading: str) -> list[str]:
        """Return the cells of the first row with this heading."""
        return next(row for row in self.rows if row[0] == heading)


def pictures(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.png")}


def reported(
    tmp_path: Path, seed: int, name: str = "page", family: str = "llama", **changes: Any
) -> tuple[Page, ConvertReport]:
    folder, settings = small(tmp_path, family, seed)
    settings = dataclasses.replace(settings, report=tmp_path / name, **changes)
    report = convert(folder, tmp_path / "out.billm", settings)
    return Page(tmp_path / name), report


@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_every_figure_is_there_and_the_bytes_add_up(family: str, tmp_path: Path, seed: int) -> None:
    page, report = reported(tmp_path, seed, family=family)
    folder = tmp_path / "page"
    assert pictures(folder) == ALWAYS | SEARCHES
    assert {file.name for file in folder.iterdir()} == {"index.html", *(f"{name}.png" for name in ALWAYS | SEARCHES)}
    embedded = set()
    for image in page.images:
        assert len(image["alt"] or "") > 20
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        embedded.add(base64.b64decode(data))
    assert embedded == {file.read_bytes() for file in folder.glob("*.png")}
    for png in embedded:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        assert pixels.shape[1] == 1500
        assert (pixels < 128).mean() > 0.005  # something is drawn
    bytes_by_kind = [int(row[1].replace(",", "")) for row in page.rows if len(row) == 4 and row[2].endswith("%")]
    size = (tmp_path / "out.billm").stat().st_size
    assert bytes_by_kind[-1] == size == sum(bytes_by_kind[:-1])
    bits = [float(row[3]) for row in page.rows if len(row) == 4 and row[2].endswith("%") and row[3] != "-"]
    assert bits[-1] == pytest.approx(report.bits_true, abs=1e-4)
    assert sum(bits[:-1]) == pytest.approx(report.bits_true, abs=1e-3)
    assert len([row for row in page.rows if row[0].startswith("layers.")]) == len(report.layers)
    assert not (tmp_path / "out.billm.work").exists()


@pytest.mark.usefixtures("sketched")
def test_the_summary_says_what_was_done(tmp_path: Path, seed: int) -> None:
    page, report = reported(tmp_path, seed)
    assert page.row("model")[1] == "model (llama, 2 decoder blocks)"
    assert page.row("recipe")[1] == "paper"
    assert "text.txt, 3 windows of 24 tokens" in page.row("calibration text")[1].replace("first ", "")
    assert page.row("bits a weight, true")[1].startswith(f"{report.bits_true:.4f}")
    assert page.row("bits a weight, the paper's count")[1].startswith(f"{report.bits_paper:.4f}")
    assert report.check is not None
    assert f"ratio {report.check.ratio:,.2f}" in page.row("perplexity")[1]
    assert "MB" in page.row("peak memory")[1]
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"(?<!data)https?:|url\(|@import", page.source)  # nothing is fetched


@pytest.mark.usefixtures("sketched")
def test_hostile_names_are_text(tmp_path: Path, seed: int) -> None:
    name = "<script>alert('x')<b> &amp; \"\x07\u202e$\\frac{"
    save_model(tmp_path / name, "llama", seed)
    _, settings = small(tmp_path, "llama", seed)
    convert(tmp_path / name, tmp_path / "out.billm", dataclasses.replace(settings, report=tmp_path / "page"))
    page = Page(tmp_path / "page")
    assert "script" not in page.tags
    assert "b" not in page.tags
    shown = name.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    assert page.row("model")[1].startswith(shown)
    assert all(c.isprintable() or c == "\n" for c in page.source)


@pytest.mark.usefixtures("sketched")
def test_other_recipes_say_why_there_are_no_searches(tmp_path: Path, seed: int) -> None:
    page, _ = reported(tmp_path, seed, recipe="refined")
    assert pictures(tmp_path / "page") == ALWAYS
    assert "The recipe refined searches no break-point" in page.source


@pytest.mark.parametrize(
    ("ablation", "drawn", "said"),
    [
        ("salient-only", "search-salient", "The search for the break-point was left out"),
        ("splitting-only", "search-split", "The search for the number of salient columns was left out"),
    ],
)
@pytest.mark.usefixtures("sketched")
def test_ablations_leave_their_search_out(ablation: str, drawn: str, said: str, tmp_path: Path, seed: int) -> None:
    page, _ = reported(tmp_path, seed, ablation=ablation)
    assert pictures(tmp_path / "page") == {*ALWAYS, drawn}
    assert said in page.source


@pytest.mark.slow
def test_training_is_shown_before_and_after(tmp_path: Path, seed: int) -> None:
    page, report = reported(tmp_path, seed, recipe=TUNED, effort="fast")
    assert pictures(tmp_path / "page") == {*ALWAYS, "tuning"}
    assert any(
        " before, " in (image["alt"] or "") and "after training" in (image["alt"] or "") for image in page.images
    )
    assert report.tuning is not None
    assert f"to {report.tuning['kl_after']:.3f} nats" in page.source


# --- resuming, replacing, failing ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sketched")
def test_the_file_is_the_same_with_and_without(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    kept: list[str] = []

    def look(event: Event) -> None:
        kept.extend(file.name for file in (tmp_path / "plain.billm.work").glob("figures*"))

    convert(folder, tmp_path / "plain.billm", settings, look)
    assert kept == []
    convert(folder, tmp_path / "drawn.billm", dataclasses.replace(settings, report=tmp_path / "page"))
    assert (tmp_path / "plain.billm").read_bytes() == (tmp_path / "drawn.billm").read_bytes()


@pytest.mark.slow
def test_a_resumed_conversion_draws_the_same_pictures(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    convert(folder, tmp_path / "whole.billm", dataclasses.replace(settings, report=tmp_path / "whole"))
    broken = dataclasses.replace(settings, report=tmp_path / "broken")
    with pytest.raises(Stop):
        convert(folder, tmp_path / "out.billm", broken, stop_at(1.1))
    convert(folder, tmp_path / "out.billm", dataclasses.replace(broken, resume=True))
    assert pictures(tmp_path / "broken") == ALWAYS | SEARCHES
    for file in (tmp_path / "broken").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes(), file.name
    assert "1 decoder blocks were there from an earlier run" in (tmp_path / "broken" / "index.html").read_text()


@pytest.mark.usefixtures("sketched")
def test_a_report_asked_for_late_says_what_is_missing(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out, resume = tmp_path / "out.billm", dataclasses.replace(settings, resume=True)
    with pytest.raises(Stop):
        convert(folder, out, settings, stop_at(1.1))
    convert(folder, out, dataclasses.replace(resume, report=tmp_path / "page"))
    assert pictures(tmp_path / "page") == (ALWAYS | SEARCHES) - {"distributions-0"}
    assert "1 of 2 decoder blocks were finished by a run without --report" in Page(tmp_path / "page").source
    assert "Break-point, decoder block 1" in Page(tmp_path / "page").source
    convert(folder, out, dataclasses.replace(resume, report=tmp_path / "later"))  # of the finished file alone
    assert pictures(tmp_path / "later") == {"sizes", "errors", "salient-counts", "salient-columns"}
    assert "There is nothing to show" in Page(tmp_path / "later").source
    before = (tmp_path / "later" / "index.html").stat().st_mtime_ns
    notes: list[str] = []
    convert(folder, out, dataclasses.replace(resume, report=tmp_path / "later"), lambda event: notes.append(event.text))
    assert (tmp_path / "later" / "index.html").stat().st_mtime_ns == before
    assert any("is left as it is" in note for note in notes)


@pytest.mark.usefixtures("sketched")
def test_what_is_in_the_way_is_refused_before_any_work(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out, page = tmp_path / "out.billm", tmp_path / "page"

    def refused(match: str, where: Path = page, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            convert(folder, out, dataclasses.replace(settings, report=where, **changes), stop_at(0))
        assert not out.exists()
        assert not (tmp_path / "out.billm.work").exists()

    refused("there is no folder", tmp_path / "no" / "page")
    refused("the conversion itself needs this name", out)
    refused("the conversion itself needs this name", tmp_path / "out.billm.work")
    refused("is a file: give the name of a folder", folder / "config.json", force=True)
    page.mkdir()
    refused("exists already: pass --force to replace it")
    (page / "thesis.txt").write_text("years")
    refused(r"not a report's \(thesis\.txt\)", force=True)
    (page / "thesis.txt").unlink()
    (page / "sizes.png").mkdir()
    refused(r"not a report's \(sizes\.png\)", force=True)
    (page / "sizes.png").rmdir()
    (page / "distributions-77.png").write_text("of an older report")
    (tmp_path / ".page.unfinished").mkdir()  # of a run that was killed
    (tmp_path / ".page.unfinished" / "sizes.png").write_text("half of it")
    convert(folder, out, dataclasses.replace(settings, report=page, force=True))
    assert pictures(page) == ALWAYS | SEARCHES
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.billm", "page", "text.txt"]


@pytest.mark.usefixtures("sketched")
def test_a_killed_replacement_is_resumed_without_force(tmp_path: Path, seed: int) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    out, page = tmp_path / "out.billm", tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("old")
    forced = dataclasses.replace(settings, report=page, force=True)
    with pytest.raises(Stop):
        convert(folder, out, forced, stop_at(1.1))
    assert (page / "index.html").read_text() == "old"
    (tmp_path / "other").mkdir()
    resume = dataclasses.replace(settings, report=tmp_path / "other", resume=True)
    with pytest.raises(UsageError, match="exists already"):
        convert(folder, out, resume)
    convert(folder, out, dataclasses.replace(resume, report=page))
    assert pictures(page) == ALWAYS | SEARCHES


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond `size`, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_a_full_disk_leaves_no_half_of_it(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from billm_convert import page as pages

    folder, settings = small(tmp_path, "llama", seed)
    settings = dataclasses.replace(settings, report=tmp_path / "page")
    write = pages.write_page

    def on_a_full_disk(*args: Any) -> None:
        with small_files(3_000):
            write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pages, "write_page", on_a_full_disk)
        with pytest.raises(DoesNotFitError, match=r"while writing the report of .*out\.billm is whole.*--resume"):
            convert(folder, tmp_path / "out.billm", settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.billm", "out.billm.work", "text.txt"]
    convert(folder, tmp_path / "out.billm", dataclasses.replace(settings, resume=True))
    assert pictures(tmp_path / "page") == ALWAYS | SEARCHES


def test_without_matplotlib_one_sentence_before_any_work(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    capsys.readouterr()  # saving the model draws a bar
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [
        str(folder),
        str(tmp_path / "out.billm"),
        "--calib",
        str(settings.calib),
        "--nsamples",
        "2",
        "--seqlen",
        "20",
    ]
    assert main([*argv, "--report", str(tmp_path / "page")]) == 2
    err = capsys.readouterr().err
    assert "pip install 'billm-rt[report]'" in err
    assert err.count("\n") == 1
    assert main([*argv, "--quiet", "--report", str(tmp_path / "figures.json")]) == 0  # needs none


@pytest.mark.usefixtures("sketched")
def test_the_command_names_the_page(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    options = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    argv = [str(folder), str(tmp_path / "out.billm"), "--calib", str(settings.calib), *options]
    assert main([*argv, "--report", str(tmp_path / "page")]) == 0
    assert f"report: {tmp_path / 'page' / 'index.html'}" in capsys.readouterr().out


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", solver_problems.KINDS)
def test_figures_count_everything(kind: str, seed: int) -> None:
    weight, hessian = (torch.from_numpy(part) for part in solver_problems.KINDS[kind](np.random.default_rng(seed)))
    figures = linear_figures(weight, hessian, None)
    assert figures.weights.shape == (WEIGHT_BINS,)
    assert figures.hessian.shape == (HESSIAN_BINS,)
    assert figures.weights.sum() == weight.numel()
    assert figures.hessian.sum() + figures.hessian_zeros[0] == len(hessian)
    assert (figures.salient_search.size, figures.split_search.size) == (0, 0)
    assert sum(value.nbytes for value in vars(figures).values()) < 8000
    low, high = figures.hessian_range
    diagonal = hessian.diagonal()
    assert 10**low <= diagonal[diagonal > 0].min() * (1 + 1e-9)
    assert 10**high >= diagonal.max() * (1 - 1e-9)


def _binarized(part: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Each row's members as plus or minus their mean magnitude, others 0."""
    out = np.zeros_like(part)
    for row, inside, target in zip(part, members, out, strict=True):
        if inside.any():
            target[inside] = np.where(row[inside] >= 0, 1, -1) * np.abs(row[inside]).mean()
    return out


def test_search_curves_are_the_errors_of_every_candidate(seed: int) -> None:
    """The first block, whose weights no other block has changed, against plain loops."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(6, 32 * 7 + 5))
    hessian = solver_problems.hessian(solver_problems.correlated_inputs(random, 400, weight.shape[1]))
    settings = PaperSettings(32, 3, 9, keep_searches=True)
    solved = solve_linear(torch.from_numpy(weight), torch.from_numpy(hessian), settings)
    figures = linear_figures(torch.from_numpy(weight), torch.from_numpy(hessian), solved.searches)
    assert figures.salient_search.shape == (SEARCHED_BLOCKS, 10)
    assert figures.split_search.shape == (SEARCHED_BLOCKS, 9)
    block = weight[:, :32]
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    order = np.argsort(-((block / np.diag(upper)[:32]) ** 2).sum(0))
    for number, found in enumerate(figures.salient_search[0]):
        inside = np.zeros(block.shape, bool)
        inside[:, order[:number]] = True
        binary = _binarized(block, inside) + _binarized(block, ~inside)
        assert found == pytest.approx(((block - binary) ** 2).sum() / (block**2).sum(), rel=1e-9)
    salient = unpack_bits(solved.packed.salient, weight.shape[1])[:32]
    assert salient.sum() == 3 + np.argmin(figures.salient_search[0, 3:])
    rest = block[:, ~salient]
    for tenth, found in enumerate(figures.split_search[0], start=1):
        near = np.abs(rest) <= tenth / 10 * np.abs(rest).max()
        binary = _binarized(rest, near) + _binarized(rest, ~near)
        assert found == pytest.approx(((rest - binary) ** 2).sum() / (rest**2).sum(), rel=1e-9)
    assert solve_linear(torch.from_numpy(weight), torch.from_numpy(hessian), PaperSettings(32, 3, 9)).searches is None


def test_a_last_block_of_few_columns_has_a_short_curve(seed: int) -> None:
    weight, hessian = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 34))), torch.eye(34).double()
    solved = solve_linear(weight, hessian, PaperSettings(32, 3, 9, keep_searches=True))
    figures = linear_figures(weight, hessian, solved.searches)
    assert np.isnan(figures.salient_search).sum(1).tolist() == [0, 8]  # of 2 columns one at most is salient
    drawn = pictures_module.salient_search({"q_proj": figures}, 0, 3)
    chosen = unpack_bits(solved.packed.salient, 34)
    assert f"q_proj {chosen[:32].sum()}, {chosen[32:].sum()}." in drawn.alt


def test_depth_errors_are_those_of_the_normed_hidden_states(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = small(tmp_path, "llama", seed)
    found: list[float] = []

    def look(self: WorkFolder) -> None:
        with BillmFile.open(tmp_path / "out.billm") as file:
            found.extend(depth_errors(source, file.quantization, self, {"stored": "block"}, hidden)["stored"])
        raise Stop

    source = open_model(folder)
    hidden = torch.randn(2, 9, source.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    monkeypatch.setattr(WorkFolder, "remove", look)
    with pytest.raises(Stop):
        convert(folder, tmp_path / "out.billm", settings)
    rotary = Rotary(source.tensor("rope.inv_freq"), 1.0, 9)
    original = stored = hidden
    for layer in range(2):
        weights = source.layer(layer)
        original = DecoderBlock(source.config, weights, rotary).forward(original)
        with BillmFile.open(tmp_path / "out.billm") as file:
            for linear in source.config.linears():
                dense = file.linear(f"layers.{layer}.{linear}").dequantize()
                weights = {**weights, f"{linear}.weight": torch.from_numpy(dense)}
        stored = DecoderBlock(source.config, weights, rotary).forward(stored)
        gain = source.tensor("layers.1.attn_norm.weight" if layer == 0 else "final_norm.weight")
        seen, wanted = (x / (x**2).mean(-1, keepdim=True).sqrt() * gain for x in (stored, original))
        assert found[layer] == pytest.approx(float(((seen - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-3)
