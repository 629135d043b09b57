"""`names=` with hostile arguments, files and models: an error that says why, and no wrong number."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from named_models import NAMES, Net, check_read, folder_of, theirs
from refusals import refused
from statewise._src.names.template import Template


def file_of(path: Path, dtype: str, shape: list[int], content: bytes) -> Path:
    """A file with one array, w."""
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


class One(nnx.Module):
    def __init__(self, value: Any) -> None:
        self.w = nnx.Param(jnp.asarray(value))


def test_names_without_placeholders_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compared with each row: of 10,000 arrays that fit no leaf, the check would take minutes."""
    model = nnx.List([nnx.Param(jnp.zeros(())) for _ in range(3)])
    arrays = {f"w.{number}": np.zeros((), np.float32) for number in range(3)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    names = sw.Names({"0": "w.1", "1": "w.2", "2": "w.3", "9": "w.0"})
    monkeypatch.delattr(Template, "match")
    report = names.check(sw.plan(model), tmp_path)
    assert [leaf.note for leaf in report.problems] == [
        "the source has no w.3",
        "is in the files, and the row '9' matches no leaf for it",
    ]


def test_the_names_of_a_model_are_not_those_of_several_objects(tmp_path: Path) -> None:
    """The hint is code that helps."""
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    plan = sw.plan(model, optimizer)
    folder = folder_of(tmp_path / "theirs", theirs())
    report = NAMES.check(plan, folder)
    hint = report.hints[0]
    assert hint == (
        "the names are of '0', one of several objects in the plan: "
        "sw.Names({f'0/{path}': name for path, name in names.items()})"
    )
    assert len(report.hints) == 2  # once, and that the model is smaller than the files
    state = plan.take(model, optimizer)
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert(state, tmp_path / "published", names=NAMES)
    assert caught.value.hint == hint
    names = eval(hint.partition("plan: ")[2], {"sw": sw, "names": NAMES})
    assert names.check(plan, folder).ok


def test_a_name_that_is_nearly_there_is_in_the_hint(tmp_path: Path) -> None:
    """Misspelled, and numbers with leading zeros."""
    folder = folder_of(tmp_path / "theirs", theirs())
    report = sw.Names(dict(NAMES) | {"norm/bias": "model.norm.biases"}).check(sw.plan(Net()), folder)
    assert report.hints == (
        "names.check(plan, path) lists what it has",
        "'model.norm.bias' is there, and no leaf is read from it: is it what 'model.norm.biases' should be?",
    )
    safetensors.numpy.save_file(
        {f"layers.{number:02}.w": np.zeros(2, np.float32) for number in range(12)}, tmp_path / "x.safetensors"
    )
    names = sw.Names({"w": "layers.{i}.w"})
    report = names.check(sw.plan(One(jnp.zeros((12, 2)))), tmp_path / "x.safetensors")
    assert [leaf.note for leaf in report.problems] == ["the source has no layers.0.w and 9 more"]
    hint = "'layers.00.w' is there, and no leaf is read from it: is it what 'layers.0.w' should be?"
    assert report.hints[1] == hint


def test_a_tied_leaf_has_one_layout(tmp_path: Path) -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros((2, 2)))
            self.also = self.w

    safetensors.numpy.save_file({"e": np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    names = sw.Names({"w": "e", "also": sw.Name("e", "a b -> b a")})
    report = names.check(sw.plan(Tied()), tmp_path / "x.safetensors")
    assert [leaf.note for leaf in report.problems] == ["is e by two of its paths, also and w, in two layouts"]
    assert report.hints == ("the same pattern in both rows, or one row",)
    same = sw.Names({"w": "e", "also": "e"})
    assert same.check(sw.plan(Tied()), tmp_path / "x.safetensors").ok


def test_bytes_that_are_not_a_bool_are_refused(tmp_path: Path) -> None:
    """XLA would compute with them: the byte 2 is neither equal to True nor to False."""
    model = One([True, False, True])
    target, names = sw.plan(model).take(model), sw.Names({"w": "w"})
    good = file_of(tmp_path / "good.safetensors", "BOOL", [3], b"\0\1\1")
    state, _ = sw.restore(good, target, names=names)
    assert state["params"]["w"][...].tolist() == [False, True, True]
    bad = file_of(tmp_path / "bad.safetensors", "BOOL", [3], b"\0\1\2")
    with refused(
        sw.CorruptedError,
        f"{bad} is corrupted: w has bytes that are not a bool.",
        hint="fetch or write it again",
    ):
        sw.restore(bad, target, names=names)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 2), ("I8", 4)])
