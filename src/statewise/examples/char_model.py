"""A character transformer in plain NNX, with five kinds of state.

This file does not use Statewise: it is a model as people write it today.  Besides its parameters it carries running
statistics of its activations, a counter, the keys and counts of its dropout, and the attention caches with which it
generates one character at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["ActivationNorm", "BatchStat", "Block", "CharTransformer"]


class BatchStat(nnx.Variable):
    """A running statistic of activations: this model's own type, not a subclass of `nnx.BatchStat`.

    Example:
      >>> from flax import nnx
      >>> issubclass(BatchStat, nnx.BatchStat)
      False
    """


class ActivationNorm(nnx.Module):
    """Normalizes each feature by its running mean and variance.

    In training each call moves the statistics a little toward those of its batch.  `model.eval()` sets
    `use_running_average`, as for `nnx.BatchNorm`, and then they are only read.

    Args:
      width: the size of the last axis.
      momentum: the share of the old statistics that one call in training keeps.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = ActivationNorm(2)
      >>> norm.eval()
      >>> norm(jnp.full((1, 1, 2), 3.0)).round(2)
      Array([[[3., 3.]]], dtype=float32)
    """

    def __init__(self, width: int, momentum: float = 0.95) -> None:
        self.mean = BatchStat(jnp.zeros(width))
        self.var = BatchStat(jnp.ones(width))
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.momentum = momentum
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x of shape (batch, length, width) to the same shape."""
        if not self.use_running_average:
            seen = jax.lax.stop_gradient(x)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * seen.mean((0, 1))
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * seen.var((0, 1))
        mean, var, scale, bias = (v[None, None, :] for v in (self.mean, self.var, self.scale, self.bias))
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


class Block(nnx.Module):
    """One transformer block: causal attention, then two dense layers, each with a residual connection.

    Args:
      width: the size of the last axis.
      heads: the number of attention heads, which divides the width.
      dropout: the share of activations that training drops.
      rngs: initializes the parameters, and provides the dropout stream.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Block(8, 2, 0.1, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 8))).shape
      (1, 4, 8)
    """

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(heads, width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        """Maps x of shape (batch, length, width) to the same shape; with `decode`, length 1 and by the cache."""
        mask = None if decode else nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, decode=decode))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.dense_norm(x)))))


class CharTransformer(nnx.Module):
    """Predicts the next character from those before it.

    Args:
      alphabet: the number of characters.
      context: the number of characters that it can look back on; the size of its caches.
      width: the size of its activations.
      depth: the number of blocks.
      heads: the number of attention heads in each block.
      dropout: the share of activations that training drops.
      rngs: initializes the parameters, and provides the dropout stream.

    Attributes:
      steps: a plain `nnx.Variable`: the number of training steps so far; training increments it.
      position: `nnx.Cache`: the number of characters that decoding has read. Each block's attention has its own caches.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = CharTransformer(50, context=16, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((3, 16), int)).shape
      (3, 16, 50)
      >>> model(jnp.zeros((1, 1), int), decode=True).shape
      (1, 1, 50)
      >>> int(model.position[...])
      1
    """

    def __init__(
        self,
        alphabet: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.05,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.characters = nnx.Embed(alphabet, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dropout, rngs=rngs) for _ in range(depth)])
        self.norm = ActivationNorm(width)
        self.head = nnx.Linear(width, alphabet, rngs=rngs)
        self.steps = nnx.Variable(jnp.array(0))
        self.position = nnx.Cache(jnp.array(0))
        for block in self.blocks:
            block.attention.init_cache((1, context, width))

    def __call__(self, tokens: jax.Array, decode: bool = False) -> jax.Array:
        """Scores the next character at each position.

        Args:
          tokens: integers of shape (batch, length); with `decode`, of shape (1, 1).
          decode: whether to read one character, and those before it from the caches.

        Returns:
          Logits of shape (batch, length, alphabet).
        """
        place = jnp.arange(tokens.shape[1])
        if decode:
            place = place + self.position[...]
            self.position[...] += 1
        x = self.characters(tokens) + self.positions(place)[None]
        for block in self.blocks:
            x = block(x, decode)
        return self.head(self.norm(x))
