"""ViT: an encoder of images, which are cut into patches.

It has the weights of `transformers.ViTModel` and `transformers.ViTForImageClassification`. From a folder as models are
published to hidden states, and back:

    config = Config.read(folder)
    plan = sw.plan(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))  # shapes only
    assert names(config).check(plan, folder).ok  # a dry run: reads no array
    state, report = sw.restore(folder, plan.abstract(), names=names(config), cast=True)
    logits = sw.step(lambda model, images: model.classify(model(images)))(state, images)
    sw.convert(state, "back", names=names(config), extra_files=[f"{folder}/config.json"])

Images have their channels last here. Published folders differ in a prefix `vit.` before each name, a pooler and a
classifier: `Config.read` finds in the files which they have.
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

__all__ = ["Config", "ViT", "names"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under their names in `config.json`; and what its files have."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    prefix: str = ""
    pooler: int = 0  # the size of its output; 0 if there is none
    classifier: int = 0  # the number of classes; 0 if there is none

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Config:
        """Reads the `config.json` of a folder, and the names in its files.

        Raises:
          ValueError: it has something that this model does not have.
        """
        path = pathlib.Path(folder, "config.json")
        given = json.loads(path.read_text(encoding="utf-8"))
        supported = {"model_type": ("vit",), "hidden_act": tuple(ACTIVATIONS), "pooler_act": ("tanh",)}
        for field, values in supported.items():
            if given.get(field) not in (None, *values):
                known = " or ".join(map(repr, values))
                raise ValueError(f"{path} has {field}={given[field]!r}, and this model has {known}.")
        for field in ("image_size", "patch_size"):
            if not isinstance(given.get(field), int | None):
                raise ValueError(f"{path} has {field}={given[field]!r}, and this model has one number: squares.")
        sizes: dict[str, int] = {}
        for file in path.parent.glob("*.safetensors"):
            with safetensors.safe_open(file, "numpy") as arrays:
                sizes |= {name: (arrays.get_slice(name).get_shape() or [1])[0] for name in arrays.keys()}  # noqa: SIM118
        prefix = "vit." if any(name.startswith("vit.") for name in sizes) else ""
        given |= {"prefix": prefix, "pooler": sizes.get(f"{prefix}pooler.dense.weight", 0)}
        given |= {"classifier": sizes.get("classifier.weight", 0)}
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: given[name] for name in fields if given.get(name) is not None})


def names(config: Config) -> sw.Names:
    """Returns what the leaves of `ViT` are called in a published folder."""
    embed, layer = config.prefix + "embeddings.", config.prefix + "encoder.layer.{i}."
    rows = {
        "first": sw.Name(embed + "cls_token", "1 1 d -> d"),
        "positions": sw.Name(embed + "position_embeddings", "1 p d -> p d"),
        "patches/kernel": sw.Name(embed + "patch_embeddings.projection.weight", "o i h w -> h w i o"),
        "patches/bias": embed + "patch_embeddings.projection.bias",
        "layers/{i}/attention_norm/scale": layer + "layernorm_before.weight",
        "layers/{i}/attention_norm/bias": layer + "layernorm_before.bias",
        "layers/{i}/q/kernel": sw.Name(layer + "attention.attention.query.weight", "(n h) d -> d n h"),
        "layers/{i}/k/kernel": sw.Name(layer + "attention.attention.key.weight", "(n h) d -> d n h"),
        "layers/{i}/v/kernel": sw.Name(layer + "attention.attention.value.weight", "(n h) d -> d n h"),
        "layers/{i}/q/bias": sw.Name(layer + "attention.attention.query.bias", "(n h) -> n h"),
        "layers/{i}/k/bias": sw.Name(layer + "attention.attention.key.bias", "(n h) -> n h"),
        "layers/{i}/v/bias": sw.Name(layer + "attention.attention.value.bias", "(n h) -> n h"),
        "layers/{i}/o/kernel": sw.Name(layer + "attention.output.dense.weight", "d (n h) -> n h d"),
        "layers/{i}/o/bias": layer + "attention.output.dense.bias",
        "layers/{i}/mlp_norm/scale": layer + "layernorm_after.weight",
        "layers/{i}/mlp_norm/bias": layer + "layernorm_after.bias",
        "layers/{i}/up/kernel": sw.Name(layer + "intermediate.dense.weight", "o i -> i o"),
        "layers/{i}/up/bias": layer + "intermediate.dense.bias",
        "layers/{i}/down/kernel": sw.Name(layer + "output.dense.weight", "o i -> i o"),
        "layers/{i}/down/bias": layer + "output.dense.bias",
        "norm/scale": config.prefix + "layernorm.weight",
        "norm/bias": config.prefix + "layernorm.bias",
        "pooler/kernel": sw.Name(config.prefix + "pooler.dense.weight", "o i -> i o"),
        "pooler/bias": config.prefix + "pooler.dense.bias",
        "classifier/kernel": sw.Name("classifier.weight", "o i -> i o"),
        "classifier/bias": "classifier.bias",
    }
    return sw.Names(rows)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each behind a norm and with a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        heads = (config.num_attention_heads, width // config.num_attention_heads)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.layer_norm_eps, use_fast_variance=False)
        self.activation = config.hidden_act
        self.attention_norm = norm(rngs=rngs)
        self.q = nnx.LinearGeneral(width, heads, use_bias=config.qkv_bias, rngs=rngs)
        self.k = nnx.LinearGeneral(width, heads, use_bias=config.qkv_bias, rngs=rngs)
        self.v = nnx.LinearGeneral(width, heads, use_bias=config.qkv_bias, rngs=rngs)
        self.o = nnx.LinearGeneral(heads, width, axis=(-2, -1), rngs=rngs)
        self.mlp_norm = norm(rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x of shape (batch, 1 + patches, hidden_size) to the same shape."""
        y = self.attention_norm(x)
        x = x + self.o(jax.nn.dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Maps each patch of an image, and a first token for the whole of it, to a vector.

    Example:
      >>> config = Config(8, 12, num_hidden_layers=2, num_attention_heads=2, image_size=6, patch_size=2)
      >>> model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
      >>> nnx.eval_shape(lambda model, images: model(images), model, jnp.zeros((3, 6, 6, 3))).shape
      (3, 10, 8)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, patch, count = config.hidden_size, config.patch_size, (config.image_size // config.patch_size) ** 2
        normal = jax.random.normal
        self.first = nnx.Param(0.02 * normal(rngs.params(), (width,)))
        self.positions = nnx.Param(0.02 * normal(rngs.params(), (1 + count, width)))
        self.patches = nnx.Conv(
            config.num_channels, width, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs
        )
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.pooler = nnx.Linear(width, config.pooler, rngs=rngs) if config.pooler else None
        self.classifier = nnx.Linear(width, config.classifier, rngs=rngs) if config.classifier else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape (batch, height, width, channels) to hidden states (batch, 1 + patches, hidden_size)."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # row by row
        first = jnp.broadcast_to(self.first[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...][None]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def pool(self, hidden: jax.Array) -> jax.Array:
        """Returns a vector for each image, from the hidden states."""
        assert self.pooler is not None, "the files have no pooler"
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def classify(self, hidden: jax.Array) -> jax.Array:
        """Returns logits of shape (batch, classes), from the hidden states."""
        assert self.classifier is not None, "the files have no classifier"
        return self.classifier(hidden[:, 0])
