"""Writing a folder of safetensors files as models are published: one file, or several with an index.

The names of the files and the index are those that Hugging Face's libraries read
(https://huggingface.co/docs/transformers/big_models): `model.safetensors`, or `model-00001-of-00003.safetensors` and
`model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.interop.export import committed
from statewise._src.checkpoint.interop.safetensors import write_file
from statewise._src.checkpoint.interop.several_files import INDEX
from statewise._src.checkpoint.interop.sources import Source
from statewise._src.common.numbers import whole_number
from statewise.errors import SaveError

__all__ = ["check_options", "export_folder"]

_METADATA = {"format": "pt"}
SHARD_BYTES = 5 * 2**30  # as other libraries write them


def check_options(max_shard_bytes: Any, extra_files: Any) -> tuple[int, list[FilePath]]:
    """Returns the largest number of bytes of a file, and the other files, checked.

    Raises:
      SaveError: it is not a number of bytes; a file does not exist, or has the name of one that is written.
    """
    if max_shard_bytes is None:
        max_shard_bytes = SHARD_BYTES
    most = whole_number(max_shard_bytes, 1)
    if most is None:
        raise SaveError(
            f"max_shard_bytes={max_shard_bytes!r} is not a number of bytes.", hint="max_shard_bytes=5 * 2**30"
        )
    if isinstance(extra_files, (str, bytes, os.PathLike)):
        raise SaveError("extra_files is one path, and not several.", hint=f"extra_files=[{extra_files!r}]")
    try:
        paths = [FilePath(path) for path in extra_files]
    except TypeError as error:
        raise SaveError("extra_files is not a list of paths.", hint="extra_files=['folder/config.json']") from error
    # Without regard to case, because some file systems have none.
    lowered = [path.name.lower() for path in paths]
    for path, name in zip(paths, lowered, strict=True):
        if not path.is_file():
            raise SaveError(f"There is no file at {path}.", hint="extra_files=['folder/config.json']")
        if name.endswith(".safetensors") or name == INDEX:
            raise SaveError(f"{path} has the name of a file of arrays.", hint="leave it out of extra_files")
        if name == NAME:
            raise SaveError(f"{path} has the name of a checkpoint's manifest.", hint="leave it out of extra_files")
    if len({*lowered}) < len(paths):
        raise SaveError("Two of extra_files have the same name.", hint="files with different names")
    return most, paths


def export_folder(
    source: Source,
    final: FilePath,
    max_shard_bytes: int | None,
    extra_files: Sequence[FilePath],
    single: str = "model.safetensors",
) -> None:
    """Writes a source's arrays, under their names; what has the final name is complete.

    Args:
      source: the arrays; those of one file are read at a time.
      final: the folder, which does not exist; or one file, if it ends in `.safetensors`.
      max_shard_bytes: the most bytes of arrays in one file; a larger array has a file of its own.  None: one file.
      extra_files: files that are copied into the folder as they are.
      single: what the file is called if there is one.

    Raises:
      SaveError: it could not be written; the error says whether anything of it is left.
    """
    sizes = {entry.name: entry.leaf().nbytes for entry in source.entries}
    total = sum(sizes.values())
    is_file = final.name.endswith(".safetensors")
    shards = [list(sizes)] if is_file or max_shard_bytes is None else _shards(sizes, max_shard_bytes)
    files = [single]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with committed(final, total) as place:
        if is_file:
            write_file(place, source.read(shards[0]), _METADATA)
            return
        place.mkdir()
        for file, shard in zip(files, shards, strict=True):
            write_file(place / file, source.read(shard), _METADATA)
        if len(shards) > 1:
            owner = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": owner}
            (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in extra_files:
            shutil.copyfile(path, place / path.name)


def _shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Returns the names in each file, in order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
