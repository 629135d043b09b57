"""What several processes do together: if one of them fails, all of them do, and none waits for it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from statewise._src.common import compat
from statewise.errors import SaveError

__all__ = ["RESTART", "agreed", "agreed_token", "is_first", "together"]

# The hint if another process has ended.
RESTART = "the logs of the other processes; then restart all of them, on as many as there are"


def is_first() -> bool:
    """Returns whether this is the first process, which does what is done once."""
    return jax.process_index() == 0


def agreed(*numbers: int) -> list[int]:
    """Returns the first process's numbers in all processes; each has 32 bits.

    Raises:
      SaveError: another process has ended.
    """
    if jax.process_count() == 1:
        return list(numbers)
    try:
        return [int(number) for number in compat.broadcast_from_first_process(np.asarray(numbers, np.uint32))]
    except compat.OtherProcessError as error:
        raise SaveError(f"No checkpoint could be written: {error}.", hint=RESTART) from error


def agreed_token() -> str:
    """Returns 16 random hexadecimal digits, the same in all processes."""
    return "".join(f"{number:08x}" for number in agreed(secrets.randbits(32), secrets.randbits(32)))


@contextlib.contextmanager
def together(final: Any, is_complete: Callable[[], bool] | None = None) -> Iterator[None]:
    """Runs a block in every process; afterwards it has ended well in all of them, or every one of them raises.

    Args:
      final: the path that they write, as the user gave it: it is read only if the block has not rejected it.
      is_complete: for a block in which the first process commits what all have written, returns whether it is
        committed; if another process fails there, `final` may be complete all the same.

    Raises:
      SaveError: it has failed in another process, or that one has ended.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as failure:  # raised again, when the other processes know
        try:
            compat.flags_of_processes(True)
        except compat.OtherProcessError as error:
            failure.add_note(f"The other processes do not know of it: {error.__cause__}")
        raise
    try:
        failed = compat.flags_of_processes(False)
    except compat.OtherProcessError as error:
        if is_complete is not None and is_complete():
            raise SaveError(f"{os.fspath(final)} is complete, but {error}.", hint=RESTART) from error
        raise _failed(final, str(error), RESTART, is_complete) from error
    if failed:
        why = f"process {failed[0]} has failed, and its own error says why"
        raise _failed(final, why, f"the log of process {failed[0]}", is_complete)


def _failed(final: Any, why: str, hint: str, is_complete: Callable[[], bool] | None) -> SaveError:
    """Returns the error for a process that another one has left alone."""
    path = os.fspath(final)
    if is_complete is None:
        return SaveError(f"{path} could not be written: {why}.", hint=hint)
    hint = f"sw.inspect({path!r}) says whether it is; {hint}"
    return SaveError(f"It is not known whether {path} is complete: {why}.", hint=hint)
