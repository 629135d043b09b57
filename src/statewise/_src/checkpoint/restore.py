"""`sw.restore`, `sw.preview` and `sw.inspect`: a checkpoint back into a state, or only inspected.

The order is: read the manifest; compare it with the target, and raise with everything that is wrong; check the files;
read the arrays; check their sums.  Only then is a state made.  The target is never changed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.fill import fresh_values, own_arrays, own_members, start_averages, start_moments
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.load import read_leaves
from statewise._src.checkpoint.format.locate import find, find_with_base
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.format.per_device import Resized, count_members, resized
from statewise._src.checkpoint.interop.foreign import foreign_leaves, is_foreign
from statewise._src.checkpoint.interop.open import open_any
from statewise._src.checkpoint.match import Match, RestoreSource, match
from statewise._src.checkpoint.match_names import NamedMatch, match_names
from statewise._src.checkpoint.members import regrouped
from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.common.narrowing import Casts, refuse_between_models
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import count_leaves
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_fits
from statewise._src.core.usable import check_untraced
from statewise._src.core.versions import settle
from statewise._src.inspect.census import Census
from statewise._src.names.names import NamesData, check_names
from statewise._src.plan.arrays import Spot
from statewise.errors import RestoreError, StructureError

__all__ = ["inspect", "leaves_on_disk", "members_on_disk", "preview", "restore"]

_NAMES = "names=sw.Names({'embed/embedding': 'model.embed_tokens.weight'})"


def restore(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: State,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: str | os.PathLike[str] | None = None,
    members: int | Sequence[int | None] | None = None,
    names: NamesData | None = None,
) -> tuple[State, RestoreReport]:
    """Restores a checkpoint into a new state, exactly, or says why it cannot.

    Args:
      path: what `sw.save` wrote, or the item of a step that an Orbax manager wrote from `sw.checkpointable`; on a disk,
        or in an object store: `gs://bucket/run`, `s3://bucket/run`.
      target: a state, or an abstract one (`plan.abstract()`): it determines which leaves there are, their shapes and
        dtypes, and their devices.  It does not change.  Leaves that are not restored keep its values, except for
        averages (`sw.EMA`) of a kind that is restored: they start again as copies of it.  Where everything is restored,
        a kind that is not saved restarts if it depends on others (`depends_on`) and declares `restart`.
      only: the kinds to restore, such as `("params",)`; by default all that are `saved`.
      cast: allows other dtypes, floating-point to floating-point and integer to integer; the report lists them.
      base: where the checkpoint's base is, if it was moved.
      members: which members of an ensemble: for each member of the target the number of the checkpoint's, or None if it
        gets none (it is then kept, or restarted if the kind says `missing="restart"`); for one model the number of one.
        A checkpoint of one model has the member 0.
      names: what the leaves are called in another program's files (`sw.Names`); `path` is then a `.safetensors` file,
        several of them, or a folder, as models are published.  What such files cannot have keeps the target's values,
        or starts as the optimizer's `init` makes it.  In a folder of a LoRA adapter (of the package peft) B is
        multiplied by the scale that its configuration gives, because `nnx.LoRA` has none.

    Returns:
      the state, of the target's plan, and what happened to each leaf.

    Raises:
      RestoreError: there is no checkpoint, or the store does not give it.  Or the target and it do not match: some
        leaves are missing, unexpected, of another kind, type, shape, dtype or structure, or tied differently, or keys
        are of another PRNG implementation.  All are listed, and nothing was read.  Or a cast would lose numbers:
        rounding is fine, overflow is not.
      CorruptedError: files or arrays are not what was written; each is named.
      DeclarationError: `only` names a kind that does not exist, or one that is never saved.

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
    if names is not None:
        named = _matched_names(path, target, only, cast, base, members, names)
        named.matched.report.raise_problems()
        fresh = fresh_values(named.matched.restarted, target)
        default = jnp.zeros(()).sharding
        read = [named.read(source, _shardings(source, target, default)) for source in named.matched.sources]
        return _state(named.matched, target, read, fresh, {}), named.matched.report
    return open_checkpoint(path, target, only=only, cast=cast, base=base, members=members).restored()


