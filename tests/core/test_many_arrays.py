"""A program that returns many arrays is compiled in pieces, and gives what one program would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from meshes import compilations
from statewise._src.core import many_arrays
from statewise._src.core.many_arrays import ManyArrays

AUTO = (jax.sharding.AxisType.Auto,)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of three arrays; how many results each piece has, in the order in which they were made."""
    made: list[int] = []
    divided = many_arrays._pieces

    def counted(*args: Any) -> Iterator[Any]:
        for piece in divided(*args):
            made.append(len(piece.results))
            yield piece

    monkeypatch.setattr(many_arrays, "_PIECE", 3)
    monkeypatch.setattr(many_arrays, "_pieces", counted)
    return made


def arrays(count: int, *shape: int) -> list[jax.Array]:
    return [jnp.full(shape or (2,), float(number)) for number in range(count)]


# --- the pieces --------------------------------------------------------------------------------------------------


def test_equal_pieces_are_compiled_once() -> None:
    program = ManyArrays(lambda values: [value * 2 for value in values], 12)
    given = arrays(12)
    with compilations() as compiled:
        out = program(given)
        assert len(compiled) == 1
        again = program(out)
    assert len(compiled) == 1
    np.testing.assert_array_equal(again, 4 * np.stack(given))


def test_alike_arrays_are_put_side_by_side(pieces: list[int]) -> None:
    given = [array for pair in zip(arrays(6, 2), arrays(6, 3), strict=True) for array in pair]
    with compilations() as compiled:
        out = ManyArrays(lambda values: [value + 1 for value in values], 12)(given)
    assert pieces == [3, 3, 3, 3]
    assert len(compiled) == 2  # one for each shape
    for mine, own in zip(out, given, strict=True):
        np.testing.assert_array_equal(mine, own + 1)


def test_what_all_results_need_is_computed_once(pieces: list[int]) -> None:
    def drawn(values: Sequence[jax.Array], key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(values))
        return [value + jax.random.normal(keys[number], value.shape) for number, value in enumerate(values)]

    given = arrays(7)
    out = ManyArrays(drawn, 7)(given, jax.random.key(3))
    assert pieces[0] == 0
    assert sum(pieces) == 7
    np.testing.assert_array_equal(out, jax.jit(drawn)(given, jax.random.key(3)))


def test_results_of_a_common_equation_stay_together(pieces: list[int]) -> None:
    def paired(values: Sequence[jax.Array]) -> list[jax.Array]:
        sums = [first + second for first, second in zip(values[:3], values[3:], strict=True)]
        return [*sums, *(total * 2 for total in sums)]

    out = ManyArrays(paired, 6)(arrays(6))
    assert pieces == [2, 2, 2]
    np.testing.assert_array_equal(out, jax.jit(paired)(arrays(6)))


