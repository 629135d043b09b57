"""What `take`, `put` and `build` refuse; after each refusal neither the model nor the state has changed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import holds_the_same, leaves, same
from refusals import refused
from statewise._src.common.nnx_graph import ModelError, raw_value
from strategies import Node, OwnStat

REPLAN = "plan = kinds.plan(model)  # plan the model as it is now"
REBUILD = "put the state into a model of the planned structure, or plan.build(state)"
SPENT = (
    "use the state that came back: state, out = step(state, ...)\n"
    "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)"
)


def model(fill: float = 1.0) -> Node:
    return Node(
        kernel=nnx.Param(jnp.full((2, 3), fill, jnp.float32)),
        stat=OwnStat(jnp.full(3, fill, jnp.bfloat16)),
        raw=nnx.data(jnp.full(2, int(fill))),
        two=nnx.Variable({"a": jnp.full(1, fill, jnp.float32), "b": jnp.full((), fill, jnp.float32)}),
    )


# --- what does not fit -------------------------------------------------------------------------------------------


def check_untouched(
    plan: sw.Plan, state: sw.State, other: Any, *, cls: Any, message: str, leaves_: list[str], kind: str | None = None
) -> None:
    """The same differences, whichever way; neither the model nor the state has changed."""
    before, kept = leaves(other), jax.tree.leaves(state)
    with refused(cls, message, leaves=leaves_, kind=kind, hint=REPLAN):
        plan.take(other)
    with refused(cls, message, leaves=leaves_, kind=kind, hint=REBUILD):
        plan.put(state, other)
    after = leaves(other)
    assert before.keys() == after.keys()
    assert all(holds_the_same(before[path], after[path]) for path in before)
    assert all(one is two for one, two in zip(kept, jax.tree.leaves(state), strict=True))


def test_every_difference_is_listed_and_nothing_changes() -> None:
    plan = sw.plan(model())
    other = Node(
        kernel=nnx.Param(jnp.ones((9, 9))),
        stat=nnx.BatchStat(jnp.ones(3, jnp.bfloat16)),
        raw=nnx.data(jnp.ones(2)),
        two=nnx.Variable({"a": jnp.ones(1)}),
        more=nnx.Cache(jnp.ones((), jnp.int32)),
    )
    check_untouched(
        plan,
        plan.take(model()),
        other,
        cls=sw.StructureError,
        message="The model is not what was planned: 5 leaves differ.",
        leaves_=[
            "kernel: Param(2, 3) float32  kind=params  (is (9, 9) in the model)",
            "raw: Array(2,) int32  kind=variables  (is float32 in the model)",
            "stat: OwnStat(3,) bfloat16  kind=variables  (is a BatchStat in the model)",
            "two: Variable- -  kind=variables  (is a value of another structure in the model)",
            "more: Cache() int32  (not in the plan)",
        ],
    )


def test_a_missing_leaf() -> None:
    plan = sw.plan(model())
    other = model()
    del other.kernel
    check_untouched(
        plan,
        plan.take(model()),
        other,
        cls=sw.StructureError,
        message="The model is not what was planned: 1 leaf differs.",
        leaves_=["kernel: Param(2, 3) float32  kind=params  (missing from the model)"],
        kind="params",
    )


@pytest.mark.parametrize("given", [(), (Node(a=nnx.Param(jnp.ones(1))),) * 2], ids=len)
def test_another_number_of_objects(given: tuple[Any, ...]) -> None:
    thing = Node(a=nnx.Param(jnp.ones(1)))
    plan = sw.plan(thing)
    if given:
        message = "The plan is of 1 object, but 2 are given."
        with refused(sw.StructureError, message, hint="plan.take(node)"):
            plan.take(*given)
        with refused(sw.StructureError, message, hint="plan.put(state, node)"):
            plan.put(plan.take(thing), *given)
    else:
        with pytest.raises(ModelError, match=r"^There is no object to look at\."):
            plan.take()
        with pytest.raises(ModelError, match=r"^There is no object to look at\."):
            plan.put(plan.take(thing))


def test_a_class_instead_of_an_instance() -> None:
    plan = sw.plan(model())
    with pytest.raises(ModelError, match=r"^Object 0 is the class Node, not an instance of it\."):
        plan.take(Node)
    with pytest.raises(ModelError, match=r"^Object 0 is the class Node, not an instance of it\."):
        plan.put(plan.take(model()), Node)


def test_an_abstract_model_has_nothing_to_take() -> None:
    plan = sw.plan(model())
    with refused(
        sw.StructureError,
        "The model is abstract: it has shapes but no values to take.",
        leaves=[str(leaf) for leaf in plan.leaves],
        hint="plan.abstract() gives an abstract state; plan.take needs a model with values",
    ):
        plan.take(nnx.eval_shape(model))


def test_an_abstract_state_takes_no_model_s_values() -> None:
    thing = model()
    plan = sw.plan(thing)
    with refused(
        sw.StructureError,
        "This state is abstract: it has shapes but no values to put into a model.",
        hint="plan.build(state) makes an abstract model",
    ):
        plan.put(plan.abstract(), thing)
    assert same(thing, model())
    assert isinstance(raw_value(plan.build(plan.abstract()).kernel), jax.ShapeDtypeStruct)


def test_a_mesh_that_is_none() -> None:
    with refused(sw.PlacementError, "A tuple is not a mesh.", hint="mesh = jax.make_mesh((8,), ('data',))"):
        sw.plan(model()).take(model(), mesh=(8, "data"))


# --- static attributes -------------------------------------------------------------------------------------------


class Modes(nnx.Module):
    """A model with plain attributes of every sort."""

    def __init__(self, **plain: Any) -> None:
        self.w = nnx.Param(jnp.ones(1))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        self.rate, self.note, self.nothing, self.fn = 0.5, "a", None, lambda x: x
        for name, value in plain.items():
            setattr(self, name, value)


STATICS = "plan = kinds.plan(model)  # or model.train() / model.eval() back to what was planned"


def test_a_model_in_another_mode() -> None:
    thing = Modes()
    plan = sw.plan(thing)
    thing.eval()
    with refused(
        sw.StructureError,
        "The model's static attributes have changed since it was planned:\n"
        "  drop/deterministic: False in the plan, True in the model\n"
        "  norm/use_running_average: False in the plan, True in the model",
        hint=STATICS,
    ):
        plan.take(thing)
    sw.plan(thing).take(thing)
    thing.train()
    assert same(plan.build(plan.take(thing)), thing)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("rate", 0.25, "0.5 in the plan, 0.25 in the model"),
        ("note", "b", "'a' in the plan, 'b' in the model"),
        ("nothing", 3, "None in the plan, 3 in the model"),
        ("rate", math.nan, "0.5 in the plan, nan in the model"),
    ],
)
def test_a_plain_attribute_that_changed(name: str, value: Any, shown: str) -> None:
    with refused(
        sw.StructureError,
        f"The model's static attributes have changed since it was planned:\n  1/0/{name}: {shown}",
        hint=STATICS,
    ):
        sw.plan(Node(a=nnx.Param(jnp.ones(1))), [Modes()]).take(
            Node(a=nnx.Param(jnp.ones(1))), [Modes(**{name: value})]
        )


def test_a_number_of_another_type_is_another_attribute() -> None:
    with pytest.raises(sw.StructureError, match=r"rate: 1 in the plan, 1\.0 in the model"):
        sw.plan(Modes(rate=1)).take(Modes(rate=1.0))
    with pytest.raises(sw.StructureError, match="rate: 1 in the plan, True in the model"):
        sw.plan(Modes(rate=1)).take(Modes(rate=True))


def test_attributes_that_may_differ_from_instance_to_instance() -> None:
    plan = sw.plan(Modes(rate=math.nan))
    plan.take(Modes(rate=float("nan")))
    plan.take(Modes(rate=math.nan, fn=lambda x: x + 1))


# --- states of another plan --------------------------------------------------------------------------------------


def test_a_state_of_another_plan_lists_the_differences() -> None:
    other = Node(
        kernel=nnx.Param(jnp.ones((4, 3))), stat=OwnStat(jnp.ones(3, jnp.bfloat16)), extra=nnx.Cache(jnp.ones(1))
    )
    plan, theirs = sw.plan(model()), sw.plan(other)
    state, target = theirs.take(other), model()
    differences = [
        "kernel: Param(2, 3) float32  kind=params  (is (4, 3) in the state)",
        "raw: Array(2,) int32  kind=variables  (missing from the state)",
        "two: Variable- -  kind=variables  (missing from the state)",
        "extra: Cache(1,) float32  kind=cache  (not in the plan)",
    ]
    message = "This state is of another plan: Plan(params=1, cache=1, variables=1), not Plan(params=1, variables=4)."
    with refused(sw.StructureError, message, leaves=differences, hint="state.plan.put(state, model)"):
        plan.put(state, target)
    with refused(sw.StructureError, message, leaves=differences, hint="state.plan.build(state)"):
        plan.build(state)
    assert same(target, model())
    assert same(theirs.build(state), other)


def test_a_state_of_another_plan_with_the_same_leaves() -> None:
    plan = sw.plan(model(), optimizers={"params": optax.sgd(0.1)})
    state = sw.plan(model()).take(model())
    message = (
        "This state is of another plan: Plan(params=1, variables=4), not Plan(params=1, variables=4).  "
        "They differ in:\n  the optimizer of 'params', which the state does not have"
    )
    with refused(sw.StructureError, message, hint="plan.build(sw.transfer(state, plan))"):
        plan.build(state)
    assert same(plan.build(sw.transfer(state, plan)), model())


@pytest.mark.parametrize("given", [None, 3, {}, nnx.State({})], ids=str)
def test_no_state(given: Any) -> None:
    plan = sw.plan(model())
    name = type(given).__name__
    message = f"plan.put takes a state, not {name}."
    with refused(sw.StructureError, message, hint="plan.put(state, model)"):
        plan.put(given, model())
    message = f"plan.build takes a state, not {name}."
    with refused(sw.StructureError, message, hint="model = plan.build(state)"):
        plan.build(given)


def test_the_model_and_the_state_in_the_wrong_order() -> None:
    plan, thing = sw.plan(model()), model()
    with pytest.raises(sw.StructureError, match=r"^plan\.put takes a state, not Node\."):
        plan.put(thing, plan.take(thing))


def test_arrays_that_do_not_fit_the_plan() -> None:
    thing = model()
    plan = sw.plan(thing)
    state = plan.take(thing)
    stacked = jax.tree.map(lambda array: jnp.stack([array, array]), state)
    expected = [
        "kernel: Param(2, 3) float32  kind=params  (is (2, 2, 3) in the state)",
        "raw: Array(2,) int32  kind=variables  (is (2, 2) in the state)",
        "stat: OwnStat(3,) bfloat16  kind=variables  (is (2, 3) in the state)",
        "two: Variable- -  kind=variables  (is (2, 1) in the state)",
        "two: Variable- -  kind=variables  (is (2,) in the state)",
    ]
    message = "The state's arrays do not have the shapes and dtypes of its plan."
    hint = (
        "all of them as one ensemble: state = plan.stacked(2).stack(states)\n"
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
        "for other dtypes: state.cast(params='bfloat16')"
    )
    with refused(sw.StructureError, message, leaves=expected, hint=hint):
        plan.put(stacked, thing)
    with refused(sw.StructureError, message, leaves=expected, hint=hint):
        plan.build(stacked)
    assert same(thing, model())
    with pytest.raises(sw.StructureError, match=r"kernel: .*\(is a str in the state\)"):
        plan.build(jax.tree.map(lambda array: "text", state))
    with pytest.raises(sw.StructureError, match=r"kernel: .*\(is float16 in the state\)"):
        plan.build(jax.tree.map(lambda array: array.astype("float16"), state))
    plan.put(jax.tree.map(lambda array: array[0], stacked), thing)


# --- donated states ------------------------------------------------------------------------------------------------


def spend_by_a_step(state: sw.State) -> str:
    @sw.step(writes="params")
    def double(model: Any) -> None:
        model.kernel[...] *= 2

    double(state)
    return "This state was donated: double has donated its params."


def spend_by_the_user(state: sw.State) -> str:
    jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)(state)
    return "This state was donated: a step has donated its params, variables."


def spend_a_copy_of_the_tree(state: sw.State) -> str:
    spend_by_a_step(jax.tree.map(lambda array: array, state))
    return "This state was donated: a step has donated its params."


@pytest.mark.parametrize("donate", [spend_by_a_step, spend_by_the_user, spend_a_copy_of_the_tree])
def test_a_spent_state(donate: Any) -> None:
    thing = model()
    plan = sw.plan(thing)
    state = plan.take(thing)
    message = donate(state)
    for attempt in (
        lambda: plan.put(state, thing),
        lambda: plan.put(state, thing, copy=False),
        lambda: plan.build(state),
        lambda: plan.build(state, copy=False),
    ):
        with refused(sw.StructureError, message, kind="params", hint=SPENT):
            attempt()
    assert same(thing, model())