def preview(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: State,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    base: str | os.PathLike[str] | None = None,
    members: int | Sequence[int | None] | None = None,
    names: NamesData | None = None,
) -> RestoreReport:
    """Reports what `sw.restore` would do with the same arguments; reads no array, and does not raise for mismatches.

    Returns:
      the report; `report.ok` says whether the restore would succeed, `report.problems` what prevents it.

    Raises:
      CorruptedError: a manifest is not what was written.
      DeclarationError: `only` names a kind that does not exist, or one that is never saved.

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
    if names is not None:
        return _matched_names(path, target, only, cast, base, members, names).matched.report
    return open_checkpoint(path, target, only=only, cast=cast, base=base, members=members).report


def inspect(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, names: NamesData | None = None
) -> Census:
    """Returns the census of a checkpoint, of a plain Orbax one, or of safetensors files; reads no array.

    Args:
      path: where it is, on a disk or in an object store; of safetensors files, which are on a disk, a folder, one of
        them, or several.
      names: what leaves are called in another program's files.  Arrays that no row is about are then counted as
        `dropped`, and not as what they would be without names.

    Raises:
      CorruptedError: it is not a checkpoint in a known format, or it is corrupted.

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
    leaves, handlings = leaves_on_disk(path)
    if names is not None:
        check_names(names, _NAMES)
        if not is_foreign(path):
            raise RestoreError(
                "Names are of another program's files, and this is a checkpoint of Statewise.", hint="sw.inspect(path)"
            )
        leaves = foreign_leaves(path, names)
        handlings = dict.fromkeys((leaf.kind or "" for leaf in leaves), "-")
    return Census(count_leaves(leaves, handlings), members_on_disk(path))


def leaves_on_disk(path: object) -> tuple[list[Leaf], dict[str, str]]:
    """Returns the leaves that `inspect` counts, and the handling of each kind in words; reads no array."""
    if is_foreign(path):
        leaves = foreign_leaves(path)
        return leaves, dict.fromkeys((leaf.kind or "" for leaf in leaves), "-")
    manifest = read_manifest(find(path))
    handlings = {
        name: kind.handling if kind.saved or "not saved" in kind.handling else "not in this checkpoint"
        for name, kind in manifest.kinds.items()
    }
    return list(map(_as_in_models, manifest.leaves)), handlings


def members_on_disk(path: object) -> int | None:
    """Returns the number of members of a checkpoint's ensemble; None for one model, or for another format."""
    return None if is_foreign(path) else count_members([read_manifest(find(path))])


def _as_in_models(record: LeafRecord) -> Leaf:
    """Returns the leaf as a model's census shows it: there the dtype of a PRNG key is JAX's, `key<fry>`."""
    leaf = record.leaf()
    if record.structure is not None or record.arrays[0].prng is None:
        return leaf
    impl = record.arrays[0].prng
    try:
        return dataclasses.replace(leaf, dtype=jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype)
    except ValueError:  # an implementation that this process does not know
        return leaf


# --- comparing ---------------------------------------------------------------------------------------------------


def _matched_names(
    path: object, target: Any, only: object, cast: bool, base: object, members: object, names: object
) -> NamedMatch:
    _check_target(target)
    checked = check_names(names, _NAMES)
    if base is not None or members is not None:
        raise RestoreError("Files of other names have neither a base nor members.", hint="leave out base and members")
    return match_names(path, open_any(path), checked, target, only, cast)


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is compared with the target of a restore; only manifests are read so far."""

    target: State
    folders: list[Any]
    manifests: list[Manifest]
    matched: Match

    @property
    def report(self) -> RestoreReport:
        """Returns what a restore does."""
        return self.matched.report

    @property
    def recorded(self) -> Mapping[str, str]:
        """Returns what the checkpoint records, if it is a step of `Checkpoints`."""
        return self.manifests[0].recorded

    def restored(self) -> tuple[State, RestoreReport]:
        """Reads the arrays, and returns the new state; raises if the checkpoint and the target do not match."""
        matched, target = self.matched, self.target
        matched.report.raise_problems()
        fresh = fresh_values(matched.restarted, target)
        own = own_members(matched, target)
        default = jnp.zeros(()).sharding
        wanted = [(each.checkpoint, (each.record, _shardings(each, target, default))) for each in matched.sources]
        arrays = read_leaves(self.folders, self.manifests, wanted)
        return _state(matched, target, arrays, fresh, own), matched.report


def open_checkpoint(
    path: object, target: object, *, only: object, cast: bool, members: object, base: object = None
) -> OpenCheckpoint:
    """Reads the manifests of a checkpoint and of its base, and compares them with a target."""
    checked = _check_target(target)
    folders, manifests = find_with_base(path, base)
    return OpenCheckpoint(checked, folders, manifests, match(path, manifests, checked, only, cast, members))


def _check_target(target: object) -> State:
    """Returns the target, which has to be a state."""
    if not isinstance(target, State):
        hint = "sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)"
        raise StructureError(f"The target of a restore is a state, not {type(target).__name__}.", hint=hint)
    hint = "restore before the function is called, and pass it the state"
    check_untraced(jax.tree.leaves(target), "restore", hint, subject="The target")
    check_fits(target, target.tables.kinds)
    return target


# --- the new state -----------------------------------------------------------------------------------------------


def _sharding_at(target: State, kind: str, position: int) -> Any:
    """Returns the sharding of an array of the target; None for an array without one, or in a packed buffer."""
    packed = kind in target.tables.packing
    return None if packed else getattr(target.part(kind).arrays[position], "sharding", None)


def _shardings(source: RestoreSource, target: State, default: jax.sharding.Sharding) -> list[Any]:
    """Returns the sharding to read each array of a leaf with: the target's, or the default if it has none."""
    kind = source.placed.record.kind
    return [
        # An array that is changed goes to the target's devices only afterwards.
        None if change is not None else _sharding_at(target, kind, position) or default
        for position, change in enumerate(source.changes, source.placed.start)
    ]


