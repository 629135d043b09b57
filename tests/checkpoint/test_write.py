"""What is written for Orbax is what Orbax writes: key by key in its database, and in the files beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import statewise as sw
from checkpoint_models import assert_identical, bits, one_of, taken
from refusals import refused
from statewise._src.checkpoint.orbax import database
from statewise._src.checkpoint.orbax import write as writing

DTYPES = ("bool", "int4", "int8", "uint32", "float16", "bfloat16", "float32", "float8_e4m3fn", "complex64")


def ours(folder: Path, tree: Any) -> Path:
    place = epath.Path(folder / "ours")
    place.mkdir(parents=True)
    writer = writing.TreeWriter(tree)
    writer.write(place)
    writer.finish(place)
    return folder / "ours"


def theirs(folder: Path, tree: Any, handler: ocp.PyTreeCheckpointHandler | None = None) -> Path:
    with ocp.Checkpointer(handler or ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(folder / "theirs", args=ocp.args.PyTreeSave(tree))
    return folder / "theirs"


def restored(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def stored(folder: Path) -> dict[bytes, bytes]:
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
    assert stored(one) == stored(other)
    assert shardings(one) == shardings(other)
    assert index(one) == index(other)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays were committed together, each time."""
    counts: list[int] = []
    plain = writing._write_together

    def noted(database: Any, arrays: Any) -> None:
        counts.append(len(arrays))
        plain(database, arrays)

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
    assert_same(ours(tmp_path, tree), theirs(tmp_path, tree, handler))


def test_orbax_restores_the_shardings_that_it_finds(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tree = {"split": jax.device_put(jnp.arange(8.0), split), "whole": jax.device_put(jnp.arange(3.0), whole)}
    read = restored(ours(tmp_path, tree))
    assert {name: array.sharding for name, array in read.items()} == {"split": split, "whole": whole}
    assert jax.tree.map(bits, read) == jax.tree.map(bits, tree)


def test_small_and_large_arrays_are_committed_as_one(tmp_path: Path, transactions: list[int]) -> None:
    small = {f"a{number}": jnp.full((5,), float(number)) for number in range(100)}
    large = {f"b{number}": jnp.full((1 << 20,), float(number)) for number in range(3)}
    folder = ours(tmp_path, small | large)
    assert transactions == [103]
    assert_same(folder, theirs(tmp_path, small | large))


def test_what_is_committed_together_is_bounded(
    tmp_path: Path, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_AT_ONCE", 64)
    tree = {f"a{number}": jnp.full((4,), float(number)) for number in range(10)}
    folder = ours(tmp_path, tree)
    assert transactions == [4, 4, 2]
    assert_same(folder, theirs(tmp_path, tree))


def test_arrays_larger_than_what_is_committed_together_are_written_one_by_one(
    tmp_path: Path, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_AT_ONCE", 1024)
    tree = {f"a{number}": jnp.full((5,), float(number)) for number in range(3)}
    tree |= {f"b{number}": np.full((1000,), float(number)) for number in range(2)}
    folder = ours(tmp_path, tree)
    assert transactions == [3, 1, 1]
    assert_same(folder, theirs(tmp_path, tree))


def test_arrays_too_large_for_one_chunk_are_read_by_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    tree = {
        "one": jnp.arange(60.0).reshape(5, 12),
        "split": jax.device_put(jnp.arange(16.0 * 6).reshape(16, 6), split),
        "host": np.arange(7),
    }
    monkeypatch.setattr(writing, "chunks_of", lambda shape, itemsize, most: database.chunks_of(shape, itemsize, 16))
    folder = ours(tmp_path, tree)
    chunks = [len([key for key in stored(folder) if key.startswith(f"{name}/".encode())]) - 1 for name in tree]
    assert chunks == [20, 32, 7]  # of 3, 3 and 1 elements: equal parts of at most 16 bytes
    assert jax.tree.map(bits, restored(folder)) == jax.tree.map(bits, tree)


@given(st.lists(st.integers(1, 40), max_size=4), st.sampled_from([1, 2, 4, 8]), st.integers(8, 2000))
def test_chunks_are_equal_parts_of_a_piece_and_small_enough(shape: list[int], itemsize: int, most: int) -> None:
    chunks = database.chunks_of(tuple(shape), itemsize, most)
    assert len(chunks) == len(shape)
    assert all(size % chunk == 0 for size, chunk in zip(shape, chunks, strict=True))
    assert math.prod(chunks) * itemsize <= most
    if math.prod(shape) * itemsize <= most:
        assert chunks == tuple(shape)


def test_a_prime_number_of_gibibytes_is_not_cut_into_single_elements() -> None:
    assert database.chunks_of((4294967291,), 1) == (4294967291,)
    assert database.chunks_of((3, 4294967291), 1) == (1, 4294967291)
    assert database.chunks_of((1 << 33,), 4) == (1 << 29,)


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
    def full(*arguments: Any) -> None:
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device [os_error_code=28]')

    monkeypatch.setattr(writing, "_write_together", full)
    said = f"{tmp_path}/first could not be written: No space left on device. Nothing of it is left."
    with refused(sw.SaveError, said, hint="free some space, or choose a directory that can be written to"):
        sw.save(tmp_path / "first", taken({"a": jnp.ones(3)}))
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_several_nodes_is_read_by_us_and_by_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore takes longer to find a key in a larger node, so the index of thousands of arrays is many nodes."""
    monkeypatch.setitem(database._CONFIG, "max_decoded_node_bytes", 4_000)
    # In data files, and in the index itself.
    tree = {f"w{number:02}": jnp.arange(600 if number % 3 else 3) + float(number) for number in range(90)}
    state = taken(tree)
    sw.save(tmp_path / "saved", state)
    store = ts.KvStore.open({"driver": "file", "path": f"{tmp_path / 'saved'}/"}).result()
    (version,) = ts.ocdbt.dump(store).result()["versions"]
    assert version["root_height"] > 0
    files = {f"d/{file.name}" for file in (tmp_path / "saved" / "d").iterdir()}
    found = {key.split("/")[0] for key, *_ in database.places_of_values(tmp_path / "saved", files)}
    assert found == {f"leaves.{name}" for name, array in tree.items() if array.nbytes > 1024}
    assert_identical(sw.restore(tmp_path / "saved", state)[0], state)
    assert jax.tree.map(bits, restored(tmp_path / "saved")) == {"leaves": jax.tree.map(bits, tree)}
