"""Whole numbers are taken of every type that is one, and of no other, at every door."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.common.numbers import whole_number
from statewise.errors import DeclarationError

ONES = [1, np.int64(1), np.uint8(1), np.array(1), jnp.array(1)]


@pytest.mark.parametrize("given", ONES, ids=lambda each: type(each).__name__)
def test_a_whole_number_of_any_type_becomes_one_of_python(given: Any) -> None:
    assert whole_number(given) == 1
    assert type(whole_number(given, 1)) is int
    assert whole_number(given, 2) is None


@pytest.mark.parametrize("given", [True, np.True_, 1.0, "1", None, np.array([1, 2]), np.float32(1)], ids=repr)
def test_nothing_else_is_a_whole_number(given: Any) -> None:
    assert whole_number(given) is None


def loss_of(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


@pytest.mark.parametrize("two", [np.int64(2), jnp.array(2)], ids=lambda each: type(each).__name__)
def test_numbers_of_numpy_and_jax_are_numbers_of_parts_members_steps_and_axes(two: Any, tmp_path: Any) -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)})
    state, x = plan.take(model), jnp.ones((4, 2))
    ours, loss = sw.train_step(loss_of, microbatches=two)(plan.take(model), x)
    theirs, expected = sw.train_step(loss_of, microbatches=2)(plan.take(model), x)
    assert loss == expected
    np.testing.assert_array_equal(ours["params"]["kernel"], theirs["params"]["kernel"])
    assert plan.stacked(two).members == 2
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(two, state)
        checkpoints.wait()
        assert checkpoints.steps == (2,)
    joined = sw.Name(["q", "k"], join=two)
    assert joined == sw.Name(["q", "k"], join=2)
    assert repr(joined) == "sw.Name(['q', 'k'], join=2)"
    split = sw.Name("q", "o (h d) -> o h d", h=two)
    assert split == sw.Name("q", "o (h d) -> o h d", h=2)
    assert sw.Name.from_dict(split.to_dict()) == split


def test_a_bool_is_no_number_of_parts() -> None:
    with pytest.raises(DeclarationError, match="microbatches=True is not a number of parts"):
        sw.train_step(loss_of, microbatches=True)
