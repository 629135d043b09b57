"""Reading a model and building it again; what is no model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import data, holds_the_same
from refusals import refused
from statewise._src.common.nnx_graph import (
    ONE,
    ArraySpec,
    ModelError,
    arrays_of,
    held_value,
    is_array,
    raw_value,
    read_graph,
    rebuild,
    row_of,
    spec_of,
    value_of,
)
from strategies import Node, models

NO_MODEL = "pass a module, an nnx.Optimizer, a metric, or a list or dict of them"


def test_no_object() -> None:
    with refused(ModelError, "There is no object to look at.", hint="kinds.plan(model)"):
        sw.plan()


def test_a_class_instead_of_an_instance() -> None:
    hint = "model = Linear(..., rngs=nnx.Rngs(0))"
    with refused(ModelError, "Object 0 is the class Linear, not an instance of it.", hint=hint):
        sw.plan(nnx.Linear)
    with refused(ModelError, "Object 1 is the class Linear, not an instance of it.", hint=hint):
        sw.plan(Node(a=nnx.Param(jnp.ones(1))), nnx.Linear)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (None, "NoneType"),
        (3, "int"),
        (2.5, "float"),
        (True, "bool"),
        ("model", "str"),
        (b"model", "bytes"),
        (np.ones(2), "ndarray"),
        (np.float32(1), "float32"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct"),
        (len, "builtin_function_or_method"),
        (lambda x: x, "function"),
        (object(), "object"),
        ({1, 2}, "set"),
        (iter(()), "tuple_iterator"),
    ],
)
def test_what_is_no_model(thing: Any, name: str) -> None:
    with refused(ModelError, f"Object 0 is {name}, which holds no leaves at paths.", hint=NO_MODEL):
        sw.plan(thing)


def test_an_array_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"^Object 1 is ArrayImpl, which holds no leaves at paths\."):
        sw.plan(Node(a=nnx.Param(jnp.ones(1))), jnp.ones(2))


def test_what_nnx_cannot_flatten_is_said_so() -> None:
    """Keys of one dict that cannot be sorted, say: NNX's own message is kept as the cause."""
    with pytest.raises(ModelError, match=r"^NNX cannot flatten dict: .*<.* not supported") as caught:
        sw.plan({1: nnx.Param(jnp.ones(1)), "a": nnx.Param(jnp.ones(1))})
    assert isinstance(caught.value.__cause__, TypeError)


@given(models())
def test_rebuilding_gives_the_same_model(model: Node) -> None:
    found = read_graph([model])
    assert found.paths == tuple(tuple(path) for path in nnx.flatten(model)[1].paths)
    values = [raw_value(leaf) for leaf in found.leaves]
    (again,) = rebuild(found.graphdef, values, found.several, plain=False)
    other = read_graph([again])
    assert other.paths == found.paths
    assert other.graphdef == found.graphdef
    for one, two in zip(found.leaves, other.leaves, strict=True):
        assert one is not two or not isinstance(one, nnx.Variable)
        if isinstance(held_value(one), jax.Ref):  # reading it copies
            assert held_value(one) is not held_value(two)
            np.testing.assert_array_equal(data(raw_value(one)), data(raw_value(two)))
        else:
            assert holds_the_same(raw_value(one), raw_value(two))


@given(models())
def test_each_leaf_stands_once_and_has_a_row(model: Node) -> None:
    found = read_graph([model])
    assert len(set(found.paths)) == len(found.paths)
    assert len({id(leaf) for leaf in found.leaves if isinstance(leaf, nnx.Variable)}) == sum(
        isinstance(leaf, nnx.Variable) for leaf in found.leaves
    )
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        row = row_of(path, leaf, "kind", "note")
        value = raw_value(leaf)
        assert (row.path, row.kind, row.note) == (path, "kind", "note")
        assert row.shape == (None if value is None else value.shape)
        assert row.size == (0 if value is None else value.size)


def test_several_objects_share_what_they_share() -> None:
    tied = nnx.Param(jnp.ones(2))
    found = read_graph([Node(a=tied), Node(b=tied, c=nnx.Param(jnp.ones(1)))])
    assert found.several
    assert found.paths == ((0, "a"), (1, "c"))
    assert [found.relative(path) for path in found.paths] == [("a",), ("c",)]


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (jnp.ones((2, 3)), ArraySpec((2, 3), jnp.dtype("float32"))),
        (np.ones((2, 3)), ArraySpec((2, 3), jnp.dtype("float32"))),
        (np.int64(3), ArraySpec((), jnp.dtype("int32"))),
        (True, ArraySpec((), jnp.dtype("bool"))),
        (3, ArraySpec((), jnp.dtype("int32"))),
        (2.5, ArraySpec((), jnp.dtype("float32"))),
        (1j, ArraySpec((), jnp.dtype("complex64"))),
        (jnp.ones(2, jnp.bfloat16), ArraySpec((2,), jnp.dtype("bfloat16"))),
        (jax.ShapeDtypeStruct((0,), jnp.float16), ArraySpec((0,), jnp.dtype("float16"))),
        (np.array(["a"]), None),
        (np.array([object()]), None),
        (np.datetime64("2020-01-01"), None),
        ("text", None),
        (object(), None),
    ],
)
def test_a_spec_is_what_jax_will_see(value: Any, spec: ArraySpec | None) -> None:
    assert spec_of(value) == spec


@pytest.mark.parametrize(
    ("array", "size", "nbytes"),
    [
        (jnp.ones((2, 3)), 6, 24),
        (jnp.ones((0, 3)), 0, 0),
        (jnp.ones((), jnp.bfloat16), 1, 2),
        (jax.random.key(0), 1, 8),
        (jax.random.key(0, impl="rbg"), 1, 16),
        (jax.random.split(jax.random.key(0), 3), 3, 24),
        (jnp.ones(2, jnp.complex64), 2, 16),
    ],
)
def test_sizes(array: Any, size: int, nbytes: int) -> None:
    spec = spec_of(array)
    assert spec is not None
    assert (spec.size, spec.nbytes) == (size, nbytes)


@pytest.mark.parametrize(
    "value",
    [jnp.ones(2), np.ones(2), 3, None, {"a": jnp.ones(1), "b": None}, (jnp.ones(1), 2.5), [], {}],
    ids=str,
)
def test_a_value_and_its_arrays_are_inverse(value: Any) -> None:
    arrays, structure = arrays_of(value)
    assert (structure is ONE) == (jax.tree.structure(value) == jax.tree.structure(0))
    assert not is_array(value) or structure is ONE
    again = value_of(arrays, structure)
    assert jax.tree.structure(again) == jax.tree.structure(value)
    assert all(one is two for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(value), strict=True))
