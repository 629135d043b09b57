"""Every path that the file system takes: a checkpoint works there, or is refused before a byte is written."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statewise as sw
from odd_paths import (
    BACKSLASH,
    PATHS,
    STATE,
    assert_kept,
    assert_works,
    is_name,
    segments,
    state_of,
)
from statewise._src.checkpoint.orbax.epath import epath as literal
from statewise._src.checkpoint.orbax.paths import obstacle

# --- the law -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(names=st.lists(segments.filter(is_name), min_size=1, max_size=3), layout=st.sampled_from(["named", "packed"]))
@example(names=["run#3", "step"], layout="named")
@example(names=["lr%3D0.1", "step"], layout="packed")
def test_a_checkpoint_works_under_any_path_or_is_refused_before_a_byte_is_written(
    names: list[str], layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("paths")
    path = os.path.join(root, *names)
    try:
        sw.save(path, STATE, layout=layout)
    except sw.SaveError:
        assert not list(root.iterdir())
        assert obstacle(path)[0]  # known, and not anything that went wrong
        return
    assert_works(path)
    assert os.listdir(os.path.dirname(path)) == [names[-1]]  # nothing is left beside it


@pytest.mark.parametrize("to", ["orbax", "linen", "safetensors", "statewise"])
@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_other_formats_work_under_any_path_too(tmp_path: pathlib.Path, path: str, to: str) -> None:
    made = tmp_path / path
    if to == "safetensors":
        made = made.with_name(f"{made.name[:200]}.safetensors")
    sw.convert({"params": dict(STATE["params"])}, made, to=to, target=STATE)
    assert sw.convert(made, None, to="linen", target=STATE).tree["params"]["w"][1, 2] == 5
    assert sw.inspect(made).total.size == 9
    assert [entry.name for entry in made.parent.iterdir()] == [made.name]


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_the_steps_of_a_run_work_under_any_path_too(tmp_path: pathlib.Path, name: str) -> None:
    with sw.Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(3, STATE, metrics={"loss": 1.0}, arrays=ocp.args.PyTreeSave({"a": np.arange(3.0)}))
        checkpoints.wait()
        restored = checkpoints.restore(STATE.plan.abstract(), extra={"arrays": ocp.args.PyTreeRestore()})
        assert np.array_equal(restored.extra["arrays"]["a"], np.arange(3.0))
        assert_kept(restored.state)
        assert_works(checkpoints.path(3))
    with sw.Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.steps == (3,)
        assert checkpoints.restore(STATE, extra="metrics").extra == {"metrics": {"loss": 1.0}}


# --- patterns ----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(name=segments.filter(is_name), others=st.lists(segments.filter(is_name), max_size=4))
@example(name="a*", others=["ab"])
@example(name="[ab]", others=["a"])
@example(name="a?", others=["ab"])
def test_a_path_is_a_pattern_of_itself_alone(
    name: str, others: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("patterns")
    for at, folder in enumerate({name, *others}):
        (root / folder).mkdir()
        (root / folder / f"process_{at}").touch()
        (root / folder / "other~").touch()
    there = literal(root / name)
    assert [path.name for path in there.glob("process_*")] == [
        path for path in os.listdir(root / name) if path.startswith("process_")
    ]
    assert sorted(path.name for path in there.iterdir()) == sorted(os.listdir(root / name))
    assert all(type(path) is type(there) for path in (*there.iterdir(), *there.glob("*"), there / "x", there.parent))


def test_a_run_takes_nothing_of_another_whose_name_fits_its_own(tmp_path: pathlib.Path) -> None:
    """Orbax merges what each process has written, which it finds by a pattern: `run*` would find `run2`'s."""
    other = state_of(w=jnp.zeros((2, 3)), b=jnp.zeros(3))
    begun = tmp_path / "run2/1.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp"
    sw.save(tmp_path / "saved", other)
    begun.mkdir(parents=True)
    (tmp_path / "saved").rename(begun / "ocdbt.process_9")
    with sw.Checkpoints(tmp_path / "run*") as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        assert_kept(checkpoints.restore(STATE.plan.abstract()).state)


@pytest.mark.parametrize("name", ["[run]", "run*", "**", "a#b"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_item_in_a_manager_of_orbax_s_own_works_there_too(
    tmp_path: pathlib.Path, name: str, asynchronous: bool
) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(tmp_path / name, options=options) as manager:
        manager.save(1, args=ocp.args.Composite(state=sw.checkpointable(STATE)))
        manager.wait_until_finished()
        back = manager.restore(1, args=ocp.args.Composite(state=sw.checkpointable(STATE.plan.abstract())))
    assert_kept(back["state"])
    assert_works(tmp_path / name / "1" / "state")


def test_an_item_in_a_manager_of_orbax_s_own_is_refused_where_orbax_writes_elsewhere(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with (
        ocp.CheckpointManager(tmp_path / "a\\b", options=options) as manager,
        pytest.raises(sw.SaveError, match=f"cannot be written: {BACKSLASH}"),
    ):
        manager.save(1, args=ocp.args.Composite(state=sw.checkpointable(STATE)))
    assert not (tmp_path / "a").exists()


# --- up, along links, and from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path], ids=["str", "pathlib", "epath"])
@pytest.mark.parametrize("path", ["run", "./run", "run/", "run/.", "a//run", "x/../run", "x/y/../../run"])
def test_relative_paths_of_any_class(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sw.save(kind(path), STATE)
    assert_works(kind(path))
    assert os.listdir(tmp_path) == [path.split("/")[0] if path[0] == "a" else "run"]


def test_a_path_that_goes_up_from_a_link_is_where_the_file_system_has_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("real/deep")
    os.symlink("real/deep", "link")
    sw.save("link/../run", STATE)
    with sw.Checkpoints("link/../steps") as checkpoints:
        checkpoints.save(0, STATE)
    sw.convert({"params": dict(STATE["params"])}, "link/../plain", to="linen")
    assert sorted(os.listdir("real")) == ["deep", "plain", "run", "steps"]
    assert sorted(os.listdir()) == ["link", "real"]
    assert_works("link/../run")
    assert sw.inspect("link/../plain").total.size == 9


def test_a_run_goes_on_where_it_began_when_the_process_goes_elsewhere(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with sw.Checkpoints("run#1") as checkpoints:
        for step in range(3):
            checkpoints.save(step, STATE, metrics={"loss": 0.5})
            os.chdir(tmp_path / "elsewhere")
        assert_kept(checkpoints.restore(STATE.plan.abstract(), extra="metrics").state)
    assert not os.listdir(tmp_path / "elsewhere")
    assert_works(tmp_path / "run#1" / "2")


def test_a_base_is_found_through_links_and_after_both_have_moved(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nnx.LoRA(2, 1, 3, base_module=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    os.makedirs("data#1/runs")
    os.symlink("data#1/runs", "link")
    sw.save("data#1/base%20", state)
    os.symlink("data#1/base%20", "latest")
    sw.save("link/over", state, only="lora", base="latest")
    os.unlink("latest")
    os.symlink("data#1/runs/over", "mine")
    for path in ("link/over", "data#1/runs/over", "mine"):
        assert sw.restore(path, state.plan.abstract())[1].ok
    os.rename("data#1", "data#2")
    assert sw.restore("data#2/runs/over", state.plan.abstract())[1].ok
