"""A state in other dtypes: a state of a new plan, which has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import Casts, refuse
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.core.member_view import as_ensemble, as_one, is_of_one_member
from statewise._src.core.state_data import Part, StateT, check_not_donated
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import with_copies
from statewise.errors import DeclarationError, StructureError

__all__ = ["WIDER", "cast", "recast"]


def cast(state: StateT, dtypes: Mapping[str, Any]) -> StateT:
    """See `State.cast`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, cast(as_one(state), dtypes))
    plan = state.tables
    for kind in dtypes:
        state.part(kind)
    wanted = {kind: _floating(kind, given) for kind, given in dtypes.items()}
    check_not_donated(state, wanted)
    parts = {kind: plan.unpack(kind, state.part(kind).arrays) for kind in wanted}
    # A float may become another float; complex numbers would lose a half.
    floats = {kind: [jnp.issubdtype(spec.dtype, jnp.floating) for spec in plan.specs[kind]] for kind in wanted}
    _check(plan, wanted, parts, floats)
    specs, made = {}, {}
    for kind, dtype in wanted.items():
        arrays = tuple(
            _cast(array, dtype) if is_float else array
            for array, is_float in zip(parts[kind], floats[kind], strict=True)
        )
        specs[kind] = [ArraySpec(spec.shape, array.dtype) for spec, array in zip(plan.specs[kind], arrays, strict=True)]
        made[kind] = arrays
    return recast(state, with_copies(plan.with_specs(specs), plan.per_device), made)


def _check(plan: PlanTables, wanted: Mapping[str, Any], parts: Mapping[str, Any], floats: Mapping[str, Any]) -> None:
    """Refuses a cast that loses numbers."""
    casts = {kind: Casts() for kind in wanted}
    for kind, dtype in wanted.items():
        for leaf, array, is_float in zip(plan.leaf_of_array[kind], parts[kind], floats[kind], strict=True):
            if is_float:
                casts[kind].add(leaf, array, dtype)
    lost = {kind: one.lost() for kind, one in casts.items()}
    held = {kind: casts[kind].holding(WIDER) if leaves else wanted[kind] for kind, leaves in lost.items()}
    shown = ", ".join(f"{kind}={str(dtype)!r}" for kind, dtype in held.items() if dtype is not None)
    hint = f"state.cast({shown})" if shown else "leave the kind out: its numbers are of its own dtype alone"
    refuse([leaf for leaves in lost.values() for leaf in leaves], StructureError, hint)


# What may hold the numbers that another dtype does not, the smallest first.
WIDER = ("bfloat16", "float32", "float64")


def _cast(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=dtype)
    return jax.lax.convert_element_type(array, dtype)


def recast(state: StateT, plan: PlanTables, arrays: Mapping[str, tuple[Any, ...]]) -> StateT:
    """A state of another plan of the same leaves, with these arrays (in order) in some kinds; the rest is shared."""
    old, made = state.tables, []
    for kind, part in zip(old.kinds, state.parts, strict=True):
        if kind in arrays:
            made.append(Part(plan.pack(kind, arrays[kind])))
        elif plan.packing.get(kind) == old.packing.get(kind):
            made.append(part)
        else:  # another kind's dtypes have changed which arrays go together
            made.append(Part(plan.pack(kind, old.unpack(kind, part.arrays))))
    return state.make(plan, made)


def _floating(kind: str, given: Any) -> Any:
    try:
        dtype = None if given is None else jnp.dtype(given)
    except (TypeError, ValueError):  # a dict is a dtype of fields to NumPy
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise DeclarationError(
            f"Kind {kind!r} cannot be cast to {_shown(given)}: no floating-point dtype.",
            kind=kind,
            hint=f"cast({kind}='bfloat16')",
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise DeclarationError(
            f"Kind {kind!r} cannot be cast to {dtype}: this process has no 64-bit numbers.",
            kind=kind,
            hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
        )
    return dtype


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, (str, type)) or given is None else f"a {type(given).__name__}"
