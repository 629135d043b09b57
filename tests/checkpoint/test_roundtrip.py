"""Save then restore is the identity: values to the bit, dtypes, aliases, keys, optimizer state."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import (
    ALL_SAVED,
    DTYPES,
    assert_identical,
    bits,
    contents,
    copied,
    one_of,
    round_trip,
    spread,
    taken,
    train,
    trained,
)
from comparing import plannable
from strategies import Node

LAYOUTS = ("named", "packed")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["function"])
@dataclasses.dataclass
class Pair:
    """A value of a user's own make, with a function beside its array."""

    array: Any
    function: Any


# --- the law -----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(plannable(), st.sampled_from(LAYOUTS), st.booleans())
def test_save_then_restore_is_the_identity(model: Any, layout: str, abstract: bool) -> None:
    state = ALL_SAVED.plan(model).take(model)
    with tempfile.TemporaryDirectory() as folder:
        restored = round_trip(folder, state, state.plan.abstract() if abstract else state, layout=layout)
    assert_identical(restored, state)


@layouts
def test_a_state_with_its_optimizer_comes_back(tmp_path: pathlib.Path, layout: str) -> None:
    state, _ = train(trained(), jnp.ones((5, 3)))
    assert_identical(round_trip(tmp_path, state, trained(1), layout=layout), state)


@layouts
def test_a_state_comes_back_into_an_abstract_one(tmp_path: pathlib.Path, layout: str) -> None:
    state, _ = train(trained(), jnp.ones((5, 3)))
    assert_identical(round_trip(tmp_path, state, state.plan.abstract(), layout=layout), state)


def test_saving_leaves_the_state_as_it_is_and_unspent(tmp_path: pathlib.Path) -> None:
    state = trained()
    before = contents(state)
    sw.save(tmp_path / "saved", state)
    assert contents(state) == before
    train(state, jnp.ones((5, 3)))


def test_the_restored_state_owns_its_arrays(tmp_path: pathlib.Path) -> None:
    """A step on one of the two states, which donates its arrays, leaves the other whole."""
    state = trained()
    restored = round_trip(tmp_path, state)
    before = contents(state)
    train(restored, jnp.ones((5, 3)))
    assert contents(state) == before


# --- what leaves hold --------------------------------------------------------------------------------------------


@layouts
def test_every_dtype_comes_back(tmp_path: pathlib.Path, layout: str) -> None:
    state = taken({name: one_of(name) for name in DTYPES})
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


@layouts
def test_scalars_and_empty_arrays_of_every_dtype_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    scalars = {f"{name}_scalar": one_of(name, ()) for name in DTYPES}
    empty = {f"{name}_empty": one_of(name, (0, 3)) for name in DTYPES}
    state = taken(scalars | empty)
    assert_identical(round_trip(tmp_path, state, state.plan.abstract(), layout=layout), state)


@layouts
def test_numbers_of_64_bits_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    with jax.enable_x64(True):
        state = taken({name: one_of(name) for name in ("int64", "uint64", "float64", "complex128")})
        assert_identical(round_trip(tmp_path, state, layout=layout), state)


@layouts
def test_no_number_is_taken_for_another(tmp_path: pathlib.Path, layout: str) -> None:
    """NaNs with a payload, negative zeros, infinities and subnormal numbers."""
    words = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    halves = np.array([0x7FC1, 0x8000, 0x0001], np.uint16).view(jnp.bfloat16)
    state = taken({"single": jnp.asarray(words.view(np.float32)), "half": jnp.asarray(halves)})
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


@layouts
def test_keys_of_each_implementation_and_batches_of_keys_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    keys = {
        "fry": jax.random.key(1),
        "rbg": jax.random.key(2, impl="rbg"),
        "unsafe": jax.random.key(3, impl="unsafe_rbg"),
        "batch": jax.random.split(jax.random.key(4), (2, 3)),
        "none": jax.random.split(jax.random.key(5), 0),
        "raw": jax.random.PRNGKey(6),
    }
    state = taken(keys)
    restored = round_trip(tmp_path, state, state.plan.abstract(), layout=layout)
    assert_identical(restored, state)
    drawn = jax.random.normal(restored["variables"]["leaves"]["rbg"], (3,))
    assert bits(drawn) == bits(jax.random.normal(keys["rbg"], (3,)))


@layouts
def test_values_of_none_numbers_dicts_and_tuples_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    state = taken(
        {
            "nothing": None,
            "number": 3,
            "real": 0.5,
            "truth": True,
            "dict": {"x": jnp.arange(2.0), "y": jnp.arange(3), "none": None},
            "numbered": {7: jnp.ones(1), 10: jnp.zeros(1)},
            "tuple": (jnp.ones(2), {"deep": [jnp.zeros(1), jax.random.key(0)]}),
            "empty": {},
        }
    )
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


