"""Rules that need values: they look at concrete models and states, and find nothing in abstract ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Path
from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES"]

RULES = Rules()

_SPREAD = re.compile(r"(?:^|_)(?:var|variance|std|stddev)(?:_|$|\d)", re.IGNORECASE)
# A logarithm of zero is a variance of one; a count, a sum or a mask of variances may start at zero.
_NO_SPREAD = re.compile(r"(?:^|_)log|(?:^|_)(?:counts?|mask|num|index|grad)(?:_|$)", re.IGNORECASE)
_BOUND = re.compile(
    r"(?:^|_)(?:min|max|minimum|maximum|clip|bounds?|limits?|low|high|lo|hi|lower|upper|floor|ceil|range|best)(?:_|$|\d)",
    re.IGNORECASE,
)
_COPY = re.compile(
    r"(?:^|_)(?:ema|averaged?|averages|avg|shadow|polyak|swa|slow|target|teacher|reference|ref|old|previous|frozen|copy|clone)"
    r"(?:_|$|\d)",
    re.IGNORECASE,
)
_COUNTER = re.compile(
    r"(?:^|_)(?<!per_)(?:count|counter|counts|step|steps|iteration|iterations|epoch|epochs)"
    r"(?!_(?:sizes?|length|scale|rate|per|decay|ema|loss|factor|time|fraction)(?:_|$))(?:_|$)",  # steps_per_epoch
    re.IGNORECASE,
)


@RULES.rule(
    "statistic-starts-at-zero",
    "dividing by its square root gives infinities or huge numbers until enough batches were seen",
)
def statistic_starts_at_zero(subject: Subject) -> Iterator[Found]:
    """Finds variances and standard deviations that are zero."""
    other = (nnx.Param, nnx.Cache, nnx.RngState, nnx.OptState, nnx.Intermediate, nnx.Perturbation, compat.MetricState)
    not_statistics = set(subject.of_type(*other))
    wrong = [
        number
        for number in range(len(subject.types))
        if number not in not_statistics
        and _SPREAD.search(subject.name(number))
        and not _NO_SPREAD.search(subject.name(number))
        and subject.is_floating(number)
        and subject.values[number].size
        and subject.is_zero(number)
    ]
    if wrong:
        are = counted(len(wrong), "statistic of spread is", "statistics of spread are")
        cls = subject.types[wrong[0]].__name__
        yield Found(f"{are} all zeros.", subject.rows(wrong), f"{subject.target(wrong[0])} = {cls}(jnp.ones(...))")


@RULES.rule("not-finite", "it spreads to every output, and an optimizer keeps it for good")
def not_finite(subject: Subject) -> Iterator[Found]:
    """Finds parameters and statistics with NaN or infinite elements."""
    wrong = [
        number
        for number in subject.of_type(nnx.Param, nnx.BatchStat)
        if (how := subject.broken.get(number)) is not None and (how == "nan" or not _is_bound(subject.paths[number]))
    ]
    if wrong:
        yield Found(
            f"{counted(len(wrong), 'leaf has', 'leaves have')} NaN or infinite elements.",
            subject.rows(wrong),
            "jax.config.update('jax_debug_nans', True)  # stops where the first NaN is made\n"
            "or go back: state, report = sw.restore(path, state)",
        )


def _is_bound(path: Path) -> bool:
    """Returns whether a leaf is named as a bound, which some channels may not have: `clip_max`, `bounds/low`."""
    return any(_BOUND.search(str(key)) for key in path[-2:])


def _is_copy(subject: Subject, first: Path, second: Path) -> bool:
    """Returns whether one of two streams is in the copy that an average, or a target network, has of the other's."""
    # Without the end that they have in common: what is left tells the two models apart.
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    if any(_COPY.search(str(key)) for key in (*first, *second)):
        return True
    if not (subject.graph.several and len(first) == len(second) == 1):
        return False
    # Two complete objects of one class: a copy has every stream at the same path as the original.
    objects = dict(subject.nodes)
    return first in objects and second in objects and type(objects[first]) is type(objects[second])


