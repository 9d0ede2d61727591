"""Zero-shot tasks: their items, and the prompts that lm-evaluation-harness gives them (as of its version 0.4.13).

Items come from the folder that BILLM_DATA names, else through the `datasets` library. In the folder a task is one file
of JSON lines: `question`, `choices`, `answer` (an index) and for BoolQ `context`; for LAMBADA `context` and `target`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from billm_format.errors import UsageError
from billm_rt import texts

Row = dict[str, Any]  # in the folder's fields


@dataclass(frozen=True)
class Item:
    """One question: what to score, and which of it is right."""

    pairs: tuple[tuple[str, str], ...]  # (context, continuation) of each choice
    gold: int  # index of the right choice
    lengths: tuple[int, ...]  # characters of each choice, by which acc_norm divides


@dataclass(frozen=True)
class Task:
    """One task: where its rows are and how a row becomes an item."""

    title: str
    file: str  # below the data folder, without .gz
    hub: tuple[str, ...]  # positional arguments of datasets.load_dataset
    split: str
    from_hub: Callable[[Row], Row]  # the data set's fields -> the folder's
    item: Callable[[Row], Item]
    metrics: tuple[str, ...]  # as the harness has them: "acc", "acc_norm", "perplexity"


def load(name: str, limit: int | None = None) -> list[Item]:
    """Return the task's first `limit` items (None: all).

    Raises UsageError for a name that is none, items that cannot be had and rows that are not as they should be.
    """
    if name not in TASKS:
        raise UsageError(f"--tasks: wanted names of {', '.join(TASKS)}, found {name!r}")
    task = TASKS[name]
    stem = f"zeroshot/{task.file}"
    if path := texts.data_file(stem):
        items: Iterator[Item] = texts.read_rows(path, lambda line: _item(task, json.loads(line), task.item))
    else:
        rows = texts.hub_rows(task.title, stem, task.hub, {"split": task.split})
        items = (_item(task, row, lambda row: task.item(task.from_hub(row))) for row in rows)
    try:
        found = list(islice(items, limit))
    except ValueError as error:
        raise UsageError(f"{'/'.join(task.hub)}: {error}") from None
    if not found:
        raise UsageError(f"{task.title} has no items")
    return found


def _item(task: Task, row: object, convert: Callable[[Row], Item]) -> Item:
    """Return `convert(row)`, checked; ValueError if a field is missing or of another kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{task.title}: wanted a JSON object, found {type(row).__name__}")
    try:
        item = convert(row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{task.title}: a row lacks a field or has one of the wrong kind ({error!r})") from None
    if not all(item.lengths):
        raise ValueError(f"{task.title}: a choice is empty")
    if not 0 <= item.gold < len(item.pairs):
        raise ValueError(f"{task.title}: the answer {item.gold} is none of {len(item.pairs)} choices")
    return item


# --- prompts -------------------------------------------------------------------------------------------------------


def _choices(context: str, row: Row) -> Item:
    choices = [str(choice) for choice in row["choices"]]
    return Item(tuple((context, f" {choice}") for choice in choices), int(row["answer"]), tuple(map(len, choices)))


def _question(row: Row) -> Item:
    return _choices(f"Question: {row['question']}\nAnswer:", row)


def _passage(row: Row) -> Item:
    return _choices(f"{row['context']}\nQuestion: {row['question']}?\nAnswer:", row)


def _continue(row: Row) -> Item:
    return _choices(row["question"], row)


def _blank(row: Row) -> Item:
    """Score the rest of the sentence behind each way to fill the blank."""
    before, _, after = row["question"].partition("_")
    contexts = [before + choice for choice in row["choices"]]
    rest = f" {after.strip()}"
    return Item(tuple((context, rest) for context in contexts), int(row["answer"]), tuple(map(len, contexts)))


def _last_word(row: Row) -> Item:
    return Item(((row["context"], f" {row['target']}"),), 0, (len(row["target"]),))


# --- the data sets' own fields ---------------------------------------------------------------------------------------


def _piqa(row: Row) -> Row:
    return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}


def _boolq(row: Row) -> Row:
    kept = {"context": row["passage"], "question": row["question"]}
    return {**kept, "choices": ["no", "yes"], "answer": row["label"]}


def _lettered(question: str) -> Callable[[Row], Row]:
    def convert(row: Row) -> Row:
        choices = row["choices"]
        answer = choices["label"].index(row["answerKey"].strip())
        return {"question": row[question], "choices": choices["text"], "answer": answer}

    return convert


def _winogrande(row: Row) -> Row:
    options = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": options, "answer": int(row["answer"]) - 1}


def _hellaswag(row: Row) -> Row:
    question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [_without_wikihow_marks(ending) for ending in row["endings"]]
    return {"question": _without_wikihow_marks(question), "choices": choices, "answer": int(row["label"])}


def _without_wikihow_marks(text: str) -> str:
    """Resolve the marks in square brackets that the texts from WikiHow are full of."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lambada(row: Row) -> Row:
    context, _, target = row["text"].rpartition(" ")
    return {"context": context, "target": target}


_BOTH = ("acc", "acc_norm")
_ARC = "allenai/ai2_arc"

TASKS = {
    "piqa": Task("PIQA", "piqa-validation.jsonl", ("baber/piqa",), "validation", _piqa, _question, _BOTH),
    "boolq": Task(
        "BoolQ", "boolq-validation.jsonl", ("aps/super_glue", "boolq"), "validation", _boolq, _passage, ("acc",)
    ),
    "openbookqa": Task(
        "OpenBookQA",
        "openbookqa-test.jsonl",
        ("allenai/openbookqa", "main"),
        "test",
        _lettered("question_stem"),
        _continue,
        _BOTH,
    ),
    "winogrande": Task(
        "WinoGrande",
        "winogrande-validation.jsonl",
        ("allenai/winogrande", "winogrande_xl"),
        "validation",
        _winogrande,
        _blank,
        ("acc",),
    ),
    "arc_easy": Task(
        "ARC easy", "arc-easy-test.jsonl", (_ARC, "ARC-Easy"), "test", _lettered("question"), _question, _BOTH
    ),
    "arc_challenge": Task(
        "ARC challenge",
        "arc-challenge-test.jsonl",
        (_ARC, "ARC-Challenge"),
        "test",
        _lettered("question"),
        _question,
        _BOTH,
    ),
    "hellaswag": Task(
        "HellaSwag", "hellaswag-validation.jsonl", ("Rowan/hellaswag",), "validation", _hellaswag, _continue, _BOTH
    ),
    "lambada": Task(
        "LAMBADA (OpenAI)",
        "lambada-openai-test.jsonl",
        ("EleutherAI/lambada_openai", "default"),
        "test",
        _lambada,
        _last_word,
        ("acc", "perplexity"),
    ),
}

# The seven of the BiLLM paper's zero-shot table.
PAPER = tuple(name for name in TASKS if name != "lambada")
