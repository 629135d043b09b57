"""Two snapshots compared: what became of each leaf, and how that is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common.paths import Leaf, Path, format_dtype, format_path, format_shape, format_type
from statewise._src.common.tables import Table, format_count, leaf_dict
from statewise._src.inspect.watch.snapshot import Print, Snapshot

__all__ = ["LeafChange", "changes_between", "seen_table"]

# The ways in which an expected change may have come about; a leaf that is lost or came untied was not trained.
MOVED = frozenset({"value", "retyped", "reshaped", "recast", "added"})


@dataclasses.dataclass(frozen=True, slots=True)
class LeafChange:
    """What became of one leaf.

    Attributes:
      leaf: the leaf as it is now; one that was removed as it was.
      kind: the name of its kind, before if it was there before; `(no kind)` where none claims it.
      how: `same`, `value` (other values), `recast`, `reshaped`, `retyped`, `added`, `removed`, `untied` (a path of a
        tied leaf that is a leaf of its own now), `tied` (the contrary; also a path that now leads to another leaf), or
        `gone` (donated, nothing in its place).
      was: what it was before, in words, where that is more than other values; else empty.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> with sw.watch(model) as seen:
      ...     model.bias[...] += 1
      >>> [(change.path, change.kind, change.how) for change in seen.leaves]
      [(('bias',), 'params', 'value'), (('kernel',), 'params', 'same')]
    """

    leaf: Leaf
    kind: str
    how: str
    was: str = ""

    @property
    def path(self) -> Path:
        """The leaf's first path."""
        return self.leaf.path

    def describe(self) -> str:
        """The change in words: `reshaped, was (2, 3)`."""
        return f"{self.how}, {self.was}" if self.was else self.how

    def noted(self, note: str) -> Leaf:
        """The leaf with a note, for an error."""
        return dataclasses.replace(self.leaf, note=note)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return leaf_dict(self.leaf) | {"kind": self.kind, "how": self.how, "was": self.was}


def changes_between(before: Snapshot, after: Snapshot) -> tuple[LeafChange, ...]:
    """What became of each leaf: those that were there, in their order, then the new ones."""
    changes = []
    for path, old in before.prints.items():
        new = after.prints.get(path)
        if new is not None:
            changes.append(_change(old, new))
        elif path in after.aliases:
            changes.append(LeafChange(old.leaf, old.kind, "tied", f"now {format_path(after.aliases[path])}"))
        else:
            changes.append(LeafChange(old.leaf, old.kind, "removed"))
    for path, new in after.prints.items():
        if path in before.prints:
            continue
        if path in before.aliases:
            first = before.aliases[path]
            changes.append(LeafChange(new.leaf, before.prints[first].kind, "untied", f"was {format_path(first)}"))
        else:
            changes.append(LeafChange(new.leaf, new.kind, "added"))
    return (*changes, *_other_paths(before, after))


def _other_paths(before: Snapshot, after: Snapshot) -> Iterator[LeafChange]:
    """Further paths of tied leaves that are gone, that are new, or that lead to another leaf than before."""

    def is_there(path: Path) -> bool:
        return path in after.prints or path in after.aliases

    ways: dict[Path, list[Path]] = {}
    for path, first in before.aliases.items():
        ways.setdefault(first, [first]).append(path)
    for path, first in before.aliases.items():
        # What it was tied to, by the first of its paths that is left; where none is, the leaf as a whole is told of.
        left = next((way for way in ways[first] if way != path and is_there(way)), None)
        if left is None or path in after.prints:
            continue
        old, was, now = before.prints[first], f"was {format_path(first)}", after.aliases.get(path)
        leaf = dataclasses.replace(old.leaf, path=path, aliases=())
        if now is None:
            yield LeafChange(leaf, old.kind, "removed", was)
        elif now != after.aliases.get(left, left):
            yield LeafChange(leaf, old.kind, "tied", f"now {format_path(now)}, {was}")
    for path, first in after.aliases.items():
        if path in before.prints or path in before.aliases:
            continue
        if first in before.prints or first in before.aliases:
            new = after.prints[first]
            leaf = dataclasses.replace(new.leaf, path=path, aliases=())
            yield LeafChange(leaf, new.kind, "tied", f"now {format_path(first)}")


def _change(old: Print, new: Print) -> LeafChange:
    if new.prints is None:
        return LeafChange(old.leaf, old.kind, "gone", "donated, nothing in its place")
    if new.leaf.type is not old.leaf.type:
        return LeafChange(new.leaf, old.kind, "retyped", f"was {format_type(old.leaf.type)}")
    if new.specs != old.specs or new.structure != old.structure:
        shapes = [getattr(spec, "shape", None) for spec in old.specs]
        if shapes == [getattr(spec, "shape", None) for spec in new.specs] and new.structure == old.structure:
            return LeafChange(new.leaf, old.kind, "recast", f"was {format_dtype(old.leaf.dtype)}")
        return LeafChange(new.leaf, old.kind, "reshaped", f"was {format_shape(old.leaf.shape)}")
    return LeafChange(new.leaf, old.kind, "same" if new.prints == old.prints else "value")


def seen_table(
    by_kind: Mapping[str, Sequence[LeafChange]],
    missed: Sequence[str],
    frozen: Sequence[str],
    static: dict[str, tuple[Any, Any]],
) -> Table:
    """A line for each kind that has leaves; below, whatever is more than other values.

    Args:
      by_kind: what became of each leaf, by kind.
      missed: the kinds of which nothing changed, though it was expected.
      frozen: the kinds that are frozen.
      static: plain attributes of modules that changed: before and after, by path.
    """
    rows = []
    for kind, own in by_kind.items():
        changed = sum(change.how != "same" for change in own)
        says = "-"
        if kind in missed:
            says = "expected to change, nothing " + ("got new values" if changed else "did")
        elif kind in frozen and changed:
            says = "frozen, but changed"
        numbers = [format_count(number) if number else "-" for number in (changed, len(own) - changed)]
        rows.append((kind, format_count(len(own)), *numbers, says))
    changes = [change for own in by_kind.values() for change in own]
    told = [
        change
        for change in changes
        if change.how not in ("same", "value") or (change.how == "value" and change.kind in frozen)
    ]
    lines = [(format_path(change.path), change.kind, change.describe()) for change in told]
    lines += [(path, "-", f"{was!r} became {now!r}") for path, (was, now) in static.items()]
    below = Table("to look at", ("path", "kind", "what"), tuple(lines)) if lines else None
    columns = ("kind", "leaves", "changed", "unchanged", "remark")
    return Table("watch", columns, tuple(rows), right=("leaves", "changed", "unchanged"), below=below)
