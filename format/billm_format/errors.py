"""The one family of errors that users see, each with the exit code a command ends with."""

EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_CORRUPT = 3
EXIT_DOES_NOT_FIT = 4
EXIT_QUALITY = 5
EXIT_INTERRUPTED = 130


class BillmError(Exception):
    """Something the user can act on. The message is one sentence: what is wrong and what to do."""

    exit_code = EXIT_USAGE


class UsageError(BillmError):
    """Wrong option, missing file, unsupported model: bad input that is not a `.billm` file."""


class CorruptFileError(BillmError):
    """A `.billm` file that is truncated, damaged, hostile or of an unknown version (file, field, wanted, found)."""

    exit_code = EXIT_CORRUPT


class DoesNotFitError(BillmError):
    """Not enough memory, disk or context; the message carries the arithmetic."""

    exit_code = EXIT_DOES_NOT_FIT


class QualityError(BillmError):
    """The converted model misses a quality bound that the user stated."""

    exit_code = EXIT_QUALITY
