"""The pictures of a report, drawn with matplotlib: data in, PNG out. No text of a user's ever gets into one."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from billm_convert.figures import LinearFigures

# Okabe and Ito's colours, distinct for every kind of colour vision; each goes with a marker of its own.
_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _BLACK = _COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MAP = "cividis"  # light is more; readable in grey and by every kind of colour vision
_WIDTH = 10.0  # inches: at the width of a page, type is as large as the page's
_DPI = 150
_COLUMNS = 4  # of small pictures in one
_MOST_STRIPES = 600  # columns of weights that a picture shows apart
STYLE: Any = {
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """One picture and what stands beside it on the page."""

    name: str  # of its file, without ".png"
    title: str
    caption: str  # how to read it
    alt: str  # what it shows, for those who do not see it
    png: bytes

    @property
    def base64(self) -> str:
        """The picture as a page can hold it."""
        return base64.b64encode(self.png).decode()


def sizes(parts: Mapping[str, int]) -> Picture:
    """Draw the file's bytes; `parts` are label -> bytes, largest first."""
    shown = {label: size for label, size in parts.items() if size}
    total = sum(shown.values())
    texts = [f"{_bytes(size)}, {size / total:.2%}" for size in shown.values()]
    figure = _figure(0.36 * len(shown) + 1.1)
    axes = figure.subplots()
    bars = axes.barh(list(shown), [size / 1e6 for size in shown.values()], color=_BLUE)
    axes.bar_label(bars, texts, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(shown.values()) / 1e6 * 1.25)
    axes.set(xlabel="size, MB (10⁶ bytes)", title="What the file's bytes are")
    axes.grid(axis="x", alpha=0.3)
    listed = "; ".join(f"{label} {text}" for label, text in zip(shown, texts, strict=True))
    return _picture(figure, "sizes", "Bytes by kind", "The bars add up to the file; exact bytes below.", listed)


def errors(by_kind: Mapping[str, Sequence[float]]) -> Picture:
    """Draw each Linear's relative output error; `by_kind` is "q_proj" -> an error for each decoder block."""
    figure = _figure(4.2)
    axes = figure.subplots()
    _lines(axes, by_kind)
    axes.set(
        xlabel="decoder block", ylabel="relative output error, tr(D H Dᵀ) / tr(W H Wᵀ)", title="Error of each Linear"
    )
    figure.legend(loc="outside right upper")
    worst = max(by_kind, key=lambda kind: max(by_kind[kind]))
    block = int(np.argmax(by_kind[worst]))
    alt = f"Lines over the decoder blocks for {', '.join(by_kind)}. Largest: {worst} of block {block}, "
    caption = (
        "How much of a Linear's output, squared, is lost on the calibration text, before any training: D is what the "
        "stored weights lack, H the Hessian of what the Linear reads."
    )
    return _picture(figure, "errors", "Error per Linear", caption, f"{alt}{max(by_kind[worst]):.4f}.")


def depth(by_stage: Mapping[str, Sequence[float]]) -> Picture:
    """Draw how the error of the hidden states grows; `by_stage` is a label -> an error behind each decoder block."""
    figure = _figure(3.6)
    axes = figure.subplots()
    _lines(axes, by_stage)
    axes.set(xlabel="decoder block", ylabel="relative squared error", title="Error of the hidden states by depth")
    if len(by_stage) > 1:
        axes.legend()
    ends = "; ".join(
        f"{label}: {line[0]:.3g} behind the first, {line[-1]:.3g} behind the last" for label, line in by_stage.items()
    )
    caption = (
        "The same text through the original blocks and through the stored ones: how far the hidden states are apart, "
        "as the norm that reads them sees them. Measured on the beginning of the calibration text."
    )
    return _picture(figure, "depth", "Error by depth", caption, f"Lines over the decoder blocks. {ends}.")


def tuning(pairs: Sequence[Sequence[float]]) -> Picture:
    """Draw the held-out error of each decoder block before and after its training in turn; `pairs`: one for each."""
    before, after = zip(*pairs, strict=True)
    figure = _figure(3.6)
    axes = figure.subplots()
    _lines(axes, {"before training": before, "after training": after})
    axes.set(xlabel="decoder block", ylabel="relative squared error", title="Held-out error of each block's output")
    axes.legend()
    alt = f"Two lines over the decoder blocks: mean {np.mean(before):.4f} before, {np.mean(after):.4f} after training."
    caption = (
        "Each block is trained as soon as it is solved, on what the blocks before it give, towards the original "
        "block's output; measured on text not trained on."
    )
    return _picture(figure, "tuning", "Training block by block", caption, alt)


