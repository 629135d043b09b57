"""A scan over stacked layers: equal to a loop over them, and nothing stacked or carried that is only read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
import statewise as sw
from comparing import data
from refusals import refused

LAYERS = 3
TRACES: list[str] = []


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        TRACES.append("block")
        return x + self.drop(nnx.tanh(self.norm(self.dense(x))))


KEYS = jax.random.split(jax.random.key(0), LAYERS)
X = jax.random.normal(jax.random.key(1), (5, 4))
PLAN = sw.plan(Block(nnx.Rngs(0)))
block = sw.step(writes=("stats", "rng"))(lambda block, x: block(x))


def modules() -> list[Block]:
    return [Block(nnx.Rngs(key)) for key in KEYS]


def module() -> Block:
    return nnx.vmap(lambda key: Block(nnx.Rngs(key)))(KEYS)


def states() -> sw.State:
    return jax.vmap(lambda key: PLAN.take(Block(nnx.Rngs(key))))(KEYS)


class Stacked(nnx.Module):
    """A model that scans its layers with Statewise."""

    def __init__(self) -> None:
        self.blocks = module()

    def __call__(self, x: jax.Array) -> jax.Array:
        return sw.scan_layers(Block.__call__, self.blocks, x)


class Looped(nnx.Module):
    """The same with a Python loop."""

    def __init__(self) -> None:
        self.blocks = nnx.List(modules())

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.blocks:
            x = layer(x)
        return x


def close(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(data(a), data(b), rtol=2e-5, atol=1e-6)


def stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


# --- equal to a loop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [True, False])
def test_a_module_runs_as_a_loop_over_its_layers(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        one, loop = module(), modules()
        out, x = sw.scan_layers(Block.__call__, one, X), X
        for layer in loop:
            x = layer(x)
        close(out, x)
        close(nnx.as_pure(nnx.state(one)), stacked([nnx.as_pure(nnx.state(layer)) for layer in loop]))


def test_a_module_runs_as_under_nnx_scan() -> None:
    one, other = module(), module()
    out = sw.scan_layers(Block.__call__, one, X)
    expected = nnx.scan(Block.__call__, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(other, X)
    close(out, expected)
    close(nnx.as_pure(nnx.state(one)), nnx.as_pure(nnx.state(other)))


def test_a_state_runs_as_a_loop_over_its_layers() -> None:
    after, out = sw.scan_layers(block, states(), X)
    x, alone = X, []
    for key in KEYS:
        state, x = block(PLAN.take(Block(nnx.Rngs(key))), x)
        alone.append(state)
    close(out, x)
    close(after, stacked(alone))
    backwards, _ = sw.scan_layers(block, states(), X, reverse=True, unroll=2)
    last, _ = block(PLAN.take(Block(nnx.Rngs(KEYS[-1]))), X)
    close(jax.tree.map(lambda array: array[-1], backwards), last)


@pytest.mark.parametrize("graph", [True, False])
def test_inside_of_a_step_it_trains_as_the_loop(graph: bool) -> None:
    @sw.train_step
    def train(model: Any, x: jax.Array) -> jax.Array:
        return (model(x) ** 2).mean()

    with nnx.set_graph_mode(graph):
        ends = []
        for model in (Stacked(), Looped()):
            plan = sw.plan(model, optimizers={"params": optax.sgd(0.1, momentum=0.9)})
            state, losses = jax.lax.scan(lambda state, _: train(state, X), plan.take(model), None, length=3)
            ends.append((losses, state["params"]["blocks"], state["stats"]["blocks"], state["rng"]["blocks"]))
        (losses, *parts), (expected, *looped) = ends
        close(losses, expected)
        for one, many in zip(parts, looped, strict=True):
            close(one, stacked([many[number] for number in range(LAYERS)]))


def test_an_evaluation_inside_of_a_step_writes_nothing() -> None:
    model = Stacked()
    evaluate = sw.step(lambda model, x: (model.eval(), model(x))[1])
    loop = Looped()
    loop.eval()
    close(evaluate(sw.plan(model).take(model), X), loop(X))
    forgotten = sw.step(lambda model, x: model(x))
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        forgotten(sw.plan(model).take(model), X)
    assert {leaf.kind for leaf in caught.value.leaves} == {"stats", "rng"}


def test_under_nnx_grad_and_jit() -> None:
    def loss(model: Any) -> jax.Array:
        return (model(X) ** 2).mean()

    one, other = Stacked(), Looped()
    grads, expected = nnx.jit(nnx.grad(loss))(one), nnx.grad(loss)(other)
    close(nnx.as_pure(grads)["blocks"], stacked([nnx.as_pure(expected)["blocks"][number] for number in range(LAYERS)]))
    close(one.blocks.norm.mean[...], stacked([layer.norm.mean[...] for layer in other.blocks]))


def test_what_the_function_closes_over_may_be_traced_too() -> None:
    """A mask that the model has computed, and a whole ensemble of such models."""

    class Masked(nnx.Module):
        def __init__(self, key: jax.Array) -> None:
            self.blocks = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))(jax.random.split(key, LAYERS))

        def __call__(self, x: jax.Array) -> jax.Array:
            mask = x > 0
            return sw.scan_layers(lambda layer, x: jnp.where(mask, layer(x), x), self.blocks, x)

    plan = sw.plan(Masked(KEYS[0]))
    axes = plan.axes(params=0)
    forward = sw.step(lambda model, x: model(x))
    found = jax.vmap(forward, in_axes=(axes, None))(
        jax.vmap(lambda key: plan.take(Masked(key)), out_axes=axes)(KEYS), X
    )
    for number, key in enumerate(KEYS):
        x, blocks = X, Masked(key).blocks
        for layer in range(LAYERS):
            x = jnp.where(X > 0, x @ blocks.kernel[layer] + blocks.bias[layer][None], x)
        close(found[number], x)


# --- nothing too much ------------------------------------------------------------------------------------------------


def scans(jaxpr: Any) -> Any:
    """The `scan` equations of a jaxpr, however deep."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def results(fn: Any, *args: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of what a function's only scan carries, and of what it stacks."""
    (eqn,) = scans(jax.make_jaxpr(fn)(*args).jaxpr)
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    carried, given = [], []
    for outer, inner in zip(eqn.outvars, body.outvars, strict=True):
        (given if outer.aval.shape != inner.aval.shape else carried).append(outer.aval.shape)
    return carried, given


