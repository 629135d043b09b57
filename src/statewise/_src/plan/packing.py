"""Many small arrays as few buffers.

What a call of a compiled function costs depends on the number of arrays that it takes and, above all, returns.  A
packed state stores the small arrays of a kind in a few flat buffers, and large arrays as they are.  `Packing` says
where each array is stored; `pack` and `unpack` convert between the two forms.  Everything that a user sees of a state
(`state["params"]`, `replace`, `put`) is about the arrays; only the pytree itself and the compiled step see the buffers.

Which arrays share a buffer is decided when a state is taken: those of one kind and dtype, below a size above which
copying costs more than passing them, and if the optimizer is elementwise (see `elementwise`) those with the same
update, so that the update can run on the buffers themselves; the moments of such a buffer are packed in its order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ArraySpec, is_abstract, is_traced
from statewise._src.common.paths import format_shape
from statewise.errors import StructureError

__all__ = ["PackedBuffer", "Packing", "choose", "pack", "separated", "unpack"]

# Bytes.  Measured (docs/decisions.md): up to this size a packed step took half to two thirds of the time, at four times
# the size about as long.
LARGEST = 64 * 1024
# Fewer arrays than this are not worth a buffer.
FEWEST = 4
# How many arrays a run of a buffer may have: see `separated`.
_RUN = range(8, 65)


class PackedBuffer(NamedTuple):
    """Some arrays of one kind, one after the other.

    Attributes:
      positions: the positions of the arrays in the kind, in the order of the buffer.
      specs: the shape and dtype of each.
    """

    positions: tuple[int, ...]
    specs: tuple[ArraySpec, ...]

    @property
    def spec(self) -> ArraySpec:
        """Returns the shape and dtype of the buffer itself."""
        return ArraySpec((sum(spec.size for spec in self.specs),), self.specs[0].dtype)

    def arrays(self, flat: Any) -> list[Any]:
        """Returns the arrays in a buffer."""
        sizes = [spec.size for spec in self.specs]
        if isinstance(flat, np.ndarray):
            parts: Sequence[Any] = np.split(flat, np.cumsum(sizes[:-1]))
        else:
            parts = jax.lax.split(flat, sizes)  # one equation: a slice for each array takes much longer to trace
        return [part.reshape(spec.shape) for part, spec in zip(parts, self.specs, strict=True)]

    def join(self, arrays: Sequence[Any]) -> Any:
        """Returns the buffer that contains these arrays."""
        if is_abstract(arrays):
            return jax.ShapeDtypeStruct((sum(array.size for array in arrays),), arrays[0].dtype)
        if is_traced(arrays):
            return jnp.concatenate([jnp.ravel(array) for array in arrays])
        # On the host: JAX would dispatch an operation for each array.
        return jnp.asarray(np.concatenate([np.ravel(np.asarray(array)) for array in arrays]))

    def split(self, flat: Any) -> Sequence[Any]:
        """Returns the arrays in what a state stores as the buffer: an array, a tracer, a shape, or an axis of `vmap`.

        Raises:
          StructureError: an array of another shape.
        """
        if isinstance(flat, compat.Tracer):
            return self.arrays(flat)
        if isinstance(flat, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(*spec) for spec in self.specs]
        if not isinstance(flat, jax.Array | np.ndarray):
            return [flat] * len(self.positions)  # an axis, or whatever else JAX puts into a pytree
        if flat.shape != self.spec.shape:
            raise StructureError(
                f"A buffer of packed arrays is {format_shape(flat.shape)}, not {format_shape(self.spec.shape)}.",
                hint="take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)",
            )
        arrays = self.arrays(np.asarray(flat))
        if isinstance(flat, np.ndarray):
            return arrays
        # A sharded buffer does not determine how its arrays would be sharded.
        if not flat.sharding.is_fully_replicated:
            return list(map(jnp.asarray, arrays))
        # One transfer for all arrays; slicing the JAX array would dispatch an operation for each.
        return jax.device_put(arrays, flat.sharding)


class Packing(NamedTuple):
    """The layout of a packed part: first some arrays as they are, then the buffers.

    Attributes:
      loose: the positions of the arrays that are stored as they are.
      buffers: the buffers after them.
    """

    loose: tuple[int, ...]
    buffers: tuple[PackedBuffer, ...]

    def slots(self) -> dict[int, tuple[int, PackedBuffer | None]]:
        """Returns the slot of each array by its position, and the buffer in that slot."""
        slots: dict[int, tuple[int, PackedBuffer | None]] = {
            position: (slot, None) for slot, position in enumerate(self.loose)
        }
        for slot, buffer in enumerate(self.buffers, len(self.loose)):
            slots |= dict.fromkeys(buffer.positions, (slot, buffer))
        return slots


def pack(packing: Packing, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a packed part, from the arrays of a kind in order."""
    buffers = [buffer.join([arrays[position] for position in buffer.positions]) for buffer in packing.buffers]
    return (*(arrays[position] for position in packing.loose), *buffers)


