"""Any checkpoint on disk as a `Source`: one of Statewise by its manifest, all others by `foreign`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from statewise._src.checkpoint.format.keys import PathId, words_of
from statewise._src.checkpoint.format.load import read_leaves
from statewise._src.checkpoint.format.locate import find_with_base, leaves_with_base
from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.interop.foreign import only_item, open_path
from statewise._src.checkpoint.interop.several_files import is_several
from statewise._src.checkpoint.interop.sources import Source, SourceArray
from statewise._src.checkpoint.orbax.paths import place_of
from statewise._src.checkpoint.orbax.store_errors import reads
from statewise._src.common.paths import format_path
from statewise._src.filters.explain import as_code
from statewise._src.plan.ema import EMA
from statewise.errors import RestoreError

__all__ = ["open_any"]


def open_any(path: object) -> Source:
    """Opens a checkpoint of any known format.

    Raises:
      RestoreError: there is nothing, or nothing in a known format.
      CorruptedError: it is not what was written.
    """
    if is_several(path):
        return open_path(path)
    if isinstance(path, Mapping):
        hint = "sw.convert(arrays, 'run/converted', target=target, names=names)"
        raise RestoreError("A mapping of arrays is not the path of files.", hint=hint)
    if not isinstance(path, (str, bytes, os.PathLike)):
        hint = "sw.convert('run/checkpoint', dst), or nested dicts of arrays; a state: sw.save(path, state), or names="
        raise RestoreError(f"{type(path).__name__} is neither a path nor a mapping.", hint=hint)
    folder = place_of(path, "sw.convert('run/checkpoint', dst)")
    with reads(folder):
        item = only_item(folder, NAME) if folder.is_dir() else None
    return open_path(path) if item is None else _open_statewise(item)


def _open_statewise(folder: Any) -> Source:
    """Opens a checkpoint of Statewise, including the leaves that its base has for it."""
    folders, manifests = find_with_base(folder)
    leaves = leaves_with_base(manifests)
    averages = {name for name, kind in manifests[0].kinds.items() if kind.of == as_code(EMA)}
    entries: list[SourceArray] = []
    leaf_of: dict[str, PathId] = {}
    for identity, (_, leaf) in leaves.items():
        for array in leaf.arrays:
            path, (shape, dtype), is_average = leaf.path + array.within, array.numeric, leaf.kind in averages
            facts = leaf.kind, leaf.type, array.prng, leaf.aliases, is_average
            entries.append(SourceArray(format_path(path), path, shape, dtype, *facts))
            # Paths that only look alike share a name; a conversion reports them before it reads.
            leaf_of[entries[-1].name] = identity

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        wanted = [leaves[identity] for identity in dict.fromkeys(leaf_of[name] for name in names)]
        values = read_leaves(
            folders, manifests, [(number, (leaf, [None] * len(leaf.arrays))) for number, leaf in wanted]
        )
        arrays = {
            format_path(leaf.path + record.within): words_of(array)
            for (_, leaf), read in zip(wanted, values, strict=True)
            for record, array in zip(leaf.arrays, read, strict=True)
        }
        return {name: arrays[name] for name in names}

    return Source(str(folder), "statewise", tuple(entries), read)
