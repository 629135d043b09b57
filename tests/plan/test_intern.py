"""Equal plans are one object, plans that differ in anything are not, and one that nobody uses is gone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import plannable
from strategies import Node


class Scaled(nnx.Module):
    """A model with a plain attribute."""

    def __init__(self, scale: Any, **metadata: Any) -> None:
        self.scale = scale
        self.w = nnx.Param(jnp.array([1, 2]), **metadata)

    def __call__(self, x: Any) -> Any:
        return x * self.scale + self.w[...]


@given(plannable())
def test_the_same_model_has_one_plan(model: Node) -> None:
    plan = sw.plan(model)
    assert sw.plan(model) is plan
    assert sw.plan(nnx.clone(model)) is plan
    assert sw.Kinds.standard().plan(model) is plan
    assert copy.copy(plan) is plan
    assert copy.deepcopy(plan) is plan
    assert hash(plan) == hash(sw.plan(model))


def test_values_do_not_count_and_shapes_do() -> None:
    def make(shape: tuple[int, ...], dtype: Any = jnp.float32, fill: float = 0) -> Node:
        return Node(a=nnx.Param(jnp.full(shape, fill, dtype)))

    plan = sw.plan(make((2,)))
    assert sw.plan(make((2,), fill=3)) is plan
    assert sw.plan(nnx.eval_shape(lambda: make((2,)))) is plan
    others = [sw.plan(make((3,))), sw.plan(make((2,), jnp.bfloat16)), sw.plan(Node(b=nnx.Param(jnp.ones(2))))]
    others += [sw.plan(Node(a=nnx.BatchStat(jnp.ones(2)))), sw.plan(make((2,)), make((2,)))]
    others += [sw.Kinds(params=sw.Kind(nnx.Param)).plan(make((2,)))]
    others += [sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, frozen=True)).plan(make((2,)))]
    assert len({id(each) for each in [plan, *others]}) == 1 + len(others)


def test_optimizers_count_by_identity() -> None:
    model = Node(a=nnx.Param(jnp.ones(2)), b=nnx.LoRAParam(jnp.ones(2)))
    adam, same = optax.adam(0.1), optax.adam(0.1)

    def plan(optimizers: Any) -> sw.Plan:
        return sw.plan(model, optimizers=optimizers)

    assert plan({"params": adam}) is plan({"params": adam})
    assert plan({"params": adam}) is plan({("params",): adam})
    assert plan({}) is plan(None) is sw.plan(model)
    made = [plan(None), plan({"params": adam}), plan({"params": same}), plan({("params", "lora"): adam})]
    made += [plan({"params": adam, "lora": adam}), plan({"params": adam, "lora": same})]
    assert len({id(each) for each in made}) == len(made)
    assert len(made[-1].optimizers) == 2
    assert made[1].optimizers.keys() == {("params",)}


@pytest.mark.parametrize("other", [2, 1.0, True, "1"])
def test_static_attributes_count_and_so_do_their_types(other: Any) -> None:
    one, two = Scaled(1), Scaled(other)
    assert sw.plan(one) is sw.plan(Scaled(1))
    assert sw.plan(one) is not sw.plan(two)


def test_models_that_differ_in_the_type_of_a_number_keep_their_own_arithmetic() -> None:
    x = jnp.array([1, 2])
    run = sw.step(lambda model, x: model(x))
    for scale in (1, 1.0, 2):
        model = Scaled(scale)
        out = run(sw.plan(model).take(model), x)
        assert out.dtype == model(x).dtype
        assert np.array_equal(out, model(x))


def test_modes_of_a_model_are_plans_of_their_own() -> None:
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    training = sw.plan(model)
    model.eval()
    assert sw.plan(model) is not training
    model.train()
    assert sw.plan(model) is training


@pytest.mark.parametrize("metadata", [{"sizes": [1, 2]}, {"by": {"a": {1, 2}}}, {"fn": print}], ids=str)
def test_metadata_need_not_be_hashable(metadata: dict[str, Any]) -> None:
    assert sw.plan(Scaled(1, **metadata)) is sw.plan(Scaled(1, **metadata))
    assert sw.plan(Scaled(1, **metadata)) is not sw.plan(Scaled(1))


def test_metadata_that_cannot_be_compared_makes_plans_apart() -> None:
    mask = np.ones(3)
    one = Scaled(1, mask=mask)
    plan, other = sw.plan(one), sw.plan(Scaled(1, mask=np.ones(3)))
    assert plan is not other
    state = plan.take(one)
    plan.put(state, one)
    assert np.array_equal(plan.build(state).w.get_metadata("mask"), mask)


@pytest.mark.parametrize("keys", [(0, False), (1, 1.0), ((1,), (True,)), (0.0, -0.0), (0, np.int64(0))], ids=str)
def test_paths_that_python_takes_for_equal_are_of_two_plans(keys: tuple[Any, Any]) -> None:
    """Else the second model would have the first one's paths, in errors and on disk."""
    models = [Node(d=nnx.data({key: nnx.Param(jnp.ones(3))})) for key in keys]
    plans = [sw.plan(model) for model in models]
    assert plans[0] is not plans[1]
    for key, model, plan in zip(keys, models, plans, strict=True):
        assert [repr(leaf.path) for leaf in plan.leaves] == [repr(("d", key))]
        assert sw.plan(nnx.clone(model)) is plan


def test_a_plan_that_nobody_uses_is_gone() -> None:
    model = Node(a=nnx.Param(jnp.ones(7)), b=nnx.Variable(jnp.ones(11)))
    plan = sw.plan(model, optimizers={"params": optax.adam(0.1)})
    state = plan.take(model)
    assert str(plan)
    assert plan.leaves
    watched = weakref.ref(plan)
    del plan, state
    gc.collect()
    assert watched() is None


def test_threads_get_one_plan() -> None:
    model = Node(a=nnx.Param(jnp.ones((3, 5))))
    plans: list[sw.Plan] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        plans.extend(sw.plan(nnx.clone(model)) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 20
    assert len({id(plan) for plan in plans}) == 1