def unpack(packing: Packing, part: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the arrays of a kind in order, from a packed part; the inverse of `pack`."""
    loose = len(packing.loose)
    arrays = dict(zip(packing.loose, part[:loose], strict=True))
    for buffer, flat in zip(packing.buffers, part[loose:], strict=True):
        arrays |= zip(buffer.positions, buffer.split(flat), strict=True)
    return tuple(arrays[position] for position in range(len(arrays)))


def separated(buffer: PackedBuffer, flat: Any) -> list[Any]:
    """Returns the arrays in a buffer, inside a compiled function, computed apart from what reads them.

    XLA fuses a slice into each of its users, and so compiles a separate kernel for each use of each weight: on the CPU
    that takes several times as long as the rest of a training step.  In the branches of a conditional the slices are
    separate computations, made of trivial copies.  Both branches are the same, so it does not matter which is taken,
    only that the compiler cannot know.

    XLA compiles equal kernels once, and a slice of another place is another kernel.  So a buffer is first cut into runs
    of arrays, and the runs into arrays: the layers of a model make equal runs, and their slices are equal kernels.
    """
    if jax.default_backend() != "cpu":
        return buffer.arrays(flat)
    runs = _runs(buffer.specs)
    if len(runs) == 1:
        return _undecided(buffer.arrays, flat)
    sizes = [run.spec.size for run in runs]

    def arrays(parts: Sequence[Any]) -> list[Any]:
        return [array for run, part in zip(runs, parts, strict=True) for array in run.arrays(part)]

    return _undecided(arrays, _undecided(lambda flat: jax.lax.split(flat, sizes), flat))


def _undecided(cut: Callable[[Any], Sequence[Any]], of: Any) -> list[Any]:
    """Returns `cut(of)`, in both branches of a conditional that the compiler cannot decide."""
    first = jax.tree.leaves(of)[0][0]
    return list(jax.lax.cond(first == first, cut, lambda of: cut(of), of))


@functools.lru_cache(maxsize=256)
def _runs(specs: tuple[ArraySpec, ...]) -> tuple[PackedBuffer, ...]:
    """Returns the runs into which a buffer is cut: those for which XLA compiles the fewest kernels."""
    lengths = [len(specs), *range(_RUN.start, min(_RUN.stop, len(specs)))]
    length = min(lengths, key=functools.partial(_kernels, [(spec.size, spec.shape) for spec in specs]))
    starts = range(0, len(specs), length)
    return tuple(PackedBuffer((), specs[start : start + length]) for start in starts)


def _kernels(arrays: Sequence[tuple[int, tuple[int, ...]]], length: int) -> int:
    """Returns how many different slices are compiled for runs of a length: of the runs, and of the arrays in them."""
    starts = range(0, len(arrays), length)
    if len(starts) == 1:
        return len(arrays)
    different = set()
    for start in starts:
        run = arrays[start : start + length]
        total = sum(size for size, _ in run)
        place = 0
        for size, shape in run:
            different.add((total, place, shape))
            place += size
    return len(starts) + len(different)


# --- what to pack ----------------------------------------------------------------------------------------------


def choose(
    specs: Mapping[str, Sequence[ArraySpec]], kinds: Sequence[str], derived: Sequence[Any]
) -> dict[str, Packing]:
    """Decides which arrays of these kinds share buffers.

    Args:
      specs: the shape and dtype of each array of each kind.
      kinds: the kinds to pack.
      derived: the `DerivedArrays` of the plan.

    Returns:
      the packing of each kind that has at least one buffer.
    """
    # For each source array (kind and position): what the derived arrays compute from it, which must be equal within a
    # buffer; and where they are, because they are packed in the order of their sources.
    classes: dict[tuple[str, int], list[Any]] = {}
    followers: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for each in derived:
        into = each.derived.into
        companions = each.derived.companions() if into in kinds else None
        if companions is None:
            continue
        for source, signature, own in zip(each.sources, companions.signatures, companions.own, strict=True):
            spot = (source.kind, source.position)
            positions = tuple(each.start + index for index in own)
            dtypes = tuple(str(specs[into][position].dtype) for position in positions)
            classes.setdefault(spot, []).append((each.order, signature, dtypes))
            followers.setdefault(spot, []).append((into, positions))
    following: dict[str, list[tuple[int, ...]]] = {each.derived.into: [] for each in derived}
    packings: dict[str, Packing] = {}
    for kind in kinds:
        if kind in following:
            continue
        packings[kind] = _packing(specs[kind], kind, classes)
        for buffer in packings[kind].buffers:
            # The arrays of a buffer are of one class, so they have the same followers: a column is one of these.
            rows = [followers.get((kind, position), []) for position in buffer.positions]
            for column in zip(*rows, strict=True):
                following[column[0][0]] += zip(*(positions for _, positions in column), strict=True)
    for kind, buffers in following.items():
        if kind in kinds:
            packings[kind] = _packing(specs[kind], kind, classes, buffers)
    return {kind: packing for kind, packing in packings.items() if packing.buffers}


def _packing(
    specs: Sequence[ArraySpec],
    kind: str,
    classes: Mapping[tuple[str, int], Sequence[Any]],
    chosen: Sequence[tuple[int, ...]] = (),
) -> Packing:
    """Packs the small arrays of a kind, after the buffers that are already chosen, by their positions."""
    packed = {position for positions in chosen for position in positions}
    alike: dict[Any, list[int]] = {}
    for position, spec in enumerate(specs):
        if position not in packed and _is_small(spec):
            alike.setdefault((str(spec.dtype), tuple(classes.get((kind, position), ()))), []).append(position)
    groups = [*chosen, *(positions for positions in alike.values() if len(positions) >= FEWEST)]
    packed |= {position for positions in groups for position in positions}
    return Packing(
        tuple(position for position in range(len(specs)) if position not in packed),
        tuple(PackedBuffer(tuple(positions), tuple(specs[position] for position in positions)) for positions in groups),
    )


@functools.lru_cache(maxsize=4096)
def _is_small(spec: ArraySpec) -> bool:
    if jnp.issubdtype(spec.dtype, jax.dtypes.extended):
        return False  # keys of different implementations cannot share a buffer
    return 0 < spec.size * spec.dtype.itemsize <= LARGEST
