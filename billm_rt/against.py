"""The full-precision model on the same text, through transformers: the only place here that imports torch.

Call it only when asked for (`billm-ppl --against`, `billm-eval MODEL_DIR`): the imports take seconds and their memory
counts as the process's.
"""

import contextlib
import dataclasses
import inspect
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from billm_format.errors import DoesNotFitError, UsageError
from billm_rt.backend import gpu_index
from billm_rt.ppl import Divergence, Float32, Ids, Progress, ProtocolName, Result, Scorer, chunk_rows, measure, paired

_LONGEST = 4096  # tokens that a zero-shot context may have; a `.billm` model's default context
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Reference:
    """A Hugging Face model in float32, ready to score windows."""

    scorer: Scorer
    file_bytes: int  # of the weights on disk
    weights_bytes: int  # of the weights in memory, float32
    device: str  # "cpu", "cuda:0"


def load(path: Path, vocab_size: int, threads: int | None = None, device: str = "auto") -> Reference:
    """Load a Hugging Face model directory or a `.gguf` file as float32 on a device as `backend.choose` names them.

    Raises UsageError when a package is missing, torch has no such device, the path is no such model or its vocabulary
    has another size than `vocab_size` (its tokens would mean something else), DoesNotFitError when it is larger than
    the free memory.
    """
    loaded = _load(path, f"--against {path}", threads, vocab_size, device)
    return Reference(_scorer(loaded.torch, loaded.model), _file_bytes(path), loaded.weights_bytes, loaded.device)


def load_reader(path: Path, threads: int | None = None, device: str = "auto") -> "TransformersReader":
    """Load a model as `load` does, with its own tokenizer, to score zero-shot tasks with it."""
    loaded = _load(path, str(path), threads, None, device)
    try:
        tokenizer = loaded.transformers.AutoTokenizer.from_pretrained(**_where(path))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: transformers cannot load its tokenizer ({error})") from error
    return TransformersReader(loaded, tokenizer)


@dataclass(frozen=True)
class _Loaded:
    torch: Any  # the modules
    transformers: Any
    model: Any
    device: str
    weights_bytes: int


def _load(path: Path, named: str, threads: int | None, vocab_size: int | None, device: str) -> _Loaded:
    """Load the model at `path`, which messages call `named`; see `load`."""
    if not path.exists():
        raise UsageError(f"{named}: no such model directory or .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"{named}: wanted a Hugging Face model directory or a .gguf file")
    torch, transformers = _import(named)
    place = _place(torch, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # reading GGUF draws a progress bar that no setting turns off
            config = transformers.AutoConfig.from_pretrained(**_where(path))
            weights_bytes = 4 * _count_parameters(torch, transformers, config)
            _check(named, config.vocab_size, vocab_size)
            _require_memory(torch, place, named, weights_bytes)
            model = transformers.AutoModelForCausalLM.from_pretrained(**_where(path), dtype=torch.float32).eval()
            model.to(place)
    except ImportError as error:
        raise _missing(named, error) from None
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:  # all that from_pretrained throws
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{named}: transformers cannot load it ({type(error).__name__}: {reason})") from error
    return _Loaded(torch, transformers, model, place, weights_bytes)


def _where(path: Path) -> dict[str, Any]:
    """Return the arguments by which transformers finds a model."""
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": path, "local_files_only": True}


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


def _import(named: str) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise _missing(named, error) from None
    return torch, transformers


def _missing(named: str, error: ImportError) -> UsageError:
    what = error.name or " ".join(str(error).split())[:200]
    return UsageError(f"{named} needs packages that are not installed ({what}): pip install 'billm-rt[convert]'")


def _count_parameters(torch: Any, transformers: Any, config: Any) -> int:
    with torch.device("meta"):  # shapes only
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _check(named: str, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise UsageError(
            f"{named} has a vocabulary of {found} tokens, the .billm file one of {wanted}: "
            "give the model that the file was converted from"
        )


def _place(torch: Any, device: str) -> str:
    """Return torch's name for a device; UsageError where torch does not see it."""
    index, count = gpu_index(device), torch.cuda.device_count()
    if index is None:
        return "cpu"
    if index < count:
        return f"cuda:{index}"
    found = f"sees {count} CUDA devices, counted from 0" if count else "sees no CUDA device"
    raise UsageError(
        f"--device {device}: torch {torch.__version__}, which runs the full-precision model, {found}; use --device cpu"
    )


def _require_memory(torch: Any, place: str, named: str, weights_bytes: int) -> None:
    import psutil

    # Weights come through the host's memory wherever they go.
    rooms = {"memory": psutil.virtual_memory().available}
    if place != "cpu":
        rooms[f"memory on {place}"] = torch.cuda.mem_get_info(place)[0]
    for what, free in rooms.items():
        if weights_bytes > free:
            raise DoesNotFitError(
                f"{named}: its weights take {weights_bytes / 1e9:.1f} GB in float32, "
                f"but {free / 1e9:.1f} GB of {what} are free: measure it on a larger machine"
            )


def _scorer(torch: Any, model: Any) -> Scorer:
    """One pass of the decoder over the whole window, then the output head chunk by chunk."""
    head = model.get_output_embeddings()
    rows = chunk_rows(model.config.vocab_size)

    def score(window: Ids, first: int) -> Iterator[Float32]:
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(window[:-1]))[None].to(model.device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, first - 1 :]
            for start in range(0, len(hidden), rows):
                yield head(hidden[start : start + rows]).cpu().numpy()

    return score


class TransformersReader:
    """A model of transformers as an `eval_score.Reader`."""

    def __init__(self, loaded: _Loaded, tokenizer: Any) -> None:
        """Hold nothing yet."""
        self.device = loaded.device
        self.tokens: list[int] = []
        self._torch, self._model, self._tokenizer = loaded.torch, loaded.model, tokenizer
        self._new_cache = loaded.transformers.DynamicCache
        self._cache = self._new_cache()
        forward = inspect.signature(loaded.model.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in forward else "past_key_values"  # its old name
        config = loaded.model.config
        # A cache that has begun to slide cannot be cut back.
        window = getattr(config, "sliding_window", None) or _LONGEST + 1
        self.max_length = min(config.max_position_embeddings, _LONGEST, window - 1)

    def encode(self, text: str) -> list[int]:
        """Return the text's tokens."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        surplus = len(self.tokens) - length
        if length == 0:
            self._cache = self._new_cache()
        elif surplus > 0:
            self._cache.crop(-surplus)
        del self.tokens[length:]

    def read(self, token_ids: list[int], *, logits: bool) -> Float32 | None:
        """Read tokens behind those held; return float32 [tokens, vocab_size] if wanted."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([token_ids], device=self._model.device)
            output = self._model.base_model(input_ids=ids, use_cache=True, **{self._cache_argument: self._cache})
            self.tokens += token_ids
            if not logits:
                return None
            result: Float32 = self._model.get_output_embeddings()(output.last_hidden_state[0]).cpu().numpy()
            return result


def _file_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    for suffix in _WEIGHT_SUFFIXES:  # a folder may hold the same weights twice, in two formats
        if sizes := [file.stat().st_size for file in path.glob(f"*{suffix}")]:
            return sum(sizes)
    return 0