def test_the_structure_of_a_value_is_written_without_addresses(tmp_path: pathlib.Path) -> None:
    """A function in it has another address in the next process, and is the same function still."""
    value = Pair(jnp.ones(2), lambda x: x)
    sw.save(tmp_path / "saved", taken({"pair": value}))
    again = taken({"pair": Pair(jnp.zeros(2), lambda x: x)})
    restored, _ = sw.restore(tmp_path / "saved", again)
    assert restored["variables"]["leaves"]["pair"].array.tolist() == [1, 1]
    assert " at 0x" not in (tmp_path / "saved" / "statewise.json").read_text()


@layouts
def test_raw_arrays_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    model = Node(raw=nnx.data(jnp.arange(3.0)), both=nnx.List([jnp.ones(2), nnx.Param(jnp.zeros(2))]))
    state = sw.plan(model).take(model)
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


@layouts
def test_several_objects_come_back(tmp_path: pathlib.Path, layout: str) -> None:
    def made(seed: int) -> tuple[Any, ...]:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        return model, optimizer, nnx.MultiMetric(loss=nnx.metrics.Average())

    @sw.step(writes=("params", "optimizer", "metrics"))
    def fit(model: Any, optimizer: Any, metrics: Any, x: jax.Array) -> None:
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        metrics.update(values=loss)

    objects = made(0)
    state, _ = fit(sw.plan(*objects).take(*objects), jnp.ones((4, 2)))
    restored = round_trip(tmp_path, state, sw.plan(*made(1)).take(*made(1)), layout=layout)
    assert contents(restored) == contents(state)


@pytest.mark.parametrize("layout, number", [("named", 500), ("packed", 2000)])
def test_many_tiny_leaves_come_back(tmp_path: pathlib.Path, layout: str, number: int) -> None:
    state = taken({at: np.full(2, at, np.float32) for at in range(number)})
    assert_identical(round_trip(tmp_path, state, layout=layout), state)


# --- tied leaves -------------------------------------------------------------------------------------------------


def tied() -> Node:
    weight = nnx.Param(jnp.arange(6.0).reshape(2, 3))
    return Node(embed=Node(table=weight), head=Node(table=weight), other=nnx.Param(jnp.ones(3)))


@layouts
def test_tied_leaves_stay_tied(tmp_path: pathlib.Path, layout: str) -> None:
    plan = sw.plan(tied())
    restored = round_trip(tmp_path, plan.take(tied()), plan.abstract(), layout=layout)
    model = plan.build(restored)
    assert model.embed.table is model.head.table
    assert_identical(restored, plan.take(tied()))


def test_a_tied_leaf_is_stored_once(tmp_path: pathlib.Path) -> None:
    import orbax.checkpoint as ocp

    sw.save(tmp_path / "saved", sw.plan(tied()).take(tied()))
    tree = ocp.StandardCheckpointer().restore(tmp_path / "saved")
    assert sorted(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)) == [
        "['embed']['table']",
        "['other']",
    ]


# --- states of every make ----------------------------------------------------------------------------------------


def many() -> nnx.Module:
    model = Node(layers=nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(number)) for number in range(6)]))
    model.drop = nnx.Dropout(0.2, rngs=nnx.Rngs(7))
    return model


@layouts
@pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True)], ids=str)
def test_packed_states_and_plain_ones_read_what_either_wrote(
    tmp_path: pathlib.Path, layout: str, packed: tuple[bool, bool]
) -> None:
    plan = sw.plan(many(), optimizers={"params": optax.adam(1e-3)})
    state, target = (plan.take(many(), pack=pack) for pack in packed)
    assert len(jax.tree.leaves(plan.take(many(), pack=True))) < 25
    state = jax.tree.map(lambda array: array + 1 if array.dtype == jnp.float32 else array, state)
    restored = round_trip(tmp_path, state, target, layout=layout)
    assert restored.plan is target.plan
    assert contents(restored) == contents(state)


def test_a_packed_state_comes_back_into_an_abstract_one(tmp_path: pathlib.Path) -> None:
    state = sw.plan(many()).take(many(), pack=True)
    assert_identical(round_trip(tmp_path, state, state.plan.abstract()), state)


def test_a_cast_state_comes_back(tmp_path: pathlib.Path) -> None:
    state = trained().cast(params="bfloat16", stats="float16")
    assert_identical(round_trip(tmp_path, state), state)


@layouts
def test_a_state_of_numpy_arrays_comes_back(tmp_path: pathlib.Path, layout: str) -> None:
    state = taken({name: one_of(name) for name in DTYPES})
    host = jax.tree.map(np.asarray, state)
    assert_identical(round_trip(tmp_path, host, layout=layout), state)


