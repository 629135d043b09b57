"""A graph definition without some leaves is what NNX makes of objects that never had them."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from statewise._src.common.graphdef import is_tree, read_tree
from statewise._src.core.plan import tables_of


class Net(nnx.Module):
    """Modules in lists, in dicts of NNX and of Python, and a raw array between Variables."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.layers = nnx.List([nnx.Param(jnp.ones(1)), nnx.Linear(2, 2, rngs=rngs)])
        self.named = nnx.Dict(key=nnx.Linear(2, 2, rngs=rngs))
        self.plain = nnx.data({"x": jnp.ones(1), "y": nnx.Linear(2, 2, rngs=rngs)})
        self.raw = nnx.data(jnp.ones(2))
        self.zeta = nnx.Linear(2, 2, rngs=rngs)


def sown(model: Net) -> Net:
    with warnings.catch_warnings(action="ignore"):  # Flax wants `nnx.capture` around a `sow`
        for module, name in (
            (model, "a"),
            (model, "zzz"),
            (model.first, "seen"),
            (model.layers[1], "aa"),
            (model.plain["y"], "q"),
        ):
            module.sow(nnx.Intermediate, name, jnp.ones(3))
    return model


def test_each_leaf_has_the_owner_that_holds_it() -> None:
    graphdef, flat = nnx.flatten(Net(nnx.Rngs(0)))
    tree = read_tree(graphdef)
    assert tree is not None
    owners = {"/".join(map(str, path)): tree.owner(number) for number, path in enumerate(flat.paths)}
    assert owners["first/bias"] is nnx.Linear
    assert owners["layers/0"] is nnx.List
    assert owners["raw"] is Net
    assert owners["plain/x"] is dict


@pytest.mark.parametrize("seed", range(6))
def test_without_leaves_is_what_is_left_when_they_are_popped(seed: int) -> None:
    model = sown(Net(nnx.Rngs(0)))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Intermediate))]
    chosen = {tuple(path) for at, path in enumerate(paths) if (seed * 7 + at) % (seed + 1) == 0}
    graphdef, flat = nnx.flatten(model)
    tree = read_tree(graphdef)
    assert tree is not None
    made = tree.without({number for number, path in enumerate(flat.paths) if tuple(path) in chosen})
    nnx.pop(model, lambda path, _: tuple(path) in chosen)
    expected = nnx.graphdef(model)
    assert made == expected
    assert hash(made) == hash(expected)
    assert [type(node) for node in made.nodes] == [type(node) for node in expected.nodes]


def test_plan_of_a_model_with_sown_leaves_is_that_of_one_without() -> None:
    clean = sw.plan(Net(nnx.Rngs(0)))
    model = sown(Net(nnx.Rngs(0)))
    plan = sw.plan(model)
    assert plan is clean
    assert tables_of(plan).graphdef == nnx.graphdef(Net(nnx.Rngs(0)))
    names = [sw.format_path(leaf.path) for leaf in tables_of(sw.plan(model, Net(nnx.Rngs(1)))).excluded]
    assert names == ["0/a", "0/first/seen", "0/layers/1/aa", "0/plain/y/q", "0/zzz"]


def test_graph_with_a_shared_module_is_not_a_tree() -> None:
    model = Net(nnx.Rngs(0))
    model.other = model.first
    graphdef = nnx.graphdef(model)
    assert not is_tree(graphdef)
    assert read_tree(graphdef) is None
    excluded = tables_of(sw.plan(sown(model))).excluded
    assert sorted(sw.format_path(leaf.path) for leaf in excluded) == [
        "a",
        "first/seen",
        "layers/1/aa",
        "plain/y/q",
        "zzz",
    ]
