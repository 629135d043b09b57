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
    assert_same_flat,
    batches,
    by_hand,
    by_steps,
    flat_of,
    leaves_of,
    leaves_of_state,
)

# A large eps keeps Adam from blowing rounding noise up to full steps.
ADAM = optax.adam(0.05, eps=1e-2)

XFAIL = {
    "spectral_norm": "train_step(writes='params') refuses a trained kind that the forward pass writes",
    "weight_norm": "train_step(writes='params') refuses a trained kind that the forward pass writes",
    "linen_statistics": "nnx.bridge.ToNNX replaces its statistics by new Variables of the same type",
}
NAMES = [pytest.param(name, marks=pytest.mark.xfail(reason=XFAIL[name])) if name in XFAIL else name for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
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


# --- aux, and what the function sows ---------------------------------------------------------------------------


class Sower(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, momentum=0.7, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        self.sow(nnx.Intermediate, "input", x)
        x = nnx.tanh(self.norm(self.layers[0](x)))
        for _ in range(2):  # twice under one name: a tuple of two
            self.sow(nnx.Intermediate, "hidden", x)
        self.norm.sow(nnx.Intermediate, "scale", x.std())
        return self.layers[1](x)


def loss_and_aux(model: Any, x: Any, y: Any) -> Any:
    predicted = model(x)
    return ((predicted - y) ** 2).mean(), {"predicted": predicted, "norms": (jnp.abs(predicted).max(), [x.shape[0]])}


def sower_by_hand() -> list[tuple[Snapshot, Any, Any]]:
    model = Sower()
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    @nnx.jit
    def train(model: Any, optimizer: Any, *args: Any) -> Any:
        def loss_of(model: Any) -> Any:
            (loss, aux), sown = nnx.capture(loss_and_aux, nnx.Intermediate)(model, *args)
            return loss, (aux, sown)

        (loss, (aux, sown)), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss, aux, nnx.as_pure(sown)

    found = []
    for args in batches(SOWER):
        loss, aux, sown = train(model, optimizer, *args)
        found.append(
            (Snapshot(np.asarray(loss), leaves_of(model), flat_of(nnx.as_pure(optimizer.opt_state))), aux, sown)
        )
    return found


SOWER = Case(Sower, rows, squares)


@pytest.mark.parametrize("names", ["intermediates", ("intermediates",)])
def test_aux_and_captured_values_come_back_from_training(names: Any) -> None:
    model = Sower()
    plan = sw.plan(model, optimizers={"params": ADAM})
    state = plan.take(model)
    train = sw.train_step(has_aux=True, capture=names)(loss_and_aux)
    for args, (expected, their_aux, theirs) in zip(batches(SOWER), sower_by_hand(), strict=True):
        state, ((loss, aux), captured) = train(state, *args)
        mine = captured if isinstance(names, str) else captured["intermediates"]
        assert_same(
            [Snapshot(np.asarray(loss), leaves_of_state(state), flat_of(state["optimizer"]["params"]))], [expected]
        )
        assert_same_flat(flat_of(aux), flat_of(their_aux))
        assert_same_flat(flat_of(mine), flat_of(theirs))
        assert len(mine["hidden"]) == 2
    plan.put(state, model)  # nothing of it stays in the model
    assert sw.plan(model).dropped == ()


def test_captured_values_of_an_evaluation() -> None:
    model = Sower()
    model.eval()
    x, _ = rows(np.random.default_rng(0))
    forward = sw.step(capture="intermediates")(lambda model, x: model(x))
    out, captured = forward(sw.plan(model).take(model), x)
    expected, sown = nnx.capture(model, nnx.Intermediate)(x)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert_same_flat(flat_of(captured), flat_of(nnx.as_pure(sown)))
