"""From a state of several objects into that of one: which of them is meant, or that nothing tells."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from refusals import refused


class Net(nnx.Module):
    def __init__(self, number: float, width: int = 2, **metadata: Any) -> None:
        self.weight = nnx.Param(jnp.full(width, number), **metadata)
        self.seen = nnx.BatchStat(jnp.zeros(width))


STUDENT, TEACHER = Net(1.0), Net(2.0)


def test_of_two_that_fit_alike_none_is_guessed() -> None:
    src = sw.plan(STUDENT, TEACHER).take(STUDENT, TEACHER)
    with refused(
        sw.StructureError,
        "The target may be any of the source's objects 0, 1: all fit equally well.",
        hint="one = src.plan.build(src)[0]\nsw.transfer(sw.plan(one).take(one), target)",
    ):
        sw.transfer(src, sw.plan(Net(0.0)))
    one = src.plan.build(src)[1]
    found: Any = sw.transfer(sw.plan(one).take(one), sw.plan(Net(0.0)))
    np.testing.assert_array_equal(found["params"]["weight"], [2.0, 2.0])


def test_a_kind_of_its_own_tells_them_apart() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat))
    untagged = sw.Kind(nnx.All(nnx.Param, nnx.Not("teacher")))
    both = kinds.replace(params=untagged) | sw.Kinds(teacher=sw.Kind("teacher"))
    pair = STUDENT, Net(2.0, tag="teacher")
    src = both.plan(*pair).take(*pair)
    found: Any = sw.transfer(src, kinds.plan(Net(0.0)))
    np.testing.assert_array_equal(found["params"]["weight"], [1.0, 1.0])
    alone = sw.Kinds(teacher=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat))
    found = sw.transfer(src, alone.plan(Net(0.0)))
    np.testing.assert_array_equal(found["teacher"]["weight"], [2.0, 2.0])


def test_so_do_shapes() -> None:
    wide = Net(3.0, width=4)
    src = sw.plan(STUDENT, wide).take(STUDENT, wide)
    found: Any = sw.transfer(src, sw.plan(Net(0.0, width=4)))
    np.testing.assert_array_equal(found["params"]["weight"], [3.0] * 4)


def test_one_object_given_twice_is_one() -> None:
    src = sw.plan(STUDENT, nnx.Dict(weight=STUDENT.weight, seen=STUDENT.seen)).take(
        STUDENT, nnx.Dict(weight=STUDENT.weight, seen=STUDENT.seen)
    )
    found: Any = sw.transfer(src, sw.plan(Net(0.0)))
    np.testing.assert_array_equal(found["params"]["weight"], [1.0, 1.0])


def test_the_hint_names_the_kinds_that_the_source_has() -> None:
    """It named kinds that the target need not have."""
    kinds = sw.Kinds(weights=sw.Kind(nnx.Param), seen=sw.Kind(nnx.BatchStat))
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), s=nnx.BatchStat(jnp.ones(2)))
    plain = nnx.Dict(w=nnx.Param(jnp.zeros(2)))
    state = kinds.plan(model, averages={"weights": sw.EMA(0.9)}).take(model)
    src = kinds.plan(plain).take(plain)
    with pytest.raises(sw.StructureError) as caught:
        sw.transfer(src, state)
    hint = "name the kinds that the source has: sw.transfer(src, state, kinds=('weights',))"
    assert caught.value.hint == hint
    moved = eval(hint.partition(": ")[2], {"sw": sw, "src": src, "state": state})
    assert np.array_equal(moved["weights"]["w"], jnp.zeros(2))
    with pytest.raises(sw.DeclarationError, match="not a floating-point dtype"):
        sw.transfer(src, state, kinds="weights", cast={"weights": "float16"})
