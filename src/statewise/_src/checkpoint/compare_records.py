"""What a leaf is in the target and what it is in the checkpoint, compared by their records."""

from __future__ import annotations

from collections.abc import Collection

from statewise._src.checkpoint.format.keys import PathId, path_id, same_type
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord
from statewise._src.checkpoint.format.per_device import devices_of, members_of, shape_of_one
from statewise._src.common.paths import Path, format_path, format_shape

__all__ = ["TIE", "UNTIE", "differences", "is_alike", "recast_arrays", "same_structure"]

_SIZES = "build the model with the sizes that it was saved with"
TIE = "tie the same leaves in the model before planning it, as they were when it was saved"
UNTIE = "untie the leaves in the model before planning it, as they were when it was saved"


def _ids(paths: Collection[Path]) -> set[PathId]:
    return {path_id(path) for path in paths}


def is_alike(record: LeafRecord, there: LeafRecord) -> bool:
    """Whether a leaf, tied to no other, is in the checkpoint what it is in the target, to the letter."""
    if record.kind != there.kind or record.type != there.type or record.aliases or there.aliases:
        return False
    if record.structure != there.structure or len(record.arrays) != len(there.arrays):
        return False
    return all(
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and ours.prng == theirs.prng
        and ours.within == theirs.within
        and devices_of(ours) == devices_of(theirs)
        and members_of(ours) == members_of(theirs)
        for ours, theirs in zip(record.arrays, there.arrays, strict=True)
    )


def differences(record: LeafRecord, there: LeafRecord) -> list[tuple[str, str]]:
    """Everything in the way of restoring one leaf, dtypes apart: what it is in the checkpoint, and the hint."""
    words = []
    if there.kind != record.kind:
        hint = f"declare it as it was saved, of kind {there.kind!r}; then sw.transfer(restored, plan) into other kinds"
        words.append((f"of kind {there.kind!r}", hint))
    if not same_type(record.type, there.type):
        words.append((f"a {there.type.replace(':', '.')}", _hint_type(record.type, there.type)))
    if not same_structure(record, there):
        words.append(("a value of another structure", "give the Variable a value of the saved structure"))
    else:
        for ours, theirs in zip(record.arrays, there.arrays, strict=True):
            within = f" at {format_path(ours.within)}" if ours.within else ""
            if ours.prng != theirs.prng:
                is_ = f"a PRNG key of {theirs.prng}" if theirs.prng else f"no PRNG key but {theirs.dtype}"
                make = f"make it a key: jax.random.key(0, impl={theirs.prng!r})"
                words.append((is_ + within, make if theirs.prng else _MAKE_DATA))
            elif ours.shape != theirs.shape and shape_of_one(ours) != shape_of_one(theirs):
                words.append((format_shape(theirs.shape) + within, _SIZES))
    here, gone = _ids(record.aliases), _ids(there.aliases)
    if here != gone:
        tied = ", ".join(map(format_path, there.aliases)) or "nothing"
        words.append((f"tied to {tied}", TIE if gone - here else UNTIE))
    return words


_MAKE_DATA = "give the Variable the key's words: jax.random.key_data(key)"


def _hint_type(ours: str, theirs: str) -> str:
    (_, name), (home, other) = ours.rsplit(":", 1), theirs.rsplit(":", 1)
    moved = f"; if the class only moved, say where it was: {name}.__module__ = {home!r}"
    return f"give the leaf the type that it was saved with: {other}" + (moved if name == other else "")


def same_structure(record: LeafRecord, there: LeafRecord) -> bool:
    """Returns whether the values of two leaves are of one structure."""
    within = [[array.within for array in one.arrays] for one in (record, there)]
    return record.structure == there.structure and within[0] == within[1]


def recast_arrays(record: LeafRecord, there: LeafRecord) -> list[tuple[ArrayRecord, ArrayRecord]]:
    """The arrays that have another dtype in the checkpoint; whether one is a PRNG key is no matter of dtype."""
    if not same_structure(record, there):
        return []
    pairs = zip(record.arrays, there.arrays, strict=True)
    return [(ours, theirs) for ours, theirs in pairs if ours.dtype != theirs.dtype and ours.prng == theirs.prng]
