"""The hints of a restore that are code: run as they are written, they help."""

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


def run_hint(error: sw.RestoreError, start: str, **names: Any) -> dict[str, Any]:
    """Runs the code of a hint, from `start` on."""
    (line,) = [line for line in (error.hint or "").splitlines() if start in line]
    scope = {"sw": sw, "dataclasses": dataclasses, "jnp": jnp, "jax": jax, **names}
    exec(f"result = {line[line.index(start) :]}" if not start.startswith("kinds") else line[line.index(start) :], scope)
    return scope


def test_the_hint_of_a_missing_leaf_works_for_moments_too(tmp_path: pathlib.Path) -> None:
    model = Node(w=nnx.Param(ONES))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param))  # the kind of the optimizer's state comes by itself
    sw.save(tmp_path / "run", kinds.plan(model).take(model))
    adam = {"params": optax.adam(0.1)}
    plan = kinds.plan(model, optimizers=adam)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.take(model))
    assert caught.value.hint == keep("optimizer")
    fixed = run_hint(caught.value, "kinds = ", plan=plan)["kinds"]
    _, report = sw.restore(tmp_path / "run", fixed.plan(model, optimizers=adam).take(model))
    assert report.counts == {"params": {"restored": 1}, "optimizer": {"kept": 3}}


def test_the_hint_of_another_dtype_works(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    target = state_of(w=nnx.Param(ONES.astype("bfloat16")))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    state, report = run_hint(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert report.ok
    assert state["params"]["w"].dtype == "bfloat16"


def test_the_hint_of_a_training_checkpoint_fine_tunes_without_its_optimizer(tmp_path: pathlib.Path) -> None:
    trained = state_of(optimizers={"params": optax.adam(0.1)}, w=nnx.Param(3 * ONES), n=nnx.Variable(jnp.array(7)))
    sw.save(tmp_path / "run", trained)
    target = state_of(w=nnx.Param(ONES), n=nnx.Variable(jnp.array(0)))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    assert caught.value.hint == without("params", "variables")
    state, report = run_hint(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert report.counts == {"variables": {"restored": 1}, "params": {"restored": 1}}
    assert np.array_equal(state["params"]["w"], 3 * ONES)


def test_the_hint_works_where_the_target_declares_nothing_else(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(3 * ONES), s=nnx.BatchStat(ONES)))
    target = state_of(sw.Kinds(params=sw.Kind(nnx.Param)), w=nnx.Param(ONES))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    state, _ = run_hint(caught.value, "sw.restore(", path=tmp_path / "run", target=target)["result"]
    assert np.array_equal(state["params"]["w"], 3 * ONES)


def test_the_hint_of_another_key_works(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(k=nnx.Variable(jax.random.key(5, impl="rbg"))))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", state_of(k=nnx.Variable(jax.random.key(0))))
    key = run_hint(caught.value, "jax.random.key(")["result"]
    state, _ = sw.restore(tmp_path / "run", state_of(k=nnx.Variable(key)))
    assert np.array_equal(
        jax.random.key_data(state["variables"]["k"]), jax.random.key_data(jax.random.key(5, impl="rbg"))
    )


# --- what is missing, where there is nothing to keep -----------------------------------------------------------------


KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat), cache=sw.Kind(nnx.Cache, restart=jnp.ones_like)
)


def model_of(**more: Any) -> Node:
    return Node(w=nnx.Param(3 * ONES), **more)


@pytest.mark.parametrize("optimized", [False, True])
def test_for_an_abstract_target_the_hint_gives_it_values(tmp_path: pathlib.Path, optimized: bool) -> None:
    sw.save(tmp_path / "run", KINDS.plan(model_of()).take(model_of()))
    model = Node(w=nnx.Param(ONES), s=nnx.BatchStat(7 * ONES))
    optimizers = {"params": optax.adam(0.1)}
    plan = KINDS.plan(model, optimizers=optimizers if optimized else None)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.abstract())
    assert "to keep the target's values" not in (caught.value.hint or "")
    scope = run_hint(caught.value, "kinds = ", plan=plan, model=model, optimizers=optimizers)
    restored, report = sw.restore(tmp_path / "run", scope["target"])
    assert report.counts["stats"] == {"kept": 1}
    assert np.array_equal(restored["params"]["w"], 3 * ONES)
    assert np.array_equal(restored["stats"]["s"], 7 * ONES)


def test_for_an_abstract_target_a_kind_that_can_is_restarted(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", KINDS.plan(model_of()).take(model_of()))
    plan = KINDS.plan(model_of(c=nnx.Cache(ONES)))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.abstract())
    declared = "dataclasses.replace(plan.kinds['cache'], missing='restart')"
    assert caught.value.hint == f"to begin with fresh values, declare it: kinds = plan.kinds.replace(cache={declared})"
    kinds = run_hint(caught.value, "kinds = ", plan=plan)["kinds"]
    restored, _ = sw.restore(tmp_path / "run", kinds.plan(model_of(c=nnx.Cache(ONES))).abstract())
    assert np.array_equal(restored["cache"]["c"], ONES)


