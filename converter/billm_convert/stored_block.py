"""A decoder block as the file holds it: binarized Linears and norms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billm_convert.workdir import Kind, WorkFolder
from billm_format.config import ModelConfig, Quantization
from billm_format.packing import PackedLinear

_PARTS = ("sign", "second", "salient", "scales", "row_scale", "col_scale", "bias")


@dataclass(frozen=True)
class StoredBlock:
    """A binarized decoder layer."""

    linears: Mapping[str, PackedLinear]  # by name in the layer: "q_proj"
    norms: Mapping[str, NDArray[np.float32]]  # "attn_norm.weight"

    @classmethod
    def of_tensors(
        cls, config: ModelConfig, quantization: Quantization, layer: int, tensors: Mapping[str, NDArray[Any]]
    ) -> "StoredBlock":
        """Make a layer of its tensors, which have their names in the file."""
        prefix = f"layers.{layer}."
        linears = {}
        for linear, (rows, cols, _) in config.linears().items():
            parts: dict[str, Any] = {part: tensors.get(f"{prefix}{linear}.{part}") for part in _PARTS}
            linears[linear] = PackedLinear(rows, cols, quantization.block_of(f"{prefix}{linear}"), **parts)
        norms = {name.removeprefix(prefix): value for name, value in tensors.items() if "norm." in name}
        return cls(linears, norms)

    @classmethod
    def read(
        cls, work: WorkFolder, config: ModelConfig, quantization: Quantization, layer: int, kind: Kind = "block"
    ) -> "StoredBlock":
        """Return a layer that is finished in this form."""
        tensors = {name: work.block_tensor(layer, name, kind) for name in work.block_names(layer, kind)}
        return cls.of_tensors(config, quantization, layer, tensors)

    def tensors(self, layer: int) -> dict[str, NDArray[Any]]:
        """Return the layer's tensors under their names in the file."""
        prefix = f"layers.{layer}."
        out: dict[str, NDArray[Any]] = {f"{prefix}{name}": value for name, value in self.norms.items()}
        for linear, packed in self.linears.items():
            for part in _PARTS:
                value = getattr(packed, part)
                if value is not None:
                    out[f"{prefix}{linear}.{part}"] = value
        return out

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """Return its weights, biases and norms as `DecoderBlock` wants them, float32."""
        values = {f"{name}.weight": packed.dequantize() for name, packed in self.linears.items()}
        values |= {f"{name}.bias": packed.bias for name, packed in self.linears.items() if packed.bias is not None}
        return {name: torch.from_numpy(value).to(device) for name, value in {**values, **self.norms}.items()}
