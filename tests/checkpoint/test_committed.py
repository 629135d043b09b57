"""Every array that a restore returns is committed to its device, so that no step is compiled a second time."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw

KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param),
    cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
)
NAMES = sw.Names({"dense/kernel": "w", "dense/bias": "b"})


class Model(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.cache = nnx.Cache(jnp.ones(3))


def plan_of(model: object) -> sw.Plan:
    return KINDS.plan(model, optimizers={"params": optax.adam(1e-3)}, averages={"params": sw.EMA(0.9)})


def trained_twice(state: sw.State, caplog: pytest.LogCaptureFixture) -> int:
    """Returns how often a step is compiled that is called twice."""

    @sw.train_step(writes="cache")
    def train(model: Model, x: jax.Array) -> jax.Array:
        y = model.dense(x)
        model.cache[...] += y[0]
        return y.sum()

    caplog.clear()
    x = jnp.ones((1, 2))
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        for _ in range(2):
            state, _ = train(state, x)
    finished = [message for message in caplog.messages if message.startswith("Finished XLA compilation")]
    return sum("broadcast_in_dim" not in message for message in finished)


@pytest.mark.parametrize("source", ["names", "a checkpoint"])
def test_a_step_after_a_restore_is_compiled_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str) -> None:
    model, path, target = Model(), tmp_path / "saved", plan_of(nnx.eval_shape(Model)).abstract()
    if source == "names":
        sw.convert(KINDS.plan(model).take(model), path, names=NAMES)
        state, report = sw.restore(path, target, names=NAMES)
    else:
        sw.save(path, plan_of(model).take(model))
        state, report = sw.restore(path, target)
    assert report.ok
    assert all(array.committed for array in jax.tree.leaves(state))
    assert trained_twice(state, caplog) == 1
