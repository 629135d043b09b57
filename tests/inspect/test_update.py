"""update: all of a state goes into a model, or nothing does and every reason is listed."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings

import modes
import strategies
from comparing import holds_the_same
from parts_model import STANDARD, Model, flat, notes
from statewise._src.inspect.select.parts import merge, split, update
from statewise.errors import StructureError


@pytest.fixture
def model() -> Model:
    return Model()


@settings(max_examples=30)
@given(strategies.models(raw=False))
def test_update_with_what_it_has_changes_nothing(model: nnx.Module) -> None:
    def held() -> dict[Any, Any]:
        return {tuple(path): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}

    before = held()
    update(model, nnx.state(model))
    assert all(holds_the_same(value, before[path]) for path, value in held().items())


@pytest.mark.parametrize(
    "state",
    [
        {"first": {"bias": jnp.full(4, 3.0)}},
        {("first", "bias"): jnp.full(4, 3.0)},
        {("first", "bias"): nnx.Param(jnp.full(4, 3.0))},
        nnx.State({"first": {"bias": jnp.full(4, 3.0)}}),
        nnx.State({"first": {"bias": nnx.Param(jnp.full(4, 3.0))}}),
        nnx.to_flat_state(nnx.State({"first": {"bias": jnp.full(4, 3.0)}})),
        {"first": {"bias": np.full(4, 3.0, np.float32)}},
    ],
)
def test_update_takes_states_in_every_form(model: Model, state: Any) -> None:
    kernel = model.first.kernel.get_raw_value()
    update(model, state)
    assert (model.first.bias[...] == 3).all()
    assert isinstance(model.first.bias.get_raw_value(), jax.Array)
    assert model.first.kernel.get_raw_value() is kernel


def test_update_keeps_types_and_metadata() -> None:
    class Tagged(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.zeros(2), role="base")

    model = Tagged()
    variable = model.a
    update(model, {"a": nnx.Param(jnp.ones(2), role="ema")})
    assert model.a is variable
    assert (variable.get_metadata("role"), float(variable.sum())) == ("base", 2.0)


def test_update_of_raw_arrays_dicts_and_empty_states(model: Model) -> None:
    update(model, {"raw": jnp.full(2, 5.0), "several": {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3)}}})
    assert (model.raw == 5).all()
    assert (model.several.get_raw_value()["b"]["c"] == 0).all()
    update(model, nnx.State({"several": {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}}))
    assert type(model.several.get_raw_value()) is dict
    update(model, {})
    update(model, nnx.State({}))


def test_update_lists_every_problem_and_changes_nothing(model: Model) -> None:
    before = flat(model)
    with pytest.raises(StructureError) as caught:
        update(
            model,
            {
                "first": {"bias": jnp.full(4, 3.0), "kernel": jnp.ones((9, 9)), "extra": jnp.ones(1)},
                "tied": {"kernel": jnp.zeros((4, 4))},
                "layers": {0: {"mean": nnx.Cache(jnp.zeros(4)), "var": np.ones(4)}, 1: {"rngs": 3}},
                "raw": jax.ShapeDtypeStruct((2,), jnp.float32),
            },
        )
    assert notes(caught.value) == {
        "first/kernel": "is (9, 9) in the state",
        "first/extra": "not in the model",
        "tied/kernel": "tied: the same leaf as first/kernel; use that path",
        "layers/0/mean": "is a Cache in the state",
        "layers/0/var": "is float64 in the state",
        "layers/1/rngs": "not in the model",
        "raw": "only a shape and dtype: the model has an array",
    }
    after = flat(model)
    assert all(holds_the_same(value, after[path][1]) for path, (_, value) in before.items())


def test_a_number_given_as_text_is_another_key_and_no_tie() -> None:
    model = nnx.Dict(layers=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))
    with pytest.raises(StructureError, match="1 leaf differs") as caught:
        update(model, {"layers": {"0": {"bias": jnp.ones(3)}}})
    assert notes(caught.value) == {
        "layers/0/bias": "not in the model, whose path is ('layers', 0, 'bias'): this one is ('layers', '0', 'bias')"
    }


def test_arrays_in_a_tuple_are_written_too_or_nothing_is(model: Model) -> None:
    bias, raw, pair = model.first.bias.get_raw_value(), model.raw, model.pair
    with pytest.raises(StructureError, match="1 leaf differs"):
        update(model, {"first": {"bias": jnp.ones(4)}, "raw": jnp.zeros(2), "pair": {0: jnp.ones(7)}})
    assert model.first.bias.get_raw_value() is bias
    assert model.raw is raw
    assert model.pair is pair
    update(model, {"first": {"bias": jnp.ones(4)}, "raw": jnp.zeros(2), "pair": {0: jnp.full(1, 3.0)}})
    assert isinstance(model.pair, tuple)
    assert model.pair[0] == 3
    assert model.pair[1] is pair[1]


def test_update_of_several_objects() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    update((model, optimizer), {0: {"bias": jnp.ones(3)}, 1: {"step": jnp.array(7, jnp.uint32)}})
    assert model.bias.sum() == 3
    assert optimizer.step[...] == 7
    with pytest.raises(StructureError, match="1 leaf differs"):
        update((model, optimizer), {"bias": jnp.ones(3)})


def test_update_under_jit(model: Model) -> None:
    model.nothing.set_raw_value(jnp.zeros(()))
    graphdef, parts = split(model, STANDARD)

    @jax.jit
    def doubled(parts: Any) -> Any:
        inner = merge(graphdef, parts)
        update(inner, jax.tree.map(lambda x: x * 2, split(inner, STANDARD)[1]["params"]))
        with pytest.raises(StructureError, match="1 leaf differs"):
            update(inner, {"first": {"kernel": jnp.ones((9, 9))}})
        return split(inner, STANDARD)[1]["params"]

    assert (doubled(parts)["first"]["kernel"][...] == 2 * model.first.kernel[...]).all()


def test_gradients_are_a_state_that_fits() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: m(jnp.ones(2)).sum())(model)
    update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
    assert np.allclose(model.bias[...], -0.1)


def test_abstract_models_take_arrays() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    update(model, {"kernel": jnp.ones((2, 3))})
    assert model.kernel.sum() == 6


@pytest.mark.parametrize("bad", [None, 3, jnp.ones(2), [("a", 1)]])
def test_update_refuses_what_is_no_state(model: Model, bad: Any) -> None:
    with pytest.raises(StructureError, match="is not a state"):
        update(model, bad)


def test_update_refuses_a_model_for_a_state(model: Model) -> None:
    with pytest.raises(StructureError, match=re.escape(modes.in_mode("nnx.state(model)"))):
        update(model, Model())
