"""Rules that only values tell: they are looked for in concrete models and states, and passed over in abstract ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES"]

_SPREAD = re.compile(r"(?:^|_)(?:var|variance|std|stddev)(?:_|$|\d)", re.IGNORECASE)
# A logarithm of zero is a variance of one; a count, a sum or a mask of variances may well start at zero.
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


def _zero(subject: Subject) -> Iterator[Found]:
    other = (nnx.Param, nnx.Cache, nnx.RngState, nnx.OptState, nnx.Intermediate, nnx.Perturbation, compat.MetricState)
    not_statistics = set(subject.of_type(*other))
    dead = []
    for number in range(len(subject.types)):
        if number in not_statistics or not _SPREAD.search(subject.name(number)):
            continue
        facts = subject.facts.get(number)
        holds = subject.floating(number) and subject.values[number].size and not _NO_SPREAD.search(subject.name(number))
        if holds and facts is not None and facts.zero:
            dead.append(number)
    if dead:
        are = counted(len(dead), "statistic of spread is", "statistics of spread are")
        cls = subject.types[dead[0]].__name__
        yield Found(f"{are} all zeros.", subject.rows(dead), f"{subject.target(dead[0])} = {cls}(jnp.ones(...))")


def _not_finite(subject: Subject) -> Iterator[Found]:
    wrong = [
        number
        for number in subject.of_type(nnx.Param, nnx.BatchStat)
        if (how := subject.broken.get(number)) is not None
        and (how == "nan" or not _is_bound(subject.found.paths[number]))
    ]
    if wrong:
        have = counted(len(wrong), "leaf has", "leaves have")
        yield Found(
            f"{have} NaN or infinite elements.",
            subject.rows(wrong),
            "jax.config.update('jax_debug_nans', True)  # stops where the first NaN is made\n"
            "or go back: state, report = sw.restore(path, state)",
        )


def _is_bound(path: Path) -> bool:
    """Whether a leaf is called a bound, which some channels may be without: `clip_max`, `bounds/low`."""
    return any(_BOUND.search(str(key)) for key in path[-2:])


def _is_copy(subject: Subject, one: Path, other: Path) -> bool:
    """Whether one of two streams is the copy that an average, or a target network, has of the other."""
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    if any(_COPY.search(str(key)) for key in (*one, *other)):
        return True
    if not (subject.found.several and len(one) == len(other) == 1):
        return False
    # Two whole objects of one class: a copy has all streams where the first has them.
    whole = dict(subject.nodes)
    return one in whole and other in whole and type(whole[one]) is type(whole[other])


def _same_keys(subject: Subject) -> Iterator[Found]:
    streams: dict[object, list[int]] = {}
    # Recurrent layers of flax have a stream of seed 0 each if they are given none; only their first carry could draw
    # from it, and it is zeros by default.
    recurrent = subject.nodes if subject.has(nnx.RNN) else ()
    carries = {(*path, "rngs") for path, node in recurrent if isinstance(node, nnx.RNN)}
    for number in subject.of_type(nnx.RngKey):
        facts = subject.facts.get(number)
        if facts is None or facts.value is None or number in subject.averages:
            continue
        if subject.found.paths[number][:-1] in carries:
            continue
        count = subject.position.get((*subject.found.paths[number][:-1], "count"))
        drawn = subject.facts.get(count) if count is not None else None
        at = None if drawn is None or drawn.value is None else drawn.value.tobytes()
        same = streams.setdefault((str(subject.dtype(number)), facts.value.shape, facts.value.tobytes(), at), [])
        path = subject.found.paths[number]
        if not any(_is_copy(subject, subject.found.paths[other], path) for other in same):
            same.append(number)
    groups = [group for group in streams.values() if len(group) > 1]
    if groups:
        rows = tuple(
            subject.row(number, note=f"as {format_path(subject.found.paths[group[0]])}")
            for group in groups
            for number in group[1:]
        )
        streams_are = counted(len(rows), "stream is", "streams are")
        yield Found(
            f"{streams_are} at the key and the count of another.",
            rows,
            "one nnx.Rngs(seed) for the whole model: layers fork streams of their own from it\n"
            "or another seed for each: nnx.Rngs(params=0, dropout=1)",
        )


def _caches(subject: Subject) -> Iterator[tuple[int, int, int]]:
    """The leaf, the length and the index of each attention cache."""
    for number in subject.of_type(nnx.Cache):
        path = subject.found.paths[number]
        if path[-1] != "cached_key" or len(getattr(subject.values[number], "shape", ())) < 3:
            continue
        at = subject.position.get((*path[:-1], "cache_index"))
        facts = subject.facts.get(at) if at is not None else None
        index = int(facts.value.max()) if facts is not None and facts.value is not None and facts.value.size else 0
        yield number, subject.values[number].shape[-3], index


def _full(subject: Subject) -> Iterator[Found]:
    full = [(number, length, index) for number, length, index in _caches(subject) if index >= length]
    if full:
        caches = counted(len(full), "cache has", "caches have")
        yield Found(
            f"{caches} no room for another token.",
            tuple(subject.row(number, note=f"{index} of {length} are written") for number, length, index in full),
            "state = state.restart('cache')  # or model.init_cache((batch, length, features)), longer",
        )


def _small(subject: Subject) -> Iterator[Found]:
    wanted = subject.decode_length
    if wanted is None:
        return
    small = [(number, length, index) for number, length, index in _caches(subject) if index + wanted > length > index]
    if small:
        caches = counted(len(small), "cache has", "caches have")
        longest = max(index + wanted for _, _, index in small)
        yield Found(
            f"{caches} no room for {wanted} tokens.",
            tuple(subject.row(number, note=f"room for {length - index}") for number, length, index in small),
            f"model.init_cache((batch, {longest}, features))",
        )


def _stops(subject: Subject) -> Iterator[Found]:
    stopping = []
    for number in range(len(subject.types)):
        if not subject.floating(number) or subject.values[number].shape != ():
            continue
        if issubclass(subject.types[number], nnx.Param) or not _is_counter(subject.found.paths[number]):
            continue
        # Above this, adding one is lost to rounding.
        limit = 2 ** (int(jnp.finfo(subject.dtype(number)).nmant) + 1)
        facts = subject.facts.get(number)
        reached = facts is not None and facts.value is not None and abs(float(facts.value)) >= limit
        if reached or limit <= 2**11:
            stopping.append((number, limit))
    if stopping:
        rows = tuple(subject.row(number, note=f"stops at {limit:,}") for number, limit in stopping)
        counters = counted(len(rows), "counter of floating-point numbers stops", "counters stop")
        cls = subject.types[stopping[0][0]].__name__
        yield Found(f"{counters} counting.", rows, f"{subject.target(stopping[0][0])} = {cls}(jnp.array(0, jnp.int32))")


def _is_counter(path: Path) -> bool:
    return bool(_COUNTER.search(str(path[-1])))


RULES = (
    Rule(
        "statistic-starts-at-zero",
        "dividing by its square root gives infinities or huge numbers until enough batches were seen",
        _zero,
    ),
    Rule("not-finite", "it spreads to every output, and an optimizer keeps it for good", _not_finite),
    Rule(
        "duplicate-rng-keys",
        "the streams draw the same numbers: dropout masks and initial values that should differ are equal",
        _same_keys,
    ),
    Rule("cache-is-full", "a token more overwrites the last one, without an error", _full),
    Rule("cache-too-small", "decoding past its end overwrites the last entry, without an error", _small),
    Rule("counter-stops", "adding one is lost to rounding: schedules and averages that read it stand still", _stops),
)
