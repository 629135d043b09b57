"""Rules of the declaration: kinds that do not fit the leaves, or whose handling loses something."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from statewise._src.common.paths import Path
from statewise._src.common.problems import counted
from statewise._src.filters.combinators import compound, describe, normalize, predicate
from statewise._src.filters.explain import as_code, type_only
from statewise._src.filters.primitives import Exactly
from statewise._src.inspect.lint.finding import Found, Rules, kind_with
from statewise._src.inspect.lint.statistics import statistics_of
from statewise._src.inspect.lint.subject import Subject
from statewise._src.inspect.lint.training import label_of, trainings
from statewise._src.inspect.positions import WHY, is_named_position, may_be_position, restart_hint
from statewise._src.plan.kind import Kind
from statewise._src.plan.spelled_paths import corrected_kind, nearest, spelled
from statewise.errors import DeclarationError, FilterError, OverlapError, StatewiseError, UnclaimedError

__all__ = ["RULES"]

RULES = Rules()


def _refusal(subject: Subject, cls: type[StatewiseError]) -> Iterator[Found]:
    """Yields the error that planning would raise, if it is of this class."""
    error = subject.refusal
    if isinstance(error, cls):
        yield Found(error.message, error.leaves, error.hint or "")


@RULES.rule("unclaimed-leaf", "no plan can be made of this model by these kinds")
def unclaimed_leaf(subject: Subject) -> Iterator[Found]:
    """Finds leaves that no kind claims."""
    yield from _refusal(subject, UnclaimedError)


@RULES.rule("overlapping-leaf", "no plan can be made of this model by these kinds")
def overlapping_leaf(subject: Subject) -> Iterator[Found]:
    """Finds leaves that several kinds claim."""
    yield from _refusal(subject, OverlapError)


@RULES.rule(
    "path-matches-nothing",
    "the path's purpose (a kind that is frozen, for example) reaches none of the intended leaves",
)
def path_matches_nothing(subject: Subject) -> Iterator[Found]:
    """Finds paths that do not exist: in kinds, claimed or left out, and in the filter of an `nnx.Optimizer`."""
    yield from _refusal(subject, DeclarationError)
    declared = subject.kinds if subject.declared else {}
    for name, kind in declared.items():
        if kind.optional or kind.rest or type_only(kind.of):
            continue
        for part in spelled(kind.of):
            # A path that a kind claims and that does not exist is the error above.
            if part.negated and not subject.reading.matched(part.filter):
                path, near = describe(part.filter), ", ".join(nearest(subject.reading, part.filter))
                yield Found(
                    f"The kind {name!r} leaves out {path}, which matches no path; the nearest are {near}.",
                    (),
                    corrected_kind(name, kind, [part.filter], subject.reading),
                )
    for root, optimizer in subject.nodes_of(nnx.Optimizer):
        yield from _missed_by_optimizer(subject, root, optimizer)


def _missed_by_optimizer(subject: Subject, root: Path, optimizer: Any) -> Iterator[Found]:
    """Finds paths in the `wrt` of an optimizer that do not exist."""
    leaves = list(zip(subject.paths, subject.graph.leaves, strict=True))
    for part in spelled(optimizer.wrt):
        # The optimizer sees paths relative to its own model, which is somewhere here: any end of a path may match.
        ends = ((path[start:], leaf) for path, leaf in leaves for start in range(len(path)))
        if not any(part.filter(end, leaf) for end, leaf in ends):
            near = ", ".join(nearest(subject.reading, part.filter))
            yield Found(
                f"{label_of(root)} has wrt={describe(optimizer.wrt)}, where {describe(part.filter)} matches no path; "
                f"the nearest are {near}.",
                (),
                "nnx.Optimizer(model, tx, wrt=filter)  # print(sw.explain(model, filter)) shows what it matches",
            )


@RULES.rule("frozen-kind-empty", "the leaves that should not change fall to another kind, and are trained")
def frozen_kind_empty(subject: Subject) -> Iterator[Found]:
    """Finds frozen kinds that claim nothing."""
    # If the kinds do not fit the model, a leaf of the kind may be one that no kind, or several, claim.
    if not subject.declared or subject.refusal is not None:
        return
    claimed = set(subject.claims)
    for name, kind in subject.kinds.items():
        if kind.frozen and not kind.optional and name not in claimed:
            yield Found(
                f"The kind {name!r} is frozen, and claims no leaf.",
                (),
                f"print(sw.explain(model, kinds[{name!r}].of))  # what its filter makes of each leaf\n"
                f"or, if there need not be any: {kind_with(name, 'optional=True')}",
            )


@RULES.rule(
    "overlapping-kinds",
    "the first leaf of that type is overlapping; a type filter means every subclass (LoRAParam is a Param)",
)
def overlapping_kinds(subject: Subject) -> Iterator[Found]:
    """Finds overlaps of filters that no leaf of this model shows, but another model's leaves would."""
    kinds = subject.kinds if subject.declared else {}
    present = set(subject.types)
    for pair in itertools.combinations(kinds, 2):
        wide, narrow, cls = _overlap(kinds, *pair) or _overlap(kinds, *pair[::-1]) or ("", "", None)
        if cls is None or any(issubclass(type_, cls) for type_ in present):  # then leaves overlap already
            continue
        of = f"nnx.All({as_code(kinds[wide].of)}, nnx.Not({as_code(cls)}))"
        is_plain = kinds[wide] == Kind(kinds[wide].of)
        yield Found(
            f"The kinds {wide!r} and {narrow!r} both claim every {cls.__name__}; this model has none yet.",
            (),
            f"kinds = kinds.replace({wide}=sw.Kind({of}))" if is_plain else kind_with(wide, f"of={of}"),
        )


