"""Open a full-precision model, from a Hugging Face folder or a GGUF file, and read one tensor at a time."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from billm_convert.families import Family, canonical_tensors, check_supported, family_from_hf, hf_name
from billm_convert.tokenizer import TokenizerFiles, tokenizer_from_hf
from billm_format.config import ModelConfig
from billm_format.errors import UsageError

_FLOATS = {"F16", "BF16", "F32", "F64"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelSource(ABC):
    """A full-precision model whose tensors are read lazily, under the format's names."""

    def __init__(self, path: Path, family: Family) -> None:
        """Keep the shape; subclasses then open their files and call `_check`."""
        self.path = path
        self.family = family
        self.config: ModelConfig = family.config
        self._shapes = canonical_tensors(self.config)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows start..stop of the tensor `name`, float32 on the CPU; only they are read.

        Raises UsageError when a value is not finite.
        """
        if name == "rope.inv_freq":
            if self.family.inv_freq is None:
                raise KeyError(name)
            return self.family.inv_freq
        shape = self._shapes[name]
        stop = shape[0] if stop is None else min(stop, shape[0])
        if self.family.plain_norms and "norm." in name:
            return torch.full((stop - start,), 1.0 if name.endswith(".weight") else 0.0)
        value = self._read(name, start, stop).to(torch.float32)
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise UsageError(
                f"{self.path}: tensor {self._stored_name(name)} holds {bad:,} values that are no finite number"
            )
        return value

    def names(self) -> list[str]:
        """Return the names of all tensors that the configuration calls for."""
        return [*self._shapes, *(["rope.inv_freq"] if self.family.inv_freq is not None else [])]

    def layer(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of decoder layer `index`, without their prefix: "q_proj.weight", ..."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): self.tensor(name) for name in self._shapes if name.startswith(prefix)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name`."""
        return self._shapes[name]

    @abstractmethod
    def tokenizer(self) -> TokenizerFiles:
        """Return the tokenizer as the file will hold it; UsageError when there is none that can be used."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every file that the conversion reads."""

    @abstractmethod
    def _read(self, name: str, start: int, stop: int) -> Tensor: ...

    @abstractmethod
    def _stored_name(self, name: str) -> str: ...

    @abstractmethod
    def _stored_shape(self, stored_name: str) -> tuple[int, ...] | None:
        """Return the shape of a stored tensor; None: there is none of this name."""

    @abstractmethod
    def identity(self) -> str:
        """Return a hex digest of what the model's headers say (names, shapes, types, configuration), not its path."""

    def _check(self) -> None:
        """Raise UsageError unless every tensor is there with the shape that the configuration implies."""
        missing = []
        for name, shape in self._shapes.items():
            if self.family.plain_norms and "norm." in name:
                continue
            stored = self._stored_name(name)
            found = self._stored_shape(stored)
            if found is None:
                missing.append(stored)
            elif found != shape:
                raise UsageError(
                    f"{self.path}: tensor {stored} has the shape {list(found)}, the configuration says {list(shape)}"
                )
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UsageError(f"{self.path}: the model lacks {len(missing)} tensors: {', '.join(missing[:3])}{more}")


def open_model(model: str | Path) -> ModelSource:
    """Open MODEL: a folder with config.json and safetensors, or a `.gguf` file. UsageError says what is wrong."""
    path = Path(model)
    if path.is_dir():
        return HfSource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            from billm_convert.gguf_source import GgufSource

            return GgufSource(path)
        raise UsageError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")
    if _HUB_ID.fullmatch(str(model)) and not path.parent.exists():
        name = str(model).partition("/")[2]
        raise UsageError(
            f"{model} is no folder or file here; if it is a model on the Hugging Face hub, download it first: "
            f"hf download {model} --local-dir {name}, then convert {name}"
        )
    raise UsageError(f"{path}: no such folder or file")


