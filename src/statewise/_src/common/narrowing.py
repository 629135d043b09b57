"""Numbers that a cast would lose: one check for every door where a value changes its dtype.

JAX and NumPy cast without a word: int64 wraps around in int32, 1e300 becomes infinite in float32, and where JAX has no
64-bit numbers it narrows whatever NumPy gives it.  So each function that is about to cast (`take`, `replace`, `cast`,
`transfer`, `restore`, `convert` ...) first gathers its casts here, and changes nothing if one of them loses a number:

- an integer that the new dtype does not have: outside of its range; in a floating-point dtype, one that it does not
  hold exactly;
- a finite number that rounds to more than the largest finite one, and infinity or NaN where the new dtype has none;
- a fraction, NaN or infinity as an integer; a number other than 0 and 1 as a boolean; an imaginary part as a real one.

Rounding within the range is not a loss, and underflow to zero is rounding.  A value that is being traced is not known:
inside `jax.jit` a cast that was asked for goes through as JAX does it.  What JAX holds is looked at where it is, by one
reduction whose single number comes to the host; casts that can lose nothing (float32 to float64) cost nothing.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems
from statewise.errors import StatewiseError, StructureError

__all__ = ["WIDE", "Casts", "as_jax", "check_given", "may_lose", "refuse"]

WIDE = "jax.config.update('jax_enable_x64', True)  # before any array is made; or values of a dtype that JAX has"


class Casts:
    """Casts that are about to be made.  `add` starts the reductions, `lost` waits for all of them at once.

    Args:
      jax: whether JAX makes the arrays: without 64-bit numbers it then narrows what NumPy gives it once more.
    """

    def __init__(self, *, jax: bool = True) -> None:
        self._jax = jax
        self._found: list[tuple[Leaf, Any, Any, Any]] = []

    def add(self, leaf: Leaf, array: Any, dtype: Any) -> None:
        """Adds the cast of an array, or of a Python number; nothing happens where the dtype stays, or is traced."""
        theirs = getattr(array, "dtype", None)
        if not isinstance(array, jax.Array):
            if isinstance(array, jax.ShapeDtypeStruct) or spec_of(array) is None:
                return
            dtype = jax.dtypes.canonicalize_dtype(dtype) if self._jax else jnp.dtype(dtype)
        if theirs == dtype or isinstance(array, jax.core.Tracer):
            return
        if theirs is None:
            worst: Any = _of_python(array, dtype)
        elif not may_lose(theirs, jnp.dtype(dtype)) or not array.size:
            return
        else:
            worst = _worst_of(array, jnp.dtype(dtype))
        self._found.append((leaf, array, jnp.dtype(dtype), worst))

    def holding(self, dtypes: Sequence[str]) -> str | None:
        """The first of these dtypes that holds all numbers that were looked at; None if none does."""
        for dtype in dtypes:
            again = Casts(jax=self._jax)
            for leaf, array, _, _ in self._found:
                again.add(leaf, array, dtype)
            if jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype) and not again.lost():
                return dtype
        return None

    def lost(self) -> list[Leaf]:
        """The leaves that would lose numbers, each with a note that has the magnitude of one of them."""
        if not self._found:
            return []
        leaves: dict[Leaf, None] = {}
        worst = jax.device_get([one[3] for one in self._found])
        for (leaf, array, ours, _), magnitude in zip(self._found, map(float, worst), strict=True):
            if magnitude >= 0:
                what = f"{array.dtype} numbers" if hasattr(array, "dtype") else "a number"
                one, have = (", one of magnitude", "have") if hasattr(array, "dtype") else (" of magnitude", "has")
                note = f"{what}{one} {magnitude:.3g}, that {have} no place in {ours}"
                leaves[dataclasses.replace(leaf, note=note)] = None
        return list(leaves)

    def check(self, error: type[StatewiseError], hint: str, *, before: str = "", after: str = "changed") -> None:
        """Raises where a number would be lost.

        Args:
          error: the class of the error.
          hint: what to change.
          before: what to put before the fact.
          after: what nothing was: changed, written.

        Raises:
          StatewiseError: of that class, with all the leaves.
        """
        refuse(self.lost(), error, hint, before=before, after=after)


def refuse(
    leaves: Sequence[Leaf], error: type[StatewiseError], hint: str, *, before: str = "", after: str = "changed"
) -> None:
    """Raises the error of `Casts.check` where there are such leaves."""
    fact = "Casting would lose numbers: {n} leaves have some that the new dtype does not."
    Problems(leaves).raise_as(error, f"{before}{fact} Nothing was {after}.", hint)


def check_given(given: Iterable[tuple[Leaf, Any, Any]], before: str = "") -> None:
    """Checks values of NumPy and numbers of Python that JAX is about to take: leaf, value, dtype.

    Raises:
      StructureError: some that it would narrow; all are listed.
    """
    casts = Casts()
    for leaf, value, dtype in given:
        casts.add(leaf, value, dtype)
    casts.check(StructureError, WIDE, before=before)


def as_jax(leaf: Leaf, value: Any, lost: list[Leaf]) -> Any:
    """Returns what JAX makes of a value that a user's function gave.

    Where that would lose numbers, zeros stand for it and the leaf is added to `lost`: all are to be listed at once.
    """
    spec = None if isinstance(value, jax.Array) else spec_of(value)
    if spec is None:
        return jnp.asarray(value)
    casts = Casts()
    casts.add(leaf, value, spec.dtype)
    found = casts.lost()
    lost += found
    return jnp.zeros(spec.shape, spec.dtype) if found else jnp.asarray(value)


# --- what a dtype holds ------------------------------------------------------------------------------------------


class _Range(NamedTuple):
    """What a floating-point dtype holds.

    Attributes:
      largest: the largest finite number.
      digits: how many binary digits an integer may have.
      limit: from here on a number does not round to a finite one.
      beyond: whether the limit itself still does.
      infinite, nan, negative, zero: whether it has such numbers.
    """

    largest: float
    digits: int
    limit: float
    beyond: bool
    infinite: bool
    nan: bool
    negative: bool
    zero: bool


@functools.cache
def _range(dtype: Any) -> _Range:
    info = jnp.finfo(dtype)
    largest, digits = float(info.max), int(info.nmant) + 1
    step = 2.0 ** (int(np.frexp(largest)[1]) - digits)  # between the largest number and what would be the next
    if dtype.itemsize >= 8:
        return _Range(largest, digits, np.inf, False, True, True, True, True)
    with np.errstate(all="ignore"):
        limit = largest + step / 2
        rounded, infinite, nan, negative, zero = (
            float(value) for value in np.array([limit, np.inf, np.nan, -1.0, 0.0]).astype(dtype).astype(np.float64)
        )
    beyond = rounded == largest
    return _Range(largest, digits, limit, beyond, infinite == np.inf, bool(np.isnan(nan)), negative == -1, zero == 0)


def _is(dtype: Any, family: Any) -> bool:
    return bool(jnp.issubdtype(dtype, family))


def _part(dtype: Any) -> Any:
    """Of complex numbers the dtype of their parts."""
    return jnp.finfo(dtype).dtype if _is(dtype, jnp.complexfloating) else dtype


@functools.cache
def may_lose(theirs: Any, ours: Any) -> bool:
    """Whether there is a number of one dtype that another does not have; told from the dtypes alone."""
    if theirs == ours or theirs == jnp.bool_ or _is(theirs, jax.dtypes.extended) or _is(ours, jax.dtypes.extended):
        return False
    if ours == jnp.bool_:
        return True
    if _is(theirs, jnp.complexfloating):
        return not _is(ours, jnp.complexfloating) or may_lose(_part(theirs), _part(ours))
    if _is(theirs, jnp.integer):
        have = jnp.iinfo(theirs)
        if _is(ours, jnp.integer):
            fits = jnp.iinfo(ours)
            return not (int(fits.min) <= int(have.min) and int(have.max) <= int(fits.max))
        holds = _range(_part(ours))
        return not (2**holds.digits > int(have.max) and int(have.max) <= holds.largest and holds.negative)
    if _is(ours, jnp.integer):
        return True
    here, there = _range(theirs), _range(_part(ours))
    wider = here.largest < there.limit or (here.largest == there.limit and there.beyond)
    special = (here.infinite <= there.infinite) and (here.nan <= there.nan)
    return not (wider and special and here.negative <= there.negative and here.zero <= there.zero)


# --- the reduction -----------------------------------------------------------------------------------------------


def _worst_of(array: Any, ours: Any) -> Any:
    """The largest magnitude among the numbers that would be lost; negative if none would."""
    if not isinstance(array, jax.Array):
        return _on_host(np.asarray(array), ours)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype and array.is_fully_addressable:
        return _on_host(np.asarray(array), ours)  # JAX computes with it only where it has 64-bit numbers
    sharding: Any = array.sharding
    (device, *_) = sharding.addressable_devices
    usual = device.default_memory().kind
    with jax.ensure_compile_time_eval():  # where somebody traces, these are values all the same
        if sharding.memory_kind not in (None, usual):
            array = jax.device_put(array, sharding.with_memory_kind(usual))
        return _reduced(array, ours)


@functools.partial(jax.jit, static_argnums=1)
def _reduced(array: Any, ours: Any) -> Any:
    return _worst(jnp, array, ours)


_CHUNK = 1 << 22  # elements: what is looked at on the host takes some times its own memory


def _on_host(array: np.ndarray, ours: Any) -> float:
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        return max(float(_worst(np, flat[at : at + _CHUNK], ours)) for at in range(0, flat.size, _CHUNK))


def _of_python(number: Any, ours: Any) -> float:
    """The same of a Python number; its integers have no largest one."""
    if isinstance(number, bool):
        return -1.0
    if isinstance(number, int) and not -(2**63) <= number < 2**64:
        return float(abs(number)) if abs(number) < 2**1023 else float("inf")
    wide = np.asarray(number)
    return _on_host(wide, ours) if may_lose(wide.dtype, ours) else -1.0


def _worst(xp: Any, array: Any, ours: Any) -> Any:
    theirs = array.dtype
    if _is(theirs, jnp.complexfloating):
        real = _worst(xp, array.real, _part(ours)) if may_lose(_part(theirs), _part(ours)) else -1.0
        if _is(ours, jnp.complexfloating):
            imag = _worst(xp, array.imag, _part(ours)) if may_lose(_part(theirs), _part(ours)) else -1.0
        else:
            imag = _largest(xp, array.imag, array.imag != 0)
        return xp.maximum(real, imag)
    if _is(theirs, jnp.integer):
        if theirs.itemsize == 1:  # int4 and the like have no arithmetic of their own
            array = array.astype(xp.int32)
        return _worst_integer(xp, array, _part(ours))
    if theirs.itemsize < 4:  # exact, and so are the limits then
        array = array.astype(xp.float32)
    return _worst_float(xp, array, _part(ours))


def _worst_integer(xp: Any, array: Any, ours: Any) -> Any:
    have = jnp.iinfo(array.dtype)
    if ours == jnp.bool_:
        return _largest(xp, array, (array != 0) & (array != 1))
    if _is(ours, jnp.integer):
        fits = jnp.iinfo(ours)
        low, high = max(int(have.min), int(fits.min)), min(int(have.max), int(fits.max))
        return _largest(xp, array, (array < array.dtype.type(low)) | (array > array.dtype.type(high)))
    holds = _range(ours)
    unsigned = np.dtype(f"uint{array.dtype.itemsize * 8}")
    bits = array.astype(unsigned)
    size = xp.where(array < 0, ~bits + unsigned.type(1), bits)
    # Exact are those whose digits, from the first to the last that is not zero, are no more than the dtype's.
    last = size & (~size + unsigned.type(1))
    bad = size > unsigned.type(min(int(holds.largest), int(np.iinfo(unsigned).max)))
    if holds.digits < unsigned.itemsize * 8:
        bad |= (size > 0) & ((size >> unsigned.type(holds.digits)) >= last)
    if not holds.negative:
        bad |= array < 0
    if not holds.zero:
        bad |= array == 0
    return _largest(xp, array, bad)


def _worst_float(xp: Any, array: Any, ours: Any) -> Any:
    one = array.dtype.type
    if ours == jnp.bool_:
        return _largest(xp, array, (array != 0) & (array != 1))
    if _is(ours, jnp.integer):
        fits = jnp.iinfo(ours)
        # One more than the largest integer is a power of two, and so exact in every dtype that reaches it.
        low, above = float(int(fits.min)), float(int(fits.max) + 1)
        inside = (array >= one(low)) & (array < one(above))
        return _largest(xp, array, ~(inside & (array == xp.trunc(array))))
    holds = _range(ours)
    if holds.limit >= float(jnp.finfo(array.dtype).max):
        bad = xp.zeros(array.shape, bool)
    elif holds.beyond:
        bad = xp.isfinite(array) & (xp.abs(array) > one(holds.limit))
    else:
        bad = xp.isfinite(array) & (xp.abs(array) >= one(holds.limit))
    if not holds.infinite:
        bad |= xp.isinf(array)
    if not holds.nan:
        bad |= xp.isnan(array)
    if not holds.negative:
        bad |= array < 0
    if not holds.zero:
        bad |= array == 0
    return _largest(xp, array, bad)


def _largest(xp: Any, array: Any, bad: Any) -> Any:
    """The largest magnitude of what is bad, NaN counted as infinite; negative if nothing is."""
    wide = xp is np or array.dtype.itemsize == 8  # JAX has an array of 64 bits only where it has such floats
    size = xp.abs(array.astype(xp.float64 if wide else xp.float32))
    size = xp.where(xp.isnan(size), xp.inf, size)
    return xp.where(bad, size, -1.0).max()
