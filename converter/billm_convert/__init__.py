"""Turn a full-precision language model into one `.billm` file. torch and transformers load at the first conversion."""

from os import PathLike

from billm_convert.settings import CheckReport, ConvertReport, ConvertSettings, Event, LinearReport, Progress
from billm_format.errors import UsageError

__all__ = ["CheckReport", "ConvertReport", "ConvertSettings", "Event", "LinearReport", "Progress", "convert"]


def convert(
    model: str | PathLike[str],
    out: str | PathLike[str],
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert MODEL, a Hugging Face folder or a `.gguf` file, to the `.billm` file `out`; see `pipeline.convert`."""
    from pathlib import Path

    try:
        from billm_convert import pipeline
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("billm"):
            raise
        raise UsageError(
            f"{error.name} is not installed, which billm-convert needs: run pip install 'billm-rt[convert]'"
        ) from error
    return pipeline.convert(Path(model), Path(out), settings, progress)
