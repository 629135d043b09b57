"""Numbers that a cast would lose: one check for every place where a value changes its dtype.

JAX and NumPy cast silently: int64 wraps around in int32, 1e300 becomes infinite in float32, and where JAX has no 64-bit
numbers it narrows whatever NumPy gives it.  So each function that casts (`take`, `replace`, `cast`, `transfer`,
`restore`, `convert` ...) first collects its casts here, and changes nothing if one of them loses a number:

- an integer that the new dtype cannot represent: outside of its range, or, in a floating-point dtype, not exactly
  representable;
- a finite number that rounds to more than the largest finite one, and infinity or NaN where the new dtype has none;
- a fraction, NaN or infinity as an integer; a number other than 0 and 1 as a boolean; an imaginary part as a real.

Rounding within the range is not a loss, and underflow to zero is rounding.  The value of a tracer is unknown: inside
`jax.jit` a cast that was requested is done as JAX does it.  JAX arrays are inspected where they are, by one reduction
whose single result is transferred to the host; casts that cannot lose anything (float32 to float64) cost nothing.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems
from statewise.errors import StatewiseError, StructureError

__all__ = ["WIDE", "WIDER", "Casts", "as_jax", "check_given", "may_lose", "refuse", "refuse_between_models"]

WIDE = "jax.config.update('jax_enable_x64', True)  # before any array is made; or use values of a dtype that JAX has"

# The dtypes to suggest if another one cannot represent some numbers, the smallest first.
WIDER = ("bfloat16", "float32", "float64")


class Casts:
    """Planned casts.  `add` starts the reductions, `lost` waits for all of them together.

    Args:
      jax: whether JAX makes the arrays: without 64-bit numbers it narrows what NumPy gives it.
    """

    def __init__(self, *, jax: bool = True) -> None:
        self._jax = jax
        self._casts: list[tuple[Leaf, Any, Any, Any]] = []

    def add(self, leaf: Leaf, array: Any, dtype: Any) -> None:
        """Adds the cast of an array, or of a Python number; ignores tracers, and values whose dtype stays the same."""
        source = getattr(array, "dtype", None)
        if not isinstance(array, jax.Array):
            if isinstance(array, jax.ShapeDtypeStruct) or spec_of(array) is None:
                return
            dtype = jax.dtypes.canonicalize_dtype(dtype) if self._jax else jnp.dtype(dtype)
        if source == dtype or isinstance(array, compat.Tracer):
            return
        if source is None:
            worst: Any = _of_python(array, dtype)
        elif not may_lose(source, jnp.dtype(dtype)) or not array.size:
            return
        else:
            worst = _worst_of(array, jnp.dtype(dtype))
        self._casts.append((leaf, array, jnp.dtype(dtype), worst))

    def holding(self, dtypes: Sequence[str]) -> str | None:
        """Returns the first of these dtypes that holds all the numbers; None if none does."""
        for dtype in dtypes:
            casts = Casts(jax=self._jax)
            for leaf, array, _, _ in self._casts:
                casts.add(leaf, array, dtype)
            if jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype) and not casts.lost():
                return dtype
        return None

    def lost(self) -> list[Leaf]:
        """Returns the leaves that would lose numbers, each with the magnitude of one of them in a note."""
        if not self._casts:
            return []
        leaves: dict[Leaf, None] = {}
        worst = jax.device_get([cast[3] for cast in self._casts])
        for (leaf, array, target, _), magnitude in zip(self._casts, map(float, worst), strict=True):
            if magnitude >= 0:
                is_array = hasattr(array, "dtype")
                numbers = f"{array.dtype} numbers, one of magnitude" if is_array else "a number of magnitude"
                note = f"{numbers} {magnitude:.3g}, that {target} cannot represent"
                leaves[dataclasses.replace(leaf, note=note)] = None
        return list(leaves)

    def check(self, error: type[StatewiseError], hint: str, *, before: str = "", after: str = "changed") -> None:
        """Checks that no number would be lost.

        Args:
          error: the class of the error.
          hint: what to change.
          before: text in front of the fact.
          after: the participle in "Nothing was ...": changed, written.

        Raises:
          StatewiseError: of the class `error`, with all the leaves.
        """
        refuse(self.lost(), error, hint, before=before, after=after)


def refuse(
    leaves: Sequence[Leaf], error: type[StatewiseError], hint: str, *, before: str = "", after: str = "changed"
) -> None:
    """Raises the error of `Casts.check` if there are such leaves."""
    fact = "Casting would lose numbers: {n} leaves have some that the new dtype cannot represent."
    Problems(leaves).raise_as(error, f"{before}{fact} Nothing was {after}.", hint)


def refuse_between_models(
    floats: Casts, others: Casts, error: type[StatewiseError], wider_hint: Callable[[str, list[Leaf]], str], hint: str
) -> None:
    """Raises the error of `Casts.check` for casts from one model's dtypes to another's.

    Args:
      floats: the casts that a wider floating-point dtype may make lossless.
      others: all other casts.
      error: the class of the error.
      wider_hint: the hint for such a dtype, and the leaves.
      hint: what to change if there is none.
    """
    lossy, rest = floats.lost(), others.lost()
    wider = floats.holding(WIDER) if lossy else None
    hints = [wider_hint(wider, lossy)] if wider else []
    if rest or (lossy and not wider):
        hints += [hint, WIDE]
    refuse([*lossy, *rest], error, "\n".join(hints))


def check_given(given: Iterable[tuple[Leaf, Any, Any]], before: str = "") -> None:
    """Checks NumPy values and Python numbers before JAX takes them: leaf, value, dtype.

    Raises:
      StructureError: JAX would narrow some of them; lists all of them.
    """
    casts = Casts()
    for leaf, value, dtype in given:
        casts.add(leaf, value, dtype)
    casts.check(StructureError, WIDE, before=before)


def as_jax(leaf: Leaf, value: Any, lost: list[Leaf]) -> Any:
    """Returns a user function's result as JAX represents it.

    If that would lose numbers, returns zeros and adds the leaf to `lost`, so that all such leaves can be reported at
    once.
    """
    spec = None if isinstance(value, jax.Array) else spec_of(value)
    if spec is None:
        return jnp.asarray(value)
    casts = Casts()
    casts.add(leaf, value, spec.dtype)
    leaves = casts.lost()
    lost += leaves
    return jnp.zeros(spec.shape, spec.dtype) if leaves else jnp.asarray(value)


# --- what a dtype can represent ----------------------------------------------------------------------------------


class _Range(NamedTuple):
    """The numbers that a floating-point dtype can represent.

    Attributes:
      largest: the largest finite number.
      digits: the number of binary digits that an integer may have.
      limit: numbers from here on do not round to a finite one.
      beyond: whether the limit itself still does.
      infinite, nan, negative, zero: whether the dtype has such numbers.
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
    step = 2.0 ** (int(np.frexp(largest)[1]) - digits)  # from the largest number to the next one, if there were one
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
    """Returns the dtype of the parts of complex numbers; any other dtype unchanged."""
    return jnp.finfo(dtype).dtype if _is(dtype, jnp.complexfloating) else dtype


