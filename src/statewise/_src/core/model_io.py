"""Arrays into states and back: `take`, `put` and `build`.

Both directions match by path, and check everything before they change anything: a difference in structure, type, shape
or dtype is an error that lists every leaf, and then nothing has changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.copying import copies_of
from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import (
    ONE,
    any_is_deleted,
    are_concrete,
    arrays_of,
    held_value,
    is_concrete,
    raw_value,
    read_graph,
    rebuild,
    value_of,
)
from statewise._src.common.object_names import in_order, names_given
from statewise._src.common.placing import placed
from statewise._src.common.write_values import Objects, put_values
from statewise._src.core.check_objects import check_statics, matched, names_for
from statewise._src.core.known_arrays import belong, remember, remembered_kinds
from statewise._src.core.many_arrays import ManyArrays
from statewise._src.core.member_view import as_ensemble, fresh_derived, holds_one_member, single_of
from statewise._src.core.plan_difference import in_form_of, other_plan
from statewise._src.core.reduce_devices import check_not_per_device
from statewise._src.core.state_data import StateData, check_fits, check_not_donated
from statewise._src.core.templates import shardings
from statewise._src.core.usable import check_concrete, check_model_arrays
from statewise._src.plan.per_device import PerDeviceArrays, spread
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explained
from statewise._src.sharding.resolve import array_shardings, check_devices, copies_on, with_copies
from statewise.errors import StructureError

__all__ = ["build", "init", "put", "take"]


def take(
    plan: PlanTables,
    objects: Sequence[object],
    *,
    mesh: Any,
    copy: bool,
    pack: object,
    inside: bool = True,
) -> StateData:
    """Implements `Plan.take`; `inside` allows the traced objects of one member for the plan of an ensemble."""
    plan = plan.plain  # a model is neither packed nor per device; the state's plan is made from this one
    if plan.ensemble is not None and inside and holds_one_member(plan, objects):
        return as_ensemble(plan.ensemble, take(single_of(plan), objects, mesh=mesh, copy=copy, pack=pack))
    if mesh is not None:
        check_devices(mesh)
    copies = None if mesh is None else copies_on(plan, mesh)
    packed = plan.with_packing(_kinds_to_pack(plan, pack, copies)) if pack else plan
    placer = _Placer(with_copies(packed, copies), mesh)
    arrays, are_read = _arrays_in(plan, objects)
    every = list(itertools.chain.from_iterable(arrays))
    if not are_concrete(every) or any_is_deleted(every):
        check_model_arrays(
            zip(plan.leaves, arrays, strict=False),  # the plan lists derived leaves after those of the objects
            "take",
            abstract="plan.abstract() gives an abstract state; plan.take needs a model with values",
            donated="plan.put(state, model) gives it the current ones; without copy=False a model keeps its own arrays",
        )
        _check_not_narrowed(plan, arrays)
    copied = copy and mesh is None
    placed = _copies(arrays, are_read) if copied else arrays
    parts: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    for row, own, is_read in zip(plan.rows, placed, are_read, strict=True):
        for array in own:
            # Each is placed before the next is copied: a device holds one complete array at a time, never all.
            part = parts[row.kind]
            part.append(array if copied else placer.place(row.kind, len(part), array, copy and not is_read))
    for derived in plan.derived_arrays if plan.derived else ():
        with explained("plan.take", mesh, parts):
            sources = [parts[source.kind][source.position] for source in derived.sources]
            fresh = fresh_derived(derived, plan.ensemble, sources)
        for info, array in zip(derived.arrays, fresh, strict=True):
            parts[info.kind].append(placer.place_derived(info.kind, info.position, array))
    state = placer.state({kind: packed.pack(kind, tuple(part)) for kind, part in parts.items()})
    if packed.sources:
        belong(packed, state.parts, _by_kind(plan, arrays))
    return state


def _arrays_in(plan: PlanTables, objects: Sequence[object]) -> tuple[list[list[Any]], list[bool]]:
    """Returns the arrays of each leaf of objects that fit a plan, in the order of its rows.

    Also whether they were read from a reference: they are copies then, which nothing else holds.
    """
    read = plan.read_fitting(objects)
    if read is None:
        graph = read_graph(objects, names_for(plan, objects))
        leaves = matched(plan, graph, objects, "take")
        check_statics(plan, graph, objects)
        are_read = [isinstance(held_value(leaf), jax.Ref) for leaf in leaves]
        return [arrays_of(raw_value(leaf))[0] for leaf in leaves], are_read
    arrays = [
        [value] if row.structure is ONE else arrays_of(value)[0] for value, row in zip(read[1], plan.rows, strict=True)
    ]
    return arrays, [False] * len(arrays)


def _copies(arrays: Sequence[Sequence[Any]], are_read: Sequence[bool] = ()) -> list[list[Any]]:
    """Returns copies of the arrays of each leaf, as JAX has them; tracers, shapes and what is a copy unchanged."""
    copies: list[list[Any]] = [list(own) for own in arrays]
    together: list[tuple[int, int]] = []
    for number, own in enumerate(copies):
        for index, array in enumerate(() if are_read and are_read[number] else own):
            # `jax.device_put` would put keys on one device.
            if (
                is_concrete(array)
                and array.is_fully_addressable
                and not jnp.issubdtype(array.dtype, jax.dtypes.extended)
            ):
                together.append((number, index))
            else:
                own[index] = _as_jax(array, True)
    made = copies_of([copies[number][index] for number, index in together])
    for (number, index), array in zip(together, made, strict=True):
        copies[number][index] = array
    return copies


def _by_kind(plan: PlanTables, leaves: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Returns the arrays of a model's leaves by kind, for the kinds that have no others, such as moments."""
    arrays: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    for row, own in zip(plan.rows, leaves, strict=True):
        arrays[row.kind].extend(own)
    return {kind: own for kind, own in arrays.items() if len(own) == len(plan.specs[kind])}


