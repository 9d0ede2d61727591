"""What `/set` and the command line can set: one table, so that both accept and refuse the same values.

The sampling defaults are meant for small binarized models: their distribution has a long noisy tail, which `min_p`
and `top_p` cut, and they fall into loops, which the repetition penalty and `stop_loops` break.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from billm_format.errors import UsageError

_BIG = (1 << 31) - 1  # stands for no bound


@dataclass(frozen=True)
class Settings:
    """How answers are sampled and shown. Field names are the option names with underscores."""

    temp: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    repeat_last_n: int = 64
    max_tokens: int = 512
    seed: int | None = None
    lookup: int = 0
    stop: tuple[str, ...] = ()
    stop_loops: bool = True
    markdown: bool = True
    stats: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as the JSON object that a saved conversation records."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"stop": list(self.stop)}


@dataclass(frozen=True)
class Option:
    """One setting: how its value is read from text (UsageError says what is wrong with it), and what it does."""

    parse: Callable[[str], Any]
    help: str
    flags: tuple[str, ...] = ()  # on the command line; empty: has a switch of its own there


def _number(kind: Callable[[str], float], low: float, high: float, *, above: bool = False) -> Callable[[str], Any]:
    """Return a parser of numbers from `low` (or, with `above`, greater than it) to `high`."""
    noun = "a whole number" if kind is int else "a number"
    reach = f"above {low:g}" if above else f"of at least {low:g}"
    if high < _BIG:
        reach += f" and at most {high:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if above else low <= value <= high):  # false for NaN too
            raise UsageError(f"wanted {noun} {reach}, found {text!r}")
        return value

    return parse


def _seed(text: str) -> int | None:
    if text.lower() in ("none", "random"):
        return None
    seed: int = _number(int, 0, (1 << 63) - 1)(text)
    return seed


def _switch(text: str) -> bool:
    words = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise UsageError(f"wanted on or off, found {text!r}")
    return words[text.lower()]


def stop_string(text: str) -> str:
    r"""Return the stop string that was typed: `\n`, `\t` and `\\` as in Python; quotes may enclose it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    parts = text.split(r"\\")
    text = "\\".join(part.replace(r"\n", "\n").replace(r"\t", "\t") for part in parts)
    if not text:
        raise UsageError("a stop string must not be empty")
    return text


def _stop_strings(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else (stop_string(text),)


OPTIONS: dict[str, Option] = {
    "temp": Option(
        _number(float, 0, 100), "randomness; 0 always takes the likeliest token", ("--temp", "--temperature")
    ),
    "top_k": Option(_number(int, 0, _BIG), "sample among the K likeliest tokens; 0: all", ("--top-k",)),
    "top_p": Option(_number(float, 0, 1, above=True), "sample among the tokens that hold this much", ("--top-p",)),
    "min_p": Option(_number(float, 0, 1), "drop tokens below this fraction of the likeliest one", ("--min-p",)),
    "repeat_penalty": Option(
        _number(float, 0, 100, above=True), "divide the odds of recent tokens; 1: off", ("--repeat-penalty",)
    ),
    "repeat_last_n": Option(
        _number(int, -1, _BIG), "how many recent tokens that looks at; -1: all", ("--repeat-last-n",)
    ),
    "max_tokens": Option(
        _number(int, 1, _BIG), "longest answer, in tokens", ("--max-tokens", "-n", "--max-new-tokens")
    ),
    "seed": Option(_seed, "same seed, same answer; random: a new one each time", ("--seed", "-s")),
    "lookup": Option(
        _number(int, 0, 64),
        "guess this many tokens ahead from the text; exactly the same answer, sooner where it repeats it; 0: off",
        ("--lookup",),
    ),
    "stop": Option(_stop_strings, r"end the answer where this text comes up (\n: line end); none: nowhere"),
    "stop_loops": Option(_switch, "end an answer that repeats itself over and over"),
    "markdown": Option(_switch, "show answers as formatted Markdown"),
    "stats": Option(_switch, "print speed and memory after every answer"),
}

_ALIASES = {"temperature": "temp", "max_new_tokens": "max_tokens", "num_predict": "max_tokens", "n": "max_tokens"}


def setting_name(text: str) -> str:
    """Return the field that a typed name means (dashes or underscores, known aliases); UsageError: there is none."""
    name = text.lower().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name not in OPTIONS:
        known = ", ".join(shown(known) for known in OPTIONS)
        raise UsageError(f"there is no setting {text!r}; there are: {known}")
    return name


def changed(settings: Settings, name: str, value: str) -> Settings:
    """Return the settings with the typed `name` set to the typed `value`; UsageError says what is wrong."""
    field = setting_name(name)
    try:
        return replace(settings, **{field: OPTIONS[field].parse(value)})
    except UsageError as error:
        raise UsageError(f"{shown(field)}: {error}") from None


def shown(field: str) -> str:
    """Return a field's name as users type it."""
    return field.replace("_", "-")


def shown_value(value: object) -> str:
    """Return a setting's value as users type it."""
    if value is None:
        return "random"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
