"""Paths on disk: keys keep their types, no two leaves get one place, and each leaf is found where its path says."""

from __future__ import annotations

import enum
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import assert_identical, one_of, round_trip
from refusals import refused
from statewise._src.checkpoint.format import layout as laying
from statewise._src.checkpoint.format.keys import (
    OrbaxKeys,
    decode_path,
    dtype_name,
    dtype_of,
    encode_path,
    path_id,
    prng_of,
    type_name,
)
from statewise._src.common.compare import same_type
from strategies import Node


class Colour(enum.Enum):
    RED = 1


def made_of(*paths: tuple[Any, ...]) -> sw.State:
    """A state with a leaf at each of these paths, numbered in order."""
    tree: dict[Any, Any] = {}
    for number, (*nodes, last) in enumerate(paths):
        inner = tree
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[last] = nnx.Variable(jnp.full(2, float(number)))
    model = Node(tree=nnx.data(tree))
    return sw.plan(model).take(model)


ODD = {
    "a dot, beside a node": [("a.b",), ("a", "b")],
    "a slash, beside a node": [("a/b",), ("a", "b")],
    "an escaped dot beside a dot": [("a%2Eb",), ("a.b",), ("a%252Eb",)],
    "text that looks like a second one": [("1",), ("1#2",), ("1#3",)],
    "nothing, and what stands for it": [("",), ("%",), ("%25",), (" ",)],
    "dots alone": [(".",), ("..",), ("...",)],
    "other scripts": [("\u00e9",), ("e\u0301",), ("\u6f22",), ("\U0001f600",)],
    "what cannot be printed": [("\x00",), ("\n",), ("\u200b",), ("\ud800",)],
    "words of JSON and of Orbax": [("null",), ("true",), ("__proto__",), ("default",), ("_METADATA",), ("state",)],
    "quotes": [("'",), ('"',), ("\\",), ("['x']",)],
    "upper and lower case": [("a",), ("A",)],
    "numbers": [(0,), (-1,), (10,), (2,)],
    "tuples": [((0, 1),), ((0, 2),), ((1, 0),)],
    "a very long one": [("x" * 500,), ("x" * 501,)],
    "deep": [tuple("abcdefghijklmnopqrstuvwxyz"), ("a", "c")],
}


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize("paths", ODD.values(), ids=ODD)
def test_leaves_at_odd_paths_come_back(tmp_path: pathlib.Path, paths: list[tuple[Any, ...]], layout: str) -> None:
    state = made_of(*paths)
    assert len(jax.tree.leaves(state)) == len(paths)
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


def test_an_integer_and_its_text_are_two_keys(tmp_path: pathlib.Path) -> None:
    """NNX cannot sort the two in one dict, but a list's positions and a dict's keys may meet in a checkpoint."""
    sw.save(tmp_path / "numbers", made_of((0,), (1,)))
    report = sw.preview(tmp_path / "numbers", made_of(("0",), ("1",)))
    assert [leaf.note for leaf in report.problems] == ["missing from the checkpoint"] * 2 + ["not in the target"] * 2


def test_a_node_and_an_array_called_packed_do_not_meet_the_buffers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed layout has a node of that name for its own."""
    monkeypatch.setattr(laying, "_SMALL", 64)
    large, small = jnp.ones(100), jnp.ones(3)
    for model in (
        Node(packed=nnx.Variable(large), other=nnx.Variable(small)),
        Node(packed=Node(variables=nnx.Variable(large)), other=nnx.Variable(small)),
        Node(packed=nnx.data({"variables": {"float32": nnx.Variable(large)}}), other=nnx.Variable(small)),
    ):
        state = sw.plan(model).take(model)
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        assert_identical(round_trip(place, state, layout="packed"), state)


def test_each_leaf_stands_under_its_own_path_in_orbax_s_tree(tmp_path: pathlib.Path) -> None:
    state = made_of(("layer", 0, "kernel"), ("layer", 1, "kernel"), ("a.b",), ("c/d",), ("",), ("inner", ("t", 1)))
    sw.save(tmp_path / "saved", state)
    tree = ocp.StandardCheckpointer().restore(tmp_path / "saved")["tree"]
    assert jax.tree.map(lambda array: float(array[0]), tree) == {
        "layer": {"0": {"kernel": 0.0}, "1": {"kernel": 1.0}},
        "a%2Eb": 2.0,
        "c%2Fd": 3.0,
        "%": 4.0,
        "inner": {"('t', 1)": 5.0},
    }


def test_two_leaves_with_one_path_are_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    """The arrays of an optimizer have paths that a model could use too."""
    count = nnx.Variable(jnp.ones(2))
    model = Node(optimizer=Node(params=nnx.List([Node(count=count)])), weight=nnx.Param(jnp.ones(3)))
    state = sw.plan(model, optimizers={"params": optax.adam(1e-3)}).take(model)
    with refused(
        sw.StructureError,
        "Two leaves have one path, so that a restore could not distinguish them.",
        leaves=[
            "optimizer/params/0/count: Variable(2,) float32  kind=variables",
            "optimizer/params/0/count: Array() int32  kind=optimizer",
        ],
        hint="give the model's attribute 'optimizer' another name: the plan keeps what it derives there",
    ):
        sw.save(tmp_path / "saved", state)
    assert list(tmp_path.iterdir()) == []


# --- laws --------------------------------------------------------------------------------------------------------

atoms = st.one_of(st.text(max_size=4), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
parts = st.recursive(st.one_of(atoms, st.binary(max_size=3)), lambda inner: st.lists(inner, max_size=3).map(tuple))
paths = st.lists(parts, max_size=4).map(tuple)


def typed(path: Any) -> Any:
    """A path with the type of every key, which `==` does not compare."""
    return [typed(part) for part in path] if isinstance(path, tuple) else (type(path), repr(path))


@given(paths)
def test_a_path_comes_back_from_json_with_the_types_of_its_keys(path: tuple[Any, ...]) -> None:
    decoded = decode_path(json.loads(json.dumps(encode_path(path))))
    assert typed(decoded) == typed(path)
    assert encode_path(decoded) == encode_path(path)


@given(st.lists(paths, max_size=6))
def test_two_paths_have_one_id_only_if_they_are_the_same(some: list[tuple[Any, ...]]) -> None:
    ids = {path_id(path) for path in some}
    assert len(ids) == len({repr(typed(path)) for path in some})


dotted = st.text(st.sampled_from("ab./%#2E1 \n"), max_size=3)
branches = st.lists(st.one_of(dotted, st.integers(0, 2)), min_size=1, max_size=3).map(tuple)


def leaves_only(some: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Those paths that none of the others goes through, as in a tree."""
    known = {repr(typed(path)): path for path in some}
    inner = {repr(typed(path[:at])) for path in known.values() for at in range(len(path))}
    return [path for name, path in known.items() if name not in inner]


