"""The full-precision model on the same windows, through transformers: the only place here that imports torch.

Call it only when asked for (`billm-ppl --against`): the imports take seconds and their memory counts as the process's.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from billm_format.errors import DoesNotFitError, UsageError
from billm_rt.ppl import Divergence, Float32, Ids, Progress, ProtocolName, Result, Scorer, chunk_rows, measure, paired

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Reference:
    """A Hugging Face model in float32 on the CPU, ready to score windows."""

    scorer: Scorer
    file_bytes: int  # of the weights on disk
    weights_bytes: int  # of the weights in memory, float32


def load(path: Path, vocab_size: int, threads: int | None = None) -> Reference:
    """Load a Hugging Face model directory or a `.gguf` file as float32 on the CPU.

    Raises UsageError when a package is missing, the path is no such model or its vocabulary has another size than
    `vocab_size` (its tokens would mean something else), DoesNotFitError when it is larger than the free memory.
    """
    if not path.exists():
        raise UsageError(f"--against {path}: no such model directory or .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"--against {path}: wanted a Hugging Face model directory or a .gguf file")
    torch, transformers = _import()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    where = {"pretrained_model_name_or_path": path, "local_files_only": True}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # reading GGUF draws a progress bar that no setting turns off
            config = transformers.AutoConfig.from_pretrained(**where)
            weights_bytes = 4 * _count_parameters(torch, transformers, config)
            _check(path, config.vocab_size, vocab_size, weights_bytes)
            model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    except ImportError as error:
        raise _missing(error) from None
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:  # all that from_pretrained throws
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--against {path}: transformers cannot load it ({type(error).__name__}: {reason})") from error
    return Reference(_scorer(torch, model), _file_bytes(path), weights_bytes)


def evaluate(
    reference: Reference,
    parts: Sequence[Ids],
    protocol: ProtocolName,
    progress: Progress | None = None,
    divergence: Divergence | None = None,
    other: Scorer | None = None,
) -> Result:
    """Return the reference's perplexity on `parts`.

    With `divergence` and `other` (the `.billm` model's scorer) both models read every window side by side, and
    `divergence` collects how far the other's distributions are; its time is not counted in the result.
    """
    if divergence is None or other is None:
        return measure(parts, reference.scorer, protocol, progress)
    result = measure(parts, paired(reference.scorer, other, divergence), protocol, progress)
    seconds = result.seconds - divergence.seconds
    read = result.tokens_per_s * result.seconds
    return dataclasses.replace(result, seconds=seconds, tokens_per_s=read / seconds)


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise _missing(error) from None
    return torch, transformers


def _missing(error: ImportError) -> UsageError:
    what = error.name or " ".join(str(error).split())[:200]
    return UsageError(f"--against needs packages that are not installed ({what}): pip install 'billm-rt[convert]'")


def _count_parameters(torch: Any, transformers: Any, config: Any) -> int:
    with torch.device("meta"):  # shapes only
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _check(path: Path, found: int, wanted: int, weights_bytes: int) -> None:
    import psutil

    if found != wanted:
        raise UsageError(
            f"--against {path} has a vocabulary of {found} tokens, the .billm file one of {wanted}: "
            "give the model that the file was converted from"
        )
    free = psutil.virtual_memory().available
    if weights_bytes > free:
        raise DoesNotFitError(
            f"--against {path}: its weights take {weights_bytes / 1e9:.1f} GB in float32, "
            f"but {free / 1e9:.1f} GB of memory are free: measure it on a larger machine"
        )


def _scorer(torch: Any, model: Any) -> Scorer:
    """One pass of the decoder over the whole window, then the output head chunk by chunk."""
    head = model.get_output_embeddings()
    rows = chunk_rows(model.config.vocab_size)

    def score(window: Ids, first: int) -> Iterator[Float32]:
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(window[:-1]))[None]
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, first - 1 :]
            for start in range(0, len(hidden), rows):
                yield head(hidden[start : start + rows]).numpy()

    return score


def _file_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    for suffix in _WEIGHT_SUFFIXES:  # a folder may hold the same weights twice, in two formats
        if sizes := [file.stat().st_size for file in path.glob(f"*{suffix}")]:
            return sum(sizes)
    return 0