def test_the_hint_for_several_objects_names_them(tmp_path: pathlib.Path) -> None:
    two = model_of(), model_of()
    sw.save(tmp_path / "run", KINDS.plan(*two).take(*two))
    first, second = model_of(), model_of(s=nnx.BatchStat(ONES))
    plan = KINDS.plan(first, second)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.abstract())
    scope = run_hint(caught.value, "kinds = ", plan=plan, first=first, second=second)
    assert sw.restore(tmp_path / "run", scope["target"])[1].ok


def test_for_an_abstract_target_of_a_conversion_the_hint_gives_it_values(tmp_path: pathlib.Path) -> None:
    model = model_of(s=nnx.BatchStat(7 * ONES))
    plan = KINDS.plan(model)
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert({"w": np.ones((2, 3), np.float32)}, tmp_path / "made", target=plan.abstract())
    target = run_hint(caught.value, "kinds = ", kinds=KINDS, model=model)["target"]
    assert sw.convert({"w": np.ones((2, 3), np.float32)}, tmp_path / "made", target=target).ok
    assert sw.restore(tmp_path / "made", plan.abstract())[1].ok


# --- what differs for one reason -------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_where_the_optimizer_is_another_the_one_hint_leads_to_no_second_error(
    tmp_path: pathlib.Path, abstract: bool
) -> None:
    model = model_of()
    sw.save(tmp_path / "run", KINDS.plan(model, optimizers={"params": optax.adam(0.1)}).take(model))
    plan = KINDS.plan(model, optimizers={"params": optax.sgd(0.1, momentum=0.9)})
    target = plan.abstract() if abstract else plan.take(Node(w=nnx.Param(ONES)))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    shown = "plan.take(model)" if abstract else "target"
    code = f"sw.restore(path, {shown}, only=('params',))"
    assert caught.value.hint == f"plan what was saved, optimizers included; or ask for the kinds you want: {code}"
    path = tmp_path / "run"
    restored, _ = run_hint(caught.value, "sw.restore(", path=path, target=target, plan=plan, model=model)["result"]
    assert np.array_equal(restored["params"]["w"], 3 * ONES)


@pytest.mark.parametrize("optimized", [False, True])
def test_a_second_object_is_named_as_the_reason_in_one_line(tmp_path: pathlib.Path, optimized: bool) -> None:
    model, other = model_of(s=nnx.BatchStat(5 * ONES)), model_of()
    adam = {"params": optax.adam(0.1)} if optimized else None
    sw.save(tmp_path / "run", KINDS.plan(model, optimizers=adam).take(model))
    model = Node(w=nnx.Param(ONES), s=nnx.BatchStat(ONES))
    plan = KINDS.plan(model, other, optimizers=adam)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", plan.abstract())
    first, *_ = (caught.value.hint or "").splitlines()
    assert first == (
        "the target plans 2 objects, the checkpoint is of one, and each path of several starts with the number of its "
        "object: 's' is '0/s' in the target; restore that object alone, then take all: one = plan.kinds.plan(model); "
        "one.put(sw.restore(path, one.take(model), only=('stats', 'params'))[0], model)"
    )
    run_hint(caught.value, "one = ", path=tmp_path / "run", plan=plan, model=model)
    state = plan.take(model, other)
    assert np.array_equal(state["params"][0]["w"], 3 * ONES)
    assert np.array_equal(state["stats"][0]["s"], 5 * ONES)


def test_one_object_of_several_that_were_saved(tmp_path: pathlib.Path) -> None:
    two = model_of(), model_of()
    sw.save(tmp_path / "run", KINDS.plan(*two).take(*two))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", KINDS.plan(model_of()).abstract())
    first, *_ = (caught.value.hint or "").splitlines()
    assert first == (
        "the checkpoint is of several objects, the target plans one, and each path of several starts with the number "
        "of its object: '0/w' is 'w' in the target; plan as many as were saved: plan.kinds.plan(first, second)"
    )


def test_a_module_that_was_put_into_another(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", KINDS.plan(model_of()).take(model_of()))
    sw.save(tmp_path / "outer", KINDS.plan(Node(net=model_of())).take(Node(net=model_of())))
    for path, model, why in (
        ("run", Node(net=model_of()), "each path of the checkpoint is below 'net' in the target: 'w' is 'net/w'"),
        ("outer", model_of(), "each path of the target is below 'net' in the checkpoint: 'net/w' is 'w'"),
    ):
        with pytest.raises(sw.RestoreError) as caught:
            sw.restore(tmp_path / path, KINDS.plan(model).abstract())
        assert (caught.value.hint or "").startswith(f"{why} in the target; plan ")


def test_two_leaves_that_only_happen_to_be_so_are_no_reason(tmp_path: pathlib.Path) -> None:
    saved = Node(**{f"x{at}": nnx.Param(ONES) for at in range(5)})
    sw.save(tmp_path / "run", KINDS.plan(saved).take(saved))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", KINDS.plan(Node(a=Node(x0=nnx.Param(ONES)))).abstract())
    assert caught.value.hint == "plan what was saved, optimizers included"
