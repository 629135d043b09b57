"""Rules of the declaration: kinds that do not fit the leaves, or that treat them so that something is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import counted
from statewise._src.filters.combinators import compound, describe, normalize, predicate
from statewise._src.filters.explain import as_code, type_only
from statewise._src.filters.primitives import Exactly
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject
from statewise._src.inspect.lint.training import trainings
from statewise._src.inspect.positions import WHY, is_named_position, may_be_position, restart_hint
from statewise._src.plan.kind import Kind
from statewise._src.plan.spelled_paths import corrected_kind, nearest, spelled
from statewise.errors import DeclarationError, FilterError, OverlapError, UnclaimedError

__all__ = ["RULES"]


def _unclaimed(subject: Subject) -> Iterator[Found]:
    if isinstance(subject.refused, UnclaimedError):
        yield Found(subject.refused.message, subject.refused.leaves, subject.refused.hint or "")


def _contested(subject: Subject) -> Iterator[Found]:
    if isinstance(subject.refused, OverlapError):
        yield Found(subject.refused.message, subject.refused.leaves, subject.refused.hint or "")


def _path_lost(subject: Subject) -> Iterator[Found]:
    """Paths that are spelled and not there: by kinds, claimed or left out, and by an `nnx.Optimizer`."""
    if isinstance(subject.refused, DeclarationError):
        yield Found(subject.refused.message, subject.refused.leaves, subject.refused.hint or "")
    asked = {name: kind for name, kind in subject.kinds.items() if not kind.optional and not kind.rest}
    asked = {name: kind for name, kind in asked.items() if subject.declared and not type_only(kind.of)}
    for name, kind in asked.items():
        for one in spelled(kind.of):
            if one.negated and not subject.reading.matched(one.filter):
                path, near = describe(one.filter), ", ".join(nearest(subject.reading, one.filter))
                yield Found(
                    f"The kind {name!r} leaves out {path}, which matches no path; the nearest are {near}.",
                    (),
                    corrected_kind(name, kind, [one.filter], subject.reading),
                )
    for at, node in subject.nodes if subject.has(nnx.Optimizer) else ():
        if isinstance(node, nnx.Optimizer):
            yield from _lost_by_optimizer(subject, at, node)


def _lost_by_optimizer(subject: Subject, at: Path, optimizer: Any) -> Iterator[Found]:
    """Paths that its `wrt` spells.  It knows them in its own model, so any end of a path may be what is meant."""
    found = subject.found
    for one in spelled(optimizer.wrt):
        ends = (
            (path[start:], leaf)
            for path, leaf in zip(found.paths, found.leaves, strict=True)
            for start in range(len(path))
        )
        if not any(one.filter(end, leaf) for end, leaf in ends):
            label = f"The nnx.Optimizer at {format_path(at)}" if at else "The nnx.Optimizer"
            near = ", ".join(nearest(subject.reading, one.filter))
            yield Found(
                f"{label} has wrt={describe(optimizer.wrt)}, of which {describe(one.filter)} matches no path; "
                f"the nearest are {near}.",
                (),
                "nnx.Optimizer(model, tx, wrt=filter)  # print(sw.explain(model, filter)) shows what it matches",
            )


def _frozen_empty(subject: Subject) -> Iterator[Found]:
    if not subject.declared or subject.refused is not None:
        return
    claimed = set(subject.claims)
    for name, kind in subject.kinds.items():
        if kind.frozen and not kind.optional and name not in claimed:
            yield Found(
                f"The kind {name!r} is frozen, and claims no leaf.",
                (),
                f"print(sw.explain(model, kinds[{name!r}].of))  # what its filter makes of each leaf\n"
                f"or, if there need not be any: "
                f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], optional=True))",
            )


def _overlapping(subject: Subject) -> Iterator[Found]:
    """Overlaps of filters that no leaf of this model shows, but another model's would."""
    if not subject.declared:
        return
    here = set(subject.types)
    for one, other in itertools.combinations(subject.kinds, 2):
        wide, narrow, cls = _overlap(subject.kinds, one, other) or _overlap(subject.kinds, other, one) or ("", "", None)
        if cls is None or any(issubclass(found, cls) for found in here):  # those are overlapping already
            continue
        of = f"nnx.All({as_code(subject.kinds[wide].of)}, nnx.Not({as_code(cls)}))"
        yield Found(
            f"The kinds {wide!r} and {narrow!r} both claim every {cls.__name__}; this model has none yet.",
            (),
            f"kinds = kinds.replace({wide}={_with(subject.kinds[wide], of, wide)})",
        )


