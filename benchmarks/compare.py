"""One case, all rivals: check what they compute, time their first calls, then time them in turns.

The result is a table: plain data, one row for each rival, with seconds, ratios to the row of reference, and what
was left out and why.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.case import Call, Case
from benchmarks.machine import order
from benchmarks.measure import Settings, interleave, quartiles, stats, timed
from benchmarks.styles import BUFFER, LABELS, OURS, STYLES, why_not

__all__ = ["WrongResultError", "array_count", "check", "compare", "fresh", "numbers_of", "table", "time_calls"]

LeafSpec = dict[str, Any]


class WrongResultError(Exception):
    """A rival computes something else than ours: its time would mean nothing."""


def fresh(case: Case) -> Callable[[], Any]:
    """Makes copies of one model, which nothing else shares an array with."""
    graphdef, state = nnx.split(case.build())

    def copy() -> Any:
        # A key is an array like any other to jax.tree.map, and is copied like one.
        return nnx.merge(graphdef, jax.tree.map(lambda array: array.copy(), state))

    return copy


def table(key: str, title: str, rows: Sequence[LeafSpec], *, per: str, reference: str, **facts: Any) -> dict[str, Any]:
    """A table as plain data."""
    return {"key": key, "title": title, "per": per, "reference": reference, "facts": facts, "rows": list(rows)}


def time_calls(calls: Mapping[str, Call], reference: str, settings: Settings, per_call: int = 1) -> dict[str, LeafSpec]:
    """Times calls in turns.

    Args:
      calls: by key.
      reference: the key that ratios are taken against.
      settings: for how long.
      per_call: how many steps one call makes; seconds are for one step.

    Returns:
      by key, the numbers of a row.
    """
    samples = interleave(calls, settings)
    return numbers_of({key: [sample / per_call for sample in mine] for key, mine in samples.items()}, reference)


def numbers_of(samples: Mapping[str, Sequence[float]], reference: str) -> dict[str, LeafSpec]:
    """The numbers of rows by key, of samples in seconds, of which those at one position were taken in one round."""
    rows = {}
    for key, mine in samples.items():
        seconds = stats(mine)
        low, middle, high = quartiles([a / b for a, b in zip(mine, samples[reference], strict=True)])
        times = {"median_s": seconds.median_s, "q1_s": seconds.q1_s, "q3_s": seconds.q3_s, "samples": seconds.samples}
        rows[key] = {**times, "ratio": middle, "ratio_q1": low, "ratio_q3": high}
    return rows


def compare(
    case: Case,
    settings: Settings,
    *,
    key: str,
    title: str,
    per: str = "step",
    names: Sequence[str] | None = None,
    sharding: Any = None,
    **facts: Any,
) -> dict[str, Any]:
    """Runs a case with all rivals but the buffer by hand, or with those named, and returns the table."""
    names = [name for name in STYLES if (name != BUFFER if names is None else name in names)]
    skipped = {name: reason for name in names if (reason := why_not(name, case))}
    names = [name for name in names if name not in skipped]
    if settings.warm_up:
        _warm_up(case, names, settings)
    copy = fresh(case)
    calls, outputs, times = {}, {}, {}
    for name in order(names):
        calls[name], outputs[name], times[name] = _begin(name, case, copy(), sharding, settings)
    apart = [name for name in names if name.startswith("equinox") and case.eqx and not case.eqx.comparable]
    checked = {name: check(name, outputs[name], outputs[OURS], case.tolerance) for name in names if name not in apart}
    checked |= _check_quietly(case, apart, settings)
    rows = time_calls({name: calls[name] for name in names}, OURS, settings)
    made = [_row(name, rows[name], times[name], checked[name]) for name in names]
    made += [{"key": name, "label": LABELS[name], "skipped": reason} for name, reason in skipped.items()]
    return table(key, title, made, per=per, reference=OURS, **array_count(case), **facts)


def array_count(case: Case) -> dict[str, int]:
    """How many arrays a case's model and its optimizer have, and how many bytes."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(case.build())))
    if case.tx is not None:
        params = jax.eval_shape(lambda: nnx.as_pure(nnx.state(case.build(), nnx.Param)))
        arrays += jax.tree.leaves(jax.eval_shape(case.tx.init, params))
    return {"arrays": len(arrays), "bytes": sum(array.size * array.dtype.itemsize for array in arrays)}


def check(name: str, found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> float:
    """The largest difference between two rivals' outputs, step by step, relative where they are above 1.

    Raises:
      WrongResultError: it is more than the tolerance.
    """
    worst = 0.0
    for number, (mine, ours) in enumerate(zip(found, expected, strict=True)):
        mine, ours = np.asarray(mine, np.float64), np.asarray(ours, np.float64)
        if mine.shape != ours.shape or not np.isfinite(mine).all():
            raise WrongResultError(f"{name}, call {number + 1}: {mine.shape}, or no finite numbers")
        worst = max(worst, float(np.max(np.abs(mine - ours) / np.maximum(1.0, np.abs(ours)), initial=0.0)))
    if worst > tolerance:
        raise WrongResultError(f"{name} differs from Statewise by {worst:.2g}; {tolerance:.2g} is allowed")
    return worst


def _begin(
    name: str, case: Case, model: Any, sharding: Any, settings: Settings
) -> tuple[Call, list[Any], tuple[float, float]]:
    """A rival's call, the outputs of the first few, and seconds for setting up and for the first call."""
    options = {} if sharding is None else {"sharding": sharding}
    gc.collect()
    setup_s, style = timed(lambda: STYLES[name](case, model, **options))
    call = case.loop(style.program)
    first_s, out = timed(call)
    outputs = [np.asarray(out)] + [np.asarray(call()) for _ in range(settings.check_steps - 1)]
    return call, outputs, (setup_s, first_s)


def _warm_up(case: Case, names: Sequence[str], settings: Settings) -> None:
    """Lets JAX trace the functions of its own that all rivals share, so that the first rival does not pay for all."""
    tiny = case.tiny() if case.tiny else case
    for name in names if not settings.quick and case.tiny else [OURS]:
        tiny.loop(STYLES[name](tiny, tiny.build()).program)()


def _check_quietly(case: Case, names: Sequence[str], settings: Settings) -> dict[str, float]:
    """Checks twins that draw other random numbers, with nothing drawn."""
    if not names:
        return {}
    assert case.quiet is not None, "a case with an incomparable twin says how to compare it"
    quiet = case.quiet()
    expected = _begin(OURS, quiet, quiet.build(), None, settings)[1]
    return {
        name: check(name, _begin(name, quiet, quiet.build(), None, settings)[1], expected, case.tolerance)
        for name in names
    }


def _row(name: str, numbers: LeafSpec, first: tuple[float, float], difference: float) -> LeafSpec:
    setup_s, first_call_s = first
    times = {"setup_s": setup_s, "first_call_s": first_call_s}
    return {"key": name, "label": LABELS[name], **numbers, **times, "difference": difference}
