"""`sw.merge_lora`: a state of the model without its LoRA adapters, which are folded into the kernels.

Which adapter belongs to which kernel, and what is not possible, is decided on abstract objects (`adapters`), before an
array is computed.  The plan of the result is made from those objects as any other plan is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import is_abstract, rebuild, value_of
from statewise._src.common.problems import Problems
from statewise._src.core.adapters import Pairs, PlainObjects, without_adapters
from statewise._src.core.batches import check_not_batch
from statewise._src.core.cast import arrays_in_order, parts_for
from statewise._src.core.part import Origin, Part
from statewise._src.core.plan import State
from statewise._src.core.state_data import StateData, check_fits, check_not_donated
from statewise._src.core.versions import NEVER, carry
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.kind import Kind
from statewise._src.plan.resolve import resolve_plan
from statewise._src.plan.spelled_paths import spelled
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise._src.sharding.explicit_axes import explicit_sharding
from statewise._src.sharding.resolve import on_mesh
from statewise.errors import DeclarationError, StatewiseError, StructureError

__all__ = ["merge_lora"]


def merge_lora(state: State) -> State:
    """Folds LoRA adapters into the kernels of their layers: `kernel + lora_a @ lora_b`.

    The result is a state of the model without adapters: an `nnx.LoRALinear` becomes an `nnx.Linear`, and an `nnx.LoRA`
    the `base_module` that it is around.  Its plan is that of such a model by the same kinds, and
    `state.plan.build(state)` makes one.  Several adapters around one layer, and layers that are stacked along their
    first axis, are folded too.

    Products and sums are computed in float32 (float64 if an array is), and then have the kernel's dtype and sharding.
    Everything else is shared with the given state, which does not change: a step that donates it in one state donates
    it in both.  Optimizers and averages are left out, because they belong to the training of the adapters;
    `state.with_averages(name)` merges averaged ones.  A kind that spells paths, and has none of them left, becomes
    `optional`.  Kinds that depend on what was merged, such as a cache, are stale.

    Args:
      state: a state of a model with adapters; an abstract one gives an abstract one.

    Returns:
      a state of the plain model's plan.

    Raises:
      StructureError: there are no adapters; or some cannot be folded, all of which are listed: without a base, around
        something that is not an `nnx.Linear`, of a class of one's own, or of a kernel that is also used without them.
        An ensemble, per-device values, a donated state; a kernel whose dtype cannot represent the sum.
      DeclarationError: the kinds do not fit the plain model: one spells the path of an adapter's base, for example.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.LoRALinear(3, 4, lora_rank=2, b_initializer=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> merged = sw.merge_lora(sw.plan(model).take(model))
      >>> merged.plan is sw.plan(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      True
      >>> bool(jnp.allclose(merged.plan.build(merged)(jnp.ones(3)), model(jnp.ones(3)), atol=1e-5))
      True
    """
    if not isinstance(state, StateData):
        raise StructureError(
            f"sw.merge_lora takes a state, not {type(state).__name__}.",
            hint="sw.merge_lora(sw.plan(model).take(model))",
        )
    tables = state.tables
    if tables.ensemble is not None:
        raise StructureError(
            "The adapters of an ensemble are merged member by member.",
            hint="merged = [sw.merge_lora(state.member(number)) for number in range(state.plan.members)]\n"
            "merged[0].plan.stacked(len(merged)).stack(merged)",
        )
    check_not_batch(state)
    check_not_donated(state, tables.kinds)
    check_fits(state, tables.kinds)
    base = tables.plain
    plain = without_adapters(base, _objects_of(base))
    _check_not_per_device(tables, plain.adapters)
    plan = _plan_of(tables, plain)
    arrays = _merged(state, plan, plain)
    return State.make(plan, _parts(state, plan, arrays))


def _objects_of(plan: PlanTables) -> tuple[Any, ...]:
    """Returns new objects of a plan, abstract but for raw arrays: NNX does not recognize shapes in their place."""
    values = [
        _placeholder(*row.specs[0])
        if row.type is jax.Array
        else value_of([jax.ShapeDtypeStruct(*spec) for spec in row.specs], row.structure)
        for row in plan.rows
    ]
    return rebuild(plan.graphdef, values, plan.several, plain=False)


def _placeholder(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns an array of this shape and dtype without memory of its own; JAX makes arrays of keys."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
    return jnp.zeros(shape, dtype) if is_key else np.broadcast_to(np.zeros((), dtype), shape)


def _check_not_per_device(plan: PlanTables, adapters: Mapping[int, Pairs]) -> None:
    """Checks that each kernel and each adapter has one value."""
    problems = Problems()
    for kernel, pairs in adapters.items():
        for number in (kernel, *(each for pair in pairs for each in pair)):
            if any(info.devices for info in _infos(plan, number)):
                leaf = plan.leaves[number]
                hint = f"sw.merge_lora(state.reduce_devices({leaf.kind!r}, how='mean'))  # or how='first'"
                problems.add(leaf, "has a value for each device", hint)
    problems.raise_as(StructureError, "{n} leaves have no single value to merge.")


def _infos(plan: PlanTables, number: int) -> Sequence[ArrayInfo]:
    span = plan.spans[number]
    return plan.by_kind[span.kind][span.start : span.stop]


def _plan_of(tables: PlanTables, plain: PlainObjects) -> PlanTables:
    """Returns the plan of objects without adapters, by the same kinds, packed and per device as the plan with them."""
    kinds = _declared(tables, {tables.rows[number].kind for number in plain.numbers})
    named = dict(zip(plain.names, plain.objects, strict=True)) if plain.names else {}
    try:
        plan = resolve_plan(kinds, () if named else plain.objects, named=named)
    except StatewiseError as error:
        raise DeclarationError(
            f"The kinds do not fit the model without adapters. {error.message}",
            leaves=error.leaves,
            kind=error.kind,
            hint="sw.merge_lora(sw.transfer(state, kinds.plan(model)))  # with kinds that fit both models",
        ) from error
    if tables.packing:
        plan = plan.with_packing(tuple(kind for kind in tables.packing if kind in plan.kinds))
    return plan if tables.per_device is None else on_mesh(plan, tables.per_device.mesh)


def _declared(tables: PlanTables, claimed: set[str]) -> Any:
    """Returns the kinds as they were declared, without those that optimizers and averages added."""
    averages = {average.into for average in tables.averages}
    kinds = {name: kind for name, kind in tables.kinds.items() if name not in averages}
    # A plan adds this kind at the end if none was declared.
    if tables.optimizers and list(kinds)[-1] == OPTIMIZER and kinds[OPTIMIZER] == Kind(nnx.OptState):
        del kinds[OPTIMIZER]
    lost = {row.kind for row in tables.rows} - claimed
    for name in lost & set(kinds):
        if any(not path.negated for path in spelled(kinds[name].of)):
            kinds[name] = dataclasses.replace(kinds[name], optional=True)
    declaration: Any = type(tables.kinds)  # a user's `Kinds`
    return declaration(**kinds)


# --- arrays --------------------------------------------------------------------------------------------------------


def _merged(state: StateData, plan: PlanTables, plain: PlainObjects) -> dict[str, list[Any]]:
    """Returns the arrays of each kind of the plain plan, in its order."""
    old = state.tables
    own = {kind: arrays_in_order(old, kind, state.part(kind).arrays) for kind in old.kinds}

    def arrays_of(number: int) -> tuple[Any, ...]:
        span = old.spans[number]
        return own[span.kind][span.start : span.stop]

    arrays: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    held: dict[int, Any] = {}
    for number, row in zip(plain.numbers, plan.rows, strict=True):
        pairs = plain.adapters.get(number)
        if pairs is None:
            arrays[row.kind].extend(arrays_of(number))
            continue
        (kernel,) = arrays_of(number)
        merged, holds = _fold(kernel, [tuple(arrays_of(each)[0] for each in pair) for pair in pairs])
        arrays[row.kind].append(merged)
        held[number] = holds
    _check_held(old, held)
    return arrays


def _fold(kernel: Any, pairs: Sequence[tuple[Any, ...]]) -> tuple[Any, Any]:
    """Returns a kernel with its adapters, and whether its dtype can represent all numbers of the sum."""
    if is_abstract((kernel, *(array for pair in pairs for array in pair))):
        return kernel, True
    if isinstance(kernel, jax.Array) and not isinstance(kernel, compat.Tracer):
        return _program(kernel.sharding)(kernel, [_beside(kernel, *pair) for pair in pairs])
    return _sum(kernel, pairs)


def _beside(kernel: jax.Array, *arrays: Any) -> tuple[Any, ...]:
    """Returns the arrays of an adapter on the devices of its kernel."""
    sharding = kernel.sharding
    whole = jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding
    return tuple(
        array
        if isinstance(array, jax.Array) and array.sharding.device_set == sharding.device_set
        else jax.device_put(array, whole)
        for array in arrays
    )


@functools.lru_cache(maxsize=256)
def _program(sharding: Any) -> Any:
    """Returns a compiled function that folds adapters into a kernel of this sharding."""
    return jax.jit(_sum, out_shardings=(sharding, None))


def _sum(kernel: Any, pairs: Sequence[tuple[Any, ...]]) -> tuple[Any, Any]:
    wide = functools.reduce(jnp.promote_types, [_wide(array) for pair in pairs for array in pair], _wide(kernel))
    total = jnp.asarray(kernel, wide)
    # On Explicit axes JAX asks how the product of two split arrays is split: as the kernel.
    sharding = explicit_sharding(kernel)
    whole = None if sharding is None else jax.NamedSharding(sharding.mesh, jax.P())
    for pair in pairs:
        a, b = (jnp.asarray(array if whole is None else jax.reshard(array, whole), wide) for array in pair)
        total = total + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=sharding)
    merged = total.astype(kernel.dtype)
    return merged, jnp.all(jnp.isfinite(merged) | ~jnp.isfinite(total))


def _wide(array: Any) -> Any:
    """Returns the dtype to compute in: at least float32, which no product of smaller ones promotes to."""
    dtype = jnp.dtype(array.dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype("float32")


def _check_held(plan: PlanTables, held: Mapping[int, Any]) -> None:
    """Checks that no sum became infinite in its kernel's dtype; where values are traced, that is not known."""
    known = {number: holds for number, holds in held.items() if not isinstance(holds, compat.Tracer)}
    problems = Problems()
    for number, holds in zip(known, jax.device_get(list(known.values())), strict=True):
        if not holds:
            leaf = plan.leaves[number]
            note = f"the sum has numbers that {leaf.dtype} cannot represent"
            problems.add(leaf, note, f"sw.merge_lora(state.cast({leaf.kind}='float32'))")
    problems.raise_as(StructureError, "{n} leaves cannot hold what their adapters add. Nothing was merged.")


def _parts(state: StateData, plan: PlanTables, arrays: Mapping[str, Sequence[Any]]) -> list[Part]:
    """Returns the parts of the new state; those that depend on what was merged are stale."""
    old = state.tables
    parts = parts_for(plan, None, arrays)
    carry([(old, state.parts)], plan, parts)
    own = {kind: {id(array) for array in state.part(kind).arrays} for kind in old.kinds}
    changed = {kind for kind in plan.kinds if {id(array) for array in arrays[kind]} != own[kind]}
    for kind, sources in plan.sources.items():
        part = parts[plan.kind_index[kind]]
        origin = {source: parts[plan.kind_index[source]].version() for source in sources}
        known = origin if part.origin is None else part.origin.versions
        if changed.intersection(sources):
            part.origin = Origin({**known, **dict.fromkeys(changed.intersection(sources), NEVER)})
    return parts