class HfSource(ModelSource):
    """A Hugging Face model folder: config.json and safetensors files, sharded or not."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all files; UsageError names whatever is missing or does not fit."""
        hf = _read_config(path)
        super().__init__(path, family_from_hf(hf, _eos_token_ids(path, hf)))
        self._files = _weight_files(path)
        self._where: dict[str, Path] = {}
        self._stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in self._files:
            header = read_safetensors_header(file)
            self._stored |= header
            self._where |= dict.fromkeys(header, file)
        self._prefix = self._find_prefix()
        self._check()
        for name in self._shapes:
            stored = self._stored.get(self._stored_name(name))
            if stored is not None and stored[0] not in _FLOATS:
                raise UsageError(
                    f"{path}: tensor {self._stored_name(name)} is stored as {stored[0]}: this is a quantized "
                    "checkpoint; convert the original one, in 16 or 32 bits"
                )

    def _find_prefix(self) -> str:
        """Checkpoints saved from the base model, without its head, lack the leading "model."."""
        opt = self.config.family == "opt"
        for prefix in ("model.decoder.", "decoder.") if opt else ("model.", ""):
            if f"{prefix}embed_tokens.weight" in self._stored:
                return prefix
        return "model.decoder." if opt else "model."

    def _stored_name(self, name: str) -> str:
        if name == "head.weight":
            return "lm_head.weight"
        return self._prefix + hf_name(name, opt=self.config.family == "opt")

    def _stored_shape(self, stored_name: str) -> tuple[int, ...] | None:
        stored = self._stored.get(stored_name)
        return None if stored is None else stored[1]

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._stored_name(name)
        with safe_open(self._where[stored], framework="pt") as file:
            value: Tensor = file.get_slice(stored)[start:stop]
            return value

    def tokenizer(self) -> TokenizerFiles:
        """Return the tokenizer as the file will hold it."""
        return tokenizer_from_hf(self.path, self.config)

    def files(self) -> list[Path]:
        """Return the weight files and every small JSON, template or tokenizer file beside them."""
        kinds = {".json", ".jinja", ".model", ".txt"}
        return sorted({*self._files, *(file for file in self.path.iterdir() if file.suffix in kinds)})

    def identity(self) -> str:
        """Return a hex digest of configuration and tensor headers."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        digest.update(json.dumps(sorted(self._stored.items())).encode())
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UsageError when the file is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def _read_config(path: Path) -> Any:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path} holds no config.json: it is not a Hugging Face model folder")
    raw = read_json(file)
    check_supported(raw.get("model_type"), str(file))
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UsageError(f"{path} is quantized already (method {method}); convert the original, in 16 or 32 bits")
    wrong = [name for name in raw.get("architectures") or [] if not name.endswith(("ForCausalLM", "Model"))]
    if wrong:
        raise UsageError(f"{file}: {wrong[0]} is not a causal language model")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and its validators raise types of many libraries
        raise UsageError(f"{file}: transformers cannot read it ({' '.join(str(error).split())[:300]})") from error


def _eos_token_ids(path: Path, hf: Any) -> tuple[int, ...]:
    """Collect what ends an answer, from generation_config.json first: chat models name their end of turn there."""
    file = path / "generation_config.json"
    given = [read_json(file).get("eos_token_id")] if file.is_file() else []
    tokens: dict[int, None] = {}
    for value in [*given, hf.eos_token_id]:
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int):
                tokens[token] = None
    return tuple(tokens)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UsageError(f"{index}: wanted a weight_map, found none")
        names = sorted(set(map(str, weight_map.values())))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UsageError(f"{path} lacks {len(missing)} of its {len(names)} weight files: {', '.join(missing)}")
        return [path / name for name in names]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise UsageError(
            f"{path} holds {len(others)} safetensors files but no model.safetensors.index.json to say how "
            "they belong together"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.pt")):
        raise UsageError(
            f"{path} holds pickled PyTorch weights only, which can run code when loaded; re-save it as safetensors: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UsageError(f"{path} holds no safetensors weights")


def read_safetensors_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (dtype, shape) of a safetensors file; UsageError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged or not a safetensors file ({error}); download it again") from None
