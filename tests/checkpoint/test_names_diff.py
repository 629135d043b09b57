"""`names=` in `sw.diff` and `sw.inspect`: published files beside a model, and beside other files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import statewise as sw
from named_models import NAMES, Net, folder_of, theirs
from refusals import refused


def test_a_state_is_compared_with_the_files_that_it_came_from(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays, 2)
    plan = sw.plan(Net())
    state, _ = sw.restore(folder, plan.take(Net()), names=NAMES)
    same = sw.diff(folder, state, names=NAMES)
    assert not same
    assert same.same == {"params": 9}
    # Kinds of which the files have nothing are not compared.
    assert sorted(same.not_saved) == ["rng", "variables"]
    model = Net()
    plan.put(state, model)
    model.layers[1].q.bias[...] += 0.5
    for first, second in ((folder, model), (model, folder)):
        changed = sw.diff(first, second, names=NAMES)
        assert [(leaf.leaf.path, leaf.why) for leaf in changed.value["params"]] == [
            (("layers", 1, "q", "bias"), "8 of 8 elements by up to 0.5")
        ]
    assert sw.diff([*folder.glob("*.safetensors")], plan, names=NAMES).not_compared == {"params": 9}


def test_two_folders_are_compared_by_their_own_names(tmp_path: Path) -> None:
    arrays = theirs()
    first = folder_of(tmp_path / "first", arrays, 3)
    assert not sw.diff(first, folder_of(tmp_path / "same", arrays))
    other = dict(arrays)
    other["model.norm.bias"] = arrays["model.norm.bias"] + np.float32(1)
    other["more"] = other.pop("model.norm.weight")
    changes = sw.diff(first, folder_of(tmp_path / "other", other))
    assert sorted((leaf.leaf.path[0], tuple(map(str, leaf.what))) for leaf in changes) == [
        ("model.norm.bias", ("value",)),
        ("model.norm.weight", ("missing",)),
        ("more", ("unexpected",)),
    ]


def test_inspect_counts_what_no_row_is_about(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs() | {"buffer": np.ones(3, np.float32)})
    census = sw.inspect(folder, names=NAMES)
    assert {kind: census[kind].leaves for kind in census} == {"arrays": 9, "dropped": 1}
    sw.save(tmp_path / "own", sw.plan(Net()).take(Net()))
    with refused(
        sw.RestoreError,
        "Names are of another program's files, and this is a checkpoint of Statewise.",
        hint="sw.inspect(path)",
    ):
        sw.inspect(tmp_path / "own", names=NAMES)


def test_what_does_not_go_with_names_is_refused(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays)
    state = sw.plan(Net()).take(Net())
    sw.save(tmp_path / "own", state)
    example = "sw.diff('published', plan.take(model), names=names)"
    for first, second in ((state, state), (folder, tmp_path / "own")):
        with refused(
            sw.DeclarationError,
            "Names are of a model, a state or a plan, compared with another program's files.",
            hint=example,
        ):
            sw.diff(first, second, names=NAMES)
    with refused(sw.StructureError, "names is dict, and not sw.Names.", hint=example):
        sw.diff(folder, state, names={"a": "b"})  # type: ignore[arg-type]
    wrong = sw.Names(dict(NAMES) | {"norm/bias": "model.norm.nothing"})
    with pytest.raises(sw.RestoreError) as caught:
        sw.diff(folder, state, names=wrong)
    assert [leaf.note for leaf in caught.value.leaves] == ["the source has no model.norm.nothing"]
    with pytest.raises(sw.CorruptedError, match=r"is not a checkpoint of Statewise.* it holds model\.safetensors"):
        sw.diff(folder, state)
