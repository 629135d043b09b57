"""Leaves that several paths reach: one leaf, every other path an alias, and one array in a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import plannable
from strategies import Node


def paths_to(model: Any, wanted: Any) -> set[tuple[Any, ...]]:
    """Every path to a Variable, found by brute force over modules, lists and dicts; no cycles."""
    found: set[tuple[Any, ...]] = set()

    def visit(thing: Any, path: tuple[Any, ...]) -> None:
        if thing is wanted:
            found.add(path)
        elif isinstance(thing, nnx.List):
            for position, item in enumerate(thing):
                visit(item, (*path, position))
        elif isinstance(thing, dict):
            for key, item in thing.items():
                visit(item, (*path, key))
        elif isinstance(thing, nnx.Module):
            for name, item in vars(thing).items():
                visit(item, (*path, name))

    visit(model, ())
    return found


def aliases(plan: sw.Plan) -> dict[str, list[str]]:
    return {
        sw.format_path(leaf.path): [sw.format_path(path) for path in leaf.aliases]
        for leaf in plan.leaves
        if leaf.aliases
    }


@given(plannable(raw=False))
def test_a_path_and_its_aliases_are_all_paths_to_the_leaf(model: Node) -> None:
    live = {tuple(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    for leaf in sw.plan(model).leaves:
        reached = {leaf.path, *leaf.aliases}
        assert len(reached) == 1 + len(leaf.aliases)
        if leaf.path in live:  # not so where an earlier sow stood at its first path
            assert reached == paths_to(model, live[leaf.path])


def test_tied_weights_are_one_leaf() -> None:
    table = nnx.Param(jnp.ones((4, 2)))
    model = Node(embed=Node(table=table), head=Node(kernel=table), tail=nnx.List([table]))
    plan = sw.plan(model)
    assert len(plan.leaves) == 1
    assert aliases(plan) == {"embed/table": ["head/kernel", "tail/0"]}
    assert plan.leaves[0].size == 8
    state = plan.take(model)
    assert len(jax.tree.leaves(state)) == 1
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state["params"]))
    plan.put(state, model)
    assert model.head.kernel is model.embed.table is model.tail[0]
    assert not model.head.kernel[...].any()
    built = plan.build(state)
    assert built.head.kernel is built.embed.table is built.tail[0]


def test_everything_below_a_shared_module_has_aliases() -> None:
    block = Node(a=nnx.Param(jnp.ones(1)), b=nnx.BatchStat(jnp.ones(2)))
    plan = sw.plan(Node(one=block, two=block, three=Node(inner=block)))
    # NNX sorts attributes: `one`, `three`, `two`.
    assert aliases(plan) == {"one/a": ["three/inner/a", "two/a"], "one/b": ["three/inner/b", "two/b"]}


def test_shared_leaves_of_shared_modules_have_all_the_paths() -> None:
    tied = nnx.Param(jnp.ones(1))
    block = Node(a=tied, b=tied)
    plan = sw.plan(Node(one=block, two=block))
    assert aliases(plan) == {"one/a": ["one/b", "two/a", "two/b"]}


def test_leaves_shared_between_objects() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plan = sw.plan(model, {"again": model, "bias": model.bias})
    assert aliases(plan) == {"0/bias": ["1/again/bias", "1/bias"], "0/kernel": ["1/again/kernel"]}
    built, other = plan.build(plan.take(model, {"again": model, "bias": model.bias}))
    assert other["again"] is built
    assert other["bias"] is built.bias


def test_a_child_that_knows_its_parent() -> None:
    parent = Node(w=nnx.Param(jnp.ones(2)), child=Node(v=nnx.Param(jnp.zeros(3))))
    parent.child.parent = parent
    plan = sw.plan(parent, optimizers={"params": optax.sgd(0.5)})
    assert [sw.format_path(leaf.path) for leaf in plan["params"]] == ["child/v", "w"] or [
        sw.format_path(leaf.path) for leaf in plan["params"]
    ] == ["child/v", "child/parent/w"]
    state = plan.take(parent)

    @sw.train_step
    def train(model: Any) -> Any:
        return (model.w[...] ** 2).sum() + model.child.parent.child.v[...].sum()

    state, loss = train(state)
    assert float(loss) == 2
    built = plan.build(state)
    assert built.child.parent is built
    assert np.array_equal(built.w[...], [0, 0])
    assert np.array_equal(built.child.v[...], [-0.5] * 3)
    plan.put(state, parent)
    assert np.array_equal(parent.w[...], [0, 0])


def test_variables_that_share_an_array_are_two_leaves() -> None:
    array = jnp.ones(2)
    plan = sw.plan(Node(a=nnx.Param(array), b=nnx.Param(array)))
    assert len(plan.leaves) == 2
    assert aliases(plan) == {}


def test_raw_arrays_are_never_aliases() -> None:
    array = jnp.ones(2)
    plan = sw.plan(Node(a=nnx.data(array), b=nnx.data(array)))
    assert [leaf.aliases for leaf in plan.leaves] == [(), ()]
