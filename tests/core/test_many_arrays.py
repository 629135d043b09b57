"""What is computed for each of many arrays is compiled in pieces, and is what one program would give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.core import many_arrays


def model() -> nnx.Module:
    return nnx.Dict(**{f"leaf{number}": nnx.Param(jnp.full((2, 8), float(number))) for number in range(7)})


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of three arrays; how many arrays each program that was made has."""
    made: list[int] = []
    program = many_arrays._program

    def counted(fn: object, static: tuple[object, ...], shardings: tuple[object, ...]) -> object:
        made.append(len(static))
        return program(fn, static, shardings)

    monkeypatch.setattr(many_arrays, "_PIECE", 3)
    monkeypatch.setattr(many_arrays, "_program", counted)
    return made


def test_averages_are_copied_in_pieces_and_placed(pieces: list[int], devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.Sharded(None, "data")))
    net = model()
    average = sw.EMA(0.9)
    plan = kinds.plan(net, optimizers={"params": optax.sgd(0.1)}, averages={"params": average})
    state = plan.take(net, mesh=mesh)
    swapped = state.with_averages("ema")
    assert pieces == [3, 3, 1]
    for number in range(7):
        mine, own = swapped["params"][f"leaf{number}"][...], state["params"][f"leaf{number}"][...]
        assert mine.sharding == own.sharding
        assert mine is not own
        np.testing.assert_array_equal(mine, own)


def test_a_member_is_taken_out_in_pieces(pieces: list[int]) -> None:
    plan = sw.plan(model())
    states = [plan.take(model()), jax.tree.map(lambda array: array + 10, plan.take(model()))]
    stacked = plan.stacked(2)
    member = stacked.stack(states).member(1)
    assert pieces == [3, 3, 1]
    for mine, own in zip(jax.tree.leaves(member), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(mine, own)


def test_equal_pieces_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_arrays, "_PIECE", 3)
    many_arrays._program.cache_clear()
    arrays = [jnp.full(2, float(number)) for number in range(6)]
    (out,) = many_arrays.each_array(jnp.multiply, [arrays], [[2] * 6], [None])
    assert (many_arrays._program.cache_info().misses, many_arrays._program.cache_info().hits) == (1, 1)
    np.testing.assert_array_equal(np.stack(out), 2 * np.stack(arrays))
