"""What a disk or a store says while steps are saved or read, as errors of Statewise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from statewise._src.checkpoint.orbax.store_errors import StoreError, said
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.save import reason_of
from statewise.errors import RestoreError, SaveError, StatewiseError

__all__ = ["opens", "reads", "step_exists", "writes"]


@contextlib.contextmanager
def opens(directory: Any) -> Iterator[None]:
    """Raises a `SaveError` if a block cannot open a directory of steps."""
    yield from _told(directory, "{directory} cannot be used: {reason}.", "a directory that can be written to")


@contextlib.contextmanager
def writes(directory: Any) -> Iterator[None]:
    """Raises a `SaveError` if a block cannot write a step."""
    text = "A step could not be written to {directory}: {reason}. Earlier steps are complete."
    yield from _told(directory, text, "free some space, or choose a directory that can be written to")


def _told(directory: Any, text: str, hint: str) -> Iterator[None]:
    try:
        yield
    except StatewiseError:
        raise
    except Exception as error:
        if isinstance(directory, StorePath):
            answer = _answer(error)
            reason, hint = answer.strerror or "", answer.hint
        elif isinstance(error, (OSError, ValueError)):
            reason = reason_of(error)
        else:
            raise
        raise SaveError(text.format(directory=directory, reason=reason), hint=hint) from error


def _answer(error: Exception) -> StoreError:
    """Returns as what a store said what TensorStore raises, or the library that Orbax has for the store."""
    if isinstance(error, (StoreError, ValueError)):
        return said(error)
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    refused = isinstance(error, PermissionError) or "Forbidden" in text
    return StoreError(text, 403 if refused else None)


@contextlib.contextmanager
def reads(directory: Any) -> Iterator[None]:
    """Raises a `RestoreError` if a store refuses what a block reads."""
    try:
        yield
    except StoreError as error:
        raise RestoreError(f"{directory} cannot be read: {error.strerror}.", hint=error.hint) from error


def step_exists(directory: Any, step: int) -> SaveError:
    """Returns the error for a step that is complete already, or is being written."""
    hint = f"another step; checkpoints.manager.delete({step}) removes one that is corrupted"
    return SaveError(f"There is already a step {step} in {directory}.", hint=hint)
