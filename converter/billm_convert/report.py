"""What a person sees of a conversion: progress with time left on stderr, the table of errors at the end."""

import math
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from billm_convert.settings import STAGES, CheckReport, ConvertReport, Event, LinearReport

_LEAST_SHARE = 0.01  # of the work, before its speed says anything about the rest


class Display:
    """Shows events on stderr: a bar on a terminal, one line a block elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        """Nothing is shown before `show` is called."""
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
        self._stage = ""
        self._done = 0.0
        self._tenths = 0  # of the sampling: minutes whose events have nothing to tell
        self._clock = _Clock()

    def __enter__(self) -> "Display":
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        if event.stage == "note":
            self._console.print(event.text, markup=False)
            return
        begun = event.stage != self._stage or event.done < self._done  # text can be sampled twice in a row
        self._done = event.done
        if begun:
            self._stage, self._tenths = event.stage, 0
            self._clock = _Clock(event.done)
            if self._bar:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task(STAGES[event.stage], total=event.total, text="")
        left = self._clock.left(event.done, event.total)
        if event.then:
            left += f", then {event.then}"
        if self._bar:
            self._bar.update(self._bar.task_ids[-1], completed=event.done, text=f"{_where(event)}{left}")
        elif event.text:
            self._console.print(f"{STAGES[event.stage]}: {event.text}, {left}", markup=False)
        elif event.linears:
            self._console.print(block_line(event.linears, int(event.total), left), markup=False)
        elif event.stage == "sampling" and (tenths := int(10 * event.done / event.total)) > self._tenths:
            self._tenths = tenths
            self._console.print(f"{STAGES[event.stage]}: {tenths}0 %, {left}", markup=False)


def _where(event: Event) -> str:
    """Return what a bar says beside the time left: which block, or what the event has to tell."""
    if event.stage == "blocks":
        return f"block {min(int(event.done) + 1, int(event.total))}/{int(event.total)}, "
    return f"{event.text}, " if event.text else ""


class _Clock:
    """Time left, from the share of work done since the stage began."""

    def __init__(self, done: float = 0.0) -> None:
        self._began = time.monotonic()
        self._first = done

    def left(self, done: float, total: float) -> str:
        share = (done - self._first) / (total - self._first) if total > self._first else 1.0
        if share < _LEAST_SHARE:
            return "time left unknown yet"
        seconds = (time.monotonic() - self._began) * (1 - share) / share
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return "4:05" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def block_line(linears: tuple[LinearReport, ...], total: int, left: str) -> str:
    """Return one line on a finished block."""
    layer = int(linears[0].name.split(".")[1])
    worst = max(linears, key=lambda linear: linear.error)
    salient, sparse = _mean(linear.salient for linear in linears), _mean(linear.sparse for linear in linears)
    return (
        f"block {layer + 1}/{total}: error {geometric_mean(linears):.4f} (largest {worst.name.rpartition('.')[2]} "
        f"{worst.error:.4f}), {salient:.1%} salient, {sparse:.1%} sparse, {left}"
    )


def geometric_mean(linears: Iterable[LinearReport]) -> float:
    """Return the geometric mean of the Linears' errors; an error of 0 counts as 1e-12."""
    logs = [math.log(max(linear.error, 1e-12)) for linear in linears]
    return math.exp(sum(logs) / len(logs))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def print_result(report: ConvertReport, *, table: bool) -> None:
    """Print the errors of every Linear, if wanted, and the summary on stdout."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if table:
        console.print(error_table(report.layers))
    bits = f"{report.bits_paper:.2f} bits per weight as the paper counts, {report.bits_true:.2f} true"
    console.print(f"{report.path}: {report.file_bytes / 1e6:,.1f} MB, {bits}", markup=False)
    console.print(
        f"relative output error {geometric_mean(report.layers):.4f} (geometric mean of {len(report.layers)} Linears)"
    )
    if report.tuning:
        console.print(tuning_line(report.tuning), markup=False)
    if report.check:
        console.print(check_text(report.check), markup=False)
    if not table:
        return
    used = report.calibration
    windows = f"{used['nsamples']} x {used['seqlen']:,} tokens, seed {used['seed']}"
    console.print(f"calibrated on {used['name']}: {windows}", markup=False)
    console.print(f"{duration(report.seconds)} on {report.device}; {memory_line(report)}", markup=False)


def check_text(check: CheckReport) -> str:
    """Return the perplexities, and what follows from them where the model has collapsed."""
    found = (
        f"perplexity {check.perplexity:,.2f}, the original's {check.original:,.2f}, ratio {check.ratio:,.2f} "
        f"({check.text}, {check.windows} windows of {check.seqlen:,} tokens)"
    )
    return f"{found}\n{check.advice}" if check.advice else found


def tuning_line(tuning: Mapping[str, Any]) -> str:
    """Return what training came to."""
    line = ""
    if tuning["block_steps"]:
        before, after = (_mean(errors[i] for errors in tuning["block_errors"]) for i in (0, 1))
        line = f"tuned for {tuning['block_steps']} steps a block (held-out error, mean {before:.4f} -> {after:.4f}), "
    line += f"{'' if line else 'tuned for '}{tuning['model_steps']} of the whole model"
    return f"{line} (held-out KL to full precision {tuning['kl_before']:.3f} -> {tuning['kl_after']:.3f})"


def memory_line(report: ConvertReport) -> str:
    """Return the peak memory and what it is made of."""
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.0f}" for name, size in report.memory.items())
    line = (
        f"peak memory {report.peak_bytes / 1e6:,.0f} MB (computed, most while {report.memory_stage}: {parts}; the rest "
        "is Python, torch and file cache)"
    )
    if report.device_peak_bytes is not None:
        line += f", {report.device_peak_bytes / 1e6:,.0f} MB on the device"
    return line


def error_table(linears: tuple[LinearReport, ...]) -> Table:
    """Return a table with a row a block: the error of each Linear, salient and sparse shares."""
    blocks: dict[str, list[LinearReport]] = {}
    for linear in linears:
        blocks.setdefault(linear.name.split(".")[1], []).append(linear)
    kinds = [linear.name.rpartition(".")[2] for linear in next(iter(blocks.values()))]
    table = Table(box=None, padding=(0, 1), title="relative output error of each Linear", title_justify="left")
    for heading in ("block", *(kind.removesuffix("_proj") for kind in kinds), "salient", "sparse"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, members in blocks.items():
        errors = [f"{linear.error:.4f}" for linear in members]
        salient, sparse = _mean(linear.salient for linear in members), _mean(linear.sparse for linear in members)
        table.add_row(number, *errors, f"{salient:.1%}", f"{sparse:.1%}")
    return table
