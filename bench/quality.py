"""Tables of quality in the paper's form: perplexity and zero-shot accuracy by method and block size, for any model.

    PYTHONPATH=.:format:converter python bench/quality.py MODEL_DIR OUT_DIR --methods paper gptq-2 --data wikitext2 c4

Every figure is kept in OUT_DIR as soon as it is there: after an interruption the same command goes on, and a later one
with more methods, texts or tasks measures only what is missing. The tables are OUT_DIR/quality.md and quality.json.
Recipes become .billm files and run in billm_rt; rivals become float16 models that transformers runs in float32.
"""

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

import billm_rt
from billm_convert import ConvertSettings, Event, convert
from billm_convert.baselines import BASELINES, BaselineSettings
from billm_convert.baselines.model import fake_quantize
from billm_convert.calibration import choose_texts, draw_all, draw_windows
from billm_convert.resources import peak_bytes
from billm_convert.settings import ABLATIONS, EFFORTS, RECIPES
from billm_convert.source import ModelSource, open_model
from billm_format.command import add_common_options, emit_json, finite, run_command
from billm_format.errors import UsageError
from billm_rt import against, eval_tasks, ppl, texts
from billm_rt.eval_score import BillmReader, Reader, evaluate

FULL = "full precision"
_WITHOUT_BLOCKS = ("pb-llm",)  # its scales are of whole rows: measured once, whatever the block sizes
# The paper's recipe with a part of it left out: method -> `ConvertSettings.ablation`.
_ABLATED = {f"paper, {name}": name for name in ABLATIONS}

# Settings that folders of earlier versions do not name, and what they were then.
_LATER_SETTINGS = {"target_bits": None, "effort": ConvertSettings.effort}

