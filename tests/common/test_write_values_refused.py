"""What is refused, or interrupted, while values are written into a live model has changed nothing, to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import flax
import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from comparing import plannable, same
from holding import CONTAINERS, Bits, Own, model_of, ones, other
from refusals import refused
from statewise._src.common.nnx_graph import raw_value
from statewise._src.common.write_values import put_values
from strategies import Node


class Made(nnx.Module):
    """A model with a setter that a test can break."""

    def __init__(self, fails: Any = None) -> None:
        self.fails = nnx.static(None)
        self.a = nnx.Param(ones(2))
        self.b = nnx.data((ones(2), ones(1)))
        self.c = nnx.data(ones(3))
        self.d = nnx.Param(ones(2))
        self.writes = 0
        self.fails = fails

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("b", "c") and vars(self).get("fails"):
            super().__setattr__("writes", self.writes + 1)
            self.fails(self, name)


def raising(error: BaseException, on: str = "c") -> Callable[[Any, str], None]:
    def fails(model: Any, name: str) -> None:
        if name == on:
            raise error

    return fails


@pytest.mark.parametrize("on", ["b", "c"])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), RuntimeError("late")], ids=repr)
@pytest.mark.parametrize("door", ["put", "put without copies", "put both", "update"])
def test_a_setter_that_raises_or_an_interruption_midway(door: str, error: BaseException, on: str) -> None:
    model, first = Made(), Made()
    plan = sw.plan(first, model) if door == "put both" else sw.plan(model)
    objects = (first, model) if door == "put both" else (model,)
    state = other(plan.take(*objects))
    model.fails = raising(error, on)
    bits = Bits(*objects)
    values = {"a": ones(2) * 3, "b": {0: ones(2) * 3}, "c": ones(3) * 3, "d": ones(2) * 3}

    def write() -> None:
        if door == "update":
            sw.update(model, values)
        else:
            plan.put(state, *objects, copy=door != "put without copies")

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    bits.check()
    model.fails = None
    plan.put(state, *objects)
    assert same(plan.take(*objects), state)


class Odd(Made):
    """A model whose setter keeps another array than it is given."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value + 1 if name == "c" and "writes" in vars(self) else value)


def test_a_setter_that_stores_something_else() -> None:
    model = Odd()
    plan = sw.plan(model)
    bits = Bits(model)
    with refused(
        sw.StructureError,
        "A setter of the model stored something other than the array that it received.",
        leaves=["c: Array(3,) float32"],
        hint="hold it in an nnx.Variable, or in an nnx.List or nnx.Dict",
    ):
        plan.put(other(plan.take(model)), model)
    bits.check()


class Refusing(nnx.Variable):
    """A Variable that takes no value from outside, but its own; what is written into a reference would pass it by."""

    def set_raw_value(self, value: Any, **options: Any) -> None:
        if raw_value(self) is not value:
            raise RuntimeError("this one is read-only")
        super().set_raw_value(value, **options)


def test_a_variable_that_refuses_takes_back_those_before_it() -> None:
    model = Node(a=nnx.Param(ones(2)), b=nnx.data((ones(2),)), c=Refusing(ones(2), ref=False), d=nnx.Param(ones(2)))
    plan = sw.plan(model)
    bits = Bits(model)
    with pytest.raises(RuntimeError, match="read-only"):
        plan.put(other(plan.take(model)), model)
    bits.check()


def test_hooks_are_passed_by_and_cannot_interrupt() -> None:
    """A state holds raw values, which a hook was through before."""

    def never(variable: Any, value: Any) -> Any:
        raise RuntimeError("on_set_value")

    with pytest.warns(UserWarning, match="hooks are deprecated"):
        model = Node(a=nnx.Param(ones(2)), b=nnx.Param(ones(2), on_set_value=never))
    plan = sw.plan(model)
    state = other(plan.take(model))
    plan.put(state, model)
    assert same(plan.take(model), state)


@jax.tree_util.register_pytree_node_class
class Doubling(Own):
    """Makes something else of what it is given."""

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        one, two = children
        return cls(one, two + 0 if isinstance(two, jax.Array) else two)


