"""Paths as Orbax takes them, with the library that Orbax itself uses; and as they are read and written without it."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from etils import epath as epaths

from statewise._src.checkpoint.orbax.flush import flush, named
from statewise._src.checkpoint.orbax.stores import StorePath, is_url, listing

__all__ = ["epath", "flush_item", "own_path", "read_at_most", "size_of", "with_file"]

# In the names of directories that Orbax has not finished.
_TEMPORARY = ".orbax-checkpoint-tmp"


@functools.cache
def _literal_path() -> Any:
    local: Any = type(epaths.Path("/"))

    class LiteralPath(local):
        """A local path that is literal text, for Orbax to join with patterns and to list.

        Its base class takes brackets and stars in the path itself for a pattern too, so that Orbax would find nothing
        below it, or the contents of another directory; and it leaves out names that end in `~`.
        """

        def glob(self, pattern: str) -> Iterator[Any]:
            """Yields the paths below this one that match the pattern."""
            if "://" in str(self):
                yield from super().glob(pattern)
            else:
                yield from map(type(self), glob.glob(os.path.join(glob.escape(str(self)), pattern)))

        def iterdir(self) -> Iterator[Any]:
            """Yields everything in this directory."""
            if "://" in str(self):
                yield from super().iterdir()
            else:
                yield from (self / name for name in os.listdir(self))

        def rename(self, target: Any) -> Any:
            """Renames this; before the last of Orbax's renames everything in it is on the disk, afterwards its name.

            Orbax itself flushes nothing, and deletes older steps right after it.
            """
            if "://" in str(self) or _TEMPORARY in FilePath(target).parent.name:
                return super().rename(target)
            with named(self, target):
                return super().rename(target)

    return LiteralPath


def epath(path: Any) -> Any:
    """Returns a path on any file system that Orbax can write to, of the library that Orbax itself uses."""
    local = epaths.Path(path)
    # Paths of other classes are on other file systems.
    return _literal_path()(local) if type(local) is type(epaths.Path("/")) else local


def flush_item(directory: Any) -> None:
    """Writes an item to the disk before Orbax renames it, unless the path's own rename does: in a user's manager."""
    if not isinstance(directory, _literal_path()) and "://" not in str(directory):
        flush(directory)


def size_of(path: Any) -> int:
    """Returns the size of a file in bytes.

    The library looks up the name of a local file's owner as well, and fails where the user does not have one, as in
    many containers.
    """
    return int(path.stat().length) if "://" in str(path) else os.path.getsize(path)


def own_path(path: Any) -> Any:
    """Returns a path as it is read and written without Orbax: in an object store without a library of its own."""
    return StorePath(os.fspath(path)) if is_url(path) else epath(path)


def read_at_most(path: Any, most: int) -> bytes | None:
    """Returns a file; None if it has more than that many bytes, and then it is not read.

    Raises:
      OSError: it cannot be read.
    """
    is_larger = path.read_range(most, most + 1) is not None if isinstance(path, StorePath) else size_of(path) > most
    return None if is_larger else path.read_bytes()


def with_file(folder: Any, name: str) -> list[Any]:
    """Returns the directories right below this one that have a file of this name."""
    if isinstance(folder, StorePath):
        found = [each.split("/") for each in listing(folder)]
        return [folder / parts[0] for parts in found if len(parts) == 2 and parts[1] == name]
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and (entry / name).exists())