@functools.cache
def may_lose(source: Any, target: Any) -> bool:
    """Returns whether one dtype has a number that another cannot represent."""
    if source == target or source == jnp.bool_ or _is(source, jax.dtypes.extended) or _is(target, jax.dtypes.extended):
        return False
    if target == jnp.bool_:
        return True
    if _is(source, jnp.complexfloating):
        return not _is(target, jnp.complexfloating) or may_lose(_part(source), _part(target))
    if _is(source, jnp.integer):
        have = jnp.iinfo(source)
        if _is(target, jnp.integer):
            fits = jnp.iinfo(target)
            return not (int(fits.min) <= int(have.min) and int(have.max) <= int(fits.max))
        holds = _range(_part(target))
        return not (2**holds.digits > int(have.max) and int(have.max) <= holds.largest and holds.negative)
    if _is(target, jnp.integer):
        return True
    old, new = _range(source), _range(_part(target))
    is_wider = old.largest < new.limit or (old.largest == new.limit and new.beyond)
    # A flag may be False in the old dtype: `<=` says that the new dtype has whatever the old one has.
    return not (is_wider and all(had <= has for had, has in zip(old[4:], new[4:], strict=True)))


# --- the reduction -----------------------------------------------------------------------------------------------


def _worst_of(array: Any, target: Any) -> Any:
    """Returns the largest magnitude among the numbers that would be lost; negative if there are none."""
    if not isinstance(array, jax.Array):
        return _on_host(np.asarray(array), target)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype and array.is_fully_addressable:
        return _on_host(np.asarray(array), target)  # JAX cannot compute with it without 64-bit numbers
    sharding: Any = array.sharding
    (device, *_) = sharding.addressable_devices
    usual = device.default_memory().kind
    with jax.ensure_compile_time_eval():  # also under a trace these are concrete values
        if sharding.memory_kind not in (None, usual):
            array = jax.device_put(array, sharding.with_memory_kind(usual))
        return _reduced(array, target)


@functools.partial(jax.jit, static_argnums=1)
def _reduced(array: Any, target: Any) -> Any:
    return _worst(jnp, array, target)


_CHUNK = 1 << 22  # elements: the check on the host takes several times its chunk's memory


