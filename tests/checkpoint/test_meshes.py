"""Saved on one mesh, restored on another: the same to the bit, where the target says, in bounded memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from large_states import LEAVES, SIDE, assert_same, large_plan, make_large, mesh_of, split_for

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"
MESHES = [(8,), (2, 4), (4,), (1,)]


class Block(nnx.Module):
    """Parameters, statistics, random streams and bfloat16: what has to come back."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(16, 8, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.drop(self.norm(self.up(x))))


def plan_for(shape: tuple[int, ...]) -> sw.Plan:
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], placement=split_for(len(shape))))
    return kinds.plan(nnx.eval_shape(Block), optimizers={"params": optax.adam(1e-2)})


@pytest.fixture(scope="module")
def states() -> dict[tuple[int, ...], sw.State]:
    """The same state on every mesh."""
    return {shape: plan_for(shape).init(Block, mesh_of(shape)) for shape in MESHES}


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize("here", MESHES, ids=str)
def test_a_state_comes_back_exactly_on_every_other_mesh_and_back_again(
    tmp_path: Path, states: dict[tuple[int, ...], sw.State], here: tuple[int, ...], layout: str
) -> None:
    sw.save(tmp_path / "first", states[here], layout=layout)
    for there in MESHES:
        target = plan_for(there).abstract(mesh_of(there))
        moved, report = sw.restore(tmp_path / "first", target)
        assert report.ok
        assert [one.sharding for one in jax.tree.leaves(moved)] == [one.sharding for one in jax.tree.leaves(target)]
        assert_same(moved, states[here])
    sw.save(tmp_path / "second", moved, layout=layout)
    back, _ = sw.restore(tmp_path / "second", plan_for(here).abstract(mesh_of(here)))
    assert_same(back, states[here])


def test_the_checksums_of_a_checkpoint_do_not_depend_on_the_mesh(
    tmp_path: Path, states: dict[tuple[int, ...], sw.State]
) -> None:
    for number, state in enumerate(states.values()):
        sw.save(tmp_path / str(number), state)
    for number in range(1, len(states)):
        assert not sw.diff(tmp_path / "0", tmp_path / str(number)).value


# --- memory ------------------------------------------------------------------------------------------------------


def test_a_restore_takes_little_more_than_what_it_restores(tmp_path: Path) -> None:
    """201 MB in 12 leaves: beside the state itself there are three groups of 64 MiB at most, on their way."""
    sw.save(tmp_path / "large", large_plan(1).init(make_large, mesh_of((8,))))
    size = LEAVES * SIDE * SIDE * 4
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HELPERS)])}
    for shape in ("2,4", "1"):
        command = [sys.executable, str(HELPERS / "programs/restored_memory.py"), str(tmp_path / "large"), shape]
        grown = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        assert size <= grown < size + 240e6
