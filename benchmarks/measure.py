"""Clocks: calls of several rivals, interleaved in one process, as medians with their spread.

One sample is a run of as many calls as fill a few milliseconds, each blocked until its output is there.  Rounds
go through all rivals in another order each time, so that whatever else the machine does meets all of them alike;
ratios are taken within a round.  Python's garbage is collected between the samples: within a sample each rival
pays for what it throws away itself, and not for what the one before it did.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

__all__ = ["Settings", "Stats", "interleave", "quartiles", "stats", "timed"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to look.

    Attributes:
      quick: whether models are small too.
      budget_s: seconds of timed calls in one comparison.
      rounds: fewest and most rounds.
      sample_s: the length of one sample, in seconds, where one call is shorter.
      fewest_calls: how many calls a sample has at least.
      check_steps: how many calls are compared with ours before timing.
      warm_up: whether a tiny model is run first, so that the first rival does not pay for what all share.
    """

    quick: bool = False
    budget_s: float = 8.0
    rounds: tuple[int, int] = (9, 40)
    sample_s: float = 0.01
    fewest_calls: int = 1
    check_steps: int = 3
    warm_up: bool = True

    @classmethod
    def short(cls) -> Settings:
        """For `--quick`."""
        return cls(quick=True, budget_s=1.5, rounds=(5, 15), sample_s=0.004)

    @classmethod
    def tiny(cls) -> Settings:
        """For tests, which do not look at times."""
        return cls(quick=True, budget_s=0.0, rounds=(2, 2), sample_s=0.0, check_steps=2, warm_up=False)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Seconds for one call: the median of the samples, their quartiles, and how many there were."""

    median_s: float
    q1_s: float
    q3_s: float
    samples: int


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until a call's output is there, and the output."""
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    return time.perf_counter() - start, out


def interleave(calls: Mapping[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Times calls in turns.

    Returns:
      by name, one number for each round: seconds for one call.  The same position is the same round.
    """
    repeats = {name: _repeats(call, settings) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # else each collection walks over the models of all rivals
    try:
        start = time.perf_counter()
        for number in range(settings.rounds[1]):
            if number >= settings.rounds[0] and time.perf_counter() - start > settings.budget_s:
                break
            shuffle(order)
            for name in order:
                gc.collect()
                samples[name].append(_sample(calls[name], repeats[name]))
    finally:
        gc.unfreeze()
    return samples


def _repeats(call: Callable[[], Any], settings: Settings) -> int:
    """How many calls make a sample; the calls made here warm up too."""
    seconds = min(timed(call)[0] for _ in range(3))
    return max(settings.fewest_calls, min(2000, math.ceil(settings.sample_s / max(seconds, 1e-7))))


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def stats(samples: Sequence[float]) -> Stats:
    """Median and quartiles of the samples."""
    low, middle, high = quartiles(samples)
    return Stats(middle, low, high, len(samples))
