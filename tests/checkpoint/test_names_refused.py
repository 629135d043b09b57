"""`names=`: everything that is wrong is listed before an array is read, and nothing outside of a folder is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from named_models import INDEX, NAMES, Net, check_read, folder_of, theirs
from refusals import refused


def test_everything_that_is_wrong_is_listed_before_an_array_is_read(tmp_path: Path) -> None:
    arrays = theirs()
    arrays["model.norm.bias"] = arrays["model.norm.bias"][:5]
    arrays["extra"] = np.ones(2, np.float32)
    del arrays["model.layers.1.up.weight"]
    folder = folder_of(tmp_path / "theirs", arrays)
    names = sw.Names(
        {path: name for path, name in NAMES.items() if path != "layers/{i}/q/bias"}
        | {"layers/{j}/up/kernel": sw.Name("model.layers.{j}.up.weight", "o i -> i o"), "norm/scale": "model.norm.bias"}
    )
    plan = sw.plan(Net())
    report = names.check(plan, folder)
    assert not report.ok
    assert [f"{sw.format_path(leaf.path)}: {leaf.note}" for leaf in report.problems] == [
        "layers/0/q/bias: has no row in the names",
        "layers/0/up/kernel: is in several rows: 'layers/{i}/up/kernel', 'layers/{j}/up/kernel'",
        "layers/1/q/bias: has no row in the names",
        "layers/1/up/kernel: is in several rows: 'layers/{i}/up/kernel', 'layers/{j}/up/kernel'",
        "norm/bias: model.norm.bias is (5,) in the source, and not (8,)",
        "norm/scale: would be read from model.norm.bias, which is also norm/bias",
        "norm/scale: model.norm.bias is (5,) in the source, and not (8,)",
    ]
    assert (
        report.hints[0] == "a row in the names, 'layers/{i}/q/bias': 'its name there'; or None, for what is not there"
    )
    unused = [each.leaf.path[0] for each in report.leaves if each.outcome == "dropped"]
    assert sorted(unused) == [
        "extra",
        "model.layers.0.q.bias",
        "model.layers.0.up.weight",
        "model.layers.1.q.bias",
        "model.norm.weight",
    ]
    target = plan.take(Net())
    with pytest.raises(sw.RestoreError, match="Nothing was read or changed"):
        sw.restore(folder, target, names=names)
    absent = NAMES.check(plan, folder)
    assert [leaf.note for leaf in absent.problems if leaf.path[-2] == "up"] == [
        "the source has no model.layers.1.up.weight"
    ]


def test_a_state_that_has_no_row_for_a_leaf_is_not_written(tmp_path: Path) -> None:
    model = Net()
    state = sw.plan(model).take(model)
    names = sw.Names({path: name for path, name in NAMES.items() if path not in ("count", "norm/bias")})
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert(state, tmp_path / "published", names=names)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "count: Variable() int32  kind=variables  (has no row in the names)",
        "norm/bias: Param(8,) float32  kind=params  (has no row in the names)",
    ]
    assert list(tmp_path.iterdir()) == []
    twice = sw.Names(dict(NAMES) | {"norm/bias": "model.norm.weight"})
    with pytest.raises(sw.RestoreError, match=r"would be written as model\.norm\.weight, which is also norm/bias"):
        sw.convert(state, tmp_path / "published", names=twice)
    with pytest.raises(sw.StructureError, match="no values"):
        sw.convert(sw.plan(model).abstract(), tmp_path / "published", names=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_does_not_fit_is_one_problem_for_each_leaf(tmp_path: Path) -> None:
    """It is not said as well that the row matches no leaf, and that the model has other sizes."""
    names = sw.Names(dict(NAMES) | {"layers/{i}/up/kernel": sw.Name("model.layers.{i}.up.weight", "o i n -> n i o")})
    report = names.check(sw.plan(Net()), folder_of(tmp_path / "theirs", theirs()))
    assert [(leaf.path[1], leaf.note) for leaf in report.problems] == [
        (layer, "has 2 axes, and 'o i n -> n i o' 3") for layer in range(2)
    ]
    assert report.hints == ("another pattern, or a model of other sizes, in the row 'layers/{i}/up/kernel'",)
    dropped = {leaf.leaf.path[0]: leaf.why for leaf in report.leaves if leaf.outcome == "dropped"}
    assert dropped == {f"model.layers.{layer}.up.weight": "no leaf is read from it" for layer in range(2)}


def test_tied_leaves_that_differ_in_the_files_are_refused(tmp_path: Path) -> None:
    arrays = theirs()
    arrays["lm_head.weight"] = arrays["model.embed.weight"].copy()
    model = Net()
    target = sw.plan(model).take(model)
    check_read(sw.restore(folder_of(tmp_path / "equal", arrays), target, names=NAMES)[0], arrays)
    arrays["lm_head.weight"][0] += 1
    folder = folder_of(tmp_path / "differ", arrays)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(folder, target, names=NAMES)
    assert [leaf.note for leaf in caught.value.leaves] == [
        "is tied, and has two different values in the source: embed/embedding and head/embedding"
    ]


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "it has no weight_map"),
        ('{"weight_map": []}', "its weight_map does not give a file for each name"),
        ('{"weight_map": {"a": 3}}', "its weight_map does not give a file for each name"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "it names '../model.safetensors', which is not a file of"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "it names '/etc/passwd', which is not a file of the folder"),
        ('{"weight_map": {"a": ".."}}', "it names '..', which is not a file of the folder"),
    ],
)
def test_an_index_that_is_not_one(tmp_path: Path, index: str, why: str) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    (folder / INDEX).write_text(index)
    with pytest.raises(sw.CorruptedError) as caught:
        NAMES.check(sw.plan(Net()), folder)
    assert caught.value.message.startswith(f"{folder / INDEX} is not an index: {why}")


def test_an_index_and_files_that_do_not_agree(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs(), 3)
    plan = sw.plan(Net())
    whole = json.loads((folder / INDEX).read_text())
    moved = dict.fromkeys(whole["weight_map"], "model-1.safetensors") | {"none": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved | {"more": "model-3.safetensors"}}))
    with pytest.raises(sw.CorruptedError, match=r"model\.norm\.weight is in model-2\.safetensors, and the index has"):
        NAMES.check(plan, folder)
    (folder / INDEX).write_text(json.dumps(whole))
    (folder / "model-2.safetensors").unlink()
    with refused(
        sw.CorruptedError,
        f"{folder} is not complete: its index names model-2.safetensors, which is not there.",
        hint="fetch the folder again",
    ):
        NAMES.check(plan, folder)
    (folder / INDEX).unlink()
    safetensors.numpy.save_file({"model.norm.bias": np.ones(8, np.float32)}, folder / "second.safetensors")
    with pytest.raises(sw.CorruptedError, match=r"model\.norm\.bias is in model-3\.safetensors and in second"):
        NAMES.check(plan, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 is not a number of bytes."),
        ({"max_shard_bytes": True}, "max_shard_bytes=True is not a number of bytes."),
        ({"extra_files": "config.json"}, "extra_files is one path, and not several."),
        ({"extra_files": ["nowhere/config.json"]}, "There is no file at nowhere/config.json."),
        ({"names": None}, "State is neither a path nor a mapping."),
        ({"names": {"a": "b"}}, "names is dict, and not sw.Names."),
        ({"cast": True}, "A state is written under other names into safetensors files: rename, cast and other formats"),
        ({"to": "orbax"}, "A state is written under other names into safetensors files: rename, cast and other"),
        (
            {"target": sw.plan(Net()).abstract()},
            "Files are read into a target by names, without rename; a state is not",
        ),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = Net()
    given: dict[str, Any] = {"names": NAMES} | options
    with pytest.raises(sw.StatewiseError) as caught:
        sw.convert(sw.plan(model).take(model), tmp_path / "published", **given)
    assert caught.value.message.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    model = Net()
    plan = sw.plan(model)
    with refused(
        sw.StructureError,
        "names is dict, and not sw.Names.",
        hint="names=sw.Names({'embed/embedding': 'model.embed_tokens.weight'})",
    ):
        sw.restore(folder, plan.abstract(), names={"a": "b"})  # type: ignore[arg-type]
    with refused(
        sw.RestoreError, "Files of other names have neither a base nor members.", hint="leave out base and members"
    ):
        sw.restore(folder, plan.abstract(), names=NAMES, base=folder)
    with refused(
        sw.StructureError,
        "Names are checked against a plan, not Net.",
        hint="names.check(sw.plan(model), path)",
    ):
        NAMES.check(model, folder)  # type: ignore[arg-type]
    with refused(
        sw.SaveError,
        "max_shard_bytes and extra_files are of a folder, which is written from a state by names.",
        hint="sw.convert(state, 'folder', names=names, max_shard_bytes=5 * 2**30)",
    ):
        sw.convert(folder / "model.safetensors", tmp_path / "x.safetensors", max_shard_bytes=3)
    with refused(
        sw.StructureError,
        "With names a state is converted, or files into a target; not PosixPath alone.",
        hint="sw.convert(state, 'folder', names=names); to read such files: sw.restore(path, target, names=names), or "
        "sw.convert(path, 'run/converted', target=target, names=names)",
    ):
        sw.convert(folder, tmp_path / "x", names=NAMES)


@pytest.mark.parametrize(
    ("row", "name", "note"),
    [
        ("norm/scale", "model.norm.bias", "would be read from model.norm.bias, which is also norm/bias"),
        (
            "layers/{i}/q/bias",
            sw.Name("model.norm.bias.{i}", "(n h) -> n h"),
            "the source has no model.norm.bias.0",
        ),
    ],
)
def test_one_array_is_not_read_into_two_leaves(tmp_path: Path, row: str, name: Any, note: str) -> None:
    """Of equal shapes: a row that was copied and not changed."""
    folder = folder_of(tmp_path / "theirs", theirs())
    report = sw.Names(dict(NAMES) | {row: name}).check(sw.plan(Net()), folder)
    assert note in [leaf.note for leaf in report.problems]
    with pytest.raises(sw.RestoreError):
        sw.restore(folder, sw.plan(Net()).take(Net()), names=sw.Names(dict(NAMES) | {row: name}))


def test_files_of_a_deeper_model_are_refused(tmp_path: Path) -> None:
    arrays = theirs() | {"model.layers.2.q.bias": np.ones(8, np.float32), "buffer": np.ones(1, np.float32)}
    folder = folder_of(tmp_path / "theirs", arrays)
    with refused(
        sw.RestoreError,
        f"{folder} does not fit the target: 1 leaf differs. Nothing was read or changed.",
        leaves=[
            "model.layers.2.q.bias: Array- -  (is in the files, and the row 'layers/{i}/q/bias' matches no leaf for it)"
        ],
        hint="a model of the size of the files: as many layers, and every leaf that a row is about",
    ):
        sw.restore(folder, sw.plan(Net()).take(Net()), names=NAMES)


def test_names_that_match_no_leaf_list_the_leaves_without_a_row(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with refused(
        sw.RestoreError,
        f"the state does not become {tmp_path / 'published'} (safetensors): 2 leaves are in the way. "
        "Nothing was read or written.",
        leaves=[
            "bias: Param(3,) float32  kind=params  (has no row in the names)",
            "kernel: Param(2, 3) float32  kind=params  (has no row in the names)",
        ],
        hint="a row in the names, 'bias': 'its name there'; or None, for what is not there\n"
        "a row in the names, 'kernel': 'its name there'; or None, for what is not there",
    ):
        sw.convert(sw.plan(model).take(model), tmp_path / "published", names=sw.Names({"x": "y"}))
    nothing = sw.Names({"bias": None, "kernel": None})
    with refused(
        sw.RestoreError, "the state has no arrays to convert.", hint="another source, or a rename that keeps some"
    ):
        sw.convert(sw.plan(model).take(model), tmp_path / "published", names=nothing)


def test_an_abstract_target_gets_what_the_files_lack_by_the_hint(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays)
    plan = sw.plan(nnx.eval_shape(Net))
    target = plan.abstract()
    report = sw.preview(folder, target, names=NAMES)
    assert {leaf.kind for leaf in report.problems} == {"rng", "variables"}
    whole, some = report.hints
    known = {"sw": sw, "jax": jax, "plan": plan, "target": target, "path": folder, "names": NAMES}
    known |= {"make_model": Net, "model": Net()}
    assert whole == "restore into a state with values: sw.restore(path, plan.take(model), names=names)"
    check_read(eval(whole.partition(": ")[2], known)[0], arrays)
    assert some.startswith("or compute only what the files lack: target = target.replace(")
    exec(some.partition(": ")[2], known)
    state, _ = sw.restore(folder, known["target"], names=NAMES)
    check_read(state, arrays)
    assert state["variables"]["count"][...] == 3


def test_what_is_written_is_shown_by_our_path_and_their_name(tmp_path: Path) -> None:
    model = Net()
    report = sw.convert(sw.plan(model).take(model), tmp_path / "x", names=NAMES, dry_run=True)
    shown = {(name, leaf.path, leaf.kind) for name, leaf in report.matched}
    assert ("layers/0/up/kernel", ("model.layers.0.up.weight",), "params") in shown
    assert ("head/embedding", ("lm_head.weight",), "params") in shown
