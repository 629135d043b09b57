"""The mends of a restore that are code: run as they are written, they help."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from disagreeing import ONES, keep, state_of, without
from strategies import Node


def run_mend(error: sw.RestoreError, start: str, **names: Any) -> dict[str, Any]:
    """Runs the code of a mend, from `start` on."""
    (line,) = [line for line in (error.mend or "").splitlines() if start in line]
    scope = {"sw": sw, "dataclasses": dataclasses, "jnp": jnp, "jax": jax, **names}
    exec(f"result = {line[line.index(start) :]}" if not start.startswith("kinds") else line[line.index(start) :], scope)
    return scope


def test_the_mend_of_a_missing_leaf_works_for_moments_too(tmp_path: pathlib.Path) -> None:
    model = Node(w=nnx.Param(ONES))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param))  # the kind of the optimizer's state comes by itself
    sw.save(tmp_path / "run", kinds.plan(model).take(model))
    adam = {"params": optax.adam(0.1)}
    plan = kinds.plan(model, optimizers=adam)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.take(model))
    assert caught.value.mend == keep("optimizer")
    mended = run_mend(caught.value, "kinds = ", plan=plan)["kinds"]
    _, report = sw.restore(tmp_path / "run", mended.plan(model, optimizers=adam).take(model))
    assert report.counts == {"params": {"restored": 1}, "optimizer": {"kept": 3}}


def test_the_mend_of_another_dtype_works(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    target = state_of(w=nnx.Param(ONES.astype("bfloat16")))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    state, report = run_mend(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert report.ok
    assert state["params"]["w"].dtype == "bfloat16"


def test_the_mend_of_a_training_checkpoint_fine_tunes_without_its_optimizer(tmp_path: pathlib.Path) -> None:
    trained = state_of(optimizers={"params": optax.adam(0.1)}, w=nnx.Param(3 * ONES), n=nnx.Variable(jnp.array(7)))
    sw.save(tmp_path / "run", trained)
    target = state_of(w=nnx.Param(ONES), n=nnx.Variable(jnp.array(0)))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    assert caught.value.mend == without("params", "variables")
    state, report = run_mend(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert report.counts == {"variables": {"restored": 1}, "params": {"restored": 1}}
    assert np.array_equal(state["params"]["w"], 3 * ONES)


def test_the_mend_works_where_the_target_declares_nothing_else(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(3 * ONES), s=nnx.BatchStat(ONES)))
    target = state_of(sw.Kinds(params=sw.Kind(nnx.Param)), w=nnx.Param(ONES))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    state, _ = run_mend(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert np.array_equal(state["params"]["w"], 3 * ONES)


def test_the_mend_of_another_key_works(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(k=nnx.Variable(jax.random.key(5, impl="rbg"))))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", state_of(k=nnx.Variable(jax.random.key(0))))
    key = run_mend(caught.value, "jax.random.key(")["result"]
    state, _ = sw.restore(tmp_path / "run", state_of(k=nnx.Variable(key)))
    assert np.array_equal(
        jax.random.key_data(state["variables"]["k"]), jax.random.key_data(jax.random.key(5, impl="rbg"))
    )