def _left_behind(subject: Subject) -> Iterator[Found]:
    restarting: dict[Any, str] = {}
    for number in subject.of_type(nnx.Cache):
        kind = subject.claims[number]
        if kind is not None and subject.kinds[kind].restart is not None:
            restarting.setdefault(subject.found.paths[number][:-1], kind)
    left = [
        number
        for number, path in enumerate(subject.found.paths)
        if path[:-1] in restarting
        and is_named_position(subject.name(number))
        and may_be_position(
            subject.types[number],
            getattr(subject.values[number], "shape", None),
            subject.dtype(number),
            subject.name(number),
        )
        and (kind := subject.claims[number]) is not None
        and subject.kinds[kind].restart is None
    ]
    if left:
        positions = counted(len(left), "position in a cache does", "positions in caches do")
        yield Found(
            f"{positions} not restart with it.",
            subject.rows(left),
            restart_hint(
                subject.kinds, subject.claims[left[0]], path := subject.found.paths[left[0]], restarting[path[:-1]]
            ),
        )


def _with(kind: Kind, of: str, name: str) -> str:
    return f"sw.Kind({of})" if kind == Kind(kind.of) else f"dataclasses.replace(kinds[{name!r}], of={of})"


def _overlap(kinds: Mapping[str, Kind], wide: str, narrow: str) -> tuple[str, str, Any] | None:
    """A type that the one kind names and that the other claims too."""
    if kinds[wide].rest or kinds[narrow].rest or not (type_only(kinds[wide].of) and type_only(kinds[narrow].of)):
        return None
    for cls in _named(normalize(kinds[narrow].of)):
        leaf: Any = object.__new__(cls)  # a filter by type looks at nothing but the type
        try:
            if predicate(kinds[wide].of)((), leaf) and predicate(kinds[narrow].of)((), leaf):
                return wide, narrow, cls
        except FilterError:
            continue
    return None


def _named(filter: Any) -> Iterator[type]:
    """The types of Variables that a filter means by name; those that it excludes are left out."""
    made_of = compound(filter)
    if made_of is not None:
        if made_of[0] != "~":
            for part in made_of[1]:
                yield from _named(part)
        return
    named = filter.types if isinstance(filter, Exactly) else [filter.type if type(filter) is nnx.OfType else filter]
    yield from (cls for cls in named if isinstance(cls, type) and issubclass(cls, nnx.Variable))


def _treated(subject: Subject, types: tuple[type, ...], treated: Callable[[Kind], bool]) -> dict[str, list[int]]:
    """The leaves of these types in kinds that are treated so, by kind."""
    by_kind: dict[str, list[int]] = {}
    for number in subject.of_type(*types):
        kind = subject.claims[number]
        if kind is not None and treated(subject.kinds[kind]):
            by_kind.setdefault(kind, []).append(number)
    return by_kind


def _is_saved(kind: Kind) -> bool:
    return kind.saved


def _is_not_saved(kind: Kind) -> bool:
    return not kind.saved


def _cache_saved(subject: Subject) -> Iterator[Found]:
    for kind, numbers in _treated(subject, (nnx.Cache,), _is_saved).items():
        yield Found(
            f"The kind {kind!r} is saved, and holds {len(numbers)} of the cache.",
            subject.rows(numbers),
            "kinds = kinds | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like))"
            if subject.kinds[kind].rest
            else f"kinds = kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], saved=False))",
        )


def _lost(subject: Subject, types: tuple[type, ...], what: str) -> Iterator[Found]:
    for kind, numbers in _treated(subject, types, _is_not_saved).items():
        yield Found(
            f"The kind {kind!r} is not saved, and holds {len(numbers)} {what}.",
            subject.rows(numbers),
            f"kinds = kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], saved=True))",
        )


def _rng_lost(subject: Subject) -> Iterator[Found]:
    yield from _lost(subject, (nnx.RngState,), "of the RNG streams' leaves")