def salient_counts(by_kind: Mapping[str, NDArray[np.int64]], block_size: int) -> Picture:
    """Draw how many columns are salient; `by_kind` is "q_proj" -> [decoder blocks, blocks of columns]."""
    figure, panels = _grid(len(by_kind), 2.1)
    colours = Normalize(0, max(1, *(int(counts.max()) for counts in by_kind.values())))
    for axes, (kind, counts) in zip(panels, by_kind.items(), strict=False):
        axes.imshow(counts, aspect="auto", cmap=_MAP, norm=colours, interpolation="nearest")
        axes.set_title(kind)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _outer_labels(figure, f"block of {block_size} columns, from the left", "decoder block")
    figure.colorbar(ScalarMappable(colours, _MAP), ax=figure.axes, label="salient columns in a block", shrink=0.8)
    figure.suptitle("How many columns are salient")
    means = "; ".join(f"{kind} {counts.mean():.1f}" for kind, counts in by_kind.items())
    caption = "Each cell is a block of columns of one Linear. The last block of a row may be narrower."
    return _picture(
        figure, "salient-counts", "Salient columns per block", caption, f"Heat maps. Mean number per block: {means}."
    )


def salient_columns(by_kind: Mapping[str, NDArray[np.bool_]]) -> Picture:
    """Draw which columns are salient; `by_kind` is "q_proj" -> [decoder blocks, cols]."""
    figure, panels = _grid(len(by_kind), 2.0, columns=2)
    for axes, (kind, salient) in zip(panels, by_kind.items(), strict=False):
        cols = salient.shape[1]
        edges = np.linspace(0, cols, min(cols, _MOST_STRIPES) + 1).astype(int)
        share = np.add.reduceat(salient, edges[:-1], axis=1, dtype=np.float64) / np.diff(edges)
        axes.imshow(
            share,
            aspect="auto",
            cmap="Greys",
            vmin=0,
            vmax=max(share.max(), 1e-9),
            interpolation="nearest",
            extent=(0, cols, len(salient) - 0.5, -0.5),
        )
        axes.set_title(kind)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _outer_labels(figure, "column (input feature)", "decoder block")
    figure.suptitle("Where the salient columns are")
    shares = "; ".join(f"{kind} {salient.mean():.1%}" for kind, salient in by_kind.items())
    caption = (
        "A mark is a salient column, and a vertical line an input feature that is salient in many decoder blocks. In "
        "wide Linears a mark stands for several columns, the stronger the more of them are salient."
    )
    return _picture(
        figure,
        "salient-columns",
        "Where the salient columns are",
        caption,
        f"Maps of columns over decoder blocks. Salient: {shares}.",
    )


def salient_search(linears: Mapping[str, LinearFigures], layer: int, fewest: int) -> Picture:
    """Draw the search for the number of salient columns in the Linears ("q_proj") of one decoder block (Fig. 9)."""
    curves = {name: figures.salient_search for name, figures in linears.items()}
    figure, panels = _grid(len(curves), 2.1)
    for axes, (name, lines) in zip(panels, curves.items(), strict=False):
        numbers = np.arange(lines.shape[1])
        axes.axvspan(0, fewest, color="0.9", zorder=0, label=f"fewer than {fewest}: not allowed")
        _curves(axes, numbers, lines, first=fewest)
        axes.set_title(name)
    _outer_labels(figure, "number of salient columns", "relative error, one plane a class")
    _legend(figure, panels, len(curves))
    figure.suptitle(f"Search for the number of salient columns, decoder block {layer}")
    best = "; ".join(f"{name} {_listed([_best(line, fewest) for line in lines])}" for name, lines in curves.items())
    caption = (
        "The paper's Fig. 9: the error ‖W − B‖² / ‖W‖² of Eq. 5 over the number of salient columns, for the first "
        "blocks of columns. The dot is the number taken."
    )
    return _picture(
        figure,
        "search-salient",
        f"Number of salient columns, decoder block {layer}",
        caption,
        f"Curves with their minima: {best}.",
    )


def split_search(linears: Mapping[str, LinearFigures], layer: int) -> Picture:
    """Draw the search for the break-point in the Linears of one decoder block (Fig. 10)."""
    curves = {name: figures.split_search for name, figures in linears.items()}
    figure, panels = _grid(len(curves), 2.1)
    for axes, (name, lines) in zip(panels, curves.items(), strict=False):
        _curves(axes, np.arange(1, lines.shape[1] + 1) / 10, lines, first=0)
        axes.set_title(name)
    _outer_labels(figure, "break-point p / largest magnitude of the block", "relative error")
    _legend(figure, panels, len(curves))
    figure.suptitle(f"Search for the break-point, decoder block {layer}")
    best = "; ".join(
        f"{name} {_listed([(_best(line, 0) + 1) / 10 for line in lines])}" for name, lines in curves.items()
    )
    caption = (
        "The paper's Fig. 10: the error of Eq. 11 over the break-point between the concentrated and the sparse group, "
        "over the non-salient weights of the first blocks of columns. The dot is the break-point taken."
    )
    return _picture(
        figure, "search-split", f"Break-point, decoder block {layer}", caption, f"Curves with their minima: {best}."
    )


