"""What `Checkpoints` puts beside a state: extra items, and what it has to check of its arguments."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import orbax.checkpoint as ocp

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.paths import obstacle
from statewise.errors import SaveError

__all__ = ["ITEM", "bytes_in", "check_counts", "check_metrics", "extra_item", "metrics_of"]

# What the state's item is called in each step.
ITEM = "state"


# What an extra item is not: the options of other functions, each with the way to what was probably meant.
_ALONE = "a directory for each step: sw.save(f'run/{step}', state, only=('lora', 'optimizer'), base='base')"
_OPTIONS = {
    "only": ("sw.save", _ALONE),
    "base": ("sw.save", _ALONE),
    "layout": ("sw.Checkpoints", "sw.Checkpoints(directory, layout='packed')"),
    "cast": ("checkpoints.restore", "checkpoints.restore(target, cast=True)"),
}


# What Orbax and Statewise put into a step themselves, or make of such a name.
_TAKEN = ("_CHECKPOINT_METADATA", "commit_success.txt", "default", "self", NAME)
# A name may have 255 bytes, and Orbax adds some to it while it writes.
_LONGEST = 200


def check_counts(max_to_keep: int | None, every: int) -> None:
    """Raises where a count of steps is none."""
    for name, count in (("max_to_keep", max_to_keep), ("every", every)):
        if count is not None and count < 1:
            raise SaveError(f"{name}={count} is less than one step.", hint=f"{name}=1, or leave it out")


def extra_item(name: str, given: Any) -> Any:
    """An extra item for Orbax; what goes into JSON as it is now, since it may be changed while it is being written."""
    if name == ITEM:
        raise SaveError(f"An extra item cannot be called {ITEM!r}: the state is.", hint="another name")
    if name in _OPTIONS:
        raise SaveError(
            f"An extra item cannot be called {name!r}: that is an option of {_OPTIONS[name][0]}, and none of a step's.",
            hint=_OPTIONS[name][1],
        )
    why = _unusable(name)
    if why:
        raise SaveError(f"An extra item cannot be called {name!r}: {why}.", hint="another name")
    if isinstance(given, ocp.args.CheckpointArgs):
        return given
    try:
        return ocp.args.JsonSave(json.loads(json.dumps(given, default=_number)))
    except (TypeError, ValueError, RecursionError) as error:
        raise SaveError(
            f"The extra item {name!r} is nothing that JSON can hold: {error}.",
            hint="numbers as Python has them, float(loss) say; or an ocp.args.CheckpointArgs, such as "
            "ocp.args.PyTreeSave(...)",
        ) from error


def _unusable(name: str) -> str:
    """Why a folder of a step cannot have this name; empty if it can."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        return "it is a folder of the step"
    if name in _TAKEN:
        return "that name is taken by Orbax or Statewise"
    why, _ = obstacle(name)
    if why:
        return why
    size = len(os.fsencode(name))
    return f"it has {size} bytes, and may have {_LONGEST}" if size > _LONGEST else ""


def _number(value: Any) -> Any:
    """A scalar of JAX's or NumPy's as Python's; `metrics={"loss": loss}` is what everybody writes first."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def metrics_of(items: Mapping[str, Any]) -> Any:
    """The metrics among the items, for Orbax's `best_fn`; None if there are none."""
    given = items.get("metrics")
    return given.item if isinstance(given, ocp.args.JsonSave) else None


def check_metrics(best_fn: Any, metrics: Any) -> None:
    """Raises where Orbax could not tell the best step by these metrics: from then on it would save none."""
    if best_fn is None or metrics is None:
        return
    try:
        best_fn(metrics)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SaveError(
            f"best_fn cannot judge these metrics: {type(error).__name__}: {error}.",
            hint="give each step what best_fn looks at: checkpoints.save(step, state, metrics={'loss': loss})",
        ) from error


def bytes_in(folders: Iterable[FilePath]) -> int:
    """The size of all files below some folders, as far as they are still there."""
    total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    total += os.path.getsize(os.path.join(path, name))
    return total
