"""`nonfinite="skip"`: a batch that is not finite changes nothing but the random streams, to the bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from statewise.errors import DeclarationError

X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)


class Net(nnx.Module):
    """Has everything that a step may change: parameters, statistics, a counter, a bound, and random streams."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.norm, self.noise = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls, self.lowest = nnx.Variable(jnp.array(0)), nnx.Variable(jnp.array(jnp.inf))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.last(self.noise(self.norm(nnx.tanh(self.first(x)))))


@jax.custom_vjp
def poisoned(x: jax.Array, poison: jax.Array) -> jax.Array:
    """Returns x; its gradient is multiplied by the poison, so a loss can be finite where a gradient is not."""
    return x


poisoned.defvjp(lambda x, poison: (x, poison), lambda poison, grad: (grad * poison, jnp.zeros_like(poison)))


def fn(model: Any, x: jax.Array, loss: Any = 0.0, grad: Any = 1.0, stat: Any = 0.0) -> jax.Array:
    out = (poisoned(model(x), jnp.asarray(grad)) ** 2).mean() + loss
    model.norm.mean[...] += stat
    model.lowest[...] = jnp.minimum(model.lowest[...], jnp.inf)  # a bound that may stay infinite
    return out


STEP = sw.train_step(fn, nonfinite="skip")


@sw.train_step(nonfinite="skip", microbatches=4)
def STEP_OF_PARTS(model: Any, x: jax.Array, loss: jax.Array, grad: jax.Array, stat: jax.Array) -> jax.Array:
    return fn(model, x, loss[0], grad[0], stat[0])


def make(pack: bool = False, optimizer: Any = None) -> sw.State:
    model = Net(nnx.Rngs(0))
    optimizer = optax.adam(1e-2) if optimizer is None else optimizer
    kinds = sw.Kinds.standard()
    return kinds.plan(model, optimizers={"params": optimizer}, averages={"params": sw.EMA(0.9)}).take(model, pack=pack)


def numbers(state: sw.State) -> dict[str, list[np.ndarray]]:
    """Returns all arrays by kind, as NumPy's; keys as their words."""

    def plain(array: Any) -> np.ndarray:
        return np.array(
            jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array
        )

    return {kind: list(map(plain, jax.tree.leaves(state[kind]))) for kind in state}


def assert_nothing_changed(before: dict[str, list[np.ndarray]], state: sw.State) -> None:
    after = numbers(state)
    for kind, arrays in before.items():
        same = [np.array_equal(one, other, equal_nan=True) for one, other in zip(arrays, after[kind], strict=True)]
        assert all(same) == (kind != "rng"), kind


