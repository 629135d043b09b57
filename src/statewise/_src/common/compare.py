"""One comparison of leaves: what was expected, what was found, and the fields in which the two differ.

A plan and a model, a state and its replacement, a target and a checkpoint, two snapshots of one model: whatever is
compared is first reduced to `LeafFacts`, and `compare_leaf` compares those.  Each `Mismatch` names one field, and words
it in two ways: as a note on the expected leaf ("is (2, 4) in the model"), and as a change ("(2, 3) to (2, 4)").
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ArraySpec, held_value, specs_of
from statewise._src.common.paths import Leaf, Path, format_path, format_shape, format_type

__all__ = [
    "MISSING",
    "UNEXPECTED",
    "Field",
    "LeafFacts",
    "Mismatch",
    "change_of",
    "compare_leaf",
    "facts_of",
    "facts_of_leaf",
    "fields_of",
    "is_same_static",
    "note_of",
    "same_type",
    "uncastable",
]


class Field(enum.StrEnum):
    """The fields in which two leaves can differ."""

    MISSING = "missing"
    UNEXPECTED = "unexpected"
    KIND = "kind"
    TYPE = "type"
    STRUCTURE = "structure"
    SHAPE = "shape"
    DTYPE = "dtype"
    TIES = "ties"
    VALUE = "value"
    DONATED = "donated"


class LeafFacts(NamedTuple):
    """The facts about one leaf that a comparison uses; a field that is None on either side is not compared.

    Attributes:
      type: its type, or the name of it, `flax.nnx:Param`.
      arrays: shape and dtype of each array in its value; for anything else, its type.
      structure: the structure of its value.
      kind: the name of its kind.
      ties: its other paths, each as data and as text.
      values: a fingerprint of its values.
      donated: whether one of its arrays was donated.
      within: the path of each array in its value; None where it is not compared.
    """

    type: Any
    arrays: tuple[Any, ...]
    structure: Any = None
    kind: str | None = None
    ties: frozenset[tuple[Any, str]] | None = None
    values: Any = None
    donated: bool = False
    within: tuple[Path, ...] | None = None


class Mismatch(NamedTuple):
    """One difference between what was expected and what was found.

    Attributes:
      field: what differs.
      expected: what was expected, as text.
      found: what was found, as text.
      array: the index of the array in the leaf's value, of shapes and dtypes.
      within: its path there, as text; empty where the value is one array.
    """

    field: Field
    expected: str = ""
    found: str = ""
    array: int = 0
    within: str = ""


MISSING = (Mismatch(Field.MISSING),)
UNEXPECTED = (Mismatch(Field.UNEXPECTED),)


def compare_leaf(expected: LeafFacts | None, found: LeafFacts | None) -> tuple[Mismatch, ...]:
    """Compares one leaf with what was expected of it.

    Args:
      expected: the leaf as it should be; None where it should not be there.
      found: the leaf as it is; None where it is not there.

    Returns:
      everything that differs, in the order of `Field`; empty where nothing does.

    Example:
      >>> from statewise._src.common.compare import LeafFacts, compare_leaf, note_of
      >>> from statewise._src.common.nnx_graph import ArraySpec
      >>> expected, found = (LeafFacts(None, (ArraySpec((2, size), "float32"),)) for size in (3, 4))
      >>> note_of(compare_leaf(expected, found), "model")
      'is (2, 4) in the model'
    """
    if expected is None or found is None:
        return () if expected is found else MISSING if found is None else UNEXPECTED
    # Nearly all leaves are equal, and comparing tuples with shared parts is fast.
    if expected == found and not found.donated:
        return ()
    if found.donated:
        return (Mismatch(Field.DONATED),)
    mismatches = []
    if _differ(expected.kind, found.kind):
        mismatches.append(Mismatch(Field.KIND, str(expected.kind), str(found.kind)))
    if _differ(expected.type, found.type) and not same_type(expected.type, found.type):
        mismatches.append(Mismatch(Field.TYPE, *_type_names(expected.type, found.type)))
    inside = _compare_values(expected, found)
    mismatches += inside
    if _differ(expected.ties, found.ties):
        mismatches.append(Mismatch(Field.TIES, _listed(expected.ties or ()), _listed(found.ties or ())))
    # Of arrays that differ in shape or dtype, the values need not be mentioned.
    if not inside and _differ(expected.values, found.values):
        mismatches.append(Mismatch(Field.VALUE))
    return tuple(mismatches)


def _differ(expected: Any, found: Any) -> bool:
    """Returns whether two values of a field differ; not if one of them is None, and so not compared."""
    return expected is not None and found is not None and bool(expected != found)


def _compare_values(expected: LeafFacts, found: LeafFacts) -> list[Mismatch]:
    """Returns what differs in structure, shapes and dtypes."""
    outlines = [(facts.structure, facts.within, len(facts.arrays)) for facts in (expected, found)]
    if outlines[0] != outlines[1]:
        return [Mismatch(Field.STRUCTURE)]
    mismatches = []
    for index, (planned, actual) in enumerate(zip(expected.arrays, found.arrays, strict=True)):
        within = format_path(found.within[index]) if found.within and found.within[index] else ""
        if isinstance(planned, type) or isinstance(actual, type):  # not an array
            if planned != actual:
                before, now = (each.__name__ if isinstance(each, type) else "array" for each in (planned, actual))
                mismatches.append(Mismatch(Field.TYPE, before, now, index, within))
            continue
        if planned.shape != actual.shape:
            shapes = format_shape(planned.shape), format_shape(actual.shape)
            mismatches.append(Mismatch(Field.SHAPE, *shapes, index, within))
        if planned.dtype != actual.dtype:
            mismatches.append(Mismatch(Field.DTYPE, str(planned.dtype), str(actual.dtype), index, within))
    return mismatches


def same_type(expected: Any, found: Any) -> bool:
    """Returns whether two types, or their names, are the same: a script's classes are in `__main__` when it runs."""
    if expected == found:
        return True
    if not (isinstance(expected, str) and isinstance(found, str)):
        return False
    # Names on disk, `module:name`; the modules of JAX and NNX are never run as a script.
    (home, name), (other_home, other) = expected.rsplit(":", 1), found.rsplit(":", 1)
    homes = {home, other_home}
    return name == other and "__main__" in homes and not {"jax", "flax.nnx"} & homes


