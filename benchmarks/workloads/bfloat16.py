"""A transformer's train step in bfloat16: by its layers' own arithmetic, or by `Kind(compute=)` and in microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw
from benchmarks import models
from benchmarks.case import Case, training
from benchmarks.compare import check, table, time_calls
from benchmarks.measure import Settings, timed

__all__ = ["WAYS", "microbatches", "transformer_case"]

Tables = list[dict[str, Any]]


def transformer_case(width: int, depth: int, batch: int, length: int, heads: int, dtype: Any = jnp.bfloat16) -> Case:
    """A transformer with bfloat16 arithmetic and float32 parameters, under AdamW."""
    vocabulary = 64 if width < 256 else 32768
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)

    def build() -> nnx.Module:
        return models.Transformer(width, depth, heads, vocabulary, dropout=0.0, dtype=dtype, rngs=nnx.Rngs(0))

    return training(
        build,
        _cross_entropy_in_float32,
        (tokens[:, :-1], tokens[:, 1:]),
        optax.adamw(1e-4),
        donate=True,
        tolerance=2e-2,  # bfloat16 keeps eight bits
    )


def _cross_entropy_in_float32(model: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens).astype(jnp.float32), labels).mean()


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "compute": ('Statewise, float32 parameters with `compute="bfloat16"`', {}),
    "microbatches": ("the same, `train_step(microbatches=4)`", {"microbatches": 4}),
}


def microbatches(settings: Settings) -> Tables:
    """The train step of a transformer with `Kind(compute=)`: its batch in one part, and in four."""
    width, depth, batch, length, heads = (32, 1, 4, 8, 2) if settings.quick else (1024, 4, 8, 1024, 16)
    small = (32, 1, 4, 8, 2) if settings.quick else (64, 2, 4, 16, 2)
    calls = _ways(width, depth, batch, length, heads)
    firsts, outputs = {}, {}
    for way, call in calls.items():
        firsts[way], loss = timed(call)
        outputs[way] = [float(loss), *(float(call()) for _ in range(settings.check_steps - 1))]
    # A loss of bfloat16 products, summed in another order.
    worst = {way: check(way, found, outputs["compute"], 2e-2) for way, found in outputs.items()}
    apart = _apart(small, settings)
    rows = time_calls(calls, "compute", settings)
    made = [
        {
            **{"key": way, "label": WAYS[way][0], **rows[way], "first_call_s": firsts[way]},
            **{"difference": worst[way], "difference_to_cpu": apart[way]},
        }
        for way in calls
    ]
    title = f'A transformer with `Kind(compute="bfloat16")`, {batch} x {length} tokens, AdamW'
    return [table("transformer_microbatches", title, made, per="step", reference="compute")]


def _ways(width: int, depth: int, batch: int, length: int, heads: int) -> dict[str, Callable[[], Any]]:
    """By way, the call of one train step, each on a state of its own."""
    case = transformer_case(width, depth, batch, length, heads, dtype=None)
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, compute="bfloat16"))
    model = case.build()
    plan = kinds.plan(model, optimizers={"params": case.tx})

    def call_of(options: dict[str, Any]) -> Callable[[], Any]:
        state, step = plan.take(model), sw.train_step(case.programs["train"].fn, **options)

        def train(*args: Any) -> Any:
            nonlocal state
            state, loss = step(state, *args)
            return loss

        return case.loop(lambda name: train)

    return {way: call_of(options) for way, (_, options) in WAYS.items()}


def _apart(small: tuple[int, int, int, int, int], settings: Settings) -> dict[str, float]:
    """By way, how far the losses of a small model on the device are from those on the CPU."""
    losses = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            ways = _ways(*small)
            losses.append({way: [float(call()) for _ in range(settings.check_steps)] for way, call in ways.items()})
    return {way: check(f"{way}, device and CPU", losses[0][way], losses[1][way], 2e-1) for way in WAYS}
