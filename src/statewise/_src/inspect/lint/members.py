"""Lint of an ensemble: the findings in each member, and those that only all members together show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.graphdef import called
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import counted
from statewise._src.core.plan import Plan, State, tables_in
from statewise._src.inspect.lint.finding import Finding, Found, Rules
from statewise._src.inspect.lint.read_values import is_readable
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.members import Members

__all__ = ["RULES", "each_member", "members_of", "subject_of_members"]

RULES = Rules()


def members_of(item: object) -> Members | None:
    """Returns the members of a plan or a state of an ensemble; None for anything else."""
    tables = tables_in(item)
    return None if tables is None else tables.ensemble


def each_member(ensemble: object, members: Members, lint: Callable[[object], Sequence[Finding]]) -> list[Finding]:
    """Returns the findings in the members; a finding in several of them is listed once."""
    if not isinstance(ensemble, State) or not _has_values(ensemble):
        return list(lint(Plan.of(members.single)))
    # Members differ in their values only, so the same finding has the same text and leaves in each.
    by_fact: dict[tuple[str, str, tuple[Leaf, ...]], tuple[Finding, list[int]]] = {}
    for member in range(members.number):
        for finding in lint(ensemble.member(member)):
            by_fact.setdefault((finding.code, finding.message, finding.leaves), (finding, []))[1].append(member)
    return [
        finding if len(found_in) == members.number else _of_some(finding, found_in)
        for finding, found_in in by_fact.values()
    ]


def _of_some(finding: Finding, members: Sequence[int]) -> Finding:
    which = f"member{'s' * (len(members) > 1)} {', '.join(map(str, members))}"
    return dataclasses.replace(finding, message=f"{finding.message.removesuffix('.')}, in {which}.")


def _has_values(state: State) -> bool:
    return all(is_readable(array) for part in state.parts for array in part.arrays)


def subject_of_members(ensemble: object) -> Subject:
    """Makes a subject for the rules that compare the members of an ensemble."""
    state = ensemble if isinstance(ensemble, State) and _has_values(ensemble) else None
    return Subject((), {}, True, tables_in(ensemble), None, ensemble=state)


@RULES.rule(
    "members-share-noise",
    "they draw the same dropout masks and samples, so that they differ less than an ensemble should",
)
def members_share_noise(subject: Subject) -> Iterator[Found]:
    """Finds random streams with one key in several members."""
    state = subject.ensemble
    if state is None:
        return
    plan = state.tables
    values = {kind: plan.unpack(kind, state.part(kind).arrays) for kind in plan.kinds}
    rows = []
    for array in plan.arrays:
        is_key = jnp.issubdtype(array.spec.dtype, jax.dtypes.prng_key)
        if array.axis is None or array.derived is not None or not is_key:
            continue
        words = np.asarray(jax.random.key_data(values[array.kind][array.position]))
        # The words of a key are a last axis, so the axis of the members is counted from the front.
        keys = np.moveaxis(words, array.axis % len(array.held.shape), 0)
        first: dict[bytes, int] = {}
        pairs = [(member, first.setdefault(key.tobytes(), member)) for member, key in enumerate(keys)]
        twin = next(((member, other) for member, other in pairs if member != other), None)
        if twin is not None:
            rows.append(dataclasses.replace(array.leaf, note=f"member {twin[0]} as member {twin[1]}"))
    if rows:
        streams = counted(len(rows), "random stream has", "random streams have")
        mapped = called("nnx.vmap", "make_model", graphdef=plan.graphdef)
        shared = ", ".join(dict.fromkeys(f"{row.kind}=None" for row in rows))
        yield Found(
            f"{streams} one key in several members.",
            tuple(rows),
            f"make each member with a seed of its own: {mapped}(jax.random.split(key, members))\n"
            f"or, if they should draw the same noise, say so: plan.stacked({plan.members}, {shared})",
        )
