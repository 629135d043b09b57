"""Arrays that lie on different devices: JAX names an argument of ours, we name the user's, the leaf, and the hint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from refusals import refused

AUTO = (AxisType.Auto,)
EIGHT = jax.make_mesh((8,), ("data",), axis_types=AUTO)
FOUR = jax.make_mesh((4,), ("data",), axis_types=AUTO, devices=jax.devices()[:4])
SPLIT = "x = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))  # the state's mesh"
ONE_MESH = "state = jax.device_put(state, plan.shardings(mesh))  # everything on one mesh"


@sw.step(writes="stats")
def run(model: nnx.BatchNorm, x: jax.Array, *, scale: jax.Array | float = 1.0) -> jax.Array:
    return model(x * scale)


def state_on(mesh: jax.sharding.Mesh) -> sw.State:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    return sw.plan(model).take(model, mesh=mesh)


def on(mesh: jax.sharding.Mesh, array: jax.Array) -> jax.Array:
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P()))


@pytest.mark.parametrize("compiled", [False, True], ids=["first call", "later call"])
def test_a_batch_on_another_mesh_is_named(compiled: bool) -> None:
    state, x = state_on(EIGHT), jnp.ones((4, 3))
    if compiled:
        state, _ = run(state, x)
    with refused(
        sw.PlacementError,
        "run got arrays on different devices; the state is on devices 0, 1, 2, 3, 4, 5, 6, 7. "
        "Of its arguments: x on devices 0, 1, 2, 3.",
        hint=SPLIT,
    ):
        run(state, on(FOUR, x))
    run(state, x)  # nothing has happened to it


def test_a_state_that_was_restored_onto_one_device_goes_to_the_batch_s_mesh() -> None:
    state = jax.device_put(state_on(FOUR), jax.devices()[0])
    with refused(
        sw.PlacementError,
        "run got arrays on different devices; the state is on device 0. "
        "Of its arguments: x on devices 0, 1, 2, 3, 4, 5, 6, 7.",
        hint="state = jax.device_put(state, plan.shardings(mesh))  # or restore it there: plan.abstract(mesh)",
    ):
        run(state, on(EIGHT, jnp.ones((4, 3))))
    state, _ = run(jax.device_put(state, state.plan.shardings(EIGHT)), on(EIGHT, jnp.ones((4, 3))))


def test_an_argument_by_name_is_named_too() -> None:
    with refused(
        sw.PlacementError,
        "run got arrays on different devices; the state is on devices 0, 1, 2, 3. "
        "Of its arguments: scale on devices 0, 1, 2, 3, 4, 5, 6, 7.",
        hint=SPLIT,
    ):
        run(state_on(FOUR), jnp.ones((4, 3)), scale=on(EIGHT, jnp.ones(())))


def test_kinds_on_different_meshes_are_listed_leaf_by_leaf() -> None:
    mixed = state_on(EIGHT).replace(stats=state_on(FOUR)["stats"])
    where = "(on devices 0, 1, 2, 3)"
    with refused(
        sw.PlacementError,
        "run got arrays on different devices; the state is on devices 0, 1, 2, 3, 4, 5, 6, 7.",
        leaves=[
            f"mean: BatchStat(3,) float32  kind=stats  {where}",
            f"var: BatchStat(3,) float32  kind=stats  {where}",
        ],
        kind="stats",
        hint=ONE_MESH,
    ):
        run(mixed, jnp.ones((4, 3)))


def test_arrays_that_jax_may_move_are_no_matter() -> None:
    state, _ = run(state_on(EIGHT), jnp.ones((4, 3)))  # not committed to any device
    assert state["stats"]["mean"].sharding.device_set == set(jax.devices())
