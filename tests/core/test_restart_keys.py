"""Restarts that draw: a key for each leaf and each slot, the path, and every way in which a key is wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import statewise as sw
from comparing import same
from drawing import INIT, SLOTS, adapter, adapters, drawn, key, noise, values
from meshes import mesh_of
from statewise._src.core import restart as core_restart
from strategies import Node, OwnStat

pytestmark = pytest.mark.heavy

# --- the law -----------------------------------------------------------------------------------------------------


@st.composite
def slotted(draw: st.DrawFn) -> tuple[Node, int, list[int]]:
    """A model whose leaves have an axis of slots, where it stands in them, and the slots to restart."""
    slots, axis = draw(st.integers(1, 5)), draw(st.sampled_from([0, 1, -1]))
    leaves = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "kernel", "x_y"]), min_size=1, max_size=2, unique=True)):
        # Of one shape, so that only the key can make two of them differ.
        shape = [3, 8]
        shape.insert(axis if axis >= 0 else 2, slots)
        dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
        value: Any = jnp.full(shape, 9.0, dtype)
        if draw(st.booleans()):
            value = {"in": value, "out": (jnp.full(shape, 9.0, dtype),)}
        leaves[name] = nnx.Param(value)
    model = Node(deep=nnx.List([Node(**leaves)]), z=nnx.Param(jnp.full(leaves and shape, 9.0)))
    return model, axis, draw(st.lists(st.integers(0, slots - 1), unique=True))


def by_slot(array: Any, axis: int) -> np.ndarray:
    return np.moveaxis(np.asarray(array, np.float32), axis, 0)


@settings(max_examples=6)
@given(slotted(), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_leaf_and_every_slot_draws_its_own_and_the_others_stay(
    made: tuple[Node, int, list[int]], pack: bool, seed: int
) -> None:
    model, axis, chosen = made
    plan = drawn(axis=axis).plan(model)
    before = jax.tree.leaves(plan.take(model)["lora"])
    after = jax.tree.leaves(plan.take(model, pack=pack).restart("lora", where=chosen, key=key(seed))["lora"])
    whole = jax.tree.leaves(plan.take(model).restart("lora", key=key(seed))["lora"])
    seen: list[bytes] = []
    for old, new, full in zip(before, after, whole, strict=True):
        assert new.dtype == old.dtype
        old_slots, new_slots, full_slots = (by_slot(array, axis) for array in (old, new, full))
        for slot in range(len(old_slots)):
            if slot in chosen:
                # Whichever others are restarted with it, or all.
                assert new_slots[slot].tobytes() == full_slots[slot].tobytes()
                seen.append(np.asarray(jnp.asarray(new_slots[slot], jnp.bfloat16)).tobytes())
            else:
                assert new_slots[slot].tobytes() == old_slots[slot].tobytes()
    assert len(set(seen)) == len(seen), "two leaves or slots have the same numbers"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_of_any_implementation_of_keys(impl: str) -> None:
    plan, model = drawn().plan(adapters()), adapters()
    whole = values(plan.take(model).restart("lora", key=jax.random.key(3, impl=impl)))
    some = values(plan.take(model).restart("lora", where=[2], key=jax.random.key(3, impl=impl)))
    assert all(np.array_equal(one[2], other[2]) for one, other in zip(some, whole, strict=True))
    assert len({array[slot].tobytes() for array in whole for slot in range(SLOTS)}) == len(whole) * SLOTS


def test_the_numbers_are_the_leafs_not_its_neighbours() -> None:
    """What is planned beside a leaf changes its position, and nothing else."""
    few, many = adapters(layers=1), adapters(layers=3)
    many.aaa = nnx.Param(jnp.zeros((SLOTS, 2)))
    one = drawn().plan(few).take(few).restart("lora", where=[1], key=key())["lora"]["layers"][0]
    other = drawn().plan(many).take(many).restart("lora", key=key())["lora"]["layers"][0]
    assert np.array_equal(one["lora_a"][1], other["lora_a"][1])
    more = adapters(slots=9, layers=1)
    wide = drawn().plan(more).take(more).restart("lora", key=key())["lora"]["layers"][0]
    assert np.array_equal(wide["lora_a"][:SLOTS], other["lora_a"])


def test_leaves_of_one_type_are_drawn_in_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA takes a second to compile the random numbers of one key: twenty layers are not twenty seconds."""
    called = []

    def draw(array: Any, key: Any) -> Any:
        called.append(array.shape)
        return jax.random.normal(key, array.shape, array.dtype)

    model = adapters(layers=6)
    plan = drawn(draw).plan(model)
    together = values(plan.take(model).restart("lora", key=key()))
    assert len(called) == len(set(called)) == len({array.shape for array in together}), "once for each shape"
    # One array of them after the other: as many loops as arrays.
    monkeypatch.setattr(core_restart, "_LARGEST_LOOP", 0)
    core_restart._program.cache_clear()
    apart = values(plan.take(model).restart("lora", key=key()))
    assert len(called) == len(set(called)) + len(together)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(together, apart, strict=True))


