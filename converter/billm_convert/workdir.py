"""The work folder OUT.work: finished blocks on disk, so that a killed conversion can go on where it stopped."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from billm_format.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_STATE = "state.json"
_LOCK = "lock"
_TOKENS = "tokens.safetensors"
_TABLE = "table-{}.safetensors"
_TEXT = "tuning-text.safetensors"
_TRAINING = "training.safetensors"
_BLOCK = "{}-{:05d}.safetensors"
# block: as the solver, and training in turn, left it; final: trained with the whole model (one more than there are
# blocks: what belongs to none); figures: what a report draws of a block.
Kind = Literal["block", "final", "figures"]
_SETS = tuple(f"{kind}-*.safetensors" for kind in get_args(Kind))
_WORK = (*_SETS, _TABLE.format("*"), _TOKENS, _TEXT, _TRAINING)
_OURS = tuple(f"{name}{end}" for name in (*_WORK, _STATE) for end in ("", ".tmp"))


class WorkFolder:
    """A locked work folder. Its files are written to a temporary name, synced and renamed: whole or not there."""

    def __init__(self, out: Path) -> None:
        """Make and lock the folder beside `out`; UsageError when another process has it or it is not ours."""
        self.path = out.with_name(out.name + ".work")
        try:
            self.path.mkdir(exist_ok=True)
        except FileExistsError:
            raise UsageError(f"{self.path} is a file, but the conversion needs a folder of this name") from None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made: {error.strerror}") from None
        self._lock = self._take_lock()
        self._removed = False

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), (self.path / _LOCK).stat()):
                raise BlockingIOError  # its owner removed the folder between our two calls
        except OSError:
            os.close(descriptor)
            raise UsageError(
                f"another billm-convert is at work in {self.path}; wait for it or give another OUT"
            ) from None
        return descriptor

    def close(self) -> None:
        """Let go of the lock; a folder in which nothing is kept that took work is removed."""
        begun = (self.path / _STATE).exists() and any(file for name in _WORK for file in self.path.glob(name))
        if not self._removed and not begun:
            self.remove()
        os.close(self._lock)

    def __enter__(self) -> "WorkFolder":
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the lock."""
        self.close()

    def state(self) -> dict[str, Any] | None:
        """Return what `begin` wrote, None if nothing was begun (or the last run had only cleaning up left to do)."""
        file = self.path / _STATE
        if not file.exists():
            return None
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None

    def begin(self, state: Mapping[str, Any]) -> None:
        """Clear the folder and note what this conversion is; UsageError when strange files are in it."""
        self._clear()
        strangers = sorted(file.name for file in self.path.iterdir() if file.name != _LOCK)
        if strangers:
            raise UsageError(f"{self.path} holds files that are not billm-convert's ({strangers[0]}); move them away")
        self._write(_STATE, json.dumps(state).encode())

    def check_same(self, old: object, new: Mapping[str, Any]) -> None:
        """Raise UsageError naming what differs between the run that is resumed and this one."""
        if not isinstance(old, dict):
            raise UsageError(f"{self.path} was not written by this version; pass --force to start over")
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                if key == "model files":
                    what = "the model's files have changed"
                elif isinstance(new.get(key), int | float | str) and len(str(new.get(key))) < 60:
                    what = f"{key} was {old.get(key)} and is {new.get(key)} now"
                else:
                    what = f"the {key} is another one now"
                raise UsageError(
                    f"{self.path} belongs to a different conversion: {what}; undo that, or pass --force to start over"
                )

    def remove(self) -> None:
        """Delete the folder. The state goes first: whatever a kill leaves behind then counts as nothing."""
        self._removed = True
        self._clear()
        (self.path / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # strange files: theirs to remove
            self.path.rmdir()

    def _clear(self) -> None:
        (self.path / _STATE).unlink(missing_ok=True)
        for pattern in _OURS:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    def finished_blocks(self, kind: Kind = "block") -> int:
        """Return how many blocks, from the first on, are finished."""
        count = 0
        while self.has_block(count, kind):
            count += 1
        return count

    def has_block(self, layer: int, kind: Kind) -> bool:
        """Return whether a block is there in this form."""
        return (self.path / _BLOCK.format(kind, layer)).exists()

    def finished_bytes(self) -> int:
        """Return the bytes that the finished blocks take on disk."""
        return sum(file.stat().st_size for file in self.path.glob("block-*.safetensors"))

    def save_block(self, layer: int, tensors: Mapping[str, NDArray[Any]], record: object, kind: Kind = "block") -> None:
        """Store a finished block: its tensors under their names in the final file, and a JSON record."""
        self._write(_BLOCK.format(kind, layer), save(dict(tensors), metadata={"record": json.dumps(record)}))

    def block_record(self, layer: int, kind: Kind = "block") -> Any:
        """Return the JSON record of a finished block."""
        return self._record(_BLOCK.format(kind, layer))

    def block_names(self, layer: int, kind: Kind = "block") -> list[str]:
        """Return the names of a finished block's tensors."""
        with safe_open(self.path / _BLOCK.format(kind, layer), framework="np") as file:
            return list(file.keys())

    def block_tensor(self, layer: int, name: str, kind: Kind = "block") -> NDArray[Any]:
        """Return one tensor of a finished block; only it is read."""
        with safe_open(self.path / _BLOCK.format(kind, layer), framework="np") as file:
            value: NDArray[Any] = file.get_tensor(name)
            return value

    def save_table(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Store the parts of an embedding or head that was solved."""
        self._write(_TABLE.format(name), save(dict(tensors)))

    def table(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Return what `save_table` stored under this name, None if nothing was."""
        file = self.path / _TABLE.format(name)
        return load_file(file) if file.exists() else None

    def save_tuning_text(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Store the windows of text that the model is tuned on, and what full precision makes of them."""
        self._write(_TEXT, save(dict(tensors)))

    def tuning_text(self) -> dict[str, NDArray[Any]] | None:
        """Return what `save_tuning_text` stored, None if it has not been called."""
        file = self.path / _TEXT
        return load_file(file) if file.exists() else None

    def save_training(self, tensors: "Mapping[str, Tensor]", record: object) -> None:
        """Store the state of an unfinished training, in place of the one before."""
        from safetensors.torch import save_file

        size = sum(value.nbytes for value in tensors.values())
        metadata = {"record": json.dumps(record)}

        def write(path: Path) -> None:
            try:
                save_file(dict(tensors), path, metadata)
            except SafetensorError as error:  # how it reports a disk that is full
                raise OSError(errno.ENOSPC, str(error)) from error

        self._write_with(_TRAINING, size, write)

    def training(self) -> "tuple[dict[str, Tensor], Any] | None":
        """Return the state and the record that were stored last, None if there are none."""
        from safetensors.torch import load_file

        file = self.path / _TRAINING
        return (load_file(file), self._record(_TRAINING)) if file.exists() else None

    def _record(self, name: str) -> Any:
        with safe_open(self.path / name, framework="np") as file:
            return json.loads(file.metadata()["record"])

    def save_tokens(self, tokens: NDArray[np.int64]) -> None:
        """Store the calibration windows."""
        self._write(_TOKENS, save({"tokens": tokens}))

    def tokens(self) -> NDArray[np.int64] | None:
        """Return the calibration windows, None if they were not stored yet."""
        if not (self.path / _TOKENS).exists():
            return None
        with safe_open(self.path / _TOKENS, framework="np") as file:
            value: NDArray[np.int64] = file.get_tensor("tokens")
            return value

    def _write(self, name: str, data: bytes) -> None:
        """Put `data` under its name in one step that survives a power cut."""
        self._write_with(name, len(data), lambda path: path.write_bytes(data))

    def _write_with(self, name: str, size: int, write: Callable[[Path], object]) -> None:
        """Put a file of about `size` bytes, made by `write`, under its name in one step that survives a power cut."""
        temporary = self.path / f"{name}.tmp"
        with self._explain_full_disk(size):
            try:
                write(temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            except OSError:
                temporary.unlink(missing_ok=True)  # half of it would only fill the disk further
                raise
            temporary.replace(self.path / name)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _explain_full_disk(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DoesNotFitError(
                f"{self.path}: {error.strerror} while writing {size:,} bytes; {self.finished_blocks()} finished "
                "blocks are kept: make room and run the same command with --resume"
            ) from error
