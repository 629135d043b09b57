"""`sw.checkpointable`: a state as an item of Orbax's own managers, beside a data iterator, metrics or other items.

One object serves both of Orbax's interfaces.  For `ocp.CheckpointManager` and the checkpointers it is an argument with
a handler of its own, to save and to restore.  For the newer `orbax.checkpoint.v1` it is an object that saves and loads
itself.  `orbax/item.py` is what Orbax sees of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from statewise._src.checkpoint.format.layout import Layout
from statewise._src.checkpoint.orbax.item import StateItem
from statewise._src.checkpoint.orbax.state_writer import Saving
from statewise._src.checkpoint.restore import restore
from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.checkpoint.save import check_layout, kinds_to_save
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import State
from statewise.errors import StructureError

__all__ = ["Checkpointable", "checkpointable"]


@dataclasses.dataclass
class Checkpointable(StateItem):
    """A state as an item of an Orbax checkpoint; made by `sw.checkpointable`.

    Attributes:
      state: the state that is saved; the target of a restore; after a restore, the restored state.
      only: the kinds that are saved or restored; None for all that are `saved`.
      cast: whether a restore may change dtypes.
      layout: `named` or `packed`.
      report: what the last restore did; None before.
      members: which members of an ensemble a restore takes; None for all, as they are.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> item = sw.checkpointable(sw.plan(model).take(model), only="params")
      >>> item.only, item.layout
      (('params',), 'named')
    """

    state: State
    only: tuple[str, ...] | None = None
    cast: bool = False
    layout: Layout = "named"
    report: RestoreReport | None = None
    members: int | Sequence[int | None] | None = None

    @property
    def saving(self) -> Saving:
        """Returns what a save writes; for Orbax."""
        return Saving(self.state, kinds_to_save(self.state, self.only), self.layout, recorded=self.recorded)

    def restored(self, directory: str | os.PathLike[str]) -> State:
        """Restores into `state` and returns it; for Orbax."""
        self.state, self.report = restore(directory, self.state, only=self.only, cast=self.cast, members=self.members)
        return self.state


def checkpointable(
    state: State,
    *,
    only: str | Sequence[str] | None = None,
    cast: bool = False,
    layout: Layout = "named",
    members: int | Sequence[int | None] | None = None,
) -> Checkpointable:
    """Makes an item of a state for Orbax's own managers, to save it there or to restore into it.

    Args:
      state: to save, the state; to restore, the target: a state or an abstract one.
      only: the kinds; by default all that are `saved`.
      cast: whether a restore may change dtypes.
      layout: `"named"` or `"packed"`.
      members: to restore: which members of an ensemble, as in `sw.restore`.

    Returns:
      what represents the state in `ocp.args.Composite(...)`, or among the checkpointables of `orbax.checkpoint.v1`.
      After a restore, its `state` and `report` are the results.

    Raises:
      StructureError: it is not a state, or it is a batch of states under the plan of one.
      DeclarationError: `only` names a kind that does not exist, or one that is never saved.

    Example:
      >>> import tempfile
      >>> import orbax.checkpoint as ocp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     items = ocp.args.Composite(
      ...         state=sw.checkpointable(state), metrics=ocp.args.JsonSave({"loss": 0.5})
      ...     )
      ...     _ = manager.save(1, args=items)
      ...     manager.wait_until_finished()
      ...     back = manager.restore(1, args=ocp.args.Composite(state=sw.checkpointable(state)))
      >>> back["state"]["params"]["kernel"].shape
      (2, 3)
    """
    if not isinstance(state, State):
        raise StructureError(
            f"sw.checkpointable wants a state, not {type(state).__name__}.", hint="sw.checkpointable(plan.take(model))"
        )
    check_not_batch(state)
    check_layout(layout)
    names = None if only is None else kinds_to_save(state, only)
    return Checkpointable(state, names, cast, layout, members=members)
