"""The census: how much of each kind a model holds, as plain data.

A census reads no array, only shapes and dtypes, so that it works as well on an abstract model (`nnx.eval_shape`)
of any size.  It prints as a table with a line for each kind; the types that fall into a kind are named there, so
that an unknown subclass of `nnx.Variable`, which the rest kind takes, does not go unseen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from statewise._src.common.nnx_graph import row_of
from statewise._src.common.tables import KindCount, Shown, Table, count_kinds, kinds_table, total_of
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import Kinds, State, tables_in
from statewise._src.inspect.select.select import check_kinds, look
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.match import claim
from statewise.errors import DeclarationError

__all__ = ["Census", "KindCount", "census"]


@dataclasses.dataclass(frozen=True)
class Census(Shown):
    """What a model amounts to, kind by kind; prints as a table.

    Attributes:
      counts: one `KindCount` for each kind, in the order of the kinds.
      members: of an ensemble how many members are counted; None for one model.

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
        """All kinds together."""
        return total_of(self.counts)

    def table(self) -> Table:
        """The census as a table: one line for each kind."""
        return kinds_table(
            "census" if self.members is None else f"census of an ensemble of {self.members}", self.counts
        )

    def to_dict(self) -> dict[str, Any]:
        """The census as plain data: `kinds`, a list in order, and `total`; of an ensemble also `members`."""
        many = {} if self.members is None else {"members": self.members}
        return {
            "kinds": [dataclasses.asdict(count) for count in self.counts],
            "total": dataclasses.asdict(self.total),
            **many,
        }

    def to_json(self) -> str:
        """The census as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def census(model: object, kinds: Kinds | None = None) -> Census:
    """Counts a model kind by kind: leaves, elements, bytes, dtypes and types, and how each kind is treated.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name, concrete, abstract or traced; or a plan,
        or a state.  Of a plan, the optimizers' state is counted too, and what an earlier `sow` left in the model.
      kinds: the kinds to count by, `Kinds.standard()` if None; a plan and a state have their own.

    Returns:
      the census; a tied leaf counts once, a model without leaves counts nothing.

    Raises:
      UnclaimedError: leaves that no kind claims, all of them.
      OverlapError: leaves that several kinds claim, all of them.
      DeclarationError: kinds that are none, that spell a path which is not there, or that stand beside a plan.
      StructureError: the model is none; a batch of states under the plan of one.

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
    if kinds is not None:
        check_kinds(kinds)
    plan = tables_in(model)
    if plan is not None:
        if kinds is not None and kinds != plan.kinds:
            raise DeclarationError(
                "A plan is counted by its own kinds.", hint="sw.census(model, kinds)  # the planned model"
            )
        if isinstance(model, State):
            check_not_batch(model)
        return Census(count_kinds((*plan.leaves, *plan.excluded), plan.kinds), plan.members)
    found = look(model)
    declared = Kinds.standard() if kinds is None else kinds
    claims = claim(declared, found)
    rows = [row_of(path, leaf, kind) for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True)]
    return Census(count_kinds(rows, declared))
