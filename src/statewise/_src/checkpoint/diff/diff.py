"""`sw.diff`: two models, states or checkpoints, leaf by leaf.

Leaves are matched by path.  What they are is compared first, without reading an array; then the values of those that
have one shape, a few leaves at a time, so that two checkpoints larger than memory can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from statewise._src.checkpoint.diff.result import Diff, LeafDiff
from statewise._src.checkpoint.diff.sources import Arrays, Change, Side, compare, is_path, side_of
from statewise._src.checkpoint.format.manifest import LeafRecord
from statewise._src.checkpoint.format.per_device import members_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.common.compare import Field, Mismatch, change_of, compare_leaf, fields_of
from statewise._src.common.paths import format_dtype, format_path, format_shape, format_type
from statewise._src.common.problems import counted
from statewise._src.common.tables import format_count
from statewise._src.core.plan import Kinds, Plan, tables_in
from statewise._src.inspect.select.select import check_kinds
from statewise.errors import DeclarationError

__all__ = ["Diff", "LeafDiff", "diff"]

# The most bytes of one side that are read at once; a single leaf may be larger.
BATCH = 64 * 1024 * 1024


def diff(a: object, b: object, *, kinds: Kinds | None = None) -> Diff:
    """Compares two models, states or checkpoints, leaf by leaf: from `a` to `b`.

    Leaves are matched by path, and compared in type, kind, shape, dtype, what they are tied to, and values.  Where they
    lie, on which devices and in which layout, is no difference.  Nothing is changed, and of a checkpoint on disk a few
    leaves are read at a time.

    Args:
      a: a module, or a tuple or list of objects; a state; a plan; or the path of what `sw.save` wrote.  What is
        abstract is compared without values.
      b: another of these; the two need not be alike.
      kinds: the kinds to plan models by; by default those of the other side, if it is a state or a plan, and else
        `Kinds.standard()`.

    Returns:
      the differences; false if there are none.  A checkpoint that was not meant to hold a kind (one declared ephemeral,
      or left out of `only`) is not compared in that kind: `not_saved`.

    Raises:
      RestoreError: there is no such checkpoint, or not its base.
      CorruptedError: a checkpoint that is not what was written.
      StructureError: a state that was donated or being traced; a model that is none.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
      DeclarationError: kinds that are none, or kinds where there is no model.

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
    models = [thing for thing in (a, b) if not (is_path(thing) or tables_in(thing) is not None)]
    if kinds is not None:
        check_kinds(kinds)
        if not models:
            raise DeclarationError(
                "Only a model is planned by kinds; states and checkpoints have theirs.", hint="sw.diff(a, b)"
            )
    else:
        planned = [thing for thing in map(tables_in, (a, b)) if thing is not None]
        kinds = Plan.of(planned[0]).kinds if planned else Kinds.standard()
    return _diff(side_of(a, kinds), side_of(b, kinds))


