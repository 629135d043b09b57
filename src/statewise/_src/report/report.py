"""`sw.report`: what a census, a plan, `memory`, `lint` and `diff` say of one thing, put together."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from statewise._src.checkpoint.diff.diff import Diff, diff
from statewise._src.checkpoint.diff.sources import is_path
from statewise._src.checkpoint.restore import leaves_on_disk, members_on_disk
from statewise._src.common import compat
from statewise._src.common.problems import counted
from statewise._src.common.tables import Shown, Table, count_leaves, format_bytes, printable
from statewise._src.core.kinds import Kinds
from statewise._src.core.plan import Plan, State, tables_in, tables_of
from statewise._src.inspect.census import Census, census
from statewise._src.inspect.lint.finding import Findings
from statewise._src.inspect.lint.lint import lint
from statewise._src.inspect.memory import Memory, memory
from statewise._src.inspect.select.select import check_kinds
from statewise._src.report.gather import LeafReport, leaves_of
from statewise._src.report.page import page
from statewise.errors import DeclarationError

__all__ = ["Report", "report"]


@dataclasses.dataclass(frozen=True)
class Report(Shown):
    """What there is to see of a model, a plan, a state or a checkpoint; `write` makes a page of it.

    Attributes:
      title: what it is about, the page's heading.
      what: `model`, `plan`, `state` or `checkpoint`.
      census: the leaves counted by kind.
      leaves: one `LeafReport` for each leaf.
      findings: what `lint` says; None of a checkpoint, which holds no objects to look at.
      memory: bytes per device; None without a mesh.
      diff: from this to another; None where there is no other.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> report = sw.report(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> report.write("linear.html")
      >>> len(report.leaves), report.census.total.nbytes, report.findings
      (2, 36, [])
    """

    title: str
    what: str
    census: Census
    leaves: tuple[LeafReport, ...]
    findings: Findings | None = None
    memory: Memory | None = None
    diff: Diff | None = None

    @property
    def ok(self) -> bool:
        """Whether lint finds nothing and the other, if there is one, is the same."""
        return not self.findings and not self.diff

    def table(self) -> Table:
        """The census, and in the line above it what else there is to see."""
        total = self.census.total
        words = [counted(total.leaves, "leaf", "leaves"), format_bytes(total.nbytes)]
        if self.memory:
            words.append(f"{format_bytes(self.memory.total)} on each of {self.memory.devices} devices")
        if self.findings is not None:
            words.append(counted(len(self.findings), "finding", "findings"))
        if self.diff is not None:
            differ = counted(len(self.diff.leaves), "leaf differs", "leaves differ")
            words.append(f"{differ} from {self.diff.second}")
        table = self.census.table()
        if self.census.members is not None:
            words.insert(0, f"an ensemble of {self.census.members}")
        return dataclasses.replace(table, title=printable(f"report of {self.title}: {', '.join(words)}"))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: the parts, as `census`, `memory`, `lint` and `diff` give them."""
        return {
            "title": self.title,
            "what": self.what,
            **self.census.to_dict(),
            "leaves": [one.to_dict() for one in self.leaves],
            "findings": None if self.findings is None else self.findings.to_dict()["findings"],
            "memory": None if self.memory is None else self.memory.to_dict(),
            "diff": None if self.diff is None else self.diff.to_dict(),
            "versions": compat.versions(),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The report as one HTML page, which needs no other file and no network."""
        data = self.to_dict()
        for one, leaf in zip(data["leaves"], self.leaves, strict=True):
            # As text a path does not tell which slash is a key's own.
            one["segments"] = [str(key) for key in leaf.leaf.path]
        return page(data)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file; one that is there is replaced.

        Args:
          path: the file, `report.html`.

        Raises:
          OSError: it cannot be written.
        """
        text = self.to_html()
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)


def report(target: Any, other: Any = None, *, kinds: Kinds | Any = None, mesh: Any = None) -> Report:
    """Reports on a model, a plan, a state or a checkpoint: what `sw.report(...).write("report.html")` makes a page of.

    Args:
      target: a module, or a tuple or list of objects, concrete or abstract; a plan; a state; or the path of a
        checkpoint (of Statewise or plain Orbax, or a safetensors file), of which no array is read.
      other: another of these (of checkpoints only Statewise's) to compare it with, from `target` to `other`.
      kinds: the kinds to plan models by; by default those of the other, if it is a state or a plan, and else
        `Kinds.standard()`.
      mesh: a `jax.sharding.Mesh`, an abstract one, or the axes and their sizes, `{"data": 16, "model": 8}`: the report
        then says how each leaf lies on it, and what each device holds.

    Returns:
      the report; it prints as a table.

    Raises:
      DeclarationError: kinds that are none, or kinds where there is no model; a mesh for a checkpoint.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
      StructureError: a model that is none; a state that was donated or being traced.
      PlacementError: leaves that cannot be placed on the mesh, all of them.
      RestoreError: there is no such checkpoint.
      CorruptedError: a checkpoint that is not what was written.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> print(sw.report(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), kinds=sw.Kinds(weights=sw.Kind(nnx.Param))))
      report of Linear: 2 leaves, 36 B, 0 findings
      kind     leaves  elements  bytes  dtypes   types  handling
      -----------------------------------------------------------
      weights       2         9   36 B  float32  Param  -
      -----------------------------------------------------------
      total         2         9   36 B
    """
    models = [thing for thing in (target, other) if thing is not None and _is_model(thing)]
    if kinds is not None:
        check_kinds(kinds)
        if not models:
            raise DeclarationError(
                "Only a model is planned by kinds; plans, states and checkpoints have theirs.", hint="sw.report(target)"
            )
    changes = None if other is None else diff(target, other, kinds=kinds if models else None)
    if is_path(target):
        return dataclasses.replace(_of_checkpoint(target, mesh), diff=changes)
    tables = tables_in(target)
    if tables is not None:
        plan = Plan.of(tables)
        what = "state" if isinstance(target, State) else "plan"
        made = Report(what.capitalize(), what, census(plan), (), lint(target))
    else:
        objects = tuple(target) if isinstance(target, tuple | list) else (target,)
        declared = kinds or _kinds_of(other)
        plan = (declared or Kinds.standard()).plan(*objects)
        title = " and ".join(type(thing).__name__ for thing in objects)
        made = Report(title, "model", census(plan), (), lint(*objects, kinds=declared))
    taken = None if mesh is None else memory(plan, mesh)
    if isinstance(mesh, Mapping):
        mesh = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    return dataclasses.replace(made, leaves=leaves_of(tables_of(plan), mesh), memory=taken, diff=changes)


def _of_checkpoint(path: Any, mesh: Any) -> Report:
    if mesh is not None:
        raise DeclarationError(
            "A checkpoint lies on no mesh: a plan says where its leaves go.",
            hint="sw.report(plan, path, mesh=mesh)",
        )
    leaves, handlings = leaves_on_disk(path)
    counted = Census(count_leaves(leaves, handlings), members_on_disk(path))
    return Report(str(os.fspath(path)), "checkpoint", counted, tuple(map(LeafReport, leaves)))


def _kinds_of(thing: Any) -> Kinds | None:
    tables = tables_in(thing)
    return None if tables is None else Plan.of(tables).kinds


def _is_model(thing: Any) -> bool:
    return not is_path(thing) and tables_in(thing) is None
