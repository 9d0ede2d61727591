"""How much memory a model takes: what the file maps, what the KV caches hold, what the process has."""

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

from billm_format.reader import BillmFile
from billm_rt.cache import KVCache


def memory_report(file: BillmFile, caches: Iterable[KVCache], copied: int) -> dict[str, int]:
    """Return bytes: `weights.<kind>` (mapped from the file), `copied` as given, `kv_cache`, `rss` and `peak_rss`."""
    report = {f"weights.{kind}": size for kind, size in file.sizes_by_kind().items()}
    report["copied"] = copied
    report["kv_cache"] = sum(cache.nbytes for cache in caches)
    report["rss"] = resident_bytes()
    report["peak_rss"] = peak_resident_bytes()
    return report


def resident_bytes() -> int:
    """Return the process's resident memory now, pages of mapped files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most resident memory that the process ever had."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux hands that down from the parent process, so a small child of a large one looks large.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 (a field of Windows alone)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise (glibc)."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