def init(plan: PlanTables, make_model: object, mesh: Any) -> StateData:
    """Implements `Plan.init`."""
    if not callable(make_model) or isinstance(make_model, nnx.Module):
        raise StructureError(
            f"plan.init takes a function that makes the model, not {type(make_model).__name__}.",
            hint="plan.init(lambda: Model(rngs=nnx.Rngs(0)), mesh)  # or plan.take(model, mesh=mesh)",
        )
    check_devices(mesh)

    # Traced, not run: XLA then initializes each shard on its own device.
    def initial_state() -> StateData:
        # Plain Variables, whatever the default: hijax ones and references are not made alike in every trace.
        with nnx.var_defaults(hijax=False, ref=False):
            objects = make_model()
        if plan.names and isinstance(objects, dict):
            objects = in_order(plan.names, (), objects, "take")
        else:
            objects = tuple(objects) if plan.object_count > 1 and isinstance(objects, tuple | list) else (objects,)
        try:
            taken = take(plan, objects, mesh=None, copy=False, pack=tuple(plan.packing), inside=False)
        except StructureError as error:
            # Raw arrays, which are leaves in eager mode, become constants in a model that is made under a trace.
            raw = [leaf for leaf in error.leaves if leaf.type is jax.Array and leaf.note.startswith("missing")]
            if not raw:
                raise
            raise StructureError(
                "Arrays outside of Variables are static to NNX if a model is made inside jax.jit.",
                leaves=raw,
                hint="self.table = nnx.data(jnp.ones(3))  # or an nnx.Variable; or plan.take(make_model(), mesh=mesh)",
            ) from error
        # Without a mesh `take` makes no per-device values.  A kind that has some is never packed.
        parts = {kind: list(part.arrays) for kind, part in zip(plan.kinds, taken.parts, strict=True)}
        for info in target.tables.arrays:
            if info.devices:
                part = parts[info.kind]
                part[info.slot] = spread(part[info.slot], info.devices, axis=info.axis)
        return StateData.of(target.tables, parts.values())

    target = shardings(plan, mesh)
    with explained("plan.init", mesh):
        return ManyArrays(initial_state, len(jax.tree.leaves(target)), shardings=target)()


