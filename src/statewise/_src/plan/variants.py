"""Plans made of a plan: of the same leaves, in other dtypes, packed, on a mesh, or of many members.

The plan of an ensemble is made of that of one member, and so is whatever is made of it: the one is changed, and the
ensemble made of the changed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from statewise._src.common.nnx_graph import Spec
from statewise._src.common.paths import Leaf
from statewise._src.plan.intern import intern
from statewise._src.plan.members import Members
from statewise._src.plan.packing import choose
from statewise._src.plan.tables import Layout

if TYPE_CHECKING:
    import statewise._src.core.state
    from statewise._src.core.plan import Plan
else:
    Plan = Any  # made by a later room

__all__ = ["Variants"]


class Variants(Layout):
    """What makes other plans of a plan; a base of `Plan`, which takes the parts named here."""

    dropped: tuple[Leaf, ...]

    def _like(self, **changed: Any) -> Plan:
        """This plan with some of its parts changed: `kinds`, `rows`, `derived`, `packing`, `copies`, of one member."""
        if self._members is not None:
            return self._members.single._like(**changed)._with_members(self._members)
        return cast(Plan, intern(type(self)(**(self._parts | changed))))

    @property
    def _parts(self) -> dict[str, Any]:
        """What a plan is made of."""
        return {
            "kinds": self.kinds,
            "graphdef": self._graphdef,
            "rows": self._rows,
            "derived": self._derived,
            "objects": self._objects,
            "names": self._names,
            "excluded": self.excluded,
            "packing": self._packing,
            "copies": self._copies,
            "members": self._members,
        }

    def _with_specs(self, specs: Mapping[str, Sequence[Spec]]) -> Plan:
        """This plan with other shapes or dtypes in the rows of the model."""
        if self._members is not None:
            of_one = {kind: self._members.shrunk(kind, own) for kind, own in specs.items()}
            return self._members.single._with_specs(of_one)._with_members(self._members)
        rows = [
            row._replace(specs=tuple(specs[span.kind][span.start : span.stop])) if span.kind in specs else row
            for row, span in zip(self._rows, self._spans, strict=True)
        ]
        # What would be derived from leaves of these dtypes does not matter: it is there already.
        by_path = {row.path: row.specs for row in rows}
        derived = tuple(
            one.recast(by_path, specs.get(one.into, self._specs[one.into])[start:stop])
            for one, (start, stop) in zip(self._derived, self._derived_spans, strict=True)
        )
        plain = self._like(rows=tuple(rows), derived=derived, packing=None, copies=None)
        return plain._pack(tuple(self._packing)) if self._packing else plain

    def _pack(self, kinds: Sequence[str]) -> Plan:
        """This plan with the small arrays of these kinds in few buffers."""
        if self._members is not None:
            return self._members.single._pack(kinds)._with_members(self._members)
        groups = [
            (group, self._params_of(group), range(*span))
            for group, span in zip(self._groups, self._moment_spans, strict=True)
        ]
        spans = self._derived_spans[len(self._groups) :]
        averages = [(one.kind, one.into, start) for one, (start, _) in zip(self._averages, spans, strict=True)]
        return self._like(packing=choose(self._specs, kinds, groups, averages), copies=None)

    @property
    def _plain(self) -> Plan:
        """This plan with nothing packed, and nothing per device."""
        if not self._packing and not self._copies:
            return cast(Plan, self)
        return self._like(packing=None, copies=None)

    # --- ensembles ---------------------------------------------------------------------------------------------

    @property
    def members(self) -> int | None:
        """How many members the plan of an ensemble has; None for a plan of one model."""
        return None if self._members is None else self._members.number

    def _with_members(self, members: Members) -> Plan:
        """The plan of as many members, each as this plan has it, along the same axes."""
        members = members._replace(single=self)
        rows = [
            row._replace(specs=members.grown_at(span.kind, span.start, row.specs))
            for row, span in zip(self._rows, self._spans, strict=True)
        ]
        derived = [
            dataclasses.replace(one, overridden=members.grown_at(one.into, start, one.layout.specs))
            for one, (start, _) in zip(self._derived, self._derived_spans, strict=True)
        ]
        made = type(self)(**self._parts | {"rows": tuple(rows), "derived": tuple(derived), "members": members})
        return cast(Plan, intern(made))

    def stacked(self, count: int | Any, /, *, over: str | Any = None, **axes: Any) -> Plan:
        """Returns the plan of an ensemble: the same leaves, each with an axis for its members.

        It is a plan like others: its states are saved, restored, counted, placed and compared.  They are made by
        `stack`, by `take` of objects with stacked arrays (as `nnx.vmap` makes them), or by a restore.  A step runs on
        them under `jax.vmap`: `jax.vmap(train, in_axes=(plan.axes(), 0, None), out_axes=(plan.axes(), 0))`.

        Args:
          count: how many members.
          over: a mesh axis that the members are split over, where the plan is placed on a mesh; a kind's placement
            says how one member's arrays lie.
          **axes: the axis of each kind's arrays, None for a kind that all members share, or a function of a leaf's path
            and shape that gives one of these.  Kinds that are not named have the first axis, 0; optimizer state and
            averages follow what they are of.

        Raises:
          DeclarationError: a kind that is not there; something that is not an axis, or not a number of members; no kind
            with an axis.
          StructureError: leaves of too few dimensions for their axis, all of them; a plan of an ensemble.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
          >>> [str(leaf) for leaf in plan.stacked(8, params=None)["stats"]]
          ['mean: BatchStat(8, 3) float32  kind=stats', 'var: BatchStat(8, 3) float32  kind=stats']
          >>> plan.stacked(8, params=None)["params"][0].shape
          (3,)
        """
        from statewise._src.core.ensembles import stacked

        return stacked(cast(Plan, self), count, over, axes)

    def stack(self, states: Any) -> statewise._src.core.state.State:
        """Makes a state of an ensemble from a state of each member, in their order.

        Args:
          states: a state of the single plan for each member; on the plan of one model, any number of them, and all
            kinds are stacked.  Or one state whose arrays are stacked already, as `jax.vmap` of `plan.take` makes it.

        Returns:
          a state of the ensemble's plan; the given ones stay as they are.

        Raises:
          StructureError: another number of states; states of other plans, or donated ones; leaves of a kind that all
            members share and that are not the same in each, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> models = [nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in range(4)]
          >>> plan = sw.plan(models[0])
          >>> state = plan.stack([plan.take(model) for model in models])
          >>> state.plan is plan.stacked(4), state["params"]["bias"].shape
          (True, (4, 3))
        """
        from statewise._src.core.ensembles import stack

        return stack(cast(Plan, self), states)
