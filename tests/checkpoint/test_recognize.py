"""Files of other formats: each is called what it is, and what is said to help does."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx

import statewise as sw
from disagreeing import state_of
from refusals import refused
from statewise._src.checkpoint.interop.recognize import recognized

READ = "what can be read: a checkpoint of Statewise or of Orbax (its directory), or a .safetensors file"
AS_DICT = "read it into nested dicts of arrays, and: sw.convert(arrays, 'converted', target=target)"
UNPACK = "unpack it, and give what is in it"
PICKLE = (
    "it is not read, because a pickle can run any code; write its arrays as safetensors with the program that it is "
    "from: safetensors.torch.save_file(tensors, 'model.safetensors'), or safetensors.numpy"
)
# Of torch.save: first the zip of today, then the plain pickle of before.
TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def zipped(*names: str) -> Callable[[pathlib.Path], None]:
    def write(path: pathlib.Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")

    return write


def tarred(path: pathlib.Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(os.devnull, "x")


def written(data: bytes) -> Callable[[pathlib.Path], None]:
    return lambda path: path.write_bytes(data) and None


FILES: list[tuple[str, Callable[[pathlib.Path], None], str, str]] = [
    ("config.json", written(b'{"hidden": 3}'), "a JSON file", READ),
    ("list.json", written(b" [1, 2]"), "a JSON file", READ),
    ("broken.json", written(b'{"hidden": '), "a text file", READ),
    ("notes.txt", written("caf\u00e9\n".encode()), "a text file", READ),
    ("cut.txt", written(b"x" * 4095 + "\u00e9".encode()), "a text file", READ),
    ("nothing", written(b""), "an empty file", READ),
    ("noise", written(b"\xff\xfe\x00\x01" * 9), "a file in an unknown format", READ),
    ("model.pkl", written(pickle.dumps({"w": 1})), "a pickle", PICKLE),
    ("old.pt", written(TORCH), "a pickle", PICKLE),
    ("model.pt", zipped("model/data.pkl", "model/data/0"), "a PyTorch file, which holds a pickle", PICKLE),
    ("model.keras", zipped("config.json", "model.weights.h5"), "a Keras file", AS_DICT),
    ("some.zip", zipped("a"), "a zip archive", UNPACK),
    ("broken.zip", written(b"PK\x03\x04...."), "a zip archive", UNPACK),
    ("some.tar", tarred, "a tar archive", UNPACK),
    ("some.gz", written(gzip.compress(b"x")), "a gzip archive", UNPACK),
    ("some.zst", written(b"\x28\xb5\x2f\xfd\x00"), "a zstd archive", UNPACK),
    ("model.h5", written(b"\x89HDF\r\n\x1a\n\x00"), "an HDF5 file", AS_DICT),
    ("model.gguf", written(b"GGUF\x03\x00"), "a GGUF file", AS_DICT),
    # What stands under the name of what was wanted.
    (
        "lfs.safetensors",
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a Git LFS pointer instead of the file itself",
        "git lfs pull",
    ),
    (
        "page.safetensors",
        written(b"\n<!doctype HTML><html>"),
        "an HTML page",
        "fetch the file itself: this is a page about it, or about an error",
    ),
    ("named.safetensors", written(b'{"error": "not found"}'), "a JSON file", READ),
]


@pytest.mark.parametrize(
    ("name", "write", "what", "hint"), FILES, ids=lambda value: value if type(value) is str else ""
)
def test_a_file_of_another_format_is_called_what_it_is_and_not_corrupted(
    tmp_path: pathlib.Path, name: str, write: Callable[[pathlib.Path], None], what: str, hint: str
) -> None:
    path, target = tmp_path / name, state_of(w=nnx.Param(jnp.ones(2)))
    write(path)
    for look in (
        lambda: sw.restore(path, target),
        lambda: sw.preview(path, target),
        lambda: sw.diff(path, target),
    ):
        with refused(sw.RestoreError, f"{path} is not a checkpoint of Statewise, but {what}.", hint=hint):
            look()
    for look in (
        lambda: sw.convert(path, tmp_path / "made", target=target),
        lambda: sw.convert(path, None, to="linen"),
        lambda: sw.inspect(path),
        lambda: sw.report(path),
    ):
        with refused(sw.RestoreError, f"{path} is not a checkpoint, but {what}.", hint=hint):
            look()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["statewise.json", "_METADATA", "manifest.ocdbt"])
def test_of_a_file_in_a_checkpoint_the_directory_is_named(tmp_path: pathlib.Path, name: str) -> None:
    state = state_of(w=nnx.Param(jnp.ones(2)))
    sw.save(tmp_path / "run", state)
    path = tmp_path / "run" / name
    what = "the manifest of one" if name == "statewise.json" else "a file of an Orbax checkpoint"
    hint = f"the directory that it is in: '{tmp_path}/run'"
    with refused(sw.RestoreError, f"{path} is not a checkpoint of Statewise, but {what}.", hint=hint):
        sw.restore(path, state)
    with refused(sw.RestoreError, f"{path} is not a checkpoint, but {what}.", hint=hint):
        sw.inspect(path)
    assert sw.restore(eval(hint.removeprefix("the directory that it is in: ")), state)[1].ok


# --- what is said to help, done ------------------------------------------------------------------------------------

ARRAYS = {"a.w": jnp.arange(6.0).reshape(2, 3), "a.b": jnp.full(3, 0.5, jnp.bfloat16)}


def target_of() -> sw.State:
    return state_of(a=nnx.Dict(w=nnx.Param(jnp.zeros((2, 3))), b=nnx.Param(jnp.zeros(3, jnp.bfloat16))))


def done(code: str, target: sw.State, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> sw.State:
    """Runs a hint whose last line converts and restores, and gives what came back."""
    monkeypatch.chdir(folder)
    modules = {"np": np, "json": json, "os": os, "pathlib": pathlib, "flax": flax, "safetensors": safetensors}
    scope = {"sw": sw, "target": target, **modules}
    exec(code, scope)
    return sw.restore("converted", target)[0]


def test_a_safetensors_file_is_converted_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "model.safetensors", target_of()
    safetensors.flax.save_file(ARRAYS, path)
    hint = f"sw.convert({str(path)!r}, 'converted', target=target); sw.restore('converted', target)"
    with refused(sw.RestoreError, f"{path} is not a checkpoint of Statewise, but a safetensors file.", hint=hint):
        sw.restore(path, target)
    restored = done(hint, target, monkeypatch, tmp_path)
    assert np.array_equal(restored["params"]["a"]["w"], ARRAYS["a.w"])


@pytest.mark.parametrize("given", ["index", "folder"])
def test_the_files_that_an_index_names_are_read_together(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    folder, target = tmp_path / "it's a model", target_of()
    folder.mkdir()
    for number, (name, array) in enumerate(ARRAYS.items()):
        safetensors.flax.save_file({name: array}, folder / f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"model-{at}.safetensors" for at, name in enumerate(ARRAYS)}}))
    path = index if given == "index" else folder
    with pytest.raises(sw.StatewiseError) as caught:
        sw.restore(path, target)
    assert ("the index of a checkpoint in several" if given == "index" else f"holds {index.name}") in str(caught.value)
    by_names, _, by_ours = (caught.value.hint or "").partition("\nor, if they have the names of ours: ")
    restored = done(by_ours, target, monkeypatch, tmp_path)
    assert np.array_equal(restored["params"]["a"]["w"], ARRAYS["a.w"])
    assert np.array_equal(restored["params"]["a"]["b"], ARRAYS["a.b"])
    names = sw.Names({name.replace(".", "/"): name for name in ARRAYS})
    restored, _ = eval(by_names.partition("  #")[0], {"sw": sw, "names": names, "target": target})
    assert np.array_equal(restored["params"]["a"]["w"], ARRAYS["a.w"])


def test_a_folder_with_a_safetensors_file_says_how_it_is_read(tmp_path: pathlib.Path) -> None:
    safetensors.flax.save_file(ARRAYS, tmp_path / "model.safetensors")
    hint = (
        f"sw.restore('{tmp_path}', target, names=names)  # sw.Names, which say what our leaves are called there\n"
        f"or, if they have the names of ours: sw.convert('{tmp_path}', 'converted', target=target); "
        "sw.restore('converted', target)"
    )
    target = target_of()
    message = f"{tmp_path} is not a checkpoint of Statewise: it has no statewise.json, but it holds model.safetensors."
    with refused(sw.CorruptedError, message, hint=hint):
        sw.restore(tmp_path, target)
    tree = sw.convert(tmp_path, None, to="linen", target=target).tree
    assert np.array_equal(tree["params"]["a"]["w"], ARRAYS["a.w"])


def npz(path: pathlib.Path) -> None:
    np.savez(path, **{"a/w": np.asarray(ARRAYS["a.w"])})


def npy(path: pathlib.Path) -> None:
    np.save(path, np.asarray(ARRAYS["a.w"]))


def msgpack(path: pathlib.Path) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize({"a": {"w": np.asarray(ARRAYS["a.w"])}}))


@pytest.mark.parametrize(
    ("name", "write", "what"),
    [
        ("model.npz", npz, "a NumPy .npz file"),
        ("model.npy", npy, "a NumPy .npy file"),
        ("flax_model.msgpack", msgpack, "a msgpack file"),
    ],
)
def test_the_arrays_of_numpy_and_of_flax_are_converted_as_dicts(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[pathlib.Path], None],
    what: str,
) -> None:
    path, target = tmp_path / name, state_of(a=nnx.Dict(w=nnx.Param(jnp.zeros((2, 3)))))
    write(path)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(path, target)
    assert caught.value.message == f"{path} is not a checkpoint of Statewise, but {what}."
    code = (caught.value.hint or "").replace("path/of/the/leaf", "a/w")
    restored = done(code, target, monkeypatch, tmp_path)
    assert np.array_equal(restored["params"]["a"]["w"], ARRAYS["a.w"])


def test_what_safetensors_wrote_is_not_taken_for_another_format(tmp_path: pathlib.Path) -> None:
    """Its first bytes are a length, which may be those of a pickle or an archive."""
    path = tmp_path / "x"
    for length in (0x0280, 0x0380, 0x8B1F, 0x7D0280):
        path.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 99)
        assert recognized(path).what == "a safetensors file"
    for length in range(9):
        path.write_bytes((0x0280).to_bytes(8, "little")[:length])
        assert not recognized(path).certain


def test_nothing_of_a_pickle_is_run(tmp_path: pathlib.Path) -> None:
    class Rule:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Rule()))
    with pytest.raises(sw.RestoreError, match="a pickle"):
        sw.inspect(tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["model.pt"]
