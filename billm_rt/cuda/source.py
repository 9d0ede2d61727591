"""The text of the kernels: one `.cu` file and what it includes, joined, so that a compiler needs no search path."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)


@cache
def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")


def source(name: str, instead: Mapping[str, str] | None = None) -> str:
    """Return the text of `name` ("gemv.cu") with its headers in place; `instead` gives other texts for some of them.

    One text for a compiler's cache to tell versions apart by: a changed header changes it.
    """
    texts = instead or {}

    def include(match: re.Match[str]) -> str:
        return expand(texts.get(match[1]) or _file(match[1]))

    def expand(text: str) -> str:
        return _INCLUDE.sub(include, text)

    return expand(texts.get(name) or _file(name))