def _type_names(expected: Any, found: Any) -> tuple[str, str]:
    """Returns the names of two types; with their modules if the names alone are equal."""
    short = format_type(expected), format_type(found)
    return short if short[0] != short[1] else (_full_name(expected), _full_name(found))


def _full_name(type_: Any) -> str:
    return type_.replace(":", ".") if isinstance(type_, str) else f"{type_.__module__}.{type_.__qualname__}"


def _listed(ties: Iterable[tuple[Any, str]]) -> str:
    return ", ".join(sorted(text for _, text in ties)) or "nothing"


def is_same_static(one: object, other: object) -> bool:
    """Returns whether two plain attributes are the same: 1 is not True here, and nan is nan."""
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


# --- facts -----------------------------------------------------------------------------------------------------


def facts_of(leaf: Any) -> LeafFacts:
    """Returns the facts of a live leaf: a Variable, or a raw array; it may be donated."""
    return LeafFacts(compat.variable_type(leaf), *specs_of(held_value(leaf)))


def facts_of_leaf(leaf: Leaf) -> LeafFacts:
    """Returns the facts of a leaf as tables show it, without those of several arrays."""
    specs = () if leaf.shape is None else (ArraySpec(leaf.shape, leaf.dtype),)
    ties = frozenset((path, format_path(path)) for path in leaf.aliases)
    return LeafFacts(leaf.type, specs, leaf.shape is None and leaf.nbytes, leaf.kind, ties)


# --- words -----------------------------------------------------------------------------------------------------


def fields_of(mismatches: Iterable[Mismatch]) -> tuple[str, ...]:
    """Returns the names of the fields that differ, each once."""
    return tuple(dict.fromkeys(mismatch.field.value for mismatch in mismatches))


def note_of(mismatches: Sequence[Mismatch], found_in: str, expected_in: str = "plan") -> str:
    """Returns the note on a leaf that differs: `is (2, 4), bfloat16 in the model`; empty where none does.

    Args:
      mismatches: what differs.
      found_in: where the leaf was looked for, `model`.
      expected_in: what says how it should be, `plan`.
    """
    if not mismatches:
        return ""
    complete = {
        Field.MISSING: f"missing from the {found_in}",
        Field.UNEXPECTED: f"not in the {expected_in}",
        Field.DONATED: "donated by an earlier step",
        Field.VALUE: f"has other values in the {found_in}",
    }
    if mismatches[0].field in complete:
        return complete[mismatches[0].field]
    found = dict.fromkeys(_found(mismatch) + _at(mismatch) for mismatch in mismatches)
    return f"is {', '.join(found)} in the {found_in}"


def _found(mismatch: Mismatch) -> str:
    match mismatch.field:
        case Field.KIND:
            return f"of kind {mismatch.found!r}"
        case Field.TYPE:
            return f"{'an' if mismatch.found[0] in 'AEIOaeio' else 'a'} {mismatch.found}"
        case Field.STRUCTURE:
            return "a value of another structure"
        case Field.TIES:
            return f"tied to {mismatch.found}"
        case _:
            return mismatch.found


def change_of(mismatches: Iterable[Mismatch]) -> str:
    """Returns the differences as changes: `(2, 3) to (2, 4); float32 to bfloat16`."""
    return "; ".join(filter(None, (_change(mismatch) + _at(mismatch) for mismatch in mismatches)))


def _change(mismatch: Mismatch) -> str:
    if mismatch.field is Field.STRUCTURE:
        return "a value of another structure"
    if mismatch.field is Field.TIES:
        return f"tied to {mismatch.expected}, then to {mismatch.found}"
    return f"{mismatch.expected} to {mismatch.found}" if mismatch.found else ""


def _at(mismatch: Mismatch) -> str:
    return f" at {mismatch.within}" if mismatch.within else ""


# --- dtypes ----------------------------------------------------------------------------------------------------

_FAMILIES = (jnp.floating, jnp.complexfloating, jnp.integer)


def _can_cast(source: Any, target: Any) -> bool:
    """Returns whether one dtype may become another: floats become floats, integers integers."""
    try:
        dtypes = jnp.dtype(source), jnp.dtype(target)
        return any(all(jnp.issubdtype(dtype, family) for dtype in dtypes) for family in _FAMILIES)
    except TypeError:  # PRNG keys, and dtypes that JAX lacks
        return False


def uncastable(mismatches: Iterable[Mismatch]) -> str:
    """Returns what a note has to add where a dtype cannot become the expected one; empty where all can."""
    dtypes = [mismatch for mismatch in mismatches if mismatch.field is Field.DTYPE]
    if all(_can_cast(mismatch.found, mismatch.expected) for mismatch in dtypes):
        return ""
    return ", which does not become " + ", ".join(dict.fromkeys(mismatch.expected for mismatch in dtypes))
