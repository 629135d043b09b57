"""A checkpoint's folder, its manifest, and those of the base that it was saved over."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from typing import Any

from statewise._src.checkpoint.format.manifest import NAME, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.interop.recognize import recognized, within
from statewise._src.checkpoint.orbax.paths import check_usable, place_of
from statewise.errors import CorruptedError, RestoreError

__all__ = ["find", "find_with_base"]


def find(path: Any) -> Any:
    """The folder of a checkpoint; of a step, that of its one item which is a state.

    Raises:
      RestoreError: there is nothing, this is no path, or it is that of a file of another format.
      CorruptedError: what is there is none of ours.
    """
    folder = place_of(path)
    if not folder.exists():
        raise RestoreError(
            f"There is nothing at {folder}.",
            hint="sw.save(path, state) writes a checkpoint; look for it beside this path",
        )
    if folder.is_file():
        found = recognized(folder)
        raise RestoreError(f"{folder} is not a checkpoint of Statewise, but {found.what}.", hint=found.hint)
    if not (folder / NAME).exists():
        items = _items(folder)
        if len(items) == 1 and items[0].parent == folder:  # a step of a run: its one item that is a state
            check_usable(items[0])
            return items[0]
        inside = None if items else within(folder)
        raise CorruptedError(
            f"{folder} is no checkpoint of Statewise: it has no {NAME}"
            + (f", but it {inside.what}." if inside else "."),
            hint=f"one of its items is: {str(items[0])!r}"
            if items
            else inside.hint
            if inside
            else f"sw.convert({str(folder)!r}, ...) reads a plain Orbax checkpoint",
        )
    check_usable(folder)
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
      CorruptedError: a manifest that is not what was written.
    """
    folder = find(path)
    own = read_manifest(folder)
    if own.base is None:
        if base is not None:
            raise RestoreError(
                f"{folder} was not saved over another checkpoint.",
                hint="leave base out; to save over one: sw.save(path, state, only=..., base=base)",
            )
        return [folder], [own]
    place = _base_of(folder, own.base, base)
    return [folder, place], [own, _checked(place, own.base)]


def _base_of(folder: Any, recorded: Mapping[str, str], given: Any) -> Any:
    there: Any = recorded["path"]
    try:
        places = _recorded(folder, recorded["path"]) if given is None else [place_of(given)]
        there = next((place for place in places if (place / NAME).exists()), places[0])
    except RestoreError:
        if given is not None:
            raise
    if isinstance(there, str) or not (there / NAME).exists():
        raise RestoreError(
            f"{folder} was saved over another checkpoint, which is not at {there}.",
            hint="say where it is now: sw.restore(path, target, base=...)",
        )
    place = there
    check_usable(place)
    return place


def _recorded(folder: Any, path: str) -> list[Any]:
    """Where a checkpoint says that its base is, from where it is itself: where links lead, and as its path has it."""
    scheme, slashes, own = str(folder).rpartition("://")
    if slashes:
        return [place_of(f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(own), path))}")]
    parents = dict.fromkeys([os.path.dirname(os.path.realpath(own)), os.path.dirname(own)])
    return [place_of(os.path.normpath(os.path.join(parent, path))) for parent in parents]


def _checked(place: Any, recorded: Mapping[str, str]) -> Manifest:
    manifest = read_manifest(place)
    if manifest.digest != recorded["digest"]:
        raise RestoreError(
            f"{place} is another checkpoint than the one that this was saved over.",
            hint="say where that one is: sw.restore(path, target, base=...)",
        )
    return manifest
