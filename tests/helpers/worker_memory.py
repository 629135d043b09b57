"""Keeps the memory of a test worker small, by clearing JAX's caches and ours when it holds much.

JAX keeps every compiled program, with its machine code, so that a worker would grow over the suite to more than 4 GB.
Clearing after every file would compile the small operations that all files share again and again; so a worker clears
only above a threshold.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import jax

CLEAR_ABOVE = 1_200_000_000  # bytes, after the last test of a file; about 0.9 GB remain after clearing
CLEAR_WITHIN_FILE_ABOVE = 1_500_000_000  # bytes, after any other test: what it compiled, the next one may use
LIMIT = 2_000_000_000  # bytes; a test that takes its worker over it fails
GROWTH_REPORTED = 100_000_000  # bytes; after the first failure, only a test that adds as much fails too


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


reported = LIMIT


def after_test(name: str, *, last_of_file: bool) -> None:
    """Clears if this worker holds much; fails the test that took it over the limit, and none of those after it."""
    global reported
    held = resident()
    if held > (CLEAR_ABOVE if last_of_file else CLEAR_WITHIN_FILE_ABOVE):
        clear()
    highest = peak()
    if highest > reported:
        reported = highest + GROWTH_REPORTED
        raise MemoryError(f"this worker held {highest / 1e9:.1f} GB at most, {held / 1e9:.1f} GB after {name}")