BAD = {
    "a nan in the batch": {"x": X.at[2, 1].set(jnp.nan)},
    "an infinity in the loss": {"loss": jnp.inf},
    "a gradient only": {"grad": jnp.nan},
    "a statistic only": {"stat": jnp.inf},
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_changes_nothing_but_random_streams(bad: str, pack: bool) -> None:
    state = make(pack)
    defaults: dict[str, Any] = {"x": X, "loss": 0.0, "grad": 1.0, "stat": 0.0}
    state, loss = STEP(state, *defaults.values())
    assert np.isfinite(loss)
    before = numbers(state)
    state, loss = STEP(state, *(defaults | BAD[bad]).values())
    assert not np.isfinite(loss)  # also where the loss itself was finite
    assert_nothing_changed(before, state)
    state, loss = STEP(state, *defaults.values())
    after = numbers(state)
    assert np.isfinite(loss)
    assert all(np.isfinite(array).all() for array in after["params"] + after["stats"] + after["optimizer"])
    assert not any(np.array_equal(*pair) for pair in zip(before["params"], after["params"], strict=True))


def test_good_batches_are_as_without_it() -> None:
    skipping, plain = make(), make()
    step = sw.train_step(fn)
    for shift in (0.0, 0.5):
        skipping, loss = STEP(skipping, X + shift)
        plain, same = step(plain, X + shift)
        np.testing.assert_allclose(loss, same, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(numbers(skipping)), jax.tree.leaves(numbers(plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_bound_that_was_infinite_does_not_stop_training() -> None:
    """The model keeps a minimum that starts at infinity, and a mask of infinities: neither became infinite here."""
    state = make()
    before = numbers(state)
    state, loss = STEP(state, X)
    assert np.isfinite(loss)
    assert np.isinf(state["variables"]["lowest"])
    assert not np.array_equal(numbers(state)["params"][0], before["params"][0])


def test_one_bad_part_of_a_batch() -> None:
    state = make()
    before = numbers(state)
    step = sw.train_step(fn, nonfinite="skip", microbatches=4)
    state, loss = step(state, X.at[5, 0].set(jnp.nan))
    assert np.isnan(loss)
    assert_nothing_changed(before, state)
    state, loss = step(state, X)
    assert np.isfinite(loss)


@pytest.mark.parametrize("bad", BAD)
def test_each_bad_thing_in_one_part_only(bad: str) -> None:
    """What is bad comes with the third of four parts, and what the parts before it wrote is taken back too."""
    arguments: dict[str, Any] = {"x": X, "loss": jnp.zeros(4), "grad": jnp.ones(4), "stat": jnp.zeros(4)}
    for name, value in BAD[bad].items():
        arguments[name] = arguments[name].at[2].set(value) if jnp.ndim(value) == 0 else X.at[5, 0].set(jnp.nan)

    state = make()
    before = numbers(state)
    state, loss = STEP_OF_PARTS(state, *arguments.values())
    assert not np.isfinite(loss)
    assert_nothing_changed(before, state)


def test_inside_a_scan_it_is_as_if_the_bad_batch_had_not_come() -> None:
    """In a model without random streams."""
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.adamw(1e-2)}, averages={"params": sw.EMA(0.9)})
    step = sw.train_step(lambda model, x: (model(x) ** 2).mean(), nonfinite="skip")
    run = lambda batches: jax.lax.scan(step, plan.take(model), batches)  # noqa: E731
    with_bad, losses = run(jnp.stack([X, X.at[0, 0].set(jnp.nan), X + 1, X.at[7].set(jnp.inf)]))
    without, same = run(jnp.stack([X, X + 1]))
    assert np.isfinite(losses).tolist() == [True, False, True, False]
    np.testing.assert_array_equal(losses[np.array([0, 2])], same)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(with_bad), jax.tree.leaves(without))


def test_a_gradient_that_overflows_in_float16() -> None:
    """The loss is finite; its gradient is not, in the dtype in which it is computed."""
    model = nnx.Dict(w=nnx.Param(jnp.full(2, 300.0)))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, compute="float16"))
    state = kinds.plan(model, optimizers={"params": optax.sgd(1e-3)}).take(model)
    step = sw.train_step(lambda model, x: ((model.w[...] * x).astype(jnp.float32) * 300.0).sum(), nonfinite="skip")
    state, loss = step(state, jnp.full(2, 400.0, jnp.float16))
    assert not np.isfinite(loss)
    np.testing.assert_array_equal(state["params"]["w"], 300.0)
    state, loss = step(state, jnp.full(2, 0.5, jnp.float16))
    np.testing.assert_allclose(loss, 90_000)
    np.testing.assert_allclose(state["params"]["w"], 300.0 - 1e-3 * 150, rtol=1e-6)


def test_a_scale_whose_next_value_is_infinite_is_kept() -> None:
    """And so are the parameters, whose gradients were finite."""
    model = nnx.Dict(w=nnx.Param(jnp.array([1.0, 2.0])), scale=nnx.Variable(jnp.array([4.0, 4.0])))
    optimizers = {"params": optax.sgd(0.1), "scale": sw.overwrite_with_gradient()}
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), scale=sw.Kind(...))
    state = kinds.plan(model, optimizers=optimizers).take(model)
    step = sw.train_step(lambda model, x: model.w[...].sum() + jnp.vdot(model.scale[...], x), nonfinite="skip")
    for x, w, scale in (([1.0, jnp.inf], [1.0, 2.0], [4.0, 4.0]), ([1.0, 3.0], [0.9, 1.9], [1.0, 3.0])):
        state, _ = step(state, jnp.array(x))
        np.testing.assert_allclose(state["params"]["w"], w, rtol=1e-6)
        np.testing.assert_array_equal(state["scale"]["scale"], np.array(scale, np.float32))


