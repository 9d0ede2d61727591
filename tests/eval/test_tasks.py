"""Items and prompts of every task, from the folder and through `datasets`, and what is said of bad rows."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval.raw_rows import RAW

from billm_format.errors import UsageError
from billm_rt import eval_tasks
from billm_rt.eval_tasks import TASKS, Item

COUNTS = {
    "piqa": 1838,
    "boolq": 3270,
    "openbookqa": 500,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "lambada": 5153,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `datasets` library that has the rows of RAW, and no folder."""

    def load_dataset(path: str, name: str | None = None, split: str = "") -> Any:
        return iter(RAW[path, name])

    monkeypatch.delenv("BILLM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(
    ("task", "place", "wanted"),
    [
        (
            "piqa",
            1,
            Item(
                (
                    ("Question: dry a cup \nAnswer:", " Fill it with water"),
                    ("Question: dry a cup \nAnswer:", " Wipe it with a cloth, then wait."),
                ),
                1,
                (18, 32),
            ),
        ),
        (
            "boolq",
            0,
            Item(
                tuple(
                    ("Owl -- An owl is a bird.\nIt flies.\nQuestion: is an owl a bird?\nAnswer:", f" {word}")
                    for word in ("no", "yes")
                ),
                1,
                (2, 3),
            ),
        ),
        (
            "openbookqa",
            0,
            Item(tuple(("A magnet pulls", f" {word}") for word in ("iron", "wood", "glass", "wax")), 0, (4, 4, 5, 3)),
        ),
        (
            "winogrande",
            1,
            Item(
                (
                    ("The cup fell off the shelf as the cup", " is loose."),
                    ("The cup fell off the shelf as the shelf", " is loose."),
                ),
                1,
                (37, 39),
            ),
        ),
        (
            "arc_easy",
            1,
            Item(
                tuple(("Question: Which floats?\nAnswer:", f" {word}") for word in ("iron", "wood", "lead")),
                1,
                (4, 4, 4),
            ),
        ),
        (
            "hellaswag",
            0,
            Item(
                tuple(
                    ("Baking bread: How to bake. Find a pan. She then", f" {ending}")
                    for ending in ("waits long.", " eats the pan.. Done", "sings.", "leaves the house at once.")
                ),
                1,
                (11, 20, 6, 25),
            ),
        ),
        ("lambada", 0, Item((("he looked at the old clock and saw that it was", " late"),), 0, (4,))),
    ],
)
def test_prompts(hub: None, task: str, place: int, wanted: Item) -> None:
    assert eval_tasks.load(task)[place] == wanted


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_folder_and_the_hub_give_the_same_items(
    hub: None, task: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = TASKS[task]
    items = eval_tasks.load(task)
    assert len(items) == 2
    rows = [known.from_hub(row) for row in RAW[known.hub[0], known.hub[1] if len(known.hub) > 1 else None]]
    (tmp_path / "zeroshot").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = tmp_path / "zeroshot" / known.file
    if zipped:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(text))
    else:
        file.write_bytes(text)
    monkeypatch.setenv("BILLM_DATA", str(tmp_path))
    assert eval_tasks.load(task) == items
    assert eval_tasks.load(task, 1) == items[:1]


@pytest.mark.parametrize("task", TASKS)
def test_the_real_files_have_all_their_items(task: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLM_DATA", str(data_dir))
    items = eval_tasks.load(task)
    assert len(items) == COUNTS[task]
    for item in items:
        assert all(context.strip() and continuation.startswith(" ") for context, continuation in item.pairs)
        assert all(continuation.strip() for _, continuation in item.pairs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "wanted a JSON object, found list"),
        ("{", "line 2"),
        ('{"question": "q", "choices": ["a", "b"]}', "lacks a field"),
        ('{"question": "q", "choices": ["a", "b"], "answer": null}', "wrong kind"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "the answer 2 is none of 2 choices"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "a choice is empty"),
    ],
)
def test_a_bad_row_is_named(line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zeroshot").mkdir()
    good = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'
    (tmp_path / "zeroshot" / "piqa-validation.jsonl").write_text(good + line + "\n")
    monkeypatch.setenv("BILLM_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=rf"piqa-validation\.jsonl, line 2: .*{message}|{message}"):
        eval_tasks.load("piqa")
    assert len(eval_tasks.load("piqa", 1)) == 1


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--tasks: wanted names of piqa, .*, found 'poker'"):
        eval_tasks.load("poker")
    monkeypatch.setenv("BILLM_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"PIQA is not at hand .*put zeroshot/piqa-validation\.jsonl\.gz in the folder"
    ):
        eval_tasks.load("piqa")
    (tmp_path / "zeroshot").mkdir()
    (tmp_path / "zeroshot" / "piqa-validation.jsonl").write_text("")
    with pytest.raises(UsageError, match="PIQA has no items"):
        eval_tasks.load("piqa")


def test_a_hub_row_that_does_not_fit_is_a_usage_error(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RAW, ("baber/piqa", None), [{"goal": "g"}])
    with pytest.raises(UsageError, match="baber/piqa: PIQA: a row lacks a field"):
        eval_tasks.load("piqa")
