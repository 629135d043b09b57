"""What a save refuses; after each refusal nothing stands at the path, and nothing beside it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from disagreeing import ONES, state_of
from refusals import refused


def small() -> sw.State:
    return state_of(w=nnx.Param(ONES), c=nnx.Cache(ONES))


@pytest.mark.parametrize("state", [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "run", None], ids=lambda x: type(x).__name__)
def test_what_is_no_state(tmp_path: pathlib.Path, state: Any) -> None:
    message = f"sw.save wants a state, not {type(state).__name__}."
    with refused(sw.StructureError, message, hint="sw.save(path, plan.take(model))"):
        sw.save(tmp_path / "run", state)
    message = f"sw.checkpointable wants a state, not {type(state).__name__}."
    with refused(sw.StructureError, message, hint="sw.checkpointable(plan.take(model))"):
        sw.checkpointable(state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, ("run",)], ids=str)
def test_what_is_no_path(path: Any) -> None:
    with refused(sw.SaveError, f"{type(path).__name__} is not a path.", hint="sw.save('run/step_100', state)"):
        sw.save(path, small())


@pytest.mark.parametrize("there", ["folder", "file", "link", "checkpoint"])
def test_what_is_there_is_never_written_over(tmp_path: pathlib.Path, there: str) -> None:
    path = tmp_path / "run"
    if there == "folder":
        path.mkdir()
    elif there == "file":
        path.write_text("mine")
    elif there == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        sw.save(path, small())
    before = sorted(tmp_path.rglob("*"))
    with refused(
        sw.SaveError,
        f"There is already something at {path}, and nothing is overwritten.",
        hint="another path, or sw.Checkpoints(directory), which keeps a checkpoint for each step",
    ):
        sw.save(path, small())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_layout_that_is_not_there(tmp_path: pathlib.Path) -> None:
    for save in (
        lambda: sw.save(tmp_path / "run", small(), layout="zip"),
        lambda: sw.checkpointable(small(), layout="zip"),
    ):
        with refused(sw.SaveError, "layout='zip' is neither 'named' nor 'packed'.", hint="layout='packed'"):
            save()
    assert not list(tmp_path.iterdir())


def test_only_a_kind_that_is_not_there_or_is_never_saved(tmp_path: pathlib.Path) -> None:
    known = "one of: params, lora, stats, cache, rng, intermediates, metrics, optimizer, variables"
    ephemeral = "declare it saved: kinds.replace(cache=dataclasses.replace(kinds['cache'], saved=True))"
    for save in (
        lambda only: sw.save(tmp_path / "run", small(), only=only),
        lambda only: sw.checkpointable(small(), only=only),
    ):
        with refused(sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint=known):
            save(("params", "gates"))
        message = "The kind 'cache' is declared ephemeral, and is never saved."
        with refused(sw.DeclarationError, message, kind="cache", hint=ephemeral):
            save("cache")
    assert not list(tmp_path.iterdir())


def test_a_spent_state(tmp_path: pathlib.Path) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, restart=jnp.zeros_like), cache=sw.Kind(nnx.Cache, saved=False))
    state = state_of(kinds, w=nnx.Param(ONES), c=nnx.Cache(ONES))
    state.restart("params")
    with refused(
        sw.StructureError,
        "This state was donated: restart('params') has donated its params.",
        kind="params",
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    ):
        sw.save(tmp_path / "run", state)
    assert not list(tmp_path.iterdir())


def test_a_state_whose_ephemeral_kind_alone_is_spent_is_saved(tmp_path: pathlib.Path) -> None:
    state = small()
    state.restart("cache")
    sw.save(tmp_path / "run", state)
    assert sw.inspect(tmp_path / "run")["params"].leaves == 1


def test_an_abstract_state(tmp_path: pathlib.Path) -> None:
    with refused(
        sw.StructureError,
        "This state is abstract: it has shapes but no values to save.",
        hint="sw.save(path, plan.take(model))",
    ):
        sw.save(tmp_path / "run", small().plan.abstract())
    assert not list(tmp_path.iterdir())


def test_a_state_inside_jit(tmp_path: pathlib.Path) -> None:
    with refused(
        sw.StructureError,
        "This state is being traced: inside jax.jit there are no values to save.",
        hint="return the state from the function, and save what comes back",
    ):
        jax.jit(lambda state: sw.save(tmp_path / "run", state))(small())
    assert not list(tmp_path.iterdir())


def test_a_batch_of_states(tmp_path: pathlib.Path) -> None:
    with refused(
        sw.StructureError,
        "The state's arrays do not have the shapes and dtypes of its plan.",
        leaves=["w: Param(2, 3) float32  kind=params  (is (4, 2, 3) in the state)"],
        hint="all of them as one ensemble: state = plan.stacked(4).stack(states)\n"
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
        "for other dtypes: state.cast(params='bfloat16')",
    ):
        sw.save(tmp_path / "run", jax.tree.map(lambda array: jnp.stack([array] * 4), small()))
    assert not list(tmp_path.iterdir())
