"""The first call, in turns: seconds to trace and lower a train step, and to compile it, with nothing of it cached.

The tables of the other workloads have one first call of each way.  One is not enough to tell 1.0 from 1.1: the same
program takes XLA 6 to 9 seconds.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.case import Case
from benchmarks.compare import check, fresh, numbers_of, table
from benchmarks.measure import Settings, timed
from benchmarks.styles import LABELS, OURS
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.by_hand_traced import ByHandTraced
from benchmarks.styles.ours import Ours
from benchmarks.workloads.train import many_small_case

__all__ = ["WAYS", "first"]

WAYS = {OURS: Ours, "by-hand": ByHand, "by-hand-traced": ByHandTraced}
TITLES = {
    **{key: LABELS[key] for key in (OURS, "by-hand")},
    "by-hand-traced": "the same, the function traced before it is differentiated",
}
BLOCKS = 200


def first(settings: Settings, blocks: int | None = None) -> list[dict[str, Any]]:
    """Two tables: tracing and lowering alone, and all of a first call but the run."""
    blocks = blocks or (2 if settings.quick else BLOCKS)
    rounds = 2 if settings.quick else 11
    lowered: dict[str, list[float]] = {key: [] for key in WAYS}
    whole: dict[str, list[float]] = {key: [] for key in WAYS}
    with _without_a_cache():
        worst = _differences(many_small_case(1))
        case = many_small_case(blocks)
        copy = fresh(case)
        for _ in range(rounds):
            for key in random.sample(list(WAYS), len(WAYS)):
                jax.clear_caches()
                tracing, compiling = _first(WAYS[key](case, copy()))
                lowered[key].append(tracing)
                whole[key].append(tracing + compiling)
    title = f"{blocks} blocks of width 8: "
    return [
        _table("first_lowered", title + "tracing and lowering", lowered, worst),
        _table("first_whole", title + "tracing, lowering and compiling", whole, worst),
    ]


def _differences(case: Case) -> dict[str, float]:
    """The largest difference of each way's first three losses from ours."""
    calls = {key: case.loop(way(case, case.build()).program) for key, way in WAYS.items()}
    losses = {key: [np.asarray(call()) for _ in range(3)] for key, call in calls.items()}
    return {key: check(key, found, losses[OURS], case.tolerance) for key, found in losses.items()}


def _table(
    key: str, title: str, samples: Mapping[str, Sequence[float]], difference: Mapping[str, float]
) -> dict[str, Any]:
    numbers = numbers_of(samples, OURS)
    rows = [{"key": way, "label": TITLES[way], **numbers[way], "difference": difference[way]} for way in WAYS]
    return table(key, title, rows, per="call", reference=OURS)


@contextlib.contextmanager
def _without_a_cache() -> Iterator[None]:
    """Lets no program be read from the disk, whatever the environment says.

    JAX decides once whether it uses its cache, at its first compilation: it has to decide again.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _first(way: Any) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile."""
    x = jax.random.normal(jax.random.key(1), (8, 8))
    args = (x, jnp.sin(x))
    gc.collect()
    gc.freeze()  # what was there before is not walked over
    try:
        tracing, lowered = timed(lambda: way.lower("train", *args))
        compiling, _ = timed(lowered.compile)
    finally:
        gc.unfreeze()
    return tracing, compiling
