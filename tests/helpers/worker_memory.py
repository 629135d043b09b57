"""Keeps the memory of a test worker small: what JAX and we have cached goes between files, once it is much.

Every compiled program holds machine code, and JAX keeps each one, so that a worker would grow over the suite to more
than 4 GB.  Clearing after every file would compile the small operations that all files share again and again; so a
worker clears only when it holds more than `CLEAR_ABOVE`.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import jax

CLEAR_ABOVE = 1_200_000_000  # bytes; about 0.9 GB remain after clearing
LIMIT = 2_000_000_000  # bytes; a worker that ever held more fails


def _status(field: str) -> int:
    """Returns a field of Linux's account of this process, in bytes; 0 on other systems."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident() -> int:
    """Returns the bytes that this process holds now."""
    return _status("VmRSS")


def peak() -> int:
    """Returns the most bytes that this process has held."""
    return _status("VmHWM")


def clear() -> None:
    """Drops JAX's caches and the garbage, and gives the memory back to the system."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        # Without this, glibc keeps most of what was freed.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def after_file(name: str) -> None:
    """Clears if this worker holds much; fails the file that took it over the limit."""
    if resident() > CLEAR_ABOVE:
        clear()
    if peak() > LIMIT:
        raise MemoryError(f"this worker held {peak() / 1e9:.1f} GB at most, {resident() / 1e9:.1f} GB after {name}")
