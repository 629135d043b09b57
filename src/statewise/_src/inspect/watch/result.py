"""Two snapshots compared: the change of each leaf, and its description."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common.compare import MISSING, Field, Mismatch, change_of, compare_leaf, fields_of
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.tables import Table, format_count, leaf_dict
from statewise._src.inspect.watch.snapshot import Print, Snapshot

__all__ = ["LeafChange", "changes_between", "watch_table"]

# The changes that an expectation accepts; a leaf that is missing, donated or tied otherwise was not trained.
MOVED = frozenset({"value", "type", "structure", "shape", "dtype", "unexpected"})


@dataclasses.dataclass(frozen=True, slots=True)
class LeafChange:
    """The change of one leaf.

    Attributes:
      leaf: the leaf as it is now; if it is missing now, as it was.
      kind: the name of its kind, as it was before if it existed then; `(no kind)` if none claims it.
      what: the fields that differ; empty if none does.  `value`, `type`, `structure`, `shape`, `dtype`;
        `missing`, if it no longer exists; `unexpected`, if it did not exist before; `ties`, if a path of a tied
        leaf now leads to a leaf of its own, or to another one, or if a path is tied that was not; `donated`, if an
        array was donated, and not replaced.
      why: a description, if more than its values changed; else empty.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> with sw.watch(model) as watch:
      ...     model.bias[...] += 1
      >>> [(change.path, change.kind, change.what) for change in watch.leaves]
      [(('bias',), 'params', ('value',)), (('kernel',), 'params', ())]
    """

    leaf: Leaf
    kind: str
    what: tuple[str, ...] = ()
    why: str = ""

    @property
    def path(self) -> Path:
        """Returns the leaf's first path."""
        return self.leaf.path

    def describe(self) -> str:
        """Returns the change in words: `shape: (2, 3) to (3, 2)`; `same` if there is none."""
        what = ", ".join(self.what) or "same"
        return f"{what}: {self.why}" if self.why else what

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain data."""
        return leaf_dict(self.leaf) | {"kind": self.kind, "what": list(self.what), "why": self.why}


def changes_between(before: Snapshot, after: Snapshot) -> tuple[LeafChange, ...]:
    """Returns the change of each leaf: those of before, in their order, then the new ones."""
    changes = []
    for path, old in before.prints.items():
        new = after.prints.get(path)
        # The path is still there, but leads to a leaf that is now listed under another path: it was tied.
        if new is None and path in after.aliases:
            changes.append(_retied(old.leaf, old.kind, None, after.aliases[path]))
        else:
            changes.append(_change(old, new))
    for path, new in after.prints.items():
        # The path led to a leaf listed under another path, and now has a leaf of its own: it was untied.
        if path in before.aliases:
            first = before.aliases[path]
            changes.append(_retied(new.leaf, before.prints[first].kind, first, None))
        elif path not in before.prints:
            changes.append(_change(None, new))
    return (*changes, *_other_paths(before, after))


def _change(old: Print | None, new: Print | None) -> LeafChange:
    facts = [None if print_ is None else print_.facts for print_ in (old, new)]
    mismatches = compare_leaf(*facts)
    is_donated = Field.DONATED in fields_of(mismatches)
    # A missing or donated leaf is shown as it was, any other as it is; the kind is the one that it had first.
    shown, known = (old if is_donated else new) or old, old or new
    assert shown is not None, "called for a leaf that exists before or after"
    assert known is not None, "likewise"
    why = "nothing in its place" if is_donated else change_of(mismatches)
    return LeafChange(shown.leaf, known.kind, fields_of(mismatches), why)


def _retied(leaf: Leaf, kind: str, old: Path | None, new: Path | None) -> LeafChange:
    """Describes a path that led to the leaf `old` and now leads to `new`; None for a leaf of its own, or for none."""
    was, now = ("nothing" if first is None else format_path(first) for first in (old, new))
    mismatches = (Mismatch(Field.TIES, was, now),)
    return LeafChange(leaf, kind, fields_of(mismatches), change_of(mismatches))


def _other_paths(before: Snapshot, after: Snapshot) -> Iterator[LeafChange]:
    """Yields the changes of further paths of tied leaves: missing, new, or leading to another leaf."""
    ways: dict[Path, list[Path]] = {}
    for path, first in before.aliases.items():
        ways.setdefault(first, [first]).append(path)
    for path, first in before.aliases.items():
        # Any path of the leaf that still exists shows where it is now; if none does, the leaf itself is missing.
        left = (way for way in ways[first] if way != path and (way in after.prints or way in after.aliases))
        other = next(left, None)
        if other is None or path in after.prints:
            continue
        old, now = before.prints[first], after.aliases.get(path)
        leaf = dataclasses.replace(old.leaf, path=path, aliases=())
        if now is None:
            yield LeafChange(leaf, old.kind, fields_of(MISSING), f"tied to {format_path(first)}")
        elif now != after.aliases.get(other, other):
            yield _retied(leaf, old.kind, first, now)
    known = before.prints.keys() | before.aliases.keys()
    for path, first in after.aliases.items():
        if path not in known and first in known:
            new = after.prints[first]
            yield _retied(dataclasses.replace(new.leaf, path=path, aliases=()), new.kind, None, first)


def watch_table(
    by_kind: Mapping[str, Sequence[LeafChange]],
    missed: Sequence[str],
    frozen: Sequence[str],
    static: dict[str, tuple[Any, Any]],
) -> Table:
    """Returns a table with a line for each kind that has leaves; below, all changes of more than values.

    Args:
      by_kind: the change of each leaf, by kind.
      missed: the kinds of which nothing changed, although that was expected.
      frozen: the kinds that are frozen.
      static: plain attributes of modules that changed: before and after, by path.
    """
    rows = []
    for kind, own in by_kind.items():
        changed = sum(bool(change.what) for change in own)
        remark = "-"
        if kind in missed:
            remark = "expected to change, nothing " + ("got new values" if changed else "did")
        elif kind in frozen and changed:
            remark = "frozen, but changed"
        numbers = [format_count(number) if number else "-" for number in (changed, len(own) - changed)]
        rows.append((kind, format_count(len(own)), *numbers, remark))
    lines = [
        (format_path(change.path), change.kind, ", ".join(change.what), change.why or "-")
        for own in by_kind.values()
        for change in own
        if change.what and (change.what != ("value",) or change.kind in frozen)
    ]
    lines += [(path, "-", "static", f"{was!r} to {now!r}") for path, (was, now) in static.items()]
    below = Table("to look at", ("path", "kind", "what", "why"), tuple(lines)) if lines else None
    columns = ("kind", "leaves", "changed", "unchanged", "remark")
    return Table("watch", columns, tuple(rows), right=("leaves", "changed", "unchanged"), below=below)
