"""Against lm-evaluation-harness itself: the same requests from the same rows, the same scores through its adapter."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval.raw_rows import HARNESS_NAMES, RAW, load_dataset

import billm_rt
from billm_rt import eval_score, eval_tasks
from billm_rt.eval_tasks import TASKS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (pip install billm-rt[eval])"
)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness's tasks and ours both find the rows of RAW."""
    import datasets

    monkeypatch.delenv("BILLM_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture(scope="module")
def manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_task(manager: Any, name: str) -> Any:
    loaded = manager.load([HARNESS_NAMES.get(name, name)])
    return loaded["tasks"][HARNESS_NAMES.get(name, name)]


@pytest.mark.parametrize("name", TASKS)
def test_requests_are_the_harness_own(name: str, manager: Any) -> None:
    task = harness_task(manager, name)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    wanted: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        wanted.setdefault(instance.doc_id, []).append(instance.args)
    items = eval_tasks.load(name)
    assert [list(item.pairs) for item in items] == [wanted[place] for place in range(len(items))]
    metrics = set(task.aggregation())
    assert set(TASKS[name].metrics) == metrics


def test_the_scores_are_the_harness_own(
    twins: tuple[Path, Path], manager: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    import lm_eval

    from billm_rt.eval_harness import BillmLM

    # Two items tell little: every row six times, with words in front that change what a random model makes of it.
    for key, rows in RAW.items():
        more = [_varied(row, rng) for row in rows for _ in range(6)]
        monkeypatch.setitem(RAW, key, more)
    with billm_rt.load(twins[0]) as model:
        names = [HARNESS_NAMES.get(name, name) for name in TASKS]
        theirs: Any = lm_eval.simple_evaluate(BillmLM(model), tasks=names, task_manager=manager, bootstrap_iters=0)
        reader = eval_score.BillmReader(model)
        for name, task in TASKS.items():
            ours = eval_score.evaluate(reader, eval_tasks.load(name), task.metrics)
            found = theirs["results"][HARNESS_NAMES.get(name, name)]
            for metric in task.metrics:
                assert getattr(ours, metric) == pytest.approx(found[f"{metric},none"], rel=1e-3), (name, metric)


def _varied(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    field = next(f for f in ("goal", "passage", "question_stem", "sentence", "question", "ctx_a", "text") if f in row)
    words = " ".join(str(rng.integers(1000)) for _ in range(4))
    return {**row, field: f"{words} {row[field]}"}


def test_the_standard_error_is_the_harness_own(manager: Any, rng: np.random.Generator) -> None:
    from lm_eval.api.metrics import mean_stderr

    hits = rng.integers(0, 2, 50).astype(float)
    assert eval_score._mean(hits)[1] == pytest.approx(mean_stderr(hits.tolist()))


def test_the_adapter_agrees_with_the_harness_own_model_class(twins: tuple[Path, Path]) -> None:
    """The dequantized model through the harness's transformers class: pairs, empty contexts and whole texts alike."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from billm_rt.eval_harness import BillmLM

    path, folder = twins
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32")
    pairs = [("The cat sat", " on the mat"), ("The cat sat ", "down"), ("", "Hello there"), ("x" * 700, " end")]
    whole = ["A short text.", "words and words, " * 60]

    def requests(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, argument, place) for place, argument in enumerate(arguments)]

    ours = BillmLM(path, exact=True)
    found, wanted = (lm.loglikelihood(requests("loglikelihood", pairs)) for lm in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-3)
        assert mine[1] == other[1]
    rolling = requests("loglikelihood_rolling", [(text,) for text in whole])
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), rtol=1e-3)
    prompts = [("The cat sat", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False})]
    assert ours.generate_until(requests("generate_until", prompts)) == theirs.generate_until(
        requests("generate_until", prompts)
    )
