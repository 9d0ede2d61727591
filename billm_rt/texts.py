"""Calibration and test texts: by name (WikiText-2, PTB, C4, ...), from a file, or from Python's own documentation.

The rows and the joining are those of the paper's code, because perplexities of differently joined texts do not compare:
WikiText-2 test rows are joined by a blank line, everything else by a space.
"""

import gzip
import hashlib
import importlib
import json
import os
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from billm_format.errors import UsageError

Split = Literal["train", "validation", "test"]

NAMES = ("wikitext2", "ptb", "c4", "openwebtext", "pydoc")
DATA_VARIABLE = "BILLM_DATA"

C4_TEST_DOCUMENTS = 1100  # of the validation split: what the paper's code tests on
C4_TRAIN_DOCUMENTS = 20_000  # of train shard 0, through `datasets`: the whole shard would take a gigabyte of memory


@dataclass(frozen=True)
class Text:
    """A text as documents (rows, articles) and the string that joins them."""

    name: str  # what was used, honestly: "C4 validation, first 200 documents"
    documents: tuple[str, ...]
    joiner: str

    @cached_property
    def joined(self) -> str:
        """The whole text as it is tokenized."""
        return self.joiner.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 bytes of `joined`."""
        return hashlib.sha256(self.joined.encode()).hexdigest()


def load(name_or_path: str, split: Split) -> Text:
    """Return the named set's split, or the file at the path (a file has no splits: all of it, whatever `split` says).

    Names: wikitext2, ptb, c4, openwebtext (train only) from the folder that the environment variable BILLM_DATA
    names, else through the `datasets` library; pydoc (train and test) from the Python that runs. For C4 "test" means
    the head of the validation split, as in the paper's code. Files: JSON lines (`.jsonl`: field `text`) or plain
    text, gzipped or not. Raises UsageError when the text cannot be had or is empty.
    """
    if name_or_path == "pydoc":
        text = _pydoc(split)
    elif name_or_path in NAMES:
        text = _named(name_or_path, split)
    else:
        text = _from_file(Path(name_or_path))
    if not text.joined.strip():
        raise UsageError(f"{name_or_path}: the text is empty")
    return text


_Ids = TypeVar("_Ids", bound=Any)
_Row = TypeVar("_Row")


def windows(token_ids: _Ids, seqlen: int, limit: int | None = None) -> list[_Ids]:
    """Cut tokens into windows of `seqlen` that do not overlap, at most `limit` of them; the tail is dropped."""
    count = len(token_ids) // seqlen
    if limit is not None:
        count = min(count, limit)
    return [token_ids[i * seqlen : (i + 1) * seqlen] for i in range(count)]


# --- by name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where one split of one set comes from: candidate files in the data folder, else a call of `datasets`."""

    title: str
    joiner: str
    files: tuple[tuple[str, str], ...]  # (path below the data folder without .gz, remark on its extent with {n})
    row: Callable[[str], str]  # line of the file -> row of the data set
    hub: tuple[str, ...]  # positional arguments of datasets.load_dataset
    hub_options: dict[str, Any]
    column: str = "text"
    limit: int | None = None


def _wikitext_row(line: str) -> str:
    return line if line.strip() else ""  # the file's " \n" is the empty string in the data set


