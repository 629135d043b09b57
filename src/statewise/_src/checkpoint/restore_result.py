"""The result of `Checkpoints.restore`."""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from typing import Any, NamedTuple

from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.core.plan import State

__all__ = ["RestoreResult"]


class RestoreResult(NamedTuple):
    """The result of `Checkpoints.restore`.

    Attributes:
      state: the state.
      report: what happened to each leaf.
      step: the step that was restored.
      extra: the requested extra items, by name.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> with sw.Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     _ = checkpoints.save(7, state)
      ...     checkpoints.wait()
      ...     state, report, step, extra = checkpoints.restore(state)
      >>> step, report.ok
      (7, True)
    """

    state: State
    report: RestoreReport
    step: int
    extra: dict[str, Any]
