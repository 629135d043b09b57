"""Variables that a function made, removed or replaced, which a state cannot keep.

A state has the leaves that were planned.  New leaves are returned beside the step's output if the step captures their
kind, whether they were sown or assigned; everything else is rejected, with the declaration that would allow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ONE, is_array, make_leaf, numbered, row_of
from statewise._src.common.paths import Leaf, Path, format_type
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import has_hijax, out_of_model
from statewise._src.filters.explain import as_code
from statewise._src.filters.primitives import Exactly
from statewise._src.plan.leaf_specs import LeafSpec
from statewise._src.plan.match import claimants, free_name
from statewise._src.plan.tables import PlanTables
from statewise._src.step.capture import Capture
from statewise._src.step.graft import part_at
from statewise.errors import StructureError

__all__ = ["assigned", "leaf_of"]


_MADE, _REMOVED, _REPLACED = "made by the function", "removed", "replaced by another Variable"


def assigned(
    plan: PlanTables,
    objects: Sequence[Any],
    before: Sequence[Any],
    live: Mapping[Path, Any],
    capture: Capture,
    name: str,
) -> frozenset[Path]:
    """Returns the paths of the planned leaves that the function replaced and that the step captures.

    Their kinds are ephemeral: the old value came from an earlier call, and stays in the state.

    Raises:
      StructureError: the function made, removed or replaced leaves that the step does not capture; lists all of them.
    """
    problems = Problems()
    captured: set[Path] = set()
    root = objects if plan.several else objects[0]
    for row, leaf_before in zip(plan.rows, before, strict=True):
        now = live.get(row.path)
        if now is None or (isinstance(leaf_before, nnx.Variable) and now is not leaf_before):
            if now is not None and type(now) is type(leaf_before) and _is_bridged(root, numbered(row.path, plan.names)):
                continue
            # The leaf of an ephemeral kind belongs to an earlier call; this call's is returned beside the output.
            if not plan.kinds[row.kind].saved and capture.takes(row, now):
                captured.add(row.path)
            else:
                problems.add(leaf_of(row, _REMOVED if now is None else _REPLACED))
        elif not isinstance(now, nnx.Variable) and not is_array(now):
            problems.add(leaf_of(row, f"replaced by {type(now).__name__}"))
    planned = {row.path for row in plan.rows}
    for path, leaf in live.items():
        if path not in planned and not capture.claims(path, leaf):
            problems.add(row_of(path, leaf), _MADE)
    if problems:
        raise StructureError(
            f"{name} changes which Variables the model has; a state cannot take new ones.",
            leaves=problems.leaves,
            hint="\nor, ".join(_hints(plan, problems.leaves, live)),
        )
    return frozenset(captured)


def leaf_of(row: LeafSpec, note: str) -> Leaf:
    """Returns a planned leaf as data."""
    return make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, note=note)


def _is_bridged(objects: Any, path: Path) -> bool:
    """Returns whether a leaf belongs to a Linen module in `nnx.bridge.ToNNX`, which writes by replacing Variables."""
    return any(isinstance(part_at(objects, path[:depth]), nnx.bridge.ToNNX) for depth in range(len(path)))


# --- the declaration that would allow it -----------------------------------------------------------------------

# Values of these types persist from call to call, so they must be in the state, and therefore in the plan.
_KEPT = (nnx.Param, nnx.BatchStat, nnx.Cache, nnx.RngState, nnx.OptState, compat.MetricState)


_ASSIGN = "assign values, not Variables: self.count[...] = self.count[...] + 1"


def _hints(plan: PlanTables, problems: Sequence[Leaf], live: Mapping[Path, Any]) -> list[str]:
    added = [leaf for leaf in problems if leaf.note == _MADE]
    replaced = [leaf for leaf in problems if leaf.note == _REPLACED]
    hints = []
    new = [dataclasses.replace(leaf, type=compat.variable_type(live[leaf.path])) for leaf in added + replaced]
    for_a_call = next((leaf for leaf in new if _is_for_a_call(leaf.type)), None)
    if any(plan.kinds[leaf.kind or ""].saved for leaf in replaced):
        hints.append(_ASSIGN)
    if for_a_call:
        hints.append(_captured(plan, for_a_call))
    if added and not all(_is_for_a_call(leaf.type) for leaf in added):
        hints.append("make the Variable before the plan (with model.init_cache(...), for example)")
    left_behind = next((leaf for leaf in problems if leaf.note == _REMOVED and _is_for_a_call(leaf.type)), None)
    if left_behind:
        hints.append(_taken_out(plan, left_behind))
    return hints or [_ASSIGN]


def _taken_out(plan: PlanTables, leaf: Leaf) -> str:
    """Returns the code that takes a leaf which an earlier call left out of a model."""
    keys = plan.relative(leaf.path)
    place = "".join(f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]" for key in keys)
    return out_of_model(
        f"nnx.pop(model, {as_code(Exactly(leaf.type))})",
        f"model{place}" if has_hijax(plan.graphdef) else None,
        "before planning: an earlier call left it there, and every call makes it",
    )


def _is_for_a_call(type_: type) -> bool:
    """Returns whether leaves of this type may belong to one call (losses, activations; not weights, counters ...)."""
    return issubclass(type_, nnx.Variable) and type_ is not nnx.Variable and not issubclass(type_, _KEPT)


def _captured(plan: PlanTables, leaf: Leaf) -> str:
    """Returns, as code, the declaration under which a step returns such a leaf."""
    names = claimants(plan.kinds)(plan.relative(leaf.path), object.__new__(leaf.type))
    only = names[0] if len(names) == 1 else None
    if only and not plan.kinds[only].saved:
        return f"capture={only!r}  # in the step's decorator: returns what is sown or assigned beside the output"
    sown = issubclass(leaf.type, nnx.Intermediate)
    of = nnx.Intermediate if sown else leaf.type
    name, type_ = free_name(plan.kinds, "sown" if sown else format_type(of).strip("_").lower()), as_code(of)
    # If no kind claims the type, it gets one; if the kind that does holds nothing else, that one becomes ephemeral;
    # otherwise the type is taken out of it.
    if only is None or plan.kinds[only].rest:
        line = f"kinds = kinds | sw.Kinds({name}=sw.Kind({type_}, saved=False))"
    elif all(issubclass(row.type, of) for row in plan.rows if row.kind == only):
        line, name = f"kinds = kinds.replace({only}=dataclasses.replace(kinds[{only!r}], saved=False))", only
    else:
        rest = f"dataclasses.replace(kinds[{only!r}], of=nnx.All(kinds[{only!r}].of, nnx.Not({type_})))"
        line = f"kinds = kinds.replace({only}={rest}) | sw.Kinds({name}=sw.Kind({type_}, saved=False))"
    return f"{line}\ncapture={name!r}  # in the step's decorator"
