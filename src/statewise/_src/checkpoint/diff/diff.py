"""`sw.diff`: two models, states or checkpoints, leaf by leaf.

Leaves are matched by path.  What they are is compared first, without reading an array; then the values of those with
the same shape, a few leaves at a time, so that two checkpoints larger than memory can be compared.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from statewise._src.checkpoint.diff.foreign import sides_by_names
from statewise._src.checkpoint.diff.result import Diff, LeafDiff
from statewise._src.checkpoint.diff.sources import Arrays, Change, Side, compare, is_path, side_of
from statewise._src.checkpoint.format.manifest import LeafRecord
from statewise._src.checkpoint.format.per_device import members_of
from statewise._src.checkpoint.interop.foreign import is_foreign
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.common.compare import Field, Mismatch, change_of, compare_leaf, fields_of
from statewise._src.common.paths import format_dtype, format_path, format_shape, format_type
from statewise._src.common.problems import counted
from statewise._src.common.tables import format_count
from statewise._src.core.plan import Kinds, Plan, tables_in
from statewise._src.inspect.select.select import check_kinds
from statewise._src.names.names import NamesData
from statewise.errors import DeclarationError

__all__ = ["Diff", "LeafDiff", "diff"]

# The most bytes of one side that are read at a time; a single leaf may be larger.
BATCH = 64 * 1024 * 1024


def diff(a: object, b: object, *, kinds: Kinds | None = None, names: NamesData | None = None) -> Diff:
    """Compares two models, states or checkpoints, leaf by leaf: from `a` to `b`.

    Leaves are matched by path, and compared in type, kind, shape, dtype, what they are tied to, and values.  Their
    devices and their layout are not compared.  Nothing is changed, and a checkpoint on disk is read a few leaves at a
    time.

    Args:
      a: a module, or a tuple or list of objects; a state; a plan; or the path of a checkpoint.  Something
        abstract is compared without values.  Or another program's files: a folder, a `.safetensors` file, or several.
      b: another of these; the two need not be of the same sort.
      kinds: the kinds to plan models by; by default those of the other side, if it is a state or a plan, and otherwise
        `Kinds.standard()`.
      names: what the leaves are called in another program's files, if one side is such files and the other a model, a
        state or a plan.  Without names, two sides of such files are compared by the files' own names.

    Returns:
      the differences; false if there are none.  A checkpoint that was not meant to have a kind (one declared ephemeral,
      or left out of `only`) is not compared in that kind: `not_saved`.

    Raises:
      RestoreError: there is no such checkpoint, or not its base.
      CorruptedError: a checkpoint is not what was written.
      StructureError: the state was donated or is being traced; the model is not one.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
      DeclarationError: the kinds are not kinds, or there is no model to plan by them.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", sw.plan(model).take(model))
      >>> model.bias[...] += 0.5
      >>> changes = sw.diff(f"{folder}/first", model)
      >>> [(one.leaf.path, one.why) for one in changes.value["params"]]
      [(('bias',), '3 of 3 elements by up to 0.5')]
      >>> changes.same
      {'params': 1}
    """
    models = [each for each in (a, b) if not (is_path(each) or is_foreign(each) or tables_in(each) is not None)]
    if kinds is not None:
        check_kinds(kinds)
        if not models:
            raise DeclarationError(
                "Only a model is planned by kinds; states and checkpoints have theirs.", hint="sw.diff(a, b)"
            )
    else:
        planned = [each for each in map(tables_in, (a, b)) if each is not None]
        kinds = Plan.of(planned[0]).kinds if planned else Kinds.standard()
    if names is not None or (is_foreign(a) and is_foreign(b)):
        return _diff(*sides_by_names(a, b, names, kinds))
    return _diff(side_of(a, kinds), side_of(b, kinds))


def _diff(first: Side, second: Side) -> Diff:
    pairs = [
        Pair(first.records.get(identity), second.records.get(identity))
        for identity in {**first.records, **second.records}
    ]
    not_saved = _not_saved(pairs, first, second)
    order = {kind: index for index, kind in enumerate({**first.kinds, **second.kinds})}
    pairs = [pair for pair in pairs if pair.is_both or pair.leaf.kind not in not_saved]
    pairs.sort(key=lambda pair: order[pair.leaf.kind])
    compared = _compare_values([pair for pair in pairs if pair.is_comparable], first, second)
    leaves: list[LeafDiff] = []
    same: Counter[str] = Counter()
    not_compared: Counter[str] = Counter()
    for pair in pairs:
        values = next(compared) if pair.is_comparable else None
        is_unknown = values is None and pair.is_comparable
        mismatches = pair.mismatches
        whys = [change_of(mismatches) if pair.is_both else _described(pair, first, second)]
        if is_unknown:
            whys.append("values not compared")
        numbers: tuple[Any, ...] = ()
        if values is not None and values.elements:
            mismatches = (*mismatches, Mismatch(Field.VALUE))
            whys.append(values.why)
            numbers = values[:2]
        if mismatches:
            other = pair.second.leaf() if pair.is_both and pair.second else None
            why = "; ".join(filter(None, whys))
            leaves.append(LeafDiff(pair.leaf.leaf(), other, fields_of(mismatches), why, *numbers))
        else:
            (not_compared if is_unknown else same)[pair.leaf.kind] += 1
    in_order = tuple(sorted(not_saved, key=lambda kind: order[kind]))
    return Diff(first.name, second.name, tuple(leaves), dict(same), dict(not_compared), in_order)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A leaf in the first and in the second; one of them may be missing."""

    first: LeafRecord | None
    second: LeafRecord | None

    @property
    def leaf(self) -> LeafRecord:
        """Returns the leaf of the first, or of the second if only that has it."""
        leaf = self.first or self.second
        assert leaf is not None, "one of the two has the leaf"
        return leaf

    @property
    def both(self) -> tuple[LeafRecord, LeafRecord]:
        """Returns the two leaves, if both are there."""
        assert self.first is not None and self.second is not None, "both have the leaf"  # noqa: PT018
        return self.first, self.second

    @property
    def is_both(self) -> bool:
        """Returns whether both have the leaf."""
        return self.first is not None and self.second is not None

    @functools.cached_property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """Returns the differences that are known without values; members along another axis are another shape."""
        mismatches = compare_leaf(*(record if record is None else record.facts for record in (self.first, self.second)))
        if not self.is_both or Field.STRUCTURE in fields_of(mismatches):
            return mismatches
        axes = []
        for index, (ours, theirs) in enumerate(zip(*(record.arrays for record in self.both), strict=True)):
            first, second = members_of(ours), members_of(theirs)
            if first and second and first != second and ours.shape == theirs.shape:
                within = format_path(ours.within) if ours.within else ""
                axes.append(Mismatch(Field.SHAPE, f"members along axis {first[1]}", str(second[1]), index, within))
        return (*mismatches, *axes)

    @functools.cached_property
    def is_comparable(self) -> bool:
        """Returns whether the two hold the same number of arrays, of the same shapes, and the same are PRNG keys."""
        if {*fields_of(self.mismatches)} & {Field.MISSING, Field.UNEXPECTED, Field.STRUCTURE, Field.SHAPE}:
            return False
        first, second = self.both
        return all(ours.prng == theirs.prng for ours, theirs in zip(first.arrays, second.arrays, strict=True))