def _diff(first: Side, second: Side) -> Diff:
    pairs = [
        Pair(first.records.get(identity), second.records.get(identity))
        for identity in {**first.records, **second.records}
    ]
    not_saved = _not_saved(pairs, first, second)
    order = {kind: at for at, kind in enumerate({**first.kinds, **second.kinds})}
    pairs = [pair for pair in pairs if pair.is_both or pair.one.kind not in not_saved]
    pairs.sort(key=lambda pair: order[pair.one.kind])
    values = _values(pairs, first, second)
    leaves: list[LeafDiff] = []
    same: Counter[str] = Counter()
    not_compared: Counter[str] = Counter()
    for pair, change in zip(pairs, values, strict=True):
        mismatches = pair.mismatches
        whys = [change_of(mismatches) if pair.is_both else _described(pair, first, second)]
        is_unknown = change is None and pair.is_comparable
        if is_unknown:
            whys.append("values not compared")
        if change:
            mismatches = (*mismatches, Mismatch(Field.VALUE))
            whys.append(change.why)
        if mismatches:
            leaves.append(_leaf_diff(pair, fields_of(mismatches), "; ".join(filter(None, whys)), change))
        else:
            (not_compared if is_unknown else same)[pair.one.kind] += 1
    in_order = tuple(sorted(not_saved, key=lambda kind: order[kind]))
    return Diff(first.name, second.name, tuple(leaves), dict(same), dict(not_compared), in_order)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A leaf in the first and in the second; one of them may be missing."""

    first: LeafRecord | None
    second: LeafRecord | None

    @property
    def one(self) -> LeafRecord:
        """The leaf of the first, or of the only one that has it."""
        made = self.first or self.second
        assert made is not None, "one of the two has the leaf"
        return made

    @property
    def both(self) -> tuple[LeafRecord, LeafRecord]:
        """The two leaves, where both are there."""
        assert self.first is not None, "asked of leaves that both have"
        assert self.second is not None, "asked of leaves that both have"
        return self.first, self.second

    @property
    def is_both(self) -> bool:
        """Whether both have the leaf."""
        return self.first is not None and self.second is not None

    @functools.cached_property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """The differences that one sees without values; members along another axis are another shape."""
        mismatches = compare_leaf(*(record if record is None else record.facts for record in (self.first, self.second)))
        if not self.is_both or Field.STRUCTURE in fields_of(mismatches):
            return mismatches
        axes = []
        for index, (ours, theirs) in enumerate(zip(*(record.arrays for record in self.both), strict=True)):
            here, there = members_of(ours), members_of(theirs)
            if here and there and here != there and ours.shape == theirs.shape:
                within = format_path(ours.within) if ours.within else ""
                axes.append(Mismatch(Field.SHAPE, f"members along axis {here[1]}", str(there[1]), index, within))
        return (*mismatches, *axes)

    @functools.cached_property
    def is_comparable(self) -> bool:
        """Whether the two hold as many arrays, of the same shapes, and PRNG keys or no keys both."""
        if {*fields_of(self.mismatches)} & {Field.MISSING, Field.UNEXPECTED, Field.STRUCTURE, Field.SHAPE}:
            return False
        here, there = self.both
        return all(ours.prng == theirs.prng for ours, theirs in zip(here.arrays, there.arrays, strict=True))


def _not_saved(pairs: Sequence[Pair], first: Side, second: Side) -> set[str]:
    """The kinds that one side has, and that the other, a checkpoint, was not meant to hold."""
    not_saved = set()
    for pair in pairs:
        has, lacks = (first, second) if pair.second is None else (second, first)
        kind = pair.one.kind
        if not pair.is_both and lacks.on_disk and not lacks.kinds.get(kind, has.kinds[kind]):
            not_saved.add(kind)
    return not_saved


# --- what they are -----------------------------------------------------------------------------------------------


def _described(pair: Pair, first: Side, second: Side) -> str:
    """What a leaf is that only one side has, and which leaf of the other its path belongs to."""
    elsewhere = _tied_to(pair.one, first if pair.first is None else second)
    leaf = pair.one.leaf()
    shown = f"{format_type(leaf.type)}{format_shape(leaf.shape)} {format_dtype(leaf.dtype)}"
    return shown + (f"; tied to {elsewhere} in the other" if elsewhere else "")


def _tied_to(record: LeafRecord, side: Side) -> str:
    """The leaf that has this one's path among its aliases, as text; empty if there is none."""
    leaf = side.tied.get(record.id)
    return format_path(leaf.path) if leaf else ""


# --- what they hold ----------------------------------------------------------------------------------------------


def _values(pairs: Sequence[Pair], first: Side, second: Side) -> Iterator[_Values | None]:
    """For each pair how the values differ; None where that cannot be told."""
    comparable = [pair for pair in pairs if pair.is_comparable]
    changes: list[_Values | None] = []
    for batch in grouped(comparable, lambda pair: pair.both[0].leaf().nbytes, BATCH):
        ours = first.read([pair.both[0] for pair in batch])
        theirs = second.read([pair.both[1] for pair in batch])
        changes += map(_compared, batch, ours, theirs)
    found = iter(changes)
    return iter([next(found) if pair.is_comparable else None for pair in pairs])


@dataclasses.dataclass(frozen=True, slots=True)
class _Values:
    """How the values of one leaf differ; false if they do not."""

    change: Change
    why: str
    keys: bool

    def __bool__(self) -> bool:
        return bool(self.change.elements)


def _compared(pair: Pair, ours: Arrays, theirs: Arrays) -> _Values | None:
    if ours is None or theirs is None:
        return None
    change, keys = Change(), 0
    for array, one, other in zip(pair.one.arrays, ours, theirs, strict=True):
        if array.prng is None:
            change |= compare(one, other)
        else:
            words = tuple(range(len(array.shape), one.ndim))
            keys += int((one != other).any(axis=words).sum())
    total = sum(array.elements for array in pair.one.arrays)
    if keys and not change.elements:
        return _Values(Change(keys), f"{format_count(keys)} of {counted(total, 'key', 'keys')}", True)
    why = f"{format_count(change.elements + keys)} of {counted(total, 'element', 'elements')}"
    why += ", NaN in one alone" if math.isnan(change.largest) else f" by up to {change.largest:.4g}"
    return _Values(Change(change.elements + keys, change.largest), why, False)


def _leaf_diff(pair: Pair, what: tuple[str, ...], why: str, values: _Values | None) -> LeafDiff:
    other = pair.second.leaf() if pair.is_both and pair.second else None
    if not values:
        return LeafDiff(pair.one.leaf(), other, what, why)
    return LeafDiff(
        pair.one.leaf(), other, what, why, values.change.elements, None if values.keys else values.change.largest
    )