@given(st.lists(branches, max_size=8).map(leaves_only))
def test_no_two_leaves_get_one_key_however_orbax_writes_it(some: list[tuple[Any, ...]]) -> None:
    keys = OrbaxKeys()
    made = [keys.key(path) for path in some]
    assert [keys.key(path) for path in some] == made, "the same path got another key"
    written = [".".join(key) for key in made]
    assert len(set(written)) == len(written)
    assert all(part and not set("./") & set(part) and part.isprintable() for key in made for part in key)
    assert not any(longer.startswith(f"{shorter}.") for shorter in written for longer in written)


# --- keys that JSON does not have --------------------------------------------------------------------------------


def test_a_key_of_a_type_of_its_own_is_told_by_its_text() -> None:
    encoded = encode_path((Colour.RED, np.int64(3)))
    assert [part["repr"] for part in encoded] == ["<Colour.RED: 1>", "np.int64(3)"]
    decoded = decode_path(json.loads(json.dumps(encoded)))
    assert [str(part) for part in decoded] == ["<Colour.RED: 1>", "np.int64(3)"]
    assert encode_path(decoded) == encoded


def test_leaves_under_keys_of_a_type_of_their_own_come_back(tmp_path: pathlib.Path) -> None:
    state = made_of((Colour.RED,))
    assert_identical(round_trip(tmp_path, state), state)


def test_a_key_whose_text_is_an_address_is_refused() -> None:
    with refused(
        sw.StructureError,
        "A path key of type object has no text that would be the same in another process: layers/0.",
        hint="give object a __repr__ that tells its objects apart by value",
    ) as caught:
        encode_path(("layers", _Unnamed()))
    assert "0x" not in caught.value.message


class _Unnamed:
    """Shows itself with its address, as `object` does, but not in an error."""

    __qualname__ = "object"

    def __repr__(self) -> str:
        return "<object at 0x7f0000000000>"

    def __str__(self) -> str:
        return "0"


# --- types and dtypes --------------------------------------------------------------------------------------------


class Own(nnx.Variable):
    class Inner(nnx.Param):
        pass


def test_types_are_named_by_module_and_name_those_of_nnx_by_their_public_place() -> None:
    assert type_name(nnx.Param) == "flax.nnx:Param"
    assert type_name(nnx.Variable) == "flax.nnx:Variable"
    assert type_name(nnx.OptArray) == "flax.nnx:OptArray"
    assert type_name(jax.Array) == "jax:Array"
    assert type_name(Own.Inner) == f"{__name__}:Own.Inner"


def test_a_script_s_own_class_is_the_same_run_or_imported() -> None:
    assert same_type("__main__:Own", "train:Own")
    assert same_type("train:Own", "__main__:Own")
    assert not same_type("train:Own", "other:Own")
    assert not same_type("__main__:Own", "train:Other")
    assert not same_type("__main__:Param", "flax.nnx:Param")
    assert not same_type("jax:Array", "__main__:Array")


@pytest.mark.parametrize(
    "name", ["bool", "int2", "uint4", "int64", "bfloat16", "float8_e8m0fnu", "float4_e2m1fn", "complex128"]
)
def test_a_dtype_is_found_by_its_name(name: str) -> None:
    found = dtype_of(name)
    assert found is not None
    assert dtype_name(found) == str(found) == name


@pytest.mark.parametrize("name", ["object", "str", "S3", "datetime64", "ndarray", "jit", "int32,int32", "", "key", "O"])
def test_what_is_no_dtype_of_numbers_is_none(name: str) -> None:
    assert dtype_of(name) is None


def test_keys_are_known_by_their_implementation() -> None:
    assert prng_of(jax.random.key(0).dtype) == "threefry2x32"
    assert prng_of(jax.random.key(0, impl="rbg").dtype) == "rbg"
    assert prng_of(one_of("uint32").dtype) is None
    assert dtype_name(jax.random.key(0).dtype) == "key"