def test_what_is_only_read_is_neither_stacked_nor_carried() -> None:
    carried, given = results(lambda states, x: sw.scan_layers(block, states, x), states(), X)
    assert carried == [(5, 4)]
    assert sorted(given) == [(3,), (3, 4), (3, 4)]  # the dropout's count, mean and var; of the parameters nothing
    look = sw.step(lambda block, x: (block.eval(), block(x))[1])
    assert results(lambda states, x: sw.scan_layers(look, states, x), states(), X) == ([(5, 4)], [])
    model = Stacked()
    forward = sw.step(lambda model, x: model(x), writes=("stats", "rng"))
    carried, given = results(forward, sw.plan(model).take(model), X)
    assert carried == [(5, 4)]
    assert sorted(given) == [(3,), (3, 4), (3, 4)]


def test_with_rematerialised_layers_where_nnx_scan_stacks_everything() -> None:
    """JAX drops what a scan's body hands on as it is, but cannot see that through `remat`."""
    graphdef, leaves = nnx.split(module())
    leaves = nnx.as_pure(leaves)
    again = nnx.remat(Block.__call__)

    def theirs(leaves: Any, x: jax.Array) -> Any:
        model = nnx.merge(graphdef, leaves)
        return nnx.scan(again, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model, x), nnx.as_pure(nnx.state(model))

    def ours(leaves: Any, x: jax.Array) -> Any:
        model = nnx.merge(graphdef, leaves)
        return sw.scan_layers(again, model, x), nnx.as_pure(nnx.state(model))

    assert (3, 4, 4) in results(theirs, leaves, X)[1]
    assert sorted(results(ours, leaves, X)[1]) == [(3,), (3, 4), (3, 4)]
    close(ours(leaves, X), theirs(leaves, X))


def test_a_layer_is_traced_once() -> None:
    fresh = sw.step(writes=("stats", "rng"))(lambda block, x: block(x))
    run = jax.jit(lambda states, x: sw.scan_layers(fresh, states, x))
    many = states()
    TRACES.clear()
    for _ in range(2):
        many, _ = run(many, X)
    assert TRACES == ["block"]


# --- one for all -----------------------------------------------------------------------------------------------------


