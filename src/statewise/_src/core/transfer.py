"""Kinds from one state into another, of another plan, another mesh, other dtypes: from a learner to an actor, say.

Leaves are matched by path.  Everything is compared first (paths, types, shapes, dtypes, ties), and every difference is
listed; nothing was copied then.  Arrays are copied from device to device: cast before the copy if that makes them
smaller, after it otherwise.  The source does not change, and shares no memory with the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from statewise._src.common.compare import MISSING, note_of
from statewise._src.common.object_names import names_given
from statewise._src.common.paths import Path
from statewise._src.core.batches import check_not_batch
from statewise._src.core.cast import arrays_in_order, parts_for
from statewise._src.core.cast import cast as cast_state
from statewise._src.core.plan import Plan, State, tables_of
from statewise._src.core.state_data import StateData, check_not_donated, kind_places, mesh_of
from statewise._src.core.templates import abstract
from statewise._src.core.transfer_arrays import (
    Move,
    averages_of,
    check_casts,
    place,
    restarted_averages,
    shardings_for,
)
from statewise._src.core.transfer_layouts import placed_by_names
from statewise._src.core.transfer_match import OTHER, PlacedLeaf, difference, leaves_of
from statewise._src.core.transfer_names import NamedMatch, NamedMove, match_names
from statewise._src.core.usable import check_usable
from statewise._src.core.versions import carry, settle
from statewise._src.names.names import NamesData, check_names
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import array_shardings, check_devices, copies_on, on_mesh
from statewise.errors import DeclarationError, StructureError

__all__ = ["transfer"]

_NAMES = "sw.transfer(src, target, names=sw.Names({'layers/kernel': 'layers/{i}/kernel'}))"


def transfer(
    src: State,
    target: Plan | State,
    *,
    kinds: str | Iterable[str] | None = None,
    cast: bool | jax.typing.DTypeLike = False,
    mesh: jax.sharding.Mesh | None = None,
    names: NamesData | None = None,
) -> State:
    """Copies kinds of one state into a state of another plan, or on another mesh.

    Args:
      src: the state that has the values; it stays usable.
      target: what the values go into: a state, whose other kinds are kept (an actor's cache), or a plan, where all of
        its kinds come from `src`.  Leaves are matched by path; an optimizer that the target does not have is left out.
      kinds: the target's kinds to fill, one name or several; by default all that have leaves.
      cast: allows other dtypes: True casts floats to floats and integers to integers, to what the target has; a
        floating-point dtype makes that the dtype of the target's floating-point numbers in these kinds.
      mesh: the mesh to place the values on, as the target's `shardings` says; by default they are placed as the
        target's own arrays, or, for a plan, as the source's.
      names: what the source's leaves are called in the target (`sw.Names`), where the two models are not alike: the
        source's paths on the left side, the target's on the right.  A stack of layers becomes single ones, or the
        reverse; patterns rearrange axes.  Names with the target's paths on the left are read backwards, so that one
        declaration serves both ways.  Leaves that no row is about are matched by path; one with None on the right keeps
        the target's value.  Paths of several objects may be those within their object.

    Averages (`sw.EMA`) of a kind that is transferred restart, as copies of its new values, unless they are transferred
    as well.  The target's optimizer keeps its state.  Inside `jax.jit`, where values are unknown, a cast may lose them.

    Returns:
      a state of the target's plan; with `cast=dtype`, of that plan in this dtype.

    Raises:
      StructureError: leaves that the source does not have, or has with another type, shape or dtype, or tied
        differently; all are listed, and nothing was copied.  Per-device values where the target has one value; a
        donated or abstract source; a cast that would lose numbers.
      DeclarationError: a kind does not exist; `cast` is not a floating-point dtype.
      PlacementError: leaves that cannot be placed on the mesh, all of them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> learner = sw.plan(model, optimizers={"params": optax.adam(1e-3)}).take(model)
      >>> actor = sw.transfer(learner, sw.plan(model), cast=jnp.bfloat16)
      >>> actor
      State(params: 2 arrays)
      >>> actor["params"]["kernel"].dtype
      dtype(bfloat16)
    """
    plan, into = _target(src, target)
    filled = _kinds(plan, into, kinds)
    if not isinstance(cast, bool):
        plan = cast_state(abstract(plan), dict.fromkeys(filled, cast)).tables
    # Without a mesh a plan would have no place for per-device values.
    target_mesh = _own_mesh(src.tables, plan) if into is None and mesh is None else mesh
    if target_mesh is not None:
        plan = _on_mesh(plan, into, target_mesh)
    if into is not None:
        check_not_batch(into)
    if names is not None:
        check_names(names, _NAMES)
    matched = _matched(src.tables, plan, filled, cast is not False, names, into is not None)
    pairs = matched.pairs
    used = tuple(kind for kind in src.tables.kinds if any(source.kind == kind for _, source in pairs))
    hint = "src = plan.take(model)  # or restore into it: src, report = sw.restore(path, src)"
    check_usable(src, used, "transfer", hint, subject="The source")
    shardings = shardings_for(plan, into, filled, target_mesh)
    arrays = {kind: arrays_in_order(src.tables, kind, src.part(kind).arrays) for kind in used}
    check_casts(pairs, arrays)
    own = _own(into, matched.kept)
    by_names = _sharded(src, plan, used, shardings) if into is None and target_mesh is None else shardings
    # Nothing was copied before this line, and nothing is checked after it.
    parts: dict[str, list[Any]] = {kind: [None] * len(plan.specs[kind]) for kind in filled}
    for to, source in matched.moves:
        array = arrays[source.kind][source.position]
        parts[to.kind][to.position] = place(array, to, source, shardings[to.kind][to.position])
    for move in matched.named:
        given = [arrays[source.kind][source.position] for source in move.sources]
        places = [by_names[to.kind][to.position] for to in move.targets if to is not None]
        for to, array in placed_by_names(move, given, places):
            parts[to.kind][to.position] = array
    for to in matched.kept:
        parts[to.kind][to.position] = place(own[to.number], to, to, shardings[to.kind][to.position])
    parts |= restarted_averages(plan, into, parts, target_mesh)
    made = parts_for(plan, into, parts)
    kind_of = {kind: {source.kind for to, source in pairs if to.kind == kind} for kind in filled}
    carry([(src.tables, src.parts)], plan, made, {kind: next(iter(of)) for kind, of in kind_of.items() if len(of) == 1})
    if into is not None:
        settle(plan, into.parts, made, fresh=tuple(parts))
    return State.make(plan, made)


def _own(into: StateData | None, kept: Sequence[ArrayInfo]) -> dict[int, Any]:
    """Returns the target's own arrays that it keeps, by number."""
    if into is None or not kept:
        return {}
    kinds = {info.kind for info in kept}
    check_not_donated(into, kinds)
    arrays = {kind: arrays_in_order(into.tables, kind, into.part(kind).arrays) for kind in kinds}
    return {info.number: arrays[info.kind][info.position] for info in kept}


def _sharded(src: State, plan: PlanTables, kinds: Sequence[str], own: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns the shardings of rearranged arrays in a plan: by its placements, on the source's mesh if it has one."""
    mesh = mesh_of(kind_places(src, kinds))
    return own if mesh is None else array_shardings(plan, mesh)


def _target(src: object, target: object) -> tuple[PlanTables, StateData | None]:
    """Returns the tables of the target's plan, and the target itself if it is a state."""
    if not isinstance(src, StateData):
        raise StructureError(
            f"sw.transfer copies from a state, not {type(src).__name__}.",
            hint="sw.transfer(plan.take(model), target)",
        )
    if isinstance(target, StateData):
        return target.tables, target
    if not isinstance(target, Plan):
        raise StructureError(
            f"sw.transfer copies into a plan or a state, not {type(target).__name__}.",
            hint="sw.transfer(src, plan), or sw.transfer(src, plan.take(model), kinds='params')",
        )
    return tables_of(target), None


def _own_mesh(src: PlanTables, plan: PlanTables) -> jax.sharding.Mesh | jax.sharding.AbstractMesh | None:
    """Returns the mesh for per-device values if none is given: the target's own, or the source's if there are any."""
    if plan.per_device is not None:
        return plan.per_device.mesh
    if src.per_device is not None and copies_on(plan, src.per_device.mesh) is not None:
        return src.per_device.mesh
    return None


def _on_mesh(plan: PlanTables, into: StateData | None, mesh: Any) -> PlanTables:
    """Returns the target's plan on a mesh, where it may have per-device values."""
    check_devices(mesh)
    placed = on_mesh(plan, mesh)
    if into is not None and placed is not plan:
        raise StructureError(
            "The target is a state with per-device values, or would have some on this mesh, so its other kinds cannot "
            "keep their arrays.",
            hint="sw.transfer(src, kinds.plan(model), mesh=mesh)  # all of it, into the plan",
        )
    return placed


def _kinds(plan: PlanTables, into: StateData | None, kinds: object) -> tuple[str, ...]:
    """Returns the kinds to fill, in the order of the target."""
    filled = tuple(kind for kind, specs in plan.specs.items() if specs)
    if kinds is None:
        return filled
    names = names_given(kinds, "kinds")
    for name in names:
        plan.kinds[name]  # raises for a kind that does not exist
    if names and not set(names) & set(filled):
        raise DeclarationError(
            f"kinds={kinds!r} does not name a kind that has leaves.", hint=f"those that have: {', '.join(filled)}"
        )
    # Averages restart from the kinds that they track, so they need no source if all of those are filled.
    restart = [
        kind for kind, own in averages_of(plan, names).items() if {average.kind for average, _ in own} <= {*names}
    ]
    empty = [kind for kind in filled if kind not in (*names, *restart)] if into is None else []
    if empty:
        raise StructureError(
            f"A plan has no values of its own, so there are none for {', '.join(empty)}.",
            leaves=[leaf for kind in empty for leaf in plan[kind]],
            kind=empty[0] if len(empty) == 1 else None,
            hint=f"sw.transfer(src, plan.take(model), kinds={names!r})  # keeps the state's other kinds",
        )
    return tuple(kind for kind in filled if kind in names)


# --- matching ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Matched:
    """What is transferred: arrays as they are, arrays by names, and the target's own arrays that are kept."""

    moves: list[Move]
    named: list[NamedMove]
    kept: list[ArrayInfo]

    @property
    def pairs(self) -> list[Move]:
        """Returns each array of the target with each array that it is made from."""
        return [*self.moves, *(pair for move in self.named for pair in move.pairs)]


def _matched(
    src: PlanTables, plan: PlanTables, kinds: Sequence[str], cast: bool, names: NamesData | None, keeps: bool
) -> _Matched:
    """Returns where each array of these kinds comes from.

    Raises:
      StructureError: leaves do not fit; lists all of them.
    """
    named = NamedMatch() if names is None else match_names(src, plan, kinds, names, cast)
    available: dict[Path, PlacedLeaf] = {}
    for source in leaves_of(src):
        if source.leaf.path not in named.taken:
            available |= dict.fromkeys((source.leaf.path, *source.leaf.aliases), source)
    wanted = [placed for placed in leaves_of(plan) if placed.leaf.kind in kinds]
    source_path = _path_translation(src, plan, wanted, available)
    moves: list[Move] = []
    problems = named.problems
    for placed in wanted:
        if placed.leaf.path in named.decided:
            continue
        paths = [source_path(path) for path in (placed.leaf.path, *placed.leaf.aliases)]
        # By identity: tied leaves of the source are one leaf with several paths.
        sources = list({id(available[path]): available[path] for path in paths if path in available}.values())
        note, hint = difference(placed, sources, cast)
        if not sources and named.taken.intersection(paths):
            note, hint = (
                "by the names, the source's is another leaf of the target",
                "a row in the names for this leaf too",
            )
        if note:
            problems.add(placed.leaf, note, hint)
        else:
            moves += zip(placed.arrays, sources[0].arrays, strict=True)
    for placed in [] if keeps else named.kept:
        note = "the source does not have it, as the names say, and a plan has no values"
        problems.add(placed.leaf, note, "sw.transfer(src, plan.take(model), names=names)")
    # One hint for all missing leaves, not one for each: usually complete kinds are missing.
    missing = note_of(MISSING, "source")
    if any(leaf.note == missing for leaf in problems.leaves):
        wrong = {leaf.kind for leaf in problems.leaves}
        complete = tuple(kind for kind in kinds if kind not in wrong)
        names_them = f"name the kinds that the source has: sw.transfer(src, state, kinds={complete!r})"
        problems.hint(names_them if complete else OTHER)
    problems.raise_as(StructureError, "The source does not fit the target: {n} leaves differ.")
    return _Matched(moves, named.moves, [array for placed in named.kept for array in placed.arrays])


Translation = Callable[[Path], Path]


def _path_translation(
    src: PlanTables, plan: PlanTables, wanted: Sequence[PlacedLeaf], available: Mapping[Path, PlacedLeaf]
) -> Translation:
    """Returns the function from a path in the target to that in the source, as their objects may differ in name.

    A learner's plan is often of a model and its optimizer, an actor's of the model alone: the single object is then
    the one of the several that has most of its leaves.  Objects with names correspond to those without in order.
    """
    if src.several and plan.several and bool(src.names) != bool(plan.names):
        labels = dict(zip(plan.object_labels, src.object_labels, strict=False))
        return lambda path: _relabeled(path, labels, available)
    if src.several == plan.several:
        return lambda path: path
    if src.several:
        best = _object_of(src, wanted, available)
        return lambda path: (best, *path)
    # A path that begins with another object's label must not match: no path of the source begins with None.
    paths = [placed.leaf.path for placed in wanted]
    best = max(plan.object_labels, key=lambda label: sum(p[0] == label and p[1:] in available for p in paths))
    return lambda path: path[1:] if path[0] == best else (None, *path)


def _relabeled(path: Path, labels: Mapping[Any, Any], available: Mapping[Path, PlacedLeaf]) -> Path:
    """Returns a path with the source's label for its object: the first key, or a later one in a derived leaf's path."""
    # In `optimizer/params/0/mu/model/kernel` the label is not the first key; any key may equal a label by chance.
    ways = [(*path[:at], labels[key], *path[at + 1 :]) for at, key in enumerate(path) if key in labels]
    return next((way for way in ways if way in available), path if path in available else (ways or [path])[0])


def _object_of(src: PlanTables, wanted: Sequence[PlacedLeaf], available: Mapping[Path, PlacedLeaf]) -> Any:
    """Returns the label of the source's object that the target is; a model and its teacher differ only in kinds."""
    pairs = {
        label: [(placed, available.get((label, *placed.leaf.path))) for placed in wanted] for label in src.object_labels
    }

    def score(label: Any) -> tuple[int, int, int]:
        both = [(placed.leaf, source.leaf) for placed, source in pairs[label] if source is not None]
        fit = sum(ours.type is theirs.type and ours.shape == theirs.shape for ours, theirs in both)
        return fit, sum(ours.kind == theirs.kind for ours, theirs in both), len(both)

    best = max(pairs, key=score)
    equal = [label for label in pairs if score(label) == score(best)]
    # Several labels may still lead to the same leaves, which objects can share.
    if score(best)[0] and len({tuple(id(source) for _, source in pairs[label]) for label in equal}) > 1:
        raise StructureError(
            f"The target may be any of the source's objects {', '.join(map(str, equal))}: all fit equally well.",
            hint=f"one = src.plan.build(src)[{list(pairs).index(best)}]\nsw.transfer(sw.plan(one).take(one), target)",
        )
    return best