def _is_cast(array: Any, record: ArrayRecord) -> bool:
    return record.prng is None and array.dtype != dtype_of(record.dtype)


def _check_casts(matched: Match, arrays: Sequence[Sequence[Any]]) -> None:
    """Raises for casts that lose numbers."""
    floats, others = Casts(), Casts()
    for source, read in zip(matched.sources, arrays, strict=True):
        for array, record in zip(read, source.placed.record.arrays, strict=True):
            if _is_cast(array, record):
                casts = floats if jnp.issubdtype(array.dtype, jnp.floating) else others
                casts.add(source.placed.record.leaf(), array, dtype_of(record.dtype))

    def wider_hint(wider: str, lossy: list[Leaf]) -> str:
        kinds = ", ".join(f"{kind}={wider!r}" for kind in dict.fromkeys(leaf.kind for leaf in lossy))
        return f"sw.restore(path, target.cast({kinds}), cast=True)"

    refuse_between_models(floats, others, RestoreError, wider_hint, "plan the model with the dtype that was saved")


def _state(
    matched: Match,
    target: State,
    arrays: Sequence[Sequence[Any]],
    fresh: Mapping[Spot, Any],
    own_members: Mapping[Spot, Any],
) -> State:
    plan = target.tables
    new: dict[Spot, Any] = {}
    _check_casts(matched, arrays)
    for source, read in zip(matched.sources, arrays, strict=True):
        record, start = source.placed
        triples = zip(read, record.arrays, source.changes, strict=True)
        for position, (array, of_array, change) in enumerate(triples, start):
            spot = record.kind, position
            if _is_cast(array, of_array):
                array = array.astype(of_array.dtype)
            if isinstance(change, Resized):
                array = resized(array, change, _sharding_at(target, *spot), plan.by_kind[record.kind][position].axis)
            elif change is not None:
                array = regrouped(array, change, own_members.get(spot), _sharding_at(target, *spot))
            elif not isinstance(array, jax.Array):  # it was read in a dtype that JAX does not have
                array = jax.device_put(array, _sharding_at(target, *spot) or jnp.zeros(()).sharding)
            new[spot] = array
    new |= fresh
    start_moments(matched, target, new)
    start_averages(matched, target, new)
    own = functools.cache(functools.partial(own_arrays, target))
    parts = []
    for kind, infos in plan.by_kind.items():
        spots = [(kind, position) for position in range(len(infos))]
        # Values that are kept are copied: a later step on one of the two states must not donate the other's.
        values = [new[spot] if spot in new else jnp.copy(own(kind)[spot[1]]) for spot in spots]
        parts.append(plan.pack(kind, tuple(values)))
    state = State.of(plan, parts)
    _settle(target, state, new)
    return state


def _settle(target: State, state: State, new: Collection[Spot]) -> None:
    """Records what the kinds of a restored state were made from; what was not restored is as it was in the target."""
    plan = state.tables
    if not plan.sources:
        return
    counts = {kind: len([spot for spot in new if spot[0] == kind]) for kind in plan.kinds}
    for kind, count in counts.items():
        if count == 0:
            state.part(kind).known_version = target.part(kind).version()
    settle(plan, target.parts, state.parts, [kind for kind, count in counts.items() if count == len(plan.specs[kind])])
