"""What the tests of states on a mesh share: models, meshes, and counting what JAX compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    """A mesh of so many devices along each axis."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


class Transformer(nnx.Module):
    """Attention, normalisation, two layers and noise: what a transformer's block is made of."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.25) -> None:
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.before = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        x = x + self.attention(self.before(x))
        x = x + self.drop(self.down(jax.nn.gelu(self.up(self.between(x)))))
        return self.head(x)


class ResNet(nnx.Module):
    """Convolutions with batch statistics, and a way around one of them."""

    def __init__(self, rngs: nnx.Rngs, axis_name: str | None = None) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.again = nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.head = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = jax.nn.relu(self.norm(self.stem(images)))
        x = jax.nn.relu(x + self.again(self.conv(x)))
        return self.head(x.mean(axis=(1, 2)))


def loss_of(model: Any, x: Any, labels: Any) -> Any:
    """The loss of either."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def tokens() -> tuple[Any, Any]:
    """A batch for the transformer."""
    drawn = jax.random.randint(jax.random.key(1), (8, 5), 0, 16)
    return drawn, (drawn * 3 + 1) % 16


def images() -> tuple[Any, Any]:
    """A batch for the ResNet."""
    return jax.random.normal(jax.random.key(2), (16, 4, 4, 3)), jnp.arange(16)


def by_key(state: Any) -> dict[str, Any]:
    """A state's arrays by kind and path."""
    return {keys[0].key: array for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]}


def number(array: Any) -> Any:
    """An array that NumPy can compare, of keys too."""
    return np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.extended) else array)


def assert_close(one: Any, other: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Asserts that two states hold the same numbers, but for rounding."""
    theirs = by_key(other)
    for key, array in by_key(one).items():
        np.testing.assert_allclose(number(array), number(theirs[key]), rtol=rtol, atol=atol, err_msg=key)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by one whenever XLA compiles something within the block."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