@RULES.rule(
    "duplicate-rng-keys",
    "the streams draw the same numbers: dropout masks and initial values that should differ are equal",
)
def duplicate_rng_keys(subject: Subject) -> Iterator[Found]:
    """Finds random streams with the same key and count."""
    streams: dict[object, list[int]] = {}
    # Without a stream of the user's, each recurrent layer of Flax makes one of seed 0.  Only its initial carry could
    # draw from it, and that is zeros by default.
    carries = {(*path, "rngs") for path, _ in subject.nodes_of(nnx.RNN)}
    for number in subject.of_type(nnx.RngKey):
        path = subject.paths[number]
        key = subject.small_value(number)
        if key is None or number in subject.averages or path[:-1] in carries:
            continue
        count = subject.small_value(subject.position.get((*path[:-1], "count")))
        state = (str(subject.dtype(number)), key.shape, key.tobytes(), None if count is None else count.tobytes())
        same = streams.setdefault(state, [])
        if not any(_is_copy(subject, subject.paths[other], path) for other in same):
            same.append(number)
    rows = subject.repeats(streams.values(), "as {}")
    if rows:
        yield Found(
            f"{counted(len(rows), 'stream is', 'streams are')} at the key and the count of another.",
            rows,
            "one nnx.Rngs(seed) for the whole model: layers fork their own streams from it\n"
            "or another seed for each: nnx.Rngs(params=0, dropout=1)",
        )


def _caches(subject: Subject) -> Iterator[tuple[int, int, int]]:
    """Yields the leaf, the length and the index of each attention cache."""
    for number in subject.of_type(nnx.Cache):
        path = subject.paths[number]
        shape: Any = getattr(subject.values[number], "shape", ())
        if path[-1] == "cached_key" and len(shape) >= 3:
            index = subject.small_value(subject.position.get((*path[:-1], "cache_index")))
            # The axes of a cache end with length, heads, features.  Its index is an array for caches made under vmap.
            yield number, shape[-3], int(index.max()) if index is not None and index.size else 0


@RULES.rule("cache-is-full", "one more token overwrites the last one, without an error")
def cache_is_full(subject: Subject) -> Iterator[Found]:
    """Finds attention caches that are written to their end."""
    full = [(number, length, index) for number, length, index in _caches(subject) if index >= length]
    if full:
        yield Found(
            f"{counted(len(full), 'cache has', 'caches have')} no room for another token.",
            tuple(subject.row(number, note=f"{index} of {length} are written") for number, length, index in full),
            "state = state.restart('cache')  # or model.init_cache((batch, length, features)), longer",
        )


@RULES.rule("cache-too-small", "decoding past its end overwrites the last entry, without an error")
def cache_too_small(subject: Subject) -> Iterator[Found]:
    """Finds attention caches that have no room for the tokens to decode."""
    wanted = subject.decode_length
    if wanted is None:
        return
    small = [(number, length, index) for number, length, index in _caches(subject) if index + wanted > length > index]
    if small:
        longest = max(index + wanted for _, _, index in small)
        yield Found(
            f"{counted(len(small), 'cache has', 'caches have')} no room for {wanted} tokens.",
            tuple(subject.row(number, note=f"room for {length - index}") for number, length, index in small),
            f"model.init_cache((batch, {longest}, features))",
        )


@RULES.rule("counter-stops", "adding one is lost to rounding: schedules and averages that read it stop changing")
def counter_stops(subject: Subject) -> Iterator[Found]:
    """Finds counters in floating-point numbers that reached their limit, or have a low one."""
    limits = {}
    for number, (cls, path) in enumerate(zip(subject.types, subject.paths, strict=True)):
        if not subject.is_floating(number) or subject.values[number].shape != ():
            continue
        if issubclass(cls, nnx.Param) or not _COUNTER.search(str(path[-1])):
            continue
        # From here on, adding one is lost to rounding: the next number is two away.
        limit = 2 ** (int(jnp.finfo(subject.dtype(number)).nmant) + 1)
        value = subject.small_value(number)
        if limit <= 2**11 or (value is not None and abs(float(value)) >= limit):
            limits[number] = limit
    if limits:
        counters = counted(len(limits), "counter of floating-point numbers stops", "counters stop")
        first = next(iter(limits))
        yield Found(
            f"{counters} counting.",
            tuple(subject.row(number, note=f"stops at {limit:,}") for number, limit in limits.items()),
            f"{subject.target(first)} = {subject.types[first].__name__}(jnp.array(0, jnp.int32))",
        )