def _not_saved(pairs: Sequence[Pair], first: Side, second: Side) -> set[str]:
    """Returns the kinds that one side has, and that the other, a checkpoint, was not meant to have."""
    not_saved = set()
    for pair in pairs:
        has, lacks = (first, second) if pair.second is None else (second, first)
        kind = pair.leaf.kind
        if not pair.is_both and lacks.on_disk and not lacks.kinds.get(kind, has.kinds[kind]):
            not_saved.add(kind)
    return not_saved


def _described(pair: Pair, first: Side, second: Side) -> str:
    """Returns what a leaf is that only one side has, and which leaf of the other its path belongs to."""
    tied = (first if pair.first is None else second).tied.get(pair.leaf.id)
    leaf = pair.leaf.leaf()
    shown = f"{format_type(leaf.type)}{format_shape(leaf.shape)} {format_dtype(leaf.dtype)}"
    return shown + (f"; tied to {format_path(tied.path)} in the other" if tied else "")


# --- values ------------------------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """How the values of one leaf differ.

    Attributes:
      elements: the number of elements that differ.
      largest: the largest absolute difference; None for PRNG keys.
      why: the same in words.
    """

    elements: int
    largest: float | None
    why: str


def _compare_values(pairs: Sequence[Pair], first: Side, second: Side) -> Iterator[_Values | None]:
    """Yields for each pair how the values differ; None if one side has no values."""
    # A checkpoint is read last, and only where the other side has values: gigabytes of it, for an abstract model.
    sides, last = (first, second), 0 if first.on_disk and not second.on_disk else 1
    for batch in grouped(pairs, lambda pair: pair.both[0].leaf().nbytes, BATCH):
        known = sides[1 - last].read([pair.both[1 - last] for pair in batch])
        wanted = [pair for pair, arrays in zip(batch, known, strict=True) if arrays is not None]
        rest = iter(sides[last].read([pair.both[last] for pair in wanted]) if wanted else ())
        for pair, arrays in zip(batch, known, strict=True):
            both = (arrays, None if arrays is None else next(rest))
            yield _compared(pair, *(both if last else both[::-1]))


def _compared(pair: Pair, ours: Arrays, theirs: Arrays) -> _Values | None:
    if ours is None or theirs is None:
        return None
    change, keys = Change(), 0
    for array, one, other in zip(pair.leaf.arrays, ours, theirs, strict=True):
        if array.prng is None:
            change |= compare(one, other)
        else:
            # A key has several words, along the last axes: it differs if any of them does.
            words = tuple(range(len(array.shape), one.ndim))
            keys += int((one != other).any(axis=words).sum())
    total = sum(array.elements for array in pair.leaf.arrays)
    if keys and not change.elements:
        return _Values(keys, None, f"{format_count(keys)} of {counted(total, 'key', 'keys')}")
    why = f"{format_count(change.elements + keys)} of {counted(total, 'element', 'elements')}"
    why += ", NaN in only one" if math.isnan(change.largest) else f" by up to {change.largest:.4g}"
    return _Values(change.elements + keys, change.largest, why)