@jax.tree_util.register_pytree_node_class
class Raising(Own):
    """Raises when it is built of arrays that it does not like."""

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        one, two = children
        if isinstance(one, jax.Array) and one.ndim and float(one[0]) != 1:
            raise ValueError("ones only")
        return cls(one, two)


def test_containers_that_cannot_be_built_anew_are_listed_before_anything_is_written() -> None:
    model = Node(a=nnx.Param(ones(2)), b=nnx.data((Raising(ones(2), ones(1)),)), c=nnx.data(Doubling(ones(2), ones(3))))
    plan = sw.plan(model)
    state = other(plan.take(model))
    bits = Bits(model)
    with refused(
        sw.StructureError,
        "Arrays cannot be replaced where they are.",
        leaves=[
            "b/0/0: Array(2,) float32  (is in a Raising, which cannot be rebuilt: ones only)",
            "b/0/1: Array(1,) float32  (is in a Raising, which cannot be rebuilt: ones only)",
            "c/0: Array(2,) float32  (is in a Doubling, which changes its items)",
            "c/1: Array(3,) float32  (is in a Doubling, which changes its items)",
        ],
        hint="hold it in an nnx.Variable, or in an nnx.List or nnx.Dict",
    ):
        plan.put(state, model)
    bits.check()


def test_what_nothing_holds_cannot_be_replaced() -> None:
    held = (Node(w=nnx.Param(ones(1))), ones(2))
    plan = sw.plan(held)
    bits = Bits(held)
    with refused(
        sw.StructureError,
        "Arrays cannot be replaced where they are.",
        leaves=["1: Array(2,) float32  (is in a tuple that nothing holds)"],
        hint="hold it in an nnx.Variable, or in an nnx.List or nnx.Dict",
    ):
        plan.put(other(plan.take(held)), held)
    bits.check()
    first = Node(w=nnx.Param(ones(1)))
    both = sw.plan(first, (ones(2),))
    bits = Bits(first)
    with pytest.raises(sw.StructureError, match=r"1/0: .*is in a tuple that nothing holds"):
        both.put(other(both.take(first, (ones(2),))), first, (ones(2),))
    bits.check()
    # The same of objects with names, which only the caller holds.
    named = sw.plan(first=first, second=(ones(2),))
    state = other(named.take(first=first, second=(ones(2),)))
    held = (ones(2),)
    bits, own = Bits(first), Bits(held)
    with pytest.raises(sw.StructureError, match=r"second/0: .*is in a tuple that nothing holds"):
        named.put(state, first=first, second=held)
    bits.check()
    own.check()
    # The hint: an nnx.List can be assigned to.
    better = nnx.List([Node(w=nnx.Param(ones(1))), nnx.data(ones(2))])
    plan = sw.plan(better)
    plan.put(other(plan.take(better)), better)
    assert better[1][0] == 3


def test_one_list_by_two_paths_cannot_hold_two_arrays() -> None:
    shared = [ones(2)]
    model = Node(a=nnx.data(shared), b=nnx.data(shared), w=nnx.Param(ones(1)))
    plan = sw.plan(model)
    plan.put(other(plan.take(model)), model)  # equal ones are no loss
    assert shared[0][0] == 3
    position = next(at for at, leaf in enumerate(plan["variables"]) if leaf.path == ("a", 0))
    arrays = list(plan.take(model).part("variables").arrays)
    arrays[position] = arrays[position] * 2
    state = jax.tree.unflatten(
        jax.tree.structure(plan.take(model)), [plan.take(model).part("params").arrays[0], *arrays]
    )
    bits = Bits(model)
    with refused(
        sw.StructureError,
        "Several paths reach one container, which would have to hold a different array for each.",
        leaves=["b/0: Array(2,) float32  (the same item as a/0)"],
        hint="hold the array in an nnx.Variable, which is one leaf however many paths reach it",
    ):
        plan.put(state, model)
    bits.check()


