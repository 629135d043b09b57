"""`sw.restore`, `sw.preview` and `sw.inspect`: a checkpoint back into a state, or only looked at.

In this order: read the manifest; compare it with the target, and refuse with everything that is wrong; look at the
files; read the arrays; check their sums.  Only then is a state made; the target is never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise.averages import EMA
from statewise.census import Census
from statewise.checkpoint.devices import resized
from statewise.checkpoint.finding import find, find_with_base
from statewise.checkpoint.foreign import foreign_leaves, is_foreign
from statewise.checkpoint.keys import dtype_of
from statewise.checkpoint.locating import place_of
from statewise.checkpoint.manifest import LeafRecord, Manifest
from statewise.checkpoint.matching import Match, Source, match
from statewise.checkpoint.parsing import read_manifest
from statewise.checkpoint.reading import read_arrays
from statewise.checkpoint.records import unpacked
from statewise.checkpoint.report import RestoreReport
from statewise.errors import RestoreError, StructureError
from statewise.paths import Leaf, format_shape
from statewise.state import State, check_fits, is_deleted
from statewise.tables import count_leaves
from statewise.using import averages_in

__all__ = ["inspect", "leaves_on_disk", "preview", "restore"]


def restore(
    path: Any,
    target: State | Any,
    *,
    only: str | Sequence[str] | Any = None,
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
    fresh = _fresh(found, target)
    arrays = _read(folders, manifests, found, target)
    return _state(found, target, arrays, fresh), found.report


def preview(
    path: Any,
    target: State | Any,
    *,
    only: str | Sequence[str] | Any = None,
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
    """The census of a checkpoint, of a plain Orbax one, or of a safetensors file: no array is read.

    Raises:
      DamagedError: no checkpoint that is known here, or one that is damaged.

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
    return Census(count_leaves(*leaves_on_disk(path)))


def leaves_on_disk(path: Any) -> tuple[list[Leaf], dict[str, str]]:
    """The leaves of what `inspect` counts, and the treatment of each kind in words; reads no array."""
    path = place_of(path)
    if is_foreign(path):
        leaves = foreign_leaves(path)
        return leaves, dict.fromkeys((leaf.kind or "" for leaf in leaves), "-")
    manifest = read_manifest(find(path))
    treatments = {
        name: kind.treatment if kind.saved or "not saved" in kind.treatment else "not in this checkpoint"
        for name, kind in manifest.kinds.items()
    }
    return list(map(_as_in_models, manifest.leaves)), treatments


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
    path: Any, target: State | Any, only: str | Sequence[str] | Any, cast: bool, base: Any
) -> tuple[list[Any], list[Manifest], Match]:
    if not isinstance(target, State):
        raise StructureError(
            f"The target of a restore is a state, not {type(target).__name__}.",
            mend="sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)",
        )
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(target)):
        raise StructureError(
            "The target is being traced: inside jax.jit nothing can be restored into it.",
            mend="restore before the function is called, and pass it the state",
        )
    check_fits(target, target.plan.kinds)
    folders, manifests = find_with_base(path, base)
    return folders, manifests, match(path, manifests, target, only, cast)


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
    kind = source.placed.record.kind
    parts = target.part(kind).arrays if kind not in target.plan._packing else None
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


def _own(target: State, kind: str) -> tuple[Any, ...]:
    """The target's arrays, in the order of the plan; shapes in the place of those that share a donated buffer."""
    if kind in target.plan._packing and any(map(is_deleted, target.part(kind).arrays)):
        return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in target.plan._specs[kind])
    return unpacked(target, kind)


