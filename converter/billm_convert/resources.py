"""What a conversion needs of the machine, computed before it starts, and what it has used."""

import hashlib
import platform
import resource
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch

from billm_convert.settings import Effort
from billm_convert.solved import solving_memory
from billm_convert.tune_text import HELD_OUT
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.layout import all_tensors, layer_tensors

_HOST = torch.device("cpu")

# Of the memory that the rest of a conversion leaves free on a GPU, what hidden states may take.
_HIDDEN_SHARE = 0.5

_TEXT = "training_text"  # hidden states of the text to train on: always on the host
_TEXTS_BYTES = 20 << 20  # room for the tokenizer, whose size the layout leaves free


def choose_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu", "cuda" or "cuda:n" means; UsageError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return _HOST
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not index.isdigit()):
        raise UsageError(f"--device: wanted auto, cpu, cuda or cuda:N, found {name!r}")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(kind, int(index or torch.cuda.current_device()))


def device_model(device: torch.device) -> str:
    """Return what two devices have in common that compute alike: the name of the card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe_device(device: torch.device) -> str:
    """Return what the device is called."""
    if device.type == "cuda":
        return f"{device} ({device_model(device)})"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device, those included that torch holds in reserve."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def memory_plan(
    config: ModelConfig, tokens: int, batch_tokens: int, *, original: bool = False, again: bool = False
) -> dict[str, int]:
    """Return the bytes that a conversion takes, by kind, for `tokens` calibration tokens, `batch_tokens` at once.

    `original`: the text also goes through the original blocks; `again`: what a block reads is kept meanwhile.
    """
    linears = config.linears().values()
    weights = 4 * sum(rows * cols for rows, cols, _ in linears)
    inputs = [
        cols for name, (_, cols, _) in config.linears().items() if name in ("q_proj", "o_proj", "up_proj", "down_proj")
    ]
    return {
        "hidden_states": (1 + original + again) * 4 * tokens * config.hidden_size,
        "block_weights": (1 + original) * weights,
        # Of all inputs, and a second stream's drift.
        "hessians": 4 * (sum(cols * cols for cols in inputs) + original * max(inputs) ** 2),
        "solver": max(solving_memory(rows, cols) for rows, cols, _ in linears),
        "inner_activations": 4 * batch_tokens * 3 * max(config.intermediate_size, config.hidden_size),
    }


def block_tuning_memory(config: ModelConfig, effort: Effort, seqlen: int, factor: int) -> dict[str, int]:
    """Return the bytes that training blocks in turn adds to `memory_plan`, on windows of `seqlen` tokens.

    A product's factor has `factor` bytes.
    """
    windows, trained = (count + HELD_OUT for count in (effort.all_windows, effort.block_windows))
    weights = sum(rows * cols for rows, cols, _ in config.linears().values())
    return {
        # Latent, gradient, two moments; what a product reads, and its gradient.
        "training_weights": (4 * 4 + 2 * factor) * weights,
        "training_activations": factor * seqlen * effort.step_windows * _kept(config),
        # Of full precision, and a copy in 16 bits of its last; those that blocks are trained on.
        _TEXT: (6 * windows + 4 * trained) * seqlen * config.hidden_size,
    }


def tuning_memory(config: ModelConfig, effort: Effort, seqlen: int, factor: int) -> dict[str, int]:
    """Return the bytes that training the whole model takes, by kind, on windows of `seqlen` tokens.

    A product's factor has `factor` bytes.
    """
    layers = config.num_hidden_layers
    return {
        "products": factor * layers * sum(rows * cols for rows, cols, _ in config.linears().values()),
        "activations": factor * seqlen * layers * _kept(config),
        "heads": 2 * factor * config.vocab_size * config.embedding_size,
        _TEXT: 2 * (effort.all_windows + HELD_OUT) * seqlen * config.hidden_size,
    }


def _kept(config: ModelConfig) -> int:
    """Return how many values of a token in a block are kept for the gradient."""
    return 16 * config.hidden_size + 8 * config.intermediate_size


def hidden_place(plan: dict[str, int], device: torch.device) -> torch.device:
    """Return where the hidden states of the plan are kept: on the device, or on the host for want of room there."""
    rest = sum(size for kind, size in plan.items() if kind not in ("hidden_states", _TEXT))
    fits = plan["hidden_states"] <= _HIDDEN_SHARE * (free_memory(device) - rest)
    return device if fits or device.type == "cpu" else _HOST


def check_memory(plan: dict[str, int], device: torch.device, place: torch.device, advice: str) -> None:
    """Raise DoesNotFitError, with the sum, when the plan, hidden states at `place`, exceeds the memory that is free."""
    at_host = {_TEXT} if place == device else {_TEXT, "hidden_states"}
    if device == _HOST:
        at_host = set(plan)
    for where, parts in (
        (_HOST, {kind: size for kind, size in plan.items() if kind in at_host}),
        (device, {kind: size for kind, size in plan.items() if kind not in at_host}),
    ):
        if parts:
            _compare_memory(parts, where, advice)


def _compare_memory(parts: dict[str, int], device: torch.device, advice: str) -> None:
    need, free = sum(parts.values()), free_memory(device)
    what = "memory" if device.type == "cpu" else "memory on the device"
    if need > free:
        terms = " + ".join(f"{key.replace('_', ' ')} {value / 1e9:.2f}" for key, value in parts.items())
        raise DoesNotFitError(
            f"the conversion needs {need / 1e9:.2f} GB of {what} ({terms}), {free / 1e9:.2f} GB are free: {advice}"
        )


def tuning_disk(config: ModelConfig, effort: Effort, seqlen: int) -> int:
    """Return the bytes on disk that the text to train on takes, with what full precision makes of it."""
    return (effort.all_windows + HELD_OUT) * seqlen * (8 + 2 * config.hidden_size)


def check_disk(out: Path, config: ModelConfig, quantization: Quantization, there: int, training: int = 0) -> None:
    """Raise DoesNotFitError unless finished blocks, file and `training` bytes fit; `there` bytes of blocks exist."""
    blocks = sum(
        spec.nbytes for layer in range(config.num_hidden_layers) for spec in layer_tensors(config, quantization, layer)
    )
    sized = [spec for spec in all_tensors(config, quantization) if -1 not in spec.shape]
    file = sum(spec.nbytes for spec in sized) + _TEXTS_BYTES
    if training:
        training += blocks  # the whole model's training leaves a set of its own
    need = max(0, blocks - there) + file + training
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise DoesNotFitError(
            f"{out.parent}: the conversion needs {need / 1e6:,.0f} MB of disk (finished blocks {blocks / 1e6:,.0f}, of "
            f"which {there / 1e6:,.0f} are there, the file {file / 1e6:,.0f}, training {training / 1e6:,.0f}), "
            f"{free / 1e6:,.0f} MB are free: make room or write elsewhere"
        )


def peak_bytes() -> int:
    """Return the process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that torch has held on a CUDA device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def code_digest() -> str:
    """Return a digest of the converter's own sources: a changed solver must not go on with an older one's blocks."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return what a result may depend on beside this program: package -> version."""
    out = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    for package in ("billm-rt", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "source tree"
    return out
