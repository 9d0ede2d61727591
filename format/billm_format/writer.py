"""Write a `.billm` file: one tensor in memory at a time, never half a file at the final name (SPEC.md, "Writing")."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from billm_format.config import ModelConfig, Quantization, TokenizerInfo
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.header import HASH_DIGITS, HASH_MARK, LENGTH_BYTES, header_digest, parse_header
from billm_format.layout import (
    ALIGNMENT,
    FORMAT_NAME,
    FORMAT_VERSION,
    PAD_PREFIX,
    TensorSpec,
    all_tensors,
    check_linear_names,
)
from billm_format.reader import NUMPY_DTYPES, Progress

Source = Callable[[], NDArray[Any]] | bytes

_NO_DIGEST = "0" * HASH_DIGITS  # stands in the header until the data is written: same length, so nothing moves


def write_file(
    path: str | os.PathLike[str],
    *,
    config: ModelConfig,
    quantization: Quantization,
    tokenizer_info: TokenizerInfo,
    conversion: Mapping[str, Any],
    tensors: Mapping[str, Source],
    progress: Progress | None = None,
) -> int:
    """Write the file and return its size in bytes; the same input gives the same bytes.

    `tensors` maps every name of `layout.all_tensors` to a function that returns the array (called once, in file
    order, so only one array is alive at a time) or to bytes; `chat_template.jinja` may be left out. `conversion` is a
    JSON object of finite values. `progress` is called with (bytes of data written, bytes of data in all).

    Until the last step everything is in `path` + ".tmp", which is removed if anything fails. Raises ValueError for a
    missing or unknown name, a wrong dtype or shape; UsageError for a place that cannot be written; DoesNotFitError
    for a full disk.
    """
    path = Path(path)
    specs = _specs(config, quantization, tensors)
    metadata = {
        "format": FORMAT_NAME,
        "billm_version": ".".join(map(str, FORMAT_VERSION)),
        "config": _json(config.to_json()),
        "quantization": _json(quantization.to_json()),
        "tokenizer": _json(tokenizer_info.to_json()),
        "conversion": _json(dict(conversion)),
    }
    header = _header(specs, metadata, dict.fromkeys((spec.name for spec in specs), _NO_DIGEST))
    total = sum(spec.nbytes for spec in specs)
    _parse_own(header, total)
    with _temporary(path, len(header) + total) as file:
        file.write(header)
        checksums = _write_data(file, specs, tensors, progress, total)
        final = _header(specs, metadata, checksums)
        _parse_own(final, total)
        file.seek(0)
        file.write(final)
    return len(header) + total


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _specs(config: ModelConfig, quantization: Quantization, tensors: Mapping[str, Source]) -> list[TensorSpec]:
    """Return all tensors with their final shapes, padding included, in file order."""
    check_linear_names(config, quantization)
    specs: list[TensorSpec] = []
    unknown = set(tensors)
    pads = 0
    for spec in all_tensors(config, quantization):
        if spec.name not in tensors:
            if spec.optional:
                continue
            raise ValueError(f"tensor {spec.name}: wanted {spec.dtype} {list(spec.shape)}, found no such tensor")
        unknown.discard(spec.name)
        if -1 in spec.shape:
            spec = TensorSpec(spec.name, spec.dtype, (_length(spec.name, tensors[spec.name]),), spec.kind)
        specs.append(spec)
        if missing := -spec.nbytes % ALIGNMENT:
            specs.append(TensorSpec(f"{PAD_PREFIX}{pads}", "U8", (missing,), "padding"))
            pads += 1
    if unknown:
        raise ValueError(f"tensor {min(unknown)}: this config has no such tensor")
    if specs[-1].kind == "padding":  # nothing follows that would need it
        specs.pop()
    return specs


def _length(name: str, source: Source) -> int:
    """Return the length of a text, which the layout leaves free; texts are small, so asking for it twice is cheap."""
    length = len(source if isinstance(source, bytes) else source())
    if not length:
        raise ValueError(f"tensor {name}: wanted at least one byte, found none")
    return length


def _header(specs: list[TensorSpec], metadata: Mapping[str, str], checksums: Mapping[str, str]) -> bytes:
    """Return length field and header JSON; its length does not depend on the checksums' digits."""
    texts = {**metadata, "checksums": _json(checksums), "header_sha256": _NO_DIGEST}
    entries: dict[str, Any] = {"__metadata__": texts}
    place = 0
    for spec in specs:
        offsets = [place, place + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        place += spec.nbytes
    raw = _json(entries).encode("ascii")
    raw += b" " * (-(LENGTH_BYTES + len(raw)) % ALIGNMENT)
    mark = raw.index(HASH_MARK)
    start = mark + len(HASH_MARK)
    raw = raw[:start] + header_digest(raw, mark).encode("ascii") + raw[start + HASH_DIGITS :]
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _parse_own(header: bytes, data_bytes: int) -> None:
    """Read the header back as a reader will: what it would refuse must not be written."""
    parse_header(header[LENGTH_BYTES:], len(header) + data_bytes)


def _write_data(
    file: IO[bytes], specs: list[TensorSpec], tensors: Mapping[str, Source], progress: Progress | None, total: int
) -> dict[str, str]:
    """Write every tensor after the one before; return their checksums."""
    checksums = {}
    done = 0
    for spec in specs:
        data = bytes(spec.nbytes) if spec.kind == "padding" else _data(spec, tensors[spec.name])
        checksums[spec.name] = hashlib.sha256(data).hexdigest()
        file.write(data)
        del data  # or it would still be there while the next one is made
        done += spec.nbytes
        if progress is not None:
            progress(done, total)
    return checksums


def _data(spec: TensorSpec, source: Source) -> bytes | memoryview:
    """Return the tensor's bytes, or refuse an array that is not what the layout says."""
    array = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else source()
    wanted = NUMPY_DTYPES[spec.dtype]
    if array.dtype.newbyteorder("<") != wanted or array.shape != spec.shape:
        raise ValueError(
            f"tensor {spec.name}: wanted {spec.dtype} {list(spec.shape)}, found {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array, wanted).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _temporary(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Yield a file beside `path` that takes its name if the block ends well, and vanishes if it does not."""
    if path.is_dir():
        raise UsageError(f"{path}: is a directory; give the name of a file to write")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    temporary = path.with_name(path.name + ".tmp")
    with _claim(temporary) as file:
        try:
            _check_space(path, size)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _explained(path, size, error) from error
        except BaseException:  # Ctrl-C too: whatever it was, leave nothing behind
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _claim(temporary: Path) -> IO[bytes]:
    """Open the temporary file for this process alone, emptied of what a killed one may have left."""
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"{temporary}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(f"{temporary}: another process is writing it; wait for it or choose another name") from None
    os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "w+b")


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DoesNotFitError(f"{path}: wanted {size} bytes of disk, found {free} free; free some or write elsewhere")


def _explained(path: Path, size: int, error: OSError) -> Exception:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DoesNotFitError(f"{path}: {error.strerror} while writing {size} bytes; free some or write elsewhere")
    return error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
