"""Writing into a live model works where arrays stand in tuples, frozen classes and whatever else NNX walks through."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from holding import CONTAINERS, Bits, Struct, model_of, ones, other
from strategies import Node


def containers(thing: Any) -> Any:
    """The types of all containers, in order, and what else is in them."""
    if isinstance(thing, nnx.Pytree):
        return type(thing), [(name, containers(value)) for name, value in vars(thing).items() if name[:8] != "_pytree_"]
    children, _ = jax.tree_util.tree_flatten_with_path(thing, is_leaf=lambda each: each is not thing)
    return (
        type(thing),
        getattr(thing, "count", None) if isinstance(thing, Struct) else None,
        [
            containers(child)
            for _, child in children
            if child is not thing and not isinstance(child, nnx.Variable | jax.Array)
        ],
    )


# --- it works ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_put_stands_there_in_a_container_of_the_same_make(name: str, copy: bool) -> None:
    model, untouched = model_of(name), model_of(name)
    plan = sw.plan(model)
    state = other(plan.take(model))
    variables = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model)) if isinstance(leaf, nnx.Variable)]
    plan.put(state, model, copy=copy)
    assert same(plan.take(model), state)
    assert same(model, plan.build(state)), "as a model that is built of it"
    assert [leaf for _, leaf in nnx.to_flat_state(nnx.state(model)) if isinstance(leaf, nnx.Variable)] == variables
    if name != "a NumPy array":
        assert containers(model) == containers(untouched)
    nnx.split(model)  # which looks at what is data and what is static


@pytest.mark.parametrize("name", CONTAINERS)
def test_update_does_the_same_and_several_objects_too(name: str) -> None:
    model, second = model_of(name), model_of(name)
    values = jax.tree.map(lambda array: array * 5 - 2, nnx.to_pure_dict(nnx.state(model)))
    sw.update(model, values)
    plan = sw.plan(second)
    plan.put(other(plan.take(second)), second)
    assert same(model, second)
    one, two = model_of(name), model_of(name)
    both = sw.plan(one, two)
    both.put(other(both.take(one, two)), one, two)
    assert same(one, model)
    assert same(two, model)


def test_gradients_and_layers_write_into_tuples_too() -> None:
    model = Node(w=nnx.Param(ones(2)), seen=nnx.data((jnp.zeros(()), ones(1))))

    def loss(model: Any) -> Any:
        model.seen = (model.seen[0] + 1, model.seen[1])
        return model.w[...].sum()

    sw.grad(loss)(model)
    assert model.seen[0] == 1
    layers = Node(w=nnx.Param(ones(3)), seen=nnx.data((jnp.zeros(3), ones(3))))

    def run(layer: Any, x: Any) -> Any:
        layer.seen = (layer.seen[0] + x, layer.seen[1])
        return x + layer.w[...]

    assert sw.scan_layers(run, layers, jnp.array(0.0)) == 3
    assert np.array_equal(layers.seen[0], [0, 1, 2])


def test_an_abstract_model_has_no_arrays_in_its_tuples_and_says_so() -> None:
    """To NNX a mere shape in a tuple is static; a state with arrays for it does not fit, and nothing is written."""
    plan = sw.plan(model_of("a tuple"))
    state, abstract = plan.take(model_of("a tuple")), nnx.eval_shape(lambda: model_of("a tuple"))
    bits = Bits(abstract)
    with pytest.raises(sw.StructureError, match=r"held/0: .*\(missing from the model\)"):
        plan.put(state, abstract)
    assert bits.now() == bits.before
    beside = nnx.eval_shape(lambda: Node(w=nnx.Param((ones(2), ones(1))), raw=nnx.data(ones(2))))
    plan = sw.plan(Node(w=nnx.Param((ones(2), ones(1))), raw=nnx.data(ones(2))))
    plan.put(plan.take(Node(w=nnx.Param((ones(2), ones(1))), raw=nnx.data(ones(2)))), beside)
    assert beside.raw[0] == beside.w.get_raw_value()[1][0] == 1