T = TypeVar("T")
Record = dict[str, Any]  # a method's figures, as its file in OUT_DIR holds them


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="quality")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="Hugging Face model directory")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for results and models in the making")
    methods = (*RECIPES, *BASELINES)
    parser.add_argument("--methods", nargs="*", choices=methods, default=methods, help="default: all")
    parser.add_argument("--ablation", action="store_true", help="and the paper's recipe without its parts (Fig. 8)")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[128], metavar="N", help="default: 128")
    parser.add_argument("--data", nargs="*", default=["wikitext2", "ptb", "c4"], help="texts (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a test window (default: %(default)s)")
    parser.add_argument("--windows", type=int, help="the first N test windows only (default: all)")
    parser.add_argument("--tasks", nargs="*", choices=eval_tasks.TASKS, default=[], help="zero-shot (default: none)")
    parser.add_argument("--limit", type=int, help="the first N items of a task only (default: all)")
    parser.add_argument("--calib", default="wikitext2", help="calibration text (default: %(default)s)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (default: %(default)s)")
    parser.add_argument("--calib-seqlen", type=int, default=2048, help="tokens in each (default: %(default)s)")
    parser.add_argument("--target-bits", type=float, metavar="B", help="true bits of our recipes, as in billm-convert")
    parser.add_argument(
        "--effort", choices=EFFORTS, default=ConvertSettings.effort, help="of the recipe tuned (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of windows (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for calibration: cpu or cuda (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing and print the tables."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with _alone(args.out):
        bench.check_settings()
        records = []
        for method, block_size in bench.entries():
            records.append(bench.measure(method, block_size))
            tables = markdown(records, bench.text_labels, bench.task_labels)
            (args.out / "quality.md").write_text(f"{bench.heading}\n\n{tables}", encoding="utf-8")
            (args.out / "quality.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if args.json:
        emit_json("billm-quality", 1, {"settings": bench.settings, "methods": records})
    else:
        print(bench.heading, tables, sep="\n\n", end="")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; UsageError when another run has it: both would make, and delete, the same models."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another run is at work in {folder}: wait for it, or name another folder") from None
        yield


@dataclass(frozen=True)
class Ready:
    """A model ready to be measured; transformers loads one when it is first used."""

    path: Path
    vocab_size: int
    threads: int | None
    bits: tuple[float, float] | None = None  # paper, stored
    cost: Record | None = None  # `_timed`; None: nothing was made, or not in one go
    model: billm_rt.Model | None = None  # of a `.billm` file; None: one for transformers

    def scorer(self) -> ppl.Scorer:
        """Return what perplexity is measured with."""
        if self.model:
            return ppl.model_scorer(self.model)[0]
        return against.load(self.path, self.vocab_size, self.threads).scorer

    @cached_property
    def reader(self) -> Reader:
        """What zero-shot tasks are scored with."""
        if self.model:
            return BillmReader(self.model)
        return against.load_reader(self.path, self.threads)


class Bench:
    """One model's figures in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Open the model; nothing is measured yet."""
        self._args = args
        self._source: ModelSource = open_model(args.model)
        self._texts = {name: texts.load(name, "test") for name in args.data}
        self._items = {name: eval_tasks.load(name, args.limit) for name in args.tasks}
        windows = f"{args.windows or 'all'} x {args.seqlen}"
        self.text_labels = {name: f"{text.name}, {windows}" for name, text in self._texts.items()}
        self.task_labels = {name: name if args.limit is None else f"{name}, first {args.limit}" for name in args.tasks}

    @property
    def settings(self) -> dict[str, Any]:
        """What every figure in the folder must agree on."""
        args = self._args
        chosen = ("calib", "nsamples", "calib_seqlen", "seed", *_LATER_SETTINGS)
        given = {key: getattr(args, key) for key in chosen}
        return {"model": args.model.resolve().name, "identity": self._source.identity(), **given}

    @property
    def heading(self) -> str:
        """What the tables are about."""
        s = self.settings
        drawn = f"{s['nsamples']} windows of {s['calib_seqlen']:,} tokens of {s['calib']}, seed {s['seed']}"
        return f"# {s['model']}\n\nCalibrated on {drawn}. Paper's protocol: windows that do not overlap."

    def check_settings(self) -> None:
        """Note the settings in the folder; UsageError where it has figures of others."""
        file = self._args.out / "settings.json"
        if not file.exists():
            file.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        old = {**_LATER_SETTINGS, **json.loads(file.read_text(encoding="utf-8"))}
        for key, value in self.settings.items():
            if old.get(key) != value:
                raise UsageError(
                    f"{self._args.out} holds figures for {key} {old.get(key)}, not {value}: name another folder"
                )

    def entries(self) -> Iterator[tuple[str, int | None]]:
        """Yield (method, block size): the original, then every method with every block size that it knows."""
        yield FULL, None
        for method in (*self._args.methods, *(_ABLATED if self._args.ablation else ())):
            if method in _WITHOUT_BLOCKS:
                yield method, None
            else:
                yield from ((method, size) for size in self._args.block_sizes)

    def measure(self, method: str, block_size: int | None) -> Record:
        """Return the method's figures, those that are missing measured and kept one by one."""
        key = method.replace(",", "").replace(" ", "-") + (f"-{block_size}" if block_size else "")
        file = self._args.out / f"{key}.json"
        record: Record = {"method": method, "block_size": block_size, "bits": None, "cost": None}
        record |= {"perplexity": {}, "zeroshot": {}}
        if file.exists():
            record |= json.loads(file.read_text(encoding="utf-8"))
        missing_texts = [n for n, label in self.text_labels.items() if label not in record["perplexity"]]
        missing_tasks = [n for n, label in self.task_labels.items() if label not in record["zeroshot"]]
        if not missing_texts and not missing_tasks:
            return record
        with self._ready(key, method, block_size) as ready:
            record["bits"] = ready.bits and dict(zip(("paper", "stored"), ready.bits, strict=True))
            record["cost"] = record["cost"] or ready.cost
            for kind, label, figures in self._figures(ready, missing_texts, missing_tasks):
                record[kind][label] = finite(figures)
                self.say(f"{key}: {label}: {figures.get('perplexity') or figures.get('acc'):.4g}")
                unfinished = file.with_suffix(".tmp")
                unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                unfinished.rename(file)
        return record

    def _figures(
        self, ready: Ready, missing_texts: list[str], missing_tasks: list[str]
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield (kind, label, figures) one by one."""
        if missing_texts:
            scorer = ready.scorer()
            for name in missing_texts:
                yield "perplexity", self.text_labels[name], asdict(ppl.measure(self._parts(name), scorer, "paper"))
            del scorer  # a model of transformers: the reader loads it anew
        for name in missing_tasks:
            score = evaluate(ready.reader, self._items[name], eval_tasks.TASKS[name].metrics)
            yield "zeroshot", self.task_labels[name], asdict(score)

    def _parts(self, name: str) -> list[ppl.Ids]:
        """Return the text's windows, tokenized as billm-ppl does: the same for every method."""
        ids = self._tokenizer.encode(self._texts[name].joined, special=True)
        return ppl.cut(ids, self._args.seqlen, self._args.windows, "paper")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._source.tokenizer().load(self._source.config)

    @contextmanager
    def _ready(self, key: str, method: str, block_size: int | None) -> Iterator[Ready]:
        """Yield the method's model, made now if it is not there; a rival's is deleted when it has been measured."""
        args, vocab = self._args, self._source.config.vocab_size
        if method == FULL:
            yield Ready(args.model, vocab, args.threads)
        elif method in RECIPES or method in _ABLATED:
            path = args.out / f"{key}.billm"
            settings = self._convert_settings(method, block_size)
            report, cost = _timed(lambda: convert(args.model, path, settings, self._watch(key)))
            made = None if report.resumed_blocks else cost
            with billm_rt.load(path, threads=args.threads) as model:
                yield Ready(path, vocab, args.threads, (report.bits_paper, report.bits_true), made, model)
        else:
            folder = args.out / key
            begun = folder.exists()
            bits, cost = _timed(lambda: self._fake_quantize(key, method, block_size, folder))
            yield Ready(folder, vocab, args.threads, bits, None if begun else cost)
            shutil.rmtree(folder)

    def _fake_quantize(self, key: str, method: str, block_size: int | None, folder: Path) -> tuple[float, float]:
        """Make a rival's model in `folder` and return its bits."""
        return fake_quantize(
            self._source,
            self._calibration,
            BASELINES[method],
            BaselineSettings() if block_size is None else BaselineSettings(block_size=block_size),
            folder,
            torch.device(self._args.device),
            lambda done, total: self.say(f"{key}: block {done}/{total}"),
        )

    def _convert_settings(self, method: str, block_size: int | None) -> ConvertSettings:
        args = self._args
        ablation = _ABLATED.get(method)
        return ConvertSettings(
            recipe="paper" if ablation else method,
            ablation=ablation,
            block_size=block_size or ConvertSettings.block_size,
            target_bits=args.target_bits,
            effort=args.effort,
            calib=args.calib,
            nsamples=args.nsamples,
            seqlen=args.calib_seqlen,
            seed=args.seed,
            device=args.device,
            threads=args.threads,
            resume=True,
            check=False,
        )

    @cached_property
    def _calibration(self) -> Any:
        """The windows that a conversion with these settings draws."""
        args = self._args
        chosen, _ = choose_texts(args.calib)
        return draw_all(
            chosen,
            args.nsamples,
            lambda text, share: draw_windows(text, self._tokenizer, share, args.calib_seqlen, args.seed),
        )

    def _watch(self, key: str) -> Any:
        def show(event: Event) -> None:
            if event.linears:
                self.say(f"{key}: block {int(event.done + 0.5)}/{int(event.total)}")

        return show

    def say(self, text: str) -> None:
        """Tell whoever watches."""
        if not self._args.quiet:
            print(text, file=sys.stderr, flush=True)


def _timed(make: Callable[[], T]) -> tuple[T, Record]:
    """Return what `make` gives and what it took: seconds, processor seconds, the process's peak memory meanwhile."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        renewed = True
    except OSError:
        renewed = False
    began, processor = time.monotonic(), time.process_time()
    made = make()
    cost = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - processor}
    return made, {**cost, "peak_bytes": peak_bytes() if renewed else None}


# --- tables --------------------------------------------------------------------------------------------------------


def markdown(records: list[Record], text_labels: dict[str, str], task_labels: dict[str, str]) -> str:
    """Return the tables of perplexity and of zero-shot accuracy, in Markdown."""
    out = ""
    heads = ["method", "block", "bits, paper's count", "bits, all stored"]
    if text_labels:
        rows = [
            [*_head(r), *(_perplexity(r["perplexity"].get(label)) for label in text_labels.values()), *_cost(r)]
            for r in records
        ]
        costs = ["minutes to make", "of processor time", "peak memory"]
        out += "## Perplexity\n\n" + _table([*heads, *text_labels.values(), *costs], rows)
    if task_labels:
        rows = [[*_head(r), *(_accuracy(r["zeroshot"].get(label)) for label in task_labels.values())] for r in records]
        out += "\n" * bool(out) + "## Zero-shot accuracy: acc (acc_norm), percent\n\n"
        out += _table([*heads, *task_labels.values()], rows)
    return out


def _head(record: Record) -> list[str]:
    bits = record["bits"]
    sizes = [f"{bits['paper']:.2f}", f"{bits['stored']:.2f}"] if bits else ["-", "-"]
    return [record["method"], str(record["block_size"] or "-"), *sizes]


def _perplexity(figures: Record | None) -> str:
    if figures is None:
        return ""
    value = figures["perplexity"]
    return "beyond all bounds" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _cost(record: Record) -> list[str]:
    cost = record["cost"]
    if cost is None:
        return ["-"] * 3
    minutes = [f"{cost[key] / 60:.1f}" for key in ("seconds", "cpu_seconds")]
    return [*minutes, f"{cost['peak_bytes'] / 1e6:,.0f} MB" if cost["peak_bytes"] else "-"]


def _accuracy(figures: Record | None) -> str:
    if figures is None:
        return ""
    norm = figures["acc_norm"]
    return f"{figures['acc']:.1%}"[:-1] + (f" ({norm:.1%}".removesuffix("%") + ")" if norm is not None else "")


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