def test_a_state_of_numpy_scalars_and_odd_strides_comes_back(tmp_path: pathlib.Path) -> None:
    matrix = jnp.arange(12.0).reshape(3, 4)
    state = taken({"scalar": jnp.float32(3), "matrix": matrix, "half": jnp.bfloat16(2)})
    host = jax.tree.map(lambda array: np.asarray(array)[()] if array.ndim == 0 else np.asfortranarray(array), state)
    assert_identical(round_trip(tmp_path, host), state)


# --- placed states -----------------------------------------------------------------------------------------------


def wide() -> sw.State:
    return taken(
        {name: one_of(name, (8, 2)) for name in ("float32", "bfloat16", "int4", "bool", "float8_e4m3")}
        | {"key": jax.random.split(jax.random.key(0), 8), "one": jnp.array(3), "empty": jnp.ones((0, 8))}
    )


@layouts
def test_a_sharded_state_comes_back_where_it_was(
    tmp_path: pathlib.Path, devices: list[jax.Device], layout: str
) -> None:
    state = spread(wide(), devices)
    restored = round_trip(tmp_path, state, layout=layout)
    assert_identical(restored, state)
    for array, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert array.sharding.is_equivalent_to(other.sharding, array.ndim)


@layouts
def test_a_state_comes_back_into_another_placement(
    tmp_path: pathlib.Path, devices: list[jax.Device], layout: str
) -> None:
    """From eight devices to two, to one, and from one to eight."""
    state = wide()
    for number, (saved, target) in enumerate(
        [
            (spread(state, devices), spread(state, devices, over=2)),
            (spread(state, devices), state),
            (state, spread(state, devices)),
        ]
    ):
        restored = round_trip(tmp_path / str(number), saved, target, layout=layout)
        assert_identical(restored, state)
        for array, other in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
            assert array.sharding.is_equivalent_to(other.sharding, array.ndim)


def test_a_state_comes_back_into_an_abstract_one_with_a_placement(
    tmp_path: pathlib.Path, devices: list[jax.Device]
) -> None:
    state = wide()
    target = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), spread(state, devices)
    )
    restored = round_trip(tmp_path, state, target)
    assert_identical(restored, state)
    assert restored["variables"]["leaves"]["float32"].sharding.spec == jax.P("data")


def test_relative_paths_are_those_of_the_working_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = trained()
    sw.save("runs/first/", state)
    for path in ("runs/first", "runs/first/", pathlib.Path("runs/../runs/first"), tmp_path / "runs" / "first"):
        assert_identical(sw.restore(path, trained(1))[0], state)
    with sw.Checkpoints("runs/second") as checkpoints:
        checkpoints.save(1, state)
    assert_identical(sw.restore("runs/second/1/state", trained(1))[0], state)


def test_several_threads_save_and_restore_at_once(tmp_path: pathlib.Path) -> None:
    states = {number: taken({"a": jnp.full(3, float(number))}) for number in range(6)}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: sw.save(tmp_path / str(number), states[number]), states))
        restored = list(pool.map(lambda number: sw.restore(tmp_path / str(number), states[0])[0], states))
    for state, expected in zip(restored, states.values(), strict=True):
        assert_identical(state, expected)


# --- parts of a state --------------------------------------------------------------------------------------------


@layouts
def test_what_is_not_asked_for_keeps_the_target_s_values(tmp_path: pathlib.Path, layout: str) -> None:
    state, target = trained(), trained(1)
    sw.save(tmp_path / "saved", state, layout=layout)
    restored, report = sw.restore(tmp_path / "saved", target, only="params")
    assert {kind: list(count) for kind, count in report.counts.items()} == {
        "params": ["restored"],
        "stats": ["kept"],
        "rng": ["kept"],
        "optimizer": ["kept"],
        "variables": ["kept"],
    }
    expected = copied(target).replace(params=state["params"])
    assert_identical(restored, expected)


def test_an_ephemeral_kind_is_not_saved_and_starts_anew(tmp_path: pathlib.Path) -> None:
    model = Node(weight=nnx.Param(jnp.ones(2)), cache=nnx.Cache(jnp.ones(3)))
    plan = sw.plan(model)
    sw.save(tmp_path / "saved", plan.take(model))
    assert sw.inspect(tmp_path / "saved").total.leaves == 1
    restored, report = sw.restore(tmp_path / "saved", plan.abstract())
    assert restored["cache"]["cache"].tolist() == [0, 0, 0]
    assert report.counts == {"params": {"restored": 1}, "cache": {"restarted": 1}}


def test_a_save_of_nothing_but_empty_leaves_comes_back(tmp_path: pathlib.Path) -> None:
    state = taken({"none": None, "empty": jnp.ones((0, 2))})
    assert_identical(round_trip(tmp_path, state, state.plan.abstract()), state)
