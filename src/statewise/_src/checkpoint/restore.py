"""`sw.restore`, `sw.preview` and `sw.inspect`: a checkpoint back into a state, or only looked at.

In this order: read the manifest; compare it with the target, and refuse with everything that is wrong; look at the
files; read the arrays; check their sums.  Only then is a state made; the target is never changed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.fill import begin_averages, fresh_values, own_arrays, own_members
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.load import read_arrays
from statewise._src.checkpoint.format.locate import find, find_with_base
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.format.per_device import Resized, members_of, resized
from statewise._src.checkpoint.interop.foreign import foreign_leaves, is_foreign
from statewise._src.checkpoint.match import Match, RestoreSource, match
from statewise._src.checkpoint.members import regrouped
from statewise._src.checkpoint.orbax.paths import place_of
from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.common.narrowing import WIDE, Casts, refuse
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import count_leaves
from statewise._src.core.cast import WIDER
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_fits
from statewise._src.core.usable import check_untraced
from statewise._src.inspect.census import Census
from statewise.errors import RestoreError, StructureError

__all__ = ["inspect", "leaves_on_disk", "members_on_disk", "preview", "restore"]


def restore(
    path: str | os.PathLike[str],
    target: State,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: str | os.PathLike[str] | None = None,
    members: int | Sequence[int | None] | None = None,
) -> tuple[State, RestoreReport]:
    """Reads a checkpoint into a new state, exactly, or says why not.

    Args:
      path: what `sw.save` wrote, or a step's item that an Orbax manager wrote of `sw.checkpointable`.
      target: a state, or an abstract one (`plan.abstract()`): it says which leaves there are to be, of which shape and
        dtype, and on which devices.  It stays as it is; leaves that are not restored keep its values, but for averages
        (`sw.EMA`) of a kind that is: they begin again as copies of it.
      only: the kinds to restore, `("params",)` say; by default all that are `saved`.
      cast: allows other dtypes, floating-point to floating-point and integer to integer; the report lists them.
      base: where the checkpoint's base is, if it was moved since.
      members: which members of an ensemble: for each member of the target the number of the checkpoint's, or None where
        it gets none (it is then kept, or restarted where the kind says `missing="restart"`); into one model the number
        of one.  A checkpoint of one model has the member 0.

    Returns:
      the state, of the target's plan, and what happened to each leaf.

    Raises:
      RestoreError: the target and the checkpoint do not match: leaves are missing, unexpected, of another kind, type,
        shape, dtype or structure, or tied differently, or keys are of another PRNG implementation.  All are listed;
        nothing was read then.  Or a cast would lose numbers: rounding is fine, overflow is not.
      CorruptedError: files or arrays that are not what was written; each is named.
      DeclarationError: `only` names a kind that is not there, or one that is never saved.

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
    folders, manifests, found = _matched(path, target, only, cast, base, members)
    found.report.raise_problems()
    fresh = fresh_values(found.restarted, target)
    own = own_members(found, target)
    arrays = _read(folders, manifests, found, target)
    return _state(found, target, arrays, fresh, own), found.report


def preview(
    path: str | os.PathLike[str],
    target: State,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: str | os.PathLike[str] | None = None,
    members: int | Sequence[int | None] | None = None,
) -> RestoreReport:
    """What `sw.restore` would do with the same arguments; reads no array, and raises for no disagreement.

    Returns:
      the report; `report.ok` tells whether the restore would go through, `report.problems` what is in its way.

    Raises:
      CorruptedError: a manifest that is not what was written.
      DeclarationError: `only` names a kind that is not there, or one that is never saved.

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
    return _matched(path, target, only, cast, base, members)[2].report


def inspect(path: str | os.PathLike[str]) -> Census:
    """The census of a checkpoint, of a plain Orbax one, or of a safetensors file: no array is read.

    Raises:
      CorruptedError: no checkpoint that is known here, or one that is corrupted.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", sw.plan(model).take(model))
      >>> sw.inspect(f"{folder}/first")["params"].size
      9
    """
    return Census(count_leaves(*leaves_on_disk(path)), members_on_disk(path))


def leaves_on_disk(path: Any) -> tuple[list[Leaf], dict[str, str]]:
    """The leaves of what `inspect` counts, and the handling of each kind in words; reads no array."""
    path = place_of(path)
    if is_foreign(path):
        leaves = foreign_leaves(path)
        return leaves, dict.fromkeys((leaf.kind or "" for leaf in leaves), "-")
    manifest = read_manifest(find(path))
    handlings = {
        name: kind.handling if kind.saved or "not saved" in kind.handling else "not in this checkpoint"
        for name, kind in manifest.kinds.items()
    }
    return list(map(_as_in_models, manifest.leaves)), handlings


def members_on_disk(path: Any) -> int | None:
    """How many members the ensemble of a checkpoint has; None for one of one model, or of another format."""
    path = place_of(path)
    if is_foreign(path):
        return None
    found = (members_of(array) for _, array in read_manifest(find(path)).arrays())
    return next((one[0] for one in found if one is not None), None)


def _as_in_models(record: LeafRecord) -> Leaf:
    """The leaf as a model's census shows it: there a PRNG key has the dtype that JAX calls `key<fry>`."""
    leaf = record.leaf()
    if record.structure is not None or record.arrays[0].prng is None:
        return leaf
    impl = record.arrays[0].prng
    try:
        return dataclasses.replace(leaf, dtype=jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype)
    except ValueError:  # an implementation that this process does not know
        return leaf


