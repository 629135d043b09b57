"""The same models in Equinox, with the weights of the NNX ones."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks import models

__all__ = [
    "chain",
    "decoder",
    "decoder_fn",
    "dense",
    "mse",
    "policy",
    "resnet",
    "resnet_loss",
    "scaled_decoder",
    "scaled_decoder_fn",
    "stages",
    "transformer",
    "transformer_loss",
    "vectors",
]


def key() -> jax.Array:
    """A key for weights that are replaced at once; made anew, as the first import may stand inside a trace."""
    return jax.random.key(0)


def linear(source: Any) -> eqx.nn.Linear:
    """`eqx.nn.Linear` from `nnx.Linear`."""
    inner, outer = source.kernel.shape
    bias = None if source.bias is None else source.bias[...]
    made = eqx.nn.Linear(inner, outer, use_bias=bias is not None, key=key())
    made = eqx.tree_at(lambda layer: layer.weight, made, source.kernel[...].T)
    return made if bias is None else eqx.tree_at(lambda layer: layer.bias, made, jnp.copy(bias))


def projection(source: Any, outwards: bool) -> eqx.nn.Linear:
    """`eqx.nn.Linear` from a projection of attention, whose heads have an axis of their own."""
    kernel = source.kernel[...]
    matrix = kernel.reshape(-1, kernel.shape[-1]) if outwards else kernel.reshape(kernel.shape[0], -1)
    made = eqx.nn.Linear(*matrix.shape, key=key())
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), made, (matrix.T, source.bias[...].reshape(-1)))


def layer_norm(source: Any) -> eqx.nn.LayerNorm:
    made = eqx.nn.LayerNorm(source.scale.shape, eps=source.epsilon)
    weights = (jnp.copy(source.scale[...]), jnp.copy(source.bias[...]))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), made, weights)


# --- dense layers ----------------------------------------------------------------------------------------------


class Block(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.relu(self.up(x)))


class Chain(eqx.Module):
    blocks: list[Block]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Mlp(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class Policy(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


class Vectors(eqx.Module):
    vectors: list[jax.Array]


class Ten(eqx.Module):
    """The leaves of a layer of `growth.Stages`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array
    norm: jax.Array
    mean: jax.Array
    cached: jax.Array


def chain(source: models.Chain) -> tuple[Chain, None]:
    return Chain([Block(linear(block.up), linear(block.down)) for block in source.blocks]), None


def dense(source: models.Mlp) -> tuple[Mlp, None]:
    return Mlp([linear(layer) for layer in source.layers]), None


def policy(source: models.Policy) -> tuple[Policy, None]:
    return Policy(linear(source.first), linear(source.second), linear(source.last)), None


def vectors(source: models.Vectors) -> tuple[Vectors, None]:
    return Vectors([jnp.copy(vector[...]) for vector in source.vectors()]), None


def stages(arrays: list[jax.Array]) -> list[list[Ten]]:
    """The twin of `growth.Stages`: layers of ten arrays, a hundred of them in a stage."""
    layers = [Ten(*map(jnp.copy, arrays[start : start + 10])) for start in range(0, len(arrays), 10)]
    return [layers[start : start + 100] for start in range(0, len(layers), 100)]


def mse(model: Any, state: None, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2), None


# --- the ResNet ------------------------------------------------------------------------------------------------


