"""The GPU bench, as far as no GPU is needed: its arithmetic, its table, and what it says without one."""

import json
from typing import Any

import numpy as np
import pytest

from bench import gpu_kernels


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kernels.main(["--device", "3"]) == 2
    error = capsys.readouterr().err
    assert "--device 3: " in error and error.count("\n") == 1


def test_bytes_are_those_of_the_file(rng: np.random.Generator) -> None:
    linear = gpu_kernels.random_linear(rng, 40, 300)
    assert gpu_kernels.file_bytes(linear) == 40 * (2 * 40 + 3 * 4 + 2)
    assert linear.dequantize().shape == (40, 300)


def test_copies_exceed_the_cache_twice() -> None:
    for nbytes, cache in ((7, 50), (25, 50), (1000, 50)):
        count = gpu_kernels.copies(nbytes, cache)
        assert count * nbytes > 2 * cache >= (count - 1) * nbytes


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    line: dict[str, Any] = {
        "name": "LLaMA-7B q, k, v, o", "rows": 4096, "cols": 4096, "tokens": 1, "activations": "float16",
        "microseconds": 3.21, "gigabytes_per_s": 1470.1, "share_of_copy": 0.512, "cublas_microseconds": 14.5,
        "times_faster_than_cublas": 4.52,
    }  # fmt: skip
    assert json.loads(json.dumps(line)) == line
    row = gpu_kernels.markdown_row(line)
    assert row == "| LLaMA-7B q, k, v, o | 4096 × 4096 | 1 | float16 | 3.2 | 1,470 | 51% | 14.5 | 4.52 |"
    assert row.count("|") == len(gpu_kernels.HEADINGS) + 1


@pytest.mark.gpu
def test_a_shape_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kernels.main(["--only", "SmolLM2-135M q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["products"]) == 2 * len(gpu_kernels.TOKENS)
    assert all(line["microseconds"] > 0 for line in found["products"])
