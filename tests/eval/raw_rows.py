"""Rows of the zero-shot data sets in their own fields: invented, with the troubles of the real ones."""

from typing import Any

Rows = list[dict[str, Any]]

_LETTERS = {"text": ["iron", "wood", "glass", "wax"], "label": ["A", "B", "C", "D"]}

# data set (path, name) -> rows of its evaluation split
RAW: dict[tuple[str, str | None], Rows] = {
    ("baber/piqa", None): [
        {"goal": "How do I open a jar?", "sol1": "Twist the lid.", "sol2": "Boil the lid for a day.", "label": 0},
        {"goal": "dry a cup ", "sol1": "Fill it with water", "sol2": "Wipe it with a cloth, then wait.", "label": 1},
    ],
    ("aps/super_glue", "boolq"): [
        {"passage": "Owl -- An owl is a bird.\nIt flies.", "question": "is an owl a bird", "label": 1, "idx": 0},
        {"passage": "Lead -- Lead is a metal.", "question": "is lead a gas", "label": 0, "idx": 1},
    ],
    ("allenai/openbookqa", "main"): [
        {"id": "1", "question_stem": "A magnet pulls", "choices": _LETTERS, "answerKey": " A"},
        {"id": "2", "question_stem": "Candles are made of", "choices": _LETTERS, "answerKey": "D"},
    ],
    ("allenai/winogrande", "winogrande_xl"): [
        {"sentence": "Ann hid from Eve because _ was shy.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {
            "sentence": "The cup fell off the shelf as the _  is loose.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "2",
        },
    ],
    ("allenai/ai2_arc", "ARC-Easy"): [
        {"id": "a", "question": "Which of these melts first?", "choices": _LETTERS, "answerKey": "D"},
        {
            "id": "b",
            "question": "Which floats?",
            "choices": {"text": ["iron", "wood", "lead"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ],
    ("allenai/ai2_arc", "ARC-Challenge"): [
        {"id": "c", "question": "What bends light?", "choices": _LETTERS, "answerKey": "C"},
        {
            "id": "d",
            "question": "How many?",
            "choices": {"text": ["1", "2", "3", "4", "5"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "E",
        },
    ],
    ("Rowan/hellaswag", None): [
        {
            "activity_label": "Baking bread",
            "ctx_a": "[header] How to bake [title] Find a pan.",
            "ctx_b": "she Then",
            "endings": ["waits  long.", "[step] eats the pan. [title] Done", "sings.", "leaves the house at once."],
            "label": "1",
        },
        {
            "activity_label": "Rowing",
            "ctx_a": "A man sits in a boat.",
            "ctx_b": "",
            "endings": ["He rows.", "He flies.", "He is a boat.", "The boat sits in him."],
            "label": "0",
        },
    ],
    ("EleutherAI/lambada_openai", "default"): [
        {"text": "he looked at the old clock and saw that it was late"},
        {"text": "\u201cwhere is my hat?\u201d she asked, and he gave her the hat"},
    ],
}
HARNESS_NAMES = {"lambada": "lambada_openai"}  # where the harness calls a task otherwise


def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
    """Stand in for `datasets.load_dataset`, whatever the split is called."""
    import datasets

    rows = datasets.Dataset.from_list(RAW[path, name])
    return rows if split else datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
