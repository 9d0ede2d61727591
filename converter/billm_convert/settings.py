"""What a conversion is told, and what it tells while it runs. Nothing here loads torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from billm_format.command import finite
from billm_format.config import BLOCK_SIZES, EMBEDDING_BITS
from billm_format.errors import UsageError

TUNED = "tuned"  # trains what "refined" found
RECIPES = ("paper", "refined", TUNED)
COL_SCALED = ("refined", TUNED)  # recipes whose Linears have a scale per column
FOLLOWED = ("refined", TUNED)  # recipes calibrated on two streams, Linear by Linear
DAMP = {"paper": 0.01, "refined": 0.05, TUNED: 0.05}
MAX_LEVEL = 255  # the largest level of a weight, in steps of its row: all that the format has room for
# What can be left out of the paper's recipe (its Fig. 8, and the compensation).
ABLATIONS = ("salient-only", "splitting-only", "no-compensation")
FEWEST_SALIENT = 3  # columns of a block, as in the paper, unless even that is more than the most
SELF = "self"  # --calib: text that the full-precision model writes itself

# The paper's calibration, and what a CPU gets through in minutes: (windows, tokens in each).
GPU_CALIBRATION = (128, 2048)
CPU_CALIBRATION = (32, 1024)


@dataclass(frozen=True)
class Effort:
    """How long the recipe "tuned" trains: each block as soon as it is solved, then the vectors of the whole model."""

    windows: int  # of TUNING_TOKENS tokens, to train the whole model on
    block_steps: int  # for each block, against the full-precision block
    model_steps: int  # of the whole model, against the full-precision logits
    step_windows: int = 2  # windows in a step of either

    @property
    def block_windows(self) -> int:
        """How many windows blocks are trained on, each once; the whole model never sees them."""
        return self.block_steps * self.step_windows

    @property
    def all_windows(self) -> int:
        """How many windows there are to train on."""
        return self.windows + self.block_windows


# Windows of 256 cost less; on them a run gained less at 2,048 tokens than at 512, see README.md.
TUNING_TOKENS = 512
EFFORTS = {
    "fast": Effort(windows=160, block_steps=40, model_steps=80),
    "normal": Effort(windows=640, block_steps=160, model_steps=320),
    "max": Effort(windows=4000, block_steps=640, model_steps=2000),
}


@dataclass(frozen=True)
class ConvertSettings:
    """How to convert; None: chosen when the conversion starts, and said."""

    recipe: str = "refined"
    effort: str = "normal"  # of the recipe "tuned": a key of EFFORTS
    ablation: str | None = None  # "salient-only": no split; "splitting-only": no salient columns; "no-compensation"
    block_size: int = 128
    target_bits: float | None = None  # true bits per weight; what blocks of block_size leave goes into smaller ones
    max_salient: int = 30  # most salient columns in a block
    damp: float | None = None  # added to the Hessian's diagonal, as a share of its mean; None: the recipe's own
    calib: str | None = None  # name of a text, path of a file, or "self"
    nsamples: int | None = None  # calibration windows
    seqlen: int | None = None  # tokens in each
    seed: int = 0
    device: str = "auto"
    embedding_bits: int = 8
    threads: int | None = None
    resume: bool = False
    force: bool = False
    check: bool = True  # measure a short perplexity beside the original's when the file is whole
    max_ppl_ratio: float | None = None  # of the perplexities: beyond it the command fails
    report: Path | None = None  # folder to write with a page and pictures of the conversion

    def __post_init__(self) -> None:
        """Raise UsageError, naming the option, for a value that cannot work."""
        if self.recipe not in RECIPES:
            raise UsageError(f"--recipe: wanted one of {', '.join(RECIPES)}, found {self.recipe!r}")
        if self.effort not in EFFORTS:
            raise UsageError(f"--effort: wanted one of {', '.join(EFFORTS)}, found {self.effort!r}")
        if self.ablation is not None and self.ablation not in ABLATIONS:
            raise UsageError(f"--ablation: wanted one of {', '.join(ABLATIONS)}, found {self.ablation!r}")
        if self.ablation is not None and self.recipe != "paper":
            raise UsageError(f"--ablation takes the paper's recipe apart, not {self.recipe}: leave one of them out")
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"--block-size: wanted one of {', '.join(map(str, BLOCK_SIZES))}, found {self.block_size}")
        if not 0 <= self.max_salient <= self.block_size:
            raise UsageError(f"--max-salient: wanted 0 to the block size {self.block_size}, found {self.max_salient}")
        if self.target_bits is not None and not 0 < self.target_bits < math.inf:
            raise UsageError(f"--target-bits: wanted a number above 0, found {self.target_bits:g}")
        if self.damp is not None and not (math.isfinite(self.damp) and 0 <= self.damp <= 1):
            raise UsageError(f"--damp: wanted a share of the mean diagonal, 0 to 1, found {self.damp:g}")
        for option, value, least in (
            ("nsamples", self.nsamples, 1),
            ("seqlen", self.seqlen, 2),
            ("threads", self.threads, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"--{option}: wanted {least} or more, found {value}")
        if self.embedding_bits not in EMBEDDING_BITS:
            raise UsageError(f"--embedding-bits: wanted 4, 8 or 16, found {self.embedding_bits}")
        if self.max_ppl_ratio is not None and not self.max_ppl_ratio > 0:
            raise UsageError(f"--max-ppl-ratio: wanted a number above 0, found {self.max_ppl_ratio:g}")
        if self.max_ppl_ratio is not None and not self.check:
            raise UsageError("--max-ppl-ratio bounds what --no-check leaves out: give one of them")
        if self.resume and self.force:
            raise UsageError("--resume goes on with a started conversion and --force starts over: give one of them")

    @property
    def dampening(self) -> float:
        """What is added to the Hessian's diagonal, as a share of its mean."""
        return DAMP[self.recipe] if self.damp is None else self.damp


