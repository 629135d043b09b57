"""The items that `Checkpoints` puts beside a state, and the checks of its arguments."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any, SupportsFloat

from statewise._src.checkpoint.data import DATA, check_iterator, data_item
from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.manager import ITEM, METRICS, Json, Manager
from statewise._src.checkpoint.orbax.paths import obstacle
from statewise.errors import SaveError

__all__ = ["bytes_in", "check_counts", "check_timeout", "items_of_step"]

# Names that an extra item cannot have, because other functions have options of these names: the function, and the code
# that was probably meant.
_ALONE = "a directory for each step: sw.save(f'run/{step}', state, only=('lora', 'optimizer'), base='base')"
_OPTIONS = {
    "only": ("sw.save", _ALONE),
    "base": ("sw.save", _ALONE),
    "layout": ("sw.Checkpoints", "sw.Checkpoints(directory, layout='packed')"),
    "cast": ("checkpoints.restore", "checkpoints.restore(target, cast=True)"),
}


# Names that Orbax and Statewise use in a step themselves, or that Orbax gives a meaning.
_TAKEN = ("_CHECKPOINT_METADATA", "commit_success.txt", "default", "self", NAME)
# A name may have 255 bytes, and Orbax adds some to it while it writes.
_LONGEST = 200


def check_counts(max_to_keep: int | None, every: int) -> None:
    """Raises if a number of steps is less than one."""
    for name, count in (("max_to_keep", max_to_keep), ("every", every)):
        if count is not None and count < 1:
            raise SaveError(f"{name}={count} is less than one step.", hint=f"{name}=1, or leave it out")


def check_timeout(timeout: object) -> float:
    """Returns a timeout in seconds, infinite for None; raises if it is not a number of seconds."""
    if timeout is None:
        return math.inf
    try:
        seconds = float(timeout) if isinstance(timeout, SupportsFloat) else math.nan
    except (TypeError, OverflowError):  # several numbers; too large a one
        seconds = math.nan
    if not seconds >= 0:  # nor is NaN
        raise SaveError(f"timeout={timeout!r} is not a number of seconds.", hint="timeout=30, or leave it out")
    return seconds


def items_of_step(manager: Manager, extra: Mapping[str, object], data: object, step: int | None) -> dict[str, Any]:
    """Returns what a step has beside its state, for Orbax to write.

    Args:
      manager: the steps of the run.
      extra: the extra items, by name.
      data: a data iterator; None for none.
      step: the step; None if it is not saved, and all of this is only checked.

    Raises:
      SaveError: an item cannot be written, or Orbax cannot judge the metrics; `data` does not say where it is.
    """
    items = {name: _extra_item(manager, name, given) for name, given in extra.items()}
    _check_metrics(manager, items)
    if data is not None:
        check_iterator(data, SaveError)
        if step is not None:  # asking for the position may take longer than a step
            items[DATA] = data_item(data, step)
    return items


def _extra_item(manager: Manager, name: str, given: object) -> Any:
    """Returns an extra item for Orbax; JSON is made now, because the data may change while it is being written."""
    if name in _OPTIONS:
        function, hint = _OPTIONS[name]
        raise SaveError(
            f"An extra item cannot be called {name!r}: that is an option of {function}, not of a step.", hint=hint
        )
    why = _unusable(name)
    if why:
        raise SaveError(f"An extra item cannot be called {name!r}: {why}.", hint="another name")
    item = manager.item(given)
    if isinstance(item, Json):
        given = item.data
    elif item is not None:
        return item
    try:
        return Json(json.loads(json.dumps(given, default=_number)))
    except (TypeError, ValueError, RecursionError) as error:
        hint = f"Python numbers, such as float(loss); or {manager.item_example}"
        raise SaveError(f"The extra item {name!r} cannot be written as JSON: {error}.", hint=hint) from error


def _unusable(name: str) -> str:
    """Returns why a directory of a step cannot have this name; empty if it can."""
    if name == ITEM:
        return "that is the state"
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        return "it is a directory of the step"
    if name in _TAKEN:
        return "that name is taken by Orbax or Statewise"
    why, _ = obstacle(name)
    if why:
        return why
    size = len(os.fsencode(name))
    return f"it has {size} bytes, and the limit is {_LONGEST}" if size > _LONGEST else ""


def _number(value: Any) -> Any:
    """Returns a JAX or NumPy scalar as Python's: `metrics={"loss": loss}` is what everyone writes first."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _check_metrics(manager: Manager, items: Mapping[str, Any]) -> None:
    """Raises if Orbax could not find the best step by the metrics among the items: it would not save any step then."""
    metrics = items.get(METRICS)
    if manager.best_fn is None or not isinstance(metrics, Json) or metrics.data is None:
        return
    try:
        manager.best_fn(metrics.data)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        hint = "give each step what best_fn looks at: checkpoints.save(step, state, metrics={'loss': loss})"
        raise SaveError(f"best_fn cannot judge these metrics: {type(error).__name__}: {error}.", hint=hint) from error


def bytes_in(folders: Iterable[FilePath]) -> int:
    """Returns the size of all files below some directories, as far as they still exist."""
    total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                    total += os.path.getsize(os.path.join(path, name))
    return total
