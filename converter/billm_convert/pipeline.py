"""A whole conversion: one decoder block in memory at a time, each calibrated on the binarized blocks before it."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert import budget, gate, illustrate, resources
from billm_convert.binarizing import Binarizing
from billm_convert.block import embed
from billm_convert.calibration import choose_texts, describe
from billm_convert.drawing import Drawing
from billm_convert.embedding import to_float16
from billm_convert.head_moment import solve_tables, stored_table
from billm_convert.job import Job
from billm_convert.settings import (
    COL_SCALED,
    CPU_CALIBRATION,
    EFFORTS,
    FOLLOWED,
    GPU_CALIBRATION,
    MAX_LEVEL,
    STAGES,
    TUNED,
    TUNING_TOKENS,
    CheckReport,
    ConvertReport,
    ConvertSettings,
    Event,
    LinearReport,
    Progress,
)
from billm_convert.source import ModelSource, open_model
from billm_convert.tokenizer import TokenizerFiles
from billm_convert.tune import Tuning
from billm_convert.tune_blocks import BlockTuning
from billm_convert.tune_train import product_dtype
from billm_convert.workdir import Kind, WorkFolder
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.layout import CHAT_TEMPLATE, TOKENIZER, linear_names
from billm_format.reader import BillmFile
from billm_format.writer import Source, write_file
from billm_rt.texts import Text

_BATCH_TOKENS = 4096  # tokens run through a block at once: bounds the memory of its inner activations


def convert(
    model: str | Path, out: str | Path, settings: ConvertSettings | None = None, progress: Progress | None = None
) -> ConvertReport:
    """Convert MODEL (a Hugging Face folder or a `.gguf` file) to the `.billm` file `out`.

    Peak memory is the calibration's hidden states plus a few times the largest block, whatever the model's size.
    Finished blocks are kept in the folder `out` + ".work" until the file is whole: `settings.resume` goes on from there
    and ends in the same bytes. Raises UsageError for a model or an option that cannot be used, DoesNotFitError for too
    little disk or memory.
    """
    started = time.monotonic()
    conversion = Conversion(model, Path(out), settings or ConvertSettings(), progress or (lambda event: None))
    return conversion.run(started)


class Conversion:
    """One conversion, everything about it decided and checked before any work is done."""

    def __init__(self, model: str | Path, out: Path, settings: ConvertSettings, progress: Progress) -> None:
        """Open and check the model and the text, choose what the settings left open, and say so."""
        _check_out(out)
        self.out = out
        self.folder = settings.report and illustrate.check_folder(settings.report, out)
        self.settings = settings
        self._watcher = progress
        self._stage = STAGES["blocks"]  # what is being done
        self.source: ModelSource = open_model(model)
        self.config: ModelConfig = self.source.config
        self.device = resources.choose_device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.nsamples, self.seqlen = self._calibration_size()
        self.tokenizer: TokenizerFiles = self.source.tokenizer()
        if self.tokenizer.chat_template is None:
            self.say("the model has no chat template: billm-chat will use a plain one")
        self.texts, note = choose_texts(settings.calib)
        if note:
            self.say(note)
        self.drawing = Drawing(self.source, self.tokenizer, self.texts, settings.seed, self.device, self._progress)
        self.held_out = self._held_out_text()
        self.quantization = self._quantization()
        tokens = self.nsamples * self.seqlen
        plan = resources.memory_plan(
            self.config,
            tokens,
            min(tokens, self._batch() * self.seqlen),
            original=settings.recipe in FOLLOWED,
            again=settings.recipe == TUNED,
        )
        self.memory = {"binarizing": plan}  # by stage
        self._place = self.device  # of hidden states, where there is room

    def _progress(self, event: Event) -> None:
        self._stage = STAGES.get(event.stage, self._stage)
        self._watcher(event)

    def say(self, text: str) -> None:
        """Tell whoever watches."""
        self._progress(Event("note", text=text))

    def _quantization(self) -> Quantization:
        scaled = self.settings.recipe in COL_SCALED
        quantization = Quantization(
            self.settings.block_size,
            embedding_bits=self.settings.embedding_bits,
            col_scales=tuple(linear_names(self.config)) if scaled else (),
        )
        target = self.settings.target_bits
        return quantization if target is None else budget.spend(self.config, quantization, target)

    def _calibration_size(self) -> tuple[int, int]:
        """Settle windows and their length: the paper's on a GPU, fewer on a CPU, never beyond the model's context."""
        settings = self.settings
        on_gpu = self.device.type == "cuda"
        nsamples, seqlen = GPU_CALIBRATION if on_gpu else CPU_CALIBRATION
        if settings.nsamples is None and settings.seqlen is None:
            why = "as in the paper" if on_gpu else "the paper has 128 x 2,048; give --nsamples and --seqlen for that"
            self.say(f"calibrating on {nsamples} windows of {seqlen:,} tokens ({why})")
        nsamples, seqlen = settings.nsamples or nsamples, settings.seqlen or seqlen
        if seqlen > self.config.max_position_embeddings:
            seqlen = self.config.max_position_embeddings
            self.say(f"windows cut to {seqlen:,} tokens: that is the model's whole context")
        return nsamples, seqlen

    def _batch(self) -> int:
        return max(1, _BATCH_TOKENS // self.seqlen)

    def run(self, started: float) -> ConvertReport:
        """Do the work that is not done yet, write the file and return what it came to."""
        with WorkFolder(self.out) as work, self._explain_full_device(work):
            state = {"fingerprint": self.fingerprint(), "report": str(self.folder)}
            resumed = self._begin(work, state)
            if resumed is None:
                return self._already_done(started)
            self._check_room(work)
            tokens = self._tokens(work)
            if self.settings.embedding_bits == 4:
                solve_tables(self.source, tokens, work, self.device)
            job = Job(self.source, self.quantization, self.settings, self.device, work, self._progress)
            tuning, turn = self._tuning(job)
            blocks = Binarizing(job)
            if turn or resumed < self.config.num_hidden_layers:
                blocks.run(self._embed(work, tokens), self._batch(), self._place, turn)
            record = {
                **self.record(),
                "layers": [linear.to_json() for linear in blocks.linears],
                "calibration": describe(self.texts, tokens, self.settings.seed),
            }
            if tuning:
                if turn:
                    tuning.keep_targets(turn)
                    turn = None  # gigabytes of hidden states
                record["tuning"] = {**tuning.run(), "block_errors": blocks.errors}
            size = self._assemble(work, record)
            report = self._report(started, record, size, resumed)
            if self.folder:
                self._progress(Event("drawing", 0, 1))
                beginning = self._embed(work, tokens[: max(1, _BATCH_TOKENS // 2 // self.seqlen)])
                illustrate.write(self.folder, self.source, self.quantization, report, work, beginning.to(self.device))
            work.remove()  # last: an interrupted check or a report that failed can be done again
        return report

    @contextlib.contextmanager
    def _explain_full_device(self, work: WorkFolder) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"{resources.describe_device(self.device)} ran out of memory while {self._stage}; "
                f"{work.finished_blocks()} of {self.config.num_hidden_layers} blocks are finished and kept: make room "
                "there and run the same command with --resume, or start over (--force) with a smaller --nsamples or "
                "--seqlen, or with --device cpu"
            ) from error

    def _check_room(self, work: WorkFolder) -> None:
        """Raise DoesNotFitError for too little memory or disk, before hours of work rather than after."""
        effort = EFFORTS[self.settings.effort] if self.settings.recipe == TUNED else None
        training = 0
        advice = "give a smaller --nsamples or --seqlen"
        plan = self.memory["binarizing"]
        if effort:
            size = (self._tuning_seqlen(), product_dtype(self.device).itemsize)
            plan |= resources.block_tuning_memory(self.config, effort, *size)
            self.memory["training"] = resources.tuning_memory(self.config, effort, *size)
            training = resources.tuning_disk(self.config, effort, self._tuning_seqlen())
            advice += ", --effort fast, or another recipe"
        self._place = resources.hidden_place(plan, self.device)
        if self.device.type == "cuda":
            where = "on the device" if self._place == self.device else "in the host's memory"
            self.say(f"the text's hidden states ({plan['hidden_states'] / 1e9:.2f} GB) are kept {where}")
        for stage in self.memory.values():
            resources.check_memory(stage, self.device, self._place, advice)
        if work.tokens() is None and (sampling := self.drawing.memory(self.nsamples, self.seqlen)):
            self.memory["sampling text"] = sampling
        more = (
            self.drawing.memory(effort.all_windows, self._tuning_seqlen())
            if effort and not work.tuning_text()
            else None
        )
        if more:
            self.memory["sampling more text"] = more
        resources.check_disk(self.out, self.config, self.quantization, work.finished_bytes(), training)

    # --- beginning and resuming ------------------------------------------------------------------------------------

    def _begin(self, work: WorkFolder, state: dict[str, Any]) -> int | None:
        """Return how many blocks are finished already; None: the file itself is."""
        old = work.state()
        if old is not None and self.settings.resume:
            work.check_same(old.get("fingerprint"), state["fingerprint"])
            illustrate.check_free(self.folder, replace=old.get("report") == state["report"])
            finished = work.finished_blocks()
            self.say(f"going on after {finished} of {self.config.num_hidden_layers} blocks")
            return finished
        if old is not None and not self.settings.force:
            raise UsageError(
                f"{work.path} holds a conversion that was not finished ({work.finished_blocks()} of "
                f"{self.config.num_hidden_layers} blocks): pass --resume to go on with it or --force to start over"
            )
        if self.out.exists() and not self.settings.force:
            if self.settings.resume and self._is_this_conversion():
                return None
            raise UsageError(f"{self.out} exists already: pass --force to replace it")
        illustrate.check_free(self.folder, replace=self.settings.force)
        work.begin(state)
        if self.settings.resume:
            self.say("there is nothing to resume: starting from the first block")
        return 0

    def _is_this_conversion(self) -> bool:
        with BillmFile.open(self.out) as file:
            return all(file.conversion.get(key) == value for key, value in self.record().items())

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the result depends on, and the files' times: resuming wants all of it unchanged."""
        files = {str(file.name): [file.stat().st_size, file.stat().st_mtime_ns] for file in self.source.files()}
        return {
            "model files": files,
            "model": self.source.identity(),
            "calibration text": [[text.name, text.sha256] for text in self.texts],
            "program": resources.code_digest(),
            "device": resources.device_model(self.device),
            "--threads": torch.get_num_threads(),
            **{f"--{key.replace('_', '-')}": value for key, value in self.chosen().items()},
            **resources.versions(),
        }

    def chosen(self) -> dict[str, Any]:
        """Return the options that shape the result, the defaults filled in."""
        settings = self.settings
        return {
            "recipe": settings.recipe,
            **({"ablation": settings.ablation} if settings.ablation else {}),
            "block_size": settings.block_size,
            **({} if settings.target_bits is None else {"target_bits": settings.target_bits}),
            "max_salient": settings.max_salient,
            "damp": settings.dampening,
            "max_level": MAX_LEVEL,
            "calib": ",".join(Path(text.choice).name for text in self.texts),
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": settings.seed,
            "embedding_bits": settings.embedding_bits,
            **({"effort": settings.effort} if settings.recipe == TUNED else {}),
        }

    def record(self) -> dict[str, Any]:
        """Return what the conversion record says beforehand: no times, no paths; the same run gives the same bytes."""
        return {
            "recipe": self.settings.recipe,
            "settings": self.chosen(),
            "source": {"family": self.config.family, "sha256": self.source.identity()},
            "device": self.device.type,
            "versions": resources.versions(),
        }

    # --- calibration and blocks --------------------------------------------------------------------------------------

    def _tokens(self, work: WorkFolder) -> NDArray[np.int64]:
        tokens = work.tokens()
        if tokens is not None:
            return tokens
        tokens = self.drawing.calibration(self.nsamples, self.seqlen)
        if int(tokens.max()) >= self.config.vocab_size:
            raise UsageError(f"the tokenizer gives token {tokens.max()}, the model knows {self.config.vocab_size} only")
        work.save_tokens(tokens)
        return tokens

    def _embed(self, work: WorkFolder, tokens: NDArray[np.int64]) -> Tensor:
        """Return the first block's input, float32 [windows, seqlen, hidden] on the CPU, from the tables as stored."""
        tables: dict[str, Tensor] = {
            name: torch.from_numpy(self._float16(name).astype(np.float32))
            for name in ("project_in.weight", "pos_embed.weight")
            if name in self.source.names()
        }
        table = stored_table(self.source, "embed", self.settings.embedding_bits, work)
        rows = table.lookup(torch.from_numpy(tokens))
        return embed(self.config, tables, rows).contiguous()

    # --- training ----------------------------------------------------------------------------------------------------

    def _tuning(self, job: Job) -> tuple[Tuning | None, BlockTuning | None]:
        """Return what trains the model, and what trains its blocks before that, where the recipe does."""
        if self.settings.recipe != TUNED:
            return None, None
        tuning = Tuning(job)
        return tuning, tuning.blocks(lambda windows: self.drawing.tuning(windows, self._tuning_seqlen()))

    def _tuning_seqlen(self) -> int:
        return min(TUNING_TOKENS, self.seqlen)

    # --- the file ----------------------------------------------------------------------------------------------------

    def _assemble(self, work: WorkFolder, record: dict[str, Any]) -> int:
        """Write the file from the work folder and the source, one tensor in memory at a time; return its size."""
        tensors: dict[str, Source] = {TOKENIZER: self.tokenizer.tokenizer_json}
        if self.tokenizer.chat_template is not None:
            tensors[CHAT_TEMPLATE] = self.tokenizer.chat_template.encode()
        kind: Kind = "final" if self.settings.recipe == TUNED else "block"
        finished = range(work.finished_blocks(kind))
        of_blocks = {
            name: partial(work.block_tensor, i, name, kind) for i in finished for name in work.block_names(i, kind)
        }
        for name in self.source.names():
            if name.startswith("layers.") or name in of_blocks:
                continue
            if name in ("embed.weight", "head.weight"):
                bits = self.settings.embedding_bits
                tensors |= stored_table(self.source, name.removesuffix(".weight"), bits, work).tensors()
            elif name.startswith(("pos_embed.", "project_")):
                tensors[name] = partial(self._float16, name)
            else:
                tensors[name] = partial(self._float32, name)
        return write_file(
            self.out,
            config=self.config,
            quantization=self.quantization,
            tokenizer_info=self.tokenizer.info,
            conversion=record,
            tensors={**tensors, **of_blocks},
            progress=lambda done, total: self._progress(Event("writing", done, total)),
        )

    def _float16(self, name: str) -> NDArray[np.float16]:
        return to_float16(name, self.source.tensor(name))

    def _float32(self, name: str) -> NDArray[np.float32]:
        value: NDArray[np.float32] = self.source.tensor(name).numpy()
        return value

    def _held_out_text(self) -> Text | None:
        """Return what the finished file is checked on; None: it is not, because of --no-check or for want of a text."""
        if not self.settings.check:
            return None
        try:
            return gate.held_out_text([text.choice for text in self.texts])
        except UsageError as error:
            if self.settings.max_ppl_ratio is not None:
                raise
            self.say(f"the result will not be checked against the original: {error}")
            return None

    def _check(self) -> CheckReport | None:
        if self.held_out is None:
            return None
        self._progress(Event("checking", 0, 1))
        return gate.check(self.source, self.out, self.held_out, self.settings, self.device)

    def _report(self, started: float, record: dict[str, Any], size: int, resumed: int) -> ConvertReport:
        check = self._check()
        stage = max(self.memory, key=lambda stage: sum(self.memory[stage].values()))
        with BillmFile.open(self.out) as file:
            paper, true = file.bits()
        return ConvertReport(
            path=str(self.out),
            file_bytes=size,
            bits_paper=paper,
            bits_true=true,
            layers=tuple(LinearReport(**layer) for layer in record["layers"]),
            calibration=record["calibration"],
            settings=record["settings"],
            device=resources.describe_device(self.device),
            seconds=time.monotonic() - started,
            peak_bytes=resources.peak_bytes(),
            device_peak_bytes=resources.device_peak_bytes(self.device),
            memory_stage=stage,
            memory=self.memory[stage],
            resumed_blocks=resumed,
            check=check,
            tuning=record.get("tuning"),
        )

    def _already_done(self, started: float) -> ConvertReport:
        self.say(f"{self.out} is finished already")
        with BillmFile.open(self.out) as file:
            report = self._report(started, file.conversion, file.nbytes, self.config.num_hidden_layers)
        if self.folder and self.folder.exists():
            self.say(f"{self.folder} is left as it is")
        elif self.folder:
            illustrate.write(self.folder, self.source, self.quantization, report)
        return report


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the name of the file to write")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}; make it first")
