"""The header of a `.billm` file: parsed and checked whole, before a single number in it is used (SPEC.md, "Reading").

`parse_header` is pure: header bytes and the file's size in, a `Header` or a `CorruptFileError` out. Its work and memory
are bounded by the bytes that it was given, never by a number that they state.
"""

import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from billm_format.config import ModelConfig, Quantization, TokenizerInfo
from billm_format.errors import CorruptFileError
from billm_format.layout import (
    ALIGNMENT,
    DTYPE_BYTES,
    FORMAT_NAME,
    FORMAT_VERSION,
    PAD_PREFIX,
    TensorSpec,
    all_tensors,
    check_linear_names,
)

LENGTH_BYTES = 8  # the safetensors length field: unsigned, little-endian
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_COMMAS = 1 << 21  # above any real header (4,096 layers have 1.6 million); bounds what parsing can allocate
MAX_DEPTH = 16  # of the JSON objects in the metadata

HASH_MARK = b'"header_sha256":"'
HASH_DIGITS = 64

DAMAGED = "the file is damaged: download or convert it again"
NOT_BILLM = "this is not a .billm file: convert a model with billm-convert"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the file states it, checked against the layout."""

    name: str
    dtype: str  # safetensors' name: U8, I8, F16 or F32
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file; a multiple of ALIGNMENT, padding excepted
    nbytes: int
    kind: str  # a key of layout.KINDS


@dataclass(frozen=True)
class Header:
    """Everything that a checked header says."""

    nbytes: int  # length field, JSON and trailing spaces: where the data starts
    version: tuple[int, int]
    config: ModelConfig
    quantization: Quantization
    tokenizer_info: TokenizerInfo
    conversion: dict[str, Any]
    checksums: dict[str, str]
    tensors: dict[str, TensorInfo]  # in the order of their data


def defect(field: str, wanted: str, found: str, advice: str = DAMAGED) -> CorruptFileError:
    """Return the error for one wrong field; the reader puts the file's name in front."""
    # All three may quote the file.
    field, wanted, found = (printable(text) for text in (field, wanted, found))
    return CorruptFileError(f"{field}: wanted {wanted}, found {found}; {advice}")


def printable(text: str, limit: int = 200) -> str:
    """Return `text`, cut at `limit` and free of control characters, for a message or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def header_digest(raw: bytes, mark: int) -> str:
    """Return the sha256 (hex) of the header `raw` with the digits after `mark` (where HASH_MARK starts) as zeros."""
    start = mark + len(HASH_MARK)
    view = memoryview(raw)
    digest = hashlib.sha256(view[:start])
    digest.update(b"0" * HASH_DIGITS)
    digest.update(view[start + HASH_DIGITS :])
    return digest.hexdigest()


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """Check the header JSON `raw` of a file of `file_bytes` bytes and return what it says.

    Raises CorruptFileError (without the file's name) for the first thing that is wrong. No tensor data is looked at.
    """
    stated_hash = _check_hash(raw)
    entries = _json_object(raw, "header")
    metadata = _metadata(entries, hashed=stated_hash is not None)
    if stated_hash is None or metadata.get("header_sha256") != stated_hash:
        raise defect("metadata header_sha256", "64 hexadecimal digits, once", "it missing or not where it should be")
    version = _version(metadata)
    data_start = LENGTH_BYTES + len(raw)
    extents = _extents(entries, data_start, file_bytes)
    config, quantization, tokenizer_info = _records(metadata, version)
    tensors = _match_layout(extents, all_tensors(config, quantization), newer=version > FORMAT_VERSION)
    conversion = _record(metadata, "conversion")
    checksums = _checksums(metadata, tensors)
    return Header(data_start, version, config, quantization, tokenizer_info, conversion, checksums, tensors)


def _check_hash(raw: bytes) -> str | None:
    """Check the header against its own checksum; None when it carries none (then it is no billm 1.x header)."""
    mark = raw.find(HASH_MARK)
    if mark < 0:
        return None
    if raw.find(HASH_MARK, mark + 1) >= 0:
        raise defect("metadata header_sha256", "it once", "it more than once")
    start = mark + len(HASH_MARK)
    stated = raw[start : start + HASH_DIGITS]
    found = header_digest(raw, mark)
    if stated != found.encode():
        raise defect("header", f"sha256 {stated[:12].decode('ascii', 'replace')}...", f"{found[:12]}...")
    return found


def _json_object(text: bytes | str, field: str) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no duplicate key, finite numbers, bounded size and depth."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.count(",") > MAX_COMMAS:
            raise ValueError(f"more than {MAX_COMMAS} values")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
    except RecursionError:
        raise defect(field, "a JSON object", "one nested too deeply") from None
    except ValueError as error:  # also JSONDecodeError and UnicodeError
        raise defect(field, "a JSON object", f"invalid JSON ({printable(str(error))})") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, following in itertools.pairwise(keys) if key == following)
        raise ValueError(f"key {twice!r:.80} twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits:.20}")
    return value


def _record(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Parse one of the records in the metadata, and refuse what could not be printed again."""
    field = f"metadata {key}"
    value = _json_object(_required(metadata, key), field)
    try:
        _check_printable(value, MAX_DEPTH)
    except UnicodeEncodeError:
        raise defect(field, "Unicode text", "a lone surrogate") from None
    return value


def _check_printable(value: object, depth: int) -> None:
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict | list):
        if not depth:
            raise defect("metadata", f"records of up to {MAX_DEPTH} levels", "deeper ones")
        for item in value:  # of a dict: its keys
            _check_printable(item, depth - 1)
            if isinstance(value, dict):
                _check_printable(value[item], depth - 1)