def test_two_objects_draw_apart() -> None:
    one, other = adapters(), adapters()
    state = drawn().plan(one, other).take(one, other).restart("lora", key=key())
    assert len({array.tobytes() for array in values(state)}) == 8


def test_an_integer_key_and_its_text_are_two_leaves() -> None:
    numbers = Node(d=nnx.List([nnx.Param(jnp.ones((2, 8)))]))
    names = Node(d=nnx.Dict({"0": nnx.Param(jnp.ones((2, 8)))}))
    drawn_by = [values(drawn().plan(m).take(m).restart("lora", key=key()))[0] for m in (numbers, names)]
    assert not np.array_equal(*drawn_by)


def test_a_slot_is_what_its_own_key_says() -> None:
    """By JAX alone: the initializer sees one slot, so that its fan-in is not the server's number of slots."""
    model = Node(a=nnx.Param(jnp.zeros((64, 16, 32))))
    state = drawn(lambda array, key: INIT(key, array.shape, array.dtype)).plan(model).take(model)
    after = state.restart("lora", key=key())["lora"]["a"]
    bound = np.sqrt(6 / 16)
    assert 0.95 * bound < float(jnp.abs(after).max()) <= bound
    assert np.isclose(float(after.std()), bound / np.sqrt(3), rtol=0.02)


def test_the_array_and_the_path_that_a_restart_sees() -> None:
    seen: list[Any] = []

    def note(array: Any, *, key: Any, path: Any) -> Any:
        seen.append((path, array.shape, key.shape, key.dtype))
        return array

    def whole(array: Any, path: Any) -> Any:
        seen.append((path, array.shape))
        return array + len(path)

    model = Node(
        a=nnx.Param({"x": jnp.ones((3, SLOTS)), "y": jnp.ones((2, SLOTS))}),
        b=nnx.Param(jnp.ones(SLOTS, jnp.bfloat16)),
        c=OwnStat(jnp.ones((SLOTS, 2))),
    )
    kinds = drawn(note, axis=-1) | sw.Kinds(own=sw.Kind(OwnStat, restart=whole, batch_axis=0))
    state = kinds.plan(model).take(model).restart("lora", "own", where=[1], key=key())
    typed = key().dtype
    assert seen == [
        (("a",), (3,), (), typed),
        (("a",), (2,), (), typed),
        (("b",), (), (), typed),
        (("c",), (SLOTS, 2)),  # without a key: the array as it is, batch axis and all
    ]
    assert state["own"]["c"].tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]


# --- keys, functions and states of every make --------------------------------------------------------------------


@pytest.mark.parametrize("make", [jax.random.PRNGKey, lambda seed: np.asarray(jax.random.PRNGKey(seed))])
def test_legacy_keys(make: Any) -> None:
    model = adapters()
    plan = drawn(adapter).plan(model)
    old = plan.take(model).restart("lora", where=[1], key=make(5))
    new = plan.take(model).restart("lora", where=[1], key=key(5))
    assert same(old["lora"], new["lora"])


def test_leaves_that_are_keys() -> None:
    streams = Node(
        keys=nnx.RngKey(jax.random.split(key(1), SLOTS), tag="a"), count=nnx.RngCount(jnp.zeros(SLOTS), tag="a")
    )
    plan = sw.Kinds(
        key=sw.Kind(nnx.RngKey, restart=lambda array, key: key, batch_axis=0),
        rest=sw.Kind(...),
    ).plan(streams)
    state = plan.take(streams)
    before = np.array(jax.random.key_data(jax.tree.leaves(state["key"])[0]))  # a copy: the buffer is given away
    after = jax.random.key_data(jax.tree.leaves(state.restart("key", where=[2], key=key(9))["key"])[0])
    assert np.array_equal(np.delete(before, 2, 0), np.delete(after, 2, 0))
    assert not np.array_equal(before[2], after[2])