def _jsonl_text(line: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('wanted a JSON object with the text in the field "text"')
    return str(record["text"])


def _source(name: str, split: Split) -> _Source | None:
    """Return the source of a named split; None: the set has no such split."""
    options: dict[str, Any] = {"split": split}
    if name == "wikitext2":
        files = [(f"wikitext2/{split}.txt", "")]
        if split == "train":
            files.append(("wikitext2/train-head.txt", ", first {n} rows"))
        joiner = "\n\n" if split == "test" else " "
        hub = ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return _Source(f"WikiText-2 {split}", joiner, tuple(files), _wikitext_row, hub, options)
    if name == "ptb":
        hub = ("ptb-text-only/ptb_text_only", "penn_treebank")
        return _Source(f"PTB {split}", " ", ((f"ptb/{split}.txt", ""),), str.strip, hub, options, column="sentence")
    if name == "c4":
        train = split == "train"
        part, shards = ("train", "01024") if train else ("validation", "00008")
        options = {"data_files": {part: f"en/c4-{part}.00000-of-{shards}.json.gz"}, "split": part, "streaming": True}
        file = (f"c4/{part}.jsonl", ", {n} documents" if train else ", first {n} documents")
        limit = C4_TRAIN_DOCUMENTS if train else C4_TEST_DOCUMENTS
        return _Source(f"C4 {part}", " ", (file,), _jsonl_text, ("allenai/c4",), options, limit=limit)
    if name == "openwebtext" and split == "train":
        file = ("openwebtext/sample.jsonl", ", {n} documents")
        return _Source("OpenWebText", " ", (file,), _jsonl_text, ("stas/openwebtext-10k",), options)
    return None


def _named(name: str, split: Split) -> Text:
    source = _source(name, split)
    if source is None:
        raise UsageError(f"{name} has no {split} split; it has: train")
    for stem, remark in source.files:
        if path := data_file(stem):
            rows = tuple(islice(read_rows(path, source.row), source.limit))
            return Text(source.title + remark.format(n=f"{len(rows):,}"), rows, source.joiner)
    instead = f", or give a text file or pydoc instead of {name}"
    loaded = hub_rows(source.title, source.files[0][0], source.hub, source.hub_options, instead)
    rows = tuple(str(row[source.column]) for row in islice(loaded, source.limit))
    remark = f", first {len(rows):,} documents" if source.limit else ""
    return Text(source.title + remark, rows, source.joiner)


def data_file(stem: str) -> Path | None:
    """Return the file `stem`, gzipped or not, in the folder that BILLM_DATA names, None where it is not there."""
    folder = os.environ.get(DATA_VARIABLE)
    candidates = (Path(folder, stem + ".gz"), Path(folder, stem)) if folder else ()
    return next((path for path in candidates if path.is_file()), None)


def hub_rows(
    title: str, stem: str, hub: tuple[str, ...], options: dict[str, Any], instead: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the rows that `datasets.load_dataset(*hub, **options)` gives, for want of the file `stem`.

    Raises UsageError naming both ways to have them, and `instead`, a third.
    """
    folder, first = os.environ.get(DATA_VARIABLE), stem + ".gz"
    by_folder = f"put {first} in the folder that the environment variable {DATA_VARIABLE} names"
    found = f"{DATA_VARIABLE}={folder} has no {first}" if folder else f"{DATA_VARIABLE} is not set"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(
            f"{title} is not at hand ({found}, and the `datasets` library is not installed): {by_folder}, "
            f"or `pip install datasets`{instead}"
        ) from None
    try:
        yield from datasets.load_dataset(*hub, **options)
    except Exception as error:  # whatever a hub, a network or a loading script can throw
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{title} could not be loaded through `datasets` ({type(error).__name__}: {reason}) and {found}: "
            f"{by_folder}{instead}"
        ) from error


# --- from a file ---------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> Text:
    if not path.exists():
        names = ", ".join(NAMES)
        raise UsageError(f"{path}: no such text file, nor one of the sets known by name ({names})")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a .txt or .jsonl file, gzipped or not")
    stem = path.name.removesuffix(".gz")
    if stem.endswith(".jsonl"):
        return Text(path.name, tuple(read_rows(path, _jsonl_text, skip_blank=True)), "\n\n")
    return Text(path.name, ("".join(_lines(path)),), "")


def read_rows(path: Path, row: Callable[[str], _Row], *, skip_blank: bool = False) -> Iterator[_Row]:
    """Yield `row` of every line of a text file, gzipped or not.

    UsageError for a file that is no such text, and naming the line for which `row` raises ValueError.
    """
    for number, line in enumerate(_lines(path), start=1):
        if skip_blank and not line.strip():
            continue
        try:
            yield row(line)
        except ValueError as error:  # json.JSONDecodeError is one
            raise UsageError(f"{path}, line {number}: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines with their ends, cut on "\\n" alone (str.splitlines also cuts on characters inside texts)."""
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
    opener = gzip.open if gzipped else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is a damaged gzip file ({error})") from None


# --- Python's own documentation ------------------------------------------------------------------------------------


def _pydoc(split: Split) -> Text:
    """The reference prose that every CPython carries: four fifths to calibrate on, and an unseen fifth."""
    if split == "validation":
        raise UsageError("pydoc has no validation split; it has: train, test")
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UsageError(
            "this Python comes without its reference prose (pydoc_data.topics): give a text file"
        ) from None
    train, test = _split_topics(topics)
    part = "calibration part" if split == "train" else "unseen fifth"
    name = f"Python {platform.python_version()}'s own reference prose (pydoc), {part}"
    return Text(name, tuple(train if split == "train" else test), "\n\n")


def _split_topics(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Split topics into about 4 : 1 by size, in order of their names, no paragraph in both.

    Some topics repeat others whole ("specialnames" holds "customization"): a paragraph counts where it comes first.
    """
    seen: set[str] = set()
    train: list[str] = []
    test: list[str] = []
    test_size = total = 0
    for _, text in sorted(topics.items()):
        document = "\n\n".join(_unseen(text.strip("\n").split("\n\n"), seen))
        if not document:
            continue
        part = test if 5 * test_size < total else train
        part.append(document)
        total += len(document)
        test_size += len(document) if part is test else 0
    return train, test


def _unseen(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph
