"""The report of an audit: one row for each leaf of the state, counts for each kind, and the leaves to look at."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common.paths import Leaf, Path, format_path, format_shape, format_type
from statewise._src.common.tables import ShownData, Table, format_count, leaf_dict
from statewise._src.inspect.positions import WHY, may_be_position, restart_hint
from statewise._src.plan.kind import Kind, unknown_kind
from statewise.errors import StatewiseError, StatewiseWarning

__all__ = ["Audit", "KindAudit", "LeafAudit"]


@dataclasses.dataclass(frozen=True, slots=True)
class LeafAudit:
    """The effects of a step on one leaf.

    Attributes:
      leaf: the leaf: path, kind, type, shape, dtype, aliases.
      read: whether the step needs its value.
      written: whether the step changes it, by its function or by an optimizer.
      updated: whether it is an optimizer that changes it.
      differentiated: whether the loss is differentiated with respect to it.
      zero_gradient: whether it is differentiated and the gradient is zero whatever the values: the loss does not
        depend on it, or only through operations that no gradient passes.
      passed_to_jit: whether it is passed to the compiled function.
      donated: whether a call donates its buffer; a packed leaf's is shared with other leaves.
      returned: whether the compiled function returns it.
      packed: whether it is in a buffer with others.
      undeclared: whether the function writes it although the step does not declare that.
      saved: whether a checkpoint contains it.
      written_but_not_saved: whether the step writes it and no checkpoint contains it.
      restarts: whether its kind declares how a fresh value is made.
      compute: the dtype in which the function sees it; None if that is its own.

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
    compute: str | None = None

    @property
    def path(self) -> Path:
        """Returns the leaf's first path."""
        return self.leaf.path

    @property
    def kind(self) -> str | None:
        """Returns the name of the leaf's kind."""
        return self.leaf.kind

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain data."""
        return leaf_dict(self.leaf) | {name: getattr(self, name) for name in (*FLAGS, "compute")}


FLAGS = tuple(field.name for field in dataclasses.fields(LeafAudit) if field.name not in ("leaf", "compute"))


@dataclasses.dataclass(frozen=True, slots=True)
class KindAudit:
    """The effects of a step on one kind: for each fact of `LeafAudit`, the number of leaves for which it holds.

    Attributes:
      name: the kind's name.
      leaves: the number of its leaves.
      read: how many the step needs.
      written: how many it changes.
      differentiated: with respect to how many the loss is differentiated.
      zero_gradient: how many of those have a gradient that is zero whatever the values.
      passed_to_jit: how many are passed to the compiled function.
      donated: how many buffers of leaves a call donates.
      returned: how many the compiled function returns.
      packed: how many are in buffers with others.
      undeclared: how many are written undeclared.
      written_but_not_saved: how many are written and not saved.
      saved: whether a checkpoint contains the kind.
      restarts: whether the kind declares how a fresh value is made.
      compute: the compute dtype that the kind declares; None if it declares none.

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
    compute: str | None = None


