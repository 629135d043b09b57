"""Comparing a leaf of a target with its record in a checkpoint; and the hint for each difference."""

from __future__ import annotations

from statewise._src.checkpoint.format.keys import path_id
from statewise._src.checkpoint.format.manifest import LeafRecord
from statewise._src.checkpoint.format.per_device import devices_of, members_of, shape_of_one
from statewise._src.common.compare import Field, Mismatch, compare_leaf

__all__ = ["CAST", "TIE", "UNTIE", "compare_records", "hint_of", "is_alike"]

CAST = "sw.restore(path, target, cast=True)"
TIE = "tie the same leaves in the model before planning it, as they were when it was saved"
UNTIE = "untie the leaves in the model before planning it, as they were when it was saved"
_SIZES = "build the model with the sizes that it was saved with"
_STRUCTURE = "give the Variable a value of the saved structure"
_MAKE_DATA = "give the Variable the key's words: jax.random.key_data(key)"


def is_alike(record: LeafRecord, saved: LeafRecord) -> bool:
    """Returns whether a leaf in the checkpoint is exactly what it is in the target, as nearly all leaves are."""
    # With equal facts the shapes are equal; their leading axes may still be devices in one and members in the other.
    return record.facts == saved.facts and all(
        devices_of(ours) == devices_of(theirs) and members_of(ours) == members_of(theirs)
        for ours, theirs in zip(record.arrays, saved.arrays, strict=True)
    )


def compare_records(record: LeafRecord, saved: LeafRecord) -> tuple[Mismatch, ...]:
    """Compares two records; another number of devices or members, of the same shape each, is not a difference."""
    # Shapes may differ in the axes of devices and members; the shape of one value has to be the same.
    return tuple(
        mismatch
        for mismatch in compare_leaf(record.facts, saved.facts)
        if mismatch.field is not Field.SHAPE
        or shape_of_one(record.arrays[mismatch.array]) != shape_of_one(saved.arrays[mismatch.array])
    )


def hint_of(mismatch: Mismatch, record: LeafRecord, saved: LeafRecord) -> str:
    """Returns the hint for a mismatch between a target's record and that of a checkpoint."""
    match mismatch.field:
        case Field.KIND:
            then = "then sw.transfer(restored, plan) into other kinds"
            return f"declare it as it was saved, of kind {saved.kind!r}; {then}"
        case Field.TYPE:
            (_, name), (module, other) = record.type.rsplit(":", 1), saved.type.rsplit(":", 1)
            moved = f"; if the class only moved, say where it was: {name}.__module__ = {module!r}"
            return f"give the leaf the type that it was saved with: {other}" + (moved if name == other else "")
        case Field.STRUCTURE:
            return _STRUCTURE
        case Field.TIES:
            was_tied = {*map(path_id, saved.aliases)} - {*map(path_id, record.aliases)}
            return TIE if was_tied else UNTIE
    ours, theirs = record.arrays[mismatch.array], saved.arrays[mismatch.array]
    if ours.prng != theirs.prng:
        return f"make it a key: jax.random.key(0, impl={theirs.prng!r})" if theirs.prng else _MAKE_DATA
    return _SIZES if mismatch.field is Field.SHAPE else CAST