def test_no_slots_at_all_and_leaves_of_no_elements() -> None:
    model = Node(a=nnx.Param(jnp.ones((0, 3))), b=nnx.Param(jnp.ones((0, 3, 0))))
    state = drawn().plan(model).take(model).restart("lora", where=jnp.zeros(0, bool), key=key())
    assert [array.shape for array in values(state)] == [(0, 3), (0, 3, 0)]
    assert [array.shape for array in values(state.restart("lora", key=key()))] == [(0, 3), (0, 3, 0)]


def test_a_whole_kind_with_leaves_that_have_no_slots() -> None:
    model = Node(a=nnx.Param(jnp.ones((SLOTS, 3))), scale=nnx.Param(jnp.ones(())), scale2=nnx.Param(jnp.ones(())))
    state = drawn().plan(model).take(model).restart("lora", key=key())
    assert state["lora"]["scale"].shape == ()
    assert state["lora"]["scale"] != state["lora"]["scale2"]
    plain = drawn(axis=None).plan(model).take(model).restart("lora", key=key())
    assert plain["lora"]["a"].shape == (SLOTS, 3)


def test_inside_the_users_own_programs_and_compiled_once() -> None:
    model, calls = adapters(), []

    def counted(array: Any, key: Any) -> Any:
        calls.append(array.shape)
        return noise(array, key)

    plan = drawn(counted).plan(model)
    state = plan.take(model)
    for slot in range(3):
        state = state.restart("lora", where=[slot], key=key(slot))
    assert calls == [(6, 2), (2, 6)], "once for each shape, however many leaves have it"
    expected = plan.take(model).restart("lora", where=[1, 3], key=key(4))
    jitted = jax.jit(lambda state, where, key: state.restart("lora", where=where, key=key))
    assert same(jitted(plan.take(model), jnp.array([1, 3]), key(4)), expected)
    mask = jnp.array([False, True, False, True])
    assert same(jitted(plan.take(model), mask, key(4)), expected)
    carried, _ = jax.lax.scan(
        lambda state, turn: (state.restart("lora", where=turn[0], key=turn[1]), None),
        plan.take(model),
        (jnp.eye(SLOTS) > 0, jax.random.split(key(), SLOTS)),
    )
    assert len({array[slot].tobytes() for array in values(carried) for slot in range(SLOTS)}) == 16


def test_the_old_buffers_are_donated() -> None:
    model = adapters()
    state = drawn(adapter).plan(model).take(model)
    old = jax.tree.leaves(state["lora"])
    state.restart("lora", where=[0], key=key())
    assert all(array.is_deleted() for array in old)
    with pytest.raises(sw.StructureError, match=r"^This state was donated: restart\('lora'\) has donated its lora\."):
        state.restart("lora", key=key())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("data",), (None, "data"), ()])
def test_on_a_mesh_the_numbers_are_the_same(spec: Any, axis_type: Any) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    model = adapters()
    plan = drawn(adapter, placement=sw.Sharded(*spec)).plan(model)
    expected = plan.take(model).restart("lora", where=[1, 2], key=key(3))
    state = plan.take(model, mesh=mesh)
    there = [array.sharding for array in jax.tree.leaves(state["lora"])]
    somewhere = jax.device_put(key(3), jax.devices()[1])  # committed to one device of another set
    after = state.restart("lora", where=[1, 2], key=somewhere)
    assert [array.sharding for array in jax.tree.leaves(after["lora"])] == there
    assert all(np.array_equal(*both) for both in zip(values(after), values(expected), strict=True))


def test_each_device_and_each_of_its_slots_draws_its_own() -> None:
    model = Node(a=nnx.Param(jnp.ones((2, 6))), w=OwnStat(jnp.ones(3)))
    kinds = sw.Kinds(
        lora=sw.Kind(nnx.Param, restart=noise, batch_axis=0, placement=sw.PerDevice("data")),
        own=sw.Kind(OwnStat, restart=noise, placement=sw.PerDevice("data")),
    )
    state = kinds.plan(model).take(model, mesh=mesh_of(data=4))
    before = np.asarray(state["lora"]["a"])
    state = state.restart("lora", where=[1, 6], key=key())  # of eight: two on each device
    after = np.asarray(state["lora"]["a"])
    changed = (after != before).any(-1).reshape(-1)
    assert changed.tolist() == [False, True, False, False, False, False, True, False]
    full = state.restart("lora", "own", key=key())
    assert np.array_equal(np.asarray(full["lora"]["a"]).reshape(8, 6)[[1, 6]], after.reshape(8, 6)[[1, 6]])
    assert len({row.tobytes() for row in np.asarray(full["lora"]["a"]).reshape(8, 6)}) == 8
    assert len({row.tobytes() for row in np.asarray(full["own"]["w"])}) == 4