@pytest.mark.parametrize("hijax", [False, True])
def test_a_model_of_an_outer_trace_stays_as_it_is(hijax: bool) -> None:
    with nnx.var_defaults(hijax=hijax, ref=False):
        model = model_of("a tuple")
    plan = sw.plan(model)
    bits = Bits(model)

    def inner(x: Any) -> Any:
        plan.put(jax.tree.map(lambda array: array + x, plan.take(model)), model)
        return x

    with pytest.raises(flax.errors.TraceContextError):
        jax.jit(inner)(1.0)
    bits.check()


# --- the law: whatever is refused has changed nothing ------------------------------------------------------------


REASONS = ("shape", "type", "extra", "state", "plan", "donated", "abstract", "order", "update")


def refused_call(objects: list[Any], second: Any, reason: str, taking: bool) -> Callable[[], Any]:
    """A call on these objects that has to be refused."""
    plan = sw.plan(*objects)
    state = plan.take(*objects)
    changes = {"shape": nnx.Param(ones(7)), "type": nnx.BatchStat(ones(3)), "extra": nnx.Param(ones(3))}
    if reason in changes:
        setattr(second, "more" if reason == "extra" else "last", changes[reason])
        return lambda: plan.take(*objects, copy=False) if taking else plan.put(state, *objects)
    if reason == "donated":
        for array in jax.tree.leaves(state):
            array.delete()
    odd = {
        "state": lambda: plan.put(jax.tree.map(lambda shape: shape.update(shape=(9, 9)), plan.abstract()), *objects),
        "plan": lambda: plan.put(sw.plan(second).take(second), *objects),
        "donated": lambda: plan.put(state, *objects),
        "abstract": lambda: plan.put(plan.abstract(), *objects),
        "order": lambda: plan.put(state, objects[0]),
        "update": lambda: sw.update(
            second, nnx.to_pure_dict(nnx.state(second)) | {"last": ones(7), "nothing": ones(2)}
        ),
    }
    return odd[reason]


@given(plannable(), st.sampled_from(tuple(CONTAINERS)), st.booleans(), st.sampled_from(REASONS), st.booleans())
def test_a_refusal_leaves_every_object_equal_to_the_bit(
    first: Any, name: str, turned: bool, reason: str, taking: bool
) -> None:
    second = model_of(name)
    objects = [second, first] if turned else [first, second]
    attempt = refused_call(objects, second, reason, taking)
    bits = Bits(*objects)
    with pytest.raises(sw.StatewiseError):
        attempt()
    bits.check()


@given(plannable(), st.data())
def test_refused_parts_leave_both_models_equal_to_the_bit(model: Node, drawing: st.DataObject) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
    bits = Bits(model)
    graphdef, parts = sw.split(model, kinds)
    bits.check()
    left = drawing.draw(st.sampled_from([name for name, part in parts.items() if len(part)]))
    wrong = drawing.draw(st.sampled_from(("missing", "twice", "unexpected")))
    given_parts: Any = {name: part for name, part in parts.items() if name != left or wrong != "missing"}
    if wrong == "twice":
        given_parts["again"] = parts[left]
    elif wrong == "unexpected":
        given_parts["more"] = nnx.State({"nobody": nnx.Param(ones(1))})
    with pytest.raises(sw.StructureError):
        sw.merge(graphdef, given_parts)
    bits.check()
    with pytest.raises(sw.StatewiseError):
        sw.split(model, sw.Kinds(one=sw.Kind(nnx.Variable), two=sw.Kind(nnx.Variable), three=sw.Kind(lambda *_: False)))
    bits.check()


@given(st.integers(0, 60))
def test_an_interruption_between_any_two_lines_is_taken_back(after: int) -> None:
    """Python runs signal handlers between lines; here one interrupts at each of them in turn."""
    model = model_of("deeply nested")
    bits = Bits(model)
    flat = nnx.flatten(model)[1]
    writes = [
        (tuple(path), leaf, jax.tree.map(lambda array: array * 2, raw_value(leaf)))
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    left = after

    def tracer(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_name not in ("_write", "run", "stands") or "statewise" not in frame.f_code.co_filename:
            return None if event == "call" and frame.f_code.co_name not in ("put_values",) else tracer
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        put_values(model, flat.leaves, writes)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    if left <= 0 < after:
        bits.check()
    else:
        assert model.first[0] == 2
