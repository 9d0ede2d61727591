"""The `.billm` file format: one safetensors file with a binarized model in it. SPEC.md says what every bit means.

Names are loaded at first use, so that importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from billm_format.config import ModelConfig, Quantization, TokenizerInfo
    from billm_format.errors import BillmError, CorruptFileError, DoesNotFitError, QualityError, UsageError
    from billm_format.header import TensorInfo
    from billm_format.packing import PackedLinear
    from billm_format.reader import BillmFile
    from billm_format.writer import write_file

__all__ = [
    "BillmError",
    "BillmFile",
    "CorruptFileError",
    "DoesNotFitError",
    "ModelConfig",
    "PackedLinear",
    "QualityError",
    "Quantization",
    "TensorInfo",
    "TokenizerInfo",
    "UsageError",
    "write_file",
]

_HOME = {
    "config": ("ModelConfig", "Quantization", "TokenizerInfo"),
    "errors": ("BillmError", "CorruptFileError", "DoesNotFitError", "QualityError", "UsageError"),
    "header": ("TensorInfo",),
    "packing": ("PackedLinear",),
    "reader": ("BillmFile",),
    "writer": ("write_file",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load the module that a public name lives in."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
