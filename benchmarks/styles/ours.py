"""Statewise, as its README has it."""

from __future__ import annotations

from typing import Any

import jax

import statewise as sw
from benchmarks.case import Call, Case

__all__ = ["Ours"]


class Ours:
    """One state, which each step replaces.

    Args:
      case: the case.
      model: a fresh model of it.
      sharding: where the state lies, if not on the default device.
      pack: packed buffers.
      copy: whether the state gets arrays of its own.
    """

    def __init__(self, case: Case, model: Any, sharding: Any = None, pack: bool = False, copy: bool = True) -> None:
        self.case = case
        self.plan = sw.plan(model, optimizers={"params": case.tx} if case.tx else None)
        packing: dict[str, Any] = {"pack": True} if pack else {}
        self.state = self.plan.take(model, copy=copy, **packing)
        if sharding is not None:
            self.state = jax.device_put(self.state, sharding)

    def step(self, name: str) -> sw.results.Step:
        """The step, not bound to a state."""
        program = self.case.programs[name]
        if program.trains:
            return sw.train_step(program.fn)
        return sw.step(program.fn, writes=program.writes or ())

    def program(self, name: str) -> Call:
        step, program = self.step(name), self.case.programs[name]

        def reads(*args: Any) -> Any:
            return step(self.state, *args)

        def writes(*args: Any) -> Any:
            self.state, out = step(self.state, *args)
            return out

        return writes if program.trains or program.writes else reads

    def lower(self, name: str, *args: Any) -> Any:
        """Lowered ahead of time."""
        return self.step(name).lower(self.state, *args)
