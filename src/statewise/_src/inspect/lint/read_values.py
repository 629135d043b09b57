"""The values that rules look at, read in few transfers.

Small arrays are fetched as they are, all of them in one `jax.device_get`.  Of a large one only four bits leave its
device: whether it is finite, contains NaN, is infinite, is zero; the program that computes them is compiled once for
each shape.  Values that cannot be read are skipped silently: abstract, traced and donated ones, and arrays of which
this process holds only a part.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat

__all__ = ["Facts", "is_readable", "read"]

_LARGE = 1 << 16  # elements

K = TypeVar("K", bound=Hashable)


class Facts(NamedTuple):
    """The known facts about one array's values.

    Attributes:
      finite: no element is NaN or infinite.
      nan: some element is NaN.
      infinite: every element is infinite.
      zero: every element is zero.
      value: the array itself, if it is small; for a key, its words.
    """

    finite: bool
    nan: bool
    infinite: bool
    zero: bool
    value: np.ndarray | None


def read(arrays: Mapping[K, Any]) -> dict[K, Facts]:
    """Returns the facts of each array that can be read, under its key."""
    readable = {key: array for key, array in arrays.items() if is_readable(array)}
    # Keys are always fetched: they have no floating-point facts to compute.
    large = {
        key: _probe(array)
        for key, array in readable.items()
        if array.size > _LARGE and isinstance(array, jax.Array) and not _is_key(array)
    }
    small = {
        key: jax.random.key_data(array) if _is_key(array) else array
        for key, array in readable.items()
        if key not in large
    }
    # Every program has been started before the first result is waited for.
    bits, values = jax.device_get((large, small))
    facts = {key: _facts(found, None) for key, found in bits.items()}
    for key, value in values.items():
        array = np.asarray(value)
        facts[key] = _facts(_bits(np, array), array)
    return facts


def _facts(bits: Any, value: np.ndarray | None) -> Facts:
    finite, nan, infinite, zero = map(bool, bits)
    return Facts(finite, nan, infinite, zero, value)


def is_readable(array: object) -> bool:
    """Returns whether this is an array whose values are in this process."""
    if isinstance(array, np.ndarray | np.generic):
        return array.dtype.kind not in "OUSMm"
    if not isinstance(array, jax.Array) or isinstance(array, compat.Tracer):
        return False
    return not array.is_deleted() and array.is_fully_addressable


def _is_key(array: object) -> bool:
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended)


@jax.jit
def _probe(array: jax.Array) -> jax.Array:
    return jnp.stack([jnp.asarray(bit) for bit in _bits(jnp, array)])


def _bits(numpy: Any, array: Any) -> tuple[Any, Any, Any, Any]:
    """Returns whether an array of JAX or NumPy is finite, contains NaN, is infinite, is zero."""
    zero = numpy.logical_not((array != 0).any())
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True, False, False, zero
    infinite = numpy.isinf(array)
    return numpy.isfinite(array).all(), numpy.isnan(array).any(), infinite.all() if array.size else False, zero
