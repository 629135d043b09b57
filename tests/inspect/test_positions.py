"""What belongs to a leaf is found by its path, in models that hold whatever NNX lets them hold.

Two flattenings of one model need not have the same leaves: a raw array that is None in one of them is not there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

import statewise as sw
from comparing import data
from statewise._src.common.nnx_graph import raw_value
from statewise._src.core.plan import tables_of
from statewise._src.sharding.annotations import metadata_of
from strategies import Node, OwnStat

MESH = AbstractMesh((2, 2), ("x", "y"))
SHAPES: tuple[tuple[int, ...], ...] = ((), (4,), (2, 4), (4, 2, 2))


def placed(plan: sw.Plan) -> dict[str, Any]:
    return {keys[0].key: at.spec for keys, at in jax.tree_util.tree_flatten_with_path(plan.shardings(MESH))[0]}


KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param, placement=sw.FromMetadata()),
    rest=sw.Kind(..., placement=sw.FromMetadata()),
)


# --- the model of the report, and its kin ------------------------------------------------------------------------


class Neighbors(nnx.Module):
    """A raw array before Variables of which one says where it lies."""

    def __init__(self, before: Any, several: bool = True) -> None:
        self.a = nnx.data(before)
        self.b = nnx.Param(jnp.ones((8, 4)), out_sharding=("x", None), eager_sharding=False)
        if several:
            self.c = nnx.Param(jnp.ones((8, 4)))
            self.d = nnx.Param(jnp.ones((8, 4)), out_sharding=(None, "y"), eager_sharding=False)


RAW: dict[str, Any] = {
    "an array": lambda: jnp.ones(8),
    "a NumPy array": lambda: np.ones(8, np.float32),
    "two in a tuple": lambda: (jnp.ones(8), jnp.ones(8)),
    "some in a dict": lambda: {3: jnp.ones(8), 1: [jnp.ones(8)]},
    "none": lambda: (None, jnp.ones(8), None),
    "a number": lambda: jnp.float32(3),
}


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_array_moves_no_metadata(name: str, several: bool) -> None:
    for model in (Neighbors(RAW[name](), several), nnx.eval_shape(lambda: Neighbors(RAW[name](), several))):
        plan = KINDS.plan(model, optimizers={"params": optax.sgd(1.0, 0.9)})
        found = placed(plan)
        assert found["params/b"] == found["optimizer/params/0/trace/b"] == jax.P("x")
        if several:
            assert found["params/c"] == jax.P()
            assert found["params/d"] == jax.P(None, "y")
        assert all(spec == jax.P() for path, spec in found.items() if path.startswith("rest"))


def test_memory_counts_each_leaf_as_it_lies() -> None:
    counted = sw.memory(KINDS.plan(Neighbors(jnp.ones(8), several=False)), {"x": 4})
    assert counted["params"].per_device == 8 * 4 * 4 // 4
    assert counted["rest"].per_device == 8 * 4


def test_several_objects_with_raw_arrays() -> None:
    plan = KINDS.plan(Neighbors((jnp.ones(2), jnp.ones(2))), Neighbors(jnp.ones(8)))
    found = placed(plan)
    for number in (0, 1):
        assert [found[f"params/{number}/{name}"] for name in "bcd"] == [jax.P("x"), jax.P(), jax.P(None, "y")]


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_objects_with_names_lie_as_those_without(names: tuple[str, ...]) -> None:
    objects = {name: Neighbors((jnp.ones(2), jnp.ones(2))) for name in names}
    plan = KINDS.plan(**objects, optimizers={"params": optax.sgd(1.0, 0.9)}, averages={"params": sw.EMA(0.9)})
    found = placed(plan)
    for name in names:
        assert [found[f"params/{name}/{leaf}"] for leaf in "bcd"] == [jax.P("x"), jax.P(), jax.P(None, "y")]
        assert found[f"optimizer/params/0/trace/{name}/b"] == found[f"ema/params/{name}/b"] == jax.P("x")
    counted, other = (sw.memory(each, {"x": 2, "y": 2}) for each in (plan, KINDS.plan(*objects.values())))
    assert counted["params"].per_device == other["params"].per_device
    assert placed(plan.stacked(3))[f"params/{names[0]}/b"] == jax.P(None, "x")


# --- the law -----------------------------------------------------------------------------------------------------


@st.composite
def leaves_(draw: st.DrawFn) -> Any:
    """A leaf of any sort; a Variable says which of its axes are split, if any."""
    seed = draw(st.integers(0, 99))
    shape = draw(st.sampled_from(SHAPES))
    array = jnp.asarray(np.full(shape, seed, np.float32))
    sort = draw(st.sampled_from(("variable", "variable", "raw", "numpy", "none", "tree", "tuple", "frozen")))
    if sort == "variable":
        entries = draw(st.sampled_from((None, "x", "y"))), draw(st.sampled_from((None, "x", "y")))
        names = [*entries, None][: len(shape)]
        names = [name if names.index(name) == at else None for at, name in enumerate(names)]
        said = {"out_sharding": tuple(names)} if draw(st.booleans()) else {}
        return draw(st.sampled_from((nnx.Param, OwnStat)))(array, eager_sharding=False, mark=seed, **said)
    if sort == "none":
        return nnx.Param(None, mark=seed)
    if sort == "tree":
        return nnx.Param(
            {"u": array, "t": (array + 1, None)},
            out_sharding=("x",) * min(1, len(shape)) + (None,) * (len(shape) - 1),
            eager_sharding=False,
            mark=seed,
        )
    if sort == "tuple":
        return (array, None, (array,))
    if sort == "frozen":
        return {2: array, 10: (array,)}
    return np.asarray(array) if sort == "numpy" else array


@st.composite
def mixed_models(draw: st.DrawFn) -> Node:
    """Leaves of every sort under attributes, in lists and in dicts, some of them tied."""
    drawn = draw(st.lists(leaves_(), min_size=1, max_size=6))
    attributes: dict[str, Any] = {}
    for number, leaf in enumerate(drawn):
        name = f"{draw(st.sampled_from('abcz'))}{number}"
        form = draw(st.sampled_from(("attribute", "list", "node", "dict")))
        held = {
            "attribute": lambda leaf=leaf: leaf,
            "list": lambda leaf=leaf: nnx.List([nnx.data(leaf), nnx.Param(jnp.zeros(2))]),
            "node": lambda leaf=leaf: Node(inner=nnx.data(leaf)),
            "dict": lambda leaf=leaf: {10: leaf, 9: jnp.zeros(3)},
        }[form]()
        attributes[name] = nnx.data(held)
    variables = [leaf for leaf in drawn if isinstance(leaf, nnx.Variable)]
    if variables and draw(st.booleans()):
        attributes[draw(st.sampled_from(("a_tied", "zz_tied")))] = draw(st.sampled_from(variables))
    return Node(**attributes, last=nnx.Param(jnp.zeros(1)))


def _spec_said(leaf: Any) -> tuple[Any, ...]:
    said = leaf.get_metadata().get("out_sharding") if isinstance(leaf, nnx.Variable) else None
    spec = [*(said or ())]
    while spec and spec[-1] is None:
        spec.pop()
    return tuple(spec)


@given(mixed_models(), st.booleans())
def test_each_leaf_is_what_its_own_variable_says(model: Node, two: bool) -> None:
    """By path NNX gives the leaf; sharding, axes, shapes, values and metadata in a plan are that leaf's."""
    objects = (
        model,
        Node(raw=nnx.data(jnp.ones(5)), w=nnx.Param(jnp.ones(4), out_sharding=("y",), eager_sharding=False)),
    )
    objects = objects if two else objects[:1]
    plan = KINDS.plan(*objects)
    flat = nnx.flatten(objects if two else objects[0])[1]
    live = dict(zip(map(tuple, flat.paths), flat.leaves, strict=True))
    known = metadata_of(tables_of(plan))
    assert known.keys() == live.keys()
    state, lies, axes = plan.take(*objects), plan.shardings(MESH), plan.axes(params=0, rest=None)
    for leaf in plan.leaves:
        own = live[leaf.path]
        said = own.get_metadata() if isinstance(own, nnx.Variable) else {}
        assert known[leaf.path] == said
        values = jax.tree.leaves(raw_value(own))
        positions = [row.position for row in tables_of(plan).by_kind[leaf.kind or ""] if row.leaf is leaf]
        assert len(positions) == len(values)
        for at, value in zip(positions, values, strict=True):
            assert np.array_equal(data(state.part(leaf.kind or "").arrays[at]), data(jnp.asarray(value)))
            assert tuple(lies.part(leaf.kind or "").arrays[at].spec) == _spec_said(own)
            assert axes.part(leaf.kind or "").arrays[at] == (0 if leaf.kind == "params" else None)
    built = plan.build(state)
    again = nnx.flatten(built)[1]
    assert [tuple(path) for path in again.paths] == list(live)
    for path, leaf in zip(again.paths, again.leaves, strict=True):
        assert not isinstance(leaf, nnx.Variable) or leaf.get_metadata() == live[tuple(path)].get_metadata()
