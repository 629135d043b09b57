"""Which outputs of a traced function may differ from device to device, determined from its jaxpr.

Under `jax.shard_map` each device runs the function on its own part of the batch and its own values.  JAX tracks this in
its types too, but that requires rewriting loops whose carried value starts the same everywhere and does not stay so (a
zero carry of an RNN); here models need no changes.  A value varies over a mesh axis if it depends on one that does,
except through a collective that gives all devices along the axis the same value.  A reference (`jax.new_ref`) varies
once a varying value may be written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statewise._src.common.compat import jaxprs, primitives
from statewise._src.step.flow import Flow

__all__ = ["varying"]

Axes = frozenset[str]
NOWHERE: Axes = frozenset()


def varying(jaxpr: Any, inputs: Sequence[Axes], axes: Axes) -> list[Axes]:
    """Returns the axes over which each output of a jaxpr may vary.

    Args:
      jaxpr: open or closed; its constants are the same on all devices.
      inputs: the axes over which each input varies.
      axes: the axes of interest.
    """
    return list(_Varying(NOWHERE, axes).outputs(jaxpr, tuple(inputs)))


class _Varying(Flow[Axes]):
    """The axes over which values may vary."""

    def follow(self, eqn: Any, ins: tuple[Axes, ...], facts: dict[Any, Axes]) -> None:
        """Adds the axes over which the results of an equation, and the references that it may write, may vary."""
        references = [var for var in eqn.invars if jaxprs.is_reference(var)]
        if not references:
            super().follow(eqn, ins, facts)
            return
        # A value that is written to one reference may be read from another, and a body may do so in any iteration.
        over = self.everything if _calls(eqn) else self.join(ins) | self._named(eqn)
        facts.update(dict.fromkeys([*references, *eqn.outvars], over))

    def through(self, eqn: Any, ins: tuple[Axes, ...]) -> tuple[Axes, ...]:
        """Returns the axes over which each result of one equation may vary."""
        if jaxprs.name_of(eqn) not in primitives.COLLECTIVE_JOINS:
            return super().through(eqn, ins)
        over, count = self._named(eqn), len(eqn.outvars)
        if jaxprs.has_axis_groups(eqn):
            return (self.join(ins) | over,) * count  # the same within each group only
        # A collective of several operands treats each on its own.
        return tuple(operand - over for operand in ins) if len(ins) == count else (self.join(ins) - over,) * count

    def body(self, eqn: Any) -> Any:
        """Returns the body of an equation; that of a `shard_map` runs on other devices than its caller."""
        return None if jaxprs.name_of(eqn) == primitives.SHARD_MAP else super().body(eqn)

    def computed(self, eqn: Any, ins: tuple[Axes, ...]) -> Axes:
        """Returns the axes over which the results of an equation without a known body may vary."""
        if _calls(eqn):
            return self.everything  # an unknown way of calling a body
        return self.join(ins) | self._named(eqn)  # `axis_index` varies over its axis

    def _named(self, eqn: Any) -> Axes:
        """Returns the mesh axes that an equation refers to: those of a collective or of `axis_index`."""
        return self.everything & jaxprs.axes_of(eqn)


def _calls(eqn: Any) -> bool:
    """Returns whether an equation calls a body, known or not."""
    return any(True for _ in jaxprs.bodies_of(eqn))
