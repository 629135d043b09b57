"""`sw.report`: the results of a census, a plan, `memory`, `lint` and `diff` for one subject, combined."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from statewise._src.checkpoint.diff.diff import Diff, diff
from statewise._src.checkpoint.diff.sources import is_path
from statewise._src.checkpoint.restore import leaves_on_disk, members_on_disk
from statewise._src.common import compat
from statewise._src.common.problems import counted
from statewise._src.common.tables import ShownData, Table, count_leaves, format_bytes, printable
from statewise._src.core.plan import Kinds, Plan, State, tables_in, tables_of
from statewise._src.inspect.census import Census, census
from statewise._src.inspect.lint.finding import Findings
from statewise._src.inspect.lint.lint import lint
from statewise._src.inspect.memory import Memory, as_mesh, memory
from statewise._src.inspect.select.select import check_kinds, objects_of
from statewise._src.report.gather import LeafReport, leaves_of
from statewise._src.report.page import page
from statewise.errors import DeclarationError

__all__ = ["Report", "report"]


@dataclasses.dataclass(frozen=True)
class Report(ShownData):
    """Everything there is to see of a model, a plan, a state or a checkpoint; `write` makes a page of it.

    Attributes:
      title: the subject, which is the page's heading.
      what: `model`, `plan`, `state` or `checkpoint`.
      census: the leaves counted by kind.
      leaves: one `LeafReport` for each leaf.
      findings: the findings of `lint`; None for a checkpoint, which holds no objects to inspect.
      memory: bytes per device; None without a mesh.
      diff: the differences from this to another; None if there is no other.

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
        """Returns whether lint has no findings and the other, if there is one, is the same."""
        return not self.findings and not self.diff

    def table(self) -> Table:
        """Returns the census, with a summary of the rest in the line above it."""
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
        """Returns the report as plain data: the parts, as in `census`, `memory`, `lint` and `diff`."""
        return {
            "title": self.title,
            "what": self.what,
            **self.census.to_dict(),
            "leaves": [leaf.to_dict() for leaf in self.leaves],
            "findings": None if self.findings is None else self.findings.to_dict()["findings"],
            "memory": None if self.memory is None else self.memory.to_dict(),
            "diff": None if self.diff is None else self.diff.to_dict(),
            "versions": compat.versions(),
        }

    def to_html(self) -> str:
        """Returns the report as one HTML page, which needs no other file and no network."""
        data = self.to_dict()
        for row, leaf in zip(data["leaves"], self.leaves, strict=True):
            # A path as text does not show which slashes are part of a key.
            row["segments"] = [str(key) for key in leaf.leaf.path]
        return page(data)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file; an existing file is replaced.

        Args:
          path: the file, such as `report.html`.

        Raises:
          OSError: it cannot be written.
        """
        text = self.to_html()
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)


def report(
    target: object,
    other: object = None,
    *,
    kinds: Kinds | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | Mapping[str, int] | None = None,
) -> Report:
    """Reports on a model, a plan, a state or a checkpoint; `sw.report(...).write("report.html")` makes a page.

    Args:
      target: a module, or a tuple or list of objects, concrete or abstract; a plan; a state; or the path of a
        checkpoint (of Statewise or plain Orbax, or a safetensors file), whose arrays are not read.
      other: another of these to compare with, from `target` to `other`; a checkpoint must be Statewise's.
      kinds: the kinds to plan models by; by default those of the other, if it is a state or a plan, otherwise
        `Kinds.standard()`.
      mesh: a `jax.sharding.Mesh`, an abstract one, or the axes and their sizes, `{"data": 16, "model": 8}`: the report
        then shows each leaf's placement on it, and what each device holds.

    Returns:
      the report; it prints as a table.

    Raises:
      DeclarationError: `kinds` is not a `Kinds`, or there is no model to plan; a mesh for a checkpoint.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
      StructureError: `target` or `other` is not an object with leaves; a state was donated or is being traced.
      PlacementError: leaves that cannot be placed on the mesh, all of them.
      RestoreError: there is no such checkpoint.
      CorruptedError: the checkpoint is not what was written.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> print(sw.report(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), kinds=sw.Kinds(weights=sw.Kind(nnx.Param))))
      report of Linear: 2 leaves, 36 B, 0 findings
      kind     leaves  elements  bytes  dtypes   types  handling
      ----------------------------------------------------------
      weights       2         9   36 B  float32  Param  -
      ----------------------------------------------------------
      total         2         9   36 B
    """
    has_models = any(not is_path(side) and tables_in(side) is None for side in (target, other) if side is not None)
    if kinds is not None:
        check_kinds(kinds)
        if not has_models:
            raise DeclarationError(
                "Only models are planned by `kinds`; plans, states and checkpoints have their own.",
                hint="sw.report(target)",
            )
    changes = None if other is None else diff(target, other, kinds=kinds if has_models else None)
    if is_path(target):
        return dataclasses.replace(_of_checkpoint(target, mesh), diff=changes)
    tables, other_tables = tables_in(target), tables_in(other)
    if tables is not None:
        plan = Plan.of(tables)
        what = "state" if isinstance(target, State) else "plan"
        parts = Report(what.capitalize(), what, census(plan), (), lint(target))
    else:
        # A comparison needs the same kinds on both sides.
        declared = kinds or (None if other_tables is None else Plan.of(other_tables).kinds)
        objects = objects_of(target)
        plan = (declared or Kinds.standard()).plan(*objects)
        title = " and ".join(type(planned).__name__ for planned in objects)
        parts = Report(title, "model", census(plan), (), lint(*objects, kinds=declared))
    mesh = None if mesh is None else as_mesh(mesh)
    bytes_per_device = None if mesh is None else memory(plan, mesh)
    return dataclasses.replace(parts, leaves=leaves_of(tables_of(plan), mesh), memory=bytes_per_device, diff=changes)


def _of_checkpoint(path: Any, mesh: object) -> Report:
    if mesh is not None:
        raise DeclarationError(
            "A checkpoint is not on a mesh; a plan says how its leaves are placed.",
            hint="sw.report(plan, path, mesh=mesh)",
        )
    leaves, handlings = leaves_on_disk(path)
    counted = Census(count_leaves(leaves, handlings), members_on_disk(path))
    return Report(str(os.fspath(path)), "checkpoint", counted, tuple(map(LeafReport, leaves)))
