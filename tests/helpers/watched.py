"""What tests of `watch` share: models, a train step, and what changed as paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw
from statewise._src.inspect.watch.result import LeafChange

X, Y = jax.random.normal(jax.random.key(0), (4, 3)), jnp.ones((4, 2))
FROZEN = sw.Kinds(
    base=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True),
    lora=sw.Kind(nnx.LoRAParam),
    rest=sw.Kind(...),
)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.hits = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.hits[...] += 1
        return self.drop(self.norm(self.dense(x)))


def make() -> tuple[Net, nnx.Optimizer[Net]]:
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def train(model: Net, optimizer: nnx.Optimizer[Net], x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


def paths(changes: dict[str, tuple[LeafChange, ...]]) -> dict[str, list[str]]:
    return {kind: [sw.format_path(change.path) for change in rows] for kind, rows in changes.items()}


def hows(seen: sw.results.Watch) -> dict[str, str]:
    return {sw.format_path(change.path): ", ".join(change.what) or "same" for change in seen.leaves}


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.head.kernel = self.embed.embedding
