"""Several safetensors files as one source: a folder, with or without an index, as models are published; or a list.

Nothing outside of a folder is opened, whatever its index or a link in it says; and everything that is wrong with its
files is one error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from statewise._src.checkpoint.interop.safetensors import first_line, open_file
from statewise._src.checkpoint.interop.sources import Source
from statewise._src.checkpoint.orbax.paths import place_of
from statewise._src.checkpoint.orbax.stores import StorePath, copying
from statewise.errors import CorruptedError, RestoreError

__all__ = ["INDEX", "check_local", "has_safetensors", "is_several", "open_files", "open_folder"]

# The index of a folder: {"weight_map": {name: file}}.
INDEX = "model.safetensors.index.json"
_EXAMPLE = "sw.restore(['a.safetensors', 'b.safetensors'], target, names=names)"


def has_safetensors(folder: Any) -> bool:
    """Returns whether a folder has an index of safetensors files, or such files."""
    return (folder / INDEX).exists() or any(entry.name.endswith(".safetensors") for entry in folder.iterdir())


def check_local(path: Any) -> None:
    """Raises if files of another program are not on a disk.

    Raises:
      RestoreError: they are in an object store.
    """
    if isinstance(path, StorePath):
        raise RestoreError(
            f"{path} is in an object store, where files of other programs are not read.",
            hint=f"copy it to a disk: {copying(path)}",
        )


def is_several(path: object) -> bool:
    """Returns whether something is several paths, and not one."""
    return isinstance(path, (list, tuple)) and bool(path) and all(isinstance(each, (str, os.PathLike)) for each in path)


def open_folder(folder: FilePath) -> Source:
    """Opens a folder of safetensors files: those that its index names, or all of them if it has none.

    Raises:
      CorruptedError: a file is not what was written, or the index and the files do not agree: all of it is listed.
    """
    index = _read_index(folder)
    files = sorted({*index.values()}) if index else sorted(path.name for path in folder.glob("*.safetensors"))
    absent = [name for name in files if not os.path.lexists(folder / name)]
    outside = [name for name in files if name not in absent and not _is_inside(folder, folder / name)]
    wrong = [f"its index names {', '.join(absent)}, which is not there"] if absent else []
    wrong += [f"{name} is a link to a file outside of the folder" for name in outside]
    inside = [name for name in files if name not in (*absent, *outside)]
    wrong += [f"{name} is not a file" for name in inside if not (folder / name).is_file()]
    opened, errors = _opened({name: folder / name for name in inside if (folder / name).is_file()})
    if not wrong and len(errors) == 1:
        raise errors[0]
    wrong += [error.message.rstrip(".") for error in errors]
    owner: dict[str, str] = {}
    for file, source in opened.items():
        for entry in source.entries:
            if index and index.get(entry.name) != file:
                wrong.append(f"{entry.name} is in {file}, and the index has it in {index.get(entry.name, 'no file')}")
            elif entry.name in owner:
                wrong.append(f"{entry.name} is in {owner[entry.name]} and in {file}")
            owner.setdefault(entry.name, file)
    is_twice = not index and len(owner) < sum(len(source.entries) for source in opened.values())
    lost = [(name, file) for name, file in index.items() if file in opened and name not in owner]
    wrong += [f"{name} is not in {file}, where the index has it" for name, file in lost]
    if wrong:
        is_partial = len(wrong) == 1 and bool(absent)
        hint = "fetch the folder again"
        if outside or is_twice:
            hint += f"; or say which files are meant: {_EXAMPLE}"
        fact = "is not complete" if is_partial else "is corrupted"
        raise CorruptedError(f"{folder} {fact}: {'; '.join(wrong)}.", hint=hint)
    return _together(str(folder), opened, owner)


def open_files(paths: Sequence[str | os.PathLike[str]]) -> Source:
    """Opens several safetensors files.

    Raises:
      CorruptedError: a file is not what was written, or an array is in two of them: all of it is listed.
      RestoreError: there is no such file at some of the paths: all are listed.
    """
    found = [place_of(path, _EXAMPLE) for path in paths]
    for place in found:
        check_local(place)
    places = {str(place): FilePath(os.fspath(place)) for place in found}
    absent = [name for name, place in places.items() if not place.is_file()]
    if absent:
        raise RestoreError(f"There is no file at {', '.join(absent)}.", hint=f"{_EXAMPLE}; or one folder")
    opened, errors = _opened(places)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = "; ".join(error.message.rstrip(".") for error in errors)
        raise CorruptedError(f"{len(errors)} files are not what was written: {listed}.", hint="fetch them again")
    wrong: list[str] = []
    owner: dict[str, str] = {}
    for file, source in opened.items():
        twice = [entry.name for entry in source.entries if owner.setdefault(entry.name, file) != file]
        wrong += [f"{name} is in {owner[name]} and in {file}" for name in twice]
    if wrong:
        raise CorruptedError(f"The files do not belong together: {'; '.join(wrong)}.", hint="fetch them again")
    return _together(", ".join(places), opened, owner)


def _opened(places: Mapping[str, FilePath]) -> tuple[dict[str, Source], list[CorruptedError | RestoreError]]:
    """Opens files; returns the sources of those that are good, and the errors of the others."""
    opened: dict[str, Source] = {}
    errors: list[CorruptedError | RestoreError] = []
    for name, place in places.items():
        try:
            opened[name] = open_file(place)
        except (CorruptedError, RestoreError) as error:
            errors.append(error)
    return opened, errors


def _together(name: str, sources: Mapping[str, Source], owner: Mapping[str, str]) -> Source:
    """Returns sources as one; of each array it is known which of them has it."""

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        return {name: sources[owner[name]].read((name,))[name] for name in names}

    def read_part(name: str, index: Sequence[slice], into: np.ndarray) -> None:
        sources[owner[name]].fill(name, index, into)

    entries = tuple(entry for source in sources.values() for entry in source.entries)
    return Source(name, "safetensors", entries, read, read_part=read_part)


def _is_inside(folder: FilePath, file: FilePath) -> bool:
    """Returns whether a file is in a folder, if links are followed.

    The cache of Hugging Face's libraries has links from `snapshots/REVISION` into `blobs`, beside `snapshots`; these
    are as good (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
    """
    real, target = FilePath(os.path.realpath(folder)), FilePath(os.path.realpath(file))
    inside = [real]
    if real.parent.name == "snapshots":
        inside.append(real.parent.parent / "blobs")
    return any(target.is_relative_to(each) for each in inside)


def _read_index(folder: FilePath) -> dict[str, str]:
    """Returns in which file each array is; empty if there is no index.

    Raises:
      CorruptedError: it is not an index, or names something that is not a file of this folder.
    """
    if (folder / INDEX).is_symlink() and not _is_inside(folder, folder / INDEX):
        raise _not_an_index(folder, "it is a link to a file outside of the folder")
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _not_an_index(folder, first_line(error)) from error
    try:
        found = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_an_index(folder, "it has no weight_map") from error
    if not isinstance(found, Mapping) or not found or not all(isinstance(file, str) for file in found.values()):
        raise _not_an_index(folder, "its weight_map does not give a file for each name")
    is_outside = lambda file: file != os.path.basename(file) or file in ("", ".", "..") or {*file} & {"\\", "\0"}  # noqa: E731
    outside = sorted(filter(is_outside, {*found.values()}))
    if outside:
        raise _not_an_index(folder, f"it names {', '.join(map(repr, outside))}, which is not a file of the folder")
    return dict(found)


def _not_an_index(folder: FilePath, why: str) -> CorruptedError:
    return CorruptedError(f"{folder / INDEX} is not an index: {why}.", hint="fetch the folder again")
