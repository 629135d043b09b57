"""The progress of a long write: a bar in a terminal, an occasional line in a log, or nothing.

Progress is measured by the size of the files, so the code that writes them need not report it.  A pipe gets no bar, and
standard output nothing at all: the bar goes to standard error, the lines to the logger `statewise`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from statewise._src.checkpoint.items import bytes_in

__all__ = ["LARGE", "bar", "counting", "growing"]

# Writes of this many bytes or more show their progress.
LARGE = 256 * 1024 * 1024
# Seconds between two looks at the files, and between two lines in a log.
LOOK, LINE = 0.1, 10.0

_log = logging.getLogger("statewise")

Tell = Callable[[int], None]


@contextlib.contextmanager
def growing(what: str, total: int, folders: Callable[[], Iterable[FilePath]]) -> Iterator[None]:
    """Shows the progress of a block that writes files.

    Args:
      what: what the block does, `writing run/step_100`.
      total: the number of bytes to write; below `LARGE` nothing is shown.
      folders: returns the directories that are being written.
    """
    if total < LARGE:
        yield
        return
    ended = threading.Event()
    with bar(what, total) as tell:

        def look() -> None:
            while not ended.wait(LOOK):
                tell(min(bytes_in(folders()), total))

        # A daemon, which does not keep an interrupted process alive.
        watcher = threading.Thread(target=look, name="statewise-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        tell(total)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Tell]:
    """Shows the progress of a block; yields a function to call with the number of bytes that are written since.

    Args:
      what: what the block does.
      total: the number of bytes to write; below `LARGE` nothing is shown.
    """
    if total < LARGE:
        yield lambda _: None
        return
    written = 0
    with bar(what, total) as tell:

        def wrote(more: int) -> None:
            nonlocal written
            written += more
            tell(min(written, total))

        yield wrote
        tell(total)


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Tell]:
    """Shows a bar in a terminal, or lines in a log; yields a function to call with the number of bytes written."""
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda written: shown.update(task, completed=written)


def _lines(what: str, total: int) -> Tell:
    last = time.monotonic()

    def tell(written: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE:
            last = now
            _log.info("%s: %.0f of %.0f MB", what, written / 1e6, total / 1e6)

    return tell
