"""`sw.restore`, `sw.preview` and `sw.inspect`: a checkpoint back into a state, or only looked at.

In this order: read the manifest; compare it with the target, and refuse with everything that is wrong; look at the
files; read the arrays; check their sums.  Only then is a state made; the target is never changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise import _compat
from statewise.census import Census
from statewise.checkpoint.checksums import sums_of
from statewise.checkpoint.handler import read_tree, sha256_of
from statewise.checkpoint.keys import dtype_of
from statewise.checkpoint.manifest import NAME, ArrayRecord, LeafRecord, Manifest
from statewise.checkpoint.matching import Match, Source, match
from statewise.checkpoint.parsing import read_manifest
from statewise.checkpoint.records import unpacked
from statewise.checkpoint.report import RestoreReport
from statewise.errors import DamagedError, RestoreError, StructureError
from statewise.paths import Leaf
from statewise.state import State
from statewise.tables import count_leaves

__all__ = ["inspect", "preview", "read_arrays", "restore"]


def restore(
    path: Any,
    target: State | Any,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: Any = None,
) -> tuple[State, RestoreReport]:
    """Reads a checkpoint into a new state, exactly, or says why not.

    Args:
      path: what `sw.save` wrote, or a step's item that an Orbax manager wrote of `sw.checkpointable`.
      target: a state, or an abstract one (`plan.abstract()`): it says which leaves there are to be, of which shape and
        dtype, and on which devices.  It stays as it is; leaves that are not restored keep its values.
      only: the kinds to restore, `("params",)` say; by default all that are `saved`.
      cast: allows other dtypes, floating-point to floating-point and integer to integer; the report lists them.
      base: where the checkpoint's base is, if it was moved since.

    Returns:
      the state, of the target's plan, and what happened to each leaf.

    Raises:
      RestoreError: target and checkpoint disagree: leaves missing, left over, of another kind, type, shape, dtype or
        structure, tied otherwise, keys of another PRNG implementation.  All are listed; nothing was read then.
      DamagedError: files or arrays that are not what was written; each is named.
      KindError: `only` names a kind that is not there, or one that is never saved.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", plan.take(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
      >>> state, report = sw.restore(f"{folder}/first", plan.abstract())
      >>> print(report.table().title.split()[0], report.ok, state["params"]["kernel"].shape)
      restore True (2, 3)
    """
    folders, manifests, found = _matched(path, target, only, cast, base)
    found.report.raise_problems()
    arrays = _read(folders, manifests, found, target)
    fresh = _fresh(found, target)
    return _state(found, target, arrays, fresh), found.report


def preview(
    path: Any,
    target: State | Any,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: Any = None,
) -> RestoreReport:
    """What `sw.restore` would do with the same arguments; reads no array, and raises for no disagreement.

    Returns:
      the report; `report.ok` tells whether the restore would go through, `report.problems` what is in its way.

    Raises:
      DamagedError: a manifest that is not what was written.
      KindError: `only` names a kind that is not there, or one that is never saved.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", sw.plan(model).take(model))
      >>> wider = nnx.eval_shape(lambda: nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
      >>> [str(leaf) for leaf in sw.preview(f"{folder}/first", sw.plan(wider).abstract()).problems][1]
      'kernel: Param(2, 4) float32  kind=params  (is (2, 3) in the checkpoint)'
    """
    return _matched(path, target, only, cast, base)[2].report


def inspect(path: Any) -> Census:
    """The census of a checkpoint, from its manifest: no array is read.

    Raises:
      DamagedError: no checkpoint of Statewise, or one whose manifest is damaged.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", sw.plan(model).take(model))
      >>> sw.inspect(f"{folder}/first")["params"].elements
      9
    """
    manifest = read_manifest(_folder(path))
    treatments = {
        name: kind.treatment if kind.saved or "not saved" in kind.treatment else "not in this checkpoint"
        for name, kind in manifest.kinds.items()
    }
    return Census(count_leaves([leaf.leaf() for leaf in manifest.leaves], treatments))


# --- comparing ---------------------------------------------------------------------------------------------------


def _folder(path: Any) -> Any:
    folder = _compat.epath(path)
    if not folder.exists():
        raise RestoreError(
            f"There is nothing at {folder}.",
            mend="sw.save(path, state) writes a checkpoint; look for it beside this path",
        )
    if not (folder / NAME).exists():
        items = [entry.name for entry in folder.iterdir() if (entry / NAME).exists()] if folder.is_dir() else []
        raise DamagedError(
            f"{folder} is no checkpoint of Statewise: it has no {NAME}.",
            mend=f"one of its items is: {str(folder / items[0])!r}"
            if items
            else f"sw.convert({str(folder)!r}, ...) reads a plain Orbax checkpoint",
        )
    return folder


def _matched(
    path: Any, target: State | Any, only: str | Sequence[str] | None, cast: bool, base: Any
) -> tuple[list[Any], list[Manifest], Match]:
    if not isinstance(target, State):
        raise StructureError(
            f"The target of a restore is a state, not {type(target).__name__}.",
            mend="sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)",
        )
    folders = [_folder(path)]
    manifests = [read_manifest(folders[0])]
    if manifests[0].base is not None:
        folders.append(_base_of(folders[0], manifests[0].base, base))
        manifests.append(_checked_base(folders[1], manifests[0].base))
    return folders, manifests, match(path, manifests, target, only, cast)


def _base_of(folder: Any, recorded: Mapping[str, str], given: Any) -> Any:
    place = (
        FilePath(os.fspath(given)) if given is not None else FilePath(str(folder)).absolute().parent / recorded["path"]
    )
    if not (place / NAME).exists():
        raise RestoreError(
            f"{folder} was saved over another checkpoint, which is not at {place}.",
            mend="say where it is now: sw.restore(path, target, base=...)",
        )
    return _compat.epath(place)


def _checked_base(place: Any, recorded: Mapping[str, str]) -> Manifest:
    manifest = read_manifest(place)
    if manifest.digest != recorded["digest"]:
        raise RestoreError(
            f"{place} is another checkpoint than the one that this was saved over.",
            mend="say where that one is: sw.restore(path, target, base=...)",
        )
    return manifest


# --- reading -----------------------------------------------------------------------------------------------------


def _read(folders: Sequence[Any], manifests: Sequence[Manifest], found: Match, target: State) -> list[list[Any]]:
    """The arrays of each source, as they were saved, where the target's are to be."""
    read: dict[int, Any] = {}
    for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
        mine = [(at, source) for at, source in enumerate(found.sources) if source.checkpoint == number]
        wanted = [(source.record, _shardings(source, target)) for _, source in mine]
        for (at, _), arrays in zip(mine, read_arrays(folder, manifest, wanted), strict=True):
            read[at] = arrays
    return [read[at] for at in range(len(found.sources))]


def _shardings(source: Source, target: State) -> list[Any]:
    """Where each array of a leaf goes: to where the target's is."""
    parts = unpacked(target, source.placed.record.kind) if not target.plan._packing else None
    made = []
    for offset in range(len(source.record.arrays)):
        array = parts[source.placed.start + offset] if parts is not None else None
        made.append(getattr(array, "sharding", None) or _default_sharding())
    return made


def _default_sharding() -> Any:
    return jnp.zeros(()).sharding


def read_arrays(folder: Any, manifest: Manifest, wanted: Sequence[tuple[LeafRecord, Sequence[Any]]]) -> list[list[Any]]:
    """Reads leaves, and checks what was read.

    Args:
      folder: the checkpoint's directory.
      manifest: its manifest.
      wanted: records of the manifest, and for each of its arrays the sharding that it is to have; None for NumPy.

    Returns:
      for each record its arrays, of the shape and dtype that were saved.

    Raises:
      DamagedError: with every file and every leaf that is damaged.
    """
    files = damaged_files(folder, manifest)
    if files:
        raise _damaged(folder, manifest, files, [record for record, _ in wanted])
    trees = _wanted_trees(manifest, wanted)
    try:
        read = read_tree(folder, trees)
    except Exception as error:  # Orbax and TensorStore raise what they like for what they cannot read
        raise _damaged(folder, manifest, [], [record for record, _ in wanted], error) from error
    made, broken = [], []
    for record, shardings in wanted:
        arrays = [_array(one, manifest, read) for one in record.arrays]
        if any(sums_of(array) != one.sums for array, one in zip(arrays, record.arrays, strict=True)):
            broken.append(record.leaf("is not what was saved"))
        made.append([_as_saved(*one) for one in zip(arrays, record.arrays, shardings, strict=True)])
    if broken:
        raise DamagedError(
            f"{folder} is damaged: arrays are not what was saved.", leaves=broken, mend="restore another checkpoint"
        )
    return made


def _wanted_trees(manifest: Manifest, wanted: Iterable[tuple[LeafRecord, Sequence[Any]]]) -> dict[tuple[str, ...], Any]:
    trees: dict[tuple[str, ...], Any] = {}
    for record, shardings in wanted:
        for one, sharding in zip(record.arrays, shardings, strict=True):
            shape, dtype = one.on_disk
            if one.buffer is not None:
                buffer = manifest.buffers[one.buffer[0]]
                trees[buffer.key] = jax.ShapeDtypeStruct((buffer.elements,), dtype_of(buffer.dtype))
            elif one.key is not None:
                on_host = one.stored is not None and one.prng is None
                trees[one.key] = jax.ShapeDtypeStruct(shape, dtype_of(dtype), sharding=None if on_host else sharding)
    return trees


def _array(one: ArrayRecord, manifest: Manifest, read: Mapping[tuple[str, ...], Any]) -> Any:
    """An array as it is stored."""
    shape, dtype = one.on_disk
    if one.key is not None:
        return read[one.key]
    if one.buffer is None:
        return np.zeros(shape, dtype_of(dtype))
    number, start = one.buffer
    flat = read[manifest.buffers[number].key]
    return np.array(flat[start : start + int(np.prod(shape, dtype=np.int64))]).reshape(shape)


def _as_saved(array: Any, one: ArrayRecord, sharding: Any) -> Any:
    if one.prng is not None:
        data = array if isinstance(array, jax.Array) else jax.device_put(array, sharding)
        return jax.random.wrap_key_data(data, impl=one.prng)
    if one.stored is not None:
        array = np.asarray(array).view(dtype_of(one.dtype))
    return array if isinstance(array, jax.Array) or sharding is None else jax.device_put(array, sharding)


# --- damage ------------------------------------------------------------------------------------------------------


def damaged_files(folder: Any, manifest: Manifest) -> list[str]:
    """What is wrong with the files: missing ones, other sizes, other contents of small ones."""
    wrong = []
    for name, facts in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().length
            if size != facts["bytes"]:
                wrong.append(f"{name} has {size} bytes, not {facts['bytes']}")
            elif "sha256" in facts and sha256_of(path) != facts["sha256"]:
                wrong.append(f"{name} is not what was written")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    return wrong


def _damaged(
    folder: Any, manifest: Manifest, files: Sequence[str], records: Sequence[LeafRecord], error: Exception | None = None
) -> DamagedError:
    """The error for damage, with the leaves that it concerns: each is read by itself, to find out."""
    broken = [leaf for record in records if (leaf := _broken(folder, manifest, record)) is not None]
    what = "; ".join(files[:5]) + (f"; and {len(files) - 5} files more" if len(files) > 5 else "")
    if not what:
        what = "arrays cannot be read" if broken else f"Orbax could not read it: {str(error).splitlines()[0][:200]}"
    return DamagedError(f"{folder} is damaged: {what}.", leaves=broken, mend="restore another checkpoint")


def _broken(folder: Any, manifest: Manifest, record: LeafRecord) -> Leaf | None:
    try:
        read = read_tree(folder, _wanted_trees(manifest, [(record, [None] * len(record.arrays))]))
    except Exception:  # noqa: BLE001 - whatever it is: this leaf cannot be read, which is what the error will say
        return record.leaf("cannot be read")
    arrays = (_array(one, manifest, read) for one in record.arrays)
    whole = all(sums_of(array) == one.sums for array, one in zip(arrays, record.arrays, strict=True))
    return None if whole else record.leaf("is not what was saved")


# --- the new state -----------------------------------------------------------------------------------------------


def _fresh(found: Match, target: State) -> dict[tuple[str, int], Any]:
    """Fresh values, by kind and position, of the leaves that are restarted."""
    fresh = {}
    for placed in found.restarted:
        record = placed.record
        restart = target.plan.kinds[record.kind].restart
        current = unpacked(target, record.kind)
        for position in range(placed.start, placed.start + len(record.arrays)):
            value = current[position]
            if isinstance(value, jax.ShapeDtypeStruct):
                value = jax.device_put(jnp.zeros(value.shape, value.dtype), value.sharding)
            made = jnp.asarray(restart(value))
            if (made.shape, made.dtype) != (value.shape, value.dtype):
                raise RestoreError(
                    f"The restart of kind {record.kind!r} changes shape or dtype.",
                    leaves=[record.leaf(f"becomes {made.shape} {made.dtype}")],
                    kind=record.kind,
                    mend="restart=jnp.zeros_like",
                )
            fresh[record.kind, position] = made
    return fresh


def _state(found: Match, target: State, arrays: Sequence[Sequence[Any]], fresh: Mapping[tuple[str, int], Any]) -> State:
    plan = target.plan
    new: dict[str, dict[int, Any]] = {}
    for source, read in zip(found.sources, arrays, strict=True):
        for offset, (array, ours) in enumerate(zip(read, source.placed.record.arrays, strict=True)):
            if ours.prng is None and str(array.dtype) != ours.dtype:
                array = array.astype(ours.dtype)
            new.setdefault(source.placed.record.kind, {})[source.placed.start + offset] = array
    for (kind, position), array in fresh.items():
        new.setdefault(kind, {})[position] = array
    parts = []
    for kind in plan.kinds:
        own = unpacked(target, kind)
        made = new.get(kind, {})
        # What keeps its value is copied: a later step on one of the two states must not spend the other.
        values = [made[at] if at in made else jnp.copy(array) for at, array in enumerate(own)]
        parts.append(plan._packed(kind, tuple(values)))
    return State.of(plan, parts)