def _on_host(array: np.ndarray, target: Any) -> float:
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        return max(float(_worst(np, flat[start : start + _CHUNK], target)) for start in range(0, flat.size, _CHUNK))


def _of_python(number: Any, target: Any) -> float:
    """Returns the same as `_worst` for a Python number: Python's integers are unbounded."""
    if isinstance(number, bool):
        return -1.0
    if isinstance(number, int) and not -(2**63) <= number < 2**64:
        return float(abs(number)) if abs(number) < 2**1023 else float("inf")
    wide = np.asarray(number)
    return _on_host(wide, target) if may_lose(wide.dtype, target) else -1.0


def _worst(xp: Any, array: Any, target: Any) -> Any:
    """Returns the largest magnitude among the numbers that would be lost; negative if there are none.

    Args:
      xp: `numpy` or `jax.numpy`.
      array: its array.
      target: the new dtype.
    """
    source, part = array.dtype, _part(target)
    if _is(source, jnp.complexfloating):
        loses = may_lose(_part(source), part)
        real = _worst(xp, array.real, part) if loses else -1.0
        if not _is(target, jnp.complexfloating):
            imag = _largest(xp, array.imag, array.imag != 0)
        else:
            imag = _worst(xp, array.imag, part) if loses else -1.0
        return xp.maximum(real, imag)
    if _is(source, jnp.integer):
        if source.itemsize == 1:  # int4 and the like have no arithmetic of their own
            array = array.astype(xp.int32)
    elif source.itemsize < 4:  # the conversion is exact, and makes the limits exact too
        array = array.astype(xp.float32)
    if part == jnp.bool_:
        return _largest(xp, array, (array != 0) & (array != 1))
    bad = (_bad_integers if _is(source, jnp.integer) else _bad_floats)(xp, array, part)
    if not _is(part, jnp.integer):
        holds = _range(part)
        bad = bad if holds.negative else bad | (array < 0)
        bad = bad if holds.zero else bad | (array == 0)
    return _largest(xp, array, bad)


def _bad_integers(xp: Any, array: Any, target: Any) -> Any:
    """Returns which integers would be lost; the sign and the zero of a float are checked elsewhere."""
    have = jnp.iinfo(array.dtype)
    if _is(target, jnp.integer):
        fits = jnp.iinfo(target)
        low, high = max(int(have.min), int(fits.min)), min(int(have.max), int(fits.max))
        return (array < array.dtype.type(low)) | (array > array.dtype.type(high))
    holds = _range(target)
    unsigned = np.dtype(f"uint{array.dtype.itemsize * 8}")
    bits = array.astype(unsigned)
    # The magnitude as unsigned: in two's complement, -x is ~x + 1, also for the smallest integer.
    size = xp.where(array < 0, ~bits + unsigned.type(1), bits)
    # An integer is exact if its digits, from the first to the last that is not zero, fit in the dtype's.
    # x & -x is the lowest set bit.
    last = size & (~size + unsigned.type(1))
    bad = size > unsigned.type(min(int(holds.largest), int(np.iinfo(unsigned).max)))
    if holds.digits < unsigned.itemsize * 8:
        bad |= (size > 0) & ((size >> unsigned.type(holds.digits)) >= last)
    return bad


def _bad_floats(xp: Any, array: Any, target: Any) -> Any:
    """Returns which floating-point numbers would be lost; the sign and the zero of a float are checked elsewhere."""
    scalar = array.dtype.type
    if _is(target, jnp.integer):
        fits = jnp.iinfo(target)
        # The largest integer plus one is a power of two, and therefore exact in every dtype that reaches it.
        low, above = float(int(fits.min)), float(int(fits.max) + 1)
        inside = (array >= scalar(low)) & (array < scalar(above))
        return ~(inside & (array == xp.trunc(array)))
    holds = _range(target)
    if holds.limit >= float(jnp.finfo(array.dtype).max):
        bad = xp.zeros(array.shape, bool)
    else:
        size = xp.abs(array)
        bad = xp.isfinite(array) & ((size > scalar(holds.limit)) if holds.beyond else (size >= scalar(holds.limit)))
    if not holds.infinite:
        bad |= xp.isinf(array)
    if not holds.nan:
        bad |= xp.isnan(array)
    return bad


def _largest(xp: Any, array: Any, bad: Any) -> Any:
    """Returns the largest magnitude of the bad numbers, with NaN as infinite; negative if none is bad."""
    wide = xp is np or array.dtype.itemsize == 8  # JAX has 64-bit arrays only if it also has 64-bit floats
    size = xp.abs(array.astype(xp.float64 if wide else xp.float32))
    size = xp.where(xp.isnan(size), xp.inf, size)
    return xp.where(bad, size, -1.0).max()
