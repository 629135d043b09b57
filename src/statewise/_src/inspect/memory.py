"""Does it fit: the memory that a plan's state takes on each device of a mesh, without any device or array.

The arrays of the state are counted, sharded as by `Plan.shardings`, and what a train step makes of them, sharded alike:
gradients, and the copies of a kind in its compute dtype.  Activations are not counted: they depend on the batch, on
what a step recomputes, and on the compiler, and are often the larger part.

XLA reports the same for a compiled train step that reads and writes the complete state (`train.lower(state, x)
.compile().memory_analysis()`): its arguments are the state and the batch, to the byte, and all of the state is written
in place.  It counts gradients and copies in its temporary memory, among the activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.tables import ShownData, Table, format_bytes, leaf_dict
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import Plan, State, tables_in
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import ArrayPlacement, axis_sizes, describe_mesh, resolve, slot_shardings
from statewise.errors import DeclarationError, PlacementError

__all__ = ["KindMemory", "Memory", "as_mesh", "bytes_of_leaves", "memory"]

_LARGEST = 10
_WITHOUT = "ACTIVATIONS ARE NOT INCLUDED"


@dataclasses.dataclass(frozen=True)
class KindMemory:
    """The memory of one kind.

    Attributes:
      name: the kind.
      arrays: the number of its arrays.
      nbytes: their bytes, counted once.
      per_device: their bytes in each device's own memory.
      host: their bytes in other memory (`pinned_host`) for each device.
      saving_if_sharded: the bytes that each device would save if a replicated kind were sharded evenly over the mesh.
      compute: the compute dtype that the kind declares; None if it declares none.
      copies: the bytes on each device of the copies in that dtype, which a step makes.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"))
      >>> params = sw.memory(kinds.plan(model), {"data": 8})["params"]
      >>> params.nbytes, params.per_device, params.saving_if_sharded, params.copies
      (512, 512, 448, 256)
    """

    name: str
    arrays: int
    nbytes: int
    per_device: int
    host: int
    saving_if_sharded: int
    compute: str | None = None
    copies: int = 0


@dataclasses.dataclass(frozen=True)
class Memory(ShownData):
    """The memory that a plan's state takes on each device of a mesh; prints as a table.  Activations are not included.

    Attributes:
      mesh: the axes of the mesh and their sizes.
      kinds: one `KindMemory` for each kind, in the order of the kinds; `optimizer` is one of them.
      gradients: bytes per device of the gradients of a train step.
      largest: the leaves that take the most memory of a device, each with its bytes there.

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
        by_name = {counted.name: counted for counted in self.kinds}
        if kind not in by_name:
            raise unknown_kind(kind, by_name)
        return by_name[kind]

    @property
    def total(self) -> int:
        """Returns the bytes per device: all kinds, their copies, and the gradients; activations are not included."""
        return sum(kind.per_device + kind.copies for kind in self.kinds) + self.gradients

    @property
    def devices(self) -> int:
        """Returns the number of devices of the mesh."""
        return math.prod(size for _, size in self.mesh)

    def table(self) -> Table:
        """Returns a table: a line for each kind, for its copies and for the gradients; below, the largest leaves."""
        columns: tuple[str, ...] = ("kind", "arrays", "bytes", "per device", "host", "saved if sharded")
        footer: tuple[str, ...] = ("total", "", "", format_bytes(self.total), "", "")
        rows: list[tuple[str, ...]] = []
        for kind in (kind for kind in self.kinds if kind.arrays):
            sizes = map(format_bytes, (kind.nbytes, kind.per_device, kind.host))
            saving = format_bytes(kind.saving_if_sharded) if kind.saving_if_sharded else "-"
            rows.append((kind.name, str(kind.arrays), *sizes, saving))
        rows += [
            (f"{kind.name} in {kind.compute}", "", "", format_bytes(kind.copies), "", "")
            for kind in self.kinds
            if kind.copies
        ]
        if self.gradients:
            rows.append(("gradients", "", "", format_bytes(self.gradients), "", ""))
        if not any(kind.host for kind in self.kinds):
            # Without memory of the host, its column goes.
            columns, footer, *rows = ((*line[:4], line[5]) for line in (columns, footer, *rows))
        leaves = tuple((format_path(leaf.path), leaf.kind or "", format_bytes(size)) for leaf, size in self.largest)
        return Table(
            f"memory of each of {self.devices} devices, mesh {describe_mesh(dict(self.mesh))}: {_WITHOUT}",
            columns,
            tuple(rows),
            right=columns[1:],
            footer=footer,
            below=Table("the largest leaves", ("path", "kind", "per device"), leaves, right=("per device",)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as plain data, all sizes in bytes."""
        return {
            "note": _WITHOUT,
            "mesh": dict(self.mesh),
            "devices": self.devices,
            "kinds": list(map(dataclasses.asdict, self.kinds)),
            "gradients": self.gradients,
            "total": self.total,
            "largest": [{**leaf_dict(leaf), "per_device": size} for leaf, size in self.largest],
        }


def memory(
    plan: Plan | State,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | Mapping[str, int],
    *,
    gradients: bool = True,
) -> Memory:
    """Counts the memory that a plan's state takes on each device of a mesh: does it fit, with its optimizer and cache?

    No array is made: the plan may be of an abstract model (`nnx.eval_shape`), and the mesh need not exist.
    A step copies a kind with a compute dtype; the copies are counted too.  ACTIVATIONS ARE NOT INCLUDED, nor what the
    compiler needs for itself.

    Args:
      plan: the plan, or a state, which has one.
      mesh: a `jax.sharding.Mesh`, an abstract one, or the axes and their sizes, `{"data": 16, "model": 8}`.
      gradients: whether to count the gradients of the leaves that have optimizers, sharded like the leaves.

    Returns:
      bytes per device, by kind; prints as a table.

    Raises:
      DeclarationError: `plan` is neither a plan nor a state.
      PlacementError: leaves that cannot be placed on the mesh, all of them; `mesh` is not a mesh.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.eval_shape(lambda: nnx.Linear(1024, 4096, use_bias=False, rngs=nnx.Rngs(0)))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data", "model")))
      >>> print(
      ...     sw.memory(kinds.plan(model, optimizers={"params": optax.adam(1e-3)}), {"data": 4, "model": 2})
      ... )
      memory of each of 8 devices, mesh (data=4, model=2): ACTIVATIONS ARE NOT INCLUDED
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
        raise DeclarationError("Memory is counted for a plan.", hint="sw.memory(sw.plan(model), {'data': 8})")
    if isinstance(plan, State):
        check_not_batch(plan)
    mesh = as_mesh(mesh)
    sizes = axis_sizes(mesh)
    placed = resolve(tables, mesh)
    if tables.packing:
        slot_shardings(tables, mesh, placed)  # rejects a packed kind that would be split
    largest = sorted(bytes_of_leaves(tables, placed, sizes).items(), key=lambda item: -item[1])[:_LARGEST]
    # A gradient is sharded like its parameter.
    sources = (source for group in tables.optimizers for source in tables.arrays_of(group).sources if gradients)
    return Memory(
        tuple(sizes.items()),
        tuple(_of_kind(tables, kind, placed[kind], sizes) for kind in tables.by_kind),
        sum(source.spec.nbytes // placed[source.kind][source.position].parts(sizes) for source in sources),
        tuple(largest),
    )


def _of_kind(plan: PlanTables, kind: str, placements: Sequence[ArrayPlacement], sizes: Mapping[str, int]) -> KindMemory:
    arrays, dtypes = plan.by_kind[kind], plan.compute_dtypes
    device = host = total = copies = 0
    for array, placement in zip(arrays, placements, strict=True):
        part = array.spec.nbytes // placement.parts(sizes)
        # One value for each device along `each`, or one for all.
        total += array.spec.nbytes * math.prod(sizes[name] for name in placement.each)
        if array.number in dtypes:
            copies += math.prod(array.spec.shape) * dtypes[array.number].itemsize // placement.parts(sizes)
        if _on_device(placement):
            device += part
        else:
            host += part
    # Replicated: each device holds everything once, and nothing is split.
    replicated = device == total > 0 and not any(placement.split for placement in placements)
    # The devices share it evenly; the largest share is rounded up.
    saving = device - -(-total // math.prod(sizes.values())) if replicated else 0
    return KindMemory(kind, len(arrays), total, device, host, saving, plan.kinds[kind].compute, copies)


def bytes_of_leaves(
    plan: PlanTables, placed: Mapping[str, Sequence[ArrayPlacement]], sizes: Mapping[str, int]
) -> dict[Leaf, int]:
    """Returns the bytes of each leaf in each device's own memory, without leaves in other memory.

    Args:
      plan: the plan.
      placed: the placement of each of its arrays, by kind and position.
      sizes: the axes of the mesh and their sizes.
    """
    bytes_of: dict[Leaf, int] = {}
    for array in plan.arrays:
        placement = placed[array.kind][array.position]
        if _on_device(placement):
            bytes_of[array.leaf] = bytes_of.get(array.leaf, 0) + array.spec.nbytes // placement.parts(sizes)
    return bytes_of


def _on_device(placement: ArrayPlacement) -> bool:
    return placement.memory in (None, "device")


def as_mesh(mesh: object) -> Any:
    """Returns a mesh; an abstract one for axes and their sizes.

    Raises:
      PlacementError: axes without names, or sizes that are not positive numbers.
    """
    if not isinstance(mesh, Mapping):
        return mesh
    valid = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in mesh.values())
    if not mesh or not valid or not all(isinstance(name, str) for name in mesh):
        raise PlacementError(
            f"{dict(mesh)!r} is not a mesh: the name of each axis, and its number of devices.",
            hint="{'data': 16, 'model': 8}",
        )
    return jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
