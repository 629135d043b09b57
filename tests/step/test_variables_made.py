"""Variables that a function makes as references, or as hijax's own, while it is traced.

What stays in the model is refused.  What does not is as good as a plain Variable, unless Flax refuses to write it: then
the error names the Variable, and says how to make it instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import parses

X = jnp.array([1.0, 2.0, 3.0])
FLAGS: list[dict[str, bool]] = [{"ref": True}, {"hijax": True}]


class Mine(nnx.Variable[Any]):
    """A type of the user's own."""


def net() -> Any:
    return nnx.Dict(w=nnx.Param(jnp.ones(3)))


def in_step(fn: Callable[..., Any]) -> Any:
    return sw.step(fn)(sw.plan(net()).take(net()), X)


def in_train_step(fn: Callable[..., Any]) -> Any:
    return sw.train_step(fn)(sw.plan(net(), optimizers={"params": optax.sgd(0.1)}).take(net()), X)[1]


def in_grad(fn: Callable[..., Any]) -> Any:
    return sw.value_and_grad(fn)(net(), X)[0]


def in_scan_layers(fn: Callable[..., Any]) -> Any:
    return sw.scan_layers(lambda layer, x: x * fn(layer, x), nnx.Dict(w=nnx.Param(jnp.ones((1, 3)))), X)[0]


DOORS = [in_step, in_train_step, in_grad, in_scan_layers]


def makes(options: dict[str, bool], is_attached: bool, is_written: bool, type_: Any = Mine) -> Callable[..., Any]:
    def fn(model: Any, x: jax.Array) -> jax.Array:
        made = type_(jnp.full(3, 2.0), **options)
        if is_attached:
            model.made = made
        if is_written:
            made[...] = made[...] + 1
        return (model.w[...] * x * made[...]).sum()

    return fn


def flax_writes_hijax_variables() -> bool:
    """Returns whether this Flax writes a hijax Variable where it was made in a trace; flax 0.12.12 does not."""

    def writes(x: jax.Array) -> jax.Array:
        made = Mine(x, hijax=True, ref=False)
        made[...] = made[...] + 1
        return made[...]

    try:
        jax.make_jaxpr(writes)(X)
    except flax.errors.ImmutableVariableError:
        return False
    return True


FLAX_WRITES = flax_writes_hijax_variables()


def check_refused(door: Callable[..., Any], fn: Callable[..., Any], path: tuple[str, ...], hint: str) -> None:
    with pytest.raises(sw.StructureError, match="hijax Variable") as caught:
        door(fn)
    (leaf,) = caught.value.leaves
    assert leaf.path == path
    assert leaf.note in ("ref=True", "hijax=True")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(f": {hint}(value)")
    parses(caught.value.hint)


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("options", FLAGS, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_one_that_stays_in_the_model_is_refused(door: Any, options: dict[str, bool], is_written: bool) -> None:
    for type_, hint in ((Mine, "Mine"), (nnx.Variable, "nnx.Variable")):
        check_refused(door, makes(options, True, is_written, type_), ("made",), hint)


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("options", FLAGS, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_one_that_does_not_is_as_a_plain_one_or_refused(door: Any, options: dict[str, bool], is_written: bool) -> None:
    fn = makes(options, False, is_written)
    if is_written and "hijax" in options and not FLAX_WRITES:
        check_refused(door, fn, (), "Mine")
    else:
        np.testing.assert_array_equal(door(fn), door(makes({}, False, is_written)))


@pytest.mark.skipif(FLAX_WRITES, reason="this Flax writes them, or fails in ways of its own")
@pytest.mark.parametrize("door", DOORS)
def test_one_that_flax_makes_by_its_default_is_refused(door: Any) -> None:
    """A layer advances the random streams that it draws from, which are hijax Variables too."""

    def layer(model: Any, x: jax.Array) -> jax.Array:
        with nnx.var_defaults(hijax=True):
            made = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        return (made(x[None])[0] * model.w[...]).sum()

    check_refused(door, layer, (), "nnx.RngCount")


@pytest.mark.skipif(FLAX_WRITES, reason="this Flax writes them")
@pytest.mark.parametrize("door", DOORS)
def test_one_that_is_written_in_a_function_under_jit_is_refused(door: Any) -> None:
    def closed(model: Any, x: jax.Array) -> jax.Array:
        made = Mine(jnp.zeros(3), hijax=True)

        @jax.jit
        def inner(x: jax.Array) -> jax.Array:
            made[...] = made[...] + x
            return x

        return (inner(x) * model.w[...]).sum()

    check_refused(door, closed, (), "Mine")


@pytest.mark.skipif(FLAX_WRITES, reason="this Flax writes them")
def test_the_path_of_one_in_named_objects_begins_with_the_name() -> None:
    plan = sw.plan(first=net(), second=net())

    def fn(first: Any, second: Any) -> None:
        second.made = Mine(jnp.zeros(3), hijax=True)
        second.made[...] += 1

    check_refused(lambda fn: sw.step(fn)(plan.take(first=net(), second=net())), fn, ("second", "made"), "Mine")
