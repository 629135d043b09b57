"""Instruments: the norm, the largest absolute value and the number of elements that are not finite, of each leaf.

Squares are added in at least 32 bits, in two sums for each leaf: of the elements below `split`, and of the others, each
scaled by a power of two, so that no square overflows, and none underflows that is large enough to matter:

    norm = hypot(sqrt(sum((low * 2**20)**2)) * 2**-20, sqrt(sum((high * 2**-80)**2)) * 2**80)

Each array is read once: both sums, the largest value and the count are one reduction.  Absolute values are compared as
integers, which have the same order as the floating-point numbers with these bits (with NaN last); the loop of the CPU
is then vectorized, which it is not for floating-point maxima, nor with two sums beside each other.  So the two sums are
one, along an axis of two.

Small leaves are reduced together, as the rows of a matrix: on the CPU each reduction is a kernel of its own.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.plan.arrays import Spot
from statewise._src.plan.packing import separated
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explicit_sharding, is_split
from statewise._src.step.measured import MEASURES, Columns, Measure, Measured
from statewise._src.step.operands import Arrays
from statewise.errors import StructureError

__all__ = ["check_measured", "columns_of", "current_arrays", "measured_of"]

# Elements.  Smaller arrays are the rows of a matrix; a larger one is reduced in rows of at least `_ROW` elements.
_SMALL = 16 * 1024
_ROW = 512
# More elements than an int32 counts: then counts are added as float32, up to the largest one that is an int32.
_MANY = 2**31
_MOST = 2**31 - 128

# An array, and what is subtracted from it, if anything.
Pair = tuple[Any, Any]


class _Scaling(NamedTuple):
    """How the squares of one dtype are added.

    Attributes:
      integer: the dtype of the bits.
      split: the absolute value from which elements are in the second sum.
      scales: what the elements of each sum are multiplied by.
    """

    integer: Any
    split: float
    scales: tuple[float, float]


# Sums of 2**31 squares stay within the range: (2**27 * 2**20)**2 * 2**31 is 2**125, (2**128 * 2**-80)**2 * 2**31 is
# 2**127.  In the first sum, elements from 2**-83 on (about 1e-25) count; in the second all do.
_SCALINGS = {
    jnp.dtype(jnp.float32): _Scaling(jnp.int32, 2.0**27, (2.0**20, 2.0**-80)),
    jnp.dtype(jnp.float64): _Scaling(jnp.int64, 2.0**400, (2.0**50, 2.0**-560)),
}


class _Sums(NamedTuple):
    """Sums of squares of shape (..., 2), the bits of the largest values, and counts, both of shape (..., 2)."""

    squares: Any
    largest: Any
    counts: Any


def columns_of(
    plan: PlanTables, measures: Collection[Measure], written: Sequence[int], trained: Sequence[int]
) -> Columns:
    """Returns what is measured of which arrays.

    Args:
      plan: the plan.
      measures: what is measured.
      written: the numbers of the arrays that the function writes.
      trained: the numbers of the arrays that it is differentiated with respect to.
    """
    entries: list[tuple[Measure, int]] = []
    for what in MEASURES:
        if what in measures:
            numbers = [number for number in written if _is_number(plan, number)] if what == "written" else trained
            entries += ((what, number) for number in sorted(numbers))
    return Columns(plan, tuple(entries))


def _is_number(plan: PlanTables, number: int) -> bool:
    """Returns whether an array is measured: keys have no norm, and the counters of random streams mean nothing."""
    info = plan.arrays[number]
    return not (issubclass(info.leaf.type, nnx.RngState) or jnp.issubdtype(info.spec.dtype, jax.dtypes.extended))


def check_measured(plan: PlanTables, measures: Collection[Measure], written: Sequence[int], name: str) -> None:
    """Checks that there is something to measure.

    Raises:
      StructureError: only what the function writes is measured, and it writes no numbers.
    """
    if set(measures) == {"written"} and not columns_of(plan, measures, written, ()).entries:
        raise StructureError(
            f"{name} measures what its function writes, and it writes nothing but its random streams, if any.",
            hint="measure=('params', 'grads', 'updates'), or leave measure out",
        )


def current_arrays(plan: PlanTables, arrays: Arrays, numbers: Collection[int]) -> dict[int, Any]:
    """Returns the new values of some arrays, also of those that were computed in whole buffers."""
    current: dict[int, Any] = {}
    buffers: dict[Spot, dict[int, Any]] = {}
    slots = {number: slot for slot in plan.buffers if slot.spot in arrays.computed for number in slot.numbers}
    for number in numbers:
        slot = slots.get(number)
        if slot is None or slot.buffer is None:
            current[number] = arrays.flat[number]
            continue
        if slot.spot not in buffers:
            values = separated(slot.buffer, arrays.computed[slot.spot])
            buffers[slot.spot] = dict(zip(slot.numbers, values, strict=True))
        current[number] = buffers[slot.spot][number]
    return current


def measured_of(columns: Columns, pairs: Sequence[Pair], axes: tuple[str, ...] = ()) -> Measured:
    """Measures arrays, or differences of two arrays.

    Args:
      columns: what is measured, in order.
      pairs: the arrays, in this order.
      axes: the mesh axes on each device of which this runs: an array that is kept for each device is measured over all.
    """
    # What is measured is never differentiated, also where the step is.  An array that occurs twice stays one object.
    fixed = {id(array): jax.lax.stop_gradient(array) for pair in pairs for array in pair}
    pairs = [(fixed[id(array)], fixed[id(minus)]) for array, minus in pairs]
    groups: dict[Any, list[int]] = {}
    for index, (array, _) in enumerate(pairs):
        groups.setdefault(_wide(array.dtype), []).append(index)
    order = np.argsort([index for group in groups.values() for index in group])
    figures, counts = [], []
    for dtype, group in groups.items():
        sums = _each([pairs[index] for index in group], dtype)
        infos = [columns.tables.arrays[columns.entries[index][1]] for index in group]
        own = np.array([place for place, info in enumerate(infos) if info.devices], int)
        if axes and own.size:
            sums = _over_devices(sums, own, axes)
        figures.append(_norms_and_largest(sums, dtype))
        counts.append(sums.counts[:, 0])
    joined = figures[0] if len(figures) == 1 else jnp.concatenate([each.astype(max(groups)) for each in figures], 1)
    counted = counts[0] if len(counts) == 1 else jnp.concatenate(counts)
    return Measured(joined[:, order], counted[order], columns)


def _wide(dtype: Any) -> Any:
    """Returns the real dtype in which an array is measured."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = jnp.finfo(dtype).dtype
    is_double = dtype == jnp.float64
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def _over_devices(sums: _Sums, own: np.ndarray, axes: tuple[str, ...]) -> _Sums:
    """Adds up, over all devices, the rows of arrays that each device has for itself."""
    return _Sums(
        sums.squares.at[own].set(jax.lax.psum(sums.squares[own], axes)),
        sums.largest.at[own].set(jax.lax.pmax(sums.largest[own], axes)),
        sums.counts.at[own].set(jax.lax.psum(sums.counts[own], axes)),
    )


