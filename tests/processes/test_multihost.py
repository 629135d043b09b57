"""Real processes over the loopback interface: they train and save, one is killed, another number of them resumes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

import statewise as sw
from statewise.examples import multihost

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds, for processes that have to start, to find each other and to compile


@contextmanager
def started(folder: Path, processes: int, devices: int, steps: int) -> Iterator[list[subprocess.Popen[str]]]:
    """So many processes with so many devices each; what they print goes to files beside the folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    command = [sys.executable, "-m", "statewise.examples.multihost", str(folder), "--steps", str(steps)]
    command += ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--cpu-devices", str(devices)]
    running = []
    try:
        for number in range(processes):
            with open(said_by(folder, number), "w") as file:
                running.append(
                    subprocess.Popen(
                        [*command, "--process", str(number)],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def said_by(folder: Path, number: int) -> Path:
    return folder.parent / f"{folder.name}.{number}.txt"


def run(folder: Path, processes: int, devices: int, steps: int) -> None:
    with started(folder, processes, devices, steps) as running:
        ends = [process.wait(timeout=PATIENCE) for process in running]
    assert ends == [0] * processes, said_by(folder, 0).read_text()[-3000:]


def losses(folder: Path) -> dict[int, float]:
    """The losses that process 0 printed, to the last bit, by step."""
    text = said_by(folder, 0).read_text()
    return {int(step): float.fromhex(loss) for step, loss in re.findall(r"step (\d+) loss (\S+)", text)}


def resumed_from(folder: Path) -> int:
    found = re.search(r"resumed from step (\d+)", said_by(folder, 0).read_text())
    assert found is not None
    return int(found[1])


def wait_for_step(folder: Path, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while step not in losses(folder):
        assert time.monotonic() < end, said_by(folder, 0).read_text()[-3000:]
        time.sleep(0.02)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    """A mesh of some devices of this process."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=chosen)


def run_here(folder: Path, devices: int, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    multihost.train_until(steps, str(folder), mesh=mesh_of(devices))
    said_by(folder, 0).write_text(capsys.readouterr().out)


def test_one_of_two_is_killed_and_others_resume_exactly(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(whole, 1, 4, 40)  # one process, never interrupted
    uninterrupted = losses(whole)
    with started(folder, 2, 2, 100_000) as running:
        wait_for_step(folder, 11)  # before the tenth is begun, the checkpoint of the fifth is complete
        running[1].send_signal(signal.SIGKILL)
        assert running[1].wait() == -signal.SIGKILL
        # The other waits for it, or fails; a launcher ends it, as Slurm does, and so does the end of this block.
    with sw.Checkpoints(folder) as checkpoints:
        left = checkpoints.latest
    assert left is not None
    assert left % 5 == 0
    for processes, devices in ((4, 1), (2, 2)):
        newest, left = left, left + 5
        run(folder, processes, devices, left)
        again = losses(folder)
        assert resumed_from(folder) == newest
        assert list(again) == list(range(newest + 1, left + 1))
        assert again == {step: uninterrupted[step] for step in again}


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_other_numbers_of_devices_go_on_from_the_same_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: int
) -> None:
    """They add up in another order: what was restored is the same to the bit, the losses are to tolerance."""
    folder = tmp_path / "run"
    state = multihost.train_until(5, str(folder), mesh=mesh_of(4))
    with sw.Checkpoints(folder) as checkpoints:
        restored, *_ = checkpoints.restore(multihost.make_plan().abstract(mesh_of(devices)))
    for saved, found in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert len(found.sharding.device_set) == devices
        np.testing.assert_array_equal(bits(found), bits(saved))
    _, expected = multihost.train(state, *multihost.batch_of(6, mesh_of(4)))
    run_here(folder, devices, 6, capsys)
    assert resumed_from(folder) == 5
    np.testing.assert_allclose(losses(folder)[6], float(expected), rtol=1e-5)


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array)


# --- SIGTERM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_sigterm_at_one_process_saves_the_same_step_in_all_and_ends_them(tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "run"
    with started(folder, processes, 4 // processes, 100_000) as running:
        wait_for_step(folder, 7)
        running[-1].send_signal(signal.SIGTERM)
        ends = [process.wait(timeout=PATIENCE) for process in running]
    said = said_by(folder, 0).read_text()
    assert ends == [0] * processes, said[-3000:]
    preempted = re.search(r"preempted at step (\d+)", said)
    assert preempted is not None
    with sw.Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == int(preempted[1]) == max(losses(folder))
        restored = checkpoints.restore(multihost.make_plan().abstract(mesh_of(1)))
    assert restored.report.ok