def _statistics_lost(subject: Subject) -> Iterator[Found]:
    # A class of the user's own that has the name means the same.
    types = [cls for cls in set(subject.types) if any(base.__name__ == "BatchStat" for base in cls.__mro__)]
    yield from _lost(subject, tuple(types) or (nnx.BatchStat,), "running statistics")


def _trained_lost(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        kinds = dict.fromkeys(subject.claims[number] for number in training.trained)
        for kind in kinds:
            if kind is not None and not subject.kinds[kind].saved:
                numbers = [number for number in training.trained if subject.claims[number] == kind]
                yield Found(
                    f"The kind {kind!r} is trained, and not saved.",
                    subject.rows(numbers),
                    f"kinds = kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], saved=True))",
                )


# --- modes: modules that train where the rest of the program evaluates -------------------------------------------


def _writers(subject: Subject) -> dict[Path, list[int]]:
    """Returns the modules that update running statistics when called, each with its statistics."""
    if not subject.has_attribute("use_running_average"):
        return {}
    training = [path for path, node in subject.nodes if vars(node).get("use_running_average") is False]
    if not training:
        return {}
    params = set(subject.of_type(nnx.Param, nnx.RngState))
    statistics = {path: [number for number in subject.below(path) if number not in params] for path in training}
    return {path: numbers for path, numbers in statistics.items() if numbers}


def _statistics(subject: Subject, writers: dict[Path, list[int]]) -> tuple[Leaf, ...]:
    return subject.rows(sorted({number for numbers in writers.values() for number in numbers}))


def _written_by_eval(subject: Subject) -> Iterator[Found]:
    if not subject.has_attribute("deterministic"):
        return
    flags = {flag for _, node in subject.nodes if isinstance(flag := vars(node).get("deterministic"), bool)}
    if flags != {True}:  # there is no sign that this model evaluates
        return
    writers = _writers(subject)
    if writers:
        modules = ", ".join(format_path(path) for path in list(writers)[:3]) + (" ..." if len(writers) > 3 else "")
        yield Found(
            f"Every dropout is switched off, but running statistics are still updated (in {modules}).",
            _statistics(subject, writers),
            "model.eval()  # or nnx.view(model, deterministic=True, use_running_average=True)",
        )


def _frozen_in_training(subject: Subject) -> Iterator[Found]:
    writers: dict[Path, list[int]] = {}
    for path, numbers in _writers(subject).items():
        frozen = [
            number for number in numbers if (kind := subject.claims[number]) is not None and subject.kinds[kind].frozen
        ]
        if frozen:
            writers[path] = frozen
    if writers:
        first = format_path(next(iter(writers)))
        yield Found(
            "Frozen statistics belong to modules that update them.",
            _statistics(subject, writers),
            f"use_running_average=True, where the module is made ({first})  # or model.eval() as a step's first line",
        )


RULES = (
    Rule("unclaimed-leaf", "no plan can be made of this model by these kinds", _unclaimed),
    Rule("overlapping-leaf", "no plan can be made of this model by these kinds", _contested),
    Rule(
        "path-matches-nothing",
        "what the path was spelled for (a kind that is frozen, say) reaches none of the leaves that are meant",
        _path_lost,
    ),
    Rule("frozen-kind-empty", "what was to stay as it is falls to another kind, and is trained", _frozen_empty),
    Rule(
        "overlapping-kinds",
        "the first leaf of that type is overlapping; a type filter means every subclass (LoRAParam is a Param)",
        _overlapping,
    ),
    Rule(
        "cache-saved",
        "checkpoints carry the last request's tokens, grow with batch and length, and fit no other batch size",
        _cache_saved,
    ),
    Rule("position-left-behind", WHY, _left_behind),
    Rule("rng-not-saved", "a resumed run draws again the numbers that the first one drew", _rng_lost),
    Rule(
        "statistics-not-saved",
        "a restored model normalises by what a fresh one has: right in training, wrong in evaluation",
        _statistics_lost,
    ),
    Rule("trained-but-not-saved", "what training learned is gone after a restart", _trained_lost),
    Rule(
        "statistics-written-by-eval",
        "evaluating moves the statistics, by test data, and the output depends on the batch",
        _written_by_eval,
    ),
    Rule(
        "frozen-statistics-in-training",
        "a step that calls the module writes a frozen kind, which is an error; NNX alone would write it",
        _frozen_in_training,
    ),
)
