"""The report of a conversion as a folder: index.html, whole in itself, and its pictures as PNG files beside it."""

import errno
import re
import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from billm_convert.sections import Material, Section, make_sections
from billm_format.errors import DoesNotFitError, UsageError

_PAGE = "index.html"
_OURS = re.compile(r"index\.html|(sizes|errors|depth|tuning|salient-\w+|search-\w+|distributions-\d+)\.png")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_page(folder: Path, material: Material) -> None:
    """Draw everything and put the folder in place in one step, instead of an older report if there is one.

    DoesNotFitError for a full disk; then nothing of it is left.
    """
    sections = make_sections(material)
    files = {f"{picture.name}.png": picture.png for section in sections for picture in section.pictures}
    files[_PAGE] = render(material, sections).encode()
    # Names that nobody gives a folder of their own: what a killed run has left under them is deleted.
    unfinished, old = (folder.with_name(f".{folder.name}.{end}") for end in ("unfinished", "replaced"))
    try:
        for leftover in (unfinished, old):
            _remove(leftover)
        unfinished.mkdir()
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        _remove(old)
    except OSError as error:
        _remove(unfinished)
        if error.errno not in _FULL:
            raise
        size = sum(map(len, files.values()))
        raise DoesNotFitError(
            f"{folder}: {error.strerror} while writing the report of {size / 1e6:.1f} MB; {material.report.path} is "
            "whole: make room and run the same command with --resume for the report alone"
        ) from error


def strangers(folder: Path) -> list[str]:
    """Return what is in an existing folder and is no part of a report."""
    return sorted(file.name for file in folder.iterdir() if not (_OURS.fullmatch(file.name) and file.is_file()))


def _remove(folder: Path) -> None:
    """Delete a folder of ours, if it is there; UsageError where other files are in it."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir() or strangers(folder):
        raise UsageError(f"{folder} is in the way of the report and not of billm-convert's making; move it away")
    shutil.rmtree(folder)


def render(material: Material, sections: list[Section]) -> str:
    """Return the page's HTML; whatever a name holds, it is text there."""
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, finalize=_printable)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    report = material.report
    return template.render(
        model=material.model,
        recipe=report.settings["recipe"],
        bits_true=f"{report.bits_true:.2f}",
        bits_paper=f"{report.bits_paper:.2f}",
        advice=_sentence(report.check.advice or "") if report.check else "",
        sections=sections,
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _printable(value: Any) -> Any:
    """Return a text without control characters and halves of characters, which no page may hold."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
