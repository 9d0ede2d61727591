"""A short run of the fuzzer, fresh mutants every time; `fuzz.py` itself runs as long as one likes."""

import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz import MUTATIONS, exercise, fuzz, mutant


def test_a_thousand_mutants(tmp_path: Path) -> None:
    ends = fuzz(1000, random.randrange(2**32), folder=tmp_path)
    by_end: Counter[str] = Counter()
    for (_, end), count in ends.items():
        by_end[end] += count
    assert {kind for kind, _ in ends} == MUTATIONS.keys()
    # A fuzzer whose mutants all die at the first check tests nothing, nor does one whose mutants all live.
    assert min(by_end["refused"], by_end["data refused"], by_end["whole"]) > 20


@pytest.mark.slow
def test_a_hundred_thousand_mutants(tmp_path: Path) -> None:
    fuzz(100_000, random.randrange(2**32), folder=tmp_path)


def test_mutants_can_be_repeated(golden: Path) -> None:
    seeds = [golden.read_bytes()]
    found = [mutant(7, index, seeds) for index in range(100)]
    assert found == [mutant(7, index, seeds) for index in range(100)]
    assert len({content for _, content in found}) > 80


def test_a_whole_file_comes_to_a_good_end(golden: Path) -> None:
    assert exercise(golden) == "whole"
