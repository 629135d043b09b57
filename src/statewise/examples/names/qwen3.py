"""Qwen 3, dense: as Llama, with a norm for each head of queries and keys, whose size does not follow from the width.

It has the weights of `transformers.Qwen3ForCausalLM`. From a folder as models are published to logits, and back:

    config = Config.read(folder)
    plan = sw.plan(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))  # shapes only
    assert names(config).check(plan, folder).ok  # a dry run: reads no array
    state, report = sw.restore(folder, plan.abstract(), names=names(config), cast=True)
    forward = sw.step(lambda model, tokens: model(tokens))
    logits = forward(state, tokens)
    sw.convert(state, "back", names=names(config), extra_files=[f"{folder}/config.json"])

`cast=True` reads bfloat16 files into float32. `plan.abstract().cast(params="bfloat16")` keeps bfloat16, and then the
model computes in it. `plan.abstract(mesh)` puts each array where the mesh has it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw

__all__ = ["Config", "Qwen3", "names"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under their names in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Config:
        """Reads the `config.json` of a folder.

        Raises:
          ValueError: it has something that this model does not have.
        """
        path = pathlib.Path(folder, "config.json")
        given = json.loads(path.read_text(encoding="utf-8"))
        # New files have all about positions in `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
        rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})
        given = {"rope_type": rope.get("type", "default")} | given | rope
        supported: dict[str, tuple[object, ...]] = {"model_type": ("qwen3",), "hidden_act": ("silu",)}
        supported |= {"rope_type": ("default",), "use_sliding_window": (False,)}
        for field, values in supported.items():
            if given.get(field) not in (None, *values):
                known = " or ".join(map(repr, values))
                raise ValueError(f"{path} has {field}={given[field]!r}, and this model has {known}.")
        sizes = {"num_key_value_heads": given["num_attention_heads"], "head_dim": 128}
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**sizes | {name: given[name] for name in fields if given.get(name) is not None})


def names(config: Config) -> sw.Names:
    """Returns what the leaves of `Qwen3` are called in a published folder."""
    rows = {
        "embed": "model.embed_tokens.weight",
        "layers/{i}/attention_norm/scale": "model.layers.{i}.input_layernorm.weight",
        "layers/{i}/q/kernel": sw.Name("model.layers.{i}.self_attn.q_proj.weight", "(n h) d -> d n h"),
        "layers/{i}/k/kernel": sw.Name("model.layers.{i}.self_attn.k_proj.weight", "(n h) d -> d n h"),
        "layers/{i}/v/kernel": sw.Name("model.layers.{i}.self_attn.v_proj.weight", "(n h) d -> d n h"),
        "layers/{i}/o/kernel": sw.Name("model.layers.{i}.self_attn.o_proj.weight", "d (n h) -> n h d"),
        "layers/{i}/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
        "layers/{i}/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
        "layers/{i}/q/bias": sw.Name("model.layers.{i}.self_attn.q_proj.bias", "(n h) -> n h"),
        "layers/{i}/k/bias": sw.Name("model.layers.{i}.self_attn.k_proj.bias", "(n h) -> n h"),
        "layers/{i}/v/bias": sw.Name("model.layers.{i}.self_attn.v_proj.bias", "(n h) -> n h"),
        "layers/{i}/o/bias": "model.layers.{i}.self_attn.o_proj.bias",
        "layers/{i}/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
        "layers/{i}/gate/kernel": sw.Name("model.layers.{i}.mlp.gate_proj.weight", "o i -> i o"),
        "layers/{i}/up/kernel": sw.Name("model.layers.{i}.mlp.up_proj.weight", "o i -> i o"),
        "layers/{i}/down/kernel": sw.Name("model.layers.{i}.mlp.down_proj.weight", "o i -> i o"),
        "norm/scale": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        rows["head/kernel"] = sw.Name("lm_head.weight", "v d -> d v")
    return sw.Names(rows)


def rotate(x: jax.Array, config: Config) -> jax.Array:
    """Rotates each head of x, of shape (batch, length, heads, head_dim), by its position.

    The pairs that rotate are the two halves of a head (https://arxiv.org/abs/2104.09864).
    """
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angle = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), frequency)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One layer: causal attention, then a gated MLP, each behind a norm and with a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.config, width, inner = config, config.hidden_size, config.intermediate_size
        queries, shared = (config.num_attention_heads, config.head_dim), (config.num_key_value_heads, config.head_dim)
        bias: dict[str, Any] = {"use_bias": config.attention_bias, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs)
        self.q = nnx.LinearGeneral(width, queries, **bias)
        self.k = nnx.LinearGeneral(width, shared, **bias)
        self.v = nnx.LinearGeneral(width, shared, **bias)
        self.o = nnx.LinearGeneral(queries, width, axis=(-2, -1), **bias)
        self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, rngs=rngs)
        self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs)
        self.gate = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x of shape (batch, length, hidden_size) to the same shape."""
        y = self.attention_norm(x)
        q, k = self.q_norm(self.q(y)), self.k_norm(self.k(y))  # the norms are of each head
        q, k = rotate(q, self.config), rotate(k, self.config)
        # Several query heads share each head of k and v.
        x = x + self.o(jax.nn.dot_product_attention(q, k, self.v(y), is_causal=True))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Qwen3(nnx.Module):
    """Predicts each next token from those before it.

    Example:
      >>> config = Config(32, 8, 16, 2, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
      >>> model = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
      >>> nnx.eval_shape(lambda model, tokens: model(tokens), model, jnp.zeros((3, 5), int)).shape
      (3, 5, 32)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # An `nnx.Embed` computes in the dtype that it was made with; this, in that of the values that were restored.
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)))
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens of shape (batch, length) to logits of shape (batch, length, vocab_size)."""
        x = self.embed[tokens]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x @ self.embed[...].T if self.config.tie_word_embeddings else self.head(x)
