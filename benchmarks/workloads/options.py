"""What the options of a train step cost: `measure=True` and `nonfinite="skip"`, against the same step without them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import statewise as sw
from benchmarks.case import Call, Case
from benchmarks.compare import array_count, check, fresh, table, time_calls
from benchmarks.machine import order
from benchmarks.measure import Settings, timed
from benchmarks.styles import LABELS as STYLE_LABELS
from benchmarks.styles import STYLES
from benchmarks.workloads.train import few_large_case, many_small_case, transformer_case

__all__ = ["WAYS", "options", "options_table"]

# By key: the options of the step, and whether the state is packed.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "skip": ({"nonfinite": "skip"}, False),
    "measure": ({"measure": True}, False),
    "measure-grads": ({"measure": "grads"}, False),
    "packed": ({}, True),
    "packed-skip": ({"nonfinite": "skip"}, True),
    "packed-measure": ({"measure": True}, True),
}
LABELS = {
    "plain": "`train_step`",
    "skip": '`train_step(nonfinite="skip")`',
    "measure": "`train_step(measure=True)`",
    "measure-grads": '`train_step(measure="grads")`',
    "packed": "`train_step`, packed",
    "packed-skip": '`train_step(nonfinite="skip")`, packed',
    "packed-measure": "`train_step(measure=True)`, packed",
}
# The plain step of others, without options.
RIVALS = ("by-hand", "nnx.jit_partial")
UNPACKED = tuple(key for key, (_, pack) in WAYS.items() if not pack)


def options(settings: Settings) -> list[dict[str, Any]]:
    if settings.quick:
        products, large, small = transformer_case(16, 1, batch=2), few_large_case((64, 64)), many_small_case(4)
    else:
        products = transformer_case(256, 4, dropout=0.0, batch=16, length=128)
        large, small = few_large_case((1024,) * 5), many_small_case(200)
    return [
        options_table("options_products", "A transformer, compute-bound, AdamW", products, UNPACKED, settings),
        options_table("options_memory", "Leaves of 1024 × 1024, memory-bound, Adam", large, UNPACKED, settings),
        options_table("options_small", "200 blocks of width 8, about 2,000 leaves, Adam", small, tuple(WAYS), settings),
    ]


def options_table(key: str, title: str, case: Case, ways: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    copy = fresh(case)
    calls: dict[str, Call] = {}
    firsts, outputs = {}, {}
    ways = (*ways, *RIVALS)
    for way in order(ways):
        if way in WAYS:
            calls[way] = case.loop(functools.partial(_trained, case, copy(), *WAYS[way]))
        else:
            calls[way] = case.loop(STYLES[way](case, copy()).program)
        firsts[way], first = timed(calls[way])
        outputs[way] = [np.asarray(loss) for loss in (first, *(calls[way]() for _ in range(settings.check_steps - 1)))]
    worst = {way: check(way, outputs[way], outputs["plain"], case.tolerance) for way in ways}
    numbers = time_calls({way: calls[way] for way in ways}, "plain", settings)
    labels = {**STYLE_LABELS, **LABELS}
    rows = [
        {"key": way, "label": labels[way], **numbers[way], "first_call_s": firsts[way], "difference": worst[way]}
        for way in ways
    ]
    return table(key, title, rows, per="step", reference="plain", **array_count(case))


def _trained(case: Case, model: Any, given: dict[str, Any], pack: bool, name: str) -> Call:
    """The call of a train step with these options; it returns the loss, once all outputs are there."""
    state = sw.plan(model, optimizers={"params": case.tx}).take(model, pack=pack)
    step = sw.train_step(case.programs[name].fn, **given)

    def call(*args: Any) -> Any:
        nonlocal state
        state, out = step(state, *args)
        jax.block_until_ready((state, out))
        return out[0] if given.get("measure") else out

    return call
