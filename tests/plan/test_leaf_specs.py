"""Which leaves get a row: what holds no array is refused, what an earlier `sow` left is dropped."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from strategies import Node


class Sower(nnx.Module):
    """Sows what goes through it."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(2))

    def __call__(self, x: Any) -> Any:
        self.sow(nnx.Intermediate, "seen", x)
        return x * self.w[...]


def sown() -> Sower:
    model = Sower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of Flax ask for nnx.capture
        model(jnp.ones(2))
    return model


# --- what holds no array -----------------------------------------------------------------------------------------


def test_leaves_that_hold_something_else_are_all_listed() -> None:
    model = Node(
        text=nnx.Variable("text"),
        many=nnx.Param({"a": jnp.ones(2), "b": object()}),
        names=nnx.BatchStat(np.array(["a"])),
        fine=nnx.Param(jnp.ones(2)),
    )
    with refused(
        sw.StructureError,
        "Leaves that hold something other than arrays and numbers cannot be part of a state.",
        leaves=[
            "many: Param- -  kind=params  (holds object)",
            "names: BatchStat- -  kind=stats  (holds ndarray)",
            "text: Variable- -  kind=variables  (holds str)",
        ],
        hint="keep it as a plain attribute of the module: self.name = value, without nnx.Variable or nnx.data",
    ):
        sw.plan(model)


@pytest.mark.parametrize(
    ("value", "shape", "dtype", "arrays"),
    [
        (3, (), "int32", 1),
        (2.5, (), "float32", 1),
        (True, (), "bool", 1),
        (1j, (), "complex64", 1),
        (None, None, None, 0),
        (np.ones((2, 3)), (2, 3), "float32", 1),
        (np.float16(1), (), "float16", 1),
        ({"a": jnp.ones(2), "b": None, "c": 3}, None, None, 2),
        ((jnp.ones(1), [jnp.ones((2, 0))]), None, None, 2),
        ((), None, None, 0),
        (jnp.ones((3, 0, 2)), (3, 0, 2), "float32", 1),
        (jnp.ones(2, "int4"), (2,), "int4", 1),
        (jnp.ones(2, "float8_e4m3fn"), (2,), "float8_e4m3fn", 1),
    ],
    ids=str,
)
def test_what_a_variable_may_hold(value: Any, shape: Any, dtype: Any, arrays: int) -> None:
    model = Node(a=nnx.Variable(value), b=nnx.Param(jnp.ones(1)))
    plan = sw.plan(model)
    (leaf,) = plan["variables"]
    assert (leaf.shape, None if leaf.dtype is None else str(leaf.dtype)) == (shape, dtype)
    state = plan.take(model)
    assert len(state.part("variables").arrays) == arrays
    again = plan.build(state)
    assert sw.plan(again) is plan


# --- what was sown -----------------------------------------------------------------------------------------------


def test_what_an_earlier_sow_left_is_dropped() -> None:
    model = sown()
    plan = sw.plan(model)
    assert plan is sw.plan(Sower())
    assert [str(leaf) for leaf in sw.plan(model).leaves] == ["w: Param(2,) float32  kind=params"]
    assert isinstance(model.seen, nnx.Intermediate), "the model itself keeps it"
    state = plan.take(model)
    plan.put(state, model)
    assert isinstance(model.seen, nnx.Intermediate)
    assert not hasattr(plan.build(state), "seen")


def test_dropped_leaves_are_told() -> None:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, frozen=True))  # a plan of its own
    plan = kinds.plan(Node(inner=sown()))
    assert [str(leaf) for leaf in plan.excluded] == ["inner/seen: Intermediate- -  kind=intermediates"]


def test_of_several_objects_too() -> None:
    plan = sw.plan(sown(), Node(deep=nnx.List([sown()])))
    assert [sw.format_path(leaf.path) for leaf in plan.leaves] == ["0/w", "1/deep/0/w"]


def test_at_whatever_path_it_can_be_reached() -> None:
    model = Node(inner=sown(), w=nnx.Param(jnp.ones(1)))
    model.again = model.inner.seen
    plan = sw.plan(model)
    assert [sw.format_path(leaf.path) for leaf in plan.leaves] == ["inner/w", "w"]


def test_items_of_a_list_were_not_sown() -> None:
    model = Node(losses=nnx.List([nnx.Intermediate(jnp.zeros(())), nnx.Param(jnp.ones(1))]))
    plan = sw.plan(model)
    assert [leaf.kind for leaf in plan.leaves] == ["intermediates", "params"]
    assert len(plan.build(plan.take(model)).losses) == 2


def test_perturbations_stay() -> None:
    plan = sw.plan(Node(a=nnx.Perturbation(jnp.zeros(2)), b=nnx.Param(jnp.ones(1))))
    assert [leaf.kind for leaf in plan.leaves] == ["intermediates", "params"]


def test_a_kind_that_is_saved_keeps_what_was_sown() -> None:
    kinds = sw.Kinds(seen=sw.Kind(nnx.Intermediate), rest=sw.Kind(...))
    plan = kinds.plan(sown())
    assert [leaf.kind for leaf in plan.leaves] == ["seen", "rest"]
    assert plan.excluded == ()


def test_a_model_of_nothing_but_what_was_sown() -> None:
    with refused(
        sw.StructureError,
        "There are no leaves but those that an earlier `sow` left.",
        leaves=["a: Intermediate(1,) float32  kind=intermediates"],
        hint="assign the model's Variables before planning it",
    ):
        sw.plan(Node(a=nnx.Intermediate(jnp.ones(1))))
