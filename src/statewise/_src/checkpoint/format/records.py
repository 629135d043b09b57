"""Records of a plan's leaves, which say what each leaf is: what a save has to write, and what a restore has to find."""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import re
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from statewise._src.checkpoint.format.keys import dtype_name, prng_of, type_name
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord
from statewise._src.checkpoint.format.per_device import placement_of
from statewise._src.common.nnx_graph import ONE
from statewise._src.common.object_names import names_given
from statewise._src.common.paths import Path
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_fits, check_not_donated
from statewise._src.core.usable import check_concrete, check_untraced
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.derived import keys_within
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import with_copies
from statewise.errors import DeclarationError

__all__ = ["STORABLE", "Placed", "check_savable", "kinds_of", "records_of", "unpacked"]

# The dtypes that TensorStore's zarr driver writes.  Others, all of one byte or less, are stored as their bytes.
_INTEGERS = ("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")
STORABLE = frozenset((*_INTEGERS, *_FLOATS))
# The addresses of functions in a structure's text, which are different in each process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Placed(NamedTuple):
    """A leaf of a plan as a record, and the position of its first array in its kind's part."""

    record: LeafRecord
    start: int


_known: weakref.WeakKeyDictionary[PlanTables, tuple[Placed, ...]] = weakref.WeakKeyDictionary()


def records_of(plan: PlanTables) -> tuple[Placed, ...]:
    """Returns the leaves of a plan as records, optimizer state included; they do not yet say where they are stored.

    An array that is per device, or of an ensemble, has the shape that a state holds, and its record says for how many
    devices or members.
    """
    plan = with_copies(plan.plain, plan.per_device)
    records = _known.get(plan)
    if records is None:
        records = _known[plan] = tuple(_records(plan))
    return records


def _records(plan: PlanTables) -> list[Placed]:
    placed = []
    leaves = iter(plan.leaves)
    for row, span in zip(plan.rows, plan.spans, strict=True):
        leaf = next(leaves)
        own = plan.by_kind[span.kind][span.start : span.stop]
        arrays = tuple(
            _record(plan, array, within)
            for array, within in zip(own, keys_within(row.structure, len(own)), strict=True)
        )
        structure = None if row.structure is ONE else _ADDRESS.sub("", str(row.structure))
        record = LeafRecord(row.path, row.kind, type_name(row.type), structure, arrays, leaf.aliases)
        placed.append(Placed(record, span.start))
    for array in (array for derived in plan.derived_arrays for array in derived.arrays):
        record = LeafRecord(array.leaf.path, array.kind, type_name(jax.Array), None, (_record(plan, array, ()),))
        placed.append(Placed(record, array.position))
    return placed


def _record(plan: PlanTables, array: ArrayInfo, within: Path) -> ArrayRecord:
    spec = array.held
    prng = prng_of(spec.dtype)
    stored: tuple[tuple[int, ...], str] | None = None
    if prng is not None:
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        stored = (words.shape, str(words.dtype))
    elif str(spec.dtype) not in STORABLE:
        stored = (spec.shape, "uint8")
    placement = placement_of(array.devices, plan.ensemble, array.axis, len(spec.shape))
    return ArrayRecord(within, spec.shape, dtype_name(spec.dtype), prng, stored, placement=placement)


def unpacked(state: State, kind: str) -> tuple[Any, ...]:
    """Returns a kind's arrays in the order of the plan, whether the state is packed or not."""
    return state.tables.unpack(kind, state.part(kind).arrays)


def check_savable(state: State, kinds: Collection[str]) -> None:
    """Raises if these kinds have no values to save.

    Raises:
      StructureError: the state was donated, does not fit its plan, is abstract, or is being traced.
    """
    check_not_donated(state, kinds)
    check_fits(state, kinds)
    arrays = [array for kind in kinds for array in state.part(kind).arrays]
    check_untraced(arrays, "save", "return the state from the function, and save what comes back")
    check_concrete(arrays, "save", "sw.save(path, plan.take(model))")


def kinds_of(state: State, only: object, what: str, hint: str) -> tuple[str, ...]:
    """Returns the kinds that a save or a restore is about: those in `only`, by default all that are saved.

    Args:
      state: the state to save, or the target of a restore.
      only: names of kinds; None for all that are `saved`.
      what: what it means here that a kind is ephemeral, for the error.
      hint: what to do about it, with `{name}` for the kind's name.

    Raises:
      DeclarationError: a kind does not exist, or is never saved; none of the kinds has a leaf.
    """
    kinds = state.tables.kinds
    if only is None:
        return tuple(name for name, kind in kinds.items() if kind.saved)
    names = names_given(only, "only")
    for name in names:
        if name not in kinds:
            raise unknown_kind(name, kinds)
        if not kinds[name].saved:
            raise DeclarationError(
                f"The kind {name!r} is declared ephemeral{what}.", kind=name, hint=hint.format(name=name)
            )
    filled = [name for name, specs in state.tables.specs.items() if specs]
    if names and not set(names) & set(filled):
        raise DeclarationError(
            f"only={only!r} does not name a kind that has leaves in this model.",
            kind=names[0] if len(names) == 1 else None,
            hint=f"those that have: {', '.join(filled)}",
        )
    return tuple(name for name in kinds if name in names)
