"""Large arrays are read from their files without TensorStore, where they stand there as they are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import statewise as sw
from statewise._src.checkpoint.format.checksums import Pieces, sums_of
from statewise._src.checkpoint.orbax import read as stored
from statewise._src.checkpoint.orbax import values
from statewise._src.checkpoint.orbax.database import open_stored, reading
from statewise._src.checkpoint.orbax.values import LARGE, DiskValues

SHAPE = (1024, 260)  # a little more than `LARGE` of float32, and no multiple of what is summed at a time


def numbers(dtype: Any = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def sizes_of(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def stored_at(folder: Path, array: np.ndarray, **metadata: Any) -> ts.TensorStore:
    """Writes an array as `x` into a database, and returns it as a restore opens it."""
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": "x/"}}
    settings = {"shape": array.shape, "chunks": array.shape, "compressor": None, "dtype": array.dtype.str} | metadata
    ts.open(spec | {"metadata": settings}, create=True).result().write(array).result()
    return open_stored(reading(folder), ("x",)).result()


def read_alone(folder: Path, store: ts.TensorStore, sizes: dict[str, int] | None = None) -> values.Coming | None:
    with DiskValues(folder, sizes_of(folder) if sizes is None else sizes) as found:
        coming = found.start("x", store)
        if coming is not None:
            coming.result()
        return coming


@pytest.fixture
def through_tensorstore(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the arrays that were not read from their files."""
    keys: list[str] = []
    plain = DiskValues.start

    def noted(self: DiskValues, name: str, store: Any, part: Any = ()) -> Any:
        coming = plain(self, name, store, part)
        if coming is None:
            keys.append(name)
        return coming

    monkeypatch.setattr(DiskValues, "start", noted)
    return keys


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i2", "|u1", "<c8"])
def test_an_array_in_one_piece_is_read_with_its_sums(tmp_path: Path, dtype: str) -> None:
    array = numbers(dtype, (1024, 1040))
    coming = read_alone(tmp_path, stored_at(tmp_path, array))
    assert coming is not None
    found, sums = coming.result()
    np.testing.assert_array_equal(found, array, strict=True)
    assert sums == sums_of(array)
    assert found.ctypes.data % 64 == 0


def test_pieces_along_the_first_axis_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_RUN", 1 << 17)  # several threads for each piece
    array = numbers()
    coming = read_alone(tmp_path, stored_at(tmp_path, array, chunks=[256, 260], dimension_separator="/"))
    assert coming is not None
    np.testing.assert_array_equal(coming.array, array)
    assert coming.result()[1] == sums_of(array)


@pytest.mark.parametrize("part", [slice(0, 256), slice(512, 1024), slice(256, 512), slice(None), slice(512, None)])
def test_a_part_of_whole_chunks_is_read_alone_with_what_it_adds_to_the_sums(tmp_path: Path, part: slice) -> None:
    array = numbers()
    store = stored_at(tmp_path, array, chunks=[256, 260])
    with DiskValues(tmp_path, sizes_of(tmp_path)) as found:
        coming = found.start("x", store, (part, slice(None)))
        assert coming is not None
        read, sums = coming.result()
    np.testing.assert_array_equal(read, array[part], strict=True)
    first, last, _ = part.indices(len(array))
    assert sums == sums_of(Pieces(array.shape, (((first, 0), array[first:last]),)))


@pytest.mark.parametrize(
    "part", [(slice(0, 200), slice(None)), (slice(0, 256), slice(0, 130)), (slice(8, 8), slice(0))], ids=str
)
def test_a_part_that_chunks_hold_more_than_is_left_to_tensorstore(tmp_path: Path, part: tuple[slice, ...]) -> None:
    store = stored_at(tmp_path, numbers(), chunks=[256, 260])
    with DiskValues(tmp_path, sizes_of(tmp_path)) as found:
        assert found.start("x", store, part) is None


def test_an_index_of_many_nodes_is_searched(tmp_path: Path) -> None:
    config = {"max_inline_value_bytes": 16, "max_decoded_node_bytes": 500}
    others = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/", "config": config}).result()
    with ts.Transaction() as transaction:
        for number in range(60):
            others.with_transaction(transaction).write(f"x{number}/0.0", bytes(20)).result()
    array = numbers()
    store = stored_at(tmp_path, array)
    dumped = ts.ocdbt.dump(ts.KvStore.open(f"file://{tmp_path}/").result()).result()
    assert dumped["versions"][-1]["root_height"] > 0
    coming = read_alone(tmp_path, store)
    assert coming is not None
    np.testing.assert_array_equal(coming.array, array)


