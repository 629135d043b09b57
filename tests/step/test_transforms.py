"""Steps inside the user's own JAX transforms: each gives what calling the step in a plain loop gives, traced once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw


class Count(nnx.Variable):
    pass


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        # No bias: before a BatchNorm its gradient is rounding noise, which Adam would blow up.
        self.dense = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = Count(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.drop(self.norm(self.dense(x)))


MODEL = Net(nnx.Rngs(0))
PLAN = sw.plan(MODEL, optimizers={"params": optax.adam(0.1)})
BATCHES = jax.random.normal(jax.random.key(0), (4, 5, 3))
X = BATCHES[0]
TRACES: list[str] = []


@sw.train_step
def train(model: Net, x: jax.Array) -> jax.Array:
    TRACES.append("train")
    return ((model(x) - x) ** 2).mean()


@sw.step
def evaluate(model: Net, x: jax.Array) -> jax.Array:
    TRACES.append("evaluate")
    model.eval()
    return model.norm(model.dense(x))


@sw.step(writes=("stats", "rng", "variables"))
def forward(model: Net, x: jax.Array) -> jax.Array:
    TRACES.append("forward")
    return model(x)


@pytest.fixture(autouse=True)
def _start() -> None:
    TRACES.clear()


def fresh() -> sw.State:
    return PLAN.take(MODEL)


def close(one: Any, other: Any) -> None:
    def plain(leaf: Any) -> Any:
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(plain(a), plain(b), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def looped() -> tuple[sw.State, jax.Array]:
    """What every way of training must give: a plain loop over the batches."""
    state, losses = fresh(), []
    for x in BATCHES:
        state, loss = train(state, x)
        losses.append(loss)
    return state, jnp.stack(losses)


# --- training inside transforms --------------------------------------------------------------------------------------


def test_jit(looped: Any) -> None:
    stepped = jax.jit(lambda state, x: train(state, x), donate_argnums=0)
    state, losses = fresh(), []
    for x in BATCHES:
        state, loss = stepped(state, x)
        losses.append(loss)
    close((state, jnp.stack(losses)), looped)


@pytest.mark.parametrize("compiled", [False, True])
def test_scan(looped: Any, compiled: bool) -> None:
    def run(state: sw.State, batches: jax.Array) -> Any:
        return jax.lax.scan(lambda state, x: train(state, x), state, batches)

    close((jax.jit(run) if compiled else run)(fresh(), BATCHES), looped)


def test_while_and_fori(looped: Any) -> None:
    def turn(carry: Any) -> Any:
        number, state = carry
        return number + 1, train(state, BATCHES[number])[0]

    close(jax.lax.while_loop(lambda carry: carry[0] < 4, turn, (0, fresh()))[1], looped[0])
    close(jax.lax.fori_loop(0, 4, lambda n, state: train(state, BATCHES[n])[0], fresh()), looped[0])


def test_cond(looped: Any) -> None:
    @jax.jit
    def maybe(state: sw.State, x: jax.Array, wanted: Any) -> sw.State:
        return jax.lax.cond(wanted, lambda state: train(state, x)[0], lambda state: state, state)

    state = fresh()
    for x in BATCHES:
        state = maybe(maybe(state, x, True), x, False)
    close(state, looped[0])


def test_checkpoint_and_other_wrappers(looped: Any) -> None:
    wrapped = jax.checkpoint(lambda state, x: jax.named_call(jax.jit(train.__call__))(state, x))
    close(jax.lax.scan(wrapped, fresh(), BATCHES), looped)


def test_without_compilation(looped: Any) -> None:
    with jax.disable_jit():
        state, losses = fresh(), []
        for x in BATCHES:
            state, loss = train(state, x)
            losses.append(loss)
        close(evaluate(state, X), evaluate(looped[0], X))
    close((state, jnp.stack(losses)), looped)


def test_without_compilation_values_are_concrete() -> None:
    seen = []

    @sw.step(writes="variables")
    def look(model: Net, x: jax.Array) -> jax.Array:
        if not isinstance(x, jax.core.Tracer):
            seen.append((float(x[0, 0]), int(model.calls[...])))
        model.calls[...] += 1
        return x

    with jax.disable_jit():
        state, _ = look(fresh(), jnp.ones((1, 3)))
        look(state, jnp.zeros((1, 3)))
    assert seen == [(1.0, 0), (0.0, 1)]
    with jax.disable_jit(), pytest.raises(sw.UndeclaredWriteError):
        sw.step(forward.fn)(fresh(), X)


# --- many states at once ---------------------------------------------------------------------------------------------


def stacked(state: sw.State, size: int) -> sw.State:
    return jax.tree.map(lambda array: jnp.stack([array] * size), state)


def test_vmap_over_whole_states(looped: Any) -> None:
    def run(state: sw.State, batches: jax.Array) -> Any:
        return jax.lax.scan(lambda state, x: train(state, x), state, batches)

    pair = jnp.stack([BATCHES, BATCHES[::-1]])
    states, losses = jax.vmap(run)(stacked(fresh(), 2), pair)
    close((jax.tree.map(lambda array: array[0], states), losses[0]), looped)

    # The other way round: each turn of the scan trains both.
    def turn(states: sw.State, x: jax.Array) -> Any:
        return jax.vmap(train)(states, x)

    close(jax.lax.scan(turn, stacked(fresh(), 2), pair.swapaxes(0, 1)), (states, losses.T))


def test_vmap_over_some_kinds() -> None:
    axes = PLAN.axes(stats=0, rng=0, variables=0)
    states = fresh()
    many = jax.tree.map(
        lambda axis, array: array if axis is None else jnp.stack([array] * 2),
        axes,
        states,
        is_leaf=lambda leaf: leaf is None,
    )
    after, out = jax.vmap(forward, in_axes=(axes, 0), out_axes=(axes, 0))(many, BATCHES[:2])
    assert out.shape == (2, 5, 3)
    assert after["variables"]["calls"].tolist() == [1, 1]
    assert after["params"]["dense"]["kernel"].shape == (3, 3)
    for number in (0, 1):
        one, alone = forward(fresh(), BATCHES[number])
        close(out[number], alone)
        close(jax.tree.map(lambda array: array[number], after["stats"]), one["stats"])  # noqa: B023


def test_vmap_with_the_wrong_axes_is_refused() -> None:
    with pytest.raises(sw.StructureError, match="do not have the shapes and dtypes of its plan") as caught:
        jax.vmap(evaluate, in_axes=(PLAN.axes(stats=0, rng=None), None))(fresh(), X)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "norm/mean: BatchStat(3,) float32  kind=stats  (is () in the state)",
        "norm/var: BatchStat(3,) float32  kind=stats  (is () in the state)",
    ]


def test_named_axes() -> None:
    model = nnx.BatchNorm(3, axis_name="devices", rngs=nnx.Rngs(0))
    plan = sw.plan(model)
    step = sw.step(lambda model, x: model(x), writes="stats")
    mapped = jax.vmap(step, in_axes=(None, 0), out_axes=(None, 0), axis_name="devices")
    state, out = mapped(plan.take(model), BATCHES)
    whole = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    close(out.reshape(-1, 3), whole(BATCHES.reshape(-1, 3)))
    close(state["stats"]["mean"], whole.mean[...])
    with pytest.raises(NameError, match="devices"):
        step(state, X)
    mapped(state, BATCHES)


def test_shard_map(looped: Any) -> None:
    mesh = jax.make_mesh((5,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(evaluate, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d"))
    close(mapped(looped[0], X), evaluate(looped[0], X))


# --- decoding --------------------------------------------------------------------------------------------------------


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs)
        self.attention.init_cache((1, 6, 4))

    def __call__(self, token: jax.Array) -> jax.Array:
        return self.embed.attend(self.attention(self.embed(token[:, None])))[:, 0]


def test_a_decoding_loop_feeds_its_token_back() -> None:
    model = Decoder(nnx.Rngs(1))
    state = sw.plan(model).take(model)

    @sw.step(writes="cache")
    def decode(model: Decoder, token: jax.Array) -> jax.Array:
        TRACES.append("decode")
        return model(token).argmax(-1)

    def turn(carry: Any, _: Any) -> Any:
        state, token = decode(*carry)
        return (state, token), token

    first = jnp.array([3])
    (scanned, _), tokens = jax.lax.scan(turn, (state, first), length=5)
    assert int(scanned["cache"]["attention"]["cache_index"]) == 5
    alone, token = [], first
    for _ in range(5):
        state, token = decode(state, token)
        alone.append(token)
    assert tokens.tolist() == jnp.stack(alone).tolist()
    assert TRACES == ["decode"]
    state = state.restart("cache")
    (_, _), again = jax.lax.scan(turn, (state, first), length=5)
    assert again.tolist() == tokens.tolist()


# --- looking without running -----------------------------------------------------------------------------------------


def test_shapes_without_values() -> None:
    state, loss = jax.eval_shape(train, PLAN.abstract(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert isinstance(state, sw.State)
    assert loss.shape == ()
    assert jax.eval_shape(evaluate, fresh(), X).shape == (5, 3)


def test_make_jaxpr_does_not_call_again() -> None:
    jaxpr = jax.make_jaxpr(evaluate)(fresh(), X)
    assert len(jaxpr.jaxpr.invars) == len(jax.tree.leaves(fresh())) + 1
    assert TRACES in (["evaluate"], [])


def test_tree_map_and_device_put(devices: list[jax.Device], looped: Any) -> None:
    state = jax.tree.map(lambda array: array, fresh())
    state = jax.device_put(state, devices[1])
    losses = []
    for x in BATCHES:
        state, loss = train(state, x)
        losses.append(loss)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.devices()} == {devices[1]}
    close((jax.device_put(state, devices[0]), jnp.stack(losses)), looped)


# --- differentiating through steps -----------------------------------------------------------------------------------


def plainly(x: jax.Array) -> jax.Array:
    model = nnx.clone(MODEL)
    model.eval()
    return model.norm(model.dense(x))


@pytest.mark.parametrize("of", [jax.grad, jax.hessian, lambda fn: lambda x: jax.jvp(fn, (x,), (jnp.cos(x),))])
def test_derivatives_by_an_argument(of: Callable[..., Any]) -> None:
    state = fresh()
    close(of(lambda x: (evaluate(state, x) ** 2).sum())(X), of(lambda x: (plainly(x) ** 2).sum())(X))


def test_derivatives_by_the_state() -> None:
    state = fresh()
    grads = jax.grad(lambda params: (evaluate(state.replace(params=params), X) ** 2).sum())(state["params"])
    expected = nnx.grad(lambda m: (m.norm(m.dense(X)) ** 2).sum())(nnx.view(MODEL, use_running_average=True))
    close(grads["dense"]["kernel"], expected["dense"]["kernel"][...])


def test_derivatives_through_training() -> None:
    """A learning rate's gradient: of the loss after some steps, by the scale of their losses."""
    model = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)

    @sw.train_step
    def fit(model: nnx.Linear, x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * ((model(x) - x) ** 2).mean()

    def after(scale: jax.Array) -> jax.Array:
        trained, _ = jax.lax.scan(lambda state, x: fit(state, x, scale), state, BATCHES)
        return fit(trained, X, 1.0)[1]

    step = 1e-2
    by_hand = (after(jnp.float32(1 + step)) - after(jnp.float32(1 - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(after)(jnp.float32(1.0)), by_hand, rtol=1e-2)


# --- whose arrays they are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda fn: jax.vmap(fn, in_axes=(None, 0)),
        lambda fn: jax.vmap(fn, in_axes=(None, None), axis_size=4),
        lambda fn: jax.jit(lambda state, xs: fn(state, xs[0])),
        lambda fn: lambda state, xs: jax.grad(lambda x: fn(state, x)[1])(xs[0]),
        lambda fn: lambda state, xs: jax.vjp(lambda x: fn(state, x), xs[0])[1],
        lambda fn: lambda state, xs: jax.lax.scan(fn, state, xs),
    ],
    ids=["vmap", "vmap of nothing", "jit", "grad", "vjp", "scan"],
)
def test_inside_a_transform_nothing_is_given_away(transform: Any) -> None:
    state = fresh()
    transform(lambda state, x: train(state, x))(state, BATCHES)
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))
    after, _ = train(state, X)
    assert int(after["variables"]["calls"]) == 1
    with pytest.raises(sw.StructureError, match="This state was donated: train has donated its params"):
        train(state, X)


def test_a_writing_step_closes_over_a_tracer() -> None:
    state = fresh()

    def by(scale: Any) -> Any:
        def add(model: Net) -> None:
            model.calls[...] += jnp.round(scale).astype(int)

        return sw.step(add, writes="variables")(state)[0]["variables"]["calls"]

    assert int(jax.jit(by)(3.0)) == 3
    assert jax.vmap(by)(jnp.arange(3.0)).tolist() == [0, 1, 2]


def test_a_state_is_taken_inside_a_transform() -> None:
    out, loss = jax.jit(lambda x: train(PLAN.take(MODEL), x))(X)
    close((out, loss), train(fresh(), X))
