"""What a report says and shows, section by section: texts, tables and pictures, before they become a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from numpy.typing import NDArray

from billm_convert import pictures
from billm_convert.block import input_groups
from billm_convert.figures import LinearFigures
from billm_convert.pictures import Picture
from billm_convert.report import duration
from billm_convert.settings import FEWEST_SALIENT, ConvertReport
from billm_format.layout import KINDS, LINEAR_KINDS
from billm_format.packing import unpack_bits
from billm_format.reader import BillmFile


@dataclass(frozen=True)
class Material:
    """What a report is made of, beside the file itself."""

    model: str  # its name
    report: ConvertReport
    figures: Mapping[str, LinearFigures]  # "layers.0.q_proj" -> ...; of the decoder blocks that there are any of
    depth: Mapping[str, Sequence[float]]  # label -> error of the hidden states behind every decoder block


@dataclass(frozen=True)
class Table:
    """Rows whose first cell is a heading. Columns from `numbers` on are aligned to the right."""

    rows: list[list[str]]
    heads: list[str] = field(default_factory=list)
    numbers: int = 99
    total: list[str] | None = None
    folded: str | None = None  # what to click on; None: always in sight


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def make_sections(material: Material) -> list[Section]:
    """Draw the pictures and return everything that the page shows."""
    with matplotlib.rc_context(pictures.STYLE), BillmFile.open(material.report.path) as file:
        return [
            _summary(material, file),
            _sizes(file),
            _errors(material),
            _salient(file),
            _searches(material),
            _distributions(material, file),
        ]


def _summary(material: Material, file: BillmFile) -> Section:
    report = material.report
    used, settings = report.calibration, report.settings
    recipe = settings["recipe"] + (f", {settings['ablation']}" if "ablation" in settings else "")
    rows = [
        ["model", f"{material.model} ({file.config.family}, {file.config.num_hidden_layers} decoder blocks)"],
        ["file", f"{report.path}, {report.file_bytes:,} bytes"],
        ["recipe", recipe + (f", effort {settings['effort']}" if "effort" in settings else "")],
        ["blocks of columns", f"{settings['block_size']} wide, {settings['max_salient']} salient columns at most"],
        [
            "calibration text",
            f"{used['name']}, {used['nsamples']} windows of {used['seqlen']:,} tokens, seed {used['seed']}",
        ],
        ["bits a weight, true", f"{report.bits_true:.4f} (planes, column index and scales in the file)"],
        ["bits a weight, the paper's count", f"{report.bits_paper:.4f} (without group flags, scales and index)"],
        ["perplexity", _perplexity(report)],
        ["time", f"{duration(report.seconds)} on {report.device}{_resumed(report)}"],
        ["peak memory", _memory(report)],
    ]
    return Section("summary", "Summary", tables=[Table(rows)])


def _perplexity(report: ConvertReport) -> str:
    check = report.check
    if check is None:
        return "not measured"
    return (
        f"{check.perplexity:,.2f}, the original's {check.original:,.2f}, ratio {check.ratio:,.2f} "
        f"({check.text}, {check.windows} windows of {check.seqlen:,} tokens)"
    )


def _resumed(report: ConvertReport) -> str:
    return f"; {report.resumed_blocks} decoder blocks were there from an earlier run" if report.resumed_blocks else ""


def _memory(report: ConvertReport) -> str:
    host = f"{report.peak_bytes / 1e6:,.0f} MB"
    return (
        host if report.device_peak_bytes is None else f"{host}, {report.device_peak_bytes / 1e6:,.0f} MB on the device"
    )


def _sizes(file: BillmFile) -> Section:
    """Every byte of the file by kind; ValueError should they not add up to it."""
    parts = {kind: size for kind, size in file.sizes_by_kind().items() if size}
    if sum(parts.values()) != file.nbytes:
        raise ValueError(f"{file.path}: bytes by kind add up to {sum(parts.values())}, the file has {file.nbytes}")
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    labels = {**KINDS, "header": "header (names, checksums, conversion record)"}
    shapes = file.config.linears().values()
    weights = file.config.num_hidden_layers * sum(rows * cols for rows, cols, _ in shapes)
    rows = [
        [
            labels[kind],
            f"{size:,}",
            f"{size / file.nbytes:.2%}",
            f"{8 * size / weights:.4f}" if kind in LINEAR_KINDS else "-",
        ]
        for kind, size in parts.items()
    ]
    planes = sum(size for kind, size in parts.items() if kind in LINEAR_KINDS)
    total = ["the whole file", f"{file.nbytes:,}", "100%", f"{8 * planes / weights:.4f}"]
    table = Table(rows, ["what", "bytes", "share", "bits a binarized weight"], numbers=1, total=total)
    drawn = pictures.sizes({labels[kind]: size for kind, size in parts.items()})
    return Section("size", "Size", pictures=[drawn], tables=[table])


def _errors(material: Material) -> Section:
    report = material.report
    by_kind: dict[str, list[float]] = {}
    for linear in report.layers:
        by_kind.setdefault(linear.name.rpartition(".")[2], []).append(linear.error)
    drawn = [pictures.errors(by_kind)]
    if material.depth:
        drawn.append(pictures.depth(material.depth))
    notes = []
    tuning = report.tuning or {}
    if tuning.get("block_steps"):
        drawn.append(pictures.tuning(tuning["block_errors"]))
    if tuning:
        notes.append(
            f"Training the whole model ({tuning['model_steps']} steps) took its held-out Kullback-Leibler divergence "
            f"from the original from {tuning['kl_before']:.3f} to {tuning['kl_after']:.3f} nats a token."
        )
    rows = [
        [
            linear.name,
            f"{linear.error:.5f}",
            f"{linear.weight_error:.5f}",
            f"{linear.salient:.1%}",
            f"{linear.sparse:.1%}",
        ]
        for linear in report.layers
    ]
    heads = ["Linear", "output error", "weight error", "salient columns", "sparse of the others"]
    table = Table(rows, heads, numbers=1, folded=f"All {len(rows)} Linears as a table")
    return Section("errors", "Errors", notes, drawn, [table])


def _salient(file: BillmFile) -> Section:
    columns = {
        kind: np.stack([_salient_columns(file, f"layers.{i}.{kind}") for i in range(file.config.num_hidden_layers)])
        for kind in file.config.linears()
    }
    size = file.quantization.block_size
    counts = {
        kind: np.add.reduceat(salient, np.arange(0, salient.shape[1], size), axis=1, dtype=np.int64)
        for kind, salient in columns.items()
    }
    return Section(
        "salient",
        "Salient columns",
        ["Salient weights are chosen by whole columns of a block: they cluster there, as the paper's Fig. 15 shows."],
        [pictures.salient_counts(counts, size), pictures.salient_columns(columns)],
    )


def _salient_columns(file: BillmFile, name: str) -> NDArray[np.bool_]:
    packed = file.linear(name)
    return unpack_bits(packed.salient, packed.cols)


def _searches(material: Material) -> Section:
    """The curves of the first decoder block that has any, as in the paper; or why there are none."""
    settings = material.report.settings
    section = Section("searches", "Searches")
    if settings["recipe"] != "paper":
        section.notes.append(
            f"The recipe {settings['recipe']} searches no break-point: every row splits its magnitudes by itself. The "
            "paper's curves belong to --recipe paper."
        )
        return section
    if not material.figures:
        section.notes.append(_NOTHING_KEPT)
        return section
    layer, linears = next(iter(_by_layer(material.figures).items()))
    # An ablation leaves one of the searches out: then its curves are missing, or have the one candidate 0.
    if all(figures.salient_search.shape[1] > 1 for figures in linears.values()):
        fewest = min(FEWEST_SALIENT, settings["max_salient"])
        section.pictures.append(pictures.salient_search(linears, layer, fewest))
    else:
        section.notes.append("The search for the number of salient columns was left out: there are none.")
    if all(figures.split_search.size for figures in linears.values()):
        section.pictures.append(pictures.split_search(linears, layer))
    else:
        section.notes.append("The search for the break-point was left out: non-salient weights are one group.")
    return section


def _distributions(material: Material, file: BillmFile) -> Section:
    """The weights and Hessians of the first, the middle and the last decoder block."""
    by_layer = _by_layer(material.figures)
    section = Section("distributions", "Distributions")
    if len(by_layer) < file.config.num_hidden_layers:
        section.notes.append(_NOTHING_KEPT if not by_layer else _some_missing(by_layer, file.config.num_hidden_layers))
    inputs = {
        ", ".join(linear.removesuffix("_proj") for linear in linears): linears[0]
        for linears in input_groups(file.config).values()
    }
    layers = sorted(by_layer)
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}) if layers else []:
        section.pictures.append(pictures.distributions(by_layer[layer], inputs, layer))
    return section


_NOTHING_KEPT = "There is nothing to show: the decoder blocks were finished by a run without --report."


def _some_missing(there: Mapping[int, object], layers: int) -> str:
    missing = layers - len(there)
    return f"{missing} of {layers} decoder blocks were finished by a run without --report and are missing here."


def _by_layer(figures: Mapping[str, LinearFigures]) -> dict[int, dict[str, LinearFigures]]:
    """Return decoder block -> "q_proj" -> figures."""
    out: dict[int, dict[str, LinearFigures]] = {}
    for name, linear in figures.items():
        _, layer, kind = name.split(".")
        out.setdefault(int(layer), {})[kind] = linear
    return out
