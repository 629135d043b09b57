"""Arrays into states and back: `take`, `put` and `build`.

Both directions go by path, and look at everything before they touch anything: a difference in structure, type,
shape or dtype is an error that lists every leaf, and then nothing has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.compare import UNEXPECTED, compare_leaf, facts_of_leaf, note_of
from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import (
    arrays_of,
    raw_value,
    read_graph,
    rebuild,
    value_of,
)
from statewise._src.common.object_names import in_order, names_given
from statewise._src.common.problems import Problems
from statewise._src.common.write_values import Objects, put_values
from statewise._src.core.check_objects import check_statics, matched, names_for
from statewise._src.core.member_view import as_ensemble, begun, holds_one_member, single_of
from statewise._src.core.reduce_devices import check_not_per_device
from statewise._src.core.state_data import StateData, check_fits, check_not_donated
from statewise._src.core.templates import shardings
from statewise._src.core.usable import check_concrete, check_model_arrays
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.per_device import PerDeviceArrays, spread
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explained
from statewise._src.sharding.resolve import array_shardings, check_devices, copies_on, with_copies
from statewise.errors import StructureError

__all__ = ["build", "init", "put", "take", "values_of"]


def take(
    plan: PlanTables,
    objects: Sequence[Any],
    *,
    mesh: Any,
    copy: bool,
    pack: Any,
    inside: bool = True,
) -> StateData:
    """See `Plan.take`; `inside` allows the traced objects of one member for the plan of an ensemble."""
    plan = plan.plain
    if plan.ensemble is not None and inside and holds_one_member(plan, objects):
        return as_ensemble(plan.ensemble, take(single_of(plan), objects, mesh=mesh, copy=copy, pack=pack))
    if mesh is not None:
        check_devices(mesh)
    copies = None if mesh is None else copies_on(plan, mesh)
    made = plan.with_packing(_kinds_to_pack(plan, pack, copies)) if pack else plan
    place = _Places(with_copies(made, copies), mesh)
    found = read_graph(objects, names_for(plan, objects))
    leaves = matched(plan, found, objects, "take")
    check_statics(plan, found, objects)
    _check_arrays(plan, leaves)
    parts: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    for row, leaf in zip(plan.rows, leaves, strict=True):
        for array in arrays_of(raw_value(leaf))[0]:
            # Each is placed before the next is copied: a device holds one whole array at a time, never all.
            parts[row.kind].append(place.array(row.kind, len(parts[row.kind]), array, copy))
    for one in plan.derived_arrays:
        with explained("plan.take", mesh, parts):
            fresh = list(begun(plan, one.order, [parts[source.kind][source.position] for source in one.sources]))
        for own, array in zip(one.arrays, fresh, strict=True):
            parts[own.kind].append(place.derived(own.kind, own.position, array))
    return place.state({kind: made.pack(kind, tuple(arrays)) for kind, arrays in parts.items()})


def init(plan: PlanTables, make_model: object, mesh: Any) -> StateData:
    """See `Plan.init`."""
    if not callable(make_model) or isinstance(make_model, nnx.Module):
        raise StructureError(
            f"plan.init wants a function that makes the model, not {type(make_model).__name__}.",
            hint="plan.init(lambda: Model(rngs=nnx.Rngs(0)), mesh)  # or plan.take(model, mesh=mesh)",
        )
    check_devices(mesh)

    def made() -> StateData:
        objects = make_model()
        if plan.names and isinstance(objects, dict):
            objects = in_order(plan.names, (), objects, "take")
        else:
            objects = tuple(objects) if plan.object_count > 1 and isinstance(objects, tuple | list) else (objects,)
        try:
            taken = take(plan, objects, mesh=None, copy=False, pack=tuple(plan.packing), inside=False)
        except StructureError as error:
            raw = [leaf for leaf in error.leaves if leaf.type is jax.Array and leaf.note.startswith("missing")]
            if not raw:
                raise
            raise StructureError(
                "Arrays outside of Variables are static to NNX where a model is made inside jax.jit.",
                leaves=raw,
                hint="self.table = nnx.data(jnp.ones(3))  # or an nnx.Variable; or plan.take(make_model(), mesh=mesh)",
            ) from error
        # Its plan is the same in all but what was chosen to be packed, and that nothing is per device.
        parts = zip(plan.kinds, (part.arrays for part in taken.parts), strict=True)
        copies = there.tables.per_device
        return StateData.of(
            there.tables,
            [part if copies is None else _spread(there.tables, copies, kind, part) for kind, part in parts],
        )

    there = shardings(plan, mesh)
    with explained("plan.init", mesh):
        return jax.jit(made, out_shardings=there)()


def _spread(plan: PlanTables, copies: PerDeviceArrays, kind: str, part: Sequence[Any]) -> list[Any]:
    mine = copies.of(kind)  # never a packed kind, so slots are positions
    return [
        spread(array, copies.devices, axis=plan.by_kind[kind][at].axis) if at in mine else array
        for at, array in enumerate(part)
    ]


class _Places:
    """Puts arrays where a plan has them on a mesh; without a mesh it leaves them where they are."""

    def __init__(self, plan: PlanTables, mesh: Any) -> None:
        self._plan = plan
        self._seen: set[Any] = set()
        self._arrays: dict[str, list[Any]] | None = None
        if mesh is not None:
            self._slots = shardings(plan, mesh)
            self._arrays = array_shardings(plan, mesh)

    def array(self, kind: str, position: int, array: Any, copy: bool) -> Any:
        """An array of a model, copied or shared."""
        if self._arrays is None:
            return _taken(array, copy, self._seen)
        # What JAX puts elsewhere may still share memory with what was given, so a copy is made before.
        given = array if isinstance(array, jax.Array) and not copy else jnp.array(array)
        placed = self.made(kind, position, given)
        return placed if copy else _own(placed, self._seen)

    def made(self, kind: str, position: int, array: Any) -> Any:
        """An array that nobody else has."""
        if self._arrays is None:
            return array
        copies = self._plan.per_device
        if copies and position in copies.of(kind):
            return spread(array, copies.devices, self._arrays[kind][position], self._plan.by_kind[kind][position].axis)
        return jax.device_put(array, self._arrays[kind][position])

    def derived(self, kind: str, position: int, array: Any) -> Any:
        """An array that was made of placed ones: where they lie per device, so does it."""
        return array if self._arrays is None else jax.device_put(array, self._arrays[kind][position])

    def state(self, parts: Mapping[str, Sequence[Any]]) -> StateData:
        """The state of these parts; packing made buffers of some arrays, which have no place yet."""
        state = StateData.of(self._plan, parts.values())
        return state if self._arrays is None or not self._plan.packing else jax.device_put(state, self._slots)


def _kinds_to_pack(plan: PlanTables, pack: Any, copies: PerDeviceArrays | None) -> tuple[str, ...]:
    names = tuple(plan.kinds) if pack is True else names_given(pack, "pack")
    for name in names:
        if name not in plan.kinds:
            raise unknown_kind(name, plan.kinds)
    # A buffer is the same on every device, so what lies per device stays as it is.
    return tuple(name for name in names if not (copies and copies.of(name)))


def _check_arrays(plan: PlanTables, leaves: Sequence[Any]) -> None:
    """Refuses leaves without values (abstract, or donated by a step), and numbers that JAX would narrow."""
    arrays = [arrays_of(raw_value(leaf))[0] for leaf in leaves]
    check_model_arrays(
        zip(plan.leaves, arrays, strict=False),  # of the plan's leaves, those of the objects come first
        "take",
        abstract="plan.abstract() gives an abstract state; plan.take wants a model that was built for real",
        donated="plan.put(state, model) gives it those of now; without copy=False a model keeps its own arrays",
    )
    check_given(
        (leaf, array, spec.dtype)
        for leaf, row, own in zip(plan.leaves, plan.rows, arrays, strict=False)
        for array, spec in zip(own, row.specs, strict=True)
        if not isinstance(array, jax.Array)
    )


def _taken(array: Any, copy: bool, seen: set[Any]) -> Any:
    if not isinstance(array, jax.Array):
        return jnp.array(array)
    if isinstance(array, jax.core.Tracer):
        return array
    return jnp.copy(array) if copy else _own(array, seen)


def _own(array: Any, seen: set[Any]) -> Any:
    """The array itself the first time, a copy whenever it, or another array of the same buffer, comes again."""
    if isinstance(array, jax.core.Tracer):
        return array
    buffer = _buffer_of(array)
    if buffer in seen:
        array = jnp.copy(array)
        buffer = _buffer_of(array)
    seen.add(buffer)
    return array


def _buffer_of(array: jax.Array) -> Any:
    """What tells an array's memory from another's: `jax.device_put` may give a new array of the same memory."""
    if not array.size or jnp.issubdtype(array.dtype, jax.dtypes.extended) or not array.addressable_shards:
        return id(array)
    shard = array.addressable_shards[0].data
    return shard.device, shard.unsafe_buffer_pointer()


def put(plan: PlanTables, state: object, objects: Sequence[Any], *, copy: bool) -> None:
    """See `Plan.put`."""
    values = values_of(plan, state, "put")
    check_concrete(jax.tree.leaves(state), "put into a model", "plan.build(state) makes an abstract model")
    found = read_graph(objects, names_for(plan, objects))
    leaves = matched(plan, found, objects, "put")
    _check_narrow(plan, values)
    values = [_ready(value, copy) for value in values]
    writes = [(row.path, leaf, value) for row, leaf, value in zip(plan.rows, leaves, values, strict=True)]
    root: Any = Objects(zip(found.names, objects, strict=True)) if found.names else tuple(objects)
    put_values(root if found.several else objects[0], found.leaves, writes)


def build(plan: PlanTables, state: object, *, copy: bool) -> Any:
    """See `Plan.build`."""
    values = values_of(plan, state, "build")
    _check_narrow(plan, values)
    values = [_ready(value, copy) for value in values]
    objects = rebuild(plan.graphdef, values, plan.several)
    return objects if plan.object_count > 1 else objects[0]


def values_of(plan: PlanTables, state: object, verb: str) -> list[Any]:
    """The leaves' values out of a state, in the order of the plan's rows.

    Raises:
      StructureError: no state, one of another plan, a donated one, or one whose arrays do not fit the plan.
    """
    if not isinstance(state, StateData):
        raise StructureError(
            f"plan.{verb} wants a state, not {type(state).__name__}.",
            hint="plan.put(state, model)" if verb == "put" else "model = plan.build(state)",
        )
    if state.tables.plain is not plan.plain:
        raise StructureError(
            f"This state is of another plan: {state.tables!r}, not {plan!r}.",
            leaves=_compare_plans(plan, state.tables).leaves,
            hint=f"state.plan.{verb}(state{', model' if verb == 'put' else ''})",
        )
    own = state.tables
    if own.per_device:
        check_not_per_device(own, f"a model holds one value of each leaf; plan.{verb} would have to choose.")
    check_not_donated(state, plan.kinds)
    check_fits(state, plan.kinds)
    parts = {kind: own.unpack(kind, part.arrays) for kind, part in zip(own.kinds, state.parts, strict=True)}
    return [value_of(parts[span.kind][span.start : span.stop], span.structure) for span in plan.spans]


def _compare_plans(plan: PlanTables, other: PlanTables) -> Problems:
    """Compares the leaves of two plans; there are none where they differ in handling or optimizers alone."""
    problems = Problems()
    found = {leaf.path: leaf for leaf in other.leaves}
    for leaf in plan.leaves:
        there = found.pop(leaf.path, None)
        mismatches = compare_leaf(facts_of_leaf(leaf), None if there is None else facts_of_leaf(there))
        if mismatches:
            problems.add(leaf, note_of(mismatches, "state"))
    for leaf in found.values():
        problems.add(leaf, note_of(UNEXPECTED, "state"))
    return problems


def _check_narrow(plan: PlanTables, values: Sequence[Any]) -> None:
    """Refuses 64-bit arrays of NumPy, to which somebody mapped the state, where JAX has none."""
    check_given(
        (leaf, array, spec.dtype)
        for leaf, row, value in zip(plan.leaves, plan.rows, values, strict=False)
        for array, spec in zip(arrays_of(value)[0], row.specs, strict=True)
        if not isinstance(array, jax.Array)
    )


def _ready(value: Any, copy: bool) -> Any:
    """A value that a model may keep: arrays of JAX, copied or not."""

    def ready(array: Any) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer):
            return array
        if isinstance(array, jax.Array):
            return jnp.copy(array) if copy else array
        return jnp.array(array)  # somebody mapped the state to NumPy

    return jax.tree.map(ready, value)
