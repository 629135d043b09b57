"""Many steps in one program: `jax.lax.scan` over a step, against a call for each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import Call, Case
from benchmarks.compare import array_count, check, fresh, table, time_calls
from benchmarks.machine import order
from benchmarks.measure import Settings, timed
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.by_hand_buffer import ByHandBuffer
from benchmarks.styles.flax_nnx import Nnx
from benchmarks.styles.ours import Ours
from benchmarks.workloads.train import many_small_case

__all__ = ["scan"]

LABELS = {
    "scan": "Statewise, 16 steps in one `jax.lax.scan`",
    "packed-scan": "Statewise, `pack=True`, 16 steps in one `jax.lax.scan`",
    "by-hand-scan": "`jax.lax.scan` by hand: flat lists, donated",
    "by-hand-buffer-scan": "`jax.lax.scan` by hand: one flat buffer, donated",
    "steps": "Statewise, a call for each step",
    "by-hand": "`jax.jit` by hand: flat lists, donated, a call for each step",
    "nnx.jit_partial": "`nnx.jit_partial(graph=False)`, a call for each step",
}


def scan(settings: Settings, steps: int = 16, blocks: int | None = None) -> list[dict[str, Any]]:
    case = many_small_case(blocks or (12 if settings.quick else 160))
    copy = fresh(case)
    x = jax.random.normal(jax.random.key(2), (steps, 8, 8))
    batches = (x, jnp.sin(x))
    rows = [(x[number], jnp.sin(x[number])) for number in range(steps)]
    many_small_case(1).loop(Ours(many_small_case(1), many_small_case(1).build()).program)()  # warm JAX's own caches
    makers = {
        "scan": _ours_scan,
        "packed-scan": functools.partial(_ours_scan, pack=True),
        "by-hand-scan": _hand_scan,
        "by-hand-buffer-scan": functools.partial(_hand_scan, way=ByHandBuffer),
        "steps": _ours_steps,
        "by-hand": _hand_steps,
        "nnx.jit_partial": _partial_steps,
    }
    calls: dict[str, Call] = {}
    firsts, outputs = {}, {}
    for key in order(makers):
        calls[key] = makers[key](case, copy(), batches if key.endswith("scan") else rows)
        firsts[key], losses = timed(calls[key])
        outputs[key] = list(np.asarray(losses))
    worst = {key: check(key, found, outputs["scan"], case.tolerance) for key, found in outputs.items()}
    numbers = time_calls({key: calls[key] for key in makers}, "scan", settings, per_call=steps)
    made = [
        {"key": key, "label": LABELS[key], **numbers[key], "first_call_s": firsts[key], "difference": worst[key]}
        for key in makers
    ]
    title = f"{steps} train steps on many small leaves"
    return [table("scan", title, made, per="step", reference="scan", steps=steps, **array_count(case))]


def _ours_scan(case: Case, model: Any, batches: Any, pack: bool = False) -> Call:
    style = Ours(case, model, pack=pack)
    step = style.step("train")
    run = jax.jit(lambda state, data: jax.lax.scan(lambda s, b: step(s, *b), state, data), donate_argnums=0)

    def call() -> Any:
        style.state, losses = run(style.state, batches)
        return losses

    return call


def _hand_scan(case: Case, model: Any, batches: Any, way: type[ByHand] = ByHand) -> Call:
    style = way(case, model)
    train = style.train_fn(case.programs["train"])

    def body(carry: Any, batch: Any) -> Any:
        *carry, loss = train(*carry, *batch)
        return carry, loss

    run = jax.jit(lambda carry, data: jax.lax.scan(body, carry, data), donate_argnums=0)
    carry: Any = [style.params, style.moments, style.rest]

    def call() -> Any:
        nonlocal carry
        carry, losses = run(carry, batches)
        return losses

    return call


def _ours_steps(case: Case, model: Any, rows: Any) -> Call:
    return _calls(Ours(case, model).program("train"), rows)


def _hand_steps(case: Case, model: Any, rows: Any) -> Call:
    return _calls(ByHand(case, model).program("train"), rows)


def _partial_steps(case: Case, model: Any, rows: Any) -> Call:
    return _calls(Nnx(case, model, variant="partial").program("train"), rows)


def _calls(train: Call, rows: Any) -> Call:
    return lambda: [train(*row) for row in rows]