@dataclasses.dataclass(frozen=True)
class Audit(ShownData):
    """The effects of a step on a state, leaf by leaf and kind by kind; prints as a table.

    `audit["params"]` returns the rows of one kind.

    Attributes:
      step: the step's name.
      trains: whether it differentiates.
      leaves: one `LeafAudit` for each leaf of the state, kind by kind.
      kinds: the declaration.
      error: the error that a call would raise because it writes undeclared kinds, trains nothing, or reads a stale
        kind; else None.
      warnings: the warnings of a call, a `StatewiseWarning` each: kinds that the step names in `writes` and does not
        write, writes that are lost under a plain `jax.jit` or `jax.checkpoint`, kinds that it does not train.

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

    # --- leaves to look at ---------------------------------------------------------------------------------------

    @property
    def undeclared(self) -> tuple[LeafAudit, ...]:
        """Returns the leaves that the function writes and the step does not declare; `error` has the hint."""
        return self._where("undeclared")

    @property
    def untrained(self) -> tuple[LeafAudit, ...]:
        """Returns the leaves that an optimizer updates although their gradient is always zero."""
        return self._where("zero_gradient")

    @property
    def unread(self) -> tuple[LeafAudit, ...]:
        """Returns the leaves that the step neither reads nor writes."""
        return tuple(row for row in self.leaves if not (row.read or row.written))

    @property
    def ephemeral_writes(self) -> tuple[LeafAudit, ...]:
        """Returns the leaves that the step writes and no checkpoint contains: a restart of the program loses them."""
        return self._where("written_but_not_saved")

    @property
    def left_behind(self) -> tuple[LeafAudit, ...]:
        """Returns integers that the step writes beside leaves that restart, in one module, but that do not restart.

        Most often they are positions in a cache: after `state.restart("cache")` they still point behind the old text.
        `left_behind_hint` is a declaration with which they restart too.
        """
        # The path of a module is that of its leaves without the last key.
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
        """Returns code that makes the first leaf of `left_behind` restart with its cache; None if it is empty."""
        for row in self.left_behind:
            beside = (other for other in self.leaves if other.path[:-1] == row.path[:-1])
            cache = next(str(other.kind) for other in beside if other.written and other.restarts)
            return restart_hint(self.kinds, row.kind, row.path, cache)
        return None

    def _where(self, flag: str) -> tuple[LeafAudit, ...]:
        return tuple(row for row in self.leaves if getattr(row, flag))

    # --- display -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def counts(self) -> dict[str, KindAudit]:
        """Returns the counts, by kind, in the order of the kinds, including kinds without leaves."""
        counted = [field.name for field in dataclasses.fields(KindAudit) if field.name in FLAGS]
        counts = {}
        for name, kind in self.kinds.items():
            rows = self[name]
            facts: dict[str, Any] = {flag: sum(getattr(row, flag) for row in rows) for flag in counted}
            facts |= {"saved": kind.saved, "restarts": kind.restart is not None, "compute": kind.compute}
            counts[name] = KindAudit(name=name, leaves=len(rows), **facts)
        return counts

    def table(self) -> Table:
        """Returns the audit as a table: a line for each kind that has leaves; below, the leaves to look at."""
        counts = [count for count in self.counts.values() if count.leaves]
        columns = {"kind": [count.name for count in counts], "leaves": [format_count(count.leaves) for count in counts]}
        for title, numbers in self._columns(counts):
            columns[title] = [format_count(number) if number else "-" for number in numbers]
        columns["saved"] = ["yes" if count.saved else "no" for count in counts]
        columns["restarts"] = ["yes" if count.restarts else "-" for count in counts]
        columns |= _compute_column(counts)
        rows = tuple(zip(*columns.values(), strict=True))
        return Table(
            f"audit of {self.step}", tuple(columns), rows, right=("leaves", *_COUNTED), below=self._to_look_at()
        )

    def by_leaf(self, *kinds: str) -> Table:
        """Returns a table with a line for each leaf, of some kinds or of all."""
        rows = [row for kind in kinds for row in self[kind]] if kinds else self.leaves
        columns: dict[str, list[str]] = {
            "path": [format_path(row.path) for row in rows],
            "kind": [row.kind or "-" for row in rows],
            "type": [format_type(row.leaf.type) for row in rows],
            "shape": [format_shape(row.leaf.shape) for row in rows],
        }
        for title, flags in self._columns(rows):
            columns[title] = ["yes" if flag else "-" for flag in flags]
        columns["saved"] = ["yes" if row.saved else "no" for row in rows]
        columns |= _compute_column(rows)
        return Table(f"audit of {self.step}", tuple(columns), tuple(zip(*columns.values(), strict=True)))

    def _columns(self, rows: Sequence[LeafAudit | KindAudit]) -> Iterator[tuple[str, list[int]]]:
        """Yields the columns of facts, each with its title: some always, the others if any row has a value there."""
        for title, flag in _COUNTED.items():
            values = [getattr(row, flag) for row in rows]
            if flag in _ALWAYS or any(values) or (self.trains and flag in _TRAINING):
                yield title, values

    def _to_look_at(self) -> Table | None:
        leaves_of = {
            "written, not declared": self.undeclared,
            "gradient always zero": self.untrained,
            "written, not saved": self.ephemeral_writes,
            f"left behind by restart(): {WHY}": self.left_behind,
        }
        lines = [(format_path(row.path), row.kind or "-", fact) for fact, rows in leaves_of.items() for row in rows]
        for warning in self.warnings:
            lines += _by_kind(warning, fact=warning.message.removeprefix(f"{self.step} ").rstrip("."))
        lines += [("", "", f"hint: {line}") for line in (self.left_behind_hint or "").splitlines()]
        return Table("to look at", ("path", "kind", "fact"), tuple(lines)) if lines else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit as plain data: `step`, `trains`, `error` (its text), `warnings`, `kinds` and `leaves`."""
        return {
            "step": self.step,
            "trains": self.trains,
            "error": None if self.error is None else str(self.error),
            "warnings": [
                {"message": warning.message, "kind": warning.kind, "leaves": list(map(leaf_dict, warning.leaves))}
                for warning in self.warnings
            ],
            "kinds": [dataclasses.asdict(count) for count in self.counts.values()],
            "leaves": [row.to_dict() for row in self.leaves],
        }


# The titles of the columns of facts, and the fact that each one counts.
_COUNTED = {
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
_ALWAYS = frozenset({"read", "written", "passed_to_jit", "donated"})
_TRAINING = frozenset({"differentiated", "zero_gradient"})


def _compute_column(rows: Sequence[LeafAudit | KindAudit]) -> dict[str, list[str]]:
    """Returns the column of compute dtypes, by its title, if there are any."""
    return {"compute": [row.compute or "-" for row in rows]} if any(row.compute for row in rows) else {}


def _by_kind(warning: StatewiseWarning, fact: str) -> list[tuple[str, str, str]]:
    """Returns a line for each kind that a warning is about: its first leaf, how many more, and the fact."""
    lines = []
    for kind in dict.fromkeys(leaf.kind for leaf in warning.leaves):
        first, *more = (leaf for leaf in warning.leaves if leaf.kind == kind)
        path = format_path(first.path) + (f" and {len(more)} more" if more else "")
        lines.append((path, kind or "-", first.note or fact))
    return lines or [("-", warning.kind or "-", fact)]
