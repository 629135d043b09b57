"""What a function returns beside its loss, and what it sows, against `nnx.value_and_grad` and `nnx.capture`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from equivalence.models import rows, squares
from equivalence.rivals import (
    Case,
    Snapshot,
    assert_same,
    assert_same_flat,
    batches,
    flat_of,
    leaves_of,
    leaves_of_state,
)

ADAM = optax.adam(0.05, eps=1e-2)


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
    assert sw.plan(model).excluded == ()


def test_captured_values_of_an_evaluation() -> None:
    model = Sower()
    model.eval()
    x, _ = rows(np.random.default_rng(0))
    forward = sw.step(capture="intermediates")(lambda model, x: model(x))
    out, captured = forward(sw.plan(model).take(model), x)
    expected, sown = nnx.capture(model, nnx.Intermediate)(x)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert_same_flat(flat_of(captured), flat_of(nnx.as_pure(sown)))


# --- sown in blocks that are rematerialised, or scanned; two kinds of it ---------------------------------------


class AuxLoss(nnx.Intermediate):
    """A loss on the side, sown."""


class SowingBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.layer(x)
        self.sow(nnx.Intermediate, "out", x)
        self.sow(AuxLoss, "balance", x.sum())
        return x


class RematerialisedSower(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.plain, self.saving = SowingBlock(rngs), SowingBlock(rngs)

    def __call__(self, x: Any) -> Any:
        return self.perturb("last", nnx.remat(SowingBlock.__call__)(self.saving, self.plain(x)))[:, :2]


class ScannedSower(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> SowingBlock:
            return SowingBlock(rngs)

        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block: SowingBlock, x: Any) -> Any:
            return block(x)

        return through(self.blocks, x)[:, :2]


TWO_KINDS = sw.Kinds.standard().replace(
    intermediates=sw.Kind(sw.Exactly(nnx.Intermediate) | nnx.Perturbation, saved=False)
) | sw.Kinds(losses=sw.Kind(AuxLoss, saved=False))


@pytest.mark.parametrize("make", [RematerialisedSower, ScannedSower])
def test_each_captured_kind_comes_apart(make: Any) -> None:
    x, y = rows(np.random.default_rng(0))
    expected, everything, *_ = nnx.capture(make(), nnx.Intermediate, AuxLoss, nnx.Perturbation)(x)
    theirs = flat_of(nnx.as_pure(everything))
    losses = {path: leaf for path, leaf in theirs.items() if "balance" in path}
    model = make()
    plan = TWO_KINDS.plan(model, optimizers={"params": optax.sgd(0.1)})
    state = plan.take(model)
    out, captured = sw.step(capture=("intermediates", "losses"))(lambda model, x: model(x))(state, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert_same_flat(flat_of(captured["losses"]), losses)
    assert_same_flat(
        flat_of(captured["intermediates"]), {path: leaf for path, leaf in theirs.items() if path not in losses}
    )
    # Capturing one of them leaves the other alone, in training too.
    state, (_, only) = sw.train_step(capture="losses")(squares)(state, x, y)
    assert_same_flat(flat_of(only), losses)
