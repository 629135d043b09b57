"""A model that was planned before is not flattened again, and its plan is the same in every way."""

from __future__ import annotations

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
import statewise as sw
from statewise._src.plan import resolve
from statewise.errors import StructureError

pytestmark = pytest.mark.skipif(
    modes.current() in ("hijax", "ref"), reason="hijax Variables and references are flattened each time"
)


class Model(nnx.Module):
    def __init__(self, size: int, deterministic: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(size, size, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(size, use_running_average=deterministic, rngs=rngs)


class Table(nnx.Module):
    def __init__(self, table: Any) -> None:
        self.table = nnx.data(table)


@pytest.fixture
def flattened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lists the objects that are flattened for a plan."""
    gc.collect()  # plans of earlier tests
    calls: list[Any] = []
    read = resolve.read_graph

    def counted(objects: Any, names: Any = ()) -> Any:
        calls.append(objects)
        return read(objects, names)

    monkeypatch.setattr(resolve, "read_graph", counted)
    return calls


def test_an_equal_model_is_flattened_once(flattened: list[Any]) -> None:
    plan = sw.plan(Model(3))
    assert sw.plan(Model(3)) is plan
    assert len(flattened) == 1


def test_other_optimizers_use_the_same_rows(flattened: list[Any]) -> None:
    plan = sw.plan(Model(3))
    trained = sw.plan(Model(3), optimizers={"params": optax.sgd(0.1, momentum=0.9)}, averages={"params": sw.EMA(0.9)})
    assert len(flattened) == 1
    assert trained is not plan
    assert [leaf.path for leaf in trained["params"]] == [leaf.path for leaf in plan["params"]]
    assert len(trained["ema"]) == len(plan["params"])
    assert all(bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(trained.take(Model(3))))


def test_a_model_that_differs_has_its_own_plan(flattened: list[Any]) -> None:
    plans = [
        sw.plan(Model(3)),
        sw.plan(Model(4)),
        sw.plan(Model(3, deterministic=True)),
        sw.plan(Table(jnp.ones(3))),
    ]
    assert len(set(map(id, plans))) == len(flattened) == 4
    assert [sw.plan(Model(4)), sw.plan(Model(3))] == [plans[1], plans[0]]
    assert len(flattened) == 4


def test_a_plan_that_is_not_used_is_forgotten(flattened: list[Any]) -> None:
    sw.plan(Model(5))
    gc.collect()
    sw.plan(Model(5))
    assert len(flattened) == 2


def test_a_filter_that_may_look_at_values_is_asked_each_time(flattened: list[Any]) -> None:
    kinds = sw.Kinds(
        large=sw.Kind(sw.Where(lambda path, leaf: bool(jnp.max(leaf.get_raw_value()) > 1))), rest=sw.Kind(...)
    )
    small, large = nnx.Dict(a=nnx.Param(jnp.ones(2))), nnx.Dict(a=nnx.Param(jnp.ones(2) * 3))
    assert [leaf.kind for leaf in kinds.plan(small).leaves] == ["rest"]
    kept = kinds.plan(small), kinds.plan(large)
    assert [leaf.kind for leaf in kept[1].leaves] == ["large"]
    assert len(flattened) == 3


def test_filters_tell_arrays_apart_that_have_the_same_row() -> None:
    kinds = sw.Kinds(numpy=sw.Kind(np.ndarray), jax=sw.Kind(...))
    plans = [kinds.plan(Table(table)) for table in (jnp.ones(2), np.ones(2, np.float32), jnp.ones(2))]
    assert [plan.leaves[0].kind for plan in plans] == ["jax", "numpy", "jax"]


def test_kinds_of_paths_and_names_are_remembered(flattened: list[Any]) -> None:
    kinds = sw.Kinds(head=sw.Kind(sw.Path("policy/norm/**")), rest=sw.Kind(...))
    plan = kinds.plan(policy=Model(3), value=Model(3))
    assert kinds.plan(policy=Model(3), value=Model(3)) is plan
    one = Model(3)
    assert kinds.plan(policy=one, value=one) is not plan
    assert len(flattened) == 2


def test_take_and_put_find_what_differs() -> None:
    model = Model(3)
    plan = sw.plan(model)
    state = plan.take(model)
    with pytest.raises(StructureError, match=r"1 leaf differs|leaves differ"):
        plan.take(Model(4))
    model.layers[0].kernel.set_raw_value(jnp.ones((3, 3), jnp.bfloat16))
    with pytest.raises(StructureError, match="bfloat16"):
        plan.take(model)
    other = Model(3)
    plan.put(state, other)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(plan.take(other)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_copies_stay_where_the_arrays_are() -> None:
    device = jax.devices()[1]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    model = nnx.Dict(
        one=nnx.Param(jax.device_put(jnp.ones(8), device)),
        split=nnx.Param(jax.device_put(jnp.ones((8, 2)), split)),
        keys=nnx.Variable(jax.device_put(jax.random.split(jax.random.key(0), 8), split)),
        weak=nnx.Variable(jnp.asarray(1.0)),
    )
    state = sw.plan(model).take(model)
    for leaf, name in ((model.one, "one"), (model.split, "split"), (model.keys, "keys"), (model.weak, "weak")):
        array = leaf.get_raw_value()
        kind = "params" if isinstance(leaf, nnx.Param) else "variables"
        copy = state[kind][name]
        values = np.asarray(jax.random.key_data(array) if name == "keys" else array)
        assert copy.sharding.is_equivalent_to(array.sharding, array.ndim), name
        assert copy is not array
        array.delete()
        assert not copy.is_deleted()
        np.testing.assert_array_equal(jax.random.key_data(copy) if name == "keys" else copy, values)