class Counted(nnx.Module):
    """A scale of its own, a bias that all layers share, and a counter that goes on from layer to layer."""

    def __init__(self, scale: Any) -> None:
        self.scale = nnx.Param(jnp.asarray(scale))
        self.bias = nnx.Variable(jnp.ones((1, 4)))
        self.count = nnx.Cache(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        return (x * self.scale[...] + self.bias[...]) * self.count[...]


def by_hand(x: jax.Array) -> jax.Array:
    for count, scale in enumerate((2.0, 3.0, 4.0), start=1):
        x = (x * scale + 1.0) * count
    return x


def test_what_is_shared_is_carried_where_it_is_written() -> None:
    many = Counted([2.0, 3.0, 4.0])
    shared = nnx.Any(nnx.Variable) & ~sw.Exactly(nnx.Param)
    close(sw.scan_layers(Counted.__call__, many, X, shared=shared), by_hand(X))
    assert int(many.count[...]) == 3

    plan = sw.plan(Counted(1.0))
    one = sw.step(writes="cache")(lambda layer, x: layer(x))
    axes = plan.axes(params=0)
    given = jax.vmap(lambda scale: plan.take(Counted(1.0)).replace(params={"scale": scale}), out_axes=axes)(
        jnp.array([2.0, 3.0, 4.0])
    )

    def run(given: sw.State, x: jax.Array) -> Any:
        return sw.scan_layers(one, given, x, shared=("cache", "variables"))

    after, out = run(given, X)
    close(out, by_hand(X))
    assert int(after["cache"]["count"]) == 3
    assert after.part("params") is given.part("params")
    assert after.part("variables") is given.part("variables")
    assert results(run, given, X) == ([(), (5, 4)], [])


def test_a_packed_state() -> None:
    thing = nnx.List([nnx.Variable(jnp.full(2, float(at))) for at in range(5)])
    plan = sw.plan(thing)

    @sw.step(writes="variables")
    def run(layer: nnx.List, x: jax.Array) -> jax.Array:
        layer[1][...] += x
        return x + layer[1][...].sum() + layer[4][...].sum()

    taken = [plan.take(thing, pack=pack) for pack in (False, True)]
    stacked = [jax.vmap(lambda _, state: state, in_axes=(0, None))(KEYS, state) for state in taken]
    found = [sw.scan_layers(run, layers, jnp.array(1.0)) for layers in stacked]
    close(found[0][1], found[1][1])
    for number in range(LAYERS):
        one, other = (jax.tree.map(lambda array: array[number], states) for states, _ in found)  # noqa: B023
        close(one["variables"], other["variables"])


def test_raw_arrays_and_values_of_several_arrays() -> None:
    layers = nnx.Dict(
        pair=nnx.Variable((jnp.arange(3.0), jnp.ones((3, 2)))),
        raw=nnx.data(jnp.zeros(3)),
    )

    def run(layer: Any, x: jax.Array) -> jax.Array:
        first, second = layer.pair[...] if not hasattr(layer.pair, "get_raw_value") else layer.pair.get_raw_value()
        layer.pair.set_raw_value((first + 1, second))
        layer.raw = layer.raw + x
        return x + first

    assert float(sw.scan_layers(run, layers, jnp.array(1.0))) == 4.0
    assert layers.pair.get_raw_value()[0].tolist() == [1.0, 2.0, 3.0]
    assert layers.raw.tolist() == [1.0, 1.0, 2.0]


# --- what can be wrong -----------------------------------------------------------------------------------------------

STACKED = modes.in_mode("nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})")
MEND = (
    f"stack them: layers = {STACKED}(keys)\n"
    "or jax.vmap(lambda key: plan.take(...))(keys)\n"
    "or declare what is shared: sw.scan_layers(fn, layers, x, shared=...)"
)


def test_leaves_without_a_slice_for_each_layer_are_listed() -> None:
    layers = nnx.Dict(a=nnx.Param(jnp.ones((3, 2))), b=nnx.Variable(jnp.ones(())), c=nnx.Param(jnp.ones((4, 2))))
    with refused(
        sw.StructureError,
        "Not every leaf has one slice for each layer.",
        leaves=[
            "b: Variable() float32  (is (), without an axis for the layers)",
            "c: Param(4, 2) float32  (4 layers, others have 3)",
        ],
        hint=MEND,
    ):
        sw.scan_layers(lambda layer, x: x, layers, X)
    plan = sw.plan(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    state = plan.take(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    given = jax.tree.map(lambda axis, array: jnp.stack([array] * 3), plan.axes(params=0, stats=0), state)
    sliced = "BatchStat(4,) float32  kind=stats  (is (3, 4), but shared by the layers)"
    with refused(
        sw.StructureError,
        "Not every leaf has one slice for each layer.",
        leaves=[f"mean: {sliced}", f"var: {sliced}"],
        kind="stats",
        hint=MEND,
    ):
        sw.scan_layers(block, given, X, shared="stats")
    with refused(
        sw.StructureError,
        "Not every leaf has one slice for each layer.",
        leaves=[
            "bias: Param(4,) float32  kind=params  (is (4,), without an axis for the layers)",
            "scale: Param(4,) float32  kind=params  (is (4,), without an axis for the layers)",
            "mean: BatchStat(4,) float32  kind=stats  (is (4,), without an axis for the layers)",
            "var: BatchStat(4,) float32  kind=stats  (is (4,), without an axis for the layers)",
        ],
        hint=MEND,
    ):
        sw.scan_layers(block, state, X)


def test_something_must_tell_how_many_layers_there_are() -> None:
    with refused(
        sw.StructureError,
        "The number of layers is unknown: every leaf is shared.",
        hint="x = jax.lax.fori_loop(0, layers, lambda _, x: fn(layer, x), x)",
    ):
        sw.scan_layers(lambda layer, x: x, nnx.Dict(a=nnx.Param(jnp.ones(2))), X, shared=nnx.Param)


def test_a_function_that_gives_back_another_state_is_refused() -> None:
    other = sw.plan(Counted(1.0)).take(Counted(1.0))
    with refused(
        sw.StructureError,
        "The function returns a state of a plan other than its layer's.",
        hint="return the layer that the step returned: layer, x = step(layer, x)",
    ):
        sw.scan_layers(lambda layer, x: (other, x), states(), X)


def test_a_shared_kind_that_is_not_there() -> None:
    with pytest.raises(sw.DeclarationError, match="There is no kind 'weights'"):
        sw.scan_layers(block, states(), X, shared="weights")
