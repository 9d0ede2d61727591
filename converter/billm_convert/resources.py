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
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.layout import all_tensors, layer_tensors

_HOST = torch.device("cpu")

# Of the memory that the rest of a conversion leaves free on a GPU, what hidden states may take.
_HIDDEN_SHARE = 0.5

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


def memory_plan(config: ModelConfig, tokens: int, batch_tokens: int, streams: int = 1) -> dict[str, int]:
    """Return the bytes that a conversion takes, by kind, for `tokens` calibration tokens, `batch_tokens` at once.

    With two `streams` the text also goes through the original blocks.
    """
    linears = config.linears().values()
    weights = 4 * sum(rows * cols for rows, cols, _ in linears)
    inputs = [
        cols for name, (_, cols, _) in config.linears().items() if name in ("q_proj", "o_proj", "up_proj", "down_proj")
    ]
    return {
        "hidden_states": streams * 4 * tokens * config.hidden_size,
        "block_weights": streams * weights,
        # Of all inputs, and a second stream's drift.
        "hessians": 4 * (sum(cols * cols for cols in inputs) + (streams - 1) * max(inputs) ** 2),
        "solver": max(solving_memory(rows, cols) for rows, cols, _ in linears),
        "inner_activations": 4 * batch_tokens * 3 * max(config.intermediate_size, config.hidden_size),
    }


def tuning_memory(config: ModelConfig, effort: Effort, seqlen: int, factor: int) -> dict[str, int]:
    """Return the bytes that training takes, by kind, on windows of `seqlen` tokens; a product's factor has `factor`."""
    whole = effort.model_steps > 0
    layers = config.num_hidden_layers if whole else 1
    weights = layers * sum(rows * cols for rows, cols, _ in config.linears().values())
    kept = 16 * config.hidden_size + 8 * config.intermediate_size  # values of a token in a block, for the gradient
    of_blocks = min(effort.windows, effort.block_steps * effort.step_windows)
    return {
        "weights": 0 if whole else 4 * 4 * weights,  # latent, gradient, two moments
        "products": (1 if whole else 2) * factor * weights,  # what they read, and its gradient
        "activations": factor * seqlen * (1 if whole else effort.step_windows) * layers * kept,
        "heads": 2 * factor * config.vocab_size * config.embedding_size * whole,
        # Of full precision, and a copy in 16 bits of its last; those that tuned blocks read, and their targets.
        "hidden_states": (6 * effort.windows + 8 * of_blocks) * seqlen * config.hidden_size,
    }


def check_tuning_memory(plan: dict[str, int], device: torch.device) -> None:
    """Raise DoesNotFitError, with the sum, when the plan of `tuning_memory` exceeds the memory that is free."""
    advice = "give --effort blocks, which trains one block at a time, or another recipe"
    _compare_split(plan, device, _HOST, advice)


def hidden_place(plan: dict[str, int], device: torch.device) -> torch.device:
    """Return where the hidden states of the plan are kept: on the device, or on the host for want of room there."""
    rest = sum(_without_hidden(plan).values())
    fits = plan["hidden_states"] <= _HIDDEN_SHARE * (free_memory(device) - rest)
    return device if fits or device.type == "cpu" else _HOST


def check_memory(plan: dict[str, int], device: torch.device, place: torch.device) -> None:
    """Raise DoesNotFitError, with the sum, when the plan, hidden states at `place`, exceeds the memory that is free."""
    _compare_split(plan, device, place, "give a smaller --nsamples or --seqlen")


def _compare_split(plan: dict[str, int], device: torch.device, place: torch.device, advice: str) -> None:
    """Compare a plan with what is free; what is at the device and what is at the host, if they are two."""
    if place == device:
        _compare_memory(plan, device, advice)
    else:
        _compare_memory({"hidden_states": plan["hidden_states"]}, place, advice)
        _compare_memory(_without_hidden(plan), device, advice)


def _without_hidden(plan: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in plan.items() if key != "hidden_states"}


def _compare_memory(parts: dict[str, int], device: torch.device, advice: str) -> None:
    need, free = sum(parts.values()), free_memory(device)
    what = "memory" if device.type == "cpu" else "memory on the device"
    if need > free:
        terms = " + ".join(f"{key.replace('_', ' ')} {value / 1e9:.2f}" for key, value in parts.items())
        raise DoesNotFitError(
            f"the conversion needs {need / 1e9:.2f} GB of {what} ({terms}), {free / 1e9:.2f} GB are free: {advice}"
        )


def tuning_disk(plan: dict[str, int]) -> int:
    """Return the bytes on disk that training by the plan of `tuning_memory` takes: next to the text little counts."""
    return plan["hidden_states"]


def check_disk(out: Path, config: ModelConfig, quantization: Quantization, there: int, training: int = 0) -> None:
    """Raise DoesNotFitError unless finished blocks, file and `training` bytes fit; `there` bytes of blocks exist."""
    blocks = sum(
        spec.nbytes for layer in range(config.num_hidden_layers) for spec in layer_tensors(config, quantization, layer)
    )
    sized = [spec for spec in all_tensors(config, quantization) if -1 not in spec.shape]
    file = sum(spec.nbytes for spec in sized) + _TEXTS_BYTES
    if training:
        training += 2 * blocks  # either training leaves a set of its own
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
