"""BERT: an encoder with learned positions and token types, whose norms follow the residual connections.

It has the weights of `transformers.BertModel`: BERT, MiniLM and the sentence encoders of this form, such as
all-MiniLM-L6-v2. From a folder as models are published to hidden states, and back:

    config = Config.read(folder)
    plan = sw.plan(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))  # shapes only
    assert names(config).check(plan, folder).ok  # a dry run: reads no array
    state, report = sw.restore(folder, plan.abstract(), names=names(config), cast=True)
    hidden = sw.step(lambda model, tokens, mask: model(tokens, mask))(state, tokens, mask)
    sw.convert(state, "back", names=names(config), extra_files=[f"{folder}/config.json"])

Published folders differ in three ways, which `Config.read` finds in the files: a prefix `bert.` before each name; a
pooler, or none; and, in the oldest, norms with `gamma` and `beta`. What this model does not have, such as the heads of
pretraining, is not read; the report of the restore lists it as dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import safetensors
from flax import nnx

import statewise as sw

__all__ = ["Bert", "Config", "names"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under their names in `config.json`; and what its files have."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    prefix: str = ""
    pooler: bool = True
    norm: tuple[str, str] = ("weight", "bias")  # what the scale and the bias of a norm are called

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Config:
        """Reads the `config.json` of a folder, and the names in its files.

        Raises:
          ValueError: it has something that this model does not have.
        """
        path = pathlib.Path(folder, "config.json")
        given = json.loads(path.read_text(encoding="utf-8"))
        supported = {
            "model_type": ("bert",),
            "hidden_act": tuple(ACTIVATIONS),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
        }
        for field, values in supported.items():
            if given.get(field) not in (None, *values):
                known = " or ".join(map(repr, values))
                raise ValueError(f"{path} has {field}={given[field]!r}, and this model has {known}.")
        found: set[str] = set()
        for file in path.parent.glob("*.safetensors"):
            with safetensors.safe_open(file, "numpy") as arrays:
                found.update(arrays.keys())
        prefix = "bert." if any(name.startswith("bert.") for name in found) else ""
        given |= {"prefix": prefix, "pooler": f"{prefix}pooler.dense.weight" in found}
        if f"{prefix}embeddings.LayerNorm.gamma" in found:
            given["norm"] = ("gamma", "beta")
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: given[name] for name in fields if given.get(name) is not None})


def names(config: Config) -> sw.Names:
    """Returns what the leaves of `Bert` are called in a published folder."""
    embed, layer = config.prefix + "embeddings.", config.prefix + "encoder.layer.{i}."
    scale, bias = config.norm
    rows = {
        "words": embed + "word_embeddings.weight",
        "positions": embed + "position_embeddings.weight",
        "types": embed + "token_type_embeddings.weight",
        "norm/scale": f"{embed}LayerNorm.{scale}",
        "norm/bias": f"{embed}LayerNorm.{bias}",
        "layers/{i}/q/kernel": sw.Name(layer + "attention.self.query.weight", "(n h) d -> d n h"),
        "layers/{i}/k/kernel": sw.Name(layer + "attention.self.key.weight", "(n h) d -> d n h"),
        "layers/{i}/v/kernel": sw.Name(layer + "attention.self.value.weight", "(n h) d -> d n h"),
        "layers/{i}/q/bias": sw.Name(layer + "attention.self.query.bias", "(n h) -> n h"),
        "layers/{i}/k/bias": sw.Name(layer + "attention.self.key.bias", "(n h) -> n h"),
        "layers/{i}/v/bias": sw.Name(layer + "attention.self.value.bias", "(n h) -> n h"),
        "layers/{i}/o/kernel": sw.Name(layer + "attention.output.dense.weight", "d (n h) -> n h d"),
        "layers/{i}/o/bias": layer + "attention.output.dense.bias",
        "layers/{i}/attention_norm/scale": f"{layer}attention.output.LayerNorm.{scale}",
        "layers/{i}/attention_norm/bias": f"{layer}attention.output.LayerNorm.{bias}",
        "layers/{i}/up/kernel": sw.Name(layer + "intermediate.dense.weight", "o i -> i o"),
        "layers/{i}/up/bias": layer + "intermediate.dense.bias",
        "layers/{i}/down/kernel": sw.Name(layer + "output.dense.weight", "o i -> i o"),
        "layers/{i}/down/bias": layer + "output.dense.bias",
        "layers/{i}/mlp_norm/scale": f"{layer}output.LayerNorm.{scale}",
        "layers/{i}/mlp_norm/bias": f"{layer}output.LayerNorm.{bias}",
        "pooler/kernel": sw.Name(config.prefix + "pooler.dense.weight", "o i -> i o"),
        "pooler/bias": config.prefix + "pooler.dense.bias",
    }
    return sw.Names(rows)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each with a residual connection and a norm after it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        heads = (config.num_attention_heads, width // config.num_attention_heads)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.layer_norm_eps, use_fast_variance=False)
        self.activation = config.hidden_act
        self.q = nnx.LinearGeneral(width, heads, rngs=rngs)
        self.k = nnx.LinearGeneral(width, heads, rngs=rngs)
        self.v = nnx.LinearGeneral(width, heads, rngs=rngs)
        self.o = nnx.LinearGeneral(heads, width, axis=(-2, -1), rngs=rngs)
        self.attention_norm = norm(rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.mlp_norm = norm(rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x of shape (batch, length, hidden_size) to the same shape; mask as in `Bert`."""
        # Every position attends to those that are not padding: the mask is of shape (batch, heads, queries, keys).
        attended = jax.nn.dot_product_attention(self.q(x), self.k(x), self.v(x), mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.o(attended))
        return self.mlp_norm(x + self.down(ACTIVATIONS[self.activation](self.up(x))))


class Bert(nnx.Module):
    """Maps each token to a vector that depends on all of them.

    Example:
      >>> config = Config(32, 8, 12, num_hidden_layers=2, num_attention_heads=2)
      >>> model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
      >>> nnx.eval_shape(lambda model, tokens: model(tokens), model, jnp.zeros((3, 5), int)).shape
      (3, 5, 8)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, normal = config.hidden_size, jax.random.normal
        self.words = nnx.Param(0.02 * normal(rngs.params(), (config.vocab_size, width)))
        self.positions = nnx.Param(0.02 * normal(rngs.params(), (config.max_position_embeddings, width)))
        self.types = nnx.Param(0.02 * normal(rngs.params(), (config.type_vocab_size, width)))
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.pooler = nnx.Linear(width, width, rngs=rngs) if config.pooler else None

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None) -> jax.Array:
        """Returns the hidden states, of shape (batch, length, hidden_size).

        Args:
          tokens: integers of shape (batch, length).
          mask: of that shape; zero or False where there is padding. None if there is none.
          types: the number of each token's segment, of that shape. None if all are 0.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.norm(self.words[tokens] + self.types[types] + self.positions[: tokens.shape[1]][None])
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def pool(self, hidden: jax.Array) -> jax.Array:
        """Returns a vector for each text, of shape (batch, hidden_size), from the hidden states."""
        assert self.pooler is not None, "the files have no pooler"
        return jnp.tanh(self.pooler(hidden[:, 0]))
