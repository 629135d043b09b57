"""Two snapshots compared: what became of each leaf, and how that is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common.compare import MISSING, Field, LeafFacts, Mismatch, change_of, compare_leaf, fields_of
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.tables import Table, format_count, leaf_dict
from statewise._src.inspect.watch.snapshot import Print, Snapshot

__all__ = ["LeafChange", "changes_between", "seen_table"]

# How an expected change may have come about; a leaf that is missing, donated or tied otherwise was not trained.
MOVED = frozenset({"value", "type", "structure", "shape", "dtype", "unexpected"})


@dataclasses.dataclass(frozen=True, slots=True)
class LeafChange:
    """What became of one leaf.

    Attributes:
      leaf: the leaf as it is now; one that is missing now as it was.
      kind: the name of its kind, before if it was there before; `(no kind)` where none claims it.
      what: the fields that differ; empty where nothing does.  `value`, `type`, `structure`, `shape`, `dtype`;
        `missing`, if it is not there any more; `unexpected`, if it was not there before; `ties`, if a path of a tied
        leaf leads to a leaf of its own now, or to another one, or if a path is tied that was not; `donated`, if an
        array was donated, and no other was put in.
      why: the same in words, where that is more than other values; else empty.

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
        """The leaf's first path."""
        return self.leaf.path

    def describe(self) -> str:
        """Returns the change in words: `shape: (2, 3) to (3, 2)`; `same` where there is none."""
        what = ", ".join(self.what) or "same"
        return f"{what}: {self.why}" if self.why else what

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return leaf_dict(self.leaf) | {"kind": self.kind, "what": list(self.what), "why": self.why}


def changes_between(before: Snapshot, after: Snapshot) -> tuple[LeafChange, ...]:
    """Returns what became of each leaf: those that were there, in their order, then the new ones."""
    changes = []
    for path, old in before.prints.items():
        new = after.prints.get(path)
        if new is None and path in after.aliases:
            changes.append(_retied(old.leaf, old.kind, None, after.aliases[path]))
        else:
            changes.append(_change(old, new))
    for path, new in after.prints.items():
        if path in before.aliases:
            first = before.aliases[path]
            changes.append(_retied(new.leaf, before.prints[first].kind, first, None))
        elif path not in before.prints:
            changes.append(_change(None, new))
    return (*changes, *_other_paths(before, after))


def _change(old: Print | None, new: Print | None) -> LeafChange:
    """Compares one leaf; of one that was there before, it is the kind that it had."""
    mismatches = compare_leaf(_facts(old), _facts(new))
    is_gone = Field.DONATED in fields_of(mismatches)
    shown, known = (old if is_gone else new) or old, old or new
    assert shown is not None, "asked of a leaf that was there before, or is now"
    assert known is not None, "likewise"
    why = "nothing in its place" if is_gone else change_of(mismatches)
    return LeafChange(shown.leaf, known.kind, fields_of(mismatches), why)


def _facts(print_: Print | None) -> LeafFacts | None:
    if print_ is None:
        return None
    is_gone = print_.prints is None
    return LeafFacts(print_.leaf.type, print_.specs, print_.structure, values=print_.prints, donated=is_gone)


def _retied(leaf: Leaf, kind: str, old: Path | None, new: Path | None) -> LeafChange:
    """A path that led to the leaf `old`, and leads to `new` now; None for a leaf of its own, or for none."""
    was, now = ("nothing" if first is None else format_path(first) for first in (old, new))
    mismatches = (Mismatch(Field.TIES, was, now),)
    return LeafChange(leaf, kind, fields_of(mismatches), change_of(mismatches))


def _other_paths(before: Snapshot, after: Snapshot) -> Iterator[LeafChange]:
    """Further paths of tied leaves that are not there any more, that are new, or that lead to another leaf."""

    def is_there(path: Path) -> bool:
        return path in after.prints or path in after.aliases

    ways: dict[Path, list[Path]] = {}
    for path, first in before.aliases.items():
        ways.setdefault(first, [first]).append(path)
    for path, first in before.aliases.items():
        # What it was tied to, by the first of its paths that is left; where none is, the leaf itself is missing.
        left = next((way for way in ways[first] if way != path and is_there(way)), None)
        if left is None or path in after.prints:
            continue
        old, now = before.prints[first], after.aliases.get(path)
        leaf = dataclasses.replace(old.leaf, path=path, aliases=())
        if now is None:
            yield LeafChange(leaf, old.kind, fields_of(MISSING), f"tied to {format_path(first)}")
        elif now != after.aliases.get(left, left):
            yield _retied(leaf, old.kind, first, now)
    for path, first in after.aliases.items():
        if path in before.prints or path in before.aliases:
            continue
        if first in before.prints or first in before.aliases:
            new = after.prints[first]
            yield _retied(dataclasses.replace(new.leaf, path=path, aliases=()), new.kind, None, first)


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
        changed = sum(bool(change.what) for change in own)
        says = "-"
        if kind in missed:
            says = "expected to change, nothing " + ("got new values" if changed else "did")
        elif kind in frozen and changed:
            says = "frozen, but changed"
        numbers = [format_count(number) if number else "-" for number in (changed, len(own) - changed)]
        rows.append((kind, format_count(len(own)), *numbers, says))
    changes = [change for own in by_kind.values() for change in own]
    told = [change for change in changes if change.what and (change.what != ("value",) or change.kind in frozen)]
    lines = [(format_path(change.path), change.kind, ", ".join(change.what), change.why or "-") for change in told]
    lines += [(path, "-", "static", f"{was!r} to {now!r}") for path, (was, now) in static.items()]
    below = Table("to look at", ("path", "kind", "what", "why"), tuple(lines)) if lines else None
    columns = ("kind", "leaves", "changed", "unchanged", "remark")
    return Table("watch", columns, tuple(rows), right=("leaves", "changed", "unchanged"), below=below)
