"""Checks of a traced step beyond its contract: that it trains something, and that its writes are not lost.

What certainly has no effect is rejected.  What may be intended is a `StatewiseWarning`, once for each trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.tables import PlanTables
from statewise._src.step.closures import Brought, brought, read_by
from statewise._src.step.contract import Contract
from statewise._src.step.dependence import differentiably_reached
from statewise._src.step.function import called_as
from statewise._src.step.outside_writes import instead_of
from statewise._src.step.trace import Traced, objects_of
from statewise.errors import StatewiseWarning, StructureError

__all__ = ["check_trains", "warnings_of"]


def _differentiated(plan: PlanTables, contract: Contract) -> dict[str, list[ArrayInfo]]:
    """Returns the non-empty arrays that are differentiated, by kind."""
    arrays_of: dict[str, list[ArrayInfo]] = {}
    for group in contract.groups:
        for array in plan.arrays_of(group).sources:
            if array.spec.size:
                arrays_of.setdefault(array.kind, []).append(array)
    return arrays_of


def _reaching(traced: Traced, arrays: Sequence[ArrayInfo]) -> bool:
    """Returns whether a gradient may pass from the loss to one of these arrays."""
    chosen = {array.number for array in arrays}
    # The jaxpr takes only what is read, and its first output is the loss.
    inputs = [number in chosen for number, is_read in enumerate(traced.effects.read) if is_read]
    return differentiably_reached(traced.effects.jaxpr, inputs)[0]


def _instead(plan: PlanTables, traced: Traced, fn: Any) -> list[tuple[Brought, str | None]]:
    """Returns the objects from outside that a function reads, each with the hint to use a planned one instead."""
    outside = read_by(traced.effects.jaxpr, traced.effects.consts, brought(fn))
    return [(used, instead_of(used, objects_of(plan), fn)) for used, _ in outside]


def check_trains(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> None:
    """Checks that some leaf that a train step differentiates reaches its loss.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      fn: the function.
      name: the step's name.

    Raises:
      StructureError: the step would train nothing.
    """
    arrays = [array for of_kind in _differentiated(plan, contract).values() for array in of_kind]
    if not arrays or _reaching(traced, arrays):
        return
    problems = Problems()
    for array in arrays:
        is_read = traced.effects.read[array.number]
        problems.add(array.leaf, "read, but no gradient passes" if is_read else "not read")
    outside = _instead(plan, traced, fn)
    fact = f"{name} trains nothing: no leaf that it differentiates reaches the loss."
    fact += "".join(f" The function reads {used}." for used, _ in outside)
    lines = [instead for _, instead in outside if instead]
    if any(traced.effects.read[array.number] for array in arrays):
        lines.append(
            "jax.lax.stop_gradient, argmax, rounding, comparisons and integers do not pass gradients: "
            f"sw.audit({called_as(name)}, state, ...)"
        )
    if not lines:
        lines.append("compute the loss from the function's arguments: return loss(model(x), y)")
        lines.append("if nothing should be trained: @sw.step")
    problems.raise_as(StructureError, fact, "\n".join(lines))


def warnings_of(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> list[StatewiseWarning]:
    """Returns the warnings about a step.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      fn: the function.
      name: the step's name.
    """
    lost = Problems()
    for kind, position in traced.lost_writes:
        lost.add(plan.by_kind[kind][position].leaf, "written under a plain jax.jit or jax.checkpoint")
    return [
        *_unwritten(plan, traced, contract, lost.leaves, name),
        *_dropped(traced, contract, lost.leaves, name),
        *_kinds_untrained(plan, traced, contract, name),
        *_all_from_outside(plan, traced, contract, fn, name),
    ]


_LOST = (
    "if it writes under a plain jax.jit or jax.checkpoint (of the model, in the step; or on one of its methods), "
    "the write is lost:\nnnx.jit instead of jax.jit, nnx.remat instead of jax.checkpoint\n"
    "likewise if the model is passed to jax.vmap, jax.lax.scan, jax.lax.cond ...: nnx.vmap, nnx.scan, nnx.cond ..."
)


def _unwritten(
    plan: PlanTables, traced: Traced, contract: Contract, lost: Sequence[Leaf], name: str
) -> list[StatewiseWarning]:
    """Returns a warning for each kind in `writes` that is never written."""
    # An optimizer writes its kinds even if the function does not.
    written = {kind for kind, _ in traced.written} | {kind for group in contract.groups for kind in group.kinds}
    return [
        StatewiseWarning(
            f"{name} declares that it writes {kind}, but never writes it.",
            leaves=[leaf for leaf in lost if leaf.kind == kind],
            kind=kind,
            hint=f"{_LOST}\nif it should not write {kind}: take {kind!r} out of writes",
        )
        for kind in contract.named
        if kind not in written and plan.specs[kind]
    ]


def _dropped(traced: Traced, contract: Contract, lost: Sequence[Leaf], name: str) -> list[StatewiseWarning]:
    """Returns a warning for lost writes to kinds that `_unwritten` does not report."""
    # `_unwritten` lists the lost writes of the kinds that are named and not written at all.
    reported = set(contract.named) - {kind for kind, _ in traced.written}
    leaves = [leaf for leaf in lost if leaf.kind not in reported]
    if not leaves:
        return []
    kinds = list(dict.fromkeys(leaf.kind for leaf in leaves))
    return [
        StatewiseWarning(
            f"{name} writes {', '.join(map(str, kinds))} under a plain jax.jit or jax.checkpoint, and the write is "
            "lost.",
            leaves=leaves,
            kind=kinds[0],
            hint="nnx.jit instead of jax.jit, nnx.remat instead of jax.checkpoint",
        )
    ]


def _kinds_untrained(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """Returns a warning for each differentiated kind of which no leaf reaches the loss, if other kinds do."""
    arrays_of = _differentiated(plan, contract)
    if len(arrays_of) < 2:
        return []
    unreached = [kind for kind, arrays in arrays_of.items() if not _reaching(traced, arrays)]
    if len(unreached) == len(arrays_of):
        return []  # `check_trains` rejects this
    untrained = []
    for kind in unreached:
        group = next(group for group in contract.groups if kind in group.kinds)
        others = tuple(kind for other in contract.groups if other is not group for kind in other.kinds)
        hint = f"@sw.train_step(wrt={others!r})" if len(group.kinds) == 1 else "a separate optimizer for each kind"
        untrained.append(
            StatewiseWarning(
                f"{name} differentiates {kind}, but no leaf of it reaches the loss: its optimizer sees only zeros.",
                leaves=list(dict.fromkeys(array.leaf for array in arrays_of[kind])),
                kind=kind,
                hint=f"if this step should not train it: {hint}",
            )
        )
    return untrained


def _all_from_outside(
    plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str
) -> list[StatewiseWarning]:
    """Returns a warning if a step that does not train reads nothing of its state, but an object from outside."""
    # Of a train step `check_trains` rejects this.
    if contract.trains or traced.written or any(traced.effects.read[: traced.inputs]):
        return []
    return [
        StatewiseWarning(
            f"{name} reads nothing of its state; it reads {used}, whose arrays are constants of the compiled step.",
            hint=instead,
        )
        for used, instead in _instead(plan, traced, fn)
        if instead  # an object of another type may well be a constant on purpose
    ]
