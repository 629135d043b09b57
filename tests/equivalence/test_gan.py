"""A small GAN: two train steps with different `wrt` on one plan, against two `nnx.Optimizer`s under `nnx.jit`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from equivalence.rivals import (
    Snapshot,
    assert_moved,
    assert_same,
    assert_same_flat,
    flat_of,
    leaves_of,
    leaves_of_state,
)

GENERATOR = nnx.All(nnx.Param, nnx.PathContains("generator"))
CRITIC = nnx.All(nnx.Param, nnx.PathContains("critic"))
KINDS = sw.Kinds(
    generator=sw.Kind(sw.Path("generator/**") & nnx.Param),
    critic=sw.Kind(sw.Path("critic/**") & nnx.Param),
    stats=sw.Kind(nnx.BatchStat),
    rng=sw.Kind(nnx.RngState),
    counters=sw.Kind(...),
)
OPTIMIZERS = {
    "generator": optax.adam(0.02, b1=0.5, eps=1e-2),
    "critic": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05, momentum=0.5)),
}


class Generator(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.7, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)
        self.noise = rngs.fork()

    def __call__(self, count: int) -> Any:
        return self.last(nnx.relu(self.norm(self.first(self.noise.normal((count, 3))))))


class Critic(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return self.last(self.dropout(nnx.leaky_relu(self.first(x))))[:, 0]


class Gan(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.generator, self.critic = Generator(rngs), Critic(rngs)


def critic_loss(gan: Gan, real: Any) -> Any:
    fake = gan.generator(len(real))
    return (optax.sigmoid_binary_cross_entropy(gan.critic(real), jnp.ones(len(real)))).mean() + (
        optax.sigmoid_binary_cross_entropy(gan.critic(fake), jnp.zeros(len(real)))
    ).mean()


def generator_loss(gan: Gan, count: int) -> Any:
    return optax.sigmoid_binary_cross_entropy(gan.critic(gan.generator(count)), jnp.ones(count)).mean()


def reals() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(size=(6, 2)).astype(np.float32) + 2 for _ in range(4)]


def by_hand() -> list[Snapshot]:
    gan = Gan()
    optimizers = {
        "generator": nnx.Optimizer(gan, OPTIMIZERS["generator"], wrt=GENERATOR),
        "critic": nnx.Optimizer(gan, OPTIMIZERS["critic"], wrt=CRITIC),
    }

    @nnx.jit
    def train_critic(gan: Gan, optimizer: Any, real: Any) -> Any:
        loss, grads = nnx.value_and_grad(critic_loss, argnums=nnx.DiffState(0, CRITIC))(gan, real)
        optimizer.update(gan, grads)
        return loss

    @nnx.jit
    def train_generator(gan: Gan, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(generator_loss, argnums=nnx.DiffState(0, GENERATOR))(gan, 6)
        optimizer.update(gan, grads)
        return loss

    found = []
    for real in reals():
        losses = train_critic(gan, optimizers["critic"], real), train_generator(gan, optimizers["generator"])
        moments = {name: nnx.as_pure(optimizer.opt_state) for name, optimizer in optimizers.items()}
        found.append(Snapshot(np.asarray(losses), leaves_of(gan), flat_of(moments)))
    return found


@pytest.fixture
def begun() -> tuple[Gan, sw.State, Any, Any]:
    gan = Gan()
    state = KINDS.plan(gan, optimizers=OPTIMIZERS).take(gan)
    train_critic = sw.train_step(wrt="critic")(critic_loss)
    train_generator = sw.train_step(wrt="generator", static_argnames="count")(generator_loss)
    return gan, state, train_critic, train_generator


def test_both_players_go_through_the_numbers_of_nnx(begun: tuple[Gan, sw.State, Any, Any]) -> None:
    _, state, train_critic, train_generator = begun
    found = []
    for real in reals():
        state, first = train_critic(state, real)
        state, second = train_generator(state, count=6)
        found.append(Snapshot(np.asarray((first, second)), leaves_of_state(state), flat_of(state["optimizer"])))
    assert_same(found, by_hand())
    assert_moved(found, "generator", "critic", "mean", "calls", "count", "kernel")


def test_each_step_moves_its_own_player_and_its_own_moments(begun: tuple[Gan, sw.State, Any, Any]) -> None:
    gan, state, train_critic, train_generator = begun
    before = leaves_of(gan)
    moments = flat_of(state["optimizer"])
    state, _ = train_critic(state, reals()[0])
    assert moved(before, leaves_of_state(state)) == {
        ("critic", layer, name) for layer in ("first", "last") for name in ("kernel", "bias")
    }
    assert {path[0] for path in moved(moments, flat_of(state["optimizer"]), all_=True)} == {"critic"}
    before, moments = leaves_of_state(state), flat_of(state["optimizer"])
    state, _ = train_generator(state, count=6)
    paths = moved(before, leaves_of_state(state))
    assert {path[0] for path in paths} == {"generator"}
    assert len(paths) == 5
    assert {path[0] for path in moved(moments, flat_of(state["optimizer"]), all_=True)} == {"generator"}


def moved(before: Any, after: Any, all_: bool = False) -> set[Any]:
    """The paths of trained leaves (of all, if asked) that differ."""
    assert before.keys() == after.keys()
    return {
        path
        for path in before
        if (all_ or path[-1] in ("kernel", "bias", "scale")) and not np.array_equal(before[path], after[path])
    }


def test_both_players_at_once_are_the_default(begun: tuple[Gan, sw.State, Any, Any]) -> None:
    """One loss for both is trained as one `nnx.value_and_grad` with respect to both, updated by each optimizer."""
    gan, state, _, _ = begun
    state, loss = sw.train_step(critic_loss)(state, reals()[0])
    optimizers = {
        name: nnx.Optimizer(gan, tx, wrt={"generator": GENERATOR, "critic": CRITIC}[name])
        for name, tx in OPTIMIZERS.items()
    }

    @nnx.jit
    def train(gan: Gan, optimizers: Any, real: Any) -> Any:
        loss, grads = nnx.value_and_grad(critic_loss)(gan, real)
        for optimizer in optimizers.values():
            optimizer.update(gan, nnx.filter_state(grads, optimizer.wrt))
        return loss

    expected = train(gan, optimizers, reals()[0])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_same_flat(leaves_of_state(state), leaves_of(gan))
