"""What others wrote: opened by its metadata alone, read exactly, and refused in words where it is corrupted."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp_v1

import statewise as sw
from refusals import refused
from statewise._src.checkpoint.interop.foreign import is_foreign, open_path
from statewise._src.checkpoint.interop.sources import open_mapping

TREE = {
    "layers": {"0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}},
    "step": jnp.array(7, jnp.int32),
}
NAMES = ["layers/0/bias", "layers/0/kernel", "step"]
DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


def same(found: dict[str, np.ndarray]) -> bool:
    """Whether these are the arrays of `TREE`."""
    expected = dict(zip(NAMES, jax.tree.leaves(TREE), strict=True))
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], np.asarray(array))
        for name, array in expected.items()
    )


# --- Orbax -----------------------------------------------------------------------------------------------------


def by_standard_checkpointer(folder: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "made", TREE)
    return folder / "made"


def by_checkpointer_of_trees(folder: Path) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "made", args=ocp.args.PyTreeSave(TREE))
    return folder / "made"


def by_the_older_format(folder: Path) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder / "made", args=ocp.args.PyTreeSave(TREE))
    return folder / "made"


def by_manager(folder: Path) -> Path:
    with ocp.CheckpointManager(folder / "made") as manager:
        manager.save(3, args=ocp.args.StandardSave(TREE))
    return folder / "made" / "3"


def by_manager_beside_metrics(folder: Path) -> Path:
    with ocp.CheckpointManager(folder / "made") as manager:
        items = ocp.args.Composite(model=ocp.args.StandardSave(TREE), metrics=ocp.args.JsonSave({"loss": 1.0}))
        manager.save(3, args=items)
    return folder / "made" / "3"


def by_version_1(folder: Path) -> Path:
    ocp_v1.save(folder / "made", TREE)
    return folder / "made"


WRITERS = [
    by_standard_checkpointer,
    by_checkpointer_of_trees,
    by_the_older_format,
    by_manager,
    by_manager_beside_metrics,
    by_version_1,
]


@pytest.mark.parametrize("write", WRITERS)
def test_what_orbax_wrote_is_read_exactly(write: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_path(write(tmp_path))
    assert source.format == "orbax"
    assert sorted(entry.name for entry in source.entries) == NAMES
    assert same(source.read(NAMES))


def test_what_was_saved_from_a_mesh_is_read_whole(tmp_path: Path, devices: list[jax.Device]) -> None:
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    array = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.NamedSharding(mesh, jax.P("data")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "made", {"w": array})
    assert np.array_equal(open_path(tmp_path / "made").read(["w"])["w"], array)


def test_lists_tuples_and_numbers_are_read_and_texts_named(tmp_path: Path) -> None:
    tree = {"a": [jnp.ones(2), {"b": np.float32(3)}], "t": (jnp.zeros(2), 5), "text": "hello", "none": None, "e": {}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "made", args=ocp.args.PyTreeSave(tree))
    source = open_path(tmp_path / "made")
    assert [entry.name for entry in source.entries] == ["a/0", "a/1/b", "t/0", "t/1"]
    assert source.others == ("text",)
    assert {name: array.tolist() for name, array in source.read(["t/1", "a/1/b"]).items()} == {"t/1": 5, "a/1/b": 3.0}


def test_only_the_arrays_that_are_asked_for_are_read(tmp_path: Path) -> None:
    source = open_path(by_standard_checkpointer(tmp_path))
    assert list(source.read(["step"])) == ["step"]
    assert source.read([]) == {}


def test_inspect_reads_no_array_of_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = by_standard_checkpointer(tmp_path)
    monkeypatch.delattr(ocp.PyTreeCheckpointHandler, "restore")
    census = sw.inspect(path)
    assert list(census) == ["arrays"]
    assert (census.total.leaves, census.total.size, census.total.nbytes) == (3, 10, 34)


def test_inspect_counts_linen_variables_by_collection(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        variables = {"params": {"dense": {"kernel": jnp.ones((2, 3))}}, "batch_stats": {"norm": {"mean": jnp.ones(3)}}}
        checkpointer.save(tmp_path / "made", variables)
    census = sw.inspect(tmp_path / "made")
    assert {kind: census[kind].size for kind in census} == {"params": 6, "batch_stats": 3}


def test_a_checkpoint_of_statewise_is_not_foreign(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, sw.plan(model).take(model))
        checkpoints.wait()
        path = Path(checkpoints.path(1))
    assert not is_foreign(path)
    assert not is_foreign(path.parent)
    assert not is_foreign(tmp_path / "nothing")


def test_a_folder_of_steps_is_refused_with_the_newest(tmp_path: Path) -> None:
    folder = by_manager(tmp_path).parent
    with refused(
        sw.RestoreError, f"{folder} holds several steps.", hint=f"the path of one of them: {str(folder / '3')!r}"
    ):
        open_path(folder)


def test_a_step_of_several_trees_is_refused_with_their_names(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "made") as manager:
        manager.save(3, args=ocp.args.Composite(one=ocp.args.StandardSave(TREE), two=ocp.args.StandardSave(TREE)))
    folder = tmp_path / "made" / "3"
    with refused(
        sw.RestoreError,
        f"{folder} holds several items: one, two.",
        hint=f"the path of one of them: {str(folder / 'one')!r}",
    ):
        open_path(folder)


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with refused(
        sw.RestoreError,
        f"{tmp_path} is not a checkpoint in a known format: it has neither statewise.json nor Orbax's _METADATA.",
        hint="a checkpoint of Statewise, a plain Orbax checkpoint, or a .safetensors file",
    ):
        open_path(tmp_path)


def test_what_is_no_path_is_refused() -> None:
    with refused(sw.RestoreError, "int is not a path.", hint="sw.restore('run/step_100', target)"):
        sw.inspect(3)


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = by_standard_checkpointer(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert sw.inspect(path.name) == sw.inspect(path)


def test_nothing_is_refused(tmp_path: Path) -> None:
    with refused(
        sw.RestoreError,
        f"There is nothing at {tmp_path / 'nothing'}.",
        hint="the path of a checkpoint's directory, or of a .safetensors file",
    ):
        open_path(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tree_metadata": 3}', "\0" * 100, "[" * 100_000])
def test_orbax_metadata_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    path = by_standard_checkpointer(tmp_path)
    (path / "_METADATA").write_text(text)
    for look in (open_path, sw.inspect):
        with pytest.raises(sw.CorruptedError) as caught:
            look(path)
        assert caught.value.message.startswith(f"{path} is corrupted: Orbax cannot read its metadata: ")
        assert caught.value.hint == "convert another checkpoint"


def test_orbax_arrays_that_are_gone_are_damage(tmp_path: Path) -> None:
    path = by_standard_checkpointer(tmp_path)
    source = open_path(path)
    for file in path.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(sw.CorruptedError) as caught:
        source.read(["layers/0/kernel"])  # of several, Orbax would leave those behind that it still waits for
    assert caught.value.message.startswith(f"{path} is corrupted: Orbax cannot read its arrays: ")
    assert "\n" not in caught.value.message


# --- safetensors -----------------------------------------------------------------------------------------------


def test_every_dtype_of_safetensors_is_read_exactly(tmp_path: Path) -> None:
    arrays = {name: np.arange(4).reshape(2, 2).astype(jnp.dtype(name)) for name in DTYPES}
    safetensors.numpy.save_file(arrays, tmp_path / "made.safetensors")
    source = open_path(tmp_path / "made.safetensors")
    assert sorted((entry.name, entry.dtype, entry.shape) for entry in source.entries) == sorted(
        (name, name, (2, 2)) for name in DTYPES
    )
    read = source.read(DTYPES)
    assert all(read[name].dtype == jnp.dtype(name) for name in DTYPES)
    assert all(read[name].tobytes() == arrays[name].tobytes() for name in DTYPES)


def test_scalars_and_arrays_without_elements_are_read(tmp_path: Path) -> None:
    safetensors.flax.save_file({"empty": jnp.zeros((0, 3)), "one": jnp.array(2.5)}, tmp_path / "made.safetensors")
    read = open_path(tmp_path / "made.safetensors").read(["empty", "one"])
    assert (read["empty"].shape, read["one"].shape, float(read["one"])) == ((0, 3), (), 2.5)


def file_of(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file in the form of safetensors, of a header that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_inspect_reads_no_array_of_safetensors(tmp_path: Path) -> None:
    size = 1 << 40  # a terabyte that is not there: the file has a hole
    facts = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    path = file_of(tmp_path / "large.safetensors", {"weights": facts})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    census = sw.inspect(path)
    assert list(census) == ["arrays"]
    assert census.total.nbytes == size


def test_a_file_cut_off_anywhere_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    safetensors.flax.save_file({"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(sw.CorruptedError) as caught:
            open_path(path)
        assert caught.value.message.startswith(f"{path} is corrupted, or not a safetensors file: ")


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": ONE}, bytes(9), "incomplete metadata, file not fully covered"),
        ({"a": ONE | {"shape": [3]}}, bytes(8), "invalid shape, data type, or offset for tensor"),
        ({"a": ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(8), "overflow computing buffer size"),
        ({"a": ONE | {"shape": [-2]}}, bytes(8), "invalid JSON in header"),
        ({"a": ONE | {"dtype": "F33"}}, bytes(8), "invalid JSON in header"),
        ({"a": ONE | {"data_offsets": [0, 1 << 60]}}, bytes(8), ""),
        ({"a": ONE, "b": ONE}, bytes(8), "invalid offset for tensor"),
        ({"a": ONE, "__metadata__": {"x": 3}}, bytes(8), "invalid JSON in header"),
        ([], b"", "invalid JSON in header"),
        (b"[" * 50_000, b"", "invalid JSON in header"),
        (b"\xff\xfe", b"", ""),
    ],
)
def test_a_header_that_lies_is_damage(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = file_of(tmp_path / "made.safetensors", header, data)
    for look in (open_path, sw.inspect):
        with pytest.raises(sw.CorruptedError) as caught:
            look(path)
        assert caught.value.message.startswith(f"{path} is corrupted, or not a safetensors file: ")
        assert says in caught.value.message
        assert caught.value.hint == (
            "fetch or write it again; sw.convert reads checkpoints of Statewise, of Orbax, and .safetensors files"
        )


def test_a_header_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    path = file_of(tmp_path / "made.safetensors", {}, length=1 << 62)
    with pytest.raises(sw.CorruptedError, match="header too large"):
        open_path(path)


def test_a_text_file_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello, this is no checkpoint")
    with pytest.raises(sw.RestoreError, match=r"notes.txt is not a checkpoint, but a text file"):
        sw.inspect(path)


def test_a_file_that_became_shorter_is_damage(tmp_path: Path) -> None:
    path = file_of(tmp_path / "made.safetensors", {"a": ONE}, bytes(8))
    source = open_path(path)
    path.write_bytes(path.read_bytes()[:-4])
    with refused(sw.CorruptedError, f"{path} is corrupted: it has become shorter.", hint="fetch or write it again"):
        source.read(["a"])


@pytest.mark.parametrize(
    "told", ["", "{", "[]", '{"leaves": 3}', '{"leaves": {"a": 3}}', '{"leaves": {"a": {"kind": 3}}}', "[" * 100_000]
)
def test_odd_words_of_a_file_about_its_leaves_are_passed_over(tmp_path: Path, told: str) -> None:
    path = file_of(tmp_path / "made.safetensors", {"a": ONE, "__metadata__": {"statewise": told}}, bytes(8))
    assert list(sw.inspect(path)) == ["arrays"]


def test_a_dtype_that_jax_lacks_is_shown_by_its_name(tmp_path: Path) -> None:
    path = file_of(
        tmp_path / "made.safetensors", {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2)
    )
    assert sw.inspect(path).total.dtypes == {"F4": 1}


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path / "made.safetensors", {"a": ONE}, bytes(8))
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with refused(
        sw.StatewiseError,
        "safetensors files need the package safetensors, which is not installed.",
        hint="pip install 'statewise[safetensors]'",
    ):
        open_path(path)


# --- nested dicts ----------------------------------------------------------------------------------------------


def test_boxes_variables_and_keys_are_unpacked() -> None:
    key = jax.random.key(3)
    boxed = nnx.bridge.variables.NNXMeta(nnx.Param, jnp.ones(2), {})
    source = open_mapping({"a": boxed, "b": nnx.Param(jnp.zeros(3)), "c": [key, None, 4]})
    assert [(entry.name, entry.shape, entry.dtype) for entry in source.entries] == [
        ("a", (2,), "float32"),
        ("b", (3,), "float32"),
        ("c/0", (2,), "uint32"),
        ("c/2", (), "int64"),
    ]
    assert np.array_equal(source.read(["c/0"])["c/0"], jax.random.key_data(key))


def test_what_is_no_array_is_refused() -> None:
    with refused(
        sw.StructureError,
        "Only arrays and numbers can be converted.",
        leaves=["a/b: str- -  (holds str)", "c: object- -  (holds object)"],
        hint="take it out of the dict: rename={name: None} leaves out arrays only",
    ):
        open_mapping({"a": {"b": "text"}, "c": object()})


def test_shapes_have_no_values_to_read() -> None:
    source = open_mapping({"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jnp.ones(2)})
    with refused(
        sw.StructureError,
        "The source is abstract: it has shapes but no values to convert.",
        leaves=["a: Array(2,) float32  (has no values)"],
        hint="sw.convert(..., dry_run=True), or variables with values",
    ):
        source.read(["a", "b"])
