"""A state machine: whatever is done to states, in whatever order, a kind is stale exactly where a simple model says so.

The model has a number for each kind's values in each state, and, for each kind that depends on others, the numbers that
it was made from (None: not known, so not stale).  It knows nothing of parts, or of which states share them.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import statewise as sw
from stale_layer import (
    KINDS,
    PLAN,
    SOURCES,
    Layer,
    decode,
    fill,
    load,
    memoize,
    read_draft,
    read_memo,
    sketch,
    train,
    train_and_decode,
    tune,
)
from statewise._src.core.versions import changed_sources


@dataclasses.dataclass
class Facts:
    """What the model knows of a state."""

    ids: dict[str, int]
    made: dict[str, dict[str, int] | None]
    slots: dict[str, tuple[dict[str, int], frozenset[int]]]  # of the cache: restarted since, for which values

    def stale(self, kind: str) -> tuple[str, ...]:
        made = self.made[kind]
        return () if made is None else tuple(s for s in SOURCES[kind] if s in made and made[s] != self.ids[s])

    def now(self, kind: str) -> dict[str, int]:
        return {source: self.ids[source] for source in SOURCES[kind]}

    def copy(self) -> Facts:
        return Facts(dict(self.ids), dict(self.made), dict(self.slots))

    def changed(self, new: dict[str, int], made: dict[str, dict[str, int] | None] | None = None) -> Facts:
        """The facts after kinds got other values; `made` has those that were not made from their old values."""
        after = self.copy()
        after.ids |= new
        for kind, sources in SOURCES.items():
            if made is not None and kind in made:
                after.made[kind] = made[kind]
                after.slots.pop(kind, None)
            elif after.made[kind] is None and any(source in new for source in sources):
                after.made[kind] = self.now(kind)
        return after


NUMBERS = itertools.count()
NUMBER = st.integers(0, 3)


def fresh_state() -> tuple[sw.State, Facts]:
    return PLAN.take(Layer()), unknown()


def unknown() -> Facts:
    return Facts({kind: next(NUMBERS) for kind in PLAN.kinds}, dict.fromkeys(SOURCES), {})


class States(RuleBasedStateMachine):
    """Several states, which may share parts; those whose arrays another one has donated are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[tuple[sw.State, Facts]] = []
        # A model with what a state has put there; which values those were.
        self.model: tuple[Layer, Facts] | None = None
        # What `state[kind]` returned: the arrays, whose values they are, and what they were made from.
        self.views: list[tuple[str, Any, int, dict[str, int] | None]] = []

    @initialize()
    def start(self) -> None:
        self.pool = [fresh_state()]

    def add(self, state: sw.State, facts: Facts) -> None:
        self.pool.append((state, facts))
        # A step marks what it donates even where JAX leaves the memory alone, as it does if the step does not read it.
        self.pool = [pair for pair in self.pool[-4:] if not any(part.donated_by for part in pair[0].parts)]
        if not self.pool:
            self.pool = [fresh_state()]

    def picked(self, number: int) -> tuple[sw.State, Facts]:
        return self.pool[number % len(self.pool)]

    def run(self, step: Any, number: int, read: tuple[str, ...], result: Callable[[Facts], Facts] | None) -> None:
        state, facts = self.picked(number)
        stale = [kind for kind in read if facts.stale(kind)]
        if any(KINDS[kind].stale == "error" for kind in stale):
            with pytest.raises(sw.StaleError) as raised:
                step(state, 1.0)
            refused = [kind for kind in stale if KINDS[kind].stale == "error"]
            assert {leaf.kind for leaf in raised.value.leaves} == set(refused)
            assert all(source in raised.value.message for kind in refused for source in facts.stale(kind))
            return
        for kind in stale:  # restarted first
            facts = facts.changed({kind: next(NUMBERS)}, {kind: None})
        out = step(state, 1.0)
        if result is not None:
            self.add(out[0], result(facts))

    # --- steps ---------------------------------------------------------------------------------------------------

    @rule(number=NUMBER)
    def trains(self, number: int) -> None:
        self.run(train, number, (), lambda facts: facts.changed({"params": next(NUMBERS), "ema": next(NUMBERS)}))

    @rule(number=NUMBER)
    def tunes(self, number: int) -> None:
        self.run(tune, number, (), lambda facts: facts.changed({"adapter": next(NUMBERS)}))

    @rule(number=NUMBER)
    def decodes(self, number: int) -> None:
        self.run(decode, number, ("cache",), lambda facts: facts.changed({"cache": next(NUMBERS)}))

    @rule(number=NUMBER)
    def fills(self, number: int) -> None:
        self.run(fill, number, (), lambda facts: facts.changed({"cache": next(NUMBERS)}, {"cache": None}))

    @rule(number=NUMBER)
    def trains_and_decodes(self, number: int) -> None:
        def after(facts: Facts) -> Facts:  # the cache was made with the parameters that came in
            return facts.changed({"params": next(NUMBERS), "cache": next(NUMBERS)}, {"cache": facts.now("cache")})

        self.run(train_and_decode, number, ("cache",), after)

    @rule(number=NUMBER)
    def loads(self, number: int) -> None:
        # Neither is read: the cache is made from the new parameters, if from any.
        new = {"params": next(NUMBERS), "cache": next(NUMBERS)}
        self.run(load, number, (), lambda facts: facts.changed(new, {"cache": None}))

    @rule(number=NUMBER)
    def memoizes(self, number: int) -> None:
        self.run(memoize, number, ("cache", "memo"), lambda facts: facts.changed({"memo": next(NUMBERS)}))

    @rule(number=NUMBER)
    def reads_memo(self, number: int) -> None:
        self.run(read_memo, number, ("memo",), None)

    @rule(number=NUMBER)
    def sketches(self, number: int) -> None:
        self.run(sketch, number, ("draft",), lambda facts: facts.changed({"draft": next(NUMBERS)}))

    @rule(number=NUMBER)
    def reads_draft(self, number: int) -> None:
        self.run(read_draft, number, ("draft",), None)  # restarts for itself alone

    # --- verbs ---------------------------------------------------------------------------------------------------

    @rule(number=NUMBER, kind=st.sampled_from(list(SOURCES)))
    def restarts(self, number: int, kind: str) -> None:
        state, facts = self.picked(number)
        self.add(state.restart(kind), facts.changed({kind: next(NUMBERS)}, {kind: None}))

    @rule(number=NUMBER, slots=st.sets(NUMBER), on_device=st.booleans())
    def restarts_slots(self, number: int, slots: set[int], on_device: bool) -> None:
        state, facts = self.picked(number)
        mask = [slot in slots for slot in range(4)]
        where: Any = jnp.array(mask) if on_device else mask
        after = facts.changed({"cache": next(NUMBERS)})
        if facts.stale("cache"):
            now, before = facts.now("cache"), facts.slots.get("cache")
            renewed = frozenset(slots) | (before[1] if before is not None and before[0] == now else frozenset())
            after.slots["cache"] = now, renewed
            if len(renewed) == 4:
                after = facts.changed({"cache": after.ids["cache"]}, {"cache": None})
        self.add(state.restart("cache", where=where), after)

    @rule(number=NUMBER, kind=st.sampled_from(["params", "adapter", "cache", "memo"]))
    def replaces_with_new_values(self, number: int, kind: str) -> None:
        state, facts = self.picked(number)
        new = jax.tree.map(lambda array: array + 1, state[kind])
        made: dict[str, Any] = {kind: None} if kind in SOURCES else {}
        self.add(state.replace(**{kind: new}), self.seen(facts, kind).changed({kind: next(NUMBERS)}, made))

    @rule(number=NUMBER, kind=st.sampled_from(["params", "adapter", "cache", "memo"]))
    def looks(self, number: int, kind: str) -> None:
        state, facts = self.picked(number)
        self.seen(facts, kind)
        self.views = [*self.views[-3:], (kind, state[kind], facts.ids[kind], facts.made.get(kind))]

    @staticmethod
    def seen(facts: Facts, kind: str) -> Facts:
        """What leaves a state is remembered with what was beside it."""
        if kind in SOURCES and facts.made[kind] is None:
            facts.made[kind] = facts.now(kind)
        return facts

    @precondition(lambda self: self.views)
    @rule(number=NUMBER, which=NUMBER)
    def replaces_with_a_view(self, number: int, which: int) -> None:
        state, facts = self.picked(number)
        kind, arrays, number_of, made = self.views[which % len(self.views)]
        if any(array.is_deleted() for array in jax.tree.leaves(arrays)):
            return
        own = {kind: made} if kind in SOURCES else {}
        new = {kind: number_of} if number_of != facts.ids[kind] else {}
        self.add(state.replace(**{kind: arrays}), facts.changed(new, own))

    @rule(number=NUMBER)
    def swaps_averages(self, number: int) -> None:
        state, facts = self.picked(number)
        self.add(state.with_averages("ema"), facts.changed({"params": next(NUMBERS)}))

    @rule(number=NUMBER)
    def casts_to_its_own_dtype(self, number: int) -> None:
        state, facts = self.picked(number)
        self.add(state.cast(params="float32"), facts.copy())

    @rule(number=NUMBER)
    def casts_there_and_back(self, number: int) -> None:
        state, facts = self.picked(number)
        back = state.cast(params="bfloat16").cast(params="float32")
        self.add(back, facts.changed({"params": next(NUMBERS)}))

    @rule(
        source=NUMBER,
        number=NUMBER,
        kinds=st.sampled_from(["params", "adapter", ("params", "adapter")]),
    )
    def transfers_some(self, source: int, number: int, kinds: Any) -> None:
        (src, _), (state, facts) = self.picked(source), self.picked(number)
        new = {kind: next(NUMBERS) for kind in ([kinds] if isinstance(kinds, str) else kinds)}
        self.add(sw.transfer(src, state, kinds=kinds), facts.changed(new))

    @rule(number=NUMBER)
    def transfers_all(self, number: int) -> None:
        state, facts = self.picked(number)
        self.add(sw.transfer(state, PLAN), self.copied(facts))

    @rule(number=NUMBER)
    def goes_through_an_ensemble(self, number: int) -> None:
        state, facts = self.picked(number)
        self.add(PLAN.stack([state, state]).member(1), self.copied(facts))

    @staticmethod
    def copied(facts: Facts) -> Facts:
        """New values, of which it is still known which were stale."""
        after = unknown()
        for kind in SOURCES:
            if stale := facts.stale(kind):
                after.made[kind] = after.now(kind) | dict.fromkeys(stale, -1)
        return after

    @rule(number=NUMBER)
    def goes_through_jax(self, number: int) -> None:
        state, _ = self.picked(number)
        self.add(jax.tree.map(jnp.copy, state), unknown())

    @rule(number=NUMBER)
    def trains_in_a_jit(self, number: int) -> None:
        state, _ = self.picked(number)
        self.add(jax.jit(lambda state: decode(train(state, 1.0)[0], 1.0)[0])(state), unknown())

    # --- models and checkpoints ----------------------------------------------------------------------------------

    @rule(number=NUMBER, build=st.booleans())
    def puts(self, number: int, build: bool) -> None:
        state, facts = self.picked(number)
        for kind in SOURCES:
            self.seen(facts, kind)
        model = PLAN.build(state) if build else Layer()
        if not build:
            PLAN.put(state, model)
        self.model = model, facts.copy()

    @precondition(lambda self: self.model is not None)
    @rule(name=st.sampled_from(["scale", "shift"]))
    def changes_the_model(self, name: str) -> None:
        assert self.model is not None
        model, facts = self.model
        variable = getattr(model, name)
        variable[...] = variable[...] + 1
        self.model = model, facts.changed({"params" if name == "scale" else "adapter": next(NUMBERS)})

    @precondition(lambda self: self.model is not None)
    @rule()
    def takes(self) -> None:
        assert self.model is not None
        model, facts = self.model
        for kind in SOURCES:
            self.seen(facts, kind)
        self.add(PLAN.take(model), facts.copy())

    @rule(number=NUMBER)
    def saves_and_restores_all(self, number: int) -> None:
        state, _ = self.picked(number)
        with tempfile.TemporaryDirectory() as folder:
            sw.save(f"{folder}/state", state)
            restored, report = sw.restore(f"{folder}/state", state)
        assert {leaf.outcome for leaf in report.leaves if leaf.leaf.kind in ("cache", "draft")} == {"restarted"}
        self.add(restored, unknown())

    @rule(number=NUMBER)
    def restores_parameters(self, number: int) -> None:
        state, facts = self.picked(number)
        with tempfile.TemporaryDirectory() as folder:
            sw.save(f"{folder}/state", state)
            restored, _ = sw.restore(f"{folder}/state", state, only="params")
        self.add(restored, facts.changed({"params": next(NUMBERS), "ema": next(NUMBERS)}))

    # --- the law -------------------------------------------------------------------------------------------------

    @invariant()
    def the_model_agrees(self) -> None:
        for state, facts in self.pool:
            found = {kind: changed_sources(state.tables, state.parts, kind) for kind in SOURCES}
            assert found == {kind: facts.stale(kind) for kind in SOURCES}


TestStates = States.TestCase
TestStates.settings = settings(deadline=None, stateful_step_count=25)
