"""`names=`: files that are wrong are all named at once, and nothing outside of a folder is opened."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import statewise as sw
from named_models import INDEX, NAMES, Net, check_read, folder_of, theirs
from refusals import refused


def of_header(path: Path, facts: dict[str, Any], nbytes: int = 8) -> Path:
    header = json.dumps(facts).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))
    return path


def test_every_file_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    """Missing, cut off, a header of a gigabyte, overlapping ranges, an invented dtype, links, a directory, a pipe."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    outside = of_header(tmp_path / "outside.safetensors", {"w": one})
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "cut.safetensors").write_bytes(outside.read_bytes()[:-1])
    (folder / "large.safetensors").write_bytes(struct.pack("<Q", 1 << 30) + b"{")
    os.truncate(folder / "large.safetensors", (1 << 30) + 8)  # a hole
    of_header(folder / "overlap.safetensors", {"a": one, "b": one | {"data_offsets": [4, 12]}}, 12)
    of_header(folder / "invented.safetensors", {"a": one | {"dtype": "F33"}})
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "up.safetensors").symlink_to("../outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    files = ["gone", "cut", "large", "overlap", "invented", "link", "up", "folder", "pipe"]
    for has_index in (False, True):
        if has_index:
            owner = {f"array.{name}": f"{name}.safetensors" for name in files}
            (folder / INDEX).write_text(json.dumps({"weight_map": owner}))
        with pytest.raises(sw.CorruptedError) as caught:
            NAMES.check(sw.plan(Net()), folder)
        message = caught.value.message
        assert ("its index names gone.safetensors, which is not there" in message) is has_index
        for name in ("cut", "large", "overlap", "invented"):
            assert f"{folder}/{name}.safetensors is corrupted, or not a safetensors file" in message
        for name in ("link", "up"):
            assert f"{name}.safetensors is a link to a file outside of the folder" in message
        for name in ("folder", "pipe"):
            assert f"{name}.safetensors is not a file" in message
        assert caught.value.hint == (
            "fetch the folder again; or say which files are meant: "
            "sw.restore(['a.safetensors', 'b.safetensors'], target, names=names)"
        )


def test_nothing_outside_of_a_folder_is_opened(tmp_path: Path) -> None:
    arrays = theirs()
    real = folder_of(tmp_path / "real", arrays)
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(real / "model.safetensors")
    opened: list[str] = []
    is_on = True  # a hook cannot be taken away
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if is_on and event == "open" else None)
    with pytest.raises(sw.CorruptedError):
        NAMES.check(sw.plan(Net()), folder)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).symlink_to(real / "model.safetensors")
    with pytest.raises(sw.CorruptedError, match="is a link to a file outside of the folder"):
        NAMES.check(sw.plan(Net()), folder)
    is_on = False
    # That there is no index is known from the attempt to open it.
    assert [name for name in opened if name.startswith((str(real), str(folder)))] == [str(folder / INDEX)]


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    arrays = theirs()
    real = folder_of(tmp_path / "real", arrays, 2)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    target = sw.plan(Net()).take(Net())
    check_read(sw.restore(snapshot, target, names=NAMES)[0], arrays)


def test_a_dtype_that_jax_lacks_is_a_problem_of_the_leaf(tmp_path: Path) -> None:
    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    path = of_header(tmp_path / "x.safetensors", {"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, 2)
    for cast in (False, True):
        report = sw.preview(path, sw.plan(model).take(model), names=sw.Names({"kernel": "w"}), cast=cast)
        assert [leaf.note.split(",")[0] for leaf in report.problems] == ["is F4 in the checkpoint"]


def test_several_files_are_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    gone = tmp_path / "gone.safetensors"
    for read in (sw.inspect, lambda path: NAMES.check(sw.plan(Net()), path)):
        with refused(
            sw.RestoreError,
            f"There is no file at {gone}, {folder}.",
            hint="sw.restore(['a.safetensors', 'b.safetensors'], target, names=names); or one folder",
        ):
            read([gone, folder / "model.safetensors", folder])
    other = of_header(tmp_path / "x", {"model.norm.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    with refused(
        sw.CorruptedError,
        f"The files do not belong together: model.norm.bias is in {folder}/model.safetensors and in {other}.",
        hint="fetch them again",
    ):
        sw.inspect((folder / "model.safetensors", other))
    cut = [tmp_path / "cut", tmp_path / "cut2"]
    for place in cut:
        place.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(sw.CorruptedError) as caught:
        sw.inspect([*cut, other])
    for place in cut:
        assert f"{place} is corrupted, or not a safetensors file" in caught.value.message
    assert caught.value.message.startswith("2 files are not what was written: ")
    with pytest.raises(sw.CorruptedError, match=r"cut is corrupted, or not a safetensors file"):
        sw.inspect([cut[0], other])
