"""What a disk or a store says while steps are saved or read, as errors of Statewise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from statewise._src.checkpoint.orbax.store_errors import said
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.temporary import reason_of
from statewise._src.common.compat import OtherProcessError
from statewise.errors import SaveError, StatewiseError

__all__ = ["opens", "step_exists", "writes"]


@contextlib.contextmanager
def opens(directory: Any) -> Iterator[None]:
    """Raises a `SaveError` if a block cannot open a directory of steps."""
    facts = "{directory} cannot be used: {reason}.", "a directory that can be written to"
    yield from _told(directory, lambda: facts)


@contextlib.contextmanager
def writes(directory: Any, complete: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Raises a `SaveError` if a block cannot write a step.

    Args:
      directory: the directory of the steps.
      complete: returns the step that was being written, if it is complete all the same.
    """

    def facts() -> tuple[str, str]:
        step = complete()
        if step is None:
            text = "A step could not be written to {directory}: {reason}. Earlier steps are complete."
            return text, "free some space, or choose a directory that can be written to"
        after = "not what Orbax does after it, such as deleting older steps"
        text = f"Step {step} in {{directory}} is complete, but {after}: {{reason}}."
        return text, "remove by hand what should have gone, if it is still there"

    yield from _told(directory, facts)


def _told(directory: Any, facts: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Raises an error with a text and a hint; they are asked for when there is one."""
    try:
        yield
    except StatewiseError:
        raise
    except Exception as error:  # Orbax, TensorStore and stores raise any exception
        text, hint = facts()
        if other := _of_other_process(error):
            reason, hint = str(other), "the logs of the other processes"
        elif isinstance(directory, StorePath):
            answer = said(error)
            reason, hint = answer.strerror or "", answer.hint
        elif isinstance(error, (OSError, ValueError)):
            reason = reason_of(error).rstrip(".")
        else:
            raise
        raise SaveError(text.format(directory=directory, reason=reason), hint=hint) from error


def _of_other_process(error: BaseException | None) -> OtherProcessError | None:
    """Returns the error that says that another process has failed; Orbax's own may have followed it."""
    while error is not None and not isinstance(error, OtherProcessError):
        error = error.__cause__ or error.__context__
    return error


def step_exists(directory: Any, step: int) -> SaveError:
    """Returns the error for a step that is complete already, or is being written."""
    hint = f"another step; checkpoints.manager.delete({step}) removes one that is corrupted"
    return SaveError(f"There is already a step {step} in {directory}.", hint=hint)
