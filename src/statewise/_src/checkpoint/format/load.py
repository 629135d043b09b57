"""Leaves out of a checkpoint: as they were saved, or an error that names those which are not.

Files are looked at before anything is read, and every array is compared with its checksum when it has arrived, before
it goes to where it is wanted.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.checkpoint.format.checksums import sums_of_runs
from statewise._src.checkpoint.format.integrity import corrupted, corrupted_files, is_whole, stored_array
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.orbax.read import Key, Stored, read_stored
from statewise.errors import CorruptedError

__all__ = ["read_arrays"]

# Bytes that may wait on the host, to go to the devices in one call.
_HELD = 1 << 26

# One record and, for each of its arrays, the sharding that it is to have; None for NumPy.
Wanted = tuple[LeafRecord, Sequence[Any]]


class _Place(NamedTuple):
    """Where an array goes: to the `array`-th of the `leaf`-th leaf that is wanted."""

    leaf: int
    array: int
    record: ArrayRecord
    sharding: Any


def read_arrays(
    folder: Any, manifest: Manifest, wanted: Sequence[Wanted], *, files_checked: bool = False
) -> list[list[Any]]:
    """Reads leaves, and checks what was read.

    Args:
      folder: the checkpoint's directory.
      manifest: its manifest.
      wanted: records of the manifest, and for each of its arrays the sharding that it is to have; None for NumPy.
      files_checked: the files were looked at already, in an earlier call.

    Returns:
      for each record its arrays, of the shape and dtype that were saved.

    Raises:
      CorruptedError: with every file and every leaf that is corrupted.
    """
    records = [record for record, _ in wanted]
    files = [] if files_checked else corrupted_files(folder, manifest)
    if files:
        raise corrupted(folder, manifest, files, records)
    places, trees = _places(manifest, wanted)
    made: list[list[Any]] = [[None] * len(record.arrays) for record in records]
    broken: set[int] = set()
    waiting: list[tuple[_Place, Any]] = []

    def deliver() -> None:
        for place, array in zip([place for place, _ in waiting], _delivered(waiting), strict=True):
            made[place.leaf][place.array] = array
        waiting.clear()

    held = 0
    for key, array in _arriving(folder, manifest, records, trees):
        held += getattr(array, "nbytes", 0)
        for place, stored, whole in _checked(places[key], key, array, manifest):
            if whole:
                waiting.append((place, stored))
            else:
                broken.add(place.leaf)
        if held > _HELD:
            deliver()
            held = 0
    deliver()
    if broken:
        raise CorruptedError(
            f"{folder} is corrupted: arrays are not what was saved.",
            leaves=[records[leaf].leaf("is not what was saved") for leaf in sorted(broken)],
            hint="restore another checkpoint",
        )
    return made


def _arriving(
    folder: Any, manifest: Manifest, records: Sequence[LeafRecord], trees: Mapping[Key, Stored]
) -> Iterator[tuple[Key, Any]]:
    """The arrays by their keys; what is stored nowhere, having no elements, under none."""
    yield (), np.zeros(0)
    try:
        yield from read_stored(folder, trees)
    except Exception as error:  # Orbax and TensorStore raise what they like for what they cannot read
        raise corrupted(folder, manifest, [], records, error) from error


def _places(manifest: Manifest, wanted: Sequence[Wanted]) -> tuple[Mapping[Key, list[_Place]], dict[Key, Stored]]:
    """By key: where what is stored there goes, and what it is."""
    places: dict[Key, list[_Place]] = collections.defaultdict(list)
    trees: dict[Key, Stored] = {}
    for leaf, (record, shardings) in enumerate(wanted):
        for number, (one, sharding) in enumerate(zip(record.arrays, shardings, strict=True)):
            key: Key = ()
            if one.buffer is not None:
                buffer = manifest.buffers[one.buffer[0]]
                key = buffer.key
                trees[key] = Stored((buffer.elements,), buffer.dtype)
            elif one.key is not None:
                shape, dtype = one.on_disk
                # JAX would not take other dtypes than its own, and none of 64 bits unless it is told to.
                own = jax.dtypes.canonicalize_dtype(dtype_of(dtype)) == dtype_of(dtype)
                on_host = not own or (one.stored is not None and one.prng is None)
                key = one.key
                trees[key] = Stored(shape, dtype, None if on_host else sharding)
            places[key].append(_Place(leaf, number, one, sharding))
    return places, trees


def _checked(places: Sequence[_Place], key: Key, array: Any, manifest: Manifest) -> Iterator[tuple[_Place, Any, bool]]:
    """What goes to each of these places, out of the array at this key, and whether it is what was saved."""
    if not places or places[0].record.buffer is None:
        for place in places:
            stored = stored_array(place.record, manifest, {key: array})
            yield place, stored, is_whole(stored, place.record)
        return
    flat = array.reshape(-1)
    same = flat.dtype == dtype_of(places[0].record.on_disk[1])
    runs = [((place.record.buffer or (0, 0))[1], math.prod(place.record.on_disk[0])) for place in places]
    for place, (start, size), sums in zip(places, runs, sums_of_runs(flat, runs), strict=True):
        # A copy: the buffer is not to stay for as long as one of them does.
        stored = flat[start : start + size].reshape(place.record.on_disk[0]).copy()
        yield place, stored, same and sums == place.record.sums


def _delivered(waiting: Sequence[tuple[_Place, Any]]) -> list[Any]:
    """Arrays as they were saved, where they are wanted: all that go to devices go there in one call."""
    arrays = [_viewed(stored, place.record) for place, stored in waiting]
    away = [
        at
        for at, (place, _) in enumerate(waiting)
        if not isinstance(arrays[at], jax.Array)
        and (place.sharding is not None or place.record.prng is not None)
        and jax.dtypes.canonicalize_dtype(arrays[at].dtype) == arrays[at].dtype  # JAX would make it narrower
    ]
    if away:
        shardings = [waiting[at][0].sharding for at in away]
        alike = all(sharding is shardings[0] or sharding == shardings[0] for sharding in shardings)
        # One sharding for all is cheaper than the same one for each.
        put = jax.device_put([arrays[at] for at in away], shardings[0] if alike else shardings)
        for at, array in zip(away, put, strict=True):
            arrays[at] = array
    for at, (place, _) in enumerate(waiting):
        if place.record.prng is not None:
            arrays[at] = jax.random.wrap_key_data(arrays[at], impl=place.record.prng)
    return arrays


def _viewed(stored: Any, one: ArrayRecord) -> Any:
    """Bytes as what they are bytes of."""
    return stored if one.stored is None or one.prng is not None else np.asarray(stored).view(dtype_of(one.dtype))
