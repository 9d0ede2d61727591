"""The logits of a few tokens, left on the device: what a draw needs of them comes to the host, some kilobytes."""

import math

import numpy as np
from numpy.typing import NDArray

from billm_rt.cuda import launch
from billm_rt.cuda.device import Device
from billm_rt.sampling import FEW_TOKENS, Float32, Int64, Sampling, Survey

# `struct Ask`, `struct Found` and `struct Entry` of sample.cu.
ASK = np.dtype(
    [(name, np.float32) for name in ("inverse", "temperature", "share", "offset")]
    + [("top_k", np.int32), ("penalty", np.float32), ("recent", np.int32), ("padding", np.int32)]
)
FOUND = np.dtype([("count", np.uint32), ("best", np.float32), ("bound", np.float32), ("padding", np.uint32)])
ENTRY = np.dtype([("id", np.int32), ("logit", np.float32)])
# Logits that a survey lists at most.
CAPACITY = 1024
_LARGEST = float(np.finfo(np.float32).max)


def survey_bytes(vocab_size: int) -> int:
    """Return the device memory of a `DeviceLogits`, but for long lists of recent tokens."""
    answer = FOUND.itemsize + 4 * launch.logit_groups(vocab_size).count + CAPACITY * ENTRY.itemsize
    return 4 * vocab_size * (launch.MAX_TABLE_TOKENS + 1) + 4 * launch.logit_groups(vocab_size).count + answer + 512


class DeviceLogits:
    """Logits [few tokens, vocab_size] in one place, each row valid until the next are written."""

    def __init__(self, device: Device, vocab_size: int) -> None:
        self.size = vocab_size
        self.array = device.empty((launch.MAX_TABLE_TOKENS, vocab_size), np.float32)
        self._device = device
        self._groups = launch.logit_groups(vocab_size)
        count = self._groups.count
        self._penalised = device.empty((vocab_size,), np.float32)
        self._maxima = device.empty((count,), np.float32)
        # One array, so that one copy brings all of it: FOUND, the groups' sums, ENTRY [CAPACITY].
        self._cuts = FOUND.itemsize, FOUND.itemsize + 4 * count
        nbytes = self._cuts[1] + CAPACITY * ENTRY.itemsize
        self._answer = device.empty((nbytes,), np.uint8)
        self._answer_here = device.pinned((nbytes,), np.uint8)
        self._make_ask(64)

    def _make_ask(self, recent: int) -> None:
        nbytes = ASK.itemsize + 4 * recent
        self._ask, self._ask_here = self._device.empty((nbytes,), np.uint8), self._device.pinned((nbytes,), np.uint8)

    def survey(self, row: int, options: Sampling, recent: Int64) -> Survey:
        """See `sampling.RemoteLogits`."""
        listed = self._write_ask(options, recent)
        self._run(row)
        self._device.wait()
        here, (sums_at, entries_at) = self._answer_here, self._cuts
        found = here[:sums_at].view(FOUND)[0]
        count = int(found["count"])
        entries = here[entries_at:].view(ENTRY)[: min(count, CAPACITY)]
        entries = entries[np.argsort(entries["id"])]
        ids, logits = entries["id"].astype(np.int64), entries["logit"].copy()
        sums = here[sums_at:entries_at].view(np.float32)
        return Survey(float(found["best"]), self._groups.size, sums, ids, logits, listed and count <= CAPACITY)

    def read(self, start: int, stop: int) -> Float32:
        """See `sampling.RemoteLogits`."""
        return self._device.download(self._penalised[start:stop])

    def _write_ask(self, options: Sampling, recent: Int64) -> bool:
        """Say what is wanted; return whether that makes a list."""
        if ASK.itemsize + 4 * recent.size > self._ask_here.size:
            self._make_ask(1 << (recent.size - 1).bit_length())
        ask, cold = self._ask_here[: ASK.itemsize].view(ASK)[0], options.temperature == 0
        ask["penalty"], ask["recent"] = options.repeat_penalty, recent.size
        self._ask_here[ASK.itemsize : ASK.itemsize + 4 * recent.size] = recent.astype(np.int32).view(np.uint8)
        ask["temperature"] = options.temperature
        ask["inverse"] = 1 if cold else min(1 / options.temperature, _LARGEST)
        ask["top_k"] = options.top_k if not cold and 0 < options.top_k < self.size else 0
        share = 1 - options.top_p
        ask["share"] = 0 if cold or ask["top_k"] else share / FEW_TOKENS
        ask["offset"] = _offset(options)
        return bool(cold or ask["top_k"] or share or options.min_p)

    def _run(self, row: int) -> None:
        device, (size, groups) = self._device, self._groups
        sums_at, entries_at = self._cuts
        found, sums, entries = self._answer[:sums_at], self._answer[sums_at:entries_at], self._answer[entries_at:]
        logits, warps = self.array[row], launch.per_group(groups)
        vocab, size, groups_number, capacity = map(np.int32, (self.size, size, groups, CAPACITY))
        device.copy_in(self._ask, self._ask_here)
        device.launch(launch.SURVEY, warps, logits, self._ask, self._penalised, self._maxima, vocab, size)
        numbers = (vocab, size, groups_number)
        device.launch(launch.WEIGH, warps, self._penalised, self._ask, self._maxima, sums, *numbers)
        device.launch(
            launch.CHOOSE, launch.choose_size(groups), self._ask, self._maxima, sums, found, groups_number
        )
        elements = launch.per_element(self.size)
        device.launch(launch.COLLECT, elements, self._penalised, found, entries, vocab, capacity)
        device.copy_out(self._answer_here, self._answer)


def _offset(options: Sampling) -> float:
    """Return how far below the best logit the list begins, where no share of the weights says so."""
    if options.temperature == 0:
        return 0
    if options.min_p > 0:  # a little lower: rounding must not lose one
        return options.temperature * (math.log(options.min_p) - 1e-3)
    return -math.inf if options.top_p < 1 else math.inf


class DeviceRow:
    """One row of `DeviceLogits`: `sampling.RemoteLogits`."""

    def __init__(self, logits: DeviceLogits, row: int) -> None:
        self.size = logits.size
        self._logits, self._row = logits, row

    def survey(self, options: Sampling, recent: Int64) -> Survey:
        """See `sampling.RemoteLogits`."""
        return self._logits.survey(self._row, options, recent)

    def read(self, start: int, stop: int) -> Float32:
        """See `sampling.RemoteLogits`."""
        return self._logits.read(start, stop)
