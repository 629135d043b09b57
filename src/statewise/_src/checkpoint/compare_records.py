"""A leaf of a target and its record in a checkpoint, compared; and the hint for each thing that can differ."""

from __future__ import annotations

from collections.abc import Sequence

from statewise._src.checkpoint.format.keys import path_id
from statewise._src.checkpoint.format.manifest import LeafRecord
from statewise._src.checkpoint.format.per_device import devices_of, members_of, shape_of_one
from statewise._src.common.compare import Field, Mismatch, compare_leaf

__all__ = ["CAST", "TIE", "UNTIE", "compare_records", "hints_of", "is_alike"]

CAST = "sw.restore(path, target, cast=True)"
TIE = "tie the same leaves in the model before planning it, as they were when it was saved"
UNTIE = "untie the leaves in the model before planning it, as they were when it was saved"
_SIZES = "build the model with the sizes that it was saved with"
_STRUCTURE = "give the Variable a value of the saved structure"
_MAKE_DATA = "give the Variable the key's words: jax.random.key_data(key)"


def is_alike(record: LeafRecord, there: LeafRecord) -> bool:
    """Returns whether a leaf is in the checkpoint exactly what it is in the target, as nearly all leaves are."""
    return record.facts == there.facts and all(
        devices_of(ours) == devices_of(theirs) and members_of(ours) == members_of(theirs)
        for ours, theirs in zip(record.arrays, there.arrays, strict=True)
    )


def compare_records(record: LeafRecord, there: LeafRecord) -> tuple[Mismatch, ...]:
    """Compares two records; that one holds more devices or members, of the same shape each, is not a difference."""
    return tuple(
        mismatch
        for mismatch in compare_leaf(record.facts, there.facts)
        if mismatch.field is not Field.SHAPE
        or shape_of_one(record.arrays[mismatch.array]) != shape_of_one(there.arrays[mismatch.array])
    )


def hints_of(mismatches: Sequence[Mismatch], record: LeafRecord, there: LeafRecord) -> list[str]:
    """Returns the hint for each mismatch between a target's record and that of a checkpoint."""
    return [_hint(mismatch, record, there) for mismatch in mismatches]


def _hint(mismatch: Mismatch, record: LeafRecord, there: LeafRecord) -> str:
    match mismatch.field:
        case Field.KIND:
            return (
                f"declare it as it was saved, of kind {there.kind!r}; then sw.transfer(restored, plan) into other kinds"
            )
        case Field.TYPE:
            return _hint_type(record.type, there.type)
        case Field.STRUCTURE:
            return _STRUCTURE
        case Field.TIES:
            was_tied = {path_id(alias) for alias in there.aliases} - {path_id(alias) for alias in record.aliases}
            return TIE if was_tied else UNTIE
    ours, theirs = record.arrays[mismatch.array], there.arrays[mismatch.array]
    if ours.prng != theirs.prng:
        return f"make it a key: jax.random.key(0, impl={theirs.prng!r})" if theirs.prng else _MAKE_DATA
    return _SIZES if mismatch.field is Field.SHAPE else CAST


def _hint_type(ours: str, theirs: str) -> str:
    (_, name), (home, other) = ours.rsplit(":", 1), theirs.rsplit(":", 1)
    moved = f"; if the class only moved, say where it was: {name}.__module__ = {home!r}"
    return f"give the leaf the type that it was saved with: {other}" + (moved if name == other else "")
