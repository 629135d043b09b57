"""The report of an audit: one row for each leaf of the state, counts for each kind, and what deserves a look."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common.paths import Leaf, Path, format_path, format_shape, format_type
from statewise._src.common.tables import Shown, Table, format_count, leaf_dict
from statewise._src.inspect.positions import WHY, may_be_position, restart_hint
from statewise._src.plan.kind import Kind, unknown_kind
from statewise.errors import StatewiseError, StatewiseWarning

__all__ = ["Audit", "KindAudit", "LeafAudit"]


@dataclasses.dataclass(frozen=True, slots=True)
class LeafAudit:
    """What a step does to one leaf.

    Attributes:
      leaf: the leaf: path, kind, type, shape, dtype, aliases.
      read: whether the step needs its value.
      written: whether the step changes it, by its function or by an optimizer.
      updated: whether an optimizer is what changes it.
      differentiated: whether the loss is differentiated with respect to it.
      zero_gradient: whether it is differentiated and the gradient is zero whatever the values: the loss does not
        depend on it, or only through what lets no gradient pass.
      passed_to_jit: whether it is passed into the compiled function.
      donated: whether its buffer is given away in a call; a packed leaf's with its neighbours'.
      returned: whether it comes back out of the compiled function.
      packed: whether it travels in a buffer with others.
      undeclared: whether the function writes it although the step does not declare that.
      saved: whether a checkpoint holds it.
      written_but_not_saved: whether the step writes it and no checkpoint holds it.
      restarts: whether its kind says how a fresh value is made.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> forward = sw.step(lambda model, x: model(x))
      >>> bias, kernel = sw.audit(forward, plan.abstract(), jax.ShapeDtypeStruct((4, 2), "float32"))["params"]
      >>> bias.path, bias.read, bias.written
      (('bias',), True, False)
    """

    leaf: Leaf
    read: bool
    written: bool
    updated: bool
    differentiated: bool
    zero_gradient: bool
    passed_to_jit: bool
    donated: bool
    returned: bool
    packed: bool
    undeclared: bool
    saved: bool
    written_but_not_saved: bool
    restarts: bool

    @property
    def path(self) -> Path:
        """The leaf's first path."""
        return self.leaf.path

    @property
    def kind(self) -> str | None:
        """The name of the leaf's kind."""
        return self.leaf.kind

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return leaf_dict(self.leaf) | {name: getattr(self, name) for name in FLAGS}


FLAGS = tuple(field.name for field in dataclasses.fields(LeafAudit) if field.name != "leaf")


@dataclasses.dataclass(frozen=True, slots=True)
class KindAudit:
    """What a step does to one kind: how many of its leaves each fact of `LeafAudit` holds for.

    Attributes:
      name: the kind's name.
      leaves: how many leaves it has.
      read: how many the step needs.
      written: how many it changes.
      differentiated: how many the loss is differentiated with respect to.
      zero_gradient: how many of those have a gradient that is zero whatever the values.
      passed_to_jit: how many are passed into the compiled function.
      donated: how many give their buffers away.
      returned: how many come back out of the compiled function.
      packed: how many travel in buffers with others.
      undeclared: how many are written undeclared.
      written_but_not_saved: how many are written and not saved.
      saved: whether a checkpoint holds the kind.
      restarts: whether the kind says how a fresh value is made.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> audit = sw.audit(sw.step(lambda model: model.bias.sum()), plan.abstract())
      >>> audit.counts["params"].leaves, audit.counts["params"].read
      (2, 1)
    """

    name: str
    leaves: int
    read: int
    written: int
    differentiated: int
    zero_gradient: int
    passed_to_jit: int
    donated: int
    returned: int
    packed: int
    undeclared: int
    written_but_not_saved: int
    saved: bool
    restarts: bool


