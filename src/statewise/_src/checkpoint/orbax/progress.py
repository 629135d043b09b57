"""How far a long write is: a bar where somebody looks at a terminal, a line now and then in a log, else nothing.

How much is written is told by the size of the files, so that whoever writes them need not know of it.  A pipe gets no
bar, and standard output nothing at all: what is seen goes to standard error, what is logged to the logger `statewise`.
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

__all__ = ["LARGE", "bar", "growing"]

# Bytes: from here on somebody who waits wants to see how far it is.
LARGE = 256 * 1024 * 1024
# Seconds: between two looks at the files; between two lines in a log.
LOOK, LINE = 0.1, 10.0

_log = logging.getLogger("statewise")

Tell = Callable[[int], None]


@contextlib.contextmanager
def growing(what: str, total: int, folders: Callable[[], Iterable[FilePath]]) -> Iterator[None]:
    """Shows, for the length of a block that writes, how far it is.

    Args:
      what: what is being done, `writing run/step_100`.
      total: the bytes that there will be; nothing is shown of less than `LARGE`.
      folders: what is being written.
    """
    if total < LARGE:
        yield
        return
    ended = threading.Event()
    with bar(what, total) as tell:

        def look() -> None:
            while not ended.wait(LOOK):
                tell(min(bytes_in(folders()), total))

        watcher = threading.Thread(target=look, name="statewise-progress", daemon=True)
        watcher.start()
        try:
            yield
            ended.set()
            watcher.join()
            tell(total)
        finally:
            ended.set()
            watcher.join()


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Tell]:
    """A bar in a terminal, lines in a log elsewhere; what it gives is called with the bytes that are written."""
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
