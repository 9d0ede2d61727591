"""Tables that are not binarized, as the file stores them: 4 bits, 8-bit rows with a scale each, or float16."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.source import ModelSource
from billm_format.errors import UsageError
from billm_format.packing import Table

_CHUNK_VALUES = 1 << 24  # values held in float32 at once: 64 MB


def to_float16(name: str, value: Tensor) -> NDArray[np.float16]:
    """Round to float16; UsageError when a value is beyond its range."""
    out = value.to(torch.float16)
    if not torch.isfinite(out).all():
        raise UsageError(f"tensor {name} holds values up to {float(value.abs().max()):g}, beyond float16's 65504")
    array: NDArray[np.float16] = out.numpy()
    return array


def quantize_rows(value: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantize float32 [rows, cols] to codes int8 -127..127, same shape, and scales float16 [rows].

    The scale is rounded up, so that the largest value of a row never needs a code of 128.
    """
    exact = value.abs().amax(dim=1).numpy() / np.float32(127)
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    scale[exact == 0] = 1
    if not np.isfinite(scale).all():
        raise UsageError(
            f"an embedding holds values up to {float(value.abs().max()):g}, too large for 8 bits with a float16 scale"
        )
    codes = torch.round(value / torch.from_numpy(scale.astype(np.float32))[:, None])
    return codes.to(torch.int8).numpy(), scale


class EmbeddingTable:
    """The token embedding or the output head `name`, quantized chunk by chunk, so that it is never whole in float32."""

    def __init__(self, source: ModelSource, name: str, bits: int, solved: Table | None = None) -> None:
        """Nothing is read yet. At 4 bits, `solved` is what `solve_table` made of it."""
        self._source = source
        self._name = f"{name}.weight"
        self._bits = bits
        self._solved = solved
        self._rows, self._cols = source.shape(self._name)

    def tensors(self) -> dict[str, Callable[[], NDArray[Any]]]:
        """Return what makes each of the file's tensors, by full name."""
        if self._solved is not None:
            parts: dict[str, Callable[[], NDArray[Any]]] = {
                part: partial(getattr, self._solved, part) for part in ("weight", "step", "scale")
            }
        else:
            parts = {"weight": self.weight} | ({"scale": self.scale} if self._bits == 8 else {})
        return {f"{self._name.removesuffix('weight')}{part}": make for part, make in parts.items()}

    def dequantized(self) -> Tensor:
        """Return the table as the file will give it, float32 [rows, cols]."""
        return self.lookup(torch.arange(self._rows))

    def weight(self) -> NDArray[Any]:
        """Return the table as stored at 8 or 16 bits: int8 or float16 [rows, cols]."""
        out: NDArray[Any] = np.empty((self._rows, self._cols), np.int8 if self._bits == 8 else np.float16)
        for start, chunk in self._chunks():
            stop = start + chunk.shape[0]
            out[start:stop] = quantize_rows(chunk)[0] if self._bits == 8 else to_float16(self._name, chunk)
        return out

    def scale(self) -> NDArray[np.float16]:
        """Return the scales float16 [rows]."""
        return np.concatenate([quantize_rows(chunk)[1] for _, chunk in self._chunks()])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the rows of `tokens` [...] as the file will give them, float32 [..., cols]."""
        if self._solved is not None:
            return torch.from_numpy(self._solved.take(tokens.flatten().numpy())).view(*tokens.shape, self._cols)
        wanted, where = torch.unique(tokens, return_inverse=True)
        rows = torch.empty(wanted.shape[0], self._cols)
        for start, chunk in self._chunks():
            here = (wanted >= start) & (wanted < start + chunk.shape[0])
            picked = chunk[wanted[here] - start]
            if self._bits == 8:
                codes, scale = quantize_rows(picked)
                rows[here] = torch.from_numpy(codes * scale.astype(np.float32)[:, None])
            else:
                rows[here] = torch.from_numpy(to_float16(self._name, picked).astype(np.float32))
        return rows[where]

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _CHUNK_VALUES // self._cols)
        for start in range(0, self._rows, step):
            yield start, self._source.tensor(self._name, start, start + step)
