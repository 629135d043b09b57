"""Rules of arrays: where they stand, and what shares them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from linted import clean, codes, finds


class Table(nnx.Module):
    def __init__(self, wrap: Callable[[Any], Any] = lambda array: array) -> None:
        self.table = wrap(jnp.arange(3.0))


def test_an_array_without_a_variable() -> None:
    finds(
        "raw-array",
        "1 array is outside of any nnx.Variable.",
        ["table: Array(3,) float32  kind=variables"],
        "self.table = nnx.Variable(...)  # or a subclass of it that says what it is",
        Table(),
    )
    clean(Table(nnx.Variable))


def test_arrays_in_containers_are_found() -> None:
    model = nnx.Dict(tables=nnx.List([jnp.ones(2), nnx.Variable(jnp.ones(2)), jnp.zeros(2)]))
    (found,) = sw.lint(model)
    assert (found.code, found.message) == ("raw-array", "2 arrays are outside of any nnx.Variable.")
    assert [leaf.path for leaf in found.leaves] == [("tables", 0), ("tables", 2)]


@pytest.mark.parametrize("make", [nnx.eval_shape, lambda make: nnx.jit(make)()], ids=["eval_shape", "nnx.jit"])
def test_an_array_that_tracing_made_static(make: Callable[..., Any]) -> None:
    model = make(lambda: nnx.Dict(inner=Table(), kernel=nnx.Param(jnp.ones(2))))
    assert sw.count(model) == 1
    finds(
        "array-turned-static",
        "1 array of a module made under tracing became part of its graph.",
        ["inner/table: Array(3,) float32"],
        "self.table = nnx.data(...)  # or nnx.Variable(...)",
        model,
    )
    clean(make(lambda: nnx.Dict(inner=Table(nnx.Variable))))


def test_nnx_data_keeps_an_array_a_leaf() -> None:
    assert codes(nnx.eval_shape(lambda: Table(nnx.data))) == ["raw-array"]


@dataclasses.dataclass
class Config:
    table: Any


class Holds(nnx.Module):
    def __init__(self, held: Any) -> None:
        self.held = held


def closure(array: Any) -> Any:
    return lambda x: x + array


def default(array: Any) -> Any:
    def add(x: Any, array: Any = array) -> Any:
        return x + array

    return add


@pytest.mark.parametrize(
    ("hide", "where"),
    [
        (closure, "the closure of a function"),
        (default, "its defaults"),
        (lambda array: functools.partial(jnp.add, array), "the arguments of a partial"),
        (lambda array: functools.partial(jnp.clip, min=array), "the arguments of a partial"),
        (Config, "an object of type Config"),
    ],
    ids=["closure", "default", "partial", "keyword", "object"],
)
def test_an_array_hidden_in_something_static(hide: Callable[[Any], Any], where: str) -> None:
    finds(
        "hidden-array",
        "1 array is hidden in static attributes of modules.",
        [f"held: Array(3,) float32  (in {where})"],
        "make it a leaf, and pass it on: self.held_array = nnx.Variable(...)",
        Holds(hide(jnp.ones(3))),
    )
    clean(Holds(hide(3.0)))


def test_a_numpy_array_is_hidden_as_well() -> None:
    assert codes(Holds(closure(np.ones(3, np.float32)))) == ["hidden-array"]


def test_a_mesh_and_a_sharding_hide_nothing(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",))
    clean(Holds(mesh))
    clean(Holds(jax.NamedSharding(mesh, jax.P("data"))))
    clean(Holds(closure(mesh)))


def test_a_closure_that_is_not_filled_yet_hides_nothing() -> None:
    def outer() -> Any:
        model = Holds(lambda: later)
        clean(model)
        later = 3
        return later

    assert outer() == 3


def test_an_optimizers_schedule_may_hold_arrays() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    rate = jnp.array(0.1)
    clean(model, nnx.Optimizer(model, optax.sgd(lambda step: rate), wrt=nnx.Param))


def test_wide_numbers_of_numpy() -> None:
    finds(
        "wide-numpy-value",
        "1 leaf of 64-bit NumPy numbers, which JAX takes as 32-bit ones.",
        ["scale: Variable(3,) float32  kind=variables  (float64 in NumPy)"],
        "nnx.Variable(jnp.asarray(value))  # the dtype that it will have anyway\n"
        "or, for 64 bits: jax.config.update('jax_enable_x64', True)  # before any array is made",
        nnx.Dict(scale=nnx.Variable(np.ones(3), ref=False)),  # a reference holds JAX's
    )
    clean(nnx.Dict(scale=nnx.Variable(np.ones(3, np.float32)), mask=nnx.Variable(np.ones(3, bool))))
    assert codes(nnx.Dict(index=nnx.Variable((np.arange(3), 1)))) == ["wide-numpy-value"]


def test_wide_numbers_are_fine_where_jax_has_them() -> None:
    with jax.enable_x64(True):
        clean(nnx.Dict(scale=nnx.Variable(np.ones(3))))


def test_one_array_in_two_variables() -> None:
    array = jnp.ones(3)
    finds(
        "shared-array",
        "1 leaf holds the same array as another.",
        ["b: Param(3,) float32  kind=params  (shares its array with a)"],
        "nnx.Variable(jnp.copy(array))  # or, if they are meant to stay one: share the Variable, not its array",
        nnx.Dict(a=nnx.Param(array, ref=False), b=nnx.Param(array, ref=False)),  # a reference holds a copy
    )
    clean(nnx.Dict(a=nnx.Param(array), b=nnx.Param(jnp.copy(array))))


def test_a_copy_of_the_module_alone_shares_its_arrays() -> None:
    with nnx.var_defaults(ref=False):
        model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    assert codes(model, jax.tree.map(lambda array: array, model)) == ["shared-array"]
    clean(model, jax.tree.map(jnp.copy, model))


def test_arrays_that_were_donated() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(3), ref=False), b=nnx.Param(jnp.ones(2)))  # a reference is not donated
    jax.jit(lambda w: w + 1, donate_argnums=0)(model.w.get_raw_value())
    finds(
        "deleted-array",
        "1 leaf whose array was donated.",
        ["w: Param(3,) float32  kind=params"],
        "update the model with the arrays that came back: plan.put(state, model), nnx.update(model, state)\n"
        "or do not donate its arrays: plan.take(model), without copy=False; jax.jit without donate_argnums",
        model,
    )


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
        self.table = self.embed.embedding


def test_weights_that_a_plain_jit_would_untie() -> None:
    back = jax.jit(lambda model: model)(Tied())
    assert back.table is not back.embed.embedding
    finds(
        "tied-weights",
        "1 leaf is reached by several paths.",
        ["embed/embedding: Param(4, 3) float32  kind=params"],
        "state = sw.plan(model).take(model), and @sw.step or @sw.train_step  # or nnx.jit instead of jax.jit\n"
        "if this is known: sw.lint(model, ignore='tied-weights')",
        Tied(),
    )
    assert sw.lint(Tied())[0].leaves[0].aliases == (("table",),)


def test_ties_across_objects_are_found() -> None:
    model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    assert codes(model, nnx.Dict(again=model)) == ["tied-weights"]


def test_a_plan_and_a_state_keep_ties() -> None:
    plan = sw.plan(Tied())
    state = plan.take(Tied())
    clean(plan)
    clean(state)
    built = plan.build(jax.jit(lambda state: state)(state))
    assert built.table is built.embed.embedding