def _norms_and_largest(sums: _Sums, dtype: Any) -> Any:
    """Returns norms and largest absolute values, of shape (2, n)."""
    scaling = _SCALINGS[dtype]
    low, high = (jnp.sqrt(sums.squares[:, index]) * (1 / scaling.scales[index]) for index in (0, 1))
    more, less = jnp.maximum(low, high), jnp.minimum(low, high)
    norms = jnp.where(less == 0, more, more * jnp.sqrt(1 + (less / more) ** 2))
    largest = jax.lax.bitcast_convert_type(sums.largest[:, 0], dtype)
    return jnp.stack([jnp.maximum(norms, largest), largest])  # tiny elements have squares of zero


def _each(pairs: Sequence[Pair], dtype: Any) -> _Sums:
    """Returns the sums of each array, in order."""
    small: dict[Any, list[int]] = {}
    parts: list[_Sums] = []
    order: list[int] = []
    for index, (array, minus) in enumerate(pairs):
        if not array.size:
            continue
        if array.size > _SMALL or is_split(array):
            parts.append(_of_one(_bits(array, minus, dtype), dtype))
            order.append(index)
        else:
            # Rows of one width, or filled up with zeros to the largest one: at most twice as many elements.
            width = 1 << (array.size - 1).bit_length()
            small.setdefault((array.dtype, width, minus is None), []).append(index)
    made: dict[tuple[int, ...], Any] = {}  # the new parameters are measured alone, and less the old ones
    for group in small.values():
        sides = zip(*(pairs[index] for index in group), strict=True)
        value, minus = (None if arrays[0] is None else _rows(arrays, made) for arrays in sides)
        parts.append(_reduced(_bits(value, minus, dtype), 1, dtype))
        order += group
    empty = [index for index, (array, _) in enumerate(pairs) if not array.size]
    if empty:
        zeros = jnp.zeros((len(empty), 2), dtype)
        parts.append(_Sums(zeros, zeros.astype(_SCALINGS[dtype].integer), zeros.astype(jnp.int32)))
        order += empty
    back = np.argsort(order)
    return _Sums(*((jnp.concatenate(each) if len(parts) > 1 else each[0])[back] for each in zip(*parts, strict=True)))


