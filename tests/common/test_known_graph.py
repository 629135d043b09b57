"""A known graph reads exactly the objects that have its graph definition, and gives NNX's leaves in NNX's order."""

import collections
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
from statewise._src.common.known_graph import KnownGraph, known_graph, values_if_fit
from statewise._src.common.nnx_graph import read_graph, specs_of
from statewise._src.plan.intern import same_graph

pytestmark = pytest.mark.skipif(
    modes.current() in ("hijax", "ref"), reason="hijax Variables and references are flattened each time"
)


class Pair(NamedTuple):
    left: Any
    right: Any


TX = optax.adam(1e-3)


class Block(nnx.Module):
    def __init__(self, size: int = 2, rate: Any = 0.5, **metadata: Any) -> None:
        self.rate = rate
        self.weight = nnx.Param(jnp.ones((size, 3)), **metadata)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.act = jnp.tanh


class Plain(nnx.Module, pytree=False):
    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


class Data(nnx.Module):
    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, nnx.data(value))


def tied() -> Any:
    weight = nnx.Param(jnp.ones((2, 3)))
    return Plain(a=weight, b=weight)


def shared() -> Any:
    block = Block()
    return Plain(a=block, b=block)


def crossed() -> Any:
    one, two = Block(), Block()
    return Plain(a=one, b=two, c=one, d=two)


def crossed_otherwise() -> Any:
    one, two = Block(), Block()
    return Plain(a=one, b=two, c=two, d=one)


def cyclic() -> Any:
    child = Plain(weight=nnx.Param(jnp.ones(2)))
    child.parent = Plain(child=child)
    return child.parent


def removed() -> Any:
    block = Block()
    del block.count
    return block


def added() -> Any:
    block = Block()
    block.more = nnx.Param(jnp.ones(1))
    return block


READ: dict[str, Callable[[], Any]] = {
    "block": Block,
    "rate 1": lambda: Block(rate=1),
    "rate 1.0": lambda: Block(rate=1.0),
    "rate True": lambda: Block(rate=True),
    "metadata": lambda: Block(role="ema"),
    "removed": removed,
    "added": added,
    "linear": lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    "no bias": lambda: nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)),
    "eval": lambda: nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)),
    "train": lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    "dropout": lambda: nnx.Dropout(0.1, rngs=nnx.Rngs(0)),
    "tied": tied,
    "untied": lambda: Plain(a=nnx.Param(jnp.ones((2, 3))), b=nnx.Param(jnp.ones((2, 3)))),
    "shared": shared,
    "not shared": lambda: Plain(a=Block(), b=Block()),
    "crossed": crossed,
    "crossed otherwise": crossed_otherwise,
    "cyclic": cyclic,
    "list": lambda: Data(items=[Block(), nnx.Param(jnp.ones(2)), jnp.ones(3), "a"]),
    "tuple": lambda: Data(items=(Block(), nnx.Param(jnp.ones(2)), jnp.ones(3), "a")),
    "shorter": lambda: Data(items=[Block(), nnx.Param(jnp.ones(2)), jnp.ones(3)]),
    "nnx.List": lambda: Plain(items=nnx.List([Block(), Block()])),
    "nnx.Dict": lambda: Plain(items=nnx.Dict(a=Block(), b=Block())),
    "dict": lambda: Data(items={"a": nnx.Param(jnp.ones(2)), "b": None}),
    "int keys": lambda: Data(items={0: nnx.Param(jnp.ones(2)), 1: {}}),
    "named tuple": lambda: Data(items=Pair(nnx.Param(jnp.ones(2)), [])),
    "ordered": lambda: Data(items=collections.OrderedDict(a=nnx.Param(jnp.ones(2)), b=None)),
    "raw": lambda: Plain(table=jnp.ones(3), other=np.ones(2)),
    "empty": lambda: Plain(items=[], none=None, weight=nnx.Param(jnp.ones(1))),
    "array in a tuple": lambda: Data(items=(jnp.ones(2),)),
    "shape in a tuple": lambda: Data(items=(jax.ShapeDtypeStruct((2,), jnp.float32),)),
    "NumPy's scalar": lambda: Data(items=(np.float32(1),)),
    "several arrays": lambda: Plain(pair=nnx.Variable({"a": jnp.ones(1), "b": jnp.ones(2)})),
    "named": lambda: (Block(), Block()),
    "optimizer": lambda: nnx.ModelAndOptimizer(Block(), TX),
}

