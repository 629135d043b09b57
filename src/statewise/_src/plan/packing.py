"""Many small arrays as few buffers.

What a call of a compiled function costs follows the number of arrays that cross its boundary, outputs above all.
A packed state carries the small arrays of a kind in a few flat buffers, large ones as they are.  `Packing` says
which array stands where; `pack` and `unpack` go between the two forms.  Everything that a user sees of a state
(`state["params"]`, `replace`, `put`) speaks of the arrays; only the pytree itself, and the compiled step, see the
buffers.

Which arrays share a buffer is decided when a state is taken: those of one kind and dtype, below a size above which
copying costs more than crossing, and where the optimizer is elementwise (see `elementwise`) also with one update, so
that the update can run on the buffers themselves; the moments of such a buffer are packed in its order.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.nnx_graph import ArraySpec, is_abstract, is_traced
from statewise._src.common.paths import format_shape
from statewise.errors import StructureError

__all__ = ["PackedBuffer", "Packing", "choose", "pack", "separated", "unpack"]

# Bytes.  Measured (docs/decisions.md): up to here a packed step took half to two thirds of the time, at four times this
# size about as long.
LARGEST = 64 * 1024
# Fewer arrays than this are not worth a buffer.
FEWEST = 4


class PackedBuffer(NamedTuple):
    """Some arrays of one kind, one after the other.

    Attributes:
      positions: which of the kind's arrays, in this order.
      specs: the shape and dtype of each.
    """

    positions: tuple[int, ...]
    specs: tuple[ArraySpec, ...]

    @property
    def spec(self) -> ArraySpec:
        """The shape and dtype of the buffer itself."""
        return ArraySpec((sum(spec.size for spec in self.specs),), self.specs[0].dtype)

    def arrays(self, flat: Any) -> list[Any]:
        """The arrays in a buffer."""
        made, at = [], 0
        for spec in self.specs:
            made.append(flat[at : at + spec.size].reshape(spec.shape))
            at += spec.size
        return made

    def join(self, arrays: Sequence[Any]) -> Any:
        """The buffer of these arrays."""
        if is_abstract(arrays):
            return jax.ShapeDtypeStruct((sum(array.size for array in arrays),), arrays[0].dtype)
        if is_traced(arrays):
            return jnp.concatenate([jnp.ravel(array) for array in arrays])
        return jnp.asarray(np.concatenate([np.ravel(np.asarray(array)) for array in arrays]))


class Packing(NamedTuple):
    """How one kind's arrays stand in its part of a packed state: some as they are, then the buffers.

    Attributes:
      loose: which arrays stand there as they are.
      buffers: the buffers after them.
    """

    loose: tuple[int, ...]
    buffers: tuple[PackedBuffer, ...]

    @property
    def size(self) -> int:
        """How many arrays are told apart by it."""
        return len(self.loose) + sum(len(buffer.positions) for buffer in self.buffers)


def pack(packing: Packing, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """A packed part from a kind's arrays in order."""
    joined = [buffer.join([arrays[position] for position in buffer.positions]) for buffer in packing.buffers]
    return (*(arrays[position] for position in packing.loose), *joined)


def unpack(packing: Packing, part: Sequence[Any]) -> tuple[Any, ...]:
    """A kind's arrays in order from a packed part; the inverse of `pack`."""
    arrays: list[Any] = [None] * packing.size
    for position, array in zip(packing.loose, part, strict=False):
        arrays[position] = array
    for buffer, flat in zip(packing.buffers, part[len(packing.loose) :], strict=True):
        for position, array in zip(buffer.positions, _split(buffer, flat), strict=True):
            arrays[position] = array
    return tuple(arrays)


def _split(buffer: PackedBuffer, flat: Any) -> Sequence[Any]:
    if isinstance(flat, jax.core.Tracer):
        return buffer.arrays(flat)
    if isinstance(flat, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in buffer.specs]
    if not isinstance(flat, jax.Array | np.ndarray):
        return [flat] * len(buffer.positions)  # an axis, or whatever JAX has put there
    if flat.shape != buffer.spec.shape:
        raise StructureError(
            f"A buffer of packed arrays is {format_shape(flat.shape)}, not {format_shape(buffer.spec.shape)}.",
            hint="take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)",
        )
    arrays = buffer.arrays(np.asarray(flat))
    if isinstance(flat, np.ndarray):
        return arrays
    # One transfer for all of them; each slice of a JAX array would be a dispatch.  A buffer that is spread over
    # devices says nothing of how its arrays would be.
    return (
        jax.device_put(arrays, flat.sharding) if flat.sharding.is_fully_replicated else list(map(jnp.asarray, arrays))
    )