class Residual(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    skip: eqx.nn.Conv2d | None

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        h, state = self.norm1(self.conv1(x), state)
        h, state = self.norm2(self.conv2(jax.nn.relu(h)), state)
        return jax.nn.relu(h + (x if self.skip is None else self.skip(x))), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    blocks: list[Residual]
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


def conv(source: Any) -> eqx.nn.Conv2d:
    height, _, inner, outer = source.kernel.shape
    stride = source.strides if isinstance(source.strides, int) else source.strides[0]
    made = eqx.nn.Conv2d(inner, outer, height, stride, padding=height // 2, use_bias=False, key=key())
    return eqx.tree_at(lambda layer: layer.weight, made, source.kernel[...].transpose(3, 2, 0, 1))


def batch_norm(source: Any) -> eqx.nn.BatchNorm:
    return eqx.nn.BatchNorm(source.scale.shape[0], "batch", eps=1e-5, momentum=0.99, mode="batch")


def resnet(source: models.ResNet) -> tuple[ResNet, eqx.nn.State]:
    def make() -> ResNet:
        blocks = [
            Residual(
                conv(block.conv1),
                batch_norm(block.norm1),
                conv(block.conv2),
                batch_norm(block.norm2),
                None if block.skip is None else conv(block.skip),
            )
            for block in source.blocks
        ]
        return ResNet(conv(source.stem), batch_norm(source.norm), blocks, linear(source.head))

    return eqx.nn.make_with_state(make)()


def resnet_loss(model: ResNet, state: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    images = x.transpose(0, 3, 1, 2)
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, state = run(images, state)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean(), state


# --- the transformer -------------------------------------------------------------------------------------------


class Layer(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        mask = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        h = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(h, h, h, mask=mask), key=first)
        return x + self.dropout(jax.vmap(self.mlp)(x), key=second)

    def mlp(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list[Layer]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __call__(self, tokens: jax.Array, key: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens)
        for layer, own in zip(self.layers, jax.random.split(key, len(self.layers)), strict=True):
            x = layer(x, own)
        return jax.vmap(lambda row: self.head(self.norm(row)))(x)


def attention(source: Any) -> eqx.nn.MultiheadAttention:
    biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
    made = eqx.nn.MultiheadAttention(source.num_heads, source.in_features, **biases, key=key())
    parts = (
        projection(source.query, False),
        projection(source.key, False),
        projection(source.value, False),
        projection(source.out, True),
    )
    return eqx.tree_at(lambda a: (a.query_proj, a.key_proj, a.value_proj, a.output_proj), made, parts)


def transformer(source: models.Transformer) -> tuple[Transformer, jax.Array]:
    """The state beside it is the key that its dropout draws from."""
    layers = [
        Layer(
            layer_norm(layer.norm1),
            attention(layer.attention),
            layer_norm(layer.norm2),
            linear(layer.up),
            linear(layer.down),
            eqx.nn.Dropout(layer.dropout.rate),
        )
        for layer in source.layers
    ]
    embed = eqx.nn.Embedding(weight=jnp.copy(source.embed.embedding[...]))
    return Transformer(embed, layers, layer_norm(source.norm), linear(source.head)), jax.random.key(1)


def transformer_loss(model: Transformer, key: Any, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    key, own = jax.random.split(key)
    logits = jax.vmap(model)(tokens, jax.random.split(own, tokens.shape[0]))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean(), key


# --- decoding: Equinox has no cache of its own, so the caches are arguments, as in its examples of stateful code ---

Caches = tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]


def decoder(source: models.Transformer) -> tuple[Transformer, Caches]:
    """The state beside it: the position, and for each layer keys and values of shape (batch, length, heads, size)."""
    caches = [
        (jnp.zeros(layer.attention.cached_key.shape), jnp.zeros(layer.attention.cached_value.shape))
        for layer in source.layers
    ]
    return transformer(source)[0], (jnp.array(0), caches)


def decoder_fn(model: Transformer, state: Caches, tokens: jax.Array) -> tuple[jax.Array, Caches]:
    """One token for each of the batch, of shape (batch, 1)."""
    position, caches = state
    x = jax.vmap(model.embed)(tokens[:, 0])
    written = []
    for layer, (keys, values) in zip(model.layers, caches, strict=True):
        h, keys, values = cached_attention(layer.attention, jax.vmap(layer.norm1)(x), keys, values, position)
        x = x + h
        x = x + jax.vmap(layer.mlp)(x)
        written.append((keys, values))
    logits = jax.vmap(lambda row: model.head(model.norm(row)))(x)
    return logits[:, None], (position + 1, written)


def cached_attention(module: Any, x: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> Any:
    batch, length, heads, size = keys.shape
    query, key, value = (
        jax.vmap(proj)(x).reshape(batch, heads, size)
        for proj in (module.query_proj, module.key_proj, module.value_proj)
    )
    keys = jax.lax.dynamic_update_slice(keys, key[:, None], (0, position, 0, 0))
    values = jax.lax.dynamic_update_slice(values, value[:, None], (0, position, 0, 0))
    scores = jnp.einsum("bhd,blhd->bhl", query, keys) / size**0.5
    seen = (jnp.arange(length) <= position)[None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jax.vmap(module.output_proj)(jnp.einsum("bhl,blhd->bhd", weights, values).reshape(batch, -1)), keys, values


# --- the decoder of many small arrays --------------------------------------------------------------------------

ScaledCaches = list[tuple[jax.Array, jax.Array, jax.Array]]


class ScaledDense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    group_scales: list[jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale
        for group in self.group_scales:
            scale = scale * group
        return x @ ((self.kernel - self.zero_point) * scale) + self.bias


class ScaledLayer(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    query: ScaledDense
    key: ScaledDense
    value: ScaledDense
    out: ScaledDense
    gate: ScaledDense
    up: ScaledDense
    down: ScaledDense


class ScaledDecoder(eqx.Module):
    embed: jax.Array
    layers: list[ScaledLayer]
    head: eqx.nn.Linear


def scaled_dense(source: Any) -> ScaledDense:
    arrays = (jnp.copy(leaf[...]) for leaf in (source.kernel, source.bias, source.scale, source.zero_point))
    return ScaledDense(*arrays, [jnp.copy(group[...]) for group in source.group_scales])


def scaled_decoder(source: models.ScaledDecoder) -> tuple[ScaledDecoder, ScaledCaches]:
    """The state beside it: for each layer keys, values and the position."""
    dense = ("query", "key", "value", "out", "gate", "up", "down")
    layers = [
        ScaledLayer(
            layer_norm(layer.norm1),
            layer_norm(layer.norm2),
            **{name: scaled_dense(getattr(layer, name)) for name in dense},
        )
        for layer in source.layers
    ]
    caches = [
        tuple(jnp.copy(leaf[...]) for leaf in (layer.cached_key, layer.cached_value, layer.cache_index))
        for layer in source.layers
    ]
    return ScaledDecoder(jnp.copy(source.embed.embedding[...]), layers, linear(source.head)), caches


def scaled_decoder_fn(model: ScaledDecoder, state: ScaledCaches, tokens: jax.Array) -> tuple[jax.Array, ScaledCaches]:
    x, written = model.embed[tokens], []
    for layer, (keys, values, index) in zip(model.layers, state, strict=True):
        h, length = jax.vmap(layer.norm1)(x), keys.shape[0]
        place = (index % length, 0)
        keys = jax.lax.dynamic_update_slice(keys, layer.key(h), place)
        values = jax.lax.dynamic_update_slice(values, layer.value(h), place)
        written.append((keys, values, index + 1))
        seen = (jnp.arange(length) <= index)[None, :]
        scores = jnp.where(seen, layer.query(h) @ keys.T / length**0.5, -1e9)
        x = x + layer.out(jax.nn.softmax(scores) @ values)
        h = jax.vmap(layer.norm2)(x)
        x = x + layer.down(jax.nn.silu(layer.gate(h)) * layer.up(h))
    return jax.vmap(model.head)(x), written