def test_a_cast_that_is_impossible_is_not_the_hint(tmp_path: Path, dtype: str, nbytes: int, cast: bool) -> None:
    model = One(jnp.zeros((2, 2)))
    path = file_of(tmp_path / "x.safetensors", dtype, [2, 2], bytes(nbytes))
    report = sw.preview(path, sw.plan(model).take(model), names=sw.Names({"w": "w"}), cast=cast)
    assert report.hints == ("plan the model with the dtype that was saved, restore, and convert it yourself",)


def test_a_dtype_that_jax_lacks_is_not_compared(tmp_path: Path) -> None:
    model = One(jnp.zeros((2, 2)))
    state, names = sw.plan(model).take(model), sw.Names({"w": "w"})
    path = file_of(tmp_path / "x.safetensors", "F4", [2, 2], b"\0\0")
    other = file_of(tmp_path / "y.safetensors", "F4", [2, 2], b"\0\1")
    hint = "files in a dtype that JAX has, such as bfloat16 or float8_e4m3fn"
    for first, second, options, leaf in (
        (path, state, {"names": names}, "w: Array(2, 2) F4  (is F4)"),
        (path, other, {}, "w: Array(2, 2) F4  (is F4)"),
    ):
        with refused(
            sw.RestoreError, f"{path} cannot be compared: 1 leaf has a dtype that JAX lacks.", hint=hint, leaves=[leaf]
        ):
            sw.diff(first, second, **options)


def test_a_path_at_which_there_is_nothing_is_not_called_another_mistake(tmp_path: Path) -> None:
    state = sw.plan(Net()).take(Net())
    for first, second in ((tmp_path / "nothing", state), (state, tmp_path / "nothing")):
        with pytest.raises(sw.RestoreError, match=r"There is nothing at .*nothing\."):
            sw.diff(first, second, names=NAMES)


def test_a_mapping_is_not_a_path_and_is_converted(tmp_path: Path) -> None:
    arrays: Any = theirs()
    plan = sw.plan(Net())
    target = plan.take(Net())
    hint = "sw.convert(arrays, 'run/converted', target=target, names=names)"
    for read in (
        lambda: NAMES.check(plan, arrays),
        lambda: sw.restore(arrays, target, names=NAMES),
        lambda: sw.preview(arrays, target, names=NAMES),
        lambda: sw.Names.infer(plan, arrays),
    ):
        with refused(sw.RestoreError, "A mapping of arrays is not the path of files.", hint=hint):
            read()
    sw.convert(arrays, tmp_path / "converted", target=target, names=NAMES)  # as the hint says
    check_read(sw.restore(tmp_path / "converted", target)[0], arrays)


