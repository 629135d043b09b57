"""What a checkpoint lacks starts again, whatever its dtype and shape, and shares no memory with the target."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from meshes import number
from strategies import Node


class Fresh(nnx.Variable):
    """What starts again."""


VALUES = {
    "key": lambda: jax.random.key(3),
    "keys": lambda: jax.random.split(jax.random.key(3), 4),
    "key of another kind": lambda: jax.random.key(3, impl="rbg"),
    "bfloat16": lambda: jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "float8": lambda: jnp.arange(4).astype(jnp.float8_e4m3fn),
    "bool": lambda: jnp.array([True, False]),
    "scalar": lambda: jnp.array(7),
    "empty": lambda: jnp.ones((0, 2)),
}
SAVED = {"not saved": {"saved": False}, "missing": {"missing": "restart"}}


@pytest.mark.parametrize(
    ("saved", "on"),
    # A kind that is not saved keeps the values of a target that has some.
    [("not saved", "nothing"), ("missing", "nothing"), ("missing", "a device"), ("missing", "a mesh")],
)
@pytest.mark.parametrize("value", VALUES)
def test_it_starts_again(value: str, saved: str, on: str, tmp_path: pathlib.Path) -> None:
    kinds = sw.Kinds(
        params=sw.Kind(nnx.Param),
        fresh=sw.Kind(Fresh, restart=lambda array: array, **SAVED[saved]),
    )
    model = Node(weight=nnx.Param(jnp.ones(2)), fresh=Fresh(VALUES[value]()))
    plan = kinds.plan(model)
    sw.save(tmp_path / "saved", plan.take(model), only="params")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)) if on == "a mesh" else None
    target = plan.abstract() if on == "nothing" else plan.take(model, mesh=mesh)
    restored, report = sw.restore(tmp_path / "saved", target)
    assert report.counts == {"params": {"restored": 1}, "fresh": {"restarted": 1}}
    (found,) = jax.tree.leaves(restored["fresh"])
    expected = number(VALUES[value]())
    assert (found.dtype, found.shape) == (VALUES[value]().dtype, VALUES[value]().shape)
    np.testing.assert_array_equal(number(found), np.zeros_like(expected) if on == "nothing" else expected)
    if on != "nothing":
        (own,) = jax.tree.leaves(target["fresh"])
        assert found.sharding == own.sharding
        own.delete()
        np.testing.assert_array_equal(number(found), expected)
