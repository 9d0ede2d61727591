"""What every part of one conversion works with."""

from dataclasses import dataclass

import torch

from billm_convert.settings import ConvertSettings, Progress
from billm_convert.source import ModelSource
from billm_convert.stored_block import StoredBlock
from billm_convert.workdir import WorkFolder
from billm_format.config import Quantization


@dataclass(frozen=True)
class Job:
    """One conversion that has begun."""

    source: ModelSource
    quantization: Quantization
    settings: ConvertSettings
    device: torch.device
    work: WorkFolder
    progress: Progress

    def stored(self, layer: int) -> StoredBlock:
        """Return a finished block as the solver, and its own training, have left it."""
        return StoredBlock.read(self.work, self.source.config, self.quantization, layer)
