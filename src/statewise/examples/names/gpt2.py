"""GPT-2: a decoder with learned positions, whose layers are stacked and run by one scan.

It has the weights of `transformers.GPT2LMHeadModel` and of the folders published as gpt2, gpt2-medium and so on. Each
array of our layers is the same array of all of theirs, stacked; q, k and v are one array there, and stay one here. From
a folder as models are published to logits, and back:

    config = Config.read(folder)
    plan = sw.plan(nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0))))  # shapes only
    assert names(config).check(plan, folder).ok  # a dry run: reads no array
    state, report = sw.restore(folder, plan.abstract(), names=names(config), cast=True)
    logits = sw.step(lambda model, tokens: model(tokens))(state, tokens)
    sw.convert(state, "back", names=names(config), extra_files=[f"{folder}/config.json"])

The published folders also have causal masks, `h.0.attn.bias`. They are constants, no leaf is read from them, and the
report of the restore lists them as dropped.
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

__all__ = ["GPT2", "Config", "names"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under their names in `config.json`; and what comes before each name in the files."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    prefix: str = ""

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Config:
        """Reads the `config.json` of a folder, and the names in its files: all have the prefix `transformer.`, or none.

        Raises:
          ValueError: it has something that this model does not have.
        """
        path = pathlib.Path(folder, "config.json")
        given = json.loads(path.read_text(encoding="utf-8"))
        supported = {
            "model_type": ("gpt2",),
            "activation_function": tuple(ACTIVATIONS),
            "tie_word_embeddings": (True,),
            "add_cross_attention": (False,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        }
        for field, values in supported.items():
            if given.get(field) not in (None, *values):
                known = " or ".join(map(repr, values))
                raise ValueError(f"{path} has {field}={given[field]!r}, and this model has {known}.")
        if given.get("n_inner") is None:
            given["n_inner"] = 4 * given["n_embd"]
        given["prefix"] = ""
        for file in path.parent.glob("*.safetensors"):
            with safetensors.safe_open(file, "numpy") as arrays:
                if any(name.startswith("transformer.") for name in arrays.keys()):  # noqa: SIM118 - not a mapping
                    given["prefix"] = "transformer."
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: given[name] for name in fields if given.get(name) is not None})


def names(config: Config) -> sw.Names:
    """Returns what the leaves of `GPT2` are called in a published folder; layers, `{i}` there, are stacked here."""
    layer = config.prefix + "h.{i}."
    rows = {
        "embed": config.prefix + "wte.weight",
        "positions": config.prefix + "wpe.weight",
        "layers/attention_norm/scale": layer + "ln_1.weight",
        "layers/attention_norm/bias": layer + "ln_1.bias",
        # c is q, k and v.  Their kernels are of a layer named Conv1D, and have the inputs first, as ours do.
        "layers/qkv/kernel": sw.Name(layer + "attn.c_attn.weight", "layer d (c n h) -> layer d c n h"),
        "layers/qkv/bias": sw.Name(layer + "attn.c_attn.bias", "layer (c n h) -> layer c n h"),
        "layers/o/kernel": sw.Name(layer + "attn.c_proj.weight", "layer (n h) d -> layer n h d"),
        "layers/o/bias": layer + "attn.c_proj.bias",
        "layers/mlp_norm/scale": layer + "ln_2.weight",
        "layers/mlp_norm/bias": layer + "ln_2.bias",
        "layers/up/kernel": layer + "mlp.c_fc.weight",
        "layers/up/bias": layer + "mlp.c_fc.bias",
        "layers/down/kernel": layer + "mlp.c_proj.weight",
        "layers/down/bias": layer + "mlp.c_proj.bias",
        "norm/scale": config.prefix + "ln_f.weight",
        "norm/bias": config.prefix + "ln_f.bias",
    }
    return sw.Names(rows)


class Block(nnx.Module):
    """One layer: causal attention, then an MLP, each behind a norm and with a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, heads = config.n_embd, (config.n_head, config.n_embd // config.n_head)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.layer_norm_epsilon, use_fast_variance=False)
        self.activation = config.activation_function
        self.attention_norm = norm(rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, *heads), rngs=rngs)
        self.o = nnx.LinearGeneral(heads, width, axis=(-2, -1), rngs=rngs)
        self.mlp_norm = norm(rngs=rngs)
        self.up = nnx.Linear(width, config.n_inner, rngs=rngs)
        self.down = nnx.Linear(config.n_inner, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x of shape (batch, length, n_embd) to the same shape."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), -3, 0)
        x = x + self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.mlp_norm(x))))


class GPT2(nnx.Module):
    """Predicts each next token from those before it.

    Example:
      >>> config = Config(32, n_positions=16, n_embd=8, n_layer=3, n_head=2, n_inner=12)
      >>> model = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
      >>> model.layers.qkv.kernel.shape  # of 3 layers
      (3, 8, 3, 2, 4)
      >>> nnx.eval_shape(lambda model, tokens: model(tokens), model, jnp.zeros((4, 5), int)).shape
      (4, 5, 32)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.n_embd)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.n_positions, config.n_embd)))
        make = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)), transform_metadata={nnx.PARTITION_NAME: None})
        self.layers = make(jax.random.split(rngs.params(), config.n_layer))
        self.norm = nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens of shape (batch, length) to logits of shape (batch, length, vocab_size)."""
        x = self.embed[tokens] + self.positions[: tokens.shape[1]][None]
        x = sw.scan_layers(Block.__call__, self.layers, x)
        return self.norm(x) @ self.embed[...].T  # the embedding is the head, too
