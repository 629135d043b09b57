"""What a restore does, or would do, with each leaf."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.problems import counted
from statewise._src.common.tables import ShownData, Table, leaf_dict
from statewise._src.plan.kind import unknown_kind
from statewise.errors import RestoreError

__all__ = ["LeafRestore", "Outcome", "RestoreReport"]

Outcome = Literal["restored", "cast", "resized", "regrouped", "retyped", "kept", "restarted", "dropped", "problem"]


@dataclasses.dataclass(frozen=True, slots=True)
class LeafRestore:
    """What a restore does with one leaf.

    Attributes:
      leaf: the leaf, of the target; of the checkpoint if the target has none.
      outcome: `restored`; `cast`, restored into another dtype; `resized`, per device and onto other devices;
        `regrouped`, from other members of an ensemble; `retyped`, into a leaf whose type another version of Flax
        changed; `kept`, the target's own value; `restarted`, a fresh one; `dropped`, a moment or an average of a leaf
        that no longer has one; `problem`, which prevents a restore.
      why: details; empty if the leaf was simply restored.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", state)
      >>> one = sw.preview(f"{folder}/first", state.cast(params="bfloat16"), cast=True)["params"][0]
      >>> one.outcome, one.why
      ('cast', 'from float32 to bfloat16')
    """

    leaf: Leaf
    outcome: Outcome
    why: str = ""


@dataclasses.dataclass(frozen=True)
class RestoreReport(ShownData):
    """What a restore did, or would do, leaf by leaf; prints as a table.

    Attributes:
      path: the checkpoint.
      leaves: what happens to each leaf, in the order of the target's kinds; then leaves only the checkpoint has.
      hints: for each sort of problem, what to change.
      written: the versions of the software that wrote the checkpoint.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", state)
      >>> report = sw.preview(f"{folder}/first", state)
      >>> report.ok, report.counts
      (True, {'params': {'restored': 2}})
    """

    path: str
    leaves: tuple[LeafRestore, ...]
    hints: tuple[str, ...] = ()
    written: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Returns whether a restore succeeds."""
        return not self.problems

    @property
    def problems(self) -> tuple[Leaf, ...]:
        """Returns the leaves that prevent a restore, each with what is wrong in its `note`."""
        wrong = [entry for entry in self.leaves if entry.outcome == "problem"]
        return tuple(dataclasses.replace(entry.leaf, note=entry.why) for entry in wrong)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Counts for each kind how many leaves had each outcome."""
        counts: dict[str, Counter[str]] = {}
        for entry in self.leaves:
            counts.setdefault(entry.leaf.kind or "", Counter())[entry.outcome] += 1
        return {kind: dict(count) for kind, count in counts.items()}

    def __getitem__(self, kind: str) -> tuple[LeafRestore, ...]:
        entries = tuple(entry for entry in self.leaves if entry.leaf.kind == kind)
        if not entries:
            raise unknown_kind(kind, self.counts)
        return entries

    def __iter__(self) -> Iterator[LeafRestore]:
        return iter(self.leaves)

    def raise_problems(self) -> None:
        """Raises if there are problems.

        Raises:
          RestoreError: with all of them.
        """
        if not self.ok:
            raise RestoreError(
                f"{self.path} does not fit the target: {counted(len(self.problems), 'leaf differs', 'leaves differ')}. "
                "Nothing was read or changed.",
                leaves=self.problems,
                hint="\n".join(self.hints),
            )

    def table(self) -> Table:
        """Returns a table with a line for each leaf that was not simply restored; below, a line for each kind."""
        entries = [entry for entry in self.leaves if entry.outcome != "restored"]
        kinds = Table(
            "kinds",
            ("kind", "leaves", "outcome"),
            tuple(
                (kind, str(sum(count.values())), ", ".join(f"{name} {number}" for name, number in count.items()))
                for kind, count in self.counts.items()
            ),
            right=("leaves",),
        )
        title = f"restore of {self.path}" + ("" if self.ok else ": does not go through")
        if not entries:
            return dataclasses.replace(kinds, title=title)
        rows = [(format_path(each.leaf.path), each.leaf.kind or "-", each.outcome, each.why or "-") for each in entries]
        return Table(title, ("path", "kind", "outcome", "why"), tuple(rows), below=kinds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "path": self.path,
            "ok": self.ok,
            "counts": self.counts,
            "leaves": [leaf_dict(entry.leaf) | {"outcome": entry.outcome, "why": entry.why} for entry in self.leaves],
            "hints": list(self.hints),
            "written": dict(self.written),
        }
