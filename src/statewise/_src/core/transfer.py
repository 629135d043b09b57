"""Kinds from one state into another, of another plan, another mesh, other dtypes: from a learner to an actor, say.

What goes where is told by path.  Everything is compared first (paths, types, shapes, dtypes, what is tied), and every
disagreement is listed; nothing has moved then.  What moves goes from device to device: cast where it is if that makes
it smaller, cast where it arrives if it grows.  The source stays as it is, and shares no memory with what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from statewise._src.common.compare import MISSING, note_of
from statewise._src.common.object_names import names_given
from statewise._src.common.paths import Path
from statewise._src.common.problems import Problems
from statewise._src.core.batches import check_not_batch
from statewise._src.core.cast import cast as cast_state
from statewise._src.core.plan import Plan, State, tables_of
from statewise._src.core.state_data import StateData, check_fits, check_not_donated
from statewise._src.core.templates import abstract
from statewise._src.core.transfer_arrays import (
    Move,
    arrays_in_order,
    arrived,
    averages_of,
    begun_averages,
    carried,
    check_casts,
    places_for,
)
from statewise._src.core.transfer_match import OTHER, Found, difference, leaves_of
from statewise._src.core.usable import check_concrete_kinds
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import check_devices, copies_on, on_mesh, with_copies
from statewise.errors import DeclarationError, StructureError

__all__ = ["transfer"]


def transfer(
    src: State,
    target: Plan | State,
    *,
    kinds: str | Iterable[str] | None = None,
    cast: bool | jax.typing.DTypeLike = False,
    mesh: jax.sharding.Mesh | None = None,
) -> State:
    """Moves kinds of one state into a state of another plan, or on another mesh.

    Args:
      src: the state that has the values; it stays usable.
      target: what the values go into: a state, whose other kinds are kept (an actor's cache), or a plan, where all of
        its kinds come from `src`.  Leaves are matched by path; an optimizer that the target does not have stays behind.
      kinds: the target's kinds to fill, one name or several; by default all that have leaves.
      cast: allows other dtypes: True casts floats to floats and integers to integers, to what the target has; a
        floating-point dtype makes that the dtype of the target's floating-point numbers in these kinds.
      mesh: where the values go to lie, as the target's `shardings` says; by default where the target's own arrays lie,
        or, for a plan, where the source's do.

    Averages (`sw.EMA`) of a kind that moves begin again, as copies of what has moved, unless they move as well.  The
    target's optimizer keeps its state.  Inside `jax.jit` no value is known: there a cast may lose numbers.

    Returns:
      a state of the target's plan; with `cast=dtype`, of that plan in this dtype.

    Raises:
      StructureError: leaves that the source does not have, or has of another type, shape or dtype, or tied otherwise;
        all are listed, and nothing has moved.  Values of each device where one is wanted; a donated or abstract source;
        a cast that would lose numbers.
      DeclarationError: a kind that is not there; a cast that is not a floating-point dtype.
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
    names = _kinds(plan, into, kinds)
    if not isinstance(cast, bool):
        plain = abstract(with_copies(plan, None))
        plan = with_copies(cast_state(plain, dict.fromkeys(names, cast)).tables, plan.per_device)
    if into is None and mesh is None:
        mesh = _own_mesh(src.tables, plan)
    if mesh is not None:
        plan = _on_mesh(plan, into, mesh)
    if into is not None:
        check_not_batch(into)
    moves = _matched(src.tables, plan, names, cast is not False)
    devices = plan.per_device.devices if plan.per_device is not None else 0
    used = tuple(kind for kind in src.tables.kinds if any(move.kind == kind for move in moves))
    check_not_donated(src, used)
    check_fits(src, used)
    _check_abstract(src, used)
    places = places_for(plan, into, names, mesh)
    taken = {kind: arrays_in_order(src.tables, kind, src.part(kind).arrays) for kind in used}
    check_casts(plan, moves, taken)
    parts: dict[str, list[Any]] = {kind: [] for kind in names}
    for move in moves:
        place = places[move.to][len(parts[move.to])] if move.to in places else None
        count, axis = devices if move.spreads else 0, plan.by_kind[move.to][len(parts[move.to])].axis
        parts[move.to].append(carried(taken[move.kind][move.position], move.spec, place, count, axis))
    parts |= begun_averages(plan, into, parts, mesh)
    return State.wrap(arrived(plan, into, parts, places))


def _target(src: object, target: object) -> tuple[PlanTables, StateData | None]:
    if not isinstance(src, StateData):
        raise StructureError(
            f"sw.transfer moves out of a state, not {type(src).__name__}.",
            hint="sw.transfer(plan.take(model), target)",
        )
    if isinstance(target, StateData):
        return target.tables, target
    if not isinstance(target, Plan):
        raise StructureError(
            f"sw.transfer moves into a plan or a state, not {type(target).__name__}.",
            hint="sw.transfer(src, plan), or sw.transfer(src, plan.take(model), kinds='params')",
        )
    return tables_of(target), None


def _own_mesh(src: PlanTables, plan: PlanTables) -> Any:
    """The mesh of per-device values where none is named: the target's own, or the source's where it is to have some."""
    if plan.per_device is not None:
        return plan.per_device.mesh
    if src.per_device is not None and copies_on(plan, src.per_device.mesh) is not None:
        return src.per_device.mesh
    return None


def _on_mesh(plan: PlanTables, into: StateData | None, mesh: Any) -> PlanTables:
    """The target's plan on a mesh, where some of it may lie per device."""
    check_devices(mesh)
    there = on_mesh(plan, mesh)
    if into is not None and there is not plan:
        raise StructureError(
            "The state that is the target has kinds that lie per device, or would have on this mesh: they cannot stay "
            "where they are.",
            hint="sw.transfer(src, kinds.plan(model), mesh=mesh)  # all of it, into the plan",
        )
    return there


def _kinds(plan: PlanTables, into: StateData | None, kinds: Any) -> tuple[str, ...]:
    """The kinds to fill, in the order of the target."""
    filled = tuple(kind for kind, specs in plan.specs.items() if specs)
    if kinds is None:
        return filled
    names = names_given(kinds, "kinds")
    for name in names:
        if name not in plan.kinds:
            raise unknown_kind(name, plan.kinds)
    if names and not set(names) & set(filled):
        raise DeclarationError(
            f"kinds={kinds!r} names no kind that has leaves.", hint=f"those that have: {', '.join(filled)}"
        )
    # Averages of what moves begin with it.
    begun = [kind for kind, ones in averages_of(plan, names).items() if all(one.kind in names for one, _ in ones)]
    left = [kind for kind in filled if kind not in (*names, *begun)] if into is None else []
    if left:
        raise StructureError(
            f"A plan has no values of its own, and nothing gives any for {', '.join(left)}.",
            leaves=[leaf for kind in left for leaf in plan[kind]],
            kind=left[0] if len(left) == 1 else None,
            hint=f"sw.transfer(src, plan.take(model), kinds={names!r})  # keeps the state's other kinds",
        )
    return tuple(kind for kind in filled if kind in names)


# --- what comes from where ---------------------------------------------------------------------------------------


def _matched(src: PlanTables, plan: PlanTables, names: Sequence[str], cast: bool) -> list[Move]:
    """The move of each array of these kinds, in the order of the target's parts.

    Raises:
      StructureError: everything that does not fit, at once.
    """
    have: dict[Path, Found] = {}
    for found in leaves_of(src):
        have |= dict.fromkeys((found.leaf.path, *found.leaf.aliases), found)
    wanted = [one for one in leaves_of(plan) if one.leaf.kind in names]
    numbered = _renumbering(src, plan, wanted, have)
    moves: dict[str, list[Move]] = {name: [] for name in names}
    problems = Problems()
    for one in wanted:
        paths = [numbered(path) for path in (one.leaf.path, *one.leaf.aliases)]
        sources = {id(have[path]): have[path] for path in paths if path in have}
        note, hint = difference(one, list(sources.values()), cast)
        if note:
            problems.add(one.leaf, note, hint)
            continue
        (found,) = sources.values()
        kind, to = found.leaf.kind or "", one.leaf.kind or ""
        spreads = one.devices > found.devices
        moves[to] += [Move(to, kind, found.start + at, spec, spreads) for at, spec in enumerate(one.specs)]
    missing = note_of(MISSING, "source")
    if any(leaf.note == missing for leaf in problems.leaves):
        wrong = {leaf.kind for leaf in problems.leaves}
        problems.hint(_hint_missing([kind for kind in names if kind not in wrong]))
    problems.raise_as(StructureError, "The source is not what the target wants: {n} leaves differ.")
    return [move for part in moves.values() for move in part]


def _hint_missing(whole: Sequence[str]) -> str:
    """The kinds of which the source has all leaves, as code; where there are none the models differ."""
    return (
        OTHER if not whole else f"name the kinds that the source has: sw.transfer(src, state, kinds={tuple(whole)!r})"
    )


def _renumbering(src: PlanTables, plan: PlanTables, wanted: Sequence[Found], have: Mapping[Path, Found]) -> Any:
    """From a path in the target to that in the source, where their objects are not called alike.

    A learner's plan is often of a model and its optimizer, an actor's of the model alone: the one object is then that
    of the several which has most of the leaves.  Objects with names are those without in the order of the names.
    """
    paths = [one.leaf.path for one in wanted]
    if src.several and plan.several:
        if bool(src.names) == bool(plan.names):
            return lambda path: path
        calls = dict(zip(plan.object_labels, src.object_labels, strict=False))
        return lambda path: _recalled(path, calls, have)
    if not src.several and not plan.several:
        return lambda path: path
    if src.several:
        best = _object_of(src, wanted, have)
        return lambda path: (best, *path)
    best = max(plan.object_labels, key=lambda at: sum(path[0] == at and path[1:] in have for path in paths))
    return lambda path: path[1:] if path[0] == best else (None, *path)


def _recalled(path: Path, calls: Mapping[Any, Any], have: Mapping[Path, Found]) -> Path:
    """A path with the other plan's name for its object: the first key, and of what is derived one further in."""
    ways = [(*path[:at], calls[key], *path[at + 1 :]) for at, key in enumerate(path) if key in calls]
    return next((way for way in ways if way in have), path if path in have else (ways or [path])[0])


def _object_of(src: PlanTables, wanted: Sequence[Found], have: Mapping[Path, Found]) -> Any:
    """The object of the source that the target is; of a model and its teacher nothing but a kind tells which."""
    theirs = {at: [(one, have.get((at, *one.leaf.path))) for one in wanted] for at in src.object_labels}

    def score(at: Any) -> tuple[int, int, int]:
        pairs = [(one, found) for one, found in theirs[at] if found is not None]
        fit = [one.leaf.type is found.leaf.type and one.leaf.shape == found.leaf.shape for one, found in pairs]
        return sum(fit), sum(one.leaf.kind == found.leaf.kind for one, found in pairs), len(pairs)

    best = max(theirs, key=score)
    equal = [at for at in theirs if score(at) == score(best)]
    if score(best)[0] and len({tuple(id(found) for _, found in theirs[at]) for at in equal}) > 1:
        raise StructureError(
            f"The target may be any of the source's objects {', '.join(map(str, equal))}: they fit alike.",
            hint=f"one = src.plan.build(src)[{list(theirs).index(best)}]\nsw.transfer(sw.plan(one).take(one), target)",
        )
    return best


def _check_abstract(src: StateData, kinds: Sequence[str]) -> None:
    check_concrete_kinds(
        src,
        kinds,
        "transfer",
        "src = plan.take(model)  # or restore into it: src, report = sw.restore(path, src)",
        subject="The source",
    )