class _Placer:
    """Places arrays on a mesh as a plan has them; without a mesh it leaves them where they are."""

    def __init__(self, plan: PlanTables, mesh: Any) -> None:
        self._plan = plan
        self._seen: set[Any] = set()
        self._arrays: dict[str, list[jax.NamedSharding]] | None = None
        if mesh is not None:
            self._slots = shardings(plan, mesh)
            self._arrays = array_shardings(plan, mesh)

    def place(self, kind: str, position: int, array: Any, copy: bool) -> Any:
        """Returns an array of a model, copied or shared, where the plan has it."""
        if self._arrays is None:
            array = _as_jax(array, copy)
            return array if copy else self._unshared(array)
        info, sharding = self._plan.by_kind[kind][position], self._arrays[kind][position]
        # `jax.device_put` may return the same memory, so the copy is made before.
        array = _as_jax(array, copy)
        spreads = info.devices > 0
        array = spread(array, info.devices, sharding, info.axis) if spreads else placed(array, sharding)
        return array if copy else self._unshared(array)

    def place_derived(self, kind: str, position: int, array: Any) -> Any:
        """Returns an array that was derived from placed ones; if these have per-device values, it has them already."""
        return array if self._arrays is None else jax.device_put(array, self._arrays[kind][position])

    def state(self, parts: Mapping[str, Sequence[Any]]) -> StateData:
        """Returns the state of these parts; buffers, which were packed from placed arrays, are placed as well."""
        state = StateData.of(self._plan, parts.values())
        return state if self._arrays is None or not self._plan.packing else jax.device_put(state, self._slots)

    def _unshared(self, array: Any) -> Any:
        """Returns the array itself the first time, and a copy if it, or another array with its memory, was seen."""
        if isinstance(array, compat.Tracer):
            return array
        memory = _memory_of(array)
        if memory in self._seen:
            array = jnp.copy(array)
            memory = _memory_of(array)
        self._seen.add(memory)
        return array


def _memory_of(array: jax.Array) -> Any:
    """Returns what identifies an array's memory: `jax.device_put` may return a new array with the same memory."""
    # These have no buffer on this host that could be asked for its address.
    if not array.size or jnp.issubdtype(array.dtype, jax.dtypes.extended) or not array.addressable_shards:
        return id(array)
    shard = array.addressable_shards[0].data
    return shard.device, shard.unsafe_buffer_pointer()


def _kinds_to_pack(plan: PlanTables, pack: object, copies: PerDeviceArrays | None) -> tuple[str, ...]:
    names = tuple(plan.kinds) if pack is True else names_given(pack, "pack")
    for name in names:
        plan.kinds[name]  # raises for a kind that does not exist
    # A buffer is the same on every device, so per-device values are not packed.
    return tuple(name for name in names if not (copies and copies.of(name)))


def _check_not_narrowed(plan: PlanTables, arrays: Iterable[Sequence[Any]]) -> None:
    """Checks that JAX does not narrow 64-bit NumPy arrays among those of each leaf."""
    check_given(
        (leaf, array, spec.dtype)
        for leaf, row, own in zip(plan.leaves, plan.rows, arrays, strict=False)
        for array, spec in zip(own, row.specs, strict=True)
        if not isinstance(array, jax.Array)
    )


def _as_jax(array: Any, copy: bool) -> Any:
    """Returns an array as JAX has it, copied if requested or if it is NumPy's; tracers and shapes unchanged."""
    if isinstance(array, jax.ShapeDtypeStruct | compat.Tracer):
        return array
    if isinstance(array, jax.Array) and not copy:
        return array
    with compat.without_mesh():
        return jnp.array(array)


