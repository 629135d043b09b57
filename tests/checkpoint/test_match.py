"""What differs between a checkpoint and a target: each sort by itself, then all at once."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from disagreeing import CAST, ONES, SIZES, STRUCTURE, TIE, UNTIE, check_refused, keep, state_of, without
from strategies import OwnStat

# --- each by itself ----------------------------------------------------------------------------------------------


def test_a_leaf_that_is_missing(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES)),
        state_of(w=nnx.Param(ONES), count=nnx.Variable(jnp.array(3))),
        "count: Variable() int32  kind=variables  (missing from the checkpoint)",
        hint=keep("variables"),
    )


def test_a_leaf_of_the_checkpoint_alone(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES), count=nnx.Variable(jnp.array(3))),
        state_of(w=nnx.Param(ONES)),
        "count: Variable() int32  kind=variables  (not in the target)",
        hint=without("params"),
    )


def test_where_no_kind_is_whole_there_is_none_to_ask_for(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES), b=nnx.Param(ONES)),
        state_of(w=nnx.Param(ONES)),
        "b: Param(2, 3) float32  kind=params  (not in the target)",
        hint=without(),
    )


def test_a_leaf_of_another_type(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(v=OwnStat(ONES)),
        state_of(v=nnx.Variable(ONES)),
        "v: Variable(2, 3) float32  kind=variables  (is an OwnStat in the checkpoint)",
        hint="give the leaf the type that it was saved with: OwnStat",
    )


def test_a_raw_array_is_no_variable(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(v=nnx.data(ONES)),
        state_of(v=nnx.Variable(ONES)),
        "v: Variable(2, 3) float32  kind=variables  (is an Array in the checkpoint)",
        hint="give the leaf the type that it was saved with: Array",
    )


def own_type(module: str) -> type[nnx.Variable]:
    return type("Gate", (nnx.Variable,), {"__module__": module, "__qualname__": "Gate"})


def test_a_class_that_moved(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(v=own_type("old.place")(ONES)),
        state_of(v=own_type("new.place")(ONES)),
        "v: Gate(2, 3) float32  kind=variables  (is an old.place.Gate in the checkpoint)",
        hint="give the leaf the type that it was saved with: Gate; "
        "if the class only moved, say where it was: Gate.__module__ = 'old.place'",
    )


def test_a_class_that_says_where_it_was_is_the_same(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(v=own_type("old.place")(ONES)))
    moved = own_type("new.place")
    moved.__module__ = "old.place"
    state, _ = sw.restore(tmp_path / "run", state_of(v=moved(0 * ONES)))
    assert np.array_equal(state["variables"]["v"], ONES)


@pytest.mark.parametrize(("there", "here"), [("__main__", "train"), ("train", "__main__")])
def test_a_class_of_a_script_is_the_same_run_and_imported(tmp_path: pathlib.Path, there: str, here: str) -> None:
    sw.save(tmp_path / "run", state_of(v=own_type(there)(ONES)))
    state, report = sw.restore(tmp_path / "run", state_of(v=own_type(here)(0 * ONES)))
    assert report.counts == {"variables": {"restored": 1}}
    assert np.array_equal(state["variables"]["v"], ONES)


def test_a_leaf_of_another_shape(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(jnp.ones((9, 9)))),
        state_of(w=nnx.Param(ONES)),
        "w: Param(2, 3) float32  kind=params  (is (9, 9) in the checkpoint)",
        hint=SIZES,
    )


def test_of_several_arrays_in_a_leaf_the_one_is_named(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(v=nnx.Variable({"a": jnp.ones(2), "b": (jnp.ones(4), jnp.ones(5))})),
        state_of(v=nnx.Variable({"a": jnp.ones(3), "b": (jnp.ones(4), jnp.ones(6))})),
        "v: Variable- -  kind=variables  (is (2,) at a, (5,) at b/1 in the checkpoint)",
        hint=SIZES,
    )


@pytest.mark.parametrize("here", [jnp.ones(2), {"b": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)}], ids=str)
def test_a_value_of_another_structure(tmp_path: pathlib.Path, here: Any) -> None:
    shown = "(2,) float32" if isinstance(here, jax.Array) else "- -"
    check_refused(
        tmp_path / "run",
        state_of(v=nnx.Variable({"a": jnp.ones(2)})),
        state_of(v=nnx.Variable(here)),
        f"v: Variable{shown}  kind=variables  (is a value of another structure in the checkpoint)",
        hint=STRUCTURE,
    )


def test_a_leaf_of_another_kind(tmp_path: pathlib.Path) -> None:
    kinds = sw.Kinds(stats=sw.Kind(OwnStat), rest=sw.Kind(...))
    check_refused(
        tmp_path / "run",
        state_of(v=OwnStat(ONES)),
        state_of(kinds, v=OwnStat(ONES)),
        "v: OwnStat(2, 3) float32  kind=stats  (is of kind 'variables' in the checkpoint)",
        hint="declare it as it was saved, of kind 'variables'; then sw.transfer(restored, plan) into other kinds",
    )


def test_a_key_of_another_implementation(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(k=nnx.RngKey(jax.random.key(0, impl="rbg"), tag="default")),
        state_of(k=nnx.RngKey(jax.random.key(0), tag="default")),
        "k: RngKey() key<threefry2x32>  kind=rng  (is key<rbg> in the checkpoint)",
        hint="make it a key: jax.random.key(0, impl='rbg')",
    )


def test_the_words_of_a_key_are_no_key(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(k=nnx.Variable(jax.random.PRNGKey(0))),
        state_of(k=nnx.Variable(jax.random.key(0))),
        "k: Variable() key<threefry2x32>  kind=variables  (is (2,), uint32 in the checkpoint)",
        hint="give the Variable the key's words: jax.random.key_data(key)",
    )


def test_a_key_is_not_its_words(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(k=nnx.Variable(jax.random.key(0))),
        state_of(k=nnx.Variable(jax.random.PRNGKey(0))),
        "k: Variable(2,) uint32  kind=variables  (is (), key<threefry2x32> in the checkpoint)",
        hint="make it a key: jax.random.key(0, impl='threefry2x32')",
        cast=True,
    )


# --- tied otherwise ----------------------------------------------------------------------------------------------


def tied(tie: bool) -> sw.State:
    shared = nnx.Param(ONES)
    return state_of(a=shared, b=shared if tie else nnx.Param(2 * ONES))


def test_tied_in_the_checkpoint_alone(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        tied(True),
        tied(False),
        "a: Param(2, 3) float32  kind=params  (is tied to b in the checkpoint)",
        "b: Param(2, 3) float32  kind=params  (tied to a in the checkpoint)",
        hint=TIE,
    )


def test_tied_in_the_target_alone(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        tied(False),
        tied(True),
        "a: Param(2, 3) float32  kind=params  (is tied to nothing in the checkpoint)",
        "b: Param(2, 3) float32  kind=params  (a leaf of its own in the checkpoint, tied to a in the target)",
        hint=UNTIE,
    )


# --- all at once -------------------------------------------------------------------------------------------------


def many_saved() -> sw.State:
    shared = nnx.Param(jnp.ones(2))
    return state_of(
        a=nnx.Param(jnp.ones((9, 9))),
        b=nnx.BatchStat(jnp.ones(3)),
        c=nnx.Param(jnp.ones(3)),
        d=nnx.Variable({"x": jnp.ones(2)}),
        e=nnx.RngKey(jax.random.key(0), tag="default"),
        f=nnx.Variable(jnp.ones(3)),
        g=shared,
        h=shared,
        i=nnx.Variable(jnp.ones(1)),
    )


def many_planned() -> sw.State:
    return state_of(
        a=nnx.Param(jnp.ones((9, 8), "bfloat16")),
        b=nnx.Param(jnp.ones(4, "int32")),
        c=nnx.Param(jnp.ones(3)),
        d=nnx.Variable({"y": jnp.ones(2)}),
        e=nnx.RngKey(jax.random.key(0, impl="rbg"), tag="default"),
        f=OwnStat(jnp.ones(3)),
        g=nnx.Param(jnp.ones(2)),
        h=nnx.Param(jnp.ones(2)),
        j=nnx.LoRAParam(jnp.ones(1)),
    )


def test_everything_is_listed_at_once_with_every_hint(tmp_path: pathlib.Path) -> None:
    report = check_refused(
        tmp_path / "run",
        many_saved(),
        many_planned(),
        "a: Param(9, 8) bfloat16  kind=params  (is (9, 9), float32 in the checkpoint)",
        "b: Param(4,) int32  kind=params  (is of kind 'stats', a BatchStat, (3,), float32 in the checkpoint)",
        "d: Variable- -  kind=variables  (is a value of another structure in the checkpoint)",
        "e: RngKey() key<rbg>  kind=rng  (is key<threefry2x32> in the checkpoint)",
        "f: OwnStat(3,) float32  kind=variables  (is a Variable in the checkpoint)",
        "g: Param(2,) float32  kind=params  (is tied to h in the checkpoint)",
        "h: Param(2,) float32  kind=params  (tied to g in the checkpoint)",
        "j: LoRAParam(1,) float32  kind=lora  (missing from the checkpoint)",
        "i: Variable(1,) float32  kind=variables  (not in the target)",
        hint="\n".join(
            [
                SIZES,
                CAST,
                "declare it as it was saved, of kind 'stats'; then sw.transfer(restored, plan) into other kinds",
                "give the leaf the type that it was saved with: BatchStat",
                "plan the model with the dtype that was saved, restore, and convert it yourself",
                STRUCTURE,
                "make it a key: jax.random.key(0, impl='threefry2x32')",
                "give the leaf the type that it was saved with: Variable",
                TIE,
                keep("lora"),
                without("params", "lora", "rng"),
            ]
        ),
    )
    assert report.counts == {
        "params": {"problem": 4, "restored": 1},
        "variables": {"problem": 3},
        "rng": {"problem": 1},
        "lora": {"problem": 1},
    }
