"""The options of Orbax that `sw.Checkpoints` takes, of either interface, and the checks of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import orbax.checkpoint as ocp

from statewise._src.checkpoint.orbax.paths import PATTERN, is_url
from statewise.errors import SaveError

__all__ = ["Options", "check_options", "is_of_newer"]

Options: TypeAlias = ocp.CheckpointManagerOptions | Callable[..., Any]


def check_options(options: object, directory: object) -> None:
    """Raises if no manager is opened with these options for a directory."""
    if not (options is None or isinstance(options, ocp.CheckpointManagerOptions) or is_of_newer(options)):
        raise SaveError(
            f"options={options!r} is neither an ocp.CheckpointManagerOptions nor ocp.v1.training.Checkpointer.",
            hint="options=ocp.CheckpointManagerOptions(max_to_keep=3), or "
            "functools.partial(ocp.v1.training.Checkpointer, preservation_policy=...)",
        )
    given = getattr(options, "keywords", None) or {}
    names = given.get("step_name_format") or getattr(options, "step_name_format", None)
    name = names.build_name(0) if names else getattr(options, "step_prefix", None) or ""
    if found := PATTERN.search(name):  # Orbax would not find such steps, or would delete others too
        raise SaveError(
            f"Steps cannot be named as {name!r}: Orbax takes {found[0]!r} for a pattern.",
            hint="names without such characters: ocp.CheckpointManagerOptions(step_prefix='at')",
        )
    if not is_url(directory) and (option := _marking_option(options, given)):
        raise SaveError(
            f"With {option} Orbax writes each step under its final name and renames nothing, so that on a disk a power "
            "cut can take files of a complete step.",
            hint="leave it out: on a disk Orbax renames, and what is renamed is on the disk",
        )


def _marking_option(options: Any, given: Mapping[str, Any]) -> str:
    """Returns the option by which Orbax marks a step that is complete, instead of renaming it; empty without."""
    modes = {
        "atomicity_options": getattr(options, "atomicity_options", None),
        "context": getattr(given.get("context"), "atomicity", None),
    }
    for name, atomicity in modes.items():
        if getattr(atomicity, "mode", None) == ocp.options.AtomicityMode.COMMIT_FILE:
            return f"AtomicityMode.COMMIT_FILE in {name}"
    path_class = getattr(options, "temporary_path_class", None)
    if isinstance(path_class, type) and issubclass(path_class, ocp.path.atomicity.CommitFileTemporaryPath):
        return f"temporary_path_class={path_class.__name__}"
    return ""


def is_of_newer(options: object) -> bool:
    """Returns whether these options are for Orbax's newer interface."""
    made_by = options.func if isinstance(options, functools.partial) else options
    return made_by is ocp.v1.training.Checkpointer
