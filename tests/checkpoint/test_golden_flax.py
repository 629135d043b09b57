"""Checkpoints from both sides of a change in Flax restore on this one; a type that a user changed is still refused.

`tests/golden/make_flax.py` made the golden ones, with the version of Flax in their names.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from flax_layers import BASES, MORE, SHIPPED, leaf_types
from golden_scripts import GOLDEN, load
from statewise._src.common.paths import format_path

NAMES = sorted(path.stem for path in GOLDEN.glob("flax-*.json"))
# Where some version between the golden ones changed a leaf: its layer and its path.
CHANGED = {("WeightNorm", "scales/('kernel',)")}
SCALES = ("first/scales/('kernel',)", "others/0/scales/('kernel',)")


@pytest.fixture(scope="module")
def make() -> types.ModuleType:
    return load("make_flax")


def content(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def types_of_scales(name: str) -> str:
    return content(name)["layers"]["WeightNorm"]["scales/('kernel',)"][0]


HERE = leaf_types()["WeightNorm"]["scales/('kernel',)"][0]


def test_there_is_one_from_each_side() -> None:
    assert {types_of_scales(name) for name in NAMES} == {"Array", "Param"}


def test_flax_changed_no_other_leaf_than_the_golden_checkpoints_have() -> None:
    """If this fails, Flax changed another one: add its layer to `make_flax.py`, and run that on either side."""
    now = leaf_types()
    differing = {
        name: {
            (layer, path)
            for layer, leaves in content(name)["layers"].items()
            if layer in now  # Flax adds layers
            for path in leaves.keys() | now[layer].keys()
            if leaves.get(path) != now[layer].get(path)
        }
        for name in NAMES
    }
    for name, leaves in differing.items():
        assert leaves == (CHANGED if types_of_scales(name) != HERE else set())


def test_the_tables_have_every_layer_of_flax() -> None:
    layers = {
        name
        for name, cls in vars(nnx).items()
        if isinstance(cls, type) and issubclass(cls, nnx.Pytree) and not issubclass(cls, nnx.Variable)
    }
    assert layers - {*SHIPPED, *MORE, *BASES} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_restores_on_either_side(name: str, make: types.ModuleType) -> None:
    state, report = sw.restore(GOLDEN / name, make.plan().abstract())
    assert report.ok
    assert report.written["flax"] == name.removeprefix("flax-")
    expected, got = content(name)["values"], make.values(state)
    # Moments and averages of the scales are on one side only; all else is the same to the bit.
    assert {path for path in expected.keys() ^ got.keys() if "scales" not in path} == set()
    assert {path: expected[path] for path in got if path in expected} == {
        path: value for path, value in got.items() if path in expected
    }
    assert all(path in got for path in SCALES)
    np.testing.assert_allclose(make.output(state), content(name)["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_says_what_changed_its_type(name: str, make: types.ModuleType) -> None:
    report = sw.preview(GOLDEN / name, make.plan().abstract())
    others = [entry for entry in report if entry.outcome != "restored"]
    lines = {format_path(entry.leaf.path): (entry.leaf.kind, entry.outcome, entry.why) for entry in others}
    there = types_of_scales(name)
    if there == HERE:
        assert not others
        return
    derived = ("optimizer/params/0/mu", "optimizer/params/0/nu", "ema/params")
    if there == "Array":
        was = f"was an Array of kind 'variables' in flax {report.written['flax']}"
        rest = {
            f"{above}/{path}": (
                above.split("/")[0],
                "restarted",
                f"missing from the checkpoint, of {path}, which {was}",
            )
            for above in derived
            for path in SCALES
        }
        assert lines == dict.fromkeys(SCALES, ("params", "retyped", was)) | rest
    else:
        was = f"was a Param of kind 'params' in flax {report.written['flax']}"
        rest = {
            f"{above}/{path}": (above.split("/")[0], "dropped", f"of {path}, which {was}")
            for above in derived
            for path in SCALES
        }
        assert lines == dict.fromkeys(SCALES, ("variables", "retyped", was)) | rest


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_the_other_side(name: str, pack: bool, make: types.ModuleType, tmp_path: Path) -> None:
    plan = make.plan()
    restored, _ = sw.restore(GOLDEN / name, plan.take(make.Model(), pack=pack))
    if types_of_scales(name) == "Array" != HERE:
        for moment in restored["optimizer"]["params"][0][1:]:
            assert not np.any(moment["first"]["scales"]["kernel",])
            assert np.any(moment["first"]["layer_instance"]["kernel"])
        average = next(leaf for leaf in jax.tree.leaves_with_path(restored["ema"]) if "scales" in str(leaf[0]))[1]
        assert np.array_equal(average, restored["params"]["first"]["scales"]["kernel",])
    sw.save(tmp_path / "again", restored)
    again, report = sw.restore(tmp_path / "again", plan.abstract())
    assert {entry.outcome for entry in report} == {"restored"}
    (one, loss), (other, other_loss) = make.train(again, make.X), make.train(restored, make.X)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    for kind in one:
        for leaf, its in zip(jax.tree.leaves(one[kind]), jax.tree.leaves(other[kind]), strict=True):
            if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(leaf, its, rtol=1e-5, atol=1e-6)