def _rows(arrays: Sequence[Any], made: dict[tuple[int, ...], Any]) -> Any:
    """Returns small arrays as the rows of a matrix, filled up with zeros; `made` has the matrices made before."""
    key = tuple(map(id, arrays))
    if key in made:
        return made[key]
    width = max(array.size for array in arrays)
    parts = []
    # Without the barrier XLA fuses whatever made the arrays into one enormous kernel.
    for array in jax.lax.optimization_barrier(list(arrays)):
        parts.append(jnp.ravel(array))
        if array.size < width:
            parts.append(jnp.zeros(width - array.size, array.dtype))
    made[key] = jnp.concatenate(parts).reshape(len(arrays), width)
    return made[key]


def _bits(array: Any, minus: Any, dtype: Any) -> Any:
    """Returns the bits of the absolute values, as integers."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.abs(array if minus is None else array - minus)
        minus = None
    value = array.astype(dtype)
    if minus is not None:
        value = value - minus.astype(dtype)
    integer = _SCALINGS[dtype].integer
    return jax.lax.bitcast_convert_type(value, integer) & jnp.array(np.iinfo(integer).max, integer)


def _of_one(bits: Any, dtype: Any) -> _Sums:
    """Returns the sums of one large array, of shape (1, 2): of rows first, then of these."""
    if bits.ndim == 1 and bits.size % _ROW == 0 and explicit_sharding(bits) is None:
        bits = bits.reshape(-1, _ROW)
    axes = 1
    while axes < bits.ndim and math.prod(bits.shape[-axes:]) < _ROW:
        axes += 1
    sums = _reduced(bits, axes, dtype)
    if axes < bits.ndim:
        # XLA would make one reduction of the two, and add up millions of squares one by one.
        sums = _Sums(*jax.lax.optimization_barrier(tuple(sums)))
        if bits.size >= _MANY:
            sums = sums._replace(counts=sums.counts.astype(jnp.float32))
        sums = _added(sums, tuple(range(bits.ndim - axes)))
        if bits.size >= _MANY:
            sums = sums._replace(counts=jnp.minimum(sums.counts, _MOST).astype(jnp.int32))
    return _Sums(*(each[None] for each in sums))


def _reduced(bits: Any, axes: int, dtype: Any) -> _Sums:
    """Returns the sums over the last axes, with an axis of two in place of them."""
    integer, split, scales = _SCALINGS[dtype]
    rest = bits.ndim - axes
    shape = (*bits.shape[:rest], 2, *bits.shape[rest:])
    bits = jax.lax.broadcast_in_dim(bits, shape, (*range(rest), *range(rest + 1, bits.ndim + 1)))
    of_sum = (*[1] * rest, 2, *[1] * axes)
    is_high = bits >= np.array(split, dtype).view(integer)
    value = jax.lax.bitcast_convert_type(bits, dtype) * np.array(scales, dtype).reshape(of_sum)
    value = jnp.where(is_high == np.array([False, True]).reshape(of_sum), value, 0)
    is_bad = bits >= np.array(np.inf, dtype).view(integer)
    return _added(_Sums(value * value, bits, is_bad.astype(jnp.int32)), tuple(range(rest + 1, bits.ndim)))


def _added(sums: _Sums, axes: tuple[int, ...]) -> _Sums:
    """Reduces sums over some axes, all in one loop."""
    zeros = tuple(np.zeros((), each.dtype) for each in sums)

    def add(one: Any, other: Any) -> Any:
        return one[0] + other[0], jnp.maximum(one[1], other[1]), one[2] + other[2]

    return _Sums(*jax.lax.reduce(tuple(sums), zeros, add, axes))
