"""How cost grows with the model: with all its leaves touched, and with one small kind touched."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.case import Call, Case, EqxCase, Program
from benchmarks.compare import check, compare, table, time_calls
from benchmarks.measure import Settings, timed
from benchmarks.styles import BUFFER, LABELS, STYLES
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.flax_nnx import Nnx
from benchmarks.styles.ours import Ours
from benchmarks.twins import twin

__all__ = ["leaves", "small_kind", "sweep_case"]

Tables = list[dict[str, Any]]


# --- every leaf touched ----------------------------------------------------------------------------------------


def decay(model: Any, x: jax.Array) -> jax.Array:
    """One elementwise update of each leaf: hardly any arithmetic, and quick to compile at any number of leaves.

    The raw value is set: `vector[...] = ` asks a traced array for its sharding, which JAX answers with an error
    that it looks up in all equations so far; at 20,000 leaves that alone takes an hour, for every rival alike.
    """
    vectors = model.vectors()
    for vector in vectors:
        vector.set_raw_value(0.9 * vector.get_raw_value() + x)
    return vectors[0].get_raw_value().sum()


def decay_eqx(model: Any, state: None, x: jax.Array) -> tuple[jax.Array, Any]:
    moved = [0.9 * vector + x for vector in model.vectors]
    return moved[0].sum(), type(model)(moved)


def sweep_case(count: int) -> Case:
    def loop(program: Any) -> Call:
        step = program("decay")
        x = jnp.full(8, 0.01)
        return lambda: step(x)

    return Case(
        lambda: models.Vectors(count),
        {"decay": Program(decay, writes="params", eqx=decay_eqx)},
        loop,
        eqx=EqxCase(twin("vectors")),
        tiny=lambda: sweep_case(2),
    )


# At 20,000 leaves every rival takes most of a minute to compile, and packed it takes many.
AT_MOST_2000 = ("statewise-packed", "nnx.cached_partial", "jax.jit-graphdef", "nnx.jit-tree", "equinox-flat")


def leaves(settings: Settings, counts: tuple[int, ...] = ()) -> Tables:
    counts = counts or ((20, 200) if settings.quick else (20, 200, 2000, 20000))
    tables = []
    for count in counts:
        names = [name for name in STYLES if name != BUFFER and (count <= 2000 or name not in AT_MOST_2000)]
        mine = settings if count <= 2000 else dataclasses.replace(settings, rounds=(5, 15))
        title = f"{count:,} leaves, each read and written"
        tables.append(compare(sweep_case(count), mine, key=f"leaves_{count}", title=title, names=names, leaves=count))
    return tables


# --- one small kind touched ------------------------------------------------------------------------------------


def bump(model: Any, x: jax.Array) -> jax.Array:
    for counter in model.counters:
        counter[...] += x
    return model.counters[0][...].sum()


def small_case(count: int) -> Case:
    def loop(program: Any) -> Call:
        step = program("bump")
        x = jnp.ones(())
        return lambda: step(x)

    return Case(lambda: models.Gates(count), {"bump": Program(bump, writes="variables")}, loop)


def small_kind(settings: Settings, counts: tuple[int, ...] = ()) -> Tables:
    counts = counts or ((200, 2000) if settings.quick else (200, 20000))
    return [_steps(settings, counts), _restarts(settings, counts)]


def _steps(settings: Settings, counts: tuple[int, ...]) -> dict[str, Any]:
    """Ours, `jax.jit` over all leaves, and NNX's own: in the small model and in the large one."""
    styles = {
        "statewise": Ours,
        "by-hand": ByHand,
        "nnx.jit_partial": functools.partial(Nnx, variant="partial"),
        "nnx.jit": Nnx,
    }
    named = {**LABELS, "by-hand": "`jax.jit` by hand, all leaves passed"}
    calls: dict[str, Call] = {}
    labels, firsts = {}, {}
    for count in counts:
        case = small_case(count)
        for name, style in styles.items():
            if name == "nnx.jit" and count > 2000:
                continue  # a second for each call, which tells nothing more
            key = f"{name}-{count}"
            labels[key] = f"{named[name]}, {count:,} leaves"
            calls[key] = case.loop(style(case, case.build()).program)
            firsts[key], _ = timed(calls[key])
    reference = f"statewise-{counts[0]}"
    outputs = {key: [np.asarray(call()) for _ in range(settings.check_steps)] for key, call in calls.items()}
    worst = {key: check(key, found, outputs[reference], 1e-6) for key, found in outputs.items()}
    rows = time_calls(calls, reference, settings)
    made = [
        {"key": key, "label": labels[key], **rows[key], "first_call_s": firsts[key], "difference": worst[key]}
        for key in calls
    ]
    title = "A step that reads and writes five small leaves"
    return table("small_kind", title, made, per="step", reference=reference, counts=list(counts))


def _restarts(settings: Settings, counts: tuple[int, ...]) -> dict[str, Any]:
    calls: dict[str, Call] = {}
    labels = {}
    for count in counts:
        case = small_case(count)
        calls[f"restart-{count}"] = _restart(Ours(case, case.build()))
        labels[f"restart-{count}"] = f'`state.restart("cache")`, {count:,} leaves'
    reference = f"restart-{counts[0]}"
    rows = time_calls(calls, reference, settings)
    made = [{"key": key, "label": labels[key], **rows[key]} for key in calls]
    title = "A restart of five small leaves"
    return table("restart", title, made, per="restart", reference=reference, counts=list(counts))


def _restart(style: Ours) -> Call:
    def call() -> Any:
        style.state = style.state.restart("cache")
        return style.state.part("cache").arrays

    return call
