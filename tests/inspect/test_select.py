"""select, count and explain: what they show is what NNX's own filters mean, on any model."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings

import statewise as sw
import strategies
from statewise._src.filters.primitives import Exactly, Path
from statewise._src.inspect.select.select import count, explain, select
from statewise.errors import FilterError, StructureError


class Tied(nnx.Module):
    """Several types, a tied leaf, raw arrays, a value of None, integer keys."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(3, 4, rngs=nnx.Rngs(0))
        self.head = self.embed
        self.layers = nnx.List([nnx.BatchNorm(4, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2))])
        self.table = nnx.Dict({"x": nnx.Variable(jnp.zeros(()))})
        self.keyed = nnx.data({7: {"deep": nnx.Cache(jnp.zeros((0, 2)))}})
        self.nothing = nnx.Variable(None)
        self.raw = jnp.ones(2)


def paths(state: nnx.State) -> set[tuple[Any, ...]]:
    return {tuple(path) for path, _ in nnx.to_flat_state(state)}


def test_selected_variables_are_the_live_ones() -> None:
    model = Tied()
    assert select(model, nnx.Param)["embed"]["embedding"] is model.embed.embedding
    assert select(model, jax.Array)["raw"] is model.raw
    assert paths(select(model, nnx.Cache)) == {("keyed", 7, "deep")}
    assert select(model, nnx.LoRAParam) == nnx.State({})


def test_every_leaf_counts_once() -> None:
    model = Tied()
    # embedding (tied), scale, bias, mean, var, key, count, x, deep, nothing, raw
    assert count(model) == count(model, ...) == 11
    assert count(model, nnx.Param) == 3
    assert count(model, nnx.Param, nnx.Variable, Exactly(nnx.Variable), jax.Array, nnx.Cache) == (3, 10, 2, 1, 1)
    assert count(nnx.Module()) == 0
    assert count(nnx.Module(), nnx.Param) == 0
    assert count(()) == 0


def test_an_abstract_model_is_looked_at_the_same_way() -> None:
    abstract = nnx.eval_shape(lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert count(abstract, nnx.Param, nnx.BatchStat) == (2, 2)
    assert isinstance(select(abstract, nnx.Param)["scale"].get_raw_value(), jax.ShapeDtypeStruct)
    assert explain(abstract, Path("mean")).matched == (False, True, False, False)


def test_under_tracing() -> None:
    @jax.jit
    def total(state: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        assert count(model, nnx.Param) == 2
        return sum(jnp.sum(leaf[...]) for leaf in jax.tree.leaves(select(model, nnx.Param)))

    graphdef, state = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert total(state) == 3.0


class Pair(NamedTuple):
    """A tuple that has names."""

    one: nnx.Module
    other: nnx.Module


def test_several_objects_have_paths_of_their_own() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    both = (model, optimizer)
    assert count(both, nnx.Param, nnx.OptState, Path("kernel")) == (2, 6, 1)
    assert paths(select(both, nnx.Param)) == {(0, "bias"), (0, "kernel")}
    assert count([model], Path("kernel")) == count(Pair(model, nnx.Module()), Path("kernel")) == 1
    assert paths(select([model], Path("kernel"))) == {(0, "kernel")}
    assert count([model, model]) == 2, "the same object twice is one object"
    assert count({"actor": model}, Path("actor/kernel")) == 1


@settings(max_examples=40)
@given(strategies.models(), strategies.filters())
def test_agrees_with_nnx_on_any_model(model: nnx.Module, filter: Any) -> None:
    expected = nnx.state(model, filter)
    assert paths(select(model, filter)) == paths(expected)
    assert count(model, filter) == len(paths(expected))
    explained = explain(model, filter)
    assert {leaf.path for leaf, yes in zip(explained.leaves, explained.matched, strict=True) if yes} == paths(expected)


@pytest.mark.parametrize("bad", [3, 1.5, {"a": 1}, object(), nnx.Param(1)])
def test_what_is_no_filter_is_refused_by_all(bad: Any) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for ask in (select, count, explain):
        with pytest.raises(FilterError):
            ask(model, bad)


@pytest.mark.parametrize("bad", [nnx.Linear, None, 3, "model", np.ones(2), object(), nnx.Param(jnp.ones(1))])
def test_what_is_no_model_is_refused(bad: Any) -> None:
    for ask in (select, count, explain):
        with pytest.raises(StructureError) as caught:
            ask(bad, nnx.Param)
        assert caught.value.hint


def test_a_class_among_objects_is_refused() -> None:
    with pytest.raises(StructureError, match="Object 1 is the class Linear"):
        count((nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear), nnx.Param)


def test_an_explanation_prints_and_is_data() -> None:
    explained = explain(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param & ~Path("bias"))
    assert str(explained).splitlines()[0] == "Param & ~Path('bias')"
    assert str(explained).splitlines()[-1].endswith("1 of 4")
    data = json.loads(explained.to_json())
    assert data == explained.to_dict()
    assert [row["matched"] for row in data["leaves"]] == [False, False, True, False]
    assert data["leaves"][0] == {
        "path": "bias",
        "kind": None,
        "type": "Param",
        "shape": [2],
        "dtype": "float32",
        "aliases": [],
        "size": 2,
        "nbytes": 8,
        "matched": False,
        "by": "~Path('bias')",
    }
    assert "<table>" in explained._repr_html_()


@pytest.mark.parametrize("look", [sw.count, sw.select, sw.explain])
def test_a_state_is_no_model(look: Any) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    with pytest.raises(TypeError) as caught:
        look(sw.plan(model).take(model), nnx.Param)
    assert str(caught.value) == (
        "Object 0 is a State, not a model.\n  hint: state['params'] gives a kind's arrays, "
        "sw.census(state) counts them, plan.build(state) a model"
    )
