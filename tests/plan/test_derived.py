"""Something derived is one file: a subclass of `Derived`, and what a train step does for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.core.plan import Plan, tables_of
from statewise._src.plan.derived import Derived, DerivedLayout
from statewise._src.plan.kind import with_kinds
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Arrays
from statewise._src.step.step_update import Gradients, Moved, StepUpdate, step_update


class Counted(nnx.Variable[Any]):
    """The type of the kind of counts."""


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateCount(Derived):
    """How often train steps have updated some kinds."""

    @property
    def rule(self) -> str:
        return "count"

    @property
    def into(self) -> str:
        return "counts"

    @property
    def layout(self) -> DerivedLayout:
        specs = (ArraySpec((), jnp.dtype(jnp.int32)),)
        return DerivedLayout(jax.tree.structure([0]), (("+".join(self.kinds),),), self.overridden or specs, (1,))

    @property
    def leaf_paths(self) -> tuple[tuple[str, ...], ...]:
        return tuple(("counts", *cast(tuple[str, ...], path)) for path in self.layout.paths)

    def init(self, arrays: Sequence[Any]) -> list[Any]:
        return [jnp.zeros((), jnp.int32)]


@step_update.register(UpdateCount)
def _(derived: UpdateCount, plan: PlanTables, moved: Moved) -> StepUpdate | None:
    """Counts one more update."""
    if moved.kinds.isdisjoint(derived.kinds):
        return None
    number = plan.arrays_of(derived).arrays[0].number

    def run(arrays: Arrays, gradients: Gradients) -> None:
        arrays.flat[number] = arrays.flat[number] + 1

    return StepUpdate(reads={number}, writes={number}, run=run)


def counted(plan: sw.Plan) -> Plan:
    """The plan with a count of the updates of its parameters."""
    tables = tables_of(plan)
    rows = tuple((row.path, row.specs, row.structure) for row in tables.rows if row.kind == "params")
    # First of all that is derived: nothing depends on the order.
    derived = (UpdateCount(("params",), rows), *tables.derived)
    return Plan.of(tables.changed(kinds=with_kinds(tables.kinds, {"counts": sw.Kind(Counted)}), derived=derived))


@pytest.fixture
def plan() -> Plan:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return counted(sw.plan(model, optimizers={"params": optax.adam(0.1)}, averages={"params": sw.EMA(0.9)}))


@sw.train_step
def train(model: nnx.Linear, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


@sw.step
def evaluate(model: nnx.Linear, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def test_it_is_in_the_plan_by_its_own_path(plan: Plan) -> None:
    assert [sw.format_path(leaf.path) for leaf in plan["counts"]] == ["counts/params"]
    assert plan is counted(
        sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), optimizers=plan.optimizers, averages=plan.averages)
    )


@pytest.mark.parametrize("pack", [False, True])
def test_steps_move_it_and_what_they_trained_before(plan: Plan, pack: bool, tmp_path: FilePath) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plain = sw.plan(model, optimizers=plan.optimizers, averages=plan.averages)
    state, other = plan.take(model, pack=pack), plain.take(model, pack=pack)
    assert int(state["counts"]["params"]) == 0
    x = jnp.ones((4, 2))
    for _ in range(3):
        state, loss = train(state, x)
        other, expected = train(other, x)
        assert float(loss) == float(expected)
    evaluate(state, x)
    assert int(state["counts"]["params"]) == 3
    for kind in ("params", "ema", "optimizer"):
        for ours, theirs in zip(jax.tree.leaves(state[kind]), jax.tree.leaves(other[kind]), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    sw.save(tmp_path / "run", state)
    restored, _ = sw.restore(tmp_path / "run", plan.take(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), pack=pack))
    assert int(restored["counts"]["params"]) == 3
    restored, _ = train(restored, x)
    assert int(restored["counts"]["params"]) == 4


def test_it_has_a_placement_a_cast_and_members(plan: Plan) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((1,), ("data",))
    assert plan.take(model, mesh=mesh)["counts"]["params"].sharding.is_fully_replicated
    assert int(plan.take(model).cast(params="bfloat16")["counts"]["params"]) == 0
    ensemble = plan.stack([plan.take(model), plan.take(model)])
    assert ensemble["counts"]["params"].shape == (2,)
    assert int(ensemble.member(1)["counts"]["params"]) == 0