def distributions(linears: Mapping[str, LinearFigures], inputs: Mapping[str, str], layer: int) -> Picture:
    """Draw the weights of a decoder block's Linears and the Hessian diagonals of what they read (Fig. 2, 13, 14).

    `inputs` is a label -> one of the Linears that read this input.
    """
    rows = -(-len(linears) // _COLUMNS)
    figure = _figure(2.0 * (rows + 1))
    panels = figure.subplots(rows + 1, _COLUMNS, squeeze=False)
    above, below = panels[:-1].flatten(), panels[-1]
    for axes, (name, figures) in zip(above, linears.items(), strict=False):
        _weights(axes, figures)
        axes.set_title(f"{name}: weights")
    for axes, (label, name) in zip(below, inputs.items(), strict=False):
        _hessian(axes, linears[name])
        axes.set_title(f"input of {label}")
    for axes in (*above[len(linears) :], *below[len(inputs) :]):
        axes.axis("off")
    for axes in panels[:-1, 0]:
        axes.set_ylabel("density")
    below[0].set_ylabel("input features")
    _legend(figure, list(above), len(linears))
    figure.suptitle(f"Weights and Hessian diagonals, decoder block {layer}")
    spans = "; ".join(
        f"{label} {10 ** (f[1] - f[0]):,.0f}" for label, f in ((k, linears[n].hessian_range) for k, n in inputs.items())
    )
    caption = (
        "The paper's Fig. 2, 13 and 14. Weights are bell-shaped with few large ones (a logarithmic axis shows the "
        "tails); the Hessian's diagonal, twice the mean square of each input feature, spans decades: a few features "
        "matter far more than the rest."
    )
    alt = f"Histograms. Largest over smallest value of the Hessian's diagonal: {spans}."
    return _picture(figure, f"distributions-{layer}", f"Decoder block {layer}", caption, alt)


# --- parts of pictures -----------------------------------------------------------------------------------------------


def _weights(axes: Axes, figures: LinearFigures) -> None:
    edges = _edges(figures.weight_range, figures.weights)
    density = figures.weights / figures.weights.sum() / np.diff(edges)
    deviation = float(figures.weight_deviation[0])
    axes.stairs(density, edges, fill=True, color=_SKY, label="weights")
    if deviation > 0:
        middles = (edges[1:] + edges[:-1]) / 2
        bell = np.exp(-((middles / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
        axes.plot(middles, bell, color=_BLACK, linewidth=0.8, linestyle="--", label="normal distribution as wide")
    axes.set_yscale("log")
    axes.set_ylim(density[density > 0].min() / 2, density.max() * 3)
    axes.minorticks_off()  # placing their hundreds takes longer than all else
    axes.set_xlabel("weight")


def _hessian(axes: Axes, figures: LinearFigures) -> None:
    edges = 10 ** _edges(figures.hessian_range, figures.hessian)
    axes.stairs(figures.hessian, edges, fill=True, color=_ORANGE)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    zeros = int(figures.hessian_zeros[0])
    axes.set_xlabel(f"diagonal of H ({zeros:,} more are 0)" if zeros else "diagonal of H")


def _edges(limits: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the edges of a histogram's bins."""
    low, high = limits
    return np.linspace(float(low), float(high), len(counts) + 1)


def _lines(axes: Axes, by_label: Mapping[str, Sequence[float]]) -> None:
    """Draw a line over the decoder blocks for each label, on a logarithmic axis."""
    for index, (label, values) in enumerate(by_label.items()):
        colour, marker = _COLOURS[index % 7], _MARKERS[index % 7]
        axes.plot(np.clip(values, 1e-12, None), label=label, color=colour, marker=marker, markersize=4, linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _curves(axes: Axes, x: NDArray[Any], lines: NDArray[np.float64], first: int) -> None:
    """Draw a search's curves and a dot at the least error from place `first` on."""
    for index, line in enumerate(lines):
        colour = _COLOURS[index % 7]
        best = _best(line, first)
        dots = "." if len(x) < 10 else ""
        axes.plot(x, line, color=colour, marker=dots, linewidth=1.2, label=f"block {index} of columns")
        axes.plot(x[best], line[best], color=colour, marker=_MARKERS[index % 7], markersize=5)
    axes.grid(alpha=0.3)


def _grid(number: int, height: float, columns: int = _COLUMNS) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for `number` small pictures; places left over are blank."""
    rows = -(-number // columns)
    figure = _figure(height * rows + 0.6)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels[number:]:
        axes.axis("off")
    return figure, panels


def _legend(figure: Figure, panels: list[Axes], used: int) -> None:
    """Put the first picture's legend in a place that is left over, or below."""
    handles, labels = panels[0].get_legend_handles_labels()
    if used < len(panels):
        panels[used].legend(handles, labels, loc="center", frameon=False)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _outer_labels(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.2f} kB"


def _best(line: NDArray[np.float64], first: int) -> int:
    """Return the candidate that a search took: the best from `first` on, or the last where a short block has none."""
    known = line[~np.isnan(line)]
    first = min(first, len(known) - 1)
    return first + int(np.argmin(known[first:]))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")


def _picture(figure: Figure, name: str, title: str, caption: str, alt: str) -> Picture:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return Picture(name, title, caption, alt, out.getvalue())
