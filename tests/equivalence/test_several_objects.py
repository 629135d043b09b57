"""The bodies that people write under `nnx.jit` today, unchanged, under `sw.step`: model, optimizer and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from equivalence.models import (
    BatchNormDropout,
    LowRank,
    Nested,
    Scale,
    Spectral,
    WeightNormed,
    rows,
    squares,
)
from equivalence.rivals import Flat, assert_same_flat, flat_of, leaves_of, leaves_of_state

WRITES = ("params", "stats", "rng", "optimizer", "metrics")


def arguments() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [rows(random) for _ in range(4)]


def metrics() -> nnx.MultiMetric:
    return nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("spread"))


def train_step(model: Any, optimizer: Any, metrics: Any, x: Any, y: Any) -> Any:
    """As in the Flax tutorials."""

    def loss_fn(model: Any) -> Any:
        predicted = model(x)
        return ((predicted - y) ** 2).mean(), predicted

    (loss, predicted), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    metrics.update(loss=loss, spread=predicted)
    optimizer.update(model, grads)
    return loss


def eval_step(model: Any, metrics: Any, x: Any, y: Any) -> None:
    model.eval()
    metrics.update(loss=squares(model, x, y), spread=y)


def setting(
    make: Callable[[], Any], tx: Any = None, wrt: Any = nnx.Param
) -> tuple[Any, nnx.Optimizer, nnx.MultiMetric]:
    model = make()
    return model, nnx.Optimizer(model, tx or optax.adam(0.05, eps=1e-2), wrt=wrt), metrics()


def every_leaf(*objects: Any) -> Flat:
    """The leaves of all objects, by path, the object's position first."""
    return {(at, *path): leaf for at, thing in enumerate(objects) for path, leaf in leaves_of(thing).items()}


def every_leaf_of_state(state: sw.State) -> Flat:
    """The same; the `nnx.Optimizer` is one of the objects here, and no optimizer of the plan."""
    return leaves_of_state(state) | flat_of(state["optimizer"])


def assert_runs_as_under_nnx_jit(
    body: Callable[..., Any], make: Callable[[], tuple[Any, ...]], kinds: sw.Kinds, writes: tuple[str, ...]
) -> tuple[sw.State, tuple[Any, ...]]:
    """Runs the body both ways, and compares everything after each step."""
    rivals, objects = make(), make()
    theirs, ours = nnx.jit(body), sw.step(writes=writes)(body)
    plan = kinds.plan(*objects)
    state = plan.take(*objects)
    before = every_leaf(*objects)
    for args in arguments():
        expected = theirs(*rivals, *args)
        state, out = ours(state, *args)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
        assert_same_flat(every_leaf_of_state(state), every_leaf(*rivals))
    assert_same_flat(every_leaf(*objects), before, exact=True)
    plan.put(state, *objects)
    assert_same_flat(every_leaf(*objects), every_leaf(*rivals))
    assert_same_flat(every_leaf(*plan.build(state)), every_leaf_of_state(state), exact=True)
    return state, objects


def test_model_optimizer_and_metrics_as_under_nnx_jit() -> None:
    _, (_, optimizer, metrics) = assert_runs_as_under_nnx_jit(
        train_step, lambda: setting(BatchNormDropout), sw.Kinds.standard(), WRITES
    )
    assert int(optimizer.step[...]) == 4
    assert float(metrics.compute()["loss"]) > 0


@pytest.mark.parametrize("make", [Spectral, WeightNormed])
def test_layers_that_normalise_their_own_weights(make: Callable[[], Any]) -> None:
    assert_runs_as_under_nnx_jit(train_step, lambda: setting(make), sw.Kinds.standard(), WRITES)


