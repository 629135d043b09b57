"""A state in other dtypes: a state of a new plan, which has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statewise.errors import KindError
from statewise.inside import as_ensemble, as_one, is_of_one_member
from statewise.placement import with_copies
from statewise.plan import Plan
from statewise.scan import Spec
from statewise.state import Part, State, check_unspent, make_state

__all__ = ["can_cast", "cast", "recast"]

_FAMILIES = (jnp.floating, jnp.complexfloating, jnp.integer)


def can_cast(theirs: Any, ours: Any) -> bool:
    """Whether one dtype may become another: floats become floats, integers integers; else it is another number."""
    try:
        return any(jnp.issubdtype(jnp.dtype(theirs), one) and jnp.issubdtype(jnp.dtype(ours), one) for one in _FAMILIES)
    except TypeError:  # PRNG keys, and dtypes that JAX lacks
        return False


def cast(state: State, dtypes: Mapping[str, Any]) -> State:
    """See `State.cast`."""
    if is_of_one_member(state):
        return as_ensemble(state._plan._members, cast(as_one(state), dtypes))
    plan = state._plan
    specs, made = {}, {}
    for kind, given in dtypes.items():
        part = state.part(kind)
        dtype = _floating(kind, given)
        check_unspent(state, [kind])
        # A float may become another float; complex numbers would lose a half.
        arrays = tuple(
            _cast(array, dtype) if jnp.issubdtype(spec.dtype, jnp.floating) else array
            for array, spec in zip(plan._unpacked(kind, part.arrays), plan._specs[kind], strict=True)
        )
        specs[kind] = [Spec(spec.shape, array.dtype) for spec, array in zip(plan._specs[kind], arrays, strict=True)]
        made[kind] = arrays
    return recast(state, with_copies(plan._with_specs(specs), plan._copies), made)


def _cast(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=dtype)
    return jax.lax.convert_element_type(array, dtype)


def recast(state: State, plan: Plan, arrays: Mapping[str, tuple[Any, ...]]) -> State:
    """A state of another plan of the same leaves, with these arrays (in order) in some kinds; the rest is shared."""
    old, made = state._plan, []
    for kind, part in zip(old.kinds, state._parts, strict=True):
        if kind in arrays:
            made.append(Part(plan._packed(kind, arrays[kind])))
        elif plan._packing.get(kind) == old._packing.get(kind):
            made.append(part)
        else:  # another kind's dtypes have changed which arrays go together
            made.append(Part(plan._packed(kind, old._unpacked(kind, part.arrays))))
    return make_state(plan, made)


def _floating(kind: str, given: Any) -> Any:
    try:
        dtype = None if given is None else jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise KindError(
            f"Kind {kind!r} cannot be cast to {_shown(given)}: no floating-point dtype.",
            kind=kind,
            mend=f"cast({kind}='bfloat16')",
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise KindError(
            f"Kind {kind!r} cannot be cast to {dtype}: this process has no 64-bit numbers.",
            kind=kind,
            mend="jax.config.update('jax_enable_x64', True)  # before any array is made",
        )
    return dtype


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, (str, type)) or given is None else f"a {type(given).__name__}"
