"""A step in a process of its own: what else a process has compiled is not in the number.

In one process, of equal programs that are made one after the other, the first was the fastest, whichever it was.  For a
step whose code and arrays do not fit into the processor's caches that is up to a fifth of its time, more than what two
ways differ by.  Here each number is the median of one process, which makes one way only.  The ways take turns, in
another order each round.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.case import Call
from benchmarks.compare import check, numbers_of, table
from benchmarks.machine import in_own_process
from benchmarks.measure import Settings, interleave
from benchmarks.styles import LABELS, OURS, STYLES
from benchmarks.workloads import serve

__all__ = ["CASES", "alone", "child"]


@dataclasses.dataclass(frozen=True)
class Alone:
    """One comparison.

    Attributes:
      title: of the model's layers.
      ways: labels by key, the reference first.
      make: of (key, layers); returns the call.
      runs: how many processes each way gets.
      tokens: how many tokens one call makes.
    """

    title: str
    ways: dict[str, str]
    make: Callable[[str, int], Call]
    runs: int
    tokens: int = 1


def _wide(way: str, depth: int) -> Call:
    case = serve.decode_wide_case(depth)
    return case.loop(STYLES[way](case, case.build()).program)


def _loop(way: str, depth: int) -> Call:
    case = serve.decode_wide_case(depth)
    call = serve.LOOPS[way].make(case, case.build(), serve.TOKENS)
    return lambda: call(-1)


CASES = {
    "alone_wide": Alone(
        "{} layers of 119 Variables, each way in processes of its own",
        {way: LABELS[way] for way in (OURS, "by-hand")},
        _wide,
        runs=20,
    ),
    "alone_loop": Alone(
        f"{{}} layers of 119 Variables, {serve.TOKENS} tokens, each way in processes of its own",
        {way: serve.LOOPS[way].label for way in ("loop", "by-hand-loop")},
        _loop,
        runs=4,
        tokens=serve.TOKENS,
    ),
}


def alone(settings: Settings, depth: int | None = None) -> list[dict[str, Any]]:
    depth = depth or (1 if settings.quick else 64)
    return [_table(key, case, depth, settings.quick) for key, case in CASES.items()]


def _table(key: str, case: Alone, depth: int, quick: bool) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    outputs: list[tuple[str, Any]] = []
    for _ in range(1 if quick else case.runs):
        for way in random.sample(list(case.ways), len(case.ways)):
            found = in_own_process("alone", key, way, depth, quick)
            seconds[way].append(found["seconds"])
            outputs.append((way, found["outputs"]))
    reference, *_ = case.ways
    expected = next(output for way, output in outputs if way == reference)
    worst = dict.fromkeys(case.ways, 0.0)
    for way, output in outputs:
        worst[way] = max(worst[way], check(way, output, expected, 1e-4))
    rows = numbers_of(seconds, reference)
    made = [
        {"key": way, "label": label, **rows[way], "difference": worst[way], "runs_s": seconds[way]}
        for way, label in case.ways.items()
    ]
    return table(key, case.title.format(depth), made, per="token", reference=reference, tokens=case.tokens)


def child(key: str, way: str, depth: int, quick: bool) -> dict[str, Any]:
    """Makes one call, and times it: the median of its samples in seconds a token, and its first three outputs."""
    call = CASES[key].make(way, depth)
    outputs = [np.asarray(jax.block_until_ready(call())).tolist() for _ in range(3)]
    settings = Settings.short() if quick else Settings()
    samples = interleave({way: call}, dataclasses.replace(settings, fewest_calls=serve.FEWEST_CALLS))[way]
    return {"seconds": float(np.median(samples)) / CASES[key].tokens, "outputs": outputs}
