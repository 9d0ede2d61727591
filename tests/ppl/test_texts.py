"""Rows and joining of the named sets by the paper's rules, from tiny files made here; files by path; pydoc; errors."""

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from billm_format.errors import UsageError
from billm_rt import texts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder in BILLM_DATA, and no `datasets` library."""
    monkeypatch.setenv("BILLM_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    return tmp_path


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(*documents: str) -> str:
    return "".join(json.dumps({"url": "x", "text": text}, ensure_ascii=False) + "\n" for text in documents)


# One blank line as the raw file has it, a row, and characters on which str.splitlines would cut.
WIKI = " \n = Title = \n \n Prose \x85 with \u2028 odd\x0c ends . \n"
WIKI_ROWS = ("", " = Title = \n", "", " Prose \x85 with \u2028 odd\x0c ends . \n")


@pytest.mark.parametrize("name", ["test.txt", "test.txt.gz"])
def test_wikitext_test_rows_are_joined_by_a_blank_line_and_blank_rows_are_empty(folder: Path, name: str) -> None:
    put(folder / "wikitext2" / name, WIKI)
    text = texts.load("wikitext2", "test")
    assert text.documents == WIKI_ROWS
    assert text.joined == "\n\n = Title = \n\n\n\n\n Prose \x85 with \u2028 odd\x0c ends . \n"
    assert text.name == "WikiText-2 test"
    assert text.sha256 == hashlib.sha256(text.joined.encode()).hexdigest()


def test_wikitext_training_rows_are_joined_by_a_space_and_a_head_is_called_one(folder: Path) -> None:
    put(folder / "wikitext2" / "train-head.txt.gz", WIKI)
    text = texts.load("wikitext2", "train")
    assert text.joined == "  = Title = \n   Prose \x85 with \u2028 odd\x0c ends . \n"
    assert text.name == "WikiText-2 train, first 4 rows"
    put(folder / "wikitext2" / "train.txt", WIKI)
    assert texts.load("wikitext2", "train").name == "WikiText-2 train"


def test_ptb_rows_are_stripped_and_joined_by_a_space(folder: Path) -> None:
    put(folder / "ptb" / "test.txt.gz", " no it was n't <unk> \n but N points \n")
    text = texts.load("ptb", "test")
    assert text.documents == ("no it was n't <unk>", "but N points")
    assert text.joined == "no it was n't <unk> but N points"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_c4_is_tested_on_the_first_1100_validation_documents(folder: Path, split: texts.Split) -> None:
    put(folder / "c4" / "validation.jsonl.gz", jsonl(*(f"document\n{i}" for i in range(1103))))
    text = texts.load("c4", split)
    assert len(text.documents) == 1100
    assert text.joined.startswith("document\n0 document\n1 ")
    assert text.name == "C4 validation, first 1,100 documents"


def test_c4_and_openwebtext_train(folder: Path) -> None:
    put(folder / "c4" / "train.jsonl", jsonl("one", "two"))
    put(folder / "openwebtext" / "sample.jsonl.gz", jsonl("three"))
    assert texts.load("c4", "train").documents == ("one", "two")
    assert texts.load("c4", "train").name == "C4 train, 2 documents"
    assert texts.load("openwebtext", "train").documents == ("three",)
    with pytest.raises(UsageError, match="openwebtext has no test split"):
        texts.load("openwebtext", "test")


@pytest.mark.parametrize("folder_set", [True, False])
def test_a_set_that_is_nowhere_names_both_ways_to_get_it(
    folder: Path, folder_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not folder_set:
        monkeypatch.delenv("BILLM_DATA")
    with pytest.raises(UsageError) as caught:
        texts.load("c4", "test")
    message = str(caught.value)
    assert "c4/validation.jsonl.gz" in message
    assert "BILLM_DATA" in message
    assert "pip install datasets" in message
    assert ("is not set" in message) != folder_set


class FakeHub:
    """Stands for the `datasets` library: remembers the call, yields rows."""

    def __init__(self, rows: list[dict[str, str]] | Exception) -> None:
        self.rows, self.calls = rows, []

    def load_dataset(self, *args: Any, **options: Any) -> list[dict[str, str]]:
        self.calls.append((args, options))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.mark.parametrize(
    ("name", "split", "column", "call"),
    [
        ("wikitext2", "test", "text", (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})),
        ("ptb", "train", "sentence", (("ptb-text-only/ptb_text_only", "penn_treebank"), {"split": "train"})),
        (
            "c4",
            "test",
            "text",
            (
                ("allenai/c4",),
                {
                    "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                    "split": "validation",
                    "streaming": True,
                },
            ),
        ),
    ],
)
def test_without_a_folder_the_datasets_library_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: texts.Split, column: str, call: object
) -> None:
    hub = FakeHub([{column: "one"}, {column: ""}, {column: "two"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    text = texts.load(name, split)
    assert hub.calls == [call]
    assert text.documents == ("one", "", "two")
    assert text.joiner == ("\n\n" if name == "wikitext2" else " ")


def test_what_the_datasets_library_throws_becomes_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(RuntimeError("Dataset scripts are\nno longer supported"))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(UsageError, match=r"RuntimeError: Dataset scripts are no longer supported.*BILLM_DATA"):
        texts.load("ptb", "test")


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "Zeile\r\nzwei \u2028 und\x85 mehr\n\n\nEnde ohne Zeilenende: äöü 漢字"
    for name in ("a.txt", "a.txt.gz", "wiki.test.raw"):
        text = texts.load(str(put(tmp_path / name, content)), "test")
        assert text.joined == content
        assert len(text.documents) == 1
        assert text.name == name


def test_gzip_is_known_by_its_content_not_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(b"packed"))
    assert texts.load(str(path), "test").joined == "packed"


def test_json_lines_are_cut_on_newlines_alone(tmp_path: Path) -> None:
    documents = ("eins\u2028zwei", "drei\x85vier", "")
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = put(tmp_path / name, jsonl(*documents) + "\n")
        assert texts.load(str(path), "train").documents == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": 3}\n', r'a\.jsonl, line 2: .*field "text"'),
        ("a.jsonl", b'{"text": "ok"}\n\n{"no": "text"}\n', r'a\.jsonl, line 3: .*field "text"'),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl, line 1: .*field "text"'),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: Expecting value"),
        ("a.txt", b"caf\xe9 noir", r"a\.txt is not UTF-8"),
        ("a.txt", b"", r"a\.txt: the text is empty"),
        ("a.txt", b" \n \n", r"a\.txt: the text is empty"),
        ("a.jsonl", b"\n", r"a\.jsonl: the text is empty"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], r"a\.txt\.gz is a damaged gzip file"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:3] + b"\xff" * 30, r"a\.txt\.gz is a damaged gzip file"),
    ],
)
def test_a_file_that_holds_no_text_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        texts.load(str(path), "test")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such text file, nor one of the sets known by name \(wikitext2, "):
        texts.load(str(tmp_path / "none.txt"), "test")
    with pytest.raises(UsageError, match="is a folder"):
        texts.load(str(tmp_path), "test")


def test_pydoc_has_two_parts_that_share_no_paragraph() -> None:
    train, test = texts.load("pydoc", "train"), texts.load("pydoc", "test")
    size = len(train.joined) + len(test.joined)
    assert size > 200_000
    assert 0.15 < len(test.joined) / size < 0.3
    paragraphs = [{" ".join(p.split()) for d in text.documents for p in d.split("\n\n")} for text in (train, test)]
    assert not paragraphs[0] & paragraphs[1]
    assert "calibration part" in train.name
    assert "unseen fifth" in test.name
    assert texts.load("pydoc", "test").sha256 == test.sha256
    with pytest.raises(UsageError, match="no validation split"):
        texts.load("pydoc", "validation")


def test_pydoc_does_not_depend_on_the_order_of_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {f"topic{i}": f"heading {i}\n\n" + f"word{i % 7} " * 50 + f"\n\nbody {i}\n" for i in range(40)}
    train, test = texts._split_topics(topics)
    assert (train, test) == texts._split_topics(dict(reversed(topics.items())))
    assert sorted(p for d in train + test for p in d.split("\n\n") if p.startswith("heading")) == sorted(
        f"heading {i}" for i in range(40)
    )
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics={}))
    with pytest.raises(UsageError, match="the text is empty"):
        texts.load("pydoc", "test")


def test_windows_do_not_overlap_and_drop_the_tail() -> None:
    assert texts.windows(list(range(11)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert texts.windows(list(range(11)), 4, 1) == [[0, 1, 2, 3]]
    assert texts.windows(list(range(3)), 4) == []


def test_the_real_texts_have_the_papers_rows_and_bytes(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLM_DATA", str(data_dir))
    wikitext = texts.load("wikitext2", "test")
    assert len(wikitext.documents) == 4358
    assert wikitext.documents[:2] == ("", " = Robert Boulter = \n")
    assert len(wikitext.joined.encode()) == 1_296_370
    raw = "".join(row or " \n" for row in wikitext.documents).encode()
    assert hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert len(texts.load("wikitext2", "train").documents) == 3280
    assert len(texts.load("ptb", "test").documents) == 3761
    assert len(texts.load("c4", "train").documents) == 1200
    assert texts.load("c4", "test").name == "C4 validation, first 200 documents"
    assert len(texts.load("openwebtext", "train").documents) == 1000
