"""A plan as data: its rows, its parts, its tables; abstract states and states of axes; what cannot be planned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import plannable
from refusals import refused
from strategies import Node, OwnStat


def model() -> Node:
    return Node(
        layers=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))]),
        gate=OwnStat(jnp.ones((), jnp.bfloat16)),
        slots=nnx.data({3: {("t", 0): nnx.Cache(jnp.ones((4, 2)))}}),
        raw=nnx.data(jnp.ones((0, 2))),
    )


# --- what cannot be planned --------------------------------------------------------------------------------------


class Empty(nnx.Module):
    """A model without leaves."""

    def __init__(self) -> None:
        self.width = 3


def test_a_model_without_leaves() -> None:
    hint = "assign the model's Variables before planning it"
    with refused(sw.StructureError, "There are no leaves: no Variable and no array anywhere in Empty.", hint=hint):
        sw.plan(Empty())
    message = "There are no leaves: no Variable and no array anywhere in Empty and dict."
    with refused(sw.StructureError, message, hint=hint):
        sw.Kinds().plan(Empty(), {})
    assert len(sw.plan(Empty(), model()).leaves) == len(sw.plan(model()).leaves), "one object may have none"


def test_a_variable_on_its_own() -> None:
    with refused(
        sw.StructureError,
        "Object 0 is a Param on its own, which has no path.",
        hint="put it into a dict: {'param': ...}",
    ):
        sw.plan(nnx.Param(jnp.ones(1)))
    variable = nnx.Param(jnp.ones(1))
    assert [leaf.path for leaf in sw.plan({"param": variable}).leaves] == [("param",)]
    assert [leaf.path for leaf in sw.plan(variable, nnx.Cache(jnp.ones(1))).leaves] == [(0,), (1,)]


# --- rows --------------------------------------------------------------------------------------------------------


def test_the_rows_say_all_there_is_to_say() -> None:
    plan = sw.plan(model(), optimizers={"params": optax.sgd(0.1, momentum=0.9)})
    assert [str(leaf) for leaf in plan.leaves] == [
        "gate: OwnStat() bfloat16  kind=variables",
        "layers/0/bias: Param(3,) float32  kind=params",
        "layers/0/kernel: Param(2, 3) float32  kind=params",
        "layers/1/bias: Param(3,) float32  kind=params",
        "layers/1/mean: BatchStat(3,) float32  kind=stats",
        "layers/1/scale: Param(3,) float32  kind=params",
        "layers/1/var: BatchStat(3,) float32  kind=stats",
        "raw: Array(0, 2) float32  kind=variables",
        "slots/3/('t', 0): Cache(4, 2) float32  kind=cache",
        "optimizer/params/0/trace/layers/0/bias: Array(3,) float32  kind=optimizer",
        "optimizer/params/0/trace/layers/0/kernel: Array(2, 3) float32  kind=optimizer",
        "optimizer/params/0/trace/layers/1/bias: Array(3,) float32  kind=optimizer",
        "optimizer/params/0/trace/layers/1/scale: Array(3,) float32  kind=optimizer",
    ]
    assert [(leaf.size, leaf.nbytes) for leaf in plan.leaves[:3]] == [(1, 2), (3, 12), (6, 24)]
    assert plan.leaves[7].size == 0
    assert plan.leaves[8].path == ("slots", 3, ("t", 0))


@given(plannable())
def test_each_leaf_stands_in_the_part_of_its_kind(thing: Node) -> None:
    plan = sw.plan(thing)
    assert [leaf for kind in plan for leaf in plan[kind]] == sorted(
        plan.leaves, key=lambda leaf: list(plan).index(leaf.kind or "")
    )
    assert all(kind in plan for kind in sw.Kinds.standard())
    assert "nobody" not in plan
    assert sum(leaf.size for leaf in plan.leaves) == sum(array.size for array in jax.tree.leaves(plan.take(thing)))


def test_a_plan_prints_as_a_table() -> None:
    plan = sw.plan(Node(a=nnx.Param(jnp.ones((2, 3)))))
    lines = str(plan).splitlines()
    assert lines[:4] == [
        "plan",
        "path  kind    type   shape   dtype",
        "------------------------------------",
        "a     params  Param  (2, 3)  float32",
    ]
    assert repr(plan) == "Plan(params=1)"
    assert plan._repr_html_().startswith("<table>")
    assert plan.table().to_dict()["rows"][0]["path"] == "a"


def test_optimizers_are_told() -> None:
    tx = optax.sgd(0.1)
    assert sw.plan(model(), optimizers={"params": tx}).optimizers.keys() == {("params",)}
    assert sw.plan(model()).optimizers == {}


# --- abstract states and states of axes ---------------------------------------------------------------------------


@given(plannable())
def test_an_abstract_state_has_the_shapes_of_a_real_one(thing: Node) -> None:
    plan = sw.plan(thing)
    abstract = plan.abstract()
    real = plan.take(thing)
    assert abstract.plan is plan
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_axes_map_whole_kinds() -> None:
    plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    axes = plan.axes(params=None, stats=0)
    assert jax.tree.leaves(axes["stats"]) == [0, 0]
    assert jax.tree.leaves(axes, is_leaf=lambda leaf: leaf is None) == [None, None, 0, 0]
    thing = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    plan = sw.plan(thing)
    state = plan.take(thing)
    with pytest.raises(sw.StructureError, match=r"^The replacement of kind 'stats' does not fit the plan\."):
        state.replace(stats=jax.tree.map(lambda array: jnp.stack([array, array + 1]), state["stats"]))
    stacked = jax.tree.map(lambda array: jnp.stack([array, array + 1]), state)
    run = sw.step(lambda model, x: model(x))
    out = jax.vmap(run, in_axes=(plan.axes(params=0, stats=0), None))(stacked, jnp.ones((1, 3)))
    assert out.shape == (2, 1, 3)
    assert np.allclose(out[0], run(state, jnp.ones((1, 3))))


@pytest.mark.parametrize("axis", ["0", True, 0.0])
def test_no_axis(axis: Any) -> None:
    plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with refused(sw.DeclarationError, f"stats={axis!r} is not an axis.", kind="stats", hint="plan.axes(stats=0)"):
        plan.axes(stats=axis)


# --- the keys of a state as a pytree -------------------------------------------------------------------------------


def test_keys_are_unique_where_paths_only_look_alike() -> None:
    thing = {
        "a": {"b": nnx.Param(jnp.zeros(1))},
        "a/b": nnx.Param(jnp.ones(1)),
        "a/b#2": nnx.Param(jnp.full(1, 2.0)),
        "c": {0: nnx.Param(jnp.full(1, 3.0))},
        "c/0": nnx.Param({"x": jnp.full(1, 4.0), "y": jnp.full(1, 5.0)}),
    }
    plan = sw.plan(thing)
    keyed = dict(jax.tree_util.tree_flatten_with_path(plan.take(thing))[0])
    assert len(keyed) == 6
    assert [jax.tree_util.keystr(key) for key in keyed] == [
        "['params/a/b']",
        "['params/a/b#2']",
        "['params/a/b#2#2']",
        "['params/c/0']",
        "['params/c/0#2']",
        "['params/c/0#3']",
    ]
    assert [float(array[0]) for array in keyed.values()] == [0, 1, 2, 3, 4, 5]


@given(plannable())
def test_keys_are_unique_and_readable(thing: Node) -> None:
    plan = sw.plan(thing)
    keyed = jax.tree_util.tree_flatten_with_path(plan.take(thing))[0]
    names = [key[0].key for key, _ in keyed]
    assert len(set(names)) == len(names)
    assert all(name.partition("/")[0] in plan for name in names)


def test_a_kind_that_claims_nothing_is_seen() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), gates=sw.Kind(OwnStat), rest=sw.Kind(...))
    plan = kinds.plan(Node(a=nnx.Param(jnp.ones((2, 3)))))
    assert plan["gates"] == ()
    assert [line.split()[:2] for line in str(plan).splitlines() if line.startswith("gates")] == [["gates", "0"]]
    assert list(plan) == ["params", "gates", "rest"]
