"""The result of `sw.diff`, as data: each leaf that differs, and how many are the same."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from statewise._src.common.compare import Field
from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.tables import ShownData, Table, format_count, leaf_dict
from statewise._src.plan.kind import unknown_kind

__all__ = ["Diff", "LeafDiff"]


@dataclasses.dataclass(frozen=True, slots=True)
class LeafDiff:
    """How one leaf differs.

    Attributes:
      leaf: the leaf in the first; in the second, if only that has it.
      other: the leaf in the second; None if only one has it.
      what: the fields that differ, one or more of `missing` (from the second), `unexpected` (only in the second),
        `kind`, `type`, `structure`, `shape`, `dtype`, `ties`, `value`.
      why: the same in words.
      elements: how many elements have another value.
      largest: the largest absolute difference of two elements; `nan` if only one of the two is NaN; None if no values
        differ, were compared, or can be subtracted (PRNG keys).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> one, other = ({"w": nnx.Param(jnp.array([1.0, x]))} for x in (2.0, 2.5))
      >>> (leaf,) = sw.diff(one, other)["params"]
      >>> leaf.what, leaf.why, leaf.largest
      (('value',), '1 of 2 elements by up to 0.5', 0.5)
    """

    leaf: Leaf
    other: Leaf | None
    what: tuple[str, ...]
    why: str
    elements: int = 0
    largest: float | None = None


@dataclasses.dataclass(frozen=True)
class Diff(ShownData):
    """How two models, states or checkpoints differ, leaf by leaf; true if they do; prints as a table.

    Attributes:
      first: what was compared, in words; for a checkpoint its path.
      second: what it was compared with.
      leaves: the leaves that differ, by kind; the kind in the first counts.
      same: for each kind, how many leaves are the same.
      not_compared: for each kind, how many leaves are the same as far as is known without values, because one side is
        abstract.
      not_saved: kinds that one side has, and that the other, a checkpoint, was not meant to have.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> narrow, wide = (nnx.Linear(2, size, rngs=nnx.Rngs(0)) for size in (3, 4))
      >>> bool(sw.diff(narrow, narrow)), bool(sw.diff(narrow, wide))
      (False, True)
      >>> print(sw.diff(narrow, wide))
      a model (Linear) and a model (Linear): 2 of 2 leaves differ
      path    kind    what   why
      ---------------------------------------
      bias    params  shape  (3,) to (4,)
      kernel  params  shape  (2, 3) to (2, 4)
      <BLANKLINE>
      kinds
      kind    leaves  outcome
      -----------------------
      params       2  shape 2
    """

    first: str
    second: str
    leaves: tuple[LeafDiff, ...]
    same: dict[str, int]
    not_compared: dict[str, int]
    not_saved: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.leaves)

    def __iter__(self) -> Iterator[LeafDiff]:
        return iter(self.leaves)

    def _of(self, field: Field) -> dict[str, tuple[LeafDiff, ...]]:
        leaves: dict[str, list[LeafDiff]] = {}
        for entry in self.leaves:
            if field in entry.what:
                leaves.setdefault(entry.leaf.kind or "", []).append(entry)
        return {kind: tuple(entries) for kind, entries in leaves.items()}

    @property
    def missing(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves that only the first has."""
        return self._of(Field.MISSING)

    @property
    def unexpected(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves that only the second has."""
        return self._of(Field.UNEXPECTED)

    @property
    def kind(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by the kind in the first, the leaves of another kind."""
        return self._of(Field.KIND)

    @property
    def type(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves of another type."""
        return self._of(Field.TYPE)

    @property
    def structure(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves whose value is of another structure."""
        return self._of(Field.STRUCTURE)

    @property
    def shape(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves of another shape."""
        return self._of(Field.SHAPE)

    @property
    def dtype(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves of another dtype, or PRNG implementation."""
        return self._of(Field.DTYPE)

    @property
    def ties(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves that are tied to other paths, or in only one of the two."""
        return self._of(Field.TIES)

    @property
    def value(self) -> dict[str, tuple[LeafDiff, ...]]:
        """Returns, by kind, the leaves with other values."""
        return self._of(Field.VALUE)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Counts for each kind the leaves that are the same, and that differ in each field; one may be in several."""
        counts: dict[str, Counter[str]] = {}
        for name, known in (("same", self.same), ("not compared", self.not_compared)):
            for kind, number in known.items():
                counts.setdefault(kind, Counter())[name] += number
        for entry in self.leaves:
            counts.setdefault(entry.leaf.kind or "", Counter()).update(entry.what)
        return {kind: dict(count) for kind, count in counts.items()}

    def __getitem__(self, kind: str) -> tuple[LeafDiff, ...]:
        if kind not in self.counts:
            raise unknown_kind(kind, self.counts)
        return tuple(entry for entry in self.leaves if entry.leaf.kind == kind)

    def table(self) -> Table:
        """Returns a table with a line for each leaf that differs; below, a line for each kind."""
        sizes = Counter(entry.leaf.kind or "" for entry in self.leaves)
        sizes += Counter(self.same) + Counter(self.not_compared)
        some = f"{format_count(len(self.leaves))} of {format_count(sizes.total())} leaves differ"
        title = f"{self.first} and {self.second}: {some if self else 'no leaf differs'}"
        if self.not_compared:
            title += f"; the values of {format_count(sum(self.not_compared.values()))} were not compared"
        if self.not_saved:
            title += f"; left out: {', '.join(self.not_saved)}"
        rows = []
        for kind, count in self.counts.items():
            outcome = ", ".join(f"{name} {format_count(number)}" for name, number in count.items())
            rows.append((kind, format_count(sizes[kind]), outcome))
        kinds = Table("kinds" if self else title, ("kind", "leaves", "outcome"), tuple(rows), right=("leaves",))
        if not self:
            return kinds
        lines = [(format_path(each.leaf.path), each.leaf.kind or "-", ", ".join(each.what), each.why) for each in self]
        return Table(title, ("path", "kind", "what", "why"), tuple(lines), below=kinds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the differences as plain data; a `largest` that is not finite is text, `nan` or `inf`."""
        return {
            "first": self.first,
            "second": self.second,
            "differ": bool(self),
            "counts": self.counts,
            "not_saved": list(self.not_saved),
            "leaves": [
                leaf_dict(entry.leaf)
                | {
                    "other": None if entry.other is None else leaf_dict(entry.other),
                    "what": list(entry.what),
                    "why": entry.why,
                    "elements_changed": entry.elements,
                    "largest": entry.largest if math.isfinite(entry.largest or 0.0) else str(entry.largest),
                }
                for entry in self.leaves
            ],
        }
