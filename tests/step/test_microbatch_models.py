"""Microbatches of a transformer and a ResNet, of ensembles, and of every option at once."""

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
from training_models import (
    OPTIMIZERS,
    PARTS,
    Attention,
    Mlp,
    ResNet,
    by_hand,
    close,
    image_loss,
    images,
    loss_of,
    token_loss,
    trained,
)

TOKENS = [(jax.random.randint(jax.random.key(seed), (8, 7), 0, 11),) for seed in range(2)]


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_a_transformer(name: str) -> None:
    model = Attention(nnx.Rngs(0))
    parts = trained(model, OPTIMIZERS[name], token_loss, TOKENS, microbatches=PARTS)
    close(parts, trained(model, OPTIMIZERS[name], token_loss, TOKENS))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_statistics_of_a_resnet_are_those_of_the_loop_by_hand(name: str) -> None:
    model, batches = ResNet(nnx.Rngs(0)), [images(seed) for seed in (0, 5)]
    parts, losses = trained(model, OPTIMIZERS[name], image_loss, batches, microbatches=PARTS)
    hand, of_hand = by_hand(model, OPTIMIZERS[name], image_loss, batches)
    close((nnx.state(parts.plan.build(parts)), losses), (hand, of_hand), rtol=5e-5)
    moved = parts["stats"]["block"]["norms"][0]["mean"]
    assert np.abs(moved).max() > 0


def test_members_of_an_ensemble_split_and_skip_for_themselves() -> None:
    """Each is as if it were alone; only the one with a bad row skips its step."""
    models = [Mlp(nnx.Rngs(seed)) for seed in range(3)]
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, compute="float16"))
    plan = kinds.plan(models[0], optimizers={"params": optax.adam(1e-2)})
    ensemble = plan.stack([plan.take(model) for model in models])
    axes = ensemble.plan.axes()

    def fn(model: Any, x: jax.Array, y: jax.Array) -> Any:
        weight = (x[:, 0] > -0.5).sum()
        return loss_of(model, x, y).astype(jnp.float32), weight

    step = sw.train_step(fn, microbatches=2, weighted=True, nonfinite="skip")
    xs = jax.random.normal(jax.random.key(3), (3, 8, 6)).at[1, 5, 2].set(jnp.nan)
    y = jnp.ones((8, 3))
    after, losses = jax.vmap(step, in_axes=(axes, 0, None), out_axes=(axes, 0))(ensemble, xs, y)
    assert np.isfinite(losses).tolist() == [True, False, True]
    for number, model in enumerate(models):
        alone, loss = step(plan.take(model), xs[number], y)
        member = after.member(number)
        close((member["params"], losses[number]), (alone["params"], loss), rtol=2e-3)
        same = jax.tree.map(
            np.array_equal, jax.tree.leaves(member["params"]), jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        )
        assert all(same) == (number == 1)


class Everything(nnx.Module):
    """Two kinds of parameters, statistics, a counter, and a value that it sows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body, self.scale = Mlp(rngs), nnx.LoRAParam(jnp.ones(3))
        self.mean, self.calls = nnx.BatchStat(jnp.zeros(3)), nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.body(x) * self.scale[None]
        self.sow(nnx.Intermediate, "out", out)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * out.mean(0)
        self.calls[...] += 1
        return out


@pytest.mark.parametrize("pack", [False, True])
def test_everything_at_once_on_eight_devices_inside_a_scan(pack: bool) -> None:
    """As the whole batch on one device: but the statistics, which are those of a step for each part there."""
    model = Everything(nnx.Rngs(0))
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), compute="bfloat16"))
    optimizers = {"params": optax.sgd(0.1), "lora": optax.adam(1e-2)}
    plan = kinds.plan(model, optimizers=optimizers, averages={"params": sw.EMA(0.5)})

    def fn(model: Any, x: jax.Array, y: jax.Array, mask: jax.Array) -> Any:
        out = model(x)
        losses = ((out - y) ** 2).mean(-1) * mask
        return losses.sum() / mask.sum(), mask.sum(), out

    options: dict[str, Any] = {"weighted": True, "nonfinite": "skip", "capture": "intermediates"}
    whole, split = sw.train_step(fn, **options), sw.train_step(fn, microbatches=2, **options)
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (3, 32, 6)), jax.random.normal(keys[1], (3, 32, 3))
    mask = (jax.random.uniform(keys[2], (3, 32)) > 0.3).astype(jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P(None, "data"))
    batches = jax.tree.map(lambda array: jax.device_put(array, rows), (x, y, mask))
    run = lambda step, state, batches: jax.lax.scan(lambda state, batch: step(state, *batch), state, batches)  # noqa: E731
    one, ((losses, out), captured) = run(whole, plan.take(model), (x, y, mask))
    eight, ((same, of_parts), captured_parts) = run(split, plan.take(model, mesh=mesh, pack=pack), batches)
    close((losses, out), (same, of_parts.reshape(3, 32, 3)), rtol=1e-2)
    for kind in ("params", "lora", "ema", "optimizer"):
        close(one[kind], eight[kind], rtol=1e-2)
    assert jax.tree.leaves(captured_parts)[0].shape[:3] == (3, 2, 16)
    assert jax.tree.leaves(captured)[0].shape[:2] == (3, 32)
    assert int(eight["variables"]["calls"]) == 6
    # What `calls` parts of the statistics are, by hand.
    mean = np.zeros(3)
    for part in np.asarray(of_parts, np.float32).reshape(6, 16, 3):
        mean = 0.9 * mean + 0.1 * part.mean(0)
    np.testing.assert_allclose(eight["stats"]["mean"], mean, rtol=2e-2, atol=1e-3)


def test_a_resnet_is_traced_once() -> None:
    traces = []

    @sw.train_step(microbatches=PARTS)
    def fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return image_loss(model, x, y)

    model = ResNet(nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)})
    fn.lower(plan.abstract(), *images(0))
    assert traces == [(4, 6, 6, 3)]
