"""A checkpoint's directory and manifest, and those of the base that it was saved over."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.checkpoint.format.keys import PathId
from statewise._src.checkpoint.format.manifest import NAME, OWN, LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.interop.recognize import recognized, within
from statewise._src.checkpoint.orbax.paths import check_usable, place_of
from statewise._src.checkpoint.orbax.store_errors import reads
from statewise._src.checkpoint.orbax.stores import StorePath, is_url, listing
from statewise.errors import CorruptedError, RestoreError

__all__ = ["check_finished", "find", "find_with_base", "is_left", "leaves_with_base"]

_OF_WRITER = re.compile(rf"{OWN}[0-9a-f]{{16}}/")


def find(path: object) -> Any:
    """Returns the directory of a checkpoint; for a step of a run, that of its only item that is a state.

    Raises:
      RestoreError: there is nothing, this is not a path, or it is the path of a file of another format.
      CorruptedError: what is there is not a checkpoint of Statewise.
    """
    folder = place_of(path)
    with reads(folder):
        return _found(folder)


def _found(folder: Any) -> Any:
    if isinstance(folder, StorePath) and (folder / NAME).is_file():
        return folder  # the answer to one request
    if not folder.exists():
        hint = "sw.save(path, state) writes a checkpoint; look for it beside this path"
        if isinstance(folder, StorePath):
            hint += ", and whether there is a bucket of this name"
        raise RestoreError(f"There is nothing at {folder}.", hint=hint)
    if folder.is_file():
        file = recognized(folder)
        raise RestoreError(f"{folder} is not a checkpoint of Statewise, but {file.what}.", hint=file.hint)
    check_finished(folder)
    items = [] if (folder / NAME).exists() else _items(folder)
    if len(items) == 1 and items[0].parent == folder:  # a step of a run, with one item that is a state
        folder = items[0]
    elif not (folder / NAME).exists():
        inside = None if items else within(folder)
        hint = inside.hint if inside else f"sw.convert({str(folder)!r}, ...) reads a plain Orbax checkpoint"
        raise CorruptedError(
            f"{folder} is not a checkpoint of Statewise: it has no {NAME}"
            + (f", but it {inside.what}." if inside else "."),
            hint=f"one of its items is: {str(items[0])!r}" if items else hint,
        )
    check_usable(folder)
    return folder


def _items(folder: Any) -> list[Any]:
    """Returns the checkpoints inside: the items of a step, or, in a directory of steps, those of the last step."""
    if isinstance(folder, StorePath):
        return _items_in_store(folder)
    below = _entries(folder)
    items = [entry for entry in below if (entry / NAME).exists()]
    return items or [inner for entry in below for inner in _entries(entry) if (inner / NAME).exists()][::-1]


def _items_in_store(folder: StorePath) -> list[Any]:
    """Returns the same in an object store, by one listing."""
    found = [folders for *folders, name in (each.split("/") for each in listing(folder)) if name == NAME]
    items = [folders for folders in found if len(folders) == 1] or [folders for folders in found if len(folders) == 2]
    items.sort(key=lambda folders: (int(folders[0]) if folders[0].isdecimal() else -1, folders))
    return [folder / "/".join(folders) for folders in (items if items and len(items[0]) == 1 else items[::-1])]


def check_finished(folder: Any) -> None:
    """Raises if all that is at a path of a store is what writers left that did not come to their manifest.

    Raises:
      RestoreError: it is.
    """
    if isinstance(folder, StorePath) and (names := listing(folder)) and all(map(is_left, names)):
        raise RestoreError(
            f"{folder} is not a complete checkpoint: its writer did not come to the manifest, or is still writing.",
            hint="wait for its writer; or restore another one: the next save to this path clears it",
        )


def is_left(name: str) -> bool:
    """Returns whether a name below a path of a store is one that a writer uses before its manifest exists."""
    return _OF_WRITER.match(name) is not None


def _entries(folder: Any) -> list[Any]:
    """Returns what a directory has: first what is not a step, then the steps by their numbers."""
    if not folder.is_dir():
        return []
    return sorted(folder.iterdir(), key=lambda entry: (int(entry.name) if entry.name.isdecimal() else -1, entry.name))


def find_with_base(path: object, base: object = None) -> tuple[list[Any], list[Manifest]]:
    """Returns the directory and the manifest of a checkpoint; then those of its base, if it has one.

    Args:
      path: the path of the checkpoint.
      base: the path of the base, if it was moved.

    Raises:
      RestoreError: there is no such checkpoint; the base is not where it was, or is another checkpoint; `base` is given
        for a checkpoint that has none.
      CorruptedError: a manifest is not what was written.
    """
    folder = find(path)
    own = read_manifest(folder)
    if own.base is None:
        if base is not None:
            hint = "leave base out; to save over one: sw.save(path, state, only=..., base=base)"
            raise RestoreError(f"{folder} was not saved over another checkpoint.", hint=hint)
        return [folder], [own]
    place, manifest = _find_base(folder, own.base, base)
    return [folder, place], [own, manifest]


def _find_base(folder: Any, recorded: Mapping[str, str], given: object) -> tuple[Any, Manifest]:
    place: Any = recorded["path"]
    try:
        places = _recorded(folder, recorded["path"]) if given is None else [place_of(given)]
        place = next((place for place in places if (place / NAME).is_file()), places[0])
    except RestoreError:  # what is recorded cannot be a path here
        if given is not None:
            raise
    if isinstance(place, str) or not (place / NAME).is_file():
        hint = "say where it is now: sw.restore(path, target, base=...)"
        raise RestoreError(f"{folder} was saved over another checkpoint, which is not at {place}.", hint=hint)
    check_usable(place)
    manifest = read_manifest(place)
    if manifest.digest != recorded["digest"]:
        hint = "say where that one is: sw.restore(path, target, base=...)"
        raise RestoreError(f"{place} is not the checkpoint that this one was saved over.", hint=hint)
    return place, manifest


def _recorded(folder: Any, path: str) -> list[Any]:
    """Returns where the base may be, by its path relative to the checkpoint: with links followed, and as written."""
    if is_url(path):
        return [place_of(path)]
    scheme, slashes, own = str(folder).rpartition("://")
    if slashes and os.path.isabs(path):
        return [place_of(path)]
    if slashes:
        return [place_of(f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(own), path))}")]
    parents = dict.fromkeys([os.path.dirname(os.path.realpath(own)), os.path.dirname(own)])
    return [place_of(os.path.normpath(os.path.join(parent, path))) for parent in parents]


def leaves_with_base(manifests: Sequence[Manifest]) -> dict[PathId, tuple[int, LeafRecord]]:
    """Returns by id the leaves that a restore finds, each with the number of the checkpoint that has it.

    These are the leaves of the checkpoint itself (0), and those of its base (1) whose kinds it did not save.
    """
    leaves: dict[PathId, tuple[int, LeafRecord]] = {}
    # The base comes first, so that a leaf of the checkpoint itself replaces the base's.
    for number, manifest in reversed(list(enumerate(manifests))):
        for leaf in manifest.leaves:
            if number == 0 or not manifests[0].has_saved(leaf.kind):
                leaves[leaf.id] = (number, leaf)
    return leaves