def test_a_folder_with_the_same_arrays_twice_says_what_to_give(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(sw.CorruptedError) as caught:
        NAMES.check(sw.plan(Net()), folder)
    assert "model.norm.bias is in model.fp16.safetensors and in model.safetensors" in caught.value.message
    assert caught.value.hint == (
        "fetch the folder again; or say which files are meant: "
        "sw.restore(['a.safetensors', 'b.safetensors'], target, names=names)"
    )
    assert NAMES.check(sw.plan(Net()), [folder / "model.safetensors"]).ok


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([3], "extra_files is not a list of paths.", "extra_files=['folder/config.json']"),
        ([b"config.json"], "extra_files is not a list of paths.", "extra_files=['folder/config.json']"),
        (None, "extra_files is not a list of paths.", "extra_files=['folder/config.json']"),
        (["MODEL.SAFETENSORS"], "MODEL.SAFETENSORS has the name of a file of arrays.", "leave it out of extra_files"),
        (
            ["model.safetensors.INDEX.json"],
            "model.safetensors.INDEX.json has the name of a file of arrays.",
            "leave it out of extra_files",
        ),
        (
            ["statewise.json"],
            "statewise.json has the name of a checkpoint's manifest.",
            "leave it out of extra_files",
        ),
        (["config.json", "Config.json"], "Two of extra_files have the same name.", "files with different names"),
    ],
)
def test_other_files_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, message: str, hint: str
) -> None:
    """Also names that are the same where a file system does not distinguish case."""
    monkeypatch.chdir(tmp_path)
    for file in files or ():
        if isinstance(file, str):
            (tmp_path / file).write_text("{}")
    before = sorted(tmp_path.iterdir())
    with refused(sw.SaveError, message, hint=hint):
        sw.convert(sw.plan(Net()).take(Net()), "published", names=NAMES, extra_files=files)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("dtype", "name", "note", "hint"),
    [
        (
            "int4",
            "w",
            "safetensors has no int4",
            "state.cast(...) to a dtype that it has, or None in the row of the names",
        ),
        (
            "float32",
            "__metadata__",
            "would be written as '__metadata__', which safetensors reserves",
            "another name in the row",
        ),
        ("float32", "\ud800", "would be written as '\\ud800', which is not UTF-8", "another name in the row"),
    ],
)
def test_what_a_file_cannot_have_is_a_problem_of_our_leaf(
    tmp_path: Path, dtype: str, name: str, note: str, hint: str
) -> None:
    """The hint does not speak of `rename`, which is not used with names."""
    model = One(jnp.ones(2, dtype))
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert(sw.plan(model).take(model), tmp_path / "published", names=sw.Names({"w": name}))
    assert [(leaf.path, leaf.note) for leaf in caught.value.leaves] == [(("w",), note)]
    assert caught.value.hint == hint
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_files_lack_is_left_out_by_the_names(tmp_path: Path) -> None:
    """As the hint says."""
    model = One(jnp.ones(2, "int4"))
    model.v = nnx.Param(jnp.ones(2))
    state = sw.plan(model).take(model)
    assert sw.convert(state, tmp_path / "published", names=sw.Names({"w": None, "v": "v"})).ok
    assert [*safetensors.numpy.load_file(tmp_path / "published" / "model.safetensors")] == ["v"]


def test_a_kind_that_is_not_saved_is_not_left_out_in_silence(tmp_path: Path) -> None:
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], saved=False))
    model = Net()
    state = kinds.plan(model).take(model)
    names = sw.Names({"norm/scale": "model.norm.weight", "count": "count"})
    with refused(
        sw.RestoreError,
        f"the state does not become {tmp_path / 'published'} (safetensors): 1 leaf is in the way. "
        "Nothing was read or written.",
        leaves=["norm/scale: Param(8,) float32  kind=params  (is of kind 'params', which is not saved)"],
        hint="Kind(..., saved=True) for 'params', or None in the row of the names",
    ):
        sw.convert(state, tmp_path / "published", names=names)
    some = sw.Names({"norm/scale": None, "count": "count"})
    assert sw.convert(state, tmp_path / "published", names=some).ok
    arrays = {"model.norm.weight": np.ones(8, np.float32), "count": np.zeros((), np.int32)}
    safetensors.numpy.save_file(arrays, tmp_path / "all.safetensors")
    report = sw.preview(tmp_path / "all.safetensors", state, names=names)
    assert [(str(leaf.path[0]), leaf.note) for leaf in report.problems] == [
        ("model.norm.weight", "belongs to a leaf of kind 'params', which is not saved")
    ]
    assert report.hints == ("leave the row out, or declare the kind with Kind(..., saved=True)",)
    report = sw.preview(tmp_path / "all.safetensors", state, names=some)
    assert report.ok
    assert report.counts["params"] == {"kept": 9}
