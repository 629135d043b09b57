"""Does it fit: what a plan's state takes of each device of a mesh, with no device and no array there.

Counted are the arrays of the state, laid out as `Plan.shardings` lays them, and the gradients of a train step, laid
out as the parameters that they are of.  Activations are not: they depend on the batch, on what a step recomputes, and
on the compiler, and are often the larger part.

XLA says the same of a compiled train step that reads and writes the whole state (`train.lower(state, x).compile()
.memory_analysis()`): its arguments are the state and the batch, to the byte, and all of the state is written in place.
The gradients it counts in its temporary memory, among the activations.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.tables import Shown, Table, format_bytes, leaf_dict
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import Plan, State, tables_in
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import ArrayPlacement, axis_sizes, describe_mesh, resolve, slot_shardings
from statewise.errors import DeclarationError, PlacementError

__all__ = ["KindMemory", "Memory", "memory"]

_LARGEST = 10
_WITHOUT = "ACTIVATIONS ARE NOT IN IT"


@dataclasses.dataclass(frozen=True)
class KindMemory:
    """What one kind takes.

    Attributes:
      name: the kind.
      arrays: how many arrays it has.
      nbytes: what they take once.
      per_device: what they take of each device's own memory.
      host: what they take of other memory (`pinned_host`) for each device.
      saving_if_sharded: of a replicated kind, what sharding it evenly over all of the mesh would save on each device.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
      >>> sw.memory(sw.plan(model), {"data": 8})["params"]
      KindMemory(name='params', arrays=1, nbytes=512, per_device=512, host=0, saving_if_sharded=448)
    """

    name: str
    arrays: int
    nbytes: int
    per_device: int
    host: int
    saving_if_sharded: int


@dataclasses.dataclass(frozen=True)
class Memory(Shown):
    """What a plan's state takes of each device of a mesh; prints as a table.  Activations are not in it.

    Attributes:
      mesh: the axes of the mesh and their sizes.
      kinds: one `KindMemory` for each kind, in the order of the kinds; `optimizer` is one of them.
      gradients: bytes per device of the gradients of a train step.
      largest: the leaves that take most of a device, each with its bytes there.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
      >>> sw.memory(kinds.plan(model), {"data": 8}).total
      64
    """

    mesh: tuple[tuple[str, int], ...]
    kinds: tuple[KindMemory, ...]
    gradients: int
    largest: tuple[tuple[Leaf, int], ...]

    def __getitem__(self, kind: str) -> KindMemory:
        by_name = {one.name: one for one in self.kinds}
        if kind not in by_name:
            raise unknown_kind(kind, by_name)
        return by_name[kind]

    @property
    def total(self) -> int:
        """Bytes per device: all kinds and the gradients; activations are not in it."""
        return sum(one.per_device for one in self.kinds) + self.gradients

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return _devices(dict(self.mesh))

    def table(self) -> Table:
        """One line for each kind, one for the gradients; below, the largest leaves."""
        host = any(one.host for one in self.kinds)
        columns = ("kind", "arrays", "bytes", "per device", *(["host"] if host else []), "saved if sharded")

        def line(name: str, arrays: str, whole: str, here: int, there: str, saves: str) -> tuple[str, ...]:
            return (name, arrays, whole, format_bytes(here), *([there] if host else []), saves)

        rows = [
            line(
                one.name,
                str(one.arrays),
                format_bytes(one.nbytes),
                one.per_device,
                format_bytes(one.host),
                format_bytes(one.saving_if_sharded) if one.saving_if_sharded else "-",
            )
            for one in self.kinds
            if one.arrays
        ]
        if self.gradients:
            rows.append(line("gradients", "", "", self.gradients, "", ""))
        leaves = tuple((format_path(leaf.path), leaf.kind or "", format_bytes(here)) for leaf, here in self.largest)
        return Table(
            f"memory of each of {self.devices} devices, mesh {describe_mesh(dict(self.mesh))}: {_WITHOUT}",
            columns,
            tuple(rows),
            right=columns[1:],
            footer=line("total", "", "", self.total, "", ""),
            below=Table("the largest leaves", ("path", "kind", "per device"), leaves, right=("per device",)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, all in bytes."""
        return {
            "note": _WITHOUT,
            "mesh": dict(self.mesh),
            "devices": self.devices,
            "kinds": [dataclasses.asdict(one) for one in self.kinds],
            "gradients": self.gradients,
            "total": self.total,
            "largest": [{**leaf_dict(leaf), "per_device": here} for leaf, here in self.largest],
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def memory(
    plan: Plan | State,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | Mapping[str, int],
    *,
    gradients: bool = True,
) -> Memory:
    """What a plan's state takes of each device of a mesh: does this model, with this optimizer and cache, fit?

    Nothing is made for it: the plan may be of an abstract model (`nnx.eval_shape`), the mesh need not exist.
    ACTIVATIONS ARE NOT IN IT, nor what the compiler needs for itself.

    Args:
      plan: the plan, or a state, which has one.
      mesh: a `jax.sharding.Mesh`, an abstract one, or the axes and their sizes, `{"data": 16, "model": 8}`.
      gradients: counts the gradients of the leaves that have optimizers, laid out as the leaves are.

    Returns:
      bytes per device, by kind; prints as a table.

    Raises:
      DeclarationError: something that is no plan.
      PlacementError: leaves that cannot be placed on the mesh, all of them; something that is no mesh.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.eval_shape(lambda: nnx.Linear(1024, 4096, use_bias=False, rngs=nnx.Rngs(0)))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data", "model")))
      >>> print(
      ...     sw.memory(kinds.plan(model, optimizers={"params": optax.adam(1e-3)}), {"data": 4, "model": 2})
      ... )
      memory of each of 8 devices, mesh (data=4, model=2): ACTIVATIONS ARE NOT IN IT
      kind       arrays     bytes  per device  saved if sharded
      ---------------------------------------------------------
      params          1  16.0 MiB     2.0 MiB                 -
      optimizer       3  32.0 MiB     4.0 MiB                 -
      gradients                       2.0 MiB
      ---------------------------------------------------------
      total                           8.0 MiB
      <BLANKLINE>
      the largest leaves
      path                          kind       per device
      ---------------------------------------------------
      kernel                        params        2.0 MiB
      optimizer/params/0/mu/kernel  optimizer     2.0 MiB
      optimizer/params/0/nu/kernel  optimizer     2.0 MiB
      optimizer/params/0/count      optimizer         4 B
    """
    tables = tables_in(plan)
    if tables is None:
        raise DeclarationError("Memory is counted by a plan.", hint="sw.memory(sw.plan(model), {'data': 8})")
    if isinstance(plan, State):
        check_not_batch(plan)
    mesh = _abstract(mesh) if isinstance(mesh, Mapping) else mesh
    sizes = axis_sizes(mesh)
    placed = resolve(tables, mesh)
    if tables.packing:
        slot_shardings(tables, mesh)  # refuses a packed kind that would be split
    here: dict[int, int] = {}
    leaves: dict[int, Leaf] = {}
    counted = []
    for kind, specs in tables.specs.items():
        device = host = whole = 0
        for spec, lies, leaf in zip(specs, placed[kind], tables.leaf_of_array[kind], strict=True):
            nbytes = spec.nbytes
            part = nbytes // lies.parts(sizes)
            whole += nbytes * ArrayPlacement((lies.each,)).parts(sizes)  # a value for each device, or one for all
            if _on_device(lies):
                device += part
                here[id(leaf)] = here.get(id(leaf), 0) + part
                leaves[id(leaf)] = leaf
            else:
                host += part
        replicated = device == whole > 0 and not any(lies.split for lies in placed[kind])
        saves = device - -(-whole // _devices(sizes)) if replicated else 0
        counted.append(KindMemory(kind, len(specs), whole, device, host, saves))
    largest = sorted(here, key=lambda one: -here[one])[:_LARGEST]
    return Memory(
        tuple(sizes.items()),
        tuple(counted),
        _gradients(tables, placed, sizes) if gradients else 0,
        tuple((leaves[one], here[one]) for one in largest),
    )


def _gradients(plan: PlanTables, placed: Mapping[str, tuple[ArrayPlacement, ...]], sizes: Mapping[str, int]) -> int:
    return sum(
        source.spec.nbytes // placed[source.kind][source.position].parts(sizes)
        for group in plan.optimizers
        for source in plan.arrays_of(group).sources
    )


def _on_device(lies: ArrayPlacement) -> bool:
    return lies.memory in (None, "device")


def _devices(sizes: Mapping[str, int]) -> int:
    return ArrayPlacement((tuple(sizes),)).parts(sizes)


def _abstract(axes: Mapping[Any, Any]) -> jax.sharding.AbstractMesh:
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in axes.values())
    if not axes or not whole or not all(isinstance(name, str) for name in axes):
        raise PlacementError(
            f"{dict(axes)!r} is no mesh: the name of each axis, and how many devices it has.",
            hint="{'data': 16, 'model': 8}",
        )
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
