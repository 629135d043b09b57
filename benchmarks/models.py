"""The models, in plain NNX."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = [
    "Chain",
    "Gates",
    "Mlp",
    "Policy",
    "ResNet",
    "ScaledDecoder",
    "Transformer",
    "Vectors",
    "cross_entropy",
    "mse",
]


def mse(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((model(x) - y) ** 2)


def cross_entropy(model: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the last axis."""
    logits = jax.nn.log_softmax(model(x))
    return -jnp.take_along_axis(logits, labels[..., None], axis=-1).mean()


class Block(nnx.Module):
    """Two small dense layers, added to what came in."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(0.1)
        self.up = nnx.Linear(width, width, kernel_init=small, rngs=rngs)
        self.down = nnx.Linear(width, width, kernel_init=small, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.relu(self.up(x)))


class Chain(nnx.Module):
    """Many small leaves: blocks of width 8, four leaves each."""

    def __init__(self, blocks: int, width: int = 8, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Mlp(nnx.Module):
    """Few large leaves: dense layers of these widths."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class Policy(nnx.Module):
    """Six leaves: what a small agent acts by."""

    def __init__(self, observed: int, actions: int, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(observed, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, actions, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


class Residual(nnx.Module):
    """Two convolutions with BatchNorm, added to what came in, which is projected where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(inner, outer, (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(outer, rngs=rngs)
        self.conv2 = nnx.Conv(outer, outer, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(outer, rngs=rngs)
        self.skip = nnx.data(None)
        if stride != 1 or inner != outer:
            self.skip = nnx.Conv(inner, outer, (1, 1), strides=stride, padding=0, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(h + (x if self.skip is None else self.skip(x)))


class ResNet(nnx.Module):
    """A small ResNet for images of shape (batch, height, width, 3); each stage halves the image."""

    def __init__(self, stages: tuple[int, ...], repeats: int, classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, stages[0], (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(stages[0], rngs=rngs)
        blocks, inner = [], stages[0]
        for number, outer in enumerate(stages):
            for repeat in range(repeats):
                blocks.append(Residual(inner, outer, 2 if number and not repeat else 1, rngs))
                inner = outer
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inner, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Layer(nnx.Module):
    """One transformer layer: causal attention, then two dense layers."""

    def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs, dtype: Any = None) -> None:
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, decode: bool) -> jax.Array:
        mask = None if decode else nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask, decode=decode))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Transformer(nnx.Module):
    """A small transformer over token numbers of shape (batch, length), with dropout.

    With `cache`, its attention layers have caches for so many tokens.  `dtype` is that of the layers' arithmetic; the
    parameters are float32.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int = 2,
        vocabulary: int = 64,
        dropout: float = 0.1,
        cache: tuple[int, int] | None = None,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, dropout, rngs, dtype) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, dtype=dtype, rngs=rngs)
        for layer in self.layers if cache else ():
            layer.attention.init_cache((*cache, width))

    def __call__(self, tokens: jax.Array, decode: bool = False) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, decode)
        return self.head(self.norm(x))


class ScaledDense(nnx.Module):
    """A dense layer as serving code keeps quantized ones: sixteen Variables, of which one is large."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(0.1)
        self.kernel = nnx.Param(small(rngs.params(), (width, width)))
        self.bias = nnx.Param(jnp.zeros((1, width)))
        self.scale = nnx.Param(jnp.ones((1, width)))
        self.zero_point = nnx.Param(jnp.zeros((1, width)))
        self.group_scales = nnx.List([nnx.Param(jnp.ones(())) for _ in range(12)])

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        for group in self.group_scales:
            scale = scale * group[...]
        return x @ ((self.kernel[...] - self.zero_point[...]) * scale) + self.bias[...]


class ScaledLayer(nnx.Module):
    """One decoder layer of 119 Variables, three of them its cache."""

    def __init__(self, width: int, length: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        for name in ("query", "key", "value", "out", "gate", "up", "down"):
            setattr(self, name, ScaledDense(width, rngs))
        self.cached_key = nnx.Cache(jnp.zeros((length, width)))
        self.cached_value = nnx.Cache(jnp.zeros((length, width)))
        self.cache_index = nnx.Cache(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        h, index = self.norm1(x), self.cache_index[...]
        length = self.cached_key.shape[0]
        place = index % length  # a benchmark decodes for ever
        put = jax.lax.dynamic_update_slice
        self.cached_key[...] = put(self.cached_key[...], self.key(h), (place, 0))
        self.cached_value[...] = put(self.cached_value[...], self.value(h), (place, 0))
        self.cache_index[...] = index + 1
        scores = self.query(h) @ self.cached_key[...].T / length**0.5
        seen = (jnp.arange(length) <= index)[None, :]
        x = x + self.out(jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ self.cached_value[...])
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class ScaledDecoder(nnx.Module):
    """A decoder of many small Variables: about 7,600 of them in 64 layers, the shape of tpu-inference#2607."""

    def __init__(self, width: int, depth: int, length: int, vocabulary: int = 64, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([ScaledLayer(width, length, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Vectors(nnx.Module):
    """So many leaves of eight numbers, each a parameter.

    They are attributes, and no `nnx.List`: to go through one of those takes time by the square of its length, which
    would be all that one sees of a first call.
    """

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        values = np.random.default_rng(0).normal(size=(leaves, 8)).astype(np.float32)
        for number, value in enumerate(values):
            setattr(self, f"vector{number}", nnx.Param(jnp.asarray(value)))

    def vectors(self) -> list[nnx.Param]:
        """The parameters, in order."""
        return [getattr(self, f"vector{number}") for number in range(self.leaves)]


class Gates(nnx.Module):
    """A model of which a step touches one small kind: five counters among so many leaves."""

    def __init__(self, leaves: int) -> None:
        self.rest = Vectors(leaves - 10)
        self.counters = nnx.List([nnx.Variable(jnp.zeros(4)) for _ in range(5)])
        self.caches = nnx.List([nnx.Cache(jnp.zeros(4)) for _ in range(5)])
