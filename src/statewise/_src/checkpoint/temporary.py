"""The hidden directory beside a path in which a checkpoint is written, until it is renamed to that path.

Its name is `.NAME.tmp-HOST-PID.START-RANDOM`: which process has made it, and when that process started.  Numbers of
processes repeat, in containers after each restart, so the number alone does not say that its maker is still running.
If several processes write, it is named after the first of them, and `HOST` is `many_` and a checksum of its host.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path as FilePath

import jax

from statewise._src.checkpoint.orbax.flush import UnflushedNameError
from statewise._src.checkpoint.orbax.paths import short_name
from statewise._src.checkpoint.store_commit import another_writer
from statewise._src.checkpoint.together import agreed
from statewise.errors import SaveError, StatewiseError

__all__ = ["clear_abandoned", "reason_of", "removed_on_failure", "temporary_beside", "temporary_of_all"]

# What follows the host: the number of a process, and when it started; older versions wrote the number alone.
_MAKER = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,10}))?-")
_WORDS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "No space left", "File too large", "Error writing", "quota")


# --- its name --------------------------------------------------------------------------------------------------


def temporary_beside(final: FilePath) -> FilePath:
    """Returns where this process writes until the result gets its final name."""
    return final.parent / f"{_prefix(final, _host())}{_name(*_numbers())}"


def temporary_of_all(final: FilePath) -> FilePath:
    """Returns where all processes write; the first of them chooses the name."""
    if jax.process_count() == 1:
        return temporary_beside(final)
    host, *numbers = agreed(_host_number(), *_numbers())
    return final.parent / f"{_prefix(final, _many(host))}{_name(*numbers)}"


def _prefix(final: FilePath, host: str) -> str:
    return f".{short_name(final.name)}.tmp-{host}-"


def _name(pid: int, start: int, token: int) -> str:
    return f"{pid}.{start}-{token:08x}" if start else f"{pid}-{token:08x}"


def _numbers() -> tuple[int, int, int]:
    """Returns what makes the name of a directory of this process: its number, its start, and a random number."""
    return os.getpid(), _start_of(os.getpid()), secrets.randbits(32)


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]


def _host_number() -> int:
    return zlib.crc32(os.fsencode(socket.gethostname()))


def _many(host: int) -> str:
    return f"many_{host:08x}"


def _start_of(pid: int) -> int:
    """Returns when a process started, in ticks of the system's clock; 0 if the system does not say."""
    try:
        text = FilePath(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The name of the program comes second, in parentheses, and can have any characters; the start is the 22nd field.
    fields = text.rpartition(b")")[2].split()
    return int(fields[19]) % (1 << 32) if len(fields) > 19 else 0


# --- what is left of it ----------------------------------------------------------------------------------------


def clear_abandoned(final: FilePath) -> None:
    """Removes what processes of this machine left that died while they wrote to this same path."""
    for host in (_host(), _many(_host_number())):
        prefix = _prefix(final, host)
        for folder in final.parent.glob(f"{glob.escape(prefix)}*"):
            maker = _MAKER.match(folder.name.removeprefix(prefix))
            if maker is not None and not _is_alive(int(maker[1]), int(maker[2] or 0)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int, start: int) -> bool:
    """Returns whether a process is running that started at this time; at any time, if that is not known."""
    if start and (now := _start_of(pid)):
        return now == start
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # the process exists, and is another user's
    return True


@contextlib.contextmanager
def removed_on_failure(final: FilePath, temporary: FilePath, *, is_first: bool = True) -> Iterator[None]:
    """Removes what was written if a block fails; what the system reports becomes a `SaveError`.

    Args:
      final: the path that it should have had.
      temporary: the directory in which it is written.
      is_first: whether this process removes it.

    Raises:
      SaveError: it could not be written; the error says whether anything of it is left.
    """
    try:
        yield
    except BaseException as failure:
        known = _known(final, failure) if _is_of_disk(failure) else failure  # asked before anything is removed
        left = _remove(temporary) if is_first else ""
        if known is None:
            after = left or ("Nothing of it is left." if is_first else "Process 0 removes what was written.")
            raise SaveError(
                f"{final} could not be written: {reason_of(failure)}. {after}",
                hint="free some space, or choose a directory that can be written to",
            ) from failure
        if left:
            known.add_note(left)
        if known is failure:
            raise
        raise known from failure


def _known(final: FilePath, failure: BaseException) -> SaveError | None:
    """Returns the error for a path at which there is a checkpoint, although writing one has failed; None without."""
    if isinstance(failure, UnflushedNameError):
        return SaveError(
            f"{final} is complete, but the disk has not taken its name, so a power cut can remove it: "
            f"{reason_of(failure)}.",
            hint="save again, to another path",
        )
    return another_writer(final) if os.path.exists(final) else None


def _remove(folder: FilePath) -> str:
    """Removes what was written; returns a sentence about what is left, empty if there is nothing.

    Several times, because threads of a failed write may still make files for a moment.
    """
    for pause in (0.0, 0.02, 0.1, 0.5):
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)  # all that can be removed
    try:
        shutil.rmtree(folder)  # raises for what cannot
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        is_there = "is" if os.path.lexists(folder) else "may be"
        return f"What it has written {is_there} left in {folder}: {reason_of(error)}."
    return ""


def reason_of(error: BaseException) -> str:
    """Returns what the system reported, in its own words."""
    if isinstance(error, StatewiseError):
        return error.message.rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    *first, last = str(error).split(" [")[0].split(": ")  # TensorStore's text starts with where it was
    return f"{first[-1]}: {last}" if first and last.startswith('"') else last


def _is_of_disk(error: BaseException) -> bool:
    """Returns whether the system has reported it; TensorStore raises that as a `ValueError`."""
    if isinstance(error, StatewiseError) or not isinstance(error, (OSError, ValueError)):
        return False
    # TensorStore adds the number to whatever the system has reported.
    text = str(error)
    return isinstance(error, OSError) or "os_error_code=" in text or any(word in text for word in _WORDS)
