"""The demo's training: the kinds of its model, its train step, what that measures, and the plan.

It is a separate file because two programs run it: the demo, and the process that the demo kills.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw
from statewise.examples.char_model import BatchStat, CharTransformer
from statewise.examples.text import CharText
from statewise.results import Measured

__all__ = ["EVERY", "KINDS", "PARTS", "Settings", "advance", "begin", "count", "cross_entropy", "measuring", "train"]

PARTS = 2  # the number of microbatches
EVERY = 100  # the number of steps from one that measures to the next

# The one declaration: which leaves are of which kind, and how each kind lives.
KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param),
    stats=sw.Kind(BatchStat),
    counter=sw.Kind(sw.Exactly(nnx.Variable)),
    cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, depends_on=("params", "stats")),
    rng=sw.Kind(nnx.RngState),
)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean loss in nats per character; logits (batch, length, alphabet), targets (batch, length)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def loss_of(model: CharTransformer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the loss on one part of a batch."""
    return cross_entropy(model(x), y)


# One step: the optimizer updates the parameters once; the model updates its statistics and dropout in each part.
train = sw.train_step(loss_of, microbatches=PARTS)
# The same, and measures each leaf.  Both take the same state.
measuring = sw.train_step(loss_of, microbatches=PARTS, measure=True)


@sw.step(writes="counter")
def count(model: CharTransformer) -> None:
    """Counts a training step: once for all parts of a batch, which `loss_of` could not."""
    model.steps[...] += 1


def advance(state: sw.State, number: int, x: Any, y: Any) -> tuple[sw.State, float, Measured | None]:
    """Trains one step, and counts it; every hundredth one measures.

    Args:
      state: the state.
      number: the number of the step, from 1 on.
      x: the characters of the batch.
      y: the characters after them.

    Returns:
      the state, the loss, and what was measured.
    """
    measured = None
    if number % EVERY == 0:
        state, (loss, measured) = measuring(state, x, y)
    else:
        state, loss = train(state, x, y)
    state, _ = count(state)
    return state, float(loss), measured


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of the demo; the defaults take about a minute on two idle cores.

    Attributes:
      steps: the number of training steps.
      batch: the number of text windows in a batch.
      window: the number of characters in a window.
      width, depth, heads: the sizes of the transformer.
      prompt: the start of the generated text.
      length: the length of the generated text, including the prompt; the cache holds two of them.
      seed: the seed of the parameters, the batches and the sampling.

    Example:
      >>> Settings(steps=100).steps
      100
    """

    steps: int = 800
    batch: int = 16
    window: int = 64
    width: int = 96
    depth: int = 2
    heads: int = 4
    prompt: str = "The built-in function "
    length: int = 64
    seed: int = 0


def begin(settings: Settings, text: CharText) -> tuple[CharTransformer, sw.Plan]:
    """Makes the model and its plan, which resolves the declaration for the model and its optimizer."""
    model = CharTransformer(
        len(text.alphabet),
        context=2 * settings.length,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        rngs=nnx.Rngs(settings.seed),
    )
    schedule = optax.cosine_onecycle_schedule(settings.steps, peak_value=1e-2, pct_start=0.1)
    return model, KINDS.plan(model, optimizers={"params": optax.adamw(schedule, b2=0.99)})
