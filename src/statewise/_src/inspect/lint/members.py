"""What lint says of an ensemble: of each member what it says of one model, and what only all of them together tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.problems import counted
from statewise._src.core.plan import Plan, State, tables_in
from statewise._src.core.vmap_axes import is_stream
from statewise._src.inspect.lint.finding import Finding, Found, Rule
from statewise._src.inspect.lint.read_values import is_readable
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.tables import PlanTables

__all__ = ["RULES", "each_member", "findings", "is_ensemble"]


def is_ensemble(thing: Any) -> bool:
    """Whether it is a plan or a state of an ensemble."""
    tables = tables_in(thing)
    return tables is not None and tables.ensemble is not None


def each_member(ensemble: Any, lint: Callable[[Any], Sequence[Finding]]) -> list[Finding]:
    """What lint finds in the members, what it finds in several of them once."""
    tables = tables_in(ensemble)
    assert tables is not None, "asked of an ensemble"
    assert tables.ensemble is not None, "asked of an ensemble"
    if not isinstance(ensemble, State) or not _has_values(ensemble):
        return list(lint(Plan.of(tables.ensemble.single)))
    number = tables.ensemble.number
    by_fact: dict[tuple[Any, ...], tuple[Finding, list[int]]] = {}
    for member in range(number):
        for finding in lint(ensemble.member(member)):
            by_fact.setdefault((finding.code, finding.message, finding.leaves), (finding, []))[1].append(member)
    return [finding if len(of) == number else _of_some(finding, of) for finding, of in by_fact.values()]


def _of_some(finding: Finding, members: Sequence[int]) -> Finding:
    which = f"member{'s' * (len(members) > 1)} {', '.join(map(str, members))}"
    return dataclasses.replace(finding, message=f"{finding.message.removesuffix('.')}, in {which}.")


def _has_values(state: State) -> bool:
    return all(is_readable(array) for part in state.parts for array in part.arrays)


def findings(rule: Rule, ensemble: Any) -> list[Finding]:
    """What a rule of this page has to say of an ensemble."""
    if not isinstance(ensemble, State) or not _has_values(ensemble):
        return []
    return [Finding(rule.code, found.message, found.leaves, rule.why, found.hint) for found in _same_noise(ensemble)]


def _same_noise(state: State) -> Iterator[Found]:
    """Streams of several members that have one key."""
    plan = state.tables
    odd = []
    kinds: dict[str, None] = {}
    parts = {kind: plan.unpack(kind, state.part(kind).arrays) for kind in plan.kinds}
    for row, span, leaf in zip(plan.rows, plan.spans, plan.leaves, strict=False):
        if not is_stream(leaf, row.specs):
            continue
        for at in range(span.start, span.stop):
            axis = plan.by_kind[row.kind][at].axis
            if axis is None or not jnp.issubdtype(plan.specs[row.kind][at].dtype, jax.dtypes.prng_key):
                continue
            keys = np.moveaxis(
                np.asarray(jax.random.key_data(parts[row.kind][at])), _front(plan, row.kind, at, axis), 0
            )
            first: dict[bytes, int] = {}
            twins = [(member, first.setdefault(key.tobytes(), member)) for member, key in enumerate(keys)]
            twins = [(member, other) for member, other in twins if member != other]
            if twins:
                member, other = twins[0]
                odd.append(dataclasses.replace(leaf, note=f"member {member} as member {other}"))
                kinds[row.kind] = None
    if odd:
        streams = counted(len(odd), "random stream has", "random streams have")
        named = ", ".join(f"{kind}=None" for kind in kinds)
        yield Found(
            f"{streams} one key in several members.",
            tuple(odd),
            "make each member with a seed of its own: nnx.vmap(make_model)(jax.random.split(key, members))\n"
            f"or, where they are to draw the same noise, say so: plan.stacked({plan.members}, {named})",
        )


def _front(plan: PlanTables, kind: str, position: int, axis: int) -> int:
    """The axis of the members, from the front: the words of a key come after it."""
    return axis % len(plan.held_specs[kind][position].shape)


def _nothing(subject: Subject) -> Iterator[Found]:
    """Of one model there is nothing to say."""
    yield from ()


RULES = (
    Rule(
        "members-share-noise",
        "they draw the same dropout masks and samples, so that they differ less than an ensemble should",
        _nothing,
    ),
)