NOT_READ: dict[str, Callable[[], Any]] = {
    "hijax": lambda: Block(hijax=True),
    "ref": lambda: Block(ref=True),
    "bool keys": lambda: Data(items={False: nnx.Param(jnp.ones(2))}),
}


def _known(root: Any) -> tuple[Any, Any, KnownGraph | None]:
    graphdef, flat = nnx.flatten(root, graph=True)
    return graphdef, flat, known_graph(graphdef)


@pytest.mark.parametrize("name", READ)
def test_leaves_are_nnx_s_in_its_order(name: str) -> None:
    graphdef, flat, known = _known(READ[name]())
    assert known is not None
    other = READ[name]()
    definition, leaves = nnx.flatten(other, graph=True)
    read = known.leaves_of(other)
    assert same_graph(graphdef, definition)
    assert read is not None
    assert list(map(id, read)) == list(map(id, leaves.leaves))
    assert len(read) == len(flat.leaves)


def test_only_objects_with_an_equal_definition_are_read() -> None:
    every = {name: make() for name, make in {**READ, **NOT_READ}.items()}
    flat = {name: _known(root) for name, root in every.items()}
    read_pairs = 0
    for (name, (graphdef, _, known)), other in itertools.product(flat.items(), every):
        read = None if known is None else known.leaves_of(every[other])
        assert (read is not None) == (known is not None and same_graph(graphdef, flat[other][0])), (name, other)
        read_pairs += read is not None
    assert read_pairs == len(READ)


@pytest.mark.parametrize("name", NOT_READ)
def test_forms_that_are_not_read(name: str) -> None:
    _, _, known = _known(NOT_READ[name]())
    assert known is None


def test_objects_that_are_no_model_are_not_read() -> None:
    _, _, known = _known(Block())
    assert known is not None
    for other in (None, 3, "text", [Block()], Block, object(), jnp.ones(2), nnx.Param(jnp.ones(2))):
        assert known.leaves_of(other) is None


def test_an_attribute_that_is_added_or_changed_is_noticed() -> None:
    model = Block()
    _, _, known = _known(model)
    assert known is not None
    assert known.leaves_of(model) is not None
    model.rate = 0.25
    assert known.leaves_of(model) is None
    model.rate = 0.5
    assert known.leaves_of(model) is not None
    model.weight.set_metadata(role="ema")
    assert known.leaves_of(model) is None


def test_new_leaves_make_the_objects_that_nnx_makes() -> None:
    for make in READ.values():
        graphdef, flat, known = _known(make())
        assert known is not None
        values = [leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in flat.leaves]
        made, expected = nnx.unflatten(graphdef, known.leaves_with(values)), nnx.unflatten(graphdef, values)
        (definition, leaves), (wanted, others) = (nnx.flatten(root, graph=True) for root in (made, expected))
        assert same_graph(definition, wanted)
        for leaf, other in zip(leaves.leaves, others.leaves, strict=True):
            assert type(leaf) is type(other)
            held, should = (each.get_raw_value() if isinstance(each, nnx.Variable) else each for each in (leaf, other))
            assert held is should


def test_values_are_those_of_the_planned_shapes_and_dtypes() -> None:
    leaves = read_graph((Block(),)).leaves
    specs: Any = [specs_of(leaf.get_raw_value()) for leaf in leaves]
    values = values_if_fit(leaves, specs)
    assert values is not None
    assert [value is leaf.get_raw_value() for value, leaf in zip(values, leaves, strict=True)] == [True, True]
    assert values_if_fit(read_graph((Block(4),)).leaves, specs) is None
    for value in (jnp.zeros((), jnp.float32), np.int32(0), 0, "text"):
        leaves[0].set_raw_value(value)
        assert (values_if_fit(leaves, specs) is None) == (
            value is not leaves[0].get_raw_value() or specs_of(value) != specs[0]
        )
