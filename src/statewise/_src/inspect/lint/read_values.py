"""The values that rules look at, read in few calls.

Small arrays are fetched as they are, all of them in one `jax.device_get`.  Of a large one only four bits leave
its device: whether it is finite, holds NaN, is infinite, is zero; the program that finds them is compiled once for each
shape.  Values that cannot be read are left out without a word: abstract and traced ones, donated ones, and arrays
of which this process holds a part only.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Facts", "is_readable", "read"]

_LARGE = 1 << 16  # elements


class Facts(NamedTuple):
    """What is known of one array's values.

    Attributes:
      finite: no element is NaN or infinite.
      nan: some element is NaN.
      infinite: every element is infinite.
      zero: every element is zero.
      value: the array itself, where it is small; a key's words.
    """

    finite: bool
    nan: bool
    infinite: bool
    zero: bool
    value: Any


def read(arrays: Mapping[Any, Any]) -> dict[Any, Facts]:
    """The facts of each array that can be read, by the keys given."""
    readable = {key: array for key, array in arrays.items() if is_readable(array)}
    large = {key: _probe(array) for key, array in readable.items() if array.size > _LARGE and _numeric(array)}
    small = {key: _words(array) for key, array in readable.items() if key not in large}
    fetched_large, fetched_small = jax.device_get((list(large.values()), list(small.values())))
    facts = {key: _facts(bits, None) for key, bits in zip(large, fetched_large, strict=True)}
    for key, value in zip(small, fetched_small, strict=True):
        array = np.asarray(value)
        facts[key] = _facts(_bits(np, array), array)
    return facts


def _facts(bits: Any, value: Any) -> Facts:
    finite, nan, infinite, zero = map(bool, bits)
    return Facts(finite, nan, infinite, zero, value)


def is_readable(array: Any) -> bool:
    """Whether this is an array whose values are here."""
    if isinstance(array, np.ndarray | np.generic):
        return array.dtype.kind not in "OUSMm"
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return False
    return not array.is_deleted() and array.is_fully_addressable


def _numeric(array: Any) -> bool:
    return isinstance(array, jax.Array) and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _words(array: Any) -> Any:
    extended = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return jax.random.key_data(array) if extended else array


@jax.jit
def _probe(array: jax.Array) -> jax.Array:
    return jnp.stack([jnp.asarray(bit) for bit in _bits(jnp, array)])


def _bits(numpy: Any, array: Any) -> tuple[Any, Any, Any, Any]:
    """Finite, NaN, infinite and zero, of an array of JAX or of NumPy."""
    zero = numpy.logical_not((array != 0).any())
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True, False, False, zero
    infinite = numpy.isinf(array)
    return numpy.isfinite(array).all(), numpy.isnan(array).any(), infinite.all() if array.size else False, zero