@pytest.mark.parametrize(
    "metadata",
    [
        {"compressor": {"id": "zlib", "level": 1}},
        {"order": "F"},
        {"dtype": ">f4"},
        {"chunks": [1024, 130]},
        {"chunks": [1000, 260]},
    ],
    ids=str,
)
def test_what_stands_there_in_another_way_is_left_to_tensorstore(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert read_alone(tmp_path, stored_at(tmp_path, numbers(), **metadata)) is None


@pytest.mark.parametrize("dtype", ["|b1", "float32"], ids=["bool", "small"])
def test_small_arrays_and_loose_bits_are_left_to_tensorstore(tmp_path: Path, dtype: str) -> None:
    shape = (1024, 1040) if dtype == "|b1" else (LARGE // 4 - 1,)
    assert read_alone(tmp_path, stored_at(tmp_path, numbers(dtype, shape))) is None


def test_an_array_that_claims_very_many_pieces_is_left_to_tensorstore(tmp_path: Path) -> None:
    stored_at(tmp_path, numbers())
    place = {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "y/"}
    metadata = {"shape": [1 << 50], "chunks": [1], "compressor": None, "dtype": "<f4"}
    store = ts.open({"driver": "zarr", "kvstore": place, "metadata": metadata}, create=True).result()
    with DiskValues(tmp_path, sizes_of(tmp_path)) as found:
        assert found.start("y", store) is None


def test_no_other_file_is_read(tmp_path: Path) -> None:
    store = stored_at(tmp_path, numbers())
    assert read_alone(tmp_path, store, {}) is None
    shorter = {name: size - 1 for name, size in sizes_of(tmp_path).items() if size < LARGE}
    assert read_alone(tmp_path, store, shorter) is None


def test_a_place_beyond_the_end_of_the_file_is_not_read(tmp_path: Path) -> None:
    store = stored_at(tmp_path, numbers())
    assert read_alone(tmp_path, store, dict.fromkeys(sizes_of(tmp_path), 1000)) is None


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    store, sizes = stored_at(tmp_path, numbers()), sizes_of(tmp_path)
    [data] = [name for name, size in sizes.items() if size > LARGE]
    with DiskValues(tmp_path, sizes) as found:
        assert found.start("x", store) is not None  # now it knows the places
        (tmp_path / data).write_bytes((tmp_path / data).read_bytes()[:1000])
        coming = found.start("x", store)
        assert coming is not None
        with pytest.raises(EOFError, match="ends before byte"):
            coming.result()


# --- in a restore ------------------------------------------------------------------------------------------------


def test_a_restore_reads_large_arrays_from_their_files(tmp_path: Path, through_tensorstore: list[str]) -> None:
    arrays = {"large": numbers(), "half": numbers(jnp.bfloat16, (1024, 520)), "small": numbers(shape=(3,))}
    model = nnx.Dict(**{name: nnx.Param(jnp.asarray(array)) for name, array in arrays.items()})
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    restored, _ = sw.restore(tmp_path / "first", sw.plan(model).abstract())
    assert through_tensorstore == ["small"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored["params"][name], array, strict=True)


def test_a_sharded_array_is_read_from_its_file(tmp_path: Path, through_tensorstore: list[str]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.device_put(numbers(), NamedSharding(mesh, PartitionSpec("data")))
    model = nnx.Dict(x=nnx.Param(array))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    restored, _ = sw.restore(tmp_path / "first", state)
    assert through_tensorstore == []
    np.testing.assert_array_equal(restored["params"]["x"], numbers())
    assert restored["params"]["x"].sharding == array.sharding


def test_a_restored_array_can_be_donated(tmp_path: Path) -> None:
    model = nnx.Dict(x=nnx.Param(jnp.asarray(numbers())))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    restored, _ = sw.restore(tmp_path / "first", state)
    more = jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)(restored)
    np.testing.assert_array_equal(more["params"]["x"], numbers() + 1)


@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_a_flipped_bit_of_a_large_array_is_found(tmp_path: Path, place: float) -> None:
    model = nnx.Dict(x=nnx.Param(jnp.asarray(numbers())), y=nnx.Param(jnp.ones(3)))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    [data] = [path for path in (tmp_path / "first").rglob("*") if path.is_file() and path.stat().st_size > LARGE]
    content, array = bytearray(data.read_bytes()), numbers().tobytes()
    content[content.index(array) + int(place * (len(array) - 1))] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(sw.CorruptedError, match="not what was saved") as caught:
        sw.restore(tmp_path / "first", state)
    assert [leaf.path for leaf in caught.value.leaves] == [("x",)]


def test_a_large_array_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.Dict(x=nnx.Param(jnp.asarray(numbers())))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    [data] = [path for path in (tmp_path / "first").rglob("*") if path.is_file() and path.stat().st_size > LARGE]
    plain = stored.open_stored

    def shortened(*arguments: Any) -> Any:
        data.write_bytes(data.read_bytes()[:1000])  # after the files were compared with the manifest
        return plain(*arguments)

    monkeypatch.setattr(stored, "open_stored", shortened)
    with pytest.raises(sw.CorruptedError, match="cannot be read") as caught:
        sw.restore(tmp_path / "first", state)
    assert [leaf.path for leaf in caught.value.leaves] == [("x",)]
