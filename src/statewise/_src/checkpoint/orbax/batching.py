"""Many things at once: in groups of bounded size, and without the garbage collector looking at all of the process.

A manifest of some thousand leaves is some ten thousand dicts and lists, none of them in a cycle.  Python's collector
counts how many there are, takes them for a reason to go through every object of the process, and finds nothing: with
JAX and Flax imported that is 0.1 s each time, more than all else that a small restore does.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["grouped", "no_collection"]

T = TypeVar("T")


def grouped(things: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Things in their order, in groups of at most that many bytes; what is larger is a group by itself."""
    group: list[T] = []
    size = 0
    for thing in things:
        more = size_of(thing)
        if group and size + more > most:
            yield group
            group, size = [], 0
        group.append(thing)
        size += more
    if group:
        yield group


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """For the length of a block, which is short and waits for nothing, no garbage is collected in this process.

    Where the collector is off already, by another thread's block or by the user, it stays as it is.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
