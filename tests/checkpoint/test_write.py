"""What is written for Orbax is what Orbax writes: key by key in its database, and in the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

import statewise as sw
from checkpoint_models import bits, one_of, taken
from refusals import refused
from statewise._src.checkpoint.orbax import write as writing

DTYPES = ("bool", "int4", "int8", "uint32", "float16", "bfloat16", "float32", "float8_e4m3fn", "complex64")


def written(folder: Path, tree: Any, handler: ocp.PyTreeCheckpointHandler) -> Path:
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    return folder


def ours(folder: Path, tree: Any) -> Path:
    return written(folder / "ours", tree, writing.writing_handler())


def theirs(folder: Path, tree: Any) -> Path:
    return written(folder / "theirs", tree, ocp.PyTreeCheckpointHandler(use_compression=False))


def restored(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def database(folder: Path) -> dict[bytes, bytes]:
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


def shardings(folder: Path) -> dict[str, Any]:
    texts = json.loads((folder / "_sharding").read_text())
    return {name: json.loads(text) for name, text in texts.items()}


def index(folder: Path) -> Any:
    found = json.loads((folder / "_METADATA").read_text())
    for facts in found["tree_metadata"].values():
        facts["value_metadata"].pop("write_shape", None)  # how Orbax splits large arrays; it reads without
    return found


def assert_same(one: Path, other: Path) -> None:
    assert database(one) == database(other)
    assert shardings(one) == shardings(other)
    assert index(one) == index(other)


@pytest.fixture
def kilobyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than a kilobyte is left to Orbax."""
    monkeypatch.setattr(writing, "_SMALL", 1024)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays were committed together, each time."""
    counts: list[int] = []
    plain = writing._write_together

    def noted(arrays: Any) -> None:
        counts.append(len(arrays))
        plain(arrays)

    monkeypatch.setattr(writing, "_write_together", noted)
    return counts


def test_each_dtype_is_written_as_orbax_writes_it(tmp_path: Path) -> None:
    tree = {name: one_of(name) for name in DTYPES} | {"scalar": jnp.float32(3), "words": jnp.arange(3, dtype="uint32")}
    assert_same(ours(tmp_path, tree), theirs(tmp_path, tree))


def test_numpy_s_arrays_are_written_as_orbax_writes_them(tmp_path: Path) -> None:
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.array(3)}, "d": jnp.ones(2)}
    assert_same(ours(tmp_path, tree), theirs(tmp_path, tree))
    kinds = jax.tree.map(type, restored(tmp_path / "ours"))
    assert kinds["a"] is np.ndarray
    assert issubclass(kinds["d"], jax.Array)


def test_arrays_over_devices_are_written_as_orbax_writes_them(tmp_path: Path, devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (("data",), ("model", "data"), (("data", "model"),), (None, "data"))
    places = {"-".join(map(str, spec)): NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs}
    array = jnp.arange(16.0 * 8).reshape(16, 8)
    one_device = jax.device_put(array, devices[3])
    tree = {name: jax.device_put(array, place) for name, place in places.items()} | {"one": one_device}
    # A replica of its own for each process is the same; within one process Orbax has replicas share the work.
    plain = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=plain)
    assert_same(ours(tmp_path, tree), written(tmp_path / "theirs", tree, handler))


def test_orbax_restores_the_shardings_that_it_finds(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tree = {"split": jax.device_put(jnp.arange(8.0), split), "whole": jax.device_put(jnp.arange(3.0), whole)}
    read = restored(ours(tmp_path, tree))
    assert {name: array.sharding for name, array in read.items()} == {"split": split, "whole": whole}
    assert jax.tree.map(bits, read) == jax.tree.map(bits, tree)


@pytest.mark.usefixtures("kilobyte")
def test_small_arrays_are_committed_as_one_and_large_ones_left_to_orbax(
    tmp_path: Path, transactions: list[int]
) -> None:
    small = {f"a{number}": jnp.full((5,), float(number)) for number in range(100)}
    large = {f"b{number}": jnp.full((1000,), float(number)) for number in range(3)}
    folder = ours(tmp_path, small | large)
    assert transactions == [100]
    assert_same(folder, theirs(tmp_path, small | large))


def test_what_is_committed_together_is_bounded(
    tmp_path: Path, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_AT_ONCE", 64)
    tree = {f"a{number}": jnp.full((4,), float(number)) for number in range(10)}
    folder = ours(tmp_path, tree)
    assert transactions == [4, 4, 2]
    assert_same(folder, theirs(tmp_path, tree))


@pytest.mark.usefixtures("kilobyte")
def test_small_and_large_arrays_are_in_one_database_whoever_writes_first(tmp_path: Path) -> None:
    """Both are written at the same time, by threads of their own."""
    tree = {f"a{number}": jnp.full((5,), float(number)) for number in range(50)}
    tree |= {f"b{number}": np.full((1000,), float(number)) for number in range(4)}
    tree |= {f"c{number}": jnp.full((1000,), float(number)) for number in range(4)}
    for attempt in range(10):
        folder = ours(tmp_path / str(attempt), tree)
        read = restored(folder)
        assert jax.tree.map(bits, read) == jax.tree.map(bits, tree)


def test_values_are_those_of_the_call_whatever_is_donated_afterwards(tmp_path: Path) -> None:
    state = taken({f"a{number}": jnp.full((5,), float(number)) for number in range(20)})
    expected = jax.tree.map(bits, jax.tree.leaves(state))
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        after = jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)(state)
        checkpoints.wait()
        restored = checkpoints.restore(after)
    assert jax.tree.map(bits, jax.tree.leaves(restored.state)) == expected


def test_a_write_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(arrays: Any) -> None:
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device [os_error_code=28]')

    monkeypatch.setattr(writing, "_write_together", full)
    said = f"{tmp_path}/first could not be written: No space left on device. Nothing of it is left."
    with refused(sw.SaveError, said, hint="free some space, or choose a directory that can be written to"):
        sw.save(tmp_path / "first", taken({"a": jnp.ones(3)}))
    assert list(tmp_path.iterdir()) == []