# --- comparing ---------------------------------------------------------------------------------------------------


def _matched(
    path: object, target: object, only: object, cast: bool, base: object, members: object
) -> tuple[list[Any], list[Manifest], Match]:
    if not isinstance(target, State):
        raise StructureError(
            f"The target of a restore is a state, not {type(target).__name__}.",
            hint="sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)",
        )
    check_untraced(
        jax.tree.leaves(target),
        "restore",
        "restore before the function is called, and pass it the state",
        subject="The target",
    )
    check_fits(target, target.tables.kinds)
    folders, manifests = find_with_base(path, base)
    return folders, manifests, match(path, manifests, target, only, cast, members)


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


def _shardings(source: RestoreSource, target: State) -> list[Any]:
    """Where each array of a leaf goes: to where the target's is."""
    kind = source.placed.record.kind
    parts = target.part(kind).arrays if kind not in target.tables.packing else None
    made: list[Any] = []
    for offset in range(len(source.record.arrays)):
        array = parts[source.placed.start + offset] if parts is not None else None
        if source.changes[offset] is not None:  # it is put there when it is what it has to become
            made.append(None)
            continue
        made.append(getattr(array, "sharding", None) or _default_sharding())
    return made


def _default_sharding() -> Any:
    return jnp.zeros(()).sharding


# --- the new state -----------------------------------------------------------------------------------------------


def _sharding_at(target: State, kind: str, position: int) -> Any:
    """Where an array of the target lies; of one that is packed nobody can tell."""
    packed = kind in target.tables.packing
    return None if packed else getattr(target.part(kind).arrays[position], "sharding", None)


def _check_casts(found: Match, arrays: Sequence[Sequence[Any]]) -> None:
    """Refuses casts that lose numbers."""
    floats, others = Casts(), Casts()
    for source, read in zip(found.sources, arrays, strict=True):
        for array, ours in zip(read, source.placed.record.arrays, strict=True):
            if ours.prng is None and array.dtype != dtype_of(ours.dtype):
                casts = floats if jnp.issubdtype(array.dtype, jnp.floating) else others
                casts.add(source.placed.record.leaf(), array, dtype_of(ours.dtype))
    lossy, rest = floats.lost(), others.lost()
    held = floats.holding(WIDER) if lossy else None
    kinds = ", ".join(f"{kind}={held!r}" for kind in dict.fromkeys(leaf.kind for leaf in lossy))
    hints = [f"sw.restore(path, target.cast({kinds}), cast=True)"] if held else []
    if rest or (lossy and not held):
        hints += ["plan the model with the dtype that was saved", WIDE]
    refuse([*lossy, *rest], RestoreError, "\n".join(hints))


def _state(
    found: Match,
    target: State,
    arrays: Sequence[Sequence[Any]],
    fresh: Mapping[tuple[str, int], Any],
    own_members: Mapping[tuple[str, int], Any],
) -> State:
    plan = target.tables
    new: dict[str, dict[int, Any]] = {}
    _check_casts(found, arrays)
    for source, read in zip(found.sources, arrays, strict=True):
        kind = source.placed.record.kind
        for offset, (array, ours) in enumerate(zip(read, source.placed.record.arrays, strict=True)):
            if ours.prng is None and array.dtype != dtype_of(ours.dtype):
                array = array.astype(ours.dtype)
            at, change = source.placed.start + offset, source.changes[offset]
            if isinstance(change, Resized):
                array = resized(array, change, _sharding_at(target, kind, at), plan.by_kind[kind][at].axis)
            elif change is not None:
                array = regrouped(array, change, own_members.get((kind, at)), _sharding_at(target, kind, at))
            elif not isinstance(array, jax.Array):  # of a dtype that JAX did not have
                array = jax.device_put(array, _shardings(source, target)[offset])
            new.setdefault(kind, {})[at] = array
    for (kind, position), array in fresh.items():
        new.setdefault(kind, {})[position] = array
    begin_averages(found, target, new)
    parts = []
    for kind in plan.kinds:
        made, count = new.get(kind, {}), len(plan.specs[kind])
        own = own_arrays(target, kind) if len(made) < count else ()
        # What keeps its value is copied: a later step on one of the two states must not donate the other.
        values = [made[at] if at in made else jnp.copy(own[at]) for at in range(count)]
        parts.append(plan.pack(kind, tuple(values)))
    return State.of(plan, parts)
