"""Binarized Linears on the device: planes as they lie in the file, multiplied by few rows or by many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.errors import UsageError
from billm_format.layout import row_bytes
from billm_format.packing import PackedLinear
from billm_rt.cuda import launch
from billm_rt.cuda.device import Device
from billm_rt.cuda.launch import LINEAR, Dtype, GemvShape, Size

_TENSORS = ("sign", "second", "salient", "scales", "row_scale", "col_scale", "bias")
# The kernels count the words of a plane with 32 bits.
_MOST_WORDS = 1 << 31


@dataclass(frozen=True, eq=False)
class _Part:
    """Linears of one block size: one launch."""

    block: int
    members: list[tuple[PackedLinear, int, Any]]  # (Linear, its first row in the output, its col_scale on the device)
    descriptors: Any  # LINEAR [members] as bytes on the device
    ctas: int
    tiles: int  # of the busiest thread block


class LinearGroup:
    """Linears that read the same input; their outputs lie side by side, [tokens, rows of all]."""

    def __init__(self, device: Device, linears: Sequence[PackedLinear]) -> None:
        self.cols = linears[0].cols
        self.rows = sum(linear.rows for linear in linears)
        self._device = device
        self._tensors: list[Any] = []  # what the descriptors point at
        starts = np.cumsum([0] + [linear.rows for linear in linears]).tolist()
        placed = list(zip(linears, starts, strict=False))
        blocks = dict.fromkeys(linear.block for linear in linears)
        self._parts = [self._part([pair for pair in placed if pair[0].block == block]) for block in blocks]

    def _part(self, placed: list[tuple[PackedLinear, int]]) -> _Part:
        descriptors = np.zeros(len(placed), LINEAR)
        rows = [linear.rows for linear, _ in placed]
        ctas = launch.thread_blocks(rows, self._device.multiprocessors)
        members = []
        for entry, (linear, first_row), count, first_cta in zip(
            descriptors, placed, ctas, np.cumsum([0, *ctas]).tolist(), strict=False
        ):
            if linear.rows * (row_bytes(linear.cols) // 4) > _MOST_WORDS:
                raise UsageError(f"a Linear of {linear.rows} x {linear.cols} is too large for the GPU back end")
            tensors = {name: self._load(getattr(linear, name)) for name in _TENSORS}
            for name, tensor in tensors.items():
                entry[name] = 0 if tensor is None else self._device.pointer(tensor)
            entry["rows"], entry["cols"], entry["first_row"] = linear.rows, linear.cols, first_row
            entry["first_cta"], entry["ctas"] = first_cta, count
            members.append((linear, first_row, tensors["col_scale"]))
        tiles = max(
            launch.ceil_div(launch.ceil_div(n, launch.TILE_ROWS), count) for n, count in zip(rows, ctas, strict=True)
        )
        uploaded = self._device.upload(descriptors.view(np.uint8))
        return _Part(placed[0][0].block, members, uploaded, sum(ctas), tiles)

    def _load(self, array: NDArray[Any] | None) -> Any:
        if array is None:
            return None
        self._tensors.append(self._device.upload(array))
        return self._tensors[-1]

    def multiply(self, x: Any, dtype: Dtype = Dtype.FLOAT32, out: Any = None) -> Any:
        """Return W x + bias of all Linears [tokens, rows], in `out` if given; x [tokens, cols], contiguous.

        Both of one dtype; bfloat16 goes in and out as uint16. Float32 sums; a float32 x counts with 22 bits for few
        tokens, with 11 for many.
        """
        if out is None:
            out = self._device.empty((x.shape[0], self.rows), x.dtype)
        for part in self._parts:
            if x.shape[0] < launch.DENSE_TOKENS:
                self._multiply_few(part, x, out, dtype)
            else:
                self._multiply_many(part, x, out, dtype)
        return out

    def _multiply_few(self, part: _Part, x: Any, out: Any, dtype: Dtype) -> None:
        split = 2 if dtype == Dtype.FLOAT32 else 1
        for start, shape in _launches(x.shape[0], split, part.block):
            limit = self._device.shared_per_multiprocessor // shape.resident - 1024  # a KiB is the system's
            plan = launch.gemv_plan(shape, self.cols, part.tiles, limit)
            tokens = min(shape.rows, x.shape[0] - start)
            numbers = (tokens, self.rows, dtype, plan.chunk_words, plan.slices)
            size = Size((part.ctas, 1, 1), launch.GEMV_THREADS, plan.shared)
            arrays = (part.descriptors, x[start : start + tokens], out[start : start + tokens])
            self._device.launch(shape.kernel, size, *arrays, *map(np.int32, numbers))

    def _multiply_many(self, part: _Part, x: Any, out: Any, dtype: Dtype) -> None:
        device, tokens, cols = self._device, x.shape[0], self.cols
        width = launch.scratch_width(cols)
        rounded, undo = device.empty((tokens, width), np.float16), device.empty((tokens,), np.float32)
        for index, (linear, _, col_scale) in enumerate(part.members):
            numbers = map(np.int32, (cols, width, dtype))
            device.launch(launch.ROUND_ROWS, launch.per_token(tokens), x, col_scale, rounded, undo, *numbers)
            descriptor = part.descriptors[index * LINEAR.itemsize :]
            most = launch.scratch_rows(cols, linear.rows)
            levels = device.empty((most, width), np.float16)
            products = device.empty((tokens, most), np.float32)
            for first in range(0, linear.rows, most):
                rows = min(most, linear.rows - first)
                threads = launch.per_element(rows * width // 8)
                numbers = map(np.int32, (first, rows, width, part.block))
                device.launch(launch.UNPACK, threads, descriptor, levels, *numbers)
                product = products.reshape(-1)[: tokens * rows].reshape(tokens, rows)
                device.multiply_halves(rounded, levels[:rows], product)
                numbers = map(np.int32, (first, rows, self.rows, dtype))
                size = launch.per_column(rows, tokens)
                device.launch(launch.SCALE_PRODUCTS, size, descriptor, product, undo, out, *numbers)


def _launches(tokens: int, split: int, block: int) -> Iterator[tuple[int, GemvShape]]:
    """Yield (first token, shape) until every token has its launch."""
    start = 0
    while start < tokens:
        shape = launch.gemv_shape(tokens - start, split, block)
        yield start, shape
        start += shape.rows
