"""The model of the MiniLM demo, the kinds of its state, and its steps: what to copy for a sentence encoder of your own.

The encoder is `names/bert.py`, with the published weights of all-MiniLM-L6-v2.  Beside it the model keeps the vectors
of the texts that it searches.  They are made from the weights: the declaration says so, and a search among vectors of
other weights is an error.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from statewise.examples.names import bert

__all__ = ["KINDS", "TRAINING", "Corpus", "SentenceEncoder", "Texts", "begin", "embed", "index", "search", "train"]

PARTS = 2  # the number of microbatches
SCALE = 20.0  # of cosines, in the loss


class Corpus(nnx.Variable):
    """The vectors of the texts that are searched."""


class SentenceEncoder(nnx.Module):
    """Maps texts to vectors of length 1, and finds texts that mean the same."""

    def __init__(self, config: bert.Config, texts: int, *, rngs: nnx.Rngs) -> None:
        self.bert = bert.Bert(config, rngs=rngs)
        self.corpus = Corpus(jnp.zeros((texts, config.hidden_size)))

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens and mask, both of shape (texts, length), to vectors of shape (texts, hidden_size)."""
        hidden = self.bert(tokens, mask).astype(jnp.float32)
        weights = mask.astype(jnp.float32)[..., None]
        mean = (hidden * weights).sum(1) / weights.sum(1)  # of the tokens that are not padding
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# The one declaration: the tables and the lower layers stay as they are published, the upper layers are trained.
LOWER = [sw.Path(f"bert/layers/{number}/**") for number in range(3)]
KINDS = sw.Kinds(
    base=sw.Kind([sw.Path("bert/*"), sw.Path("bert/norm/*"), *LOWER], frozen=True),
    params=sw.Kind(...),
    corpus=sw.Kind(Corpus, saved=False, restart=jnp.zeros_like, depends_on=("base", "params")),
)
# The same, computed in bfloat16; the weights, their gradients and the optimizer stay in float32.
TRAINING = KINDS.replace(
    base=dataclasses.replace(KINDS["base"], compute="bfloat16"),
    params=dataclasses.replace(KINDS["params"], compute="bfloat16"),
)


@sw.step
def embed(model: SentenceEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the vectors of texts."""
    return model(tokens, mask)


@sw.step(writes="corpus")
def index(model: SentenceEncoder, tokens: jax.Array, mask: jax.Array) -> None:
    """Makes the vectors of the texts that are searched."""
    model.corpus[...] = model(tokens, mask)


@sw.step
def search(model: SentenceEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the similarity of each text to each that is searched, of shape (texts, texts in the corpus)."""
    return model(tokens, mask) @ model.corpus[...].T


@sw.train_step(microbatches=PARTS)
def train(model: SentenceEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Trains on pairs, tokens and mask of shape (pairs, 2, length): each text finds its own among those of its part."""
    pairs, _, length = tokens.shape
    vectors = model(tokens.reshape(2 * pairs, length), mask.reshape(2 * pairs, length)).reshape(pairs, 2, -1)
    scores = SCALE * vectors[:, 0] @ vectors[:, 1].T
    own = jnp.arange(pairs)
    loss = optax.softmax_cross_entropy_with_integer_labels
    return (loss(scores, own).mean() + loss(scores.T, own).mean()) / 2


class Texts:
    """Turns texts into tokens and masks of one length, so that each step is compiled once."""

    def __init__(self, folder: Path, length: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length)

    def __call__(self, texts: list[str]) -> tuple[jax.Array, jax.Array]:
        """Returns tokens and mask, both of shape (texts, length)."""
        encoded = self.tokenizer.encode_batch(texts)
        tokens, mask = ([getattr(one, field) for one in encoded] for field in ("ids", "attention_mask"))
        return jnp.asarray(np.array(tokens)), jnp.asarray(np.array(mask))


def begin(folder: Path, texts: int, kinds: sw.Kinds, optimizers: Any = None) -> tuple[sw.Names, sw.Plan]:
    """Reads the configuration in a published folder.

    Args:
      folder: the folder.
      texts: the number of texts that are searched.
      kinds: the kinds of the plan.
      optimizers: its optimizers.

    Returns:
      what the leaves are called in the folder, and the plan of the model; no weight is made or read.
    """
    config = bert.Config.read(folder)
    model = nnx.eval_shape(lambda: SentenceEncoder(config, texts, rngs=nnx.Rngs(0)))
    # Names are a mapping from paths: those of the encoder, which is a part of this model.
    names = sw.Names({f"bert/{path}": name for path, name in bert.names(config).items()})
    return names, kinds.plan(model, optimizers=optimizers)
