"""From the system's cache to the disk: what a power cut must not take.

A file is on the disk when it has been flushed, its name when the directory that has it has been.  So a checkpoint is
flushed under a temporary name, then renamed, and then the directory above it is flushed: in this order nothing
half-written ever has the final name, and the name is there when the save returns.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

__all__ = ["UnflushedNameError", "flush", "make_folder", "named"]


class UnflushedNameError(OSError):
    """A file or directory has its final name, but the disk neither took that name nor let it be taken back."""


def flush(place: Any) -> None:
    """Writes a file, or everything in a directory, from the system's cache to the disk.

    Raises:
      OSError: the disk has not taken all of it, or a directory cannot be listed, so that its files are not known.
    """
    folders = os.walk(place, onerror=_check_gone) if os.path.isdir(place) else ()
    below = [path for folder, _, names in folders for path in (folder, *(f"{folder}/{n}" for n in names))]
    # At the same time, because a file system with a journal then commits it once for several files.
    with concurrent.futures.ThreadPoolExecutor(8, "statewise-flush") as pool:
        list(pool.map(_flush_if_there, below or [place]))  # raises what a thread raised


def _check_gone(error: OSError) -> None:
    """Raises the error for a directory that cannot be listed, unless it is not there any more."""
    if not isinstance(error, FileNotFoundError):  # another process has renamed it since, and flushes it itself
        raise error


def _flush_if_there(path: Any) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process has renamed it since, and flushes it itself
        _flush_one(path)


def _flush_one(path: Any) -> None:
    """Writes one file, or the names in one directory, from the system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named(place: Any, final: Any) -> Iterator[None]:
    """Flushes a file or directory; then the block gives it its final name; then that is on the disk too.

    If the disk does not take the name, the file or directory has its first name again.

    Raises:
      OSError: the disk has not taken it.
      UnflushedNameError: it has not taken the name, and the name cannot be taken back.
    """
    flush(place)
    yield
    try:
        _flush_one(os.path.dirname(os.fspath(final)))
    except OSError as failure:
        try:
            _take_back(place, final)
        except OSError:
            raise UnflushedNameError(failure.errno, failure.strerror) from failure
        raise


def _take_back(place: Any, final: Any) -> None:
    if os.path.exists(place):  # a file that was linked has both names
        os.unlink(final)
    else:
        os.rename(final, place)


def make_folder(folder: FilePath) -> None:
    """Makes a directory and those above it, any number of them: `mkdir(parents=True)` recurses for each."""
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            try:
                path.mkdir(exist_ok=True)  # another process may make it at the same time
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            _flush_one(path.parent)
