"""Several processes save one checkpoint together: each writes what it holds, and any number can read it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import statewise as sw
from programs import save_per_device
from programs.save_together import make, published
from statewise._src.checkpoint import temporary

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests/helpers/programs"


def run_together(count: int, folder: Path, *more: str, script: str = "save_together.py") -> list[str]:
    """Runs a script so many times at once; what each of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(PROGRAMS / script),
                str(number),
                str(count),
                port,
                str(folder),
                *more,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    try:
        return [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_save_and_one_restores(tmp_path: Path, gcs: str, s3: str) -> None:
    """On a disk, and in object stores.  Also, they read published files by names together."""
    (tmp_path / "theirs").mkdir()
    for file, arrays in published().items():
        safetensors.numpy.save_file(arrays, tmp_path / "theirs" / file)
    printed = run_together(2, tmp_path, gcs, s3)
    assert all(text.rstrip().endswith("the same") for text in printed), "\n".join(printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "theirs", "together"]
    assert_restored(tmp_path / "together", f"{gcs}/together", f"{s3}/together")


@pytest.mark.slow
def test_four_processes_save_and_one_restores(tmp_path: Path, gcs: str, s3: str) -> None:
    printed = run_together(4, tmp_path, gcs, s3)
    assert all(text.rstrip().endswith("the same") for text in printed), "\n".join(printed)
    assert_restored(tmp_path / "together", f"{gcs}/together", f"{s3}/together")


def assert_restored(*paths: Path | str) -> None:
    """Asserts that this process restores what several have saved."""
    # In this process, which has other devices: the same numbers as one process would have made.
    model = make()
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})
    train = sw.train_step(lambda model, x: (model(x) ** 2).mean())
    expected, _ = train(plan.take(model), jax.numpy.ones((4, 8)))
    for path in paths:
        found, report = sw.restore(path, plan.abstract())
        assert report.ok
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_plain_orbax_reads_what_two_processes_have_written(tmp_path: Path) -> None:
    """And of two processes, one that fails or dies while it saves: the other says so, and nothing is left of it."""
    left = f".first.tmp-{temporary._many(temporary._host_number())}-{os.getpid()}.1-0000"  # an earlier process
    (tmp_path / left).mkdir()
    printed = run_together(2, tmp_path, script="save_failing.py")
    first, second = (text.splitlines() for text in printed)
    for name in ("base", "made", "full"):
        said = f"{name} {tmp_path}/{name} could not be written: process 1 has failed, and its own error says why."
        assert said in first, printed[0]
    assert f"base RestoreError: There is nothing at {tmp_path}/none." in second, printed[1]
    for name in ("made", "full"):
        said = f"{name} {tmp_path}/{name} could not be written: No space left on device. Process 0 removes what was "
        assert f"{said}written." in second, printed[1]
    said = f"data {tmp_path}/run could not be written: process 1 has failed, and its own error says why."
    assert said in first, printed[0]
    said = "data __main__.Broken.get_state() failed: OSError: [Errno 28] No space left on device."
    assert said in second, printed[1]
    assert "steps ()" in first, printed[0]
    said = f"dead {tmp_path}/dead could not be written: another process has ended or cannot be reached: "
    assert any(line.startswith(said) for line in first), printed[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "run"]
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "first", {"bias": make().bias[...], "kernel": make().kernel[...]})
    np.testing.assert_array_equal(read["kernel"], make().kernel[...])


@pytest.mark.parametrize("store", ["disk", "gcs"])
def test_what_is_complete_when_another_process_dies_is_said_to_be_complete(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = f"{tmp_path}/complete" if store == "disk" else f"{request.getfixturevalue(store)}/complete"
    printed = run_together(2, tmp_path, path, script="save_failing.py")
    said = f"complete {path} is complete, but another process has ended or cannot be reached: "
    assert any(line.startswith(said) for line in printed[0].splitlines()), printed[0]
    assert sw.restore(path, sw.plan(make()).take(make()))[1].ok
    assert not list(tmp_path.glob(".*"))


def test_two_processes_save_through_each_interface_of_orbax_and_one_restores(tmp_path: Path) -> None:
    printed = run_together(2, tmp_path, script="save_items_together.py")
    assert all(text.rstrip().endswith("the same") for text in printed), "\n".join(printed)
    model = make()
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})
    for step in (1, 2, 3):
        found, report = sw.restore(tmp_path / "together" / str(step) / "state", plan.abstract())
        assert report.ok
        for one, other in zip(jax.tree.leaves(plan.take(model)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_place_train_and_keep_the_model_that_each_of_them_has(tmp_path: Path, devices: int) -> None:
    """One device each is what GPUs have: `jax.device_put` makes replicated arrays there whose parts cannot be read."""
    printed = run_together(2, tmp_path, str(devices), script="take_together.py")
    losses = [text.rstrip().splitlines()[-1] for text in printed]
    assert all(line.startswith("losses ") for line in losses), "\n".join(printed)
    assert len(set(losses)) == 1


def test_two_processes_save_the_values_of_each_device_and_one_restores_them(tmp_path: Path) -> None:
    printed = run_together(2, tmp_path, script="save_per_device.py")
    assert all(text.rstrip().endswith("the same") for text in printed), "\n".join(printed)
    kinds, four = (jax.sharding.AxisType.Auto,), jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=four)
    expected = save_per_device.trained(mesh)  # the same four devices, all in this process
    found, report = sw.restore(tmp_path / "together", save_per_device.plan().abstract(mesh))
    assert report.counts["stats"] == {"restored": 2}
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        for ours, theirs in zip(save_per_device.here(one), save_per_device.here(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    mean = np.asarray(found["stats"]["norm"]["mean"])
    assert not np.array_equal(mean[0], mean[3])  # of devices of different processes
