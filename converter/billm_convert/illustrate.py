"""What the pipeline does about a report: checks before the work, drawing after it. matplotlib is loaded here."""

from pathlib import Path

from torch import Tensor

from billm_convert.depth import depth_errors
from billm_convert.figures import load_figures
from billm_convert.settings import TUNED, ConvertReport
from billm_convert.source import ModelSource
from billm_convert.workdir import Kind, WorkFolder
from billm_format.config import Quantization
from billm_format.errors import UsageError


def check_folder(folder: Path, out: Path) -> Path:
    """Return where the report will be, absolute; UsageError where it cannot be, or cannot be drawn."""
    try:
        import matplotlib  # noqa: F401 (whether it is there, before hours of work)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, which --report FOLDER needs: run pip install 'billm-rt[report]', or give "
            "a name that ends in .json for the figures alone"
        ) from error
    folder = folder.resolve()
    if not folder.parent.is_dir():
        raise UsageError(f"--report {folder}: there is no folder {folder.parent}; make it first")
    if folder in (out.resolve(), out.with_name(out.name + ".work").resolve()):
        raise UsageError(f"--report {folder}: the conversion itself needs this name; give another")
    return folder


def check_free(folder: Path | None, *, replace: bool) -> None:
    """Raise UsageError where something is in the report's place; an older report is not, with `replace`."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--report {folder} is a file: give the name of a folder, or one that ends in .json")
    from billm_convert.page import strangers

    others = strangers(folder)
    if others:
        raise UsageError(f"{folder} holds files that are not a report's ({others[0]}): give another folder")
    if not replace:
        raise UsageError(f"{folder} exists already: pass --force to replace it, or give another folder")


def write(
    folder: Path,
    source: ModelSource,
    quantization: Quantization,
    report: ConvertReport,
    work: WorkFolder | None = None,
    beginning: Tensor | None = None,
) -> None:
    """Write the report of a conversion with what `work` has kept for it; without, of the file alone.

    `beginning` [windows, seqlen, hidden] is what the first block reads of the text that depths are measured on.
    """
    from billm_convert.page import write_page
    from billm_convert.sections import Material

    stages: dict[str, Kind] = {"blocks as they were made": "block", "after training them together": "final"}
    if report.settings["recipe"] != TUNED:
        stages = {"as stored": "block"}
    depth, figures = {}, {}
    if work is not None and beginning is not None:
        depth = depth_errors(source, quantization, work, stages, beginning)
        figures = load_figures(work, range(source.config.num_hidden_layers), source.config.linears())
    write_page(folder, Material(source.path.name, report, figures, depth))