@dataclass(frozen=True)
class LinearReport:
    """What one binarized Linear came to, before any training of it."""

    name: str  # "layers.3.q_proj"
    error: float  # tr(D H Dᵀ) / tr(W H Wᵀ): relative output error on the calibration text
    weight_error: float  # ||D||² / ||W||²
    salient: float  # share of the columns
    sparse: float  # share of the non-salient weights
    damp: float

    def to_json(self) -> dict[str, Any]:
        """Return the record with six significant digits."""
        numbers = {key: float(f"{value:.6g}") for key, value in vars(self).items() if key != "name"}
        return {"name": self.name, **numbers}


@dataclass(frozen=True)
class Event:
    """One step of progress: `done` of `total`, fractions of a block included, or something to say."""

    stage: Literal["note", "sampling", "blocks", "tuning model", "writing", "checking", "drawing"]
    done: float = 0.0
    total: float = 0.0
    text: str = ""
    linears: tuple[LinearReport, ...] = ()  # of the block just finished
    then: str = ""  # what comes after this stage and takes as long


# What is being done in a stage, as a person reads it; a note belongs to whatever is going on.
STAGES = {
    "sampling": "sampling text",
    "blocks": "binarizing",
    "tuning model": "tuning the model",
    "writing": "writing",
    "checking": "checking",
    "drawing": "drawing the report",
}

Progress = Callable[[Event], None]


@dataclass(frozen=True)
class CheckReport:
    """Perplexities of the file and of its original on the same windows of text that calibration did not see."""

    text: str
    windows: int
    seqlen: int  # tokens in each window
    perplexity: float  # of the file
    original: float
    ratio: float  # perplexity / original
    collapsed: bool  # beyond `gate.COLLAPSE_RATIO`
    advice: str | None  # what to try where it is
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the record."""
        record: dict[str, Any] = finite(vars(self))
        return record


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion came to. `seconds` and memory are of this run alone and not in the file."""

    path: str
    file_bytes: int
    bits_paper: float
    bits_true: float
    layers: tuple[LinearReport, ...]
    calibration: dict[str, Any]
    settings: dict[str, Any]
    device: str
    seconds: float
    peak_bytes: int  # of the process
    device_peak_bytes: int | None
    memory_stage: str  # the stage that takes most, as computed
    memory: dict[str, int]  # of what
    resumed_blocks: int = 0
    check: CheckReport | None = None  # None: left out
    tuning: dict[str, Any] | None = None  # None: the recipe does not train

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `--json` prints."""
        out = {key: value for key, value in vars(self).items() if not key.startswith("bits_")}
        out["bits"] = {"paper": self.bits_paper, "true": self.bits_true}
        out["layers"] = [layer.to_json() for layer in self.layers]
        out["check"] = self.check.to_json() if self.check else None
        return out
