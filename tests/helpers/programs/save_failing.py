"""One of several processes that save while one of them fails, and then dies; run by test_save_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

import statewise as sw
from programs.save_together import make, spread
from statewise._src.checkpoint import save, store_commit
from statewise._src.checkpoint.orbax import state_writer
from statewise._src.checkpoint.together import together


def fails(*_: object) -> NoReturn:
    """Is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dies(_: object) -> NoReturn:
    """Ends the process as a signal does."""
    os._exit(9)


@contextlib.contextmanager
def dies_when_complete(path: str, is_complete: Callable[[], bool] | None = None) -> Iterator[None]:
    """Ends the process when the first one has committed what all of them have written."""
    with together(path):
        if is_complete is not None:
            while not is_complete():
                time.sleep(0.01)
            dies(path)
        yield


class Known:
    """An iterator that knows where it is."""

    def get_state(self) -> bytes:
        """Returns the position."""
        return b"1"

    def set_state(self, state: object) -> None:
        """Does nothing."""


class Broken:
    """An iterator that does not know where it is."""

    def get_state(self) -> NoReturn:
        """Is full."""
        fails(self)

    def set_state(self, state: object) -> None:
        """Does nothing."""


def said(save: Callable[[], object]) -> str:
    """What a save says when it fails."""
    try:
        save()
    except sw.SaveError as error:
        return error.message
    except sw.RestoreError as error:
        return f"RestoreError: {error.message}"
    return "nothing"


def fail(is_last: bool, folder: str, state: sw.State) -> None:
    """Fails in the last process, before and while it writes."""
    base = f"{folder}/{'none' if is_last else 'first'}"
    print("base", said(lambda: sw.save(f"{folder}/base", state, only="params", base=base)), flush=True)
    writer = state_writer.StateWriter
    for name, method in (("made", "__init__"), ("full", "write")):
        plain = getattr(writer, method)
        if is_last:
            setattr(writer, method, fails)
        print(name, said(lambda name=name: sw.save(f"{folder}/{name}", state)), flush=True)
        setattr(writer, method, plain)
    data = Broken() if is_last else Known()
    with sw.Checkpoints(f"{folder}/run") as checkpoints:
        print("data", said(lambda: checkpoints.save(1, state, data=data)), flush=True)
        print("steps", checkpoints.steps, flush=True)


def main(number: int, count: int, port: str, folder: str, *stores: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    state = spread(sw.plan(make()).take(make()))
    is_last = number == count - 1
    if stores:  # the last thing that happens: after it no process answers another
        (path,) = stores
        if is_last:
            save.together = store_commit.together = dies_when_complete
        print("complete", said(lambda: sw.save(path, state)), flush=True)
        os._exit(0)
    sw.save(f"{folder}/first", state)
    fail(is_last, folder, state)
    if is_last:
        state_writer.StateWriter.write = dies  # type: ignore[method-assign]
    print("dead", said(lambda: sw.save(f"{folder}/dead", state)), flush=True)
    os._exit(0)  # JAX would wait for the process that has ended


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
