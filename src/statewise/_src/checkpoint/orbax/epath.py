"""Paths as Orbax takes them, by the library that Orbax itself uses."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator
from typing import Any

from etils import epath as epaths

__all__ = ["epath"]


@functools.cache
def _literal_path() -> Any:
    local: Any = type(epaths.Path("/"))

    class LiteralPath(local):
        """A local path whose names are what they are, for Orbax to join with patterns and to look into.

        Its base class takes brackets and stars in the path itself for a pattern too, so that Orbax finds nothing below
        it, or what another directory holds; and it leaves out names that end in `~`.
        """

        def glob(self, pattern: str) -> Iterator[Any]:
            """Yields what fits the pattern below this path."""
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

    return LiteralPath


def epath(path: Any) -> Any:
    """A path on whatever file system Orbax can write to, by the library that Orbax itself uses."""
    made = epaths.Path(path)
    # Paths of other classes are of other file systems.
    return _literal_path()(made) if type(made) is type(epaths.Path("/")) else made