def test_a_bad_value_on_one_device_only() -> None:
    """All devices skip, those with values of their own too."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    model = nnx.Dict(w=nnx.Param(jnp.ones(4)), seen=nnx.BatchStat(jnp.zeros(())))

    @sw.train_step(nonfinite="skip")
    def fn(model: Any, x: jax.Array, bad: jax.Array) -> jax.Array:
        model.seen[...] += bad.sum() + 1
        return ((x @ model.w[...]) ** 2).mean()

    for placement in (sw.PerDevice("data"), sw.Replicated()):
        kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat, placement=placement))
        state = kinds.plan(model, optimizers={"params": optax.adam(0.1)}).take(model, mesh=mesh)
        rows = jax.NamedSharding(mesh, jax.P("data"))
        x = jax.device_put(X, rows)
        before = numbers(state)
        for args in ((x.at[3, 0].set(jnp.nan), jnp.zeros(8)), (x, jnp.zeros(8).at[3].set(jnp.inf))):
            state, loss = fn(state, *(jax.device_put(arg, rows) for arg in args))
            assert not np.isfinite(loss)
            for kind, arrays in numbers(state).items():
                assert all(map(np.array_equal, arrays, before[kind])), kind
        state, loss = fn(state, x, jax.device_put(jnp.zeros(8), rows))
        assert np.isfinite(loss)
        assert not np.array_equal(numbers(state)["params"][0], before["params"][0])


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_on_explicit_axes_a_step_that_skips_takes_what_any_other_step_takes(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that is split, and statistics that are written as the batch is split: a step gives them back whole.

    A branch and a choice, as on an accelerator, need the old and the new value to be split alike.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))

    def fn(model: Any, x: jax.Array) -> jax.Array:
        model.seen[...] = x
        return jnp.square(jnp.dot(x, model.w[...], out_sharding=jax.P("data")) + model.b[...]).mean()

    def run(step: Any, batches: Any) -> Any:
        model = nnx.Dict(w=nnx.Param(jnp.ones((8, 2))), b=nnx.Param(jnp.ones((1, 2))))
        model.seen = nnx.BatchStat(jnp.zeros((8, 8)))
        kinds = sw.Kinds(
            split=sw.Kind(sw.Path("w"), placement=sw.Sharded("data")),
            params=sw.Kind(nnx.All(nnx.Param, nnx.Not(sw.Path("w")))),
            stats=sw.Kind(nnx.BatchStat),
        )
        with jax.set_mesh(mesh):
            plan = kinds.plan(
                model, optimizers={("split", "params"): optax.adam(0.1)}, averages={("params", "stats"): sw.EMA(0.9)}
            )
            state = plan.take(model, mesh=mesh)
            for x in batches:
                state, _ = step(state, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
        return state

    x = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)
    skipping = run(sw.train_step(fn, nonfinite="skip"), [x, x.at[3, 1].set(jnp.inf), x + 0.5])
    plain = run(sw.train_step(fn), [x, x + 0.5])
    for ours, theirs in zip(jax.tree.leaves(skipping), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert jax.typeof(ours) == jax.typeof(theirs)


def test_beside_apply_if_finite() -> None:
    """Optax's wrapper would count the bad batch; here even its counter stays."""
    state = make(optimizer=optax.apply_if_finite(optax.adam(1e-2), 3))
    before = numbers(state)
    state, _ = STEP(state, X.at[0, 0].set(jnp.nan))
    assert_nothing_changed(before, state)
    state, loss = STEP(state, X)
    assert np.isfinite(loss)
    changed = [not np.array_equal(*pair) for pair in zip(before["params"], numbers(state)["params"], strict=True)]
    assert any(changed)


def test_by_default_a_bad_batch_is_written() -> None:
    state, loss = sw.train_step(fn)(make(), X.at[0, 0].set(jnp.nan))
    assert np.isnan(loss)
    assert np.isnan(numbers(state)["params"][0]).any()


def test_another_word() -> None:
    with pytest.raises(DeclarationError, match=r"nonfinite='raise' is not one of 'write', 'skip'\.") as raised:
        sw.train_step(fn, nonfinite="raise")  # type: ignore[call-overload]
    assert raised.value.hint == "nonfinite='skip'"