def put(plan: PlanTables, state: object, objects: Sequence[object], *, copy: bool) -> None:
    """Implements `Plan.put`."""
    copies = _copies_of(plan, state, "put", copy)
    # An abstract state has values of the right structure, so `_values_of` accepts it, for `build`.
    check_concrete(
        itertools.chain.from_iterable(copies), "put into a model", "plan.build(state) makes an abstract model"
    )
    read = plan.read_fitting(objects)
    if read is not None:
        leaves = everything = read[0]
    else:
        graph = read_graph(objects, names_for(plan, objects))
        leaves, everything = matched(plan, graph, objects, "put"), list(graph.leaves)
    values = _values_of(plan, copies)
    writes = [(row.path, leaf, value) for row, leaf, value in zip(plan.rows, leaves, values, strict=True)]
    root: Any = Objects(zip(plan.names, objects, strict=True)) if plan.names else tuple(objects)
    put_values(root if plan.several else objects[0], everything, writes)
    _remember(plan, state, copies)


def build(plan: PlanTables, state: object, *, copy: bool) -> Any:
    """Implements `Plan.build`."""
    copies = _copies_of(plan, state, "build", copy)
    values = _values_of(plan, copies)
    if plan.known_graph is not None:  # without references, and made of plain Variables
        made = nnx.unflatten(plan.graphdef, plan.known_graph.leaves_with(values))
        objects = tuple(made) if plan.several else (made,)
    else:
        objects = rebuild(plan.graphdef, values, plan.several, plain=False)
    _remember(plan, state, copies)
    return objects if plan.object_count > 1 else objects[0]


def _values_of(plan: PlanTables, leaves: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns the values of a model's leaves, from their arrays."""
    return [value_of(arrays, row.structure) for arrays, row in zip(leaves, plan.rows, strict=True)]


def _remember(plan: PlanTables, state: Any, leaves: Sequence[Sequence[Any]]) -> None:
    """Remembers that the arrays of a model's leaves have the values of a state."""
    if plan.sources:
        arrays = _by_kind(plan, leaves)
        for kind in remembered_kinds(plan):
            if kind in arrays:
                remember(plan, state.parts, kind, arrays[kind])


def _copies_of(plan: PlanTables, state: object, verb: str, copy: bool) -> list[list[Any]]:
    """Returns the arrays of each leaf in a state, in the order of the plan's rows, as a model may keep them.

    Raises:
      StructureError: it is not a state, or one of another plan, a donated one, or one whose arrays do not fit the plan;
        JAX would narrow arrays.
    """
    if not isinstance(state, StateData):
        raise StructureError(
            f"plan.{verb} takes a state, not {type(state).__name__}.",
            hint="plan.put(state, model)" if verb == "put" else "model = plan.build(state)",
        )
    state = in_form_of(plan, state)
    if state.tables.plain is not plan.plain:
        into = ", model" if verb == "put" else ""
        hints = f"plan.{verb}(sw.transfer(state, plan){into})", f"state.plan.{verb}(state{into})"
        raise other_plan(plan, state, "This state", *hints)
    own = state.tables  # may be packed, where `plan` is not
    if own.per_device:
        check_not_per_device(own, f"a model holds one value of each leaf; plan.{verb} would have to choose.")
    check_not_donated(state, plan.kinds)
    check_fits(state, plan.kinds)
    parts = {kind: own.unpack(kind, part.arrays) for kind, part in zip(own.kinds, state.parts, strict=True)}
    arrays = [parts[span.kind][span.start : span.stop] for span in plan.spans]
    if not all(are_concrete(part) for part in parts.values()):
        _check_not_narrowed(plan, arrays)
    elif not copy:
        return list(map(list, arrays))
    return _copies(arrays) if copy else [[_as_jax(array, False) for array in leaf] for leaf in arrays]