@dataclasses.dataclass(frozen=True)
class Audit(Shown):
    """What a step does to a state, leaf by leaf and kind by kind; prints as a table.

    `audit["params"]` gives the rows of one kind.

    Attributes:
      step: the step's name.
      trains: whether it differentiates.
      leaves: one `LeafAudit` for each leaf of the state, kind by kind.
      kinds: the declaration.
      error: what calling the step would raise because it writes undeclared kinds or trains nothing; else None.
      warnings: what calling the step would warn of, a `StatewiseWarning` each: kinds that it names in `writes` and does
        not write, writes that are lost under a plain `jax.jit` or `jax.checkpoint`, kinds that it does not train.

    Example:
      >>> import jax, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizers={"params": optax.sgd(0.1)})
      >>> train = sw.train_step(lambda model, x: (x @ model.kernel[...]).sum())
      >>> audit = sw.audit(train, plan.abstract(), jax.ShapeDtypeStruct((4, 2), "float32"))
      >>> [sw.format_path(row.path) for row in audit.untrained]
      ['bias']
    """

    step: str
    trains: bool
    leaves: tuple[LeafAudit, ...]
    kinds: Mapping[str, Kind]
    error: StatewiseError | None = None
    warnings: tuple[StatewiseWarning, ...] = ()

    def __getitem__(self, kind: str) -> tuple[LeafAudit, ...]:
        if kind not in self.kinds:
            raise unknown_kind(kind, self.kinds)
        return tuple(row for row in self.leaves if row.kind == kind)

    def __contains__(self, kind: object) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __repr__(self) -> str:
        return f"Audit(step={self.step!r}, leaves={len(self.leaves)})"

    # --- what to look at -----------------------------------------------------------------------------------------

    @property
    def undeclared(self) -> tuple[LeafAudit, ...]:
        """The leaves that the function writes and the step does not declare; `error` has the hint."""
        return self._where("undeclared")

    @property
    def untrained(self) -> tuple[LeafAudit, ...]:
        """The leaves that an optimizer updates though their gradient is always zero."""
        return self._where("zero_gradient")

    @property
    def unread(self) -> tuple[LeafAudit, ...]:
        """The leaves that the step neither reads nor writes."""
        return tuple(row for row in self.leaves if not (row.read or row.written))

    @property
    def ephemeral_writes(self) -> tuple[LeafAudit, ...]:
        """The leaves that the step writes and no checkpoint holds: after a restart of the program they are lost."""
        return self._where("written_but_not_saved")

    @property
    def left_behind(self) -> tuple[LeafAudit, ...]:
        """Whole numbers that the step writes together with a kind that restarts, in one module, and that do not.

        Positions in a cache, most often: after `state.restart("cache")` they still point behind the old text.
        `left_behind_hint` is the declaration under which they restart too.
        """
        restarting = {row.path[:-1] for row in self.leaves if row.written and row.restarts}
        return tuple(
            row
            for row in self.leaves
            if row.written
            and not row.restarts
            and row.path[:-1] in restarting
            and may_be_position(row.leaf.type, row.leaf.shape, row.leaf.dtype, str(row.path[-1]))
        )

    @property
    def left_behind_hint(self) -> str | None:
        """What makes the first leaf of `left_behind` restart with its cache, as code; None where there is none."""
        for row in self.left_behind:
            beside = (other for other in self.leaves if other.path[:-1] == row.path[:-1])
            cache = next(str(other.kind) for other in beside if other.written and other.restarts)
            return restart_hint(self.kinds, row.kind, row.path, cache)
        return None

    def _where(self, flag: str) -> tuple[LeafAudit, ...]:
        return tuple(row for row in self.leaves if getattr(row, flag))

    # --- showing -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def counts(self) -> dict[str, KindAudit]:
        """The counts, by kind, in the order of the kinds; kinds without leaves too."""
        counted = [field.name for field in dataclasses.fields(KindAudit) if field.name in FLAGS]
        found = {}
        for name, kind in self.kinds.items():
            rows = self[name]
            numbers: dict[str, Any] = {flag: sum(getattr(row, flag) for row in rows) for flag in counted}
            numbers |= {"saved": kind.saved, "restarts": kind.restart is not None}
            found[name] = KindAudit(name=name, leaves=len(rows), **numbers)
        return found

    def table(self) -> Table:
        """The audit as a table: a line for each kind that has leaves; below, the leaves that deserve a look."""
        counts = [count for count in self.counts.values() if count.leaves]
        columns: dict[str, list[str]] = {"kind": [count.name for count in counts]}
        for title, flag in _COUNTED.items():
            numbers = [getattr(count, flag) for count in counts]
            if flag in _ALWAYS or any(numbers) or (self.trains and flag in _TRAINING):
                columns[title] = [format_count(number) if number else "-" for number in numbers]
        columns["saved"] = ["yes" if count.saved else "no" for count in counts]
        columns["restarts"] = ["yes" if count.restarts else "-" for count in counts]
        rows = tuple(zip(*columns.values(), strict=True))
        right = tuple(_COUNTED)
        return Table(f"audit of {self.step}", tuple(columns), rows, right=right, below=self._findings())

    def by_leaf(self, *kinds: str) -> Table:
        """A table with a line for each leaf, of some kinds or of all."""
        rows = [row for kind in kinds for row in self[kind]] if kinds else self.leaves
        columns: dict[str, list[str]] = {
            "path": [format_path(row.path) for row in rows],
            "kind": [row.kind or "-" for row in rows],
            "type": [format_type(row.leaf.type) for row in rows],
            "shape": [format_shape(row.leaf.shape) for row in rows],
        }
        for title, flag in _COUNTED.items():
            flags = [getattr(row, flag) for row in rows] if flag != "leaves" else []
            if flags and (flag in _ALWAYS or any(flags) or (self.trains and flag in _TRAINING)):
                columns[title] = ["yes" if is_so else "-" for is_so in flags]
        columns["saved"] = ["yes" if row.saved else "no" for row in rows]
        return Table(f"audit of {self.step}", tuple(columns), tuple(zip(*columns.values(), strict=True)))

    def _findings(self) -> Table | None:
        found: Sequence[tuple[str, tuple[LeafAudit, ...]]] = (
            ("written, not declared", self.undeclared),
            ("gradient always zero", self.untrained),
            ("written, not saved", self.ephemeral_writes),
            (f"left behind by restart(): {WHY}", self.left_behind),
        )
        lines = [(format_path(row.path), row.kind or "-", fact) for fact, rows in found for row in rows]
        for one in self.warnings:
            fact = one.message.removeprefix(f"{self.step} ").rstrip(".")
            lines += _by_kind(one, fact)
        hint = self.left_behind_hint
        lines += [("", "", f"hint: {line}") for line in hint.splitlines()] if hint else []
        return Table("to look at", ("path", "kind", "fact"), tuple(lines)) if lines else None

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain data: `step`, `trains`, `error` (its text), `warnings`, `kinds` and `leaves`, in order."""
        return {
            "step": self.step,
            "trains": self.trains,
            "error": None if self.error is None else str(self.error),
            "warnings": [
                {"message": one.message, "kind": one.kind, "leaves": [leaf_dict(leaf) for leaf in one.leaves]}
                for one in self.warnings
            ],
            "kinds": [dataclasses.asdict(count) for count in self.counts.values()],
            "leaves": [row.to_dict() for row in self.leaves],
        }

    def to_json(self) -> str:
        """The audit as JSON."""
        return json.dumps(self.to_dict(), indent=2)


# A column's title, and the fact that it counts.
_COUNTED = {
    "leaves": "leaves",
    "read": "read",
    "written": "written",
    "undeclared": "undeclared",
    "differentiated": "differentiated",
    "zero gradient": "zero_gradient",
    "passed to jit": "passed_to_jit",
    "donated": "donated",
    "packed": "packed",
    "not saved": "written_but_not_saved",
}
_ALWAYS = frozenset({"leaves", "read", "written", "passed_to_jit", "donated"})
_TRAINING = frozenset({"differentiated", "zero_gradient"})


def _by_kind(warning: StatewiseWarning, fact: str) -> list[tuple[str, str, str]]:
    """Returns a line for each kind of what a call warns of: its first leaf, how many more, and what becomes of them."""
    lines = []
    for kind in dict.fromkeys(leaf.kind for leaf in warning.leaves):
        first, *more = (leaf for leaf in warning.leaves if leaf.kind == kind)
        path = format_path(first.path) + (f" and {len(more)} more" if more else "")
        lines.append((path, kind or "-", first.note or fact))
    return lines or [("-", warning.kind or "-", fact)]
