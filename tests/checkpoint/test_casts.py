"""Dtypes that differ, and `cast=True`: floats to floats, integers to integers, nothing else."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from disagreeing import CAST, ONES, RECAST, check_refused, state_of
from refusals import refused
from statewise._src.common.narrowing import WIDE
from strategies import Node


def test_a_leaf_of_another_dtype(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES)),
        state_of(w=nnx.Param(ONES.astype("bfloat16"))),
        "w: Param(2, 3) bfloat16  kind=params  (is float32 in the checkpoint)",
        hint=CAST,
    )


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float8_e4m3fn"),
        ("int32", "int8"),
        ("int4", "int32"),
    ],
)
def test_cast_allows_floats_to_floats_and_integers_to_integers(tmp_path: pathlib.Path, there: str, here: str) -> None:
    values = jnp.array([0, 1, 2, -3])
    sw.save(tmp_path / "run", state_of(w=nnx.Variable(values.astype(there))))
    target = state_of(w=nnx.Variable(jnp.zeros(4, here)))
    state, report = sw.restore(tmp_path / "run", target, cast=True)
    assert [(one.outcome, one.why) for one in report.leaves] == [("cast", f"from {there} to {here}")]
    assert report == sw.preview(tmp_path / "run", target, cast=True)
    assert state["variables"]["w"].dtype == here
    assert np.array_equal(np.asarray(state["variables"]["w"]).astype(int), values)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("float32", "int32"),
        ("int32", "float32"),
        ("bool", "int32"),
        ("int32", "bool"),
        ("bool", "float32"),
        ("float32", "bool"),
        ("complex64", "float32"),
        ("float32", "complex64"),
    ],
)
def test_cast_makes_no_other_number_of_one(tmp_path: pathlib.Path, there: str, here: str) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Variable(jnp.ones(2, there))),
        state_of(w=nnx.Variable(jnp.ones(2, here))),
        f"w: Variable(2,) {here}  kind=variables  (is {there} in the checkpoint, which does not become {here})",
        hint=RECAST,
        cast=True,
    )


def test_numbers_of_64_bits_are_cast_where_there_are_none(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        third = jnp.array([1 / 3, -2.0], "float64")
        sw.save(tmp_path / "run", state_of(w=nnx.Param(third), n=nnx.Variable(jnp.arange(3, dtype="int64"))))
    target = state_of(w=nnx.Param(jnp.zeros(2)), n=nnx.Variable(jnp.zeros(3, "int32")))
    state, report = sw.restore(tmp_path / "run", target, cast=True)
    assert [one.why for one in report.leaves] == ["from int64 to int32", "from float64 to float32"]
    assert np.array_equal(state["params"]["w"], np.array([1 / 3, -2.0], np.float32))
    assert np.array_equal(state["variables"]["n"], np.arange(3))


def params_of(**values: Any) -> sw.State:
    model = Node(**{name: nnx.Param(value) for name, value in values.items()})
    return sw.plan(model).take(model)


def test_numbers_of_64_bits_are_not_cut_where_there_are_none(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        wide = params_of(a=jnp.arange(3, dtype="int64") * 2**33)
        sw.save(tmp_path / "wide", wide)
    with refused(
        sw.RestoreError,
        f"{tmp_path / 'wide'} does not fit the target: 1 leaf differs. Nothing was read or changed.",
        leaves=["a: Param(3,) int64  kind=params  (is int64, and this process has no 64-bit numbers)"],
        hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
    ):
        sw.restore(tmp_path / "wide", wide.plan.abstract())


@pytest.mark.parametrize(("value", "to"), [([300, 1], "int8"), ([-1, 1], "uint8"), ([1e6, 1], "float16")])
def test_a_cast_loses_no_number(tmp_path: pathlib.Path, value: list[float], to: str) -> None:
    from_ = "float32" if to == "float16" else "int32"
    sw.save(tmp_path / "run", params_of(a=jnp.array(value, from_)))
    target = params_of(a=jnp.zeros(2, to))
    wider = to == "float16"
    with refused(
        sw.RestoreError,
        "Casting would lose numbers: 1 leaf has some that the new dtype cannot represent. Nothing was changed.",
        leaves=[
            f"a: Param(2,) {to}  kind=params  "
            f"({from_} numbers, one of magnitude {abs(value[0]):.3g}, that {to} cannot represent)"
        ],
        kind="params",
        hint="sw.restore(path, target.cast(params='bfloat16'), cast=True)"
        if wider
        else f"plan the model with the dtype that was saved\n{WIDE}",
    ):
        sw.restore(tmp_path / "run", target, cast=True)
    assert np.array_equal(target["params"]["a"], np.zeros(2))


def test_what_fits_is_cast(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", params_of(a=jnp.array([127, -128]), b=jnp.array([jnp.inf, 1.0 + 2**-20])))
    target = params_of(a=jnp.zeros(2, "int8"), b=jnp.zeros(2, "bfloat16"))
    state, report = sw.restore(tmp_path / "run", target, cast=True)
    assert report.counts == {"params": {"cast": 2}}
    assert state["params"]["a"].tolist() == [127, -128]
    assert state["params"]["b"].tolist() == [np.inf, 1]