def _overlap(kinds: Mapping[str, Kind], wide: str, narrow: str) -> tuple[str, str, type] | None:
    """Returns two kinds, and a type that the second one names and the first one claims too."""
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
    """Yields the types of Variables that a filter names, without those that it excludes."""
    parts = compound(filter)
    if parts is not None:
        operator, operands = parts
        yield from itertools.chain.from_iterable(map(_named, operands if operator != "~" else ()))
        return
    named = filter.types if isinstance(filter, Exactly) else [filter.type if type(filter) is nnx.OfType else filter]
    yield from (cls for cls in named if isinstance(cls, type) and issubclass(cls, nnx.Variable))


def _by_kind(subject: Subject, numbers: Sequence[int], saved: bool) -> dict[str, list[int]]:
    """Groups leaves by kind, for the kinds that are saved or those that are not."""
    by_kind: dict[str, list[int]] = {}
    for number in numbers:
        name = subject.claims[number]
        if name is not None and subject.kinds[name].saved is saved:
            by_kind.setdefault(name, []).append(number)
    return by_kind


@RULES.rule(
    "cache-saved",
    "checkpoints carry the last request's tokens, grow with batch and length, and fit no other batch size",
)
def cache_saved(subject: Subject) -> Iterator[Found]:
    """Finds caches in kinds that are saved."""
    for name, numbers in _by_kind(subject, subject.of_type(nnx.Cache), saved=True).items():
        yield Found(
            f"The kind {name!r} is saved, and holds {counted(len(numbers), 'leaf', 'leaves')} of the cache.",
            subject.rows(numbers),
            "kinds = kinds | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like))"
            if subject.kinds[name].rest
            else kind_with(name, "saved=False"),
        )


@RULES.rule("position-left-behind", WHY)
def position_left_behind(subject: Subject) -> Iterator[Found]:
    """Finds positions beside caches that restart, in kinds that do not."""
    # For each module with a cache that restarts, the cache's kind.
    restarting: dict[Path, str] = {}
    for number in subject.of_type(nnx.Cache):
        name = subject.claims[number]
        if name is not None and subject.kinds[name].restart is not None:
            restarting.setdefault(subject.paths[number][:-1], name)
    left = [
        number
        for number, path in enumerate(subject.paths)
        if path[:-1] in restarting
        and _is_position(subject, number)
        and (kind := subject.kind(number)) is not None
        and kind.restart is None
    ]
    if left:
        positions = counted(len(left), "position in a cache does", "positions in caches do")
        path = subject.paths[left[0]]
        hint = restart_hint(subject.kinds, subject.claims[left[0]], path, restarting[path[:-1]])
        yield Found(f"{positions} not restart with it.", subject.rows(left), hint)


def _is_position(subject: Subject, number: int) -> bool:
    name, shape = subject.name(number), getattr(subject.values[number], "shape", None)
    return is_named_position(name) and may_be_position(subject.types[number], shape, subject.dtype(number), name)


def _lost(subject: Subject, numbers: Sequence[int], fact: str) -> Iterator[Found]:
    """Finds kinds that are not saved, for leaves that should be; `{n}` in the fact counts them."""
    for name, lost in _by_kind(subject, numbers, saved=False).items():
        message = f"The kind {name!r} is {fact.format(n=counted(len(lost), 'leaf', 'leaves'))}."
        yield Found(message, subject.rows(lost), kind_with(name, "saved=True"))


@RULES.rule("rng-not-saved", "a resumed run draws again the numbers that the first one drew")
def rng_not_saved(subject: Subject) -> Iterator[Found]:
    """Finds random streams in kinds that are not saved."""
    yield from _lost(subject, subject.of_type(nnx.RngState), "not saved, and holds {n} of the RNG streams")


@RULES.rule(
    "statistics-not-saved",
    "a restored model normalizes by the statistics of a fresh one: right in training, wrong in evaluation",
)
def statistics_not_saved(subject: Subject) -> Iterator[Found]:
    """Finds running statistics in kinds that are not saved."""
    yield from _lost(subject, statistics_of(subject), "not saved, and holds {n} of running statistics")


@RULES.rule("trained-but-not-saved", "what training learned is gone after a restart")
def trained_but_not_saved(subject: Subject) -> Iterator[Found]:
    """Finds trained leaves in kinds that are not saved."""
    for training in trainings(subject):
        yield from _lost(subject, list(training.trained), "trained, and not saved")
