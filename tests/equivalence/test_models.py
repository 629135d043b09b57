"""Step for step the same numbers as `nnx.jit` with `nnx.Optimizer`, model by model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from equivalence.models import MODELS, MOVING, BatchNormDropout, rows, squares
from equivalence.rivals import (
    Case,
    Snapshot,
    assert_moved,
    assert_same,
    batches,
    by_hand,
    by_steps,
    flat_of,
    leaves_of_state,
)

# A large eps keeps Adam from blowing rounding noise up to full steps.
ADAM = optax.adam(0.05, eps=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_training_gives_the_numbers_of_nnx_jit_and_nnx_optimizer(name: str) -> None:
    case = MODELS[name]
    ours, theirs = by_steps(case, ADAM), by_hand(case, ADAM)
    assert_same(ours, theirs, case.rtol)
    assert_moved(ours, *MOVING.get(name, ()))
    assert not np.array_equal(ours[0].loss, ours[-1].loss)


@pytest.mark.parametrize("name", ["batchnorm_dropout", "tied_embedding", "scanned", "nested"])
def test_the_same_steps_in_one_scan_give_the_same_numbers(name: str) -> None:
    case = MODELS[name]
    one_by_one = by_steps(case, ADAM)
    train = sw.train_step(case.loss)
    model = case.make()
    state = case.kinds.plan(model, optimizers={case.trained: ADAM}).take(model)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches(case))
    state, losses = jax.jit(lambda state, batches: jax.lax.scan(lambda s, b: train(s, *b), state, batches))(
        state, stacked
    )
    np.testing.assert_allclose(losses, [step.loss for step in one_by_one], rtol=case.rtol)
    last = one_by_one[-1]
    assert_same([Snapshot(losses[-1], leaves_of_state(state), flat_of(state["optimizer"][case.trained]))], [last])


def test_the_same_program_gives_the_same_bits() -> None:
    case = MODELS["batchnorm_dropout"]
    ours = by_steps(case, ADAM)
    # Once more under the caller's own jit, where the step is a part of a larger program, and eagerly lowered.
    model = case.make()
    plan = sw.plan(model, optimizers={"params": ADAM})
    train = sw.train_step(case.loss)
    state, other = plan.take(model), plan.take(model)
    compiled = train.lower(plan.abstract(), *batches(case)[0]).compile()
    outer = jax.jit(lambda state, *args: train(state, *args))
    for args, expected in zip(batches(case), ours, strict=True):
        (state, loss), (other, other_loss) = compiled(state, *args), outer(other, *args)
        for each, its_loss in ((state, loss), (other, other_loss)):
            snapshot = Snapshot(np.asarray(its_loss), leaves_of_state(each), flat_of(each["optimizer"]["params"]))
            assert_same([snapshot], [expected], exact=True)


def test_a_forward_pass_gives_the_bits_of_nnx_jit() -> None:
    model = BatchNormDropout()
    x, _ = rows(np.random.default_rng(0))
    model.eval()
    state = sw.plan(model).take(model)
    forward = sw.step(lambda model, x: model(x))
    np.testing.assert_array_equal(forward(state, x), nnx.jit(lambda model, x: model(x))(model, x))


class Whole(nnx.Module):
    """One parameter that holds several arrays: `nnx.Optimizer` cannot update it."""

    def __init__(self) -> None:
        self.both = nnx.Param({"w": jnp.full((6, 2), 0.1, jnp.float32), "b": (jnp.zeros(2), jnp.ones(()))})

    def __call__(self, x: Any) -> Any:
        values = self.both.get_value()
        return x @ values["w"] + values["b"][0][None] * values["b"][1]


class Parts(nnx.Module):
    """The same in parameters of one array each."""

    def __init__(self) -> None:
        self.both = nnx.Dict(
            w=nnx.Param(jnp.full((6, 2), 0.1, jnp.float32)),
            b=nnx.List([nnx.Param(jnp.zeros(2)), nnx.Param(jnp.ones(()))]),
        )

    def __call__(self, x: Any) -> Any:
        return x @ self.both["w"][...] + self.both["b"][0][...][None] * self.both["b"][1][...]


def test_a_parameter_of_several_arrays_is_trained_as_its_parts_are() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.1), ADAM)
    assert_same(by_steps(Case(Whole, rows, squares), tx), by_hand(Case(Parts, rows, squares), tx))
