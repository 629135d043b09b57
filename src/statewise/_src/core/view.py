"""One kind's arrays as a pytree, nested by path, and back.

`state["cache"]` shows a part as NNX would: an `nnx.State` of plain arrays.  What a user gives instead of it
(`state.replace(cache=...)`) is matched by path, and every disagreement is listed.
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
from statewise._src.common.nnx_graph import ArraySpec, is_deleted, raw_value, spec_of, value_of
from statewise._src.common.paths import Leaf, Path, plain_key
from statewise._src.common.problems import Problems
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["arrays_for", "packed_for", "unpacked_of", "view"]


def view(plan: PlanTables, kind: str, arrays: Sequence[Any]) -> Any:
    """One kind's arrays, given in the order of the plan, nested by path."""
    flat: list[Any] = [
        (row.path, value_of(arrays[span.start : span.stop], span.structure))
        for row, span in zip(plan.rows, plan.spans, strict=True)
        if row.kind == kind
    ]
    views: dict[str, Any] = {}
    for one in plan.derived_arrays:
        if one.derived.into == kind:
            own, layout, label = arrays[one.start : one.stop], one.derived.layout, one.derived.label
            if label is None:
                flat += zip(layout.paths, own, strict=True)
            else:
                views[label] = jax.tree.unflatten(layout.structure, own)
    objects = nnx.from_flat_state(flat)
    if not views:
        return objects
    return {"objects": objects, **views} if flat else views


def unpacked_of(plan: PlanTables, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
    """A kind's arrays in the order of the plan, of an ensemble or, inside of `jax.vmap`, of one member."""
    members = plan.ensemble
    return (plan if members is None or not _of_one(plan, kind, part) else members.single).unpack(kind, part)


def _of_one(plan: PlanTables, kind: str, part: Sequence[Any]) -> bool:
    """Whether a part of an ensemble's plan holds the arrays of one member."""
    assert plan.ensemble is not None, "asked of an ensemble"
    ones = plan.ensemble.single.stored_specs[kind]
    pairs = zip(part, ones, plan.slot_axes[kind], strict=True)
    return any(getattr(array, "shape", None) == one.shape for array, one, axis in pairs if axis is not None)


def packed_for(plan: PlanTables, kind: str, given: Any, part: Sequence[Any]) -> tuple[Any, ...]:
    """What stands in the slots of a kind's part, of what is given in the place of its view.

    Args:
      plan: the plan.
      kind: the kind.
      given: what is given.
      part: what stands there now; inside of `jax.vmap` it is of one member, and so is what replaces it.

    Raises:
      StructureError: leaves missing, unexpected, of another shape or dtype, or donated; all are listed.
    """
    if plan.ensemble is not None and _of_one(plan, kind, part):
        plan = plan.ensemble.single
    return plan.pack(kind, arrays_for(plan, kind, given))


def arrays_for(plan: PlanTables, kind: str, given: Any) -> tuple[Any, ...]:
    """The arrays, in the order of the plan, of what is given in the place of a view.

    Raises:
      StructureError: leaves missing, unexpected, of another shape or dtype, or donated; 64-bit numbers of NumPy that
        JAX would lose; all are listed.
    """
    structure, slots = _layout(plan, kind)
    specs = plan.held_specs[kind]
    leaves, found = jax.tree.flatten(given)
    if found != structure:
        keyed = {_plain(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(_unwrapped(given))[0]}
        leaves = [keyed.pop(keys, None) for keys, _ in slots]
    else:
        keyed = {}
    arrays: list[Any] = [None] * len(specs)
    problems = Problems()
    for (_, position), array in zip(slots, leaves, strict=True):
        mismatches = compare_leaf(LeafFacts(None, (specs[position],)), _facts(array))
        if mismatches:
            problems.add(plan.leaf_of_array[kind][position], note_of(mismatches, "replacement"))
        arrays[position] = array
    for keys, array in keyed.items():
        spec = spec_of(array) or ArraySpec((), None)
        type_ = jax.Array if isinstance(array, jax.Array) else type(array)
        problems.add(Leaf(keys, kind, type_, spec.shape, spec.dtype), note_of(UNEXPECTED, "replacement"))
    problems.raise_as(
        StructureError,
        f"What replaces kind {kind!r} does not fit the plan.",
        f"jax.tree.map(function, state[{kind!r}]) keeps the structure",
    )
    leaves = plan.leaf_of_array[kind]
    check_given(
        (leaf, array, spec.dtype)
        for leaf, array, spec in zip(leaves, arrays, specs, strict=True)
        if not isinstance(array, jax.Array)
    )
    return tuple(map(_as_array, arrays))


@functools.lru_cache(maxsize=256)
def _layout(plan: PlanTables, kind: str) -> tuple[Any, list[tuple[Path, int]]]:
    """The structure of a view, and for each array in it its keys and its position in the part."""
    order, structure = jax.tree_util.tree_flatten_with_path(view(plan, kind, range(len(plan.specs[kind]))))
    return structure, [(_plain(keys), position) for keys, position in order]


def _plain(keys: Sequence[Any]) -> Path:
    return tuple(map(plain_key, keys))


def _unwrapped(given: Any) -> Any:
    """Variables give way to what they hold: `nnx.state(model, ...)` is as good as `state[kind]`."""
    return jax.tree.map(raw_value, given, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _as_array(value: Any) -> Any:
    return value if isinstance(value, jax.ShapeDtypeStruct) else jnp.asarray(value)


def _facts(array: Any) -> LeafFacts | None:
    if array is None:
        return None
    spec = None if compat.reference(array) else spec_of(array)
    return LeafFacts(None, (spec or type(array),), donated=is_deleted(array))
