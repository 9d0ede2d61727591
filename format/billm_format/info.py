"""What a `.billm` file says about itself, as one JSON-able object: the pure part of `billm-info`."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.layout import linear_names
from billm_format.reader import BillmFile

_ROWS_AT_ONCE = 1 << 22  # bytes of a plane that are counted at a time
_POPCOUNT = np.array([value.bit_count() for value in range(256)], np.uint8)


def describe(file: BillmFile, *, layers: bool = False) -> dict[str, Any]:
    """Return model, both bit widths, sizes, conversion record and tensors; with `layers` also every Linear.

    Without `layers` only the salient column indices are read; with it, the second planes too. `sizes` adds up to
    `file_bytes`.
    """
    paper, true = file.bits()
    parameters = parameter_count(file)
    payload: dict[str, Any] = {
        "path": str(file.path).encode(errors="replace").decode(),  # a name need not be Unicode, JSON must
        "file_bytes": file.nbytes,
        "format_version": ".".join(map(str, file.version)),
        "parameters": parameters,
        "bits": {"paper": paper, "true": true, "file": 8 * file.nbytes / parameters},
        "sizes": file.sizes_by_kind(),
        "config": file.config.to_json(),
        "quantization": file.quantization.to_json(),
        "tokenizer": file.tokenizer_info.to_json(),
        "conversion": file.conversion,
        "tensors": [
            {
                "name": info.name,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "offset": info.offset,
                "bytes": info.nbytes,
                "kind": info.kind,
                "sha256": file.checksums[info.name],
            }
            for info in file.tensors.values()
        ],
    }
    if layers:
        errors = recorded_errors(file.conversion)
        payload["linears"] = [linear_row(file, name, errors.get(name)) for name in linear_names(file.config)]
    return payload


def parameter_count(file: BillmFile) -> int:
    """Return how many parameters the model has: weights, biases and norms; no scales, no rotary frequencies."""
    shapes = file.config.linears()
    linears = file.config.num_hidden_layers * sum(rows * cols for rows, cols, _ in shapes.values())
    counted = ("embedding", "head", "other")
    rest = [info for info in file.tensors.values() if info.kind in counted and info.name.endswith((".weight", ".bias"))]
    table = file.config.vocab_size * file.config.embedding_size  # of 4 bits: the only one whose shape is not its own
    return linears + sum(table if info.dtype == "U8" else prod(info.shape) for info in rest)


def linear_row(file: BillmFile, name: str, error: float | None) -> dict[str, Any]:
    """Return what the planes of one Linear say: the salient part of its columns, the sparse part of the others."""
    packed = file.linear(name)
    return {
        "name": name,
        "rows": packed.rows,
        "cols": packed.cols,
        "block": packed.block,
        "salient": file.salient_fraction(name),
        "sparse": sparse_fraction(packed.second, packed.salient, packed.cols),
        "col_scale": packed.col_scale is not None,
        "error": error,
    }


def sparse_fraction(second: NDArray[np.uint8], salient: NDArray[np.uint8], cols: int) -> float:
    """Return which part of the non-salient weights has its group flag set; 0 if every column is salient.

    `second` uint8 [rows, row bytes] and `salient` uint8 [row bytes] are planes as the file holds them.
    """
    used = np.packbits(np.arange(8 * second.shape[1]) < cols, bitorder="little")
    others = used & ~salient
    weights = len(second) * int(_POPCOUNT[others].sum())
    if not weights:
        return 0.0
    step = max(1, _ROWS_AT_ONCE // second.shape[1])
    flagged = sum(
        int(_POPCOUNT[second[start : start + step] & others].sum(dtype=np.int64))
        for start in range(0, len(second), step)
    )
    return flagged / weights


def recorded_errors(conversion: dict[str, Any]) -> dict[str, float]:
    """Return Linear -> relative output error from the record's `layers`, leaving out what is not of that form."""
    layers = conversion.get("layers")
    rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    return {
        row["name"]: float(row["error"])
        for row in rows
        if isinstance(row.get("name"), str) and type(row.get("error")) in (int, float) and abs(row["error"]) < 1e300
    }
