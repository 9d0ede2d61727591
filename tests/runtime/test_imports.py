"""Who may import whom, that torch is not needed to run a model, and that importing costs little."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_model import make_random_billm

ROOT = Path(__file__).parents[2]
SOURCES = {
    "billm_format": ROOT / "format" / "billm_format",
    "billm_rt": ROOT / "billm_rt",
    "billm_convert": ROOT / "converter" / "billm_convert",
    "billm_chat": ROOT / "chat" / "billm_chat",
}
MAY_IMPORT = {
    "billm_format": set(),
    "billm_rt": {"billm_format"},
    "billm_convert": {"billm_format", "billm_rt"},
    "billm_chat": {"billm_format", "billm_rt"},
}
HEAVY = {"torch", "transformers", "gguf", "datasets", "sentencepiece"}
# --against compares with the full-precision model: the one place that asks for it, when it is asked for.
HEAVY_ALLOWED = {ROOT / "billm_rt" / "against.py", ROOT / "billm_rt" / "texts.py"}


def _imports(node: ast.AST) -> set[str]:
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found.add((child.module or "").partition(".")[0])
    return found


def _run(code: str, **environment: str) -> str:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "format", "converter", "chat"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", SOURCES)
def test_import_arrows(package: str) -> None:
    files = list(SOURCES[package].rglob("*.py"))
    assert files
    for file in files:
        found = _imports(ast.parse(file.read_text()))
        ours = {name for name in found if name in SOURCES}
        assert ours - {package} <= MAY_IMPORT[package], file
        if package != "billm_convert" and file not in HEAVY_ALLOWED:
            assert not found & HEAVY, file


def test_a_model_runs_with_torch_and_transformers_blocked(tmp_path: Path) -> None:
    make_random_billm(tmp_path / "m.billm")
    code = f"""
import sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None
import billm_rt, billm_rt.ppl_cli, billm_rt.against, billm_chat.cli
with billm_rt.load({str(tmp_path / "m.billm")!r}) as model:
    model.tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])
    print(len(list(model.generate("hello", max_tokens=3, sampling=billm_rt.Sampling(seed=1)))))
"""
    assert 1 <= int(_run(code)) <= 3


def test_import_loads_nothing_that_it_does_not_need_yet() -> None:
    late = sorted(HEAVY | {"jinja2", "tokenizers", "psutil", "rich", "prompt_toolkit", "safetensors"})
    assert _run(f"import sys, billm_rt; print([name for name in {late} if name in sys.modules])").strip() == "[]"


def test_import_is_quick() -> None:
    # Processor time: what the rest of the machine does is not the package's doing.
    code = "import time; t = time.process_time(); import billm_rt; print(time.process_time() - t)"
    best = min(float(_run(code)) for _ in range(6))
    assert best < 0.3, f"import billm_rt takes {best:.2f} s"
