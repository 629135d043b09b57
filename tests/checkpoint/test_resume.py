"""A run that was resumed is, to the bit, the run that was never interrupted."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import assert_identical, batches, contents, copied, train, trained

pytestmark = pytest.mark.heavy

# What a fresh process does: it plans a model of other values, restores, goes on, and writes down what it has.
RESUME = """
import sys
import statewise as sw
from checkpoint_models import batches, train, trained
state, report = sw.restore(sys.argv[1], trained(seed=5))
assert report.ok
losses = []
for batch in batches()[3:]:
    state, loss = train(state, batch)
    losses.append(float(loss).hex())
sw.save(sys.argv[2], state)
print(*losses)
"""


def run(state: sw.State, some: list[jax.Array]) -> tuple[sw.State, list[str]]:
    """Trains on these batches; the state that comes back, and the losses to the bit."""
    losses = []
    for batch in some:
        state, loss = train(state, batch)
        losses.append(float(loss).hex())
    return state, losses


@pytest.fixture(scope="module")
def whole() -> tuple[sw.State, sw.State, list[str]]:
    """A run of six steps: the state after three, that after six, and the losses of the last three."""
    middle, _ = run(trained(), batches()[:3])
    end, losses = run(copied(middle), batches()[3:])
    return middle, end, losses


def test_a_run_moves_everything_that_a_resumed_one_has_to_have(whole: tuple[sw.State, sw.State, list[str]]) -> None:
    """Else what follows would show nothing."""
    middle, end, _ = whole
    before, after = contents(middle), contents(end)
    moved = {name for name in before if before[name] != after[name]}
    still = {name for name in before if name not in moved}
    assert all("key" in name for name in still), still
    assert {name.split("[")[0] for name in moved} == {"params", "stats", "rng", "optimizer", "variables"}
    assert int(end["variables"]["calls"]) == 6


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize("abstract", [False, True], ids=["into a state", "into an abstract state"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(
    tmp_path: pathlib.Path, whole: tuple[sw.State, sw.State, list[str]], layout: str, abstract: bool
) -> None:
    middle, end, losses = whole
    sw.save(tmp_path / "saved", middle, layout=layout)
    state, _ = sw.restore(tmp_path / "saved", trained(5).plan.abstract() if abstract else trained(5))
    assert_identical(state, middle)
    state, resumed = run(state, batches()[3:])
    assert resumed == losses
    assert_identical(state, end)


def test_a_run_resumed_in_a_fresh_process_is_too(
    tmp_path: pathlib.Path, whole: tuple[sw.State, sw.State, list[str]]
) -> None:
    middle, end, losses = whole
    sw.save(tmp_path / "saved", middle)
    here = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here / "helpers")])}
    arguments = [sys.executable, "-c", RESUME, str(tmp_path / "saved"), str(tmp_path / "resumed")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == losses
    assert_identical(sw.restore(tmp_path / "resumed", trained(5))[0], end)


def test_a_run_goes_on_from_its_last_step_of_checkpoints(
    tmp_path: pathlib.Path, whole: tuple[sw.State, sw.State, list[str]]
) -> None:
    """Saved in the background at every step, and cut off after the third."""
    _, end, losses = whole
    with sw.Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        state = trained()
        for step, batch in enumerate(batches()[:3]):
            state, _ = train(state, batch)
            checkpoints.save(step, state)
    with sw.Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        state, _, step, _ = checkpoints.restore(trained(5).plan.abstract())
        assert step == 2
    state, resumed = run(state, batches()[step + 1 :])
    assert resumed == losses
    assert_identical(state, end)


def test_a_packed_run_is_resumed_to_the_bit(tmp_path: pathlib.Path) -> None:
    def taken(seed: int) -> sw.State:
        model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(seed + at)) for at in range(4)))
        return sw.plan(model, optimizers={"params": ADAM}).take(model, pack=True)

    middle, _ = run(taken(0), batches()[:3])
    sw.save(tmp_path / "saved", middle)
    end, losses = run(middle, batches()[3:])
    state, resumed = run(sw.restore(tmp_path / "saved", taken(9))[0], batches()[3:])
    assert resumed == losses
    assert_identical(state, end)


ADAM = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))


def test_a_run_on_eight_devices_is_resumed_to_the_bit(tmp_path: pathlib.Path, devices: list[jax.Device]) -> None:
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.NamedSharding(mesh, jax.P())
    some = [jax.device_put(jnp.resize(batch, (8, 3)), jax.NamedSharding(mesh, jax.P("data"))) for batch in batches()]
    middle, _ = run(jax.device_put(trained(), everywhere), some[:3])
    sw.save(tmp_path / "saved", middle)
    end, losses = run(middle, some[3:])
    target = jax.device_put(trained(5), everywhere)
    state, resumed = run(sw.restore(tmp_path / "saved", target)[0], some[3:])
    assert resumed == losses
    assert_identical(state, end)