def separated(buffer: PackedBuffer, flat: Any) -> list[Any]:
    """The arrays in a buffer, inside a compiled function, made apart from their users.

    XLA fuses a slice into each of its users, and so compiles a kernel of its own for each weight in each place
    that reads it: on the CPU that takes several times as long as all the rest of a training step.  In the branches
    of a conditional the slices are computations apart, made of trivial copies.  Both branches are the same, so it
    does not matter which is taken, only that the compiler cannot know.
    """
    if jax.default_backend() != "cpu":
        return buffer.arrays(flat)
    return jax.lax.cond(flat[0] == flat[0], buffer.arrays, lambda flat: buffer.arrays(flat), flat)


# --- what to pack ----------------------------------------------------------------------------------------------


def choose(
    specs: Mapping[str, Sequence[ArraySpec]], kinds: Sequence[str], derived: Sequence[Any]
) -> dict[str, Packing]:
    """Decides which arrays of these kinds share buffers.

    Args:
      specs: the shape and dtype of each array of each kind.
      kinds: the kinds to pack.
      derived: all that is derived, with its arrays.

    Returns:
      the packing of each kind that has at least one buffer.
    """
    classes: dict[tuple[str, int], list[Any]] = {}
    # What is derived is packed in the order of its sources: of each source, by what is derived, the positions there.
    followers: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for one in derived:
        into = one.derived.into
        companions = one.derived.companions() if into in kinds else None
        if companions is None:
            continue
        for source, signature, own in zip(one.sources, companions.signatures, companions.own, strict=True):
            spot = (source.kind, source.position)
            positions = tuple(one.start + at for at in own)
            dtypes = tuple(str(specs[into][position].dtype) for position in positions)
            classes.setdefault(spot, []).append((one.order, signature, dtypes))
            followers.setdefault(spot, []).append((into, positions))
    following: dict[str, list[tuple[int, ...]]] = {one.derived.into: [] for one in derived}
    packings: dict[str, Packing] = {}
    for kind in kinds:
        if kind in following:
            continue
        packings[kind] = _packing(specs[kind], kind, classes)
        for buffer in packings[kind].buffers:
            # The arrays of a buffer are of one class, and so have the same followers.
            rows = [followers.get((kind, position), []) for position in buffer.positions]
            for column in zip(*rows, strict=True):
                following[column[0][0]] += zip(*(positions for _, positions in column), strict=True)
    for kind, buffers in following.items():
        if kind in kinds:
            taken = {position for positions in buffers for position in positions}
            rest = _packing(specs[kind], kind, classes, without=taken)
            joined = tuple(_buffer(specs[kind], positions) for positions in buffers)
            packings[kind] = Packing(rest.loose, (*joined, *rest.buffers))
    return {kind: packing for kind, packing in packings.items() if packing.buffers}


def _packing(
    specs: Sequence[ArraySpec],
    kind: str,
    classes: Mapping[tuple[str, int], Sequence[Any]],
    without: set[int] | None = None,
) -> Packing:
    alike: dict[Any, list[int]] = {}
    for position, spec in enumerate(specs):
        if position not in (without or ()) and _is_small(spec):
            alike.setdefault((str(spec.dtype), tuple(classes.get((kind, position), ()))), []).append(position)
    buffers = [_buffer(specs, positions) for positions in alike.values() if len(positions) >= FEWEST]
    packed = {position for buffer in buffers for position in buffer.positions} | (without or set())
    return Packing(tuple(position for position in range(len(specs)) if position not in packed), tuple(buffers))


def _buffer(specs: Sequence[ArraySpec], positions: Sequence[int]) -> PackedBuffer:
    return PackedBuffer(tuple(positions), tuple(specs[position] for position in positions))


@functools.lru_cache(maxsize=4096)
def _is_small(spec: ArraySpec) -> bool:
    if jnp.issubdtype(spec.dtype, jax.dtypes.extended):
        return False  # keys of different implementations do not mix
    return 0 < spec.size * spec.dtype.itemsize <= LARGEST
