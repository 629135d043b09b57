"""Rules of modes: modules that train while the rest of the program evaluates."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

import statewise as sw
from linted import clean, codes, finds

FROZEN = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        return self.drop(self.norm(x))


def half_evaluating() -> Net:
    model = Net()
    model.set_attributes(deterministic=True)
    return model


def test_a_model_that_evaluates_and_still_moves_its_statistics() -> None:
    moved = half_evaluating()
    moved(jnp.ones((4, 3)))
    assert (moved.norm.mean[...] != 0).all()
    finds(
        "statistics-written-by-eval",
        "Every dropout is switched off, but running statistics are still updated (in norm).",
        ["norm/mean: BatchStat(3,) float32  kind=stats", "norm/var: BatchStat(3,) float32  kind=stats"],
        "model.eval()  # or nnx.view(model, deterministic=True, use_running_average=True)",
        half_evaluating(),
    )


def test_a_model_in_one_mode_is_fine() -> None:
    clean(Net())
    model = Net()
    model.eval()
    clean(model)
    model.train()
    clean(model)


def test_frozen_normalisation_in_training_is_fine() -> None:
    model = Net()
    model.norm.use_running_average = True
    clean(model)
    clean(model, kinds=FROZEN)


def test_some_dropout_that_is_on_shows_training() -> None:
    model = nnx.Dict(one=half_evaluating(), other=Net().drop)
    assert "statistics-written-by-eval" not in codes(model)


def test_normalisation_without_dropout_is_fine_in_either_mode() -> None:
    clean(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    clean(nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)))


def test_the_modes_of_a_plan_and_of_a_state_are_seen() -> None:
    model = half_evaluating()
    plan = sw.plan(model)
    assert codes(plan) == codes(plan.take(model)) == ["statistics-written-by-eval"]


def test_frozen_statistics_of_a_module_that_updates_them() -> None:
    finds(
        "frozen-statistics-in-training",
        "Frozen statistics belong to modules that update them.",
        ["norm/mean: BatchStat(3,) float32  kind=stats", "norm/var: BatchStat(3,) float32  kind=stats"],
        "use_running_average=True, where the module is made (norm)  # or model.eval() as a step's first line",
        Net(),
        kinds=FROZEN,
    )
    model = Net()
    model.eval()
    clean(model, kinds=FROZEN)
