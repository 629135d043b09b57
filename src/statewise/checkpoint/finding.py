"""A checkpoint's folder, its manifest, and those of the base that it was saved over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from statewise import _compat
from statewise.checkpoint.manifest import NAME, Manifest
from statewise.checkpoint.parsing import read_manifest
from statewise.errors import DamagedError, RestoreError

__all__ = ["as_path", "find", "find_with_base"]


def as_path(path: Any) -> Any:
    """A path on whatever file system Orbax can read.

    Raises:
      RestoreError: this is no path.
    """
    try:
        return _compat.epath(os.fspath(path))
    except TypeError:
        raise RestoreError(f"{type(path).__name__} is no path.", mend="sw.restore('run/step_100', target)") from None


def find(path: Any) -> Any:
    """The folder of a checkpoint; of a step, that of its one item which is a state.

    Raises:
      RestoreError: there is nothing, or this is no path.
      DamagedError: what is there is none of ours.
    """
    folder = as_path(path)
    if not folder.exists():
        raise RestoreError(
            f"There is nothing at {folder}.",
            mend="sw.save(path, state) writes a checkpoint; look for it beside this path",
        )
    if not (folder / NAME).exists():
        items = _items(folder)
        if len(items) == 1 and items[0].parent == folder:  # a step of a run: its one item that is a state
            return items[0]
        raise DamagedError(
            f"{folder} is no checkpoint of Statewise: it has no {NAME}.",
            mend=f"one of its items is: {str(items[0])!r}"
            if items
            else f"sw.convert({str(folder)!r}, ...) reads a plain Orbax checkpoint",
        )
    return folder


def _items(folder: Any) -> list[Any]:
    """The checkpoints inside: the items of a step, or, of a folder of steps, those of the last of them."""
    below = _entries(folder)
    items = [entry for entry in below if (entry / NAME).exists()]
    return items or [inner for entry in below for inner in _entries(entry) if (inner / NAME).exists()][::-1]


def _entries(folder: Any) -> list[Any]:
    return sorted(folder.iterdir(), key=_in_order) if folder.is_dir() else []


def _in_order(entry: Any) -> tuple[int, str]:
    return (int(entry.name) if entry.name.isdecimal() else -1), entry.name


def find_with_base(path: Any, base: Any = None) -> tuple[list[Any], list[Manifest]]:
    """The folder and the manifest of a checkpoint; then those of its base, if it has one.

    Args:
      path: the checkpoint's.
      base: where the base is, if it was moved since.

    Raises:
      RestoreError: there is no such checkpoint; the base is not where it was, or another one; `base` is given for a
        checkpoint that has none.
      DamagedError: a manifest that is not what was written.
    """
    folder = find(path)
    own = read_manifest(folder)
    if own.base is None:
        if base is not None:
            raise RestoreError(
                f"{folder} was not saved over another checkpoint.",
                mend="leave base out; to save over one: sw.save(path, state, only=..., base=base)",
            )
        return [folder], [own]
    place = _base_of(folder, own.base, base)
    return [folder, place], [own, _checked(place, own.base)]


def _base_of(folder: Any, recorded: Mapping[str, str], given: Any) -> Any:
    where = (
        os.fspath(as_path(given)) if given is not None else FilePath(str(folder)).absolute().parent / recorded["path"]
    )
    place = _compat.epath(os.path.normpath(where))
    if not (place / NAME).exists():
        raise RestoreError(
            f"{folder} was saved over another checkpoint, which is not at {place}.",
            mend="say where it is now: sw.restore(path, target, base=...)",
        )
    return place


def _checked(place: Any, recorded: Mapping[str, str]) -> Manifest:
    manifest = read_manifest(place)
    if manifest.digest != recorded["digest"]:
        raise RestoreError(
            f"{place} is another checkpoint than the one that this was saved over.",
            mend="say where that one is: sw.restore(path, target, base=...)",
        )
    return manifest
