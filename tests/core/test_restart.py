"""Fresh values for whole kinds and for chosen slots, in place; every restart that cannot be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from comparing import same
from refusals import refused
from strategies import Node, OwnStat

SLOTS = 4
KINDS = sw.Kinds(
    cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0),
    last=sw.Kind(OwnStat, restart=lambda array: array * 0 + 7, batch_axis=-1),
    whole=sw.Kind(nnx.BatchStat, restart=jnp.ones_like),
    base=sw.Kind("base", frozen=True, restart=jnp.zeros_like),
    rest=sw.Kind(...),
)


def model() -> Node:
    return Node(
        k=nnx.Cache(jnp.arange(1.0, 1 + SLOTS * 6).reshape(SLOTS, 2, 3)),
        v=nnx.Cache({"a": jnp.arange(1, 1 + SLOTS), "b": (jnp.ones((SLOTS, 0)),)}),
        last=OwnStat(jnp.arange(1.0, 1 + 2 * SLOTS, dtype=jnp.bfloat16).reshape(2, SLOTS)),
        whole=nnx.BatchStat(jnp.zeros(3)),
        base=nnx.Param(jnp.ones(2), tag="base"),
        w=nnx.Param(jnp.ones(2)),
    )


def taken() -> sw.State:
    return KINDS.plan(model()).take(model())


# --- whole kinds -------------------------------------------------------------------------------------------------


def test_a_kind_gets_fresh_values_and_the_others_are_shared() -> None:
    state = taken()
    after = state.restart("cache")
    assert not any(bool(array.any()) for array in jax.tree.leaves(after["cache"]))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(after.part(kind) is state.part(kind) for kind in KINDS if kind != "cache")
    assert same(after.restart("cache"), taken().restart("cache"))


def test_several_kinds_at_once_and_twice_the_same() -> None:
    after = taken().restart("cache", "whole", "cache")
    assert not after["cache"]["k"].any()
    assert after["whole"]["whole"].all()
    assert np.array_equal(after["last"]["last"], taken()["last"]["last"])


def test_by_default_all_that_can_and_are_not_frozen() -> None:
    after = taken().restart()
    assert not after["cache"]["k"].any()
    assert (after["last"]["last"] == 7).all()
    assert after["whole"]["whole"].all()
    assert after["base"]["base"].all()
    assert after["rest"]["w"].all()


def test_the_buffers_are_donated_and_the_old_state_says_so() -> None:
    state = taken()
    kept = state["rest"]["w"]
    old = jax.tree.leaves(state["cache"])
    after = state.restart("cache")
    assert all(array.is_deleted() for array in old if array.size)
    assert not kept.is_deleted()
    message = "This state was donated: restart('cache') has donated its cache."
    hint = (
        "use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)"
    )
    for attempt in (lambda: state.restart("cache"), lambda: state.plan.build(state), lambda: state.restart()):
        with refused(sw.StructureError, message, kind="cache", hint=hint):
            attempt()
    assert (state.restart("last")["last"]["last"] == 7).all(), "the other kinds are as they were"
    assert not after["cache"]["k"].any()


def test_a_state_donated_by_the_user_s_own_jit() -> None:
    state = taken()
    jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)(state)
    with pytest.raises(sw.StructureError, match=r"^This state was donated: a step has donated its cache\."):
        state.restart("cache")


def test_any_function_of_one_array_can_restart() -> None:
    thing = Node(keys=nnx.RngKey(jax.random.split(jax.random.key(0), 3), tag="a"), w=nnx.Param(jnp.ones(1)))
    kinds = sw.Kinds(key=sw.Kind(nnx.RngKey, restart=lambda keys: keys[::-1], batch_axis=0), rest=sw.Kind(...))
    plan = kinds.plan(thing)
    before = jax.random.key_data(thing.keys[...])
    assert np.array_equal(jax.random.key_data(plan.take(thing).restart()["key"]["keys"]), before[::-1])
    after = plan.take(thing).restart("key", where=[0])["key"]["keys"]
    assert np.array_equal(jax.random.key_data(after), [before[2], before[1], before[2]])


def test_under_transforms() -> None:
    state = taken()
    jitted = jax.jit(lambda state: state.restart("cache"))(state)
    assert not jitted["cache"]["k"].any()
    assert state["cache"]["k"].all(), "nothing is donated inside the user's own jit"
    carried, _ = jax.lax.scan(lambda state, mask: (state.restart("cache", where=mask), None), state, jnp.eye(4) > 0)
    assert not carried["cache"]["k"].any()
    stacked = jax.tree.map(lambda array: jnp.stack([array, array]), state)
    masks = jnp.array([[True, False, False, False], [False, False, False, True]])
    mapped = jax.vmap(lambda state, mask: state.restart("cache", where=mask))(stacked, masks)
    assert np.array_equal(mapped["cache"]["v"]["a"], [[0, 2, 3, 4], [1, 2, 3, 0]])
    with jax.disable_jit():
        eager = state.restart("cache", where=[1])
    assert np.array_equal(eager["cache"]["v"]["a"], [1, 0, 3, 4])
    shapes = jax.eval_shape(lambda state: state.restart(), state)
    assert shapes.plan is state.plan


def test_it_is_compiled_once() -> None:
    calls = []

    def fresh(array: Any) -> Any:
        calls.append(array.shape)
        return jnp.zeros_like(array)

    thing = Node(a=nnx.Cache(jnp.ones((SLOTS, 2))))
    plan = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=fresh, batch_axis=0)).plan(thing)
    state = plan.take(thing)
    for _ in range(3):
        state = state.restart()
    for slot in range(3):
        state = state.restart("cache", where=[slot])
        state = state.restart("cache", where=jnp.arange(SLOTS) == slot)
    assert calls == [(SLOTS, 2)] * 2


# --- chosen slots ------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS))
def test_slots_are_restarted_like_where(mask: list[bool]) -> None:
    before, fresh = taken(), taken().restart("cache", "last")
    expected = {
        "k": np.where(np.array(mask)[:, None, None], fresh["cache"]["k"], before["cache"]["k"]),
        "a": np.where(mask, fresh["cache"]["v"]["a"], before["cache"]["v"]["a"]),
        "last": np.where(np.array(mask)[None, :], fresh["last"]["last"], before["last"]["last"]),
    }
    numbers = [slot for slot, chosen in enumerate(mask) if chosen]
    wheres = (mask, np.array(mask), jnp.array(mask), numbers, np.array(numbers, np.int64), [n - SLOTS for n in numbers])
    for where in wheres:
        after = taken().restart("cache", "last", where=where)
        assert np.array_equal(after["cache"]["k"], expected["k"])
        assert np.array_equal(after["cache"]["v"]["a"], expected["a"])
        assert np.array_equal(after["last"]["last"], expected["last"])
        assert after["last"]["last"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        (0, "int64[]"),
        (jnp.array(True), "bool[]"),
        ([[True] * SLOTS], "bool[1, 4]"),
        ([0.0, 1.0], "float64[2]"),
        (["a"], "<U1[1]"),
        (jnp.ones(SLOTS), "float32[4]"),
    ],
)
def test_where_is_neither_booleans_nor_numbers(where: Any, shown: str) -> None:
    state = taken()
    with refused(
        sw.StructureError,
        f"where must be booleans or slot numbers in one dimension, not {shown}.",
        hint="where=jnp.array([True, False]) or where=[0]",
    ):
        state.restart("cache", where=where)
    assert same(state, taken())


@pytest.mark.parametrize("slot", [SLOTS, -SLOTS - 1, 99])
def test_a_slot_that_is_not_there(slot: int) -> None:
    state = taken()
    with refused(sw.StructureError, f"There is no slot {slot}: there are 4.", kind="cache", hint="slots 0 to 3"):
        state.restart("cache", where=[0, slot])
    assert same(state, taken())


def test_a_mask_of_another_length() -> None:
    state = taken()
    with refused(
        sw.StructureError,
        "where has 3 entries, but cache has 4 slots.",
        kind="cache",
        hint="a boolean for each of the 4 slots, or slot numbers",
    ):
        state.restart("cache", where=[True, False, True])
    assert same(state, taken())


@pytest.mark.parametrize("where", [[0], [True] * SLOTS])
def test_leaves_without_the_axis_or_of_another_length(where: Any) -> None:
    thing = Node(
        k=nnx.Cache(jnp.ones((SLOTS, 2))),
        index=nnx.Cache(jnp.array(3)),
        small=nnx.Cache(jnp.ones((2, 2))),
        both=nnx.Cache({"x": jnp.ones(2), "y": jnp.ones(SLOTS)}),
    )
    state = sw.Kinds(cache=KINDS["cache"]).plan(thing).take(thing)
    odd = "sw.Path('both') | sw.Path('index') | sw.Path('small')"
    with refused(
        sw.StructureError,
        "Not every leaf of cache has 4 slots along its batch axis.",
        kind="cache",
        leaves=[
            "both: Cache- -  kind=cache  (2 slots)",
            "index: Cache() int32  kind=cache  (does not have this axis)",
            "small: Cache(2, 2) float32  kind=cache  (2 slots)",
        ],
        hint="kinds = plan.kinds.replace(cache=dataclasses.replace(plan.kinds['cache'], "
        f"of=nnx.All(plan.kinds['cache'].of, nnx.Not({odd})))) | "
        "sw.Kinds(cache_of_all=dataclasses.replace(plan.kinds['cache'], "
        f"of=nnx.All(plan.kinds['cache'].of, {odd}), batch_axis=None))  # a separate kind\n"
        "or restart all slots: state.restart('cache')",
    ):
        state.restart("cache", where=where)
    assert not any(bool(array.any()) for array in jax.tree.leaves(state.restart("cache")))


def test_no_leaf_has_the_axis() -> None:
    thing = Node(index=nnx.Cache(jnp.array(3)))
    state = sw.Kinds(cache=KINDS["cache"]).plan(thing).take(thing)
    with refused(
        sw.StructureError,
        "Not every leaf of cache has its batch axis.",
        kind="cache",
        leaves=["index: Cache() int32  kind=cache  (does not have this axis)"],
        hint="state.restart('cache')",
    ):
        state.restart("cache", where=[0])


def test_the_attention_of_flax_has_one_index_for_all_slots() -> None:
    thing = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    thing.init_cache((SLOTS, 5, 4))
    kinds = sw.Kinds.standard().replace(cache=KINDS["cache"])
    with pytest.raises(
        sw.StructureError, match=r"cache_index: Cache\(\) int32  kind=cache  \(does not have this axis\)"
    ):
        kinds.plan(thing).take(thing).restart("cache", where=[0])


def test_slots_of_stacked_states_are_not_guessed() -> None:
    """Its first axis is no slot: in a stack of four it would even have the right length."""
    stacked = jax.tree.map(lambda array: jnp.stack([array] * SLOTS), taken())
    with pytest.raises(
        sw.StructureError, match=r"k: Cache\(4, 2, 3\) float32  kind=cache  \(is \(4, 4, 2, 3\) in the state\)"
    ):
        stacked.restart("cache", where=[0])
    assert not stacked.restart("cache")["cache"]["k"].any()


# --- what cannot be restarted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message", "hint"),
    [
        ("base", {}, "Kind 'base' is frozen and cannot be restarted.", "frozen=False"),
        (
            "rest",
            {},
            "Kind 'rest' does not declare how a fresh value is made.",
            "kinds = plan.kinds.replace(rest=dataclasses.replace(plan.kinds['rest'], restart=jnp.zeros_like))",
        ),
        (
            "whole",
            {"where": [0]},
            "Kind 'whole' does not declare a batch_axis, so its slots cannot be distinguished.",
            "kinds = plan.kinds.replace(whole=dataclasses.replace(plan.kinds['whole'], batch_axis=0))",
        ),
    ],
)
def test_a_kind_that_cannot_be_restarted(kind: str, options: Any, message: str, hint: str) -> None:
    state = taken()
    with refused(sw.DeclarationError, message, kind=kind, hint=hint):
        state.restart("cache", kind, **options)
    assert same(state, taken()), "nothing of the others is restarted either"


def test_a_kind_without_leaves() -> None:
    thing = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    state = sw.plan(thing).take(thing)
    with refused(
        sw.DeclarationError,
        "Kind 'cache' has no leaves in this model, so there is nothing to restart.",
        kind="cache",
        hint="make the leaves before the plan is made, as with model.init_cache(...)",
    ):
        state.restart("cache")
    with refused(
        sw.DeclarationError,
        "There is nothing to restart: no kind that has leaves declares how a fresh value is made.",
        hint="cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like)",
    ):
        state.restart()


@pytest.mark.parametrize(
    ("fresh", "note"),
    [
        (lambda array: array.astype(jnp.bfloat16), "would become (4,) bfloat16"),
        (lambda array: array[:2], "would become (2,) float32"),
        (lambda array: 0, "would become () int32"),
    ],
)
def test_a_restart_that_changes_shape_or_dtype(fresh: Any, note: str) -> None:
    thing = Node(a=nnx.Cache(jnp.ones(4)), b=nnx.Cache(jnp.ones(4)))
    state = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=fresh)).plan(thing).take(thing)
    with refused(
        sw.StructureError,
        "The restart of kind 'cache' changes shapes or dtypes.",
        kind="cache",
        leaves=[f"a: Cache(4,) float32  kind=cache  ({note})", f"b: Cache(4,) float32  kind=cache  ({note})"],
        hint="restart=jnp.zeros_like, or any function that keeps shape and dtype",
    ):
        state.restart("cache")
    assert state["cache"]["a"].all()


def test_an_abstract_state_has_nothing_to_restart() -> None:
    message = "This state is abstract: it has shapes but no values to restart."
    hint = "state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)"
    with refused(sw.StructureError, message, kind="cache", hint=hint):
        KINDS.plan(model()).abstract().restart("cache")


def test_a_restart_that_raises() -> None:
    thing = Node(a=nnx.Cache(jnp.ones(4)))
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=lambda array: 1 / 0))
    state = kinds.plan(thing).take(thing)
    with pytest.raises(ZeroDivisionError):
        state.restart("cache")
    assert state["cache"]["a"].all()


def test_one_array_in_two_leaves_of_a_state_made_by_hand() -> None:
    array = jnp.ones(4)
    thing = Node(a=nnx.Cache(jnp.ones(4)), b=nnx.Cache(jnp.ones(4)))
    plan = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like)).plan(thing)
    state = jax.tree.map(lambda _: array, plan.take(thing))
    with refused(
        sw.StructureError,
        "a and b share one array, so a step could not write them separately.",
        kind="cache",
        leaves=["a: Cache(4,) float32  kind=cache", "b: Cache(4,) float32  kind=cache"],
        hint="give one of them a copy: jax.tree.map(jnp.copy, part)",
    ):
        state.restart("cache")


def test_a_mask_of_another_length_is_told_from_leaves_of_another_length() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.ones(3)))
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0))
    with pytest.raises(sw.StructureError) as caught:
        kinds.plan(model).take(model).restart("cache", where=[True, False])
    assert str(caught.value) == (
        "where has 2 entries, but cache has 3 slots.\n  hint: a boolean for each of the 3 slots, or slot numbers"
    )
