"""What a report draws of a conversion, collected while it runs: a few kilobytes a Linear, whatever its size.

Everything lies in the work folder, block by block, so that it survives a kill as the blocks themselves do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.solved import Searches
from billm_convert.workdir import WorkFolder

WEIGHT_BINS = 401  # odd: a bin has its middle at 0
HESSIAN_BINS = 60
SEARCHED_BLOCKS = 5  # of a Linear's columns, from the left, whose searches are kept, as in the paper's Fig. 9


@dataclass(frozen=True)
class LinearFigures:
    """Distributions and search curves of one Linear. A curve that ended early, or was not searched, is NaN."""

    weights: NDArray[np.int64]  # [WEIGHT_BINS]: how many weights, in equal bins
    weight_range: NDArray[np.float64]  # [2]: from -max |w| to max |w|
    weight_deviation: NDArray[np.float64]  # [1]: the weights' standard deviation
    hessian: NDArray[np.int64]  # [HESSIAN_BINS]: how many values of the Hessian's diagonal, in equal bins of log10
    hessian_range: NDArray[np.float64]  # [2]: log10 of the least and the largest value above 0
    hessian_zeros: NDArray[np.int64]  # [1]: how many values are 0 (inputs that are never used)
    salient_search: NDArray[np.float64]  # [blocks, candidates]: `Searches.salient`
    split_search: NDArray[np.float64]  # [blocks, 9]: `Searches.split`


def linear_figures(weight: Tensor, hessian: Tensor, searches: Searches | None) -> LinearFigures:
    """Return the figures of a Linear `weight` [rows, cols] whose inputs have the Hessian `hessian` [cols, cols]."""
    low, high = (float(value) for value in torch.aminmax(weight))
    largest = max(-low, high) or 1.0
    weights, _ = np.histogram(weight.cpu().numpy(), bins=WEIGHT_BINS, range=(-largest, largest))
    diagonal = hessian.diagonal().double().cpu().numpy()
    logs = np.log10(diagonal[diagonal > 0])
    limits = (float(logs.min()), float(logs.max())) if logs.size else (0.0, 0.0)
    counts, edges = np.histogram(logs, bins=HESSIAN_BINS, range=limits)
    searches = searches or Searches()
    return LinearFigures(
        weights=weights.astype(np.int64),
        weight_range=np.array([-largest, largest]),
        weight_deviation=np.array([float(weight.std(correction=0))]),
        hessian=counts.astype(np.int64),
        hessian_range=edges[[0, -1]],  # numpy widens a range of one value
        hessian_zeros=np.array([diagonal.size - logs.size]),
        salient_search=_curves(searches.salient),
        split_search=_curves(searches.split),
    )


def _curves(curves: list[Tensor]) -> NDArray[np.float64]:
    """Return the first curves as one array, NaN behind the end of shorter ones."""
    kept = [curve.cpu().numpy() for curve in curves[:SEARCHED_BLOCKS]]
    out = np.full((len(kept), max((len(curve) for curve in kept), default=0)), np.nan)
    for row, curve in zip(out, kept, strict=True):
        row[: len(curve)] = curve
    return out


def save_figures(work: WorkFolder, layer: int, linears: Mapping[str, LinearFigures]) -> None:
    """Store the figures of a block's Linears, by their names in the file."""
    tensors = {f"{name}.{part}": value for name, figures in linears.items() for part, value in vars(figures).items()}
    work.save_block(layer, tensors, None, "figures")


def load_figures(work: WorkFolder, layers: Iterable[int], linears: Iterable[str]) -> dict[str, LinearFigures]:
    """Return the figures of all Linears of which there are any, by name ("layers.0.q_proj")."""
    kept = [layer for layer in layers if work.has_block(layer, "figures")]
    names = [f"layers.{layer}.{linear}" for layer in kept for linear in linears]
    return {name: LinearFigures(**_parts(work, name)) for name in names}


def _parts(work: WorkFolder, name: str) -> dict[str, NDArray[Any]]:
    layer = int(name.split(".")[1])
    return {field.name: work.block_tensor(layer, f"{name}.{field.name}", "figures") for field in fields(LinearFigures)}
