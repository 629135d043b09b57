"""Any checkpoint on disk as a `Source`: one of Statewise by its manifest, all others by `foreign`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from statewise._src.checkpoint.format.load import read_arrays
from statewise._src.checkpoint.format.locate import find_with_base
from statewise._src.checkpoint.format.manifest import NAME, ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.interop.foreign import items_with, open_path
from statewise._src.checkpoint.interop.sources import Source, SourceArray
from statewise._src.checkpoint.orbax.paths import place_of
from statewise._src.common.paths import format_path
from statewise._src.filters.explain import as_code
from statewise._src.plan.ema import EMA
from statewise.errors import RestoreError

__all__ = ["open_any"]


def open_any(path: Any) -> Source:
    """Opens whatever stands at a path.

    Raises:
      RestoreError: there is nothing, or nothing that is known here.
      CorruptedError: it is not what was written.
    """
    try:
        os.fspath(path)
    except TypeError:
        raise RestoreError(
            f"{type(path).__name__} is neither a path nor a mapping.",
            hint="sw.convert('run/checkpoint', dst), or nested dicts of arrays; of a state: sw.save(path, state) first",
        ) from None
    folder = place_of(path, "sw.convert('run/checkpoint', dst)")
    items = items_with(folder, NAME) if folder.is_dir() else []
    if not items:
        return open_path(path)
    if len(items) > 1:
        raise RestoreError(
            f"{folder} holds several items: {', '.join(item.name for item in items)}.",
            hint=f"the path of one of them: {str(items[0])!r}",
        )
    return _open_statewise(items[0])


def _open_statewise(folder: Any) -> Source:
    """A checkpoint of Statewise, with the leaves that its base holds for it."""
    folders, manifests = find_with_base(folder)
    held = {leaf.id: (place, manifest, leaf) for place, manifest, leaf in _lent(folders, manifests)}
    held |= {leaf.id: (folders[0], manifests[0], leaf) for leaf in manifests[0].leaves}
    entries, leaf_of = [], {}
    for identity, (_, _, leaf) in held.items():
        for one in leaf.arrays:
            averages = leaf.kind in manifests[0].kinds and manifests[0].kinds[leaf.kind].of == as_code(EMA)
            entry = dataclasses.replace(_entry(leaf, one), average=averages)
            entries.append(entry)
            leaf_of[entry.name] = identity

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        wanted = {leaf_of[name] for name in names}
        for place, manifest in zip(folders, manifests, strict=True):
            leaves = [leaf for identity, (at, _, leaf) in held.items() if at == place and identity in wanted]
            asked = [(leaf, [None] * len(leaf.arrays)) for leaf in leaves]
            for leaf, values in zip(leaves, read_arrays(place, manifest, asked), strict=True):
                for one, value in zip(leaf.arrays, values, strict=True):
                    words = value if one.prng is None else jax.random.key_data(value)
                    arrays[_entry(leaf, one).name] = np.asarray(words)
        return {name: arrays[name] for name in names}

    return Source(str(folder), "statewise", tuple(entries), read)


def _entry(leaf: LeafRecord, one: ArrayRecord) -> SourceArray:
    path = leaf.path + one.within
    shape, dtype = one.on_disk if one.prng is not None else (one.shape, one.dtype)
    return SourceArray(format_path(path), path, shape, dtype, leaf.kind, leaf.type, one.prng, leaf.aliases)


def _lent(folders: Sequence[Any], manifests: Sequence[Manifest]) -> Iterator[tuple[Any, Manifest, LeafRecord]]:
    """The leaves that a checkpoint's base holds for it: those of the kinds that it did not save itself."""
    own, *bases = manifests
    for folder, base in zip(folders[1:], bases, strict=True):
        for leaf in base.leaves:
            if leaf.kind not in own.kinds or not own.kinds[leaf.kind].saved:
                yield folder, base, leaf