def _fresh(found: Match, target: State) -> dict[tuple[str, int], Any]:
    """Fresh values, by kind and position, of the leaves that are restarted."""
    fresh = {}
    odd = []
    own = {kind: _own(target, kind) for kind in {placed.record.kind for placed in found.restarted}}
    for placed in found.restarted:
        record = placed.record
        if target.plan.kinds[record.kind].of is EMA:
            continue  # averages begin as what is restored
        restart = target.plan.kinds[record.kind].restart
        current = own[record.kind]
        for position in range(placed.start, placed.start + len(record.arrays)):
            value = current[position]
            sharding = getattr(value, "sharding", None)
            if isinstance(value, jax.ShapeDtypeStruct) or is_deleted(value):
                value = jax.device_put(jnp.zeros(value.shape, value.dtype), sharding)
            each = target.plan._copies is not None and position in target.plan._copies.of(record.kind)
            made = jnp.asarray(jax.vmap(restart)(value) if each else restart(value))
            if (made.shape, made.dtype) != (value.shape, value.dtype):
                odd.append(record.leaf(f"would become {format_shape(made.shape)} {made.dtype}"))
            else:
                # A copy: `restart` may give back the target's own array, or the same for several leaves.
                fresh[record.kind, position] = jax.device_put(jnp.array(made, dtype=value.dtype), sharding)
    if odd:
        kinds = ", ".join(repr(kind) for kind in dict.fromkeys(leaf.kind for leaf in odd))
        raise RestoreError(
            f"The restart of kind {kinds} changes shapes or dtypes.",
            leaves=odd,
            kind=odd[0].kind,
            mend="restart=jnp.zeros_like, or any function that keeps shape and dtype",
        )
    return fresh


def _begin_averages(found: Match, target: State, new: dict[str, dict[int, Any]]) -> None:
    """Averages that are restarted begin as copies of what they are of, as it was restored."""
    plan = target.plan
    wanted = [placed for placed in found.restarted if plan.kinds[placed.record.kind].of is EMA]
    own = {kind: _own(target, kind) for kind in {placed.record.kind for placed in wanted}}
    for placed in wanted:
        kind, position = placed.record.kind, placed.start
        average, start = next(
            (one, start) for one, start in averages_in(plan, kind) if position - start < len(one.layout.specs)
        )
        spec, of = plan._specs[kind][position], plan._params_of(average)[position - start : position - start + 1]
        value = jnp.zeros(spec.shape, spec.dtype)  # of nothing: a count
        for source, at in of:
            there = new.get(source, {})
            value = jnp.array(there[at] if at in there else _own(target, source)[at], dtype=spec.dtype)
        sharding = getattr(own[kind][position], "sharding", None)
        new.setdefault(kind, {})[position] = jax.device_put(value, sharding)


def _fits(array: Any, made: Any) -> bool:
    """Whether every number has a place in the new dtype: rounding is one, overflow is none."""
    if not array.size:
        return True
    if jnp.issubdtype(made.dtype, jnp.integer):
        limits = jnp.iinfo(made.dtype)
        return int(array.min()) >= int(limits.min) and int(array.max()) <= int(limits.max)
    return not bool(jnp.any(jnp.isfinite(array) & ~jnp.isfinite(made)))


def _state(found: Match, target: State, arrays: Sequence[Sequence[Any]], fresh: Mapping[tuple[str, int], Any]) -> State:
    plan = target.plan
    new: dict[str, dict[int, Any]] = {}
    lost: list[Leaf] = []
    for source, read in zip(found.sources, arrays, strict=True):
        kind = source.placed.record.kind
        for offset, (array, ours) in enumerate(zip(read, source.placed.record.arrays, strict=True)):
            if ours.prng is None and array.dtype != dtype_of(ours.dtype):
                made = array.astype(ours.dtype)
                if not _fits(array, made):
                    lost.append(source.placed.record.leaf(f"{array.dtype} numbers that have no place in {ours.dtype}"))
                array = made
            at, change = source.placed.start + offset, source.changes[offset]
            if change is not None:
                array = resized(array, change, getattr(target.part(kind).arrays[at], "sharding", None))
            new.setdefault(kind, {})[at] = array
    if lost:
        raise RestoreError(
            "Casting would lose numbers: they are too large for the target's dtype.",
            leaves=lost,
            mend="plan the model with the dtype that was saved",
        )
    for (kind, position), array in fresh.items():
        new.setdefault(kind, {})[position] = array
    _begin_averages(found, target, new)
    parts = []
    for kind in plan.kinds:
        made, count = new.get(kind, {}), len(plan._specs[kind])
        own = _own(target, kind) if len(made) < count else ()
        # What keeps its value is copied: a later step on one of the two states must not spend the other.
        values = [made[at] if at in made else jnp.copy(own[at]) for at in range(count)]
        parts.append(plan._packed(kind, tuple(values)))
    return State.of(plan, parts)
