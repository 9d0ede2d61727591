"""The logits of a few tokens, left on the device: what a draw needs of them comes to the host, some kilobytes."""

import math
import struct

import numpy as np

from billm_rt.cuda import launch
from billm_rt.cuda.device import Device, Recording
from billm_rt.sampling import FEW_TOKENS, Float32, Int64, Sampling, Survey

# `struct Ask`, `struct Found` and `struct Entry` of sample.cu.
ASK, FOUND = struct.Struct("=4fifi4x"), struct.Struct("=Iff4x")
ENTRY = np.dtype([("id", np.int32), ("logit", np.float32)])
# Logits that a survey lists at most.
CAPACITY = 1024
_LARGEST = float(np.finfo(np.float32).max)


def survey_bytes(vocab_size: int) -> int:
    """Return the device memory of a `DeviceLogits`, but for long lists of recent tokens."""
    answer = FOUND.size + 4 * launch.logit_groups(vocab_size).number + CAPACITY * ENTRY.itemsize
    return 4 * vocab_size * (launch.MAX_TABLE_TOKENS + 1) + 4 * launch.logit_groups(vocab_size).number + answer + 512


class DeviceLogits:
    """Logits [few tokens, vocab_size] in one place, each row valid until the next are written."""

    def __init__(self, device: Device, vocab_size: int) -> None:
        self.size = vocab_size
        self.array = device.empty((launch.MAX_TABLE_TOKENS, vocab_size), np.float32)
        self._device = device
        self._groups = launch.logit_groups(vocab_size)
        count = self._groups.number
        self._penalised = device.empty((vocab_size,), np.float32)
        self._maxima = device.empty((count,), np.float32)
        # One array, so that one copy brings all of it: FOUND, the groups' sums, ENTRY [CAPACITY].
        self._cuts = FOUND.size, FOUND.size + 4 * count
        nbytes = self._cuts[1] + CAPACITY * ENTRY.itemsize
        self._answer = device.empty((nbytes,), np.uint8)
        self._answer_here = device.pinned((nbytes,), np.uint8)
        self._sums = self._answer_here[self._cuts[0] : self._cuts[1]].view(np.float32)
        self._entries = self._answer_here[self._cuts[1] :].view(ENTRY)
        self._make_ask(64)

    def _make_ask(self, recent: int) -> None:
        nbytes = ASK.size + 4 * recent
        self._recorded: dict[int, Recording | None] = {}
        self._ask, self._ask_here = self._device.empty((nbytes,), np.uint8), self._device.pinned((nbytes,), np.uint8)

    def survey(self, row: int, options: Sampling, recent: Int64) -> Survey:
        """See `sampling.RemoteLogits`."""
        listed = self._write_ask(options, recent)
        self._survey(row)
        self._device.wait()
        count, best, _ = FOUND.unpack_from(self._answer_here.data)
        entries = self._entries[: min(count, CAPACITY)]
        ids, logits = entries["id"].astype(np.int64), entries["logit"]
        order = ids.argsort()
        complete = listed and count <= CAPACITY
        return Survey(best, self._groups.size, self._sums, ids[order], logits[order], complete)

    def read(self, start: int, stop: int) -> Float32:
        """See `sampling.RemoteLogits`."""
        return self._device.download(self._penalised[start:stop])

    def _write_ask(self, options: Sampling, recent: Int64) -> bool:
        """Say what is wanted; return whether that makes a list."""
        if ASK.size + 4 * recent.size > self._ask_here.size:
            self._make_ask(1 << (recent.size - 1).bit_length())
        if recent.size:
            self._ask_here[ASK.size : ASK.size + 4 * recent.size] = recent.astype(np.int32).view(np.uint8)
        temperature, cold = options.temperature, options.temperature == 0
        inverse = 1 if cold else min(1 / temperature, _LARGEST)
        top_k = options.top_k if not cold and options.top_k < self.size else 0
        share = 0 if cold or top_k else (1 - options.top_p) / FEW_TOKENS
        numbers = inverse, temperature, share, _offset(options), top_k, options.repeat_penalty, recent.size
        ASK.pack_into(self._ask_here.data, 0, *numbers)
        return bool(cold or top_k or share or options.min_p)

    def _survey(self, row: int) -> None:
        """Run the kernels: the first time as they are, then recorded and replayed."""
        if row not in self._recorded:
            self._run(row)
            self._recorded[row] = None
            return
        recorded = self._recorded[row]
        if recorded is None:
            recorded = self._recorded[row] = self._device.record(lambda: self._run(row))
        recorded.replay()

    def _run(self, row: int) -> None:
        device, (size, groups), (sums_at, entries_at) = self._device, self._groups, self._cuts
        found, sums, entries = self._answer[:sums_at], self._answer[sums_at:entries_at], self._answer[entries_at:]
        ask, penalised, maxima, warps = self._ask, self._penalised, self._maxima, launch.per_group(groups)
        vocab, of_group, count, capacity = map(np.int32, (self.size, size, groups, CAPACITY))
        device.copy_in(ask, self._ask_here)
        device.launch(launch.SURVEY, warps, self.array[row], ask, penalised, maxima, vocab, of_group)
        device.launch(launch.WEIGH, warps, penalised, ask, maxima, sums, vocab, of_group, count)
        device.launch(launch.CHOOSE, launch.choose_size(groups), ask, maxima, sums, found, count)
        device.launch(launch.COLLECT, launch.per_element(self.size), penalised, found, entries, vocab, capacity)
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