def _metadata(entries: dict[str, Any], *, hashed: bool) -> dict[str, str]:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise defect("__metadata__", "an object", type(metadata).__name__)
    name = metadata.get("format")
    if name != FORMAT_NAME and not hashed:
        raise defect("metadata format", repr(FORMAT_NAME), f"{name!r:.40}: an ordinary safetensors file", NOT_BILLM)
    if name != FORMAT_NAME:
        raise defect("metadata format", repr(FORMAT_NAME), f"{name!r:.40}", NOT_BILLM)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise defect(f"metadata {key!r:.60}", "text", type(value).__name__)
    return metadata


def _required(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise defect(f"metadata {key}", "it to be there", "nothing")
    return metadata[key]


def _version(metadata: dict[str, str]) -> tuple[int, int]:
    text = _required(metadata, "billm_version")
    match = re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", text, re.ASCII)
    if not match:
        raise defect("metadata billm_version", "two numbers, MAJOR.MINOR", f"{text!r:.40}")
    major, minor = int(match[1]), int(match[2])
    if major != FORMAT_VERSION[0]:
        advice = "update billm-rt" if major > FORMAT_VERSION[0] else "convert the model again"
        raise defect("metadata billm_version", f"{FORMAT_VERSION[0]}.x", text, advice)
    return major, minor


def _records(metadata: dict[str, str], version: tuple[int, int]) -> tuple[ModelConfig, Quantization, TokenizerInfo]:
    objects = [_record(metadata, key) for key in ("config", "quantization", "tokenizer")]
    try:
        config = ModelConfig.from_json(objects[0])
        quantization = Quantization.from_json(objects[1])
        check_linear_names(config, quantization)
        return config, quantization, TokenizerInfo.from_json(objects[2])
    except ValueError as error:
        advice = DAMAGED
        if version > FORMAT_VERSION:
            known = ".".join(map(str, FORMAT_VERSION))
            advice = f"the file is of version {version[0]}.{version[1]}, this reader of {known}: update billm-rt"
        raise CorruptFileError(f"metadata {printable(str(error), 300)}; {advice}") from None


@dataclass(frozen=True, slots=True)
class _Extent:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _extents(entries: dict[str, Any], data_start: int, file_bytes: int) -> dict[str, _Extent]:
    """Check form, sizes and places of all tensors: one after the other, from the header's end to the file's."""
    extents = {}
    place = 0
    for name, begin, end, dtype, shape in sorted(_entries(entries), key=operator.itemgetter(1, 2)):
        if begin != place:
            where = "overlapping the tensor before it" if begin < place else "leaving a gap"
            raise defect(f"tensor {name!r:.80}, data_offsets", f"a start at {place}", f"{begin}, {where}")
        place = end
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        if end - begin != size:
            raise defect(f"tensor {name!r:.80}", f"{size} bytes ({dtype} {list(shape)})", f"{end - begin} bytes")
        extents[name] = _Extent(dtype, shape, data_start + begin, size)
    missing = data_start + place - file_bytes
    if missing > 0:
        advice = f"{missing} bytes are missing: download or convert it again"
        raise defect("file size", f"{data_start + place} bytes", f"{file_bytes} bytes", advice)
    if missing < 0:
        raise defect("file size", f"{data_start + place} bytes", f"{file_bytes} bytes, {-missing} too many")
    return extents


def _entries(entries: dict[str, Any]) -> Iterator[tuple[str, int, int, str, tuple[int, ...]]]:
    """Yield (name, begin, end, dtype, shape) of every tensor, with types and bounds checked."""
    for name, entry in entries.items():
        field = f"tensor {name!r:.80}"
        if not name.isascii() or not name.isprintable():
            raise defect(field, "a name of printable ASCII characters", "another one")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise defect(field, "an object with dtype, shape and data_offsets", f"{entry!r:.80}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise defect(f"{field}, dtype", "one of " + ", ".join(DTYPE_BYTES), f"{dtype!r:.40}")
        if not _integers(shape, least=1) or len(shape) > 3:
            raise defect(f"{field}, shape", "up to three sizes of 1 or more", f"{shape!r:.80}")
        if not _integers(offsets, least=0) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise defect(f"{field}, data_offsets", "two places in order", f"{offsets!r:.80}")
        yield name, offsets[0], offsets[1], dtype, tuple(shape)


def _integers(value: object, least: int) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - a plain loop: this runs twice per tensor, and opening must be quick
        if type(item) is not int or not least <= item < 1 << 62:
            return False
    return True


def _match_layout(extents: dict[str, _Extent], layout: Iterator[TensorSpec], *, newer: bool) -> dict[str, TensorInfo]:
    """Check that the tensors are exactly those of the layout, plus padding; in a newer minor version also unknown ones.

    The layout is an iterator on purpose: a config that promises a million tensors costs no more than the file holds.
    """
    left = dict(extents)
    tensors: dict[str, TensorInfo] = {}
    for spec in layout:
        found = left.pop(spec.name, None)
        if found is None:
            if spec.optional:
                continue
            raise defect(f"tensor {spec.name}", f"{spec.dtype} {list(spec.shape)}", "no such tensor")
        if found.dtype != spec.dtype or not _same_shape(found.shape, spec.shape):
            raise defect(
                f"tensor {spec.name}", f"{spec.dtype} {_shape(spec.shape)}", f"{found.dtype} {_shape(found.shape)}"
            )
        tensors[spec.name] = _info(spec.name, found, spec.kind)
    for name, found in left.items():
        if _PAD.fullmatch(name):
            if found.dtype != "U8" or len(found.shape) != 1 or not 0 < found.nbytes < ALIGNMENT:
                raise defect(
                    f"tensor {name!r:.80}", f"U8 [1 to {ALIGNMENT - 1}]", f"{found.dtype} {_shape(found.shape)}"
                )
            tensors[name] = _info(name, found, "padding")
        elif newer:
            tensors[name] = _info(name, found, "other")
        else:
            raise defect(f"tensor {name!r:.80}", "no such tensor for this config", "one")
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


_PAD = re.compile(re.escape(PAD_PREFIX) + r"[0-9]{1,9}", re.ASCII)


def _same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(w in (f, -1) for f, w in zip(found, wanted, strict=True))


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"


def _info(name: str, extent: _Extent, kind: str) -> TensorInfo:
    if kind != "padding" and extent.offset % ALIGNMENT:
        raise defect(f"tensor {name!r:.80}", f"data at a multiple of {ALIGNMENT}", f"data at byte {extent.offset}")
    return TensorInfo(name, extent.dtype, extent.shape, extent.offset, extent.nbytes, kind)


def _checksums(metadata: dict[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    checksums = _json_object(_required(metadata, "checksums"), "metadata checksums")
    if checksums.keys() != tensors.keys():
        name = min(checksums.keys() ^ tensors.keys())
        found = "one for no tensor" if name in checksums else "none"
        raise defect(f"metadata checksums, {name!r:.80}", "one checksum for every tensor", found)
    for name, digits in checksums.items():
        if not isinstance(digits, str) or not _HEX.fullmatch(digits):
            raise defect(f"metadata checksums, {name!r:.80}", "64 hexadecimal digits", f"{digits!r:.80}")
    return checksums


_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
