"""Reading leaves from a checkpoint: as they were saved, or an error that names those that are not.

Files are checked before anything is read, and every array is compared with its checksum when it arrives, before it goes
to its devices.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.checkpoint.format.checksums import Sums, sums_of_runs
from statewise._src.checkpoint.format.integrity import corrupted, corrupted_files, is_whole, stored_array
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.orbax.parts import processes_of
from statewise._src.checkpoint.orbax.read import Key, Stored, read_stored
from statewise._src.checkpoint.orbax.store_errors import reads, said, unreadable
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.together import RESTART
from statewise._src.common import compat
from statewise.errors import CorruptedError, RestoreError

__all__ = ["Wanted", "read_arrays", "read_leaves"]

# The number of bytes that may wait on the host, to go to the devices in one call.
_HELD = 1 << 26

# A record, and for each of its arrays the sharding to read it with; None for NumPy.
Wanted = tuple[LeafRecord, Sequence[Any]]


class _Place(NamedTuple):
    """Where an array goes: it becomes the `array`-th of the `leaf`-th wanted leaf."""

    leaf: int
    array: int
    record: ArrayRecord
    sharding: Any


def read_leaves(
    folders: Sequence[Any],
    manifests: Sequence[Manifest],
    wanted: Sequence[tuple[int, Wanted]],
    checked: bool = False,
) -> list[list[Any]]:
    """Reads leaves, each from the checkpoint (0) or from its base (1).

    Args:
      folders: the directories of the two, or of the one.
      manifests: their manifests.
      wanted: for each leaf, the number of the checkpoint to read it from, its record, and the shardings of its arrays.
      checked: whether the files were checked by an earlier call.

    Returns:
      for each leaf its arrays, of the shape and dtype that were saved.

    Raises:
      CorruptedError: with every file and every leaf that is corrupted.
      RestoreError: a leaf goes to devices of one other process alone; or another process does not take part.
    """
    arrays: dict[int, list[Any]] = {}
    for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
        own = [index for index, (checkpoint, _) in enumerate(wanted) if checkpoint == number]
        read = read_arrays(folder, manifest, [wanted[index][1] for index in own], files_checked=checked)
        arrays |= zip(own, read, strict=True)
    return [arrays[index] for index in range(len(wanted))]


def read_arrays(
    folder: Any, manifest: Manifest, wanted: Sequence[Wanted], *, files_checked: bool = False
) -> list[list[Any]]:
    """Reads leaves, and checks what was read.

    Args:
      folder: the checkpoint's directory.
      manifest: its manifest.
      wanted: records of the manifest, and for each of its arrays the sharding to read it with; None for NumPy.
      files_checked: whether the files were checked by an earlier call.

    Returns:
      for each record its arrays, of the shape and dtype that were saved.

    Raises:
      CorruptedError: with every file and every leaf that is corrupted.
      RestoreError: a leaf goes to devices of one other process alone; or another process does not take part.
    """
    records = [record for record, _ in wanted]
    _check_here(folder, wanted)
    with reads(folder):
        files = [] if files_checked else corrupted_files(folder, manifest)
    if files:
        raise corrupted(folder, manifest, files, records)
    places, trees = _places(manifest, wanted)
    read: list[list[Any]] = [[None] * len(record.arrays) for record in records]
    broken: set[int] = set()
    waiting: list[tuple[_Place, Any]] = []

    def deliver() -> None:
        for place, array in zip([place for place, _ in waiting], _delivered(waiting), strict=True):
            read[place.leaf][place.array] = array
        waiting.clear()

    held = 0
    for key, array, sums in _arriving(folder, manifest, records, trees):
        held += getattr(array, "nbytes", 0)
        for place, stored, whole in _checked(places[key], key, array, sums, manifest):
            if whole:
                waiting.append((place, stored))
            else:
                broken.add(place.leaf)
        # Few calls with many arrays are fast; but not all arrays at once, which would hold them on the host twice.
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
    return read


def _check_here(folder: Any, wanted: Sequence[Wanted]) -> None:
    """Raises if something goes to devices of one other process alone, which then reads it alone."""
    elsewhere = [
        record.leaf(f"goes to process {min(processes_of(sharding))} alone")
        for record, shardings in wanted
        for sharding in shardings
        if sharding is not None and _is_of_another(processes_of(sharding))
    ]
    if elsewhere:
        raise RestoreError(
            f"{folder} cannot be restored in process {jax.process_index()}: the target is on devices of another one.",
            leaves=elsewhere,
            hint="a mesh with devices of every process; or call it in the process of the target alone",
        )


def _is_of_another(processes: frozenset[int]) -> bool:
    return len(processes) == 1 and jax.process_index() not in processes


def _arriving(
    folder: Any, manifest: Manifest, records: Sequence[LeafRecord], trees: Mapping[Key, Stored]
) -> Iterator[tuple[Key, Any, Sums | None]]:
    """Yields the arrays by their keys, with their sums if these are known.

    Under the key () there is one for arrays without elements, which are not stored.
    """
    yield (), np.zeros(0), None
    try:
        sizes = {name: facts["bytes"] for name, facts in manifest.files.items()}
        yield from read_stored(folder, trees, manifest.index, sizes)
    except compat.OtherProcessError as error:
        raise RestoreError(
            f"{folder} could not be read: {error}.",
            hint=RESTART,
        ) from error
    except Exception as error:  # TensorStore raises any exception for what it cannot read
        if isinstance(folder, StorePath) and said(error).is_refusal:
            raise unreadable(folder, said(error)) from error
        raise corrupted(folder, manifest, [], records, error) from error


def _places(manifest: Manifest, wanted: Sequence[Wanted]) -> tuple[Mapping[Key, list[_Place]], dict[Key, Stored]]:
    """Returns by key where each part of a stored array goes, and how to read the array."""
    places: dict[Key, list[_Place]] = collections.defaultdict(list)
    trees: dict[Key, Stored] = {}
    for leaf, (record, shardings) in enumerate(wanted):
        for number, (array, sharding) in enumerate(zip(record.arrays, shardings, strict=True)):
            key: Key = ()
            if (stored := manifest.stored(array)) is not None:
                key, shape, dtype = stored
                # Only what is the array itself can go to devices as it is read.  JAX does not take dtypes other than
                # its own, and 64-bit ones only where they are enabled.
                is_bytes = array.stored is not None and array.prng is None
                is_own = jax.dtypes.canonicalize_dtype(dtype_of(dtype)) == dtype_of(dtype)
                on_host = array.buffer is not None or is_bytes or not is_own
                trees[key] = Stored(shape, dtype, None if on_host else sharding)
            places[key].append(_Place(leaf, number, array, sharding))
    return places, trees


def _checked(
    places: Sequence[_Place], key: Key, array: Any, known: Sums | None, manifest: Manifest
) -> Iterator[tuple[_Place, Any, bool]]:
    """Yields for each place its array, from the one with this key, and whether it is what was saved."""
    if not places or places[0].record.buffer is None:
        for place in places:
            stored = stored_array(place.record, manifest, {key: array})
            yield place, stored, is_whole(stored, place.record, known)
        return
    flat = array.reshape(-1)
    same = flat.dtype == dtype_of(places[0].record.on_disk[1])
    runs = [((place.record.buffer or (0, 0))[1], math.prod(place.record.on_disk[0])) for place in places]
    for place, (start, size), sums in zip(places, runs, sums_of_runs(flat, runs), strict=True):
        # A copy, because a view would keep the buffer in memory.
        stored = flat[start : start + size].reshape(place.record.on_disk[0]).copy()
        yield place, stored, same and sums == place.record.sums


def _delivered(waiting: Sequence[tuple[_Place, Any]]) -> list[Any]:
    """Returns arrays as they were saved and sharded as wanted; all that go to devices go there in one call."""
    arrays = [_viewed(stored, place.record) for place, stored in waiting]
    away = [
        index
        for index, (place, _) in enumerate(waiting)
        if not isinstance(arrays[index], jax.Array)
        and (place.sharding is not None or place.record.prng is not None)
        and jax.dtypes.canonicalize_dtype(arrays[index].dtype) == arrays[index].dtype  # JAX would make it narrower
    ]
    if away:
        shardings = [waiting[index][0].sharding for index in away]
        alike = all(sharding is shardings[0] or sharding == shardings[0] for sharding in shardings)
        # One sharding for all is cheaper than the same one for each.
        put = jax.device_put([arrays[index] for index in away], shardings[0] if alike else shardings)
        for index, array in zip(away, put, strict=True):
            arrays[index] = array
    for index, (place, _) in enumerate(waiting):
        if place.record.prng is not None:
            arrays[index] = jax.random.wrap_key_data(arrays[index], impl=place.record.prng)
    return arrays


def _viewed(stored: Any, record: ArrayRecord) -> Any:
    """Returns an array in its own dtype, if it is stored as bytes."""
    if record.stored is None or record.prng is not None:
        return stored
    return np.asarray(stored).view(dtype_of(record.dtype))
