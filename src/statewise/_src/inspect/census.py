"""The census: the size of each kind of a model, as plain data.

A census only reads shapes and dtypes, so it also works on an abstract model (`nnx.eval_shape`) of any size.  It prints
as a table with a line for each kind.  The line lists the types of the kind's leaves, so that an unknown subclass of
`nnx.Variable`, which the rest kind claims, is noticed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from statewise._src.common.nnx_graph import row_of
from statewise._src.common.tables import KindCount, ShownData, Table, count_kinds, kinds_table, total_of
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import Kinds, State, tables_in
from statewise._src.inspect.select.select import chosen_kinds, graph_of
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.match import claim

__all__ = ["Census", "KindCount", "census"]


@dataclasses.dataclass(frozen=True)
class Census(ShownData):
    """The size of a model, kind by kind; prints as a table.

    Attributes:
      counts: one `KindCount` for each kind, in the order of the kinds.
      members: the number of members that are counted, for an ensemble; None for one model.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> census = sw.census(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> census["stats"].leaves, census.total.nbytes
      (2, 48)
      >>> [kind for kind in census if census[kind].leaves]
      ['params', 'stats']
    """

    counts: tuple[KindCount, ...]
    members: int | None = None

    def __getitem__(self, kind: str) -> KindCount:
        by_name = {count.name: count for count in self.counts}
        if kind not in by_name:
            raise unknown_kind(kind, by_name)
        return by_name[kind]

    def __contains__(self, kind: object) -> bool:
        return any(count.name == kind for count in self.counts)

    def __iter__(self) -> Iterator[str]:
        return iter([count.name for count in self.counts])

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> KindCount:
        """Returns the sum of all kinds."""
        return total_of(self.counts)

    def table(self) -> Table:
        """Returns the census as a table: one line for each kind."""
        title = "census" if self.members is None else f"census of an ensemble of {self.members}"
        return kinds_table(title, self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the census as plain data: `kinds`, a list in order, and `total`; for an ensemble also `members`."""
        return {
            "kinds": [dataclasses.asdict(count) for count in self.counts],
            "total": dataclasses.asdict(self.total),
        } | ({} if self.members is None else {"members": self.members})


def census(model: object, kinds: Kinds | None = None) -> Census:
    """Counts a model kind by kind: leaves, elements, bytes, dtypes and types, with the handling of each kind.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name, concrete, abstract or traced; or a plan,
        or a state.  For a plan, the optimizers' state is counted too, and what an earlier `sow` left in the model.
      kinds: the kinds to count by, `Kinds.standard()` if None; a plan and a state have their own.

    Returns:
      the census; a tied leaf counts once, a model without leaves counts nothing.

    Raises:
      UnclaimedError: leaves that no kind claims, all of them.
      OverlapError: leaves that several kinds claim, all of them.
      DeclarationError: `kinds` is not a `Kinds`, has a path that does not exist, or is passed beside a plan.
      StructureError: `model` is not a module or another object with leaves; a batch of states under the plan of one.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat, frozen=True))
      >>> print(sw.census(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), kinds))
      census
      kind    leaves  elements  bytes  dtypes   types      handling
      -------------------------------------------------------------
      params       2         6   24 B  float32  Param      -
      stats        2         6   24 B  float32  BatchStat  frozen
      -------------------------------------------------------------
      total        4        12   48 B
    """
    plan = tables_in(model)
    declared = chosen_kinds(kinds, plan, "sw.census(model, kinds)  # the planned model")
    if plan is None:
        graph = graph_of(model)
        rows = map(row_of, graph.paths, graph.leaves, claim(declared, graph))
        return Census(count_kinds(rows, declared))
    if isinstance(model, State):
        check_not_batch(model)
    # Leaves that an earlier `sow` left are not part of a state, but the model holds them.
    return Census(count_kinds((*plan.leaves, *plan.excluded), declared), plan.members)
