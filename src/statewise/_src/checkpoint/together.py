"""What several processes do together: if one of them fails, all of them do, and none waits for it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

import jax
import numpy as np

from statewise._src.common import compat
from statewise.errors import SaveError

__all__ = ["agreed", "agreed_token", "is_first", "together"]


def is_first() -> bool:
    """Returns whether this is the first process, which does what is done once."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """Returns the first process's number in all processes; it has 32 bits."""
    if jax.process_count() == 1:
        return number
    return int(compat.broadcast_from_first_process(np.uint32(number)))


def agreed_token() -> str:
    """Returns 16 random hexadecimal digits, the same in all processes."""
    return f"{agreed(secrets.randbits(32)):08x}{agreed(secrets.randbits(32)):08x}"


@contextlib.contextmanager
def together(final: str | os.PathLike[str]) -> Iterator[None]:
    """Runs a block in every process; afterwards it has ended well in all of them, or every one of them raises.

    Args:
      final: what they write.

    Raises:
      SaveError: it has failed in another process, or that one has ended.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as failure:
        try:
            compat.flags_of_processes(True)
        except compat.OtherProcessError as error:
            failure.add_note(f"The other processes do not know of it: {error.__cause__}")
        raise
    try:
        failed = compat.flags_of_processes(False)
    except compat.OtherProcessError as error:
        raise SaveError(
            f"{os.fspath(final)} could not be written: {error}.",
            hint="the logs of the other processes; then restart all of them, on as many as there are",
        ) from error
    if failed:
        raise SaveError(
            f"{os.fspath(final)} could not be written: process {failed[0]} has failed, and its own error says why.",
            hint=f"the log of process {failed[0]}",
        )
