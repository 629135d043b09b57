"""Stale kinds: what a step checks before it reads one, and what it records once it has changed their sources.

Everything that depends only on the step is worked out when it is traced.  A call looks at one attribute of each part
that depends on others and that it reads; it looks further only after one of those others has changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from statewise._src.common.compat import is_untraced
from statewise._src.core.part import Origin, Part
from statewise._src.core.plan import State
from statewise._src.core.restart import restart
from statewise._src.core.versions import changed_sources
from statewise._src.plan.fresh_values import takes
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Operands
from statewise.errors import StaleError

__all__ = ["Staleness", "staleness_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Dependent:
    """A kind that depends on others, as a step treats it.

    Attributes:
      name: the kind.
      index: its position.
      sources: the kinds that it depends on, each with its position, and whether the kind's new values may have been
        made from that kind's old ones.
      written: whether the step writes it.
      renewed: whether the step writes all of it without reading any.
      checked: whether it is not stale when the step runs, as the step reads it.
      from_old: whether its new values may have been made from values of a source that a call replaces.
    """

    name: str
    index: int
    sources: tuple[tuple[str, int, bool], ...]
    written: bool
    renewed: bool
    checked: bool
    from_old: bool

    def origin(self, before: Sequence[Part], after: Sequence[Part]) -> Origin:
        """Returns what the kind's values were made from, from the parts before and after a call."""
        return Origin(
            {source: (before if from_old else after)[index].version() for source, index, from_old in self.sources}
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Staleness:
    """What a step does about kinds that depend on others, static.

    Attributes:
      plan: the plan.
      read: each kind that it reads and that must not be stale: its position, and the names and positions of the kinds
        that it depends on.
      affected: the kinds of which something has to be recorded after a call: it writes them, or their sources.
    """

    plan: PlanTables
    read: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    affected: tuple[Dependent, ...]

    @property
    def may_be_stale(self) -> tuple[int, ...]:
        """Returns the positions of the kinds to look at before a call: one whose part has no origin is not stale."""
        return tuple(index for index, _ in self.read)

    def checked(self, state: State, name: str) -> State:
        """Returns a state in which nothing is stale that the step reads: the same state, unless kinds restart first.

        Raises:
          StaleError: it reads a kind that is stale, and that raises an error then.
        """
        parts = state.parts
        for index, sources in self.read:
            origin = parts[index].origin
            if origin is not None:
                made = origin.versions
                for source, at in sources:
                    if made.get(source) is not parts[at].known_version:
                        return self._examined(state, name)
        return state

    def _examined(self, state: State, name: str) -> State:
        # Inside a transform nothing is known of the arrays, and nothing is claimed.
        if not is_untraced():
            return state
        # Not in place: the step may still fail, or return no state, and then this one is used again.  Again, because a
        # kind that depends on one that was restarted is stale only now.
        while restarts := self.check(state, name):
            state = restart(state, restarts, None, None, donate=False)
        return state

    def check(self, state: State, name: str) -> list[str]:
        """Checks that nothing is stale that the step reads; returns the stale kinds that restart first.

        Raises:
          StaleError: it reads a kind that is stale, and that raises an error then.
        """
        kinds = list(self.plan.kinds)
        read = [kinds[index] for index, _ in self.read]
        stale = [kind for kind in read if changed_sources(self.plan, state.parts, kind)]
        refused = [kind for kind in stale if self.plan.kinds[kind].stale == "error"]
        if refused:
            raise _stale_error(state, refused, name)
        return stale

    def settle(self, before: Sequence[Part], after: Sequence[Part]) -> None:
        """Records what the kinds of a new state were made from.

        Args:
          before: the parts that the step was called with.
          after: those that it returns.
        """
        for kind in self.affected:
            old, new = before[kind.index], after[kind.index]
            if not kind.written:  # the same part, beside other values from now on
                if old.origin is None:
                    old.origin = kind.origin(before, after)
            elif old.origin is None or kind.checked or kind.renewed:
                # Without an origin it was made from what is now beside it.
                new.origin = kind.origin(before, after) if kind.from_old else None
            else:
                new.origin = old.origin


def staleness_of(plan: PlanTables, operands: Operands, *, may_keep: bool) -> Staleness | None:
    """Returns what a step does about kinds that depend on others; None if it involves none of them.

    Args:
      plan: the plan.
      operands: the arrays that it reads and writes.
      may_keep: whether it may leave what it writes as it was, after a look at the values.
    """
    if not plan.sources:
        return None
    reads = {plan.arrays[number].kind for number in operands.read}
    writes = {plan.arrays[number].kind for number in operands.written}
    read: list[tuple[int, tuple[tuple[str, int], ...]]] = []
    affected: list[Dependent] = []
    for name, sources in plan.sources.items():
        index = plan.kind_index[name]
        if name in reads and plan.kinds[name].stale != "keep":
            read.append((index, tuple((source, plan.kind_index[source]) for source in sources)))
        if name in writes or writes.intersection(sources):
            complete = {info.number for info in plan.by_kind[name]} <= operands.written
            renewed = complete and name not in reads and not may_keep
            # Its new values were made from the old ones of a source that the step writes: by reading them, or because
            # the kind keeps something of its own old values.  From the new ones only if the step reads neither.
            own = tuple(
                (source, plan.kind_index[source], source in writes and (source in reads or not renewed))
                for source in sources
            )
            checked = bool(read) and read[-1][0] == index
            from_old = any(from_old for _, _, from_old in own)
            # A new part has no origin: nothing is recorded of a kind that belongs to what is beside it after each call.
            if from_old or not (checked or renewed):
                affected.append(Dependent(name, index, own, name in writes, renewed, checked, from_old))
    return Staleness(plan, tuple(read), tuple(affected)) if read or affected else None


def _stale_error(state: State, kinds: Sequence[str], name: str) -> StaleError:
    """Returns the error of a step that reads stale kinds."""
    plan = state.tables
    facts, hints = [], []
    able = [kind for kind in kinds if plan.kinds[kind].restart is not None and not plan.kinds[kind].frozen]
    if able:
        options = ", key=jax.random.key(0)" if any(takes(plan.kinds[kind].restart).key for kind in able) else ""
        hints.append(f"state = state.restart({', '.join(map(repr, able))}{options})")
    for kind in kinds:
        changed = changed_sources(plan, state.parts, kind)
        have = "has" if len(changed) == 1 else "have"
        facts.append(f"{kind}, which is stale: {' and '.join(changed)} {have} changed since")
        if kind not in able:
            hints.append(f"state = state.replace({kind}=...)  # made from the present {' and '.join(changed)}")
        if kind not in able and not plan.kinds[kind].frozen:
            hints.append(f"or declare it with restart=jnp.zeros_like, and: state = state.restart({kind!r})")
    return StaleError(
        f"{name} reads {'; and '.join(facts)}.",
        leaves=[leaf for leaf in plan.leaves if leaf.kind in kinds],
        kind=kinds[0] if len(kinds) == 1 else None,
        hint="\n".join(hints),
    )