def test_kinds_of_the_users_own() -> None:
    kinds = sw.Kinds(
        trained=sw.Kind(nnx.Any(nnx.Param, Scale)),
        optimizer=sw.Kind(nnx.OptState),
        metrics=sw.Kind(nnx.metrics.MetricState),
        others=sw.Kind(...),
    )
    wrt = nnx.Any(nnx.Param, Scale)

    def train(model: Any, optimizer: Any, metrics: Any, x: Any, y: Any) -> Any:
        loss, grads = sw.value_and_grad(squares, wrt=wrt)(model, x, y)
        metrics.update(loss=loss, spread=y)
        optimizer.update(model, grads)
        return loss

    assert_runs_as_under_nnx_jit(
        train, lambda: setting(Nested, wrt=wrt), kinds, ("trained", "optimizer", "metrics", "others")
    )


def test_adapters_of_a_base_that_no_step_may_write() -> None:
    standard = sw.Kinds.standard()
    kinds = standard.replace(params=sw.Kind(standard["params"].of, frozen=True))

    def train(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, grads = nnx.value_and_grad(squares, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x, y)
        optimizer.update(model, grads)
        return loss

    def make() -> tuple[Any, ...]:
        return setting(LowRank, optax.adamw(0.05, weight_decay=0.1), nnx.LoRAParam)[:2]

    assert_runs_as_under_nnx_jit(train, make, kinds, ("lora", "optimizer"))


def test_models_that_share_a_module() -> None:
    """A leaf that two objects have in common is one leaf, and what one step writes the other sees."""

    def make() -> tuple[Any, ...]:
        trunk = BatchNormDropout()
        first, second = nnx.Dict(trunk=trunk, scale=nnx.Param(jnp.ones(2))), nnx.Dict(trunk=trunk)
        return first, second, nnx.Optimizer(first, optax.sgd(0.1), wrt=nnx.Param)

    def train(first: Any, second: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def loss_fn(first: Any) -> Any:
            return ((first.trunk(x) * first.scale[...][None] - y) ** 2).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(first)
        optimizer.update(first, grads)
        return loss + second.trunk.outer.kernel[...].sum()

    rivals, objects = make(), make()
    plan = sw.plan(*objects)
    assert sum(leaf.kind == "params" for leaf in plan.leaves) == len(
        nnx.to_flat_state(nnx.state(objects[0], nnx.Param))
    )
    state, theirs, ours = plan.take(*objects), nnx.jit(train), sw.step(writes=WRITES)(train)
    for args in arguments():
        expected = theirs(*rivals, *args)
        state, out = ours(state, *args)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
    plan.put(state, *objects)
    assert objects[0].trunk is objects[1].trunk
    assert_same_flat(every_leaf(*objects), every_leaf(*rivals))


def test_metrics_beside_an_evaluation() -> None:
    model, rival = BatchNormDropout(), BatchNormDropout()
    ours, theirs = metrics(), metrics()
    plan = sw.plan(model, ours)
    state = plan.take(model, ours)
    evaluate, expected = sw.step(writes="metrics")(eval_step), nnx.jit(eval_step)
    for args in arguments():
        state, out = evaluate(state, *args)
        assert out is None
        expected(rival, theirs, *args)
    plan.put(state, model, ours)
    assert_same_flat(flat_of(ours.compute()), flat_of(theirs.compute()))
    assert_same_flat(every_leaf(model, ours), every_leaf(rival, theirs))


def test_train_step_with_metrics_beside_the_model() -> None:
    """`train_step` on several objects: the plan's optimizer updates the model, the function updates the metrics."""
    model, values = BatchNormDropout(), metrics()
    plan = sw.plan(model, values, optimizers={"params": optax.adam(0.05, eps=1e-2)})
    state = plan.take(model, values)

    @sw.train_step(has_aux=True)
    def train(model: Any, metrics: Any, x: Any, y: Any) -> Any:
        predicted = model(x)
        loss = ((predicted - y) ** 2).mean()
        metrics.update(loss=loss, spread=predicted)
        return loss, predicted

    rival, optimizer, theirs = setting(BatchNormDropout)
    expected = nnx.jit(train_step)
    for args in arguments():
        state, (loss, _) = train(state, *args)
        np.testing.assert_allclose(loss, expected(rival, optimizer, theirs, *args), rtol=1e-5)
    assert_same_flat(leaves_of_state(state), every_leaf(rival, theirs))