RESULTS = ("sum", "fresh", "unchanged", "of a constant", "of a result", "twice", "constant", "of a table")
ROWS = st.lists(st.tuples(st.sampled_from(RESULTS), st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=12)


@given(ROWS, st.booleans())
def test_pieces_give_what_one_program_gives(rows: list[tuple[str, int, int]], donate: bool) -> None:
    count = len(rows)
    constant = np.arange(2.0, dtype=np.float32)

    def fn(values: Sequence[jax.Array], scale: jax.Array) -> list[jax.Array]:
        table = jnp.cumsum(jnp.stack(values), axis=0) * scale
        made: list[jax.Array] = []
        for number, (what, one, other) in enumerate(rows):
            first, second = values[one % count], values[other % count]
            earlier = made[one % len(made)] if made else first
            match what:
                case "sum":
                    made.append(first + second * scale)
                case "fresh":
                    made.append(jnp.zeros_like(values[number]))
                case "unchanged":
                    made.append(first)
                case "of a constant":
                    made.append(second + constant)
                case "of a result":
                    made.append(earlier * 2)
                case "twice":
                    made.append(earlier)
                case "constant":
                    made.append(jnp.asarray(constant))
                case "of a table":
                    made.append(table[number])
        return made

    given = [jnp.full(2, float(number + 1)) for number in range(count)]
    expected = jax.jit(fn)(given, jnp.float32(3))
    out = ManyArrays(fn, count, donate=donate)(given, jnp.float32(3))
    np.testing.assert_array_equal(np.stack(out), np.stack(expected))
    assert donate or not any(array.is_deleted() for array in given)


def test_a_program_with_effects_runs_complete(pieces: list[int]) -> None:
    seen: list[float] = []

    def told(values: Sequence[jax.Array]) -> list[jax.Array]:
        jax.debug.callback(lambda value: seen.append(float(value)), values[0][0], ordered=True)
        return [value + 1 for value in values]

    out = ManyArrays(told, 5)(arrays(5))
    jax.effects_barrier()
    assert (seen, pieces) == ([0.0], [])
    np.testing.assert_array_equal(out, np.stack(arrays(5)) + 1)


@pytest.mark.parametrize("around", [jax.jit, lambda fn: jax.vmap(fn, in_axes=1, out_axes=1)], ids=["jit", "vmap"])
def test_inside_a_transform_it_is_one_program(pieces: list[int], around: Callable[..., Any]) -> None:
    program = ManyArrays(lambda values: [value * 2 for value in values], 5)
    values = jnp.stack(arrays(5))
    out = around(lambda values: jnp.stack(program(list(values))))(values)
    assert pieces == []
    np.testing.assert_array_equal(out, 2 * values)


def test_without_jit_it_runs_as_it_is(pieces: list[int]) -> None:
    with jax.disable_jit():
        out = ManyArrays(lambda values: [value * 2 for value in values], 5)(arrays(5))
    assert pieces == []
    np.testing.assert_array_equal(out, 2 * np.stack(arrays(5)))


def test_few_arrays_are_one_program(pieces: list[int]) -> None:
    ManyArrays(lambda values: [value * 2 for value in values], 3)(arrays(3))
    assert pieces == []


def test_donated_arrays_give_their_memory() -> None:
    given = arrays(7)
    places = [array.unsafe_buffer_pointer() for array in given]
    out = ManyArrays(lambda values: [jnp.ones_like(value) for value in values], 7, donate=True)(given)
    assert all(array.is_deleted() for array in given)
    assert [array.unsafe_buffer_pointer() for array in out] == places


def test_results_are_placed(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=AUTO)
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    shardings = [(split,) * 4, (None,), (whole,) * 2]

    def fn(values: Sequence[jax.Array]) -> list[tuple[jax.Array, ...]]:
        made = [value + 1 for value in values]
        return [tuple(made[:4]), (made[4],), tuple(made[5:])]

    out = ManyArrays(fn, 7, shardings=shardings)(arrays(7, 8))
    assert [array.sharding for array in jax.tree.leaves(out)[:4]] == [split] * 4
    assert [array.sharding for array in out[2]] == [whole] * 2
    np.testing.assert_array_equal(jax.tree.leaves(out), np.stack(arrays(7, 8)) + 1)


# --- the verbs ---------------------------------------------------------------------------------------------------


class Decoder(nnx.Module):
    """Seven parameters and eight cache entries of two shapes."""

    def __init__(self) -> None:
        self.weights = nnx.List([nnx.Param(jnp.full((2, 8), float(number))) for number in range(7)])
        self.cache = nnx.List([nnx.Cache(jnp.ones((4, number % 2 + 1))) for number in range(8)])


def fresh(array: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, array.shape, array.dtype)


KINDS = sw.Kinds(params=sw.Kind(nnx.Param, restart=fresh), cache=sw.Kind(nnx.Cache, batch_axis=0, restart=fresh))


def test_averages_are_copied_in_pieces_and_placed(pieces: list[int], devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=AUTO)
    kinds = KINDS.replace(params=sw.Kind(nnx.Param, placement=sw.Sharded(None, "data")))
    net = Decoder()
    plan = kinds.plan(net, optimizers={"params": optax.sgd(0.1)}, averages={"params": sw.EMA(0.9)})
    state = plan.take(net, mesh=mesh)
    swapped = state.with_averages("ema")
    assert pieces == [3, 3, 1]
    for mine, own in zip(swapped.part("params").arrays, state.part("params").arrays, strict=True):
        assert mine.sharding == own.sharding
        assert mine is not own
        np.testing.assert_array_equal(mine, own)


def test_a_member_is_taken_out_in_pieces(pieces: list[int]) -> None:
    plan = sw.plan(Decoder())
    states = [plan.take(Decoder()), jax.tree.map(lambda array: array + 10, plan.take(Decoder()))]
    member = plan.stacked(2).stack(states).member(1)
    assert pieces == [3, 3, 3, 3, 3]
    for mine, own in zip(jax.tree.leaves(member), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(mine, own)


@pytest.mark.parametrize("where", [None, (True, False, True, False)])
def test_a_kind_restarts_in_pieces(
    pieces: list[int], where: tuple[bool, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = KINDS.plan(Decoder())
    slots = None if where is None else jnp.array(where)
    before = plan.take(Decoder())
    renewed = before.restart("cache", where=slots, key=jax.random.key(5))
    assert sum(pieces) == 8
    assert max(pieces) == 3
    assert all(array.is_deleted() for array in before.part("cache").arrays)
    monkeypatch.setattr(many_arrays, "_PIECE", 1000)
    complete = KINDS.plan(Decoder()).take(Decoder()).restart("cache", where=slots, key=jax.random.key(5))
    for mine, own in zip(jax.tree.leaves(renewed), jax.tree.leaves(complete), strict=True):
        np.testing.assert_array_equal(mine, own)


def test_an_optimizer_restarts_in_pieces_from_the_new_parameters(pieces: list[int]) -> None:
    copies = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda value: value + 1, params), lambda grads, state, params=None: (grads, state)
    )
    plan = KINDS.plan(Decoder(), optimizers={"params": copies})
    renewed = plan.take(Decoder()).restart("params", "optimizer", key=jax.random.key(2))
    assert sum(pieces) == 14
    for moment, value in zip(renewed.part("optimizer").arrays, renewed.part("params").arrays, strict=True):
        np.testing.assert_array_equal(moment, value + 1)


def test_devices_are_reduced_in_pieces(pieces: list[int], devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=AUTO)
    kinds = KINDS.replace(cache=sw.Kind(nnx.Cache, placement=sw.PerDevice("data")))
    state = kinds.plan(Decoder()).take(Decoder(), mesh=mesh)
    one = state.reduce_devices("cache")
    assert pieces == [3, 3, 2]
    for mine, own in zip(one.part("cache").arrays, state.part("cache").arrays, strict=True):
        np.testing.assert_array_equal(mine, own[0])


def test_a_state_is_initialized_in_pieces(pieces: list[int], devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=AUTO)
    kinds = KINDS.replace(params=sw.Kind(nnx.Param, placement=sw.Sharded(None, "data")))
    plan = kinds.plan(nnx.eval_shape(Decoder), optimizers={"params": optax.adam(0.1)})
    made, taken = plan.init(Decoder, mesh), plan.take(Decoder(), mesh=mesh)
    assert sum(pieces) == len(jax.tree.leaves(taken))
    for mine, own in zip(jax.tree.leaves(made), jax.tree.leaves(taken), strict=True):
        assert mine.sharding == own.sharding
        np.testing.assert_array_equal(mine, own)


def test_nothing_is_donated_if_an_array_does_not_exist(pieces: list[int]) -> None:
    state = KINDS.plan(Decoder()).take(Decoder())
    state.part("cache").arrays[-1].delete()
    with pytest.raises(sw.errors.StructureError, match="cache"):
        state.restart("cache", key=jax.random.key(0))
    assert pieces == []
    assert not any(array.is_deleted() for array in state.part("cache").arrays[:-1])


def test_nothing_is_donated_if_two_leaves_share_an_array(pieces: list[int]) -> None:
    state = KINDS.plan(Decoder()).take(Decoder())
    first = state.part("cache").arrays[0]
    shared = jax.tree.map(lambda array: first if array.shape == first.shape else array, state)
    with pytest.raises(sw.errors.StructureError, match="cache/0 and cache/2 share one array"):
        shared.restart("cache", key=jax.random.key(0))
    assert pieces == []
    assert not any(array.is_deleted() for array in shared.part("cache").arrays)
