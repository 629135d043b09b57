"""Paths as text, and the row that describes a leaf."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from statewise._src.common.paths import format_dtype, format_shape, format_type


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), "."),
        (("kernel",), "kernel"),
        (("layers", 0, "kernel"), "layers/0/kernel"),
        ((1, 2), "1/2"),
        ((("t", 0), "w"), "('t', 0)/w"),
        ((None, True, 2.5), "None/True/2.5"),
    ],
)
def test_a_path_is_written_with_slashes(path: Any, text: str) -> None:
    assert sw.format_path(path) == text


@pytest.mark.parametrize(("shape", "text"), [(None, "-"), ((), "()"), ((3,), "(3,)"), ((0, 4), "(0, 4)")])
def test_a_shape_is_written_as_python_writes_it(shape: Any, text: str) -> None:
    assert format_shape(shape) == text


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (None, "-"),
        (jnp.dtype("float32"), "float32"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (jnp.dtype("int4"), "int4"),
        (jnp.dtype("float8_e4m3fn"), "float8_e4m3fn"),
        (jax.random.key(0).dtype, "key<fry>"),
        (jax.random.key(0, impl="rbg").dtype, "key<rbg>"),
    ],
)
def test_a_dtype_is_written_by_its_name(dtype: Any, text: str) -> None:
    assert format_dtype(dtype) == text


def test_a_type_is_written_by_its_last_name() -> None:
    class Inner(nnx.Variable):
        pass

    assert [format_type(cls) for cls in (nnx.Param, Inner, jax.Array)] == ["Param", "Inner", "Array"]


@given(st.lists(st.one_of(st.integers(), st.text("ab", min_size=1)), max_size=4).map(tuple))
def test_the_text_has_one_segment_for_each_key(path: tuple[Any, ...]) -> None:
    assert sw.format_path(path).split("/") == ([str(key) for key in path] or ["."])


def test_an_integer_and_its_text_are_written_alike_and_stay_apart() -> None:
    assert sw.format_path((0,)) == sw.format_path(("0",))
    leaf = sw.results.Leaf((0,), "params", nnx.Param, (), None)
    assert leaf != dataclasses.replace(leaf, path=("0",))


def test_a_leaf_is_a_value() -> None:
    leaf = sw.results.Leaf(("a",), "params", nnx.Param, (2,), jnp.dtype("float32"), (("b",),), 2, 8)
    assert leaf == dataclasses.replace(leaf)
    assert hash(leaf) == hash(dataclasses.replace(leaf))
    assert pickle.loads(pickle.dumps(leaf)) == leaf
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.kind = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (sw.results.Leaf(("a", 0), None, nnx.Param, (2,), jnp.dtype("float32")), "a/0: Param(2,) float32"),
        (sw.results.Leaf((), "rest", jax.Array, (), jnp.dtype("int32")), ".: Array() int32  kind=rest"),
        (sw.results.Leaf(("a",), None, nnx.Cache, None, None, note="odd"), "a: Cache- -  (odd)"),
    ],
)
def test_a_leaf_is_written_in_one_line(leaf: sw.results.Leaf, text: str) -> None:
    assert str(leaf) == text
