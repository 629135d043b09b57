"""How several processes write in the background: if one of them fails, all of them do, and none waits for it.

This is `together` for threads, which may not run collectives on devices.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import orbax.checkpoint as ocp

from statewise._src.common import compat

__all__ = ["LIMIT", "ending", "has_ended", "write_together"]

# The seconds that a process waits for the others, unless the options say otherwise: Orbax's own limit for a write.
LIMIT = 1200


def write_together(directory: object, write: Callable[[], None], limit: float | None) -> None:
    """Writes what this process has to; afterwards every process has written, or every one of them raises.

    Args:
      directory: where all of them write; by its name they find each other.
      write: writes; blocks until that is done.
      limit: the most seconds to wait for the others; None if they may not write there, so that none is waited for.

    Raises:
      OtherProcessError: another process has failed, or has ended.
    """
    if limit is None or jax.process_count() == 1:
        write()
        return
    name = f"statewise {directory}".replace("/", "|")  # a slash would divide a key
    try:
        write()
    except Exception as failure:  # raised again, when the other processes know
        try:
            _failed_processes(name, True, limit)
        except compat.OtherProcessError as error:
            failure.add_note(f"The other processes do not know of it: {error.__cause__}")
        raise
    if failed := _failed_processes(name, False, limit):
        raise compat.OtherProcessError(f"process {failed[0]} has failed, and its own error says why")


def _failed_processes(name: str, failed: bool, limit: float) -> list[int]:
    """Returns the numbers of the processes that have failed.

    Nothing runs on devices: the processes talk through the service that `jax.distributed` has started.

    Args:
      name: what they talk about, without slashes; every process calls this with it, and waits for the others.
      failed: whether this process has failed.
      limit: the most seconds to wait.

    Raises:
      OtherProcessError: one of them does not answer.
    """
    client = ocp.multihost.get_jax_distributed_client()
    milliseconds = int(1000 * limit)
    key = f"{name}/{jax.process_index()}"
    with compat.other_processes():
        if failed:
            client.key_value_set(key, "failed")
        client.wait_at_barrier(name, milliseconds)
        numbers = sorted(int(found.rpartition("/")[2]) for found, _ in client.key_value_dir_get(f"{name}/"))
        if numbers:  # all of them have to read it before it is removed, for the next time with this name
            client.wait_at_barrier(f"{name} read", milliseconds)
        if failed:
            client.key_value_delete(key)
    return numbers


@contextlib.contextmanager
def ending() -> Iterator[Sequence[threading.Thread]]:
    """Yields a list; after the block it has the thread that Orbax started there to end a save, known by its name."""
    before, threads = threading.enumerate(), list[threading.Thread]()
    yield threads
    threads += [new for new in threading.enumerate() if new not in before and new.name == "save_finalize"]


def has_ended(threads: Sequence[threading.Thread]) -> bool:
    """Returns whether the thread that ends a save has ended; False if there is none, and so nothing is known.

    If a process does not answer, that thread fails, and for Orbax the save stays in progress.
    """
    return bool(threads) and not any(thread.is_alive() for thread in threads)
