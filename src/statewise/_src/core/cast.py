"""States in other dtypes: a cast state has a new plan, with the new dtypes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import WIDER, Casts, refuse
from statewise._src.common.nnx_graph import ArraySpec, is_abstract
from statewise._src.core.member_view import as_ensemble, as_one, is_of_one_member
from statewise._src.core.part import Part
from statewise._src.core.state_data import StateData, StateT, check_not_donated
from statewise._src.core.versions import settle
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import with_copies
from statewise.errors import DeclarationError, StructureError

__all__ = ["arrays_in_order", "as_dtype", "cast", "parts_for"]


def cast(state: StateT, dtypes: Mapping[str, object]) -> StateT:
    """Implements `State.cast`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, cast(as_one(state), dtypes))
    plan = state.tables
    parts = {kind: state.part(kind).arrays for kind in dtypes}
    wanted = {kind: _floating(kind, dtype) for kind, dtype in dtypes.items()}
    check_not_donated(state, wanted)
    # A float may become another float; a complex number would lose its imaginary part.
    floats = {
        kind: [info for info in plan.by_kind[kind] if jnp.issubdtype(info.spec.dtype, jnp.floating)] for kind in wanted
    }
    arrays = {kind: list(arrays_in_order(plan, kind, part)) for kind, part in parts.items()}
    _check_no_loss(wanted, floats, arrays)
    specs = {kind: list(plan.specs[kind]) for kind in wanted}
    for kind, dtype in wanted.items():
        for info in floats[kind]:
            arrays[kind][info.position] = as_dtype(arrays[kind][info.position], dtype)
            specs[kind][info.position] = ArraySpec(info.spec.shape, dtype)
    target = with_copies(plan.with_specs(specs), plan.per_device)
    new = parts_for(target, state, arrays)
    settle(target, state.parts, new)
    return state.make(target, new)


def _check_no_loss(
    wanted: Mapping[str, Any], floats: Mapping[str, Sequence[ArrayInfo]], arrays: Mapping[str, Sequence[Any]]
) -> None:
    casts = {kind: Casts() for kind in wanted}
    for kind, dtype in wanted.items():
        for info in floats[kind]:
            casts[kind].add(info.leaf, arrays[kind][info.position], dtype)
    lost = {kind: planned.lost() for kind, planned in casts.items()}
    dtypes = {kind: casts[kind].holding(WIDER) if leaves else wanted[kind] for kind, leaves in lost.items()}
    shown = ", ".join(f"{kind}={str(dtype)!r}" for kind, dtype in dtypes.items() if dtype is not None)
    hint = f"state.cast({shown})" if shown else "leave the kind out: only its own dtype can represent its numbers"
    refuse([leaf for leaves in lost.values() for leaf in leaves], StructureError, hint)


def as_dtype(array: Any, dtype: Any) -> Any:
    """Returns an array, or a shape, in a dtype; itself if that is its own."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=dtype)
    return array if array.dtype == dtype else jax.lax.convert_element_type(array, dtype)


def arrays_in_order(plan: PlanTables, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a kind's arrays in the order of the plan, from the slots of its part."""
    if kind not in plan.packing or is_abstract(part):
        return plan.unpack(kind, part)
    return _packing_program(plan, kind, False)(part)


def parts_for(plan: PlanTables, state: StateData | None, arrays: Mapping[str, Sequence[Any]]) -> list[Part]:
    """Returns parts for another plan of the same kinds.

    Args:
      plan: the plan.
      state: a state, which keeps the parts of all other kinds; None if there are none.
      arrays: arrays in the order of the plan, for some kinds.
    """
    parts = []
    for kind in plan.kinds:
        if kind in arrays:
            part = Part(_packed(plan, kind, tuple(arrays[kind])))
        elif state is None:
            part = Part(())
        else:
            part = state.part(kind)
            # Packing follows dtypes: those of another kind may have changed which arrays share a buffer.
            if plan.packing.get(kind) != state.tables.packing.get(kind):
                version = part.version()
                part = Part(_packed(plan, kind, arrays_in_order(state.tables, kind, part.arrays)))
                part.known_version = version
        parts.append(part)
    return parts


def _packed(plan: PlanTables, kind: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    if kind not in plan.packing or is_abstract(arrays):
        return plan.pack(kind, arrays)
    return _packing_program(plan, kind, True)(arrays)


@functools.lru_cache(maxsize=256)
def _packing_program(plan: PlanTables, kind: str, pack: bool) -> Any:
    """Returns a compiled function that packs or unpacks a kind's arrays on the device: fast even for a few calls."""
    return jax.jit(lambda arrays: (plan.pack if pack else plan.unpack)(kind, tuple(arrays)))


def _floating(kind: str, given: Any) -> Any:
    """Returns a floating-point dtype, checked."""
    try:
        dtype = None if given is None else jnp.dtype(given)
    except (TypeError, ValueError):  # NumPy reads a dict as a dtype with fields
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = repr(given) if isinstance(given, (str, type)) or given is None else f"a {type(given).__name__}"
        raise DeclarationError(
            f"Kind {kind!r} cannot be cast to {shown}: it is not a floating-point dtype.",
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
