"""One kind's arrays as a pytree, nested by path, and back.

`state["cache"]` shows a part as NNX would: nested by path, in the container of `nnx.state`.  What a user passes instead
of it (`state.replace(cache=...)`) is matched by path, and every difference is listed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compare import UNEXPECTED, LeafFacts, compare_leaf, note_of
from statewise._src.common.narrowing import check_given
from statewise._src.common.nested_state import nested
from statewise._src.common.nnx_graph import ArraySpec, is_deleted, raw_value, spec_of, value_of
from statewise._src.common.paths import Leaf, Path, plain_key
from statewise._src.common.problems import Problems
from statewise._src.core.member_view import is_part_of_one_member, single_of
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["arrays_for", "packed_for", "unpacked_of", "view"]


def view(plan: PlanTables, kind: str, arrays: Sequence[Any]) -> Any:
    """Returns one kind's arrays, given in the order of the plan, nested by path."""
    flat: list[Any] = [
        (row.path, value_of(arrays[span.start : span.stop], span.structure))
        for row, span in zip(plan.rows, plan.spans, strict=True)
        if row.kind == kind
    ]
    # Optimizer state keeps the pytree that Optax made, under the label of its optimizer; averages are nested by path.
    views: dict[str, Any] = {}
    for placed in plan.derived_arrays:
        if placed.derived.into == kind:
            own, layout, label = arrays[placed.start : placed.stop], placed.derived.layout, placed.derived.label
            if label is None:
                flat += zip(layout.paths, own, strict=True)
            else:
                views[label] = jax.tree.unflatten(layout.structure, own)
    objects = nested(flat)
    if not views:
        return objects
    return {"objects": objects, **views} if flat else views


def _own_plan(plan: PlanTables, kind: str, part: Sequence[Any]) -> PlanTables:
    """Returns the plan that a part fits: inside `jax.vmap` that of one member, otherwise the plan itself."""
    return single_of(plan) if is_part_of_one_member(plan, kind, part) else plan


def unpacked_of(plan: PlanTables, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a kind's arrays in the order of the plan, of an ensemble or, inside `jax.vmap`, of one member."""
    return _own_plan(plan, kind, part).unpack(kind, part)


def packed_for(plan: PlanTables, kind: str, arrays: tuple[Any, ...], part: Sequence[Any]) -> tuple[Any, ...]:
    """Returns what a kind's part is to store, from `arrays_for`; `part` is what it stores now."""
    return _own_plan(plan, kind, part).pack(kind, arrays)


def arrays_for(plan: PlanTables, kind: str, given: Any, part: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a kind's arrays in the order of the plan, from arrays that replace its view.

    Args:
      plan: the plan.
      kind: the kind.
      given: the arrays, in the structure of the view.
      part: what the part stores now; inside `jax.vmap` it is of one member, and so is what replaces it.

    Raises:
      StructureError: leaves are missing, unexpected, of another shape or dtype, or donated, or JAX would narrow 64-bit
        NumPy numbers; lists all of them.
    """
    plan = _own_plan(plan, kind, part)
    structure, paths = _layout(plan, kind)
    infos = plan.by_kind[kind]
    leaves, given_structure = jax.tree.flatten(given)
    keyed: dict[Path, Any] = {}
    if given_structure != structure:
        # Not the structure of the view, but each leaf may be there: `nnx.state(model, ...)`, for one.
        keyed = {_plain(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(_unwrapped(given))[0]}
        leaves = [keyed.pop(path, None) for path, _ in paths]
    else:
        leaves = list(map(raw_value, leaves))  # a hijax Variable is a leaf of its own
    arrays: list[Any] = [None] * len(infos)
    problems = Problems()
    for (_, position), array in zip(paths, leaves, strict=True):
        mismatches = compare_leaf(LeafFacts(None, (infos[position].held,)), _facts(array))
        if mismatches:
            problems.add(infos[position].leaf, note_of(mismatches, "replacement"))
        arrays[position] = array
    # What was not taken out by a path of the view does not belong to it.
    for path, array in keyed.items():
        spec = spec_of(array) or ArraySpec((), None)
        type_ = jax.Array if isinstance(array, jax.Array) else type(array)
        problems.add(Leaf(path, kind, type_, spec.shape, spec.dtype), note_of(UNEXPECTED, "replacement"))
    problems.raise_as(
        StructureError,
        f"The replacement of kind {kind!r} does not fit the plan.",
        f"jax.tree.map(function, state[{kind!r}]) keeps the structure",
    )
    check_given(
        (info.leaf, array, info.held.dtype)
        for info, array in zip(infos, arrays, strict=True)
        if not isinstance(array, jax.Array)
    )
    return tuple(array if isinstance(array, jax.ShapeDtypeStruct) else jnp.asarray(array) for array in arrays)


@functools.lru_cache(maxsize=256)
def _layout(plan: PlanTables, kind: str) -> tuple[Any, list[tuple[Path, int]]]:
    """Returns the structure of a view, and for each array in it its path there and its position in the kind."""
    # A view of the positions themselves shows where flattening it puts each array.
    leaves, structure = jax.tree_util.tree_flatten_with_path(view(plan, kind, range(len(plan.specs[kind]))))
    return structure, [(_plain(keys), position) for keys, position in leaves]


def _plain(keys: Sequence[Any]) -> Path:
    return tuple(map(plain_key, keys))


def _unwrapped(given: Any) -> Any:
    """Returns a pytree with the values of its Variables: `nnx.state(model, ...)` is as good as `state[kind]`."""
    return jax.tree.map(raw_value, given, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _facts(array: Any) -> LeafFacts | None:
    if array is None:
        return None
    # A Ref has a shape and a dtype, but is not an array that a state could hold.
    spec = None if compat.reference(array) else spec_of(array)
    return LeafFacts(None, (spec or type(array),), donated=is_deleted(array))
