"""Every array is read once, in groups of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import statewise as sw
from statewise._src.checkpoint.orbax import read as stored


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that TensorStore was asked for."""
    keys: list[str] = []
    plain = stored.open_stored

    def noted(database: Any, key: Any) -> Any:
        keys.append("/".join(key))
        return plain(database, key)

    monkeypatch.setattr(stored, "open_stored", noted)
    return keys


def the_model(leaves: int = 20) -> nnx.Dict:
    return nnx.Dict(**{f"w{number:02}": nnx.Param(jnp.full((8,), float(number))) for number in range(leaves)})


def test_each_array_for_one_device_is_opened_once(tmp_path: Path, opened: list[str]) -> None:
    model = the_model()
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    sw.restore(tmp_path / "first", state)
    assert opened == [f"w{number:02}" for number in range(20)]


def test_packed_arrays_are_read_in_one(tmp_path: Path, opened: list[str]) -> None:
    model = the_model()
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state, layout="packed")
    sw.restore(tmp_path / "first", state)
    assert opened == ["packed/params/float32"]


def test_what_goes_to_devices_of_one_process_is_read_once(tmp_path: Path, opened: list[str]) -> None:
    model = nnx.Dict(one=nnx.Param(jnp.arange(8.0)), many=nnx.Param(jnp.arange(16.0)))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    target = jax.tree.map(lambda array: jax.device_put(array, spread) if array.size == 16 else array, state)
    restored, _ = sw.restore(tmp_path / "first", target)
    assert sorted(opened) == ["many", "one"]  # several processes: test_save_together.py
    assert restored["params"]["many"].sharding == spread
    np.testing.assert_array_equal(restored["params"]["many"], np.arange(16.0))


def test_many_bytes_are_read_in_several_groups(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_AT_ONCE", 100)  # of arrays of 32 bytes: three at a time
    model = the_model()
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    restored, report = sw.restore(tmp_path / "first", state)
    assert report.counts["params"] == {"restored": 20}
    assert len(opened) == 20
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_array_of_another_shape_is_not_read(tmp_path: Path) -> None:
    """Its own index could claim any size: it is compared with the manifest before a byte is asked for."""
    model = the_model(1)
    sw.save(tmp_path / "first", sw.plan(model).take(model))
    future = stored.open_stored(stored.reading(tmp_path / "first"), ("w00",))
    with pytest.raises(ValueError, match=r"an array of shape \(8,\) instead of \(9,\)"):
        stored.opened(future, (9,))
