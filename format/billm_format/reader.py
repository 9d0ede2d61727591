"""Open a `.billm` file: checked before use, memory-mapped, nothing copied (SPEC.md, "Reading")."""

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig, Quantization, TokenizerInfo
from billm_format.errors import CorruptFileError, UsageError
from billm_format.header import (
    DAMAGED,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    NOT_BILLM,
    Header,
    TensorInfo,
    defect,
    parse_header,
)
from billm_format.layout import CHAT_TEMPLATE, GROUP, KINDS, LINEAR_KINDS, TOKENIZER, linear_names
from billm_format.packing import PackedLinear, Table, unpack_bits, unpack_nibbles

# Little-endian by name: the bytes on disk never depend on the machine.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

_CHUNK = 1 << 22  # bytes hashed between two calls of `progress`

# What people save under the wrong name: the first bytes, and what to call it.
_STRANGERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive (perhaps a PyTorch checkpoint)",
    b"\x80": "a Python pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy array",
    b"<": "an HTML or XML page (perhaps an error page of the download)",
    b"{": "a JSON text",
    b"version https://git-lfs": "a Git LFS pointer: the real file was not downloaded",
}

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class BillmFile:
    """A checked, memory-mapped `.billm` file; a context manager.

    `array` and `linear` return read-only views of the map, which stay valid after `close`. The file must not be
    changed or shortened in place while it is open (the writer never does: it renames a new file over the old one).
    """

    def __init__(self, path: Path, header: Header, mapped: mmap.mmap) -> None:
        """Use `BillmFile.open`."""
        self.path = path
        self.nbytes = len(mapped)
        self.header_bytes = header.nbytes
        self.version = header.version
        self.config: ModelConfig = header.config
        self.quantization: Quantization = header.quantization
        self.tokenizer_info: TokenizerInfo = header.tokenizer_info
        self.conversion: dict[str, Any] = header.conversion
        self.checksums: Mapping[str, str] = header.checksums
        self.tensors: Mapping[str, TensorInfo] = header.tensors  # in the order of their data, padding included
        self._mapped = mapped
        self._finite: set[str] = set()  # tensors whose values have been looked at

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "BillmFile":
        """Open and check the file at `path`; tensor data is neither read nor hashed.

        Raises UsageError where there is no readable file, CorruptFileError where it is not a whole, valid one.
        """
        path = Path(path)
        try:
            # Asked of the path first: opening a named pipe would wait for a writer.
            if not stat.S_ISREG(path.stat().st_mode):
                what = "a directory, not a file: give a .billm file" if path.is_dir() else "not a regular file"
                raise UsageError(f"{path}: {what} (billm-convert makes one from a Hugging Face model directory)")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = parse_header(_header_bytes(file.read, size), size)
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except RecursionError:
            raise CorruptFileError(f"{path}: {defect('header', 'flat JSON', 'JSON nested too deeply')}") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        except CorruptFileError as error:
            raise CorruptFileError(f"{path}: {error}") from None
        return cls(path, header, mapped)

    def __enter__(self) -> "BillmFile":
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Let go of the map; it lives on as long as arrays made from it do."""
        with contextlib.suppress(BufferError):  # views are alive: the last one to go unmaps the file
            self._mapped.close()

    def let_go(self) -> None:
        """Take the pages that were read out of the process's memory: the next read maps them again, from the cache."""
        if hasattr(self._mapped, "madvise"):  # not on Windows
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def array(self, name: str) -> NDArray[Any]:
        """Return the tensor as a read-only view of the map, in its own dtype and shape.

        Vectors of floats are checked to be finite, once; matrices are left to `verify`. Raises KeyError for a name
        that the file does not have, CorruptFileError for a vector with an infinity or a NaN.
        """
        view = self._view(name)
        if view.dtype.kind == "f" and view.ndim == 1 and name not in self._finite:
            self._check_finite(name, view)
            self._finite.add(name)
        return view

    def _view(self, name: str) -> NDArray[Any]:
        info = self.tensors[name]
        dtype = NUMPY_DTYPES[info.dtype]
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._mapped, dtype, count, info.offset).reshape(info.shape)

    def linear(self, name: str) -> PackedLinear:
        """Return the binarized Linear with this full name, e.g. "layers.0.q_proj"; KeyError if there is none."""
        rows, cols, has_bias = self.config.linears()[name.rpartition(".")[2]]
        return PackedLinear(
            rows=rows,
            cols=cols,
            block=self.quantization.block_of(name),
            sign=self.array(f"{name}.sign"),
            second=self.array(f"{name}.second"),
            salient=self.array(f"{name}.salient"),
            scales=self.array(f"{name}.scales"),
            row_scale=self.array(f"{name}.row_scale"),
            col_scale=self.array(f"{name}.col_scale") if self.quantization.has_col_scale(name) else None,
            bias=self.array(f"{name}.bias") if has_bias else None,
        )

    def table(self, name: str) -> Table:
        """Return "embed", "head" or "pos_embed"; KeyError if the file has none of that name."""
        weight, step, scale = (f"{name}.{part}" for part in ("weight", "step", "scale"))
        return Table(
            weight=self.array(weight),
            cols=self.config.hidden_size if name == "pos_embed" else self.config.embedding_size,
            scale=self.array(scale) if scale in self.tensors else None,
            step=self.array(step) if step in self.tensors else None,
        )

    def tokenizer_json(self) -> str:
        """Return the text of tokenizer.json; CorruptFileError unless it is UTF-8."""
        return self._text(TOKENIZER)

    def chat_template(self) -> str | None:
        """Return the Jinja text of the chat template, None where the model has none."""
        return self._text(CHAT_TEMPLATE) if CHAT_TEMPLATE in self.tensors else None

    def _text(self, name: str) -> str:
        try:
            return self._view(name).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._defect(name, "UTF-8 text", f"byte {error.start} that is none") from None

    def salient_fraction(self, linear: str) -> float:
        """Return which part of the Linear's columns is salient (the same part of its weights)."""
        cols = self.config.linears()[linear.rpartition(".")[2]][1]
        return int(np.count_nonzero(unpack_bits(self._view(f"{linear}.salient"), cols))) / cols

    def bits(self) -> tuple[float, float]:
        """Return the bits per weight over all binarized Linears: (the paper's, the true ones).

        The paper's is N_param of Eq. 14, 1 + the salient part of the weights; the true ones are the bytes of all
        planes, indices and scales times 8 over the number of weights.
        """
        shapes = self.config.linears()
        weights, salient = 0, 0.0
        for name in linear_names(self.config):
            rows, cols, _ = shapes[name.rpartition(".")[2]]
            weights += rows * cols
            salient += rows * cols * self.salient_fraction(name)
        stored = sum(info.nbytes for info in self.tensors.values() if info.kind in LINEAR_KINDS)
        return 1 + salient / weights, 8 * stored / weights

    def sizes_by_kind(self) -> dict[str, int]:
        """Return kind -> bytes for every key of layout.KINDS, and "header"; the sum is the size of the file."""
        sizes = dict.fromkeys(KINDS, 0) | {"header": self.header_bytes}
        for info in self.tensors.values():
            sizes[info.kind] += info.nbytes
        return sizes

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every tensor and look at every value that must not be just anything; reads the whole file.

        Raises CorruptFileError naming every tensor that does not match its checksum, else the first one whose values
        SPEC.md forbids: infinities and NaN, set bits or bytes in padding, texts that are not UTF-8.
        """
        bad = []
        done, total = 0, self.nbytes - self.header_bytes
        for info in self.tensors.values():
            digest = hashlib.sha256()
            data = memoryview(self._mapped)[info.offset : info.offset + info.nbytes]
            for start in range(0, info.nbytes, _CHUNK):
                part = data[start : start + _CHUNK]
                digest.update(part)
                done += len(part)
                if progress is not None:
                    progress(done, total)
            if digest.hexdigest() != self.checksums[info.name]:
                bad.append(info.name)
        if bad:
            raise CorruptFileError(
                f"{self.path}: {len(bad)} of {len(self.tensors)} tensors do not match their checksums: "
                f"{', '.join(bad)}; {DAMAGED}"
            )
        for info in self.tensors.values():
            self._check_values(info)

    def _check_values(self, info: TensorInfo) -> None:
        view = self._view(info.name)
        if info.dtype in ("F16", "F32"):
            for rows in _slices(view):
                self._check_finite(info.name, rows)
        elif info.kind == "padding":
            if view.any():
                raise self._defect(info.name, "zeros", "another byte")
        elif info.kind == "tokenizer":
            self._text(info.name)
        elif info.kind in ("sign", "second", "salient"):
            self._check_plane(info.name, view)
        elif info.kind in ("embedding", "head") and info.dtype == "U8":
            self._check_codes(info.name, view)

    def _check_plane(self, name: str, plane: NDArray[np.uint8]) -> None:
        cols = self.config.linears()[name.split(".")[2]][1]
        tail = plane[..., cols // 8 :]  # from the byte with the first unused bit
        if tail.shape[-1] and ((tail[..., 0] >> cols % 8).any() or tail[..., 1:].any()):
            raise self._defect(name, f"zeros after column {cols - 1}", "a set bit")

    def _check_codes(self, name: str, codes: NDArray[np.uint8]) -> None:
        cols = self.config.embedding_size
        last = unpack_nibbles(codes[:, -GROUP // 2 :], GROUP)
        if cols % GROUP and last[:, cols % GROUP :].any():
            raise self._defect(name, f"zeros after column {cols - 1}", "another code")

    def _check_finite(self, name: str, values: NDArray[Any]) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise self._defect(name, "finite numbers", f"{values[~finite].flat[0]}")

    def _defect(self, tensor: str, wanted: str, found: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: {defect(f'tensor {tensor}', wanted, found)}")


def _slices(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut a tensor into pieces of some megabytes, so that temporaries stay small."""
    step = max(1, _CHUNK * len(values) // max(1, values.nbytes))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _header_bytes(read: Callable[[int], bytes], size: int) -> bytes:
    """Read the header's JSON from the start of a file of `size` bytes, its length checked first."""
    if not size:
        raise defect("file size", "a .billm file", "0 bytes: the file is empty", "download or convert it again")
    head = read(LENGTH_BYTES + 1)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    room = size - LENGTH_BYTES
    plausible = head[LENGTH_BYTES:] == b"{" and 2 <= length <= MAX_HEADER_BYTES
    if not plausible:
        text = head.lstrip()
        stranger = next((what for start, what in _STRANGERS.items() if text.startswith(start[:9])), None)
        if stranger is None and size < LENGTH_BYTES + 2:
            raise defect("file size", "at least 10 bytes", f"{size} bytes", "the file is cut off: download it again")
        found = stranger or f"a length of {length} and {head[LENGTH_BYTES:]!r}"
        raise defect("header", f"a length of 2 to {MAX_HEADER_BYTES} and a JSON object", found, NOT_BILLM)
    if length > room:
        advice = f"at least {length - room} bytes are missing: download or convert it again"
        raise defect("header", f"{length} bytes", f"{room} bytes before the end of the file", advice)
    raw = head[LENGTH_BYTES:] + read(length - 1)
    if len(raw) != length:
        raise defect("header", f"{length} bytes", f"{len(raw)} bytes: the file was shortened while it was read")
    return raw
