"""Where the arrays of a state go: worked out once for a plan and for how its arrays lie."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import assert_identical, copied, round_trip, spread, taken
from statewise._src.checkpoint.format import layout as laying
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, leaves_text
from statewise._src.checkpoint.format.parse import read_manifest


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts that were worked out."""
    layouts: list[str] = []
    plain = laying._arrange

    def noted(plan: Any, parts: Any, layout: str) -> Any:
        layouts.append(layout)
        return plain(plan, parts, layout)

    monkeypatch.setattr(laying, "_arrange", noted)
    return layouts


def a_state() -> sw.State:
    return taken({"a": jnp.arange(16.0), "b": jnp.arange(3), "c": jnp.zeros((0, 2)), "d": jnp.ones(8, jnp.bfloat16)})


def placements(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "statewise.json").read_text())["content"]
    return {leaf["path"][-1]: leaf["arrays"][0]["placement"] for leaf in content["leaves"]}


def test_a_run_that_saves_one_plan_again_and_again_lays_it_out_once(tmp_path: Path, arranged: list[str]) -> None:
    state = a_state()
    for step in range(3):
        state = jax.tree.map(lambda array: array + 1, state)
        for layout in ("named", "packed"):
            assert_identical(round_trip(tmp_path / f"{step}{layout}", state, layout=layout), state)
    assert arranged == ["named", "packed"]


def test_arrays_that_lie_elsewhere_are_laid_out_anew(
    tmp_path: Path, devices: list[jax.Device], arranged: list[str]
) -> None:
    state = a_state()
    for number, one in enumerate((state, spread(state, devices), copied(state), spread(state, devices, over=4))):
        assert_identical(round_trip(tmp_path / str(number), one, one, layout="packed"), one)
    assert len(arranged) == 4
    whole, split = {"mesh": {"data": 8}, "spec": []}, {"mesh": {"data": 8}, "spec": ["data"]}
    assert placements(tmp_path / "0/saved") == placements(tmp_path / "2/saved") == dict.fromkeys("abcd")
    assert placements(tmp_path / "1/saved") == {"a": split, "b": whole, "c": whole, "d": split}
    buffers = [read_manifest(tmp_path / f"{number}/saved").buffers for number in range(4)]
    assert buffers[0] == buffers[2]
    assert buffers[1] == buffers[3] == ()  # what lies on several devices keeps its own key


def test_fewer_kinds_are_laid_out_for_themselves(tmp_path: Path, arranged: list[str]) -> None:
    model = nnx.Dict(a=nnx.Param(jnp.ones(3)), b=nnx.BatchStat(jnp.zeros(2)))
    state = sw.plan(model).take(model)
    for number, only in enumerate((None, ("params",), None, ("params",))):
        sw.save(tmp_path / str(number), state, only=only, layout="packed")
        assert {leaf.kind for leaf in read_manifest(tmp_path / str(number)).leaves} == (
            {"params"} if only else {"params", "stats"}
        )
    assert arranged == ["packed", "packed"]


def test_sums_stand_where_they_belong_whatever_the_leaf_is_called() -> None:
    """The text of a leaf is cut where its sums go; no name may be taken for such a place."""
    odd = '"sums":[-1,-1]'
    arrays = tuple(ArrayRecord((odd, number), (3,), "float32", key=(odd,)) for number in range(2))
    leaf = LeafRecord((odd, "x"), "params", f"{odd}:Param", odd, arrays, ((odd,),))
    text = leaves_text([leaf, leaf], [(1, 2), (3, 4), (5, 6), (7, 8)])
    first, second = json.loads(text)
    assert [array["sums"] for array in first["arrays"]] == [[1, 2], [3, 4]]
    assert [array["sums"] for array in second["arrays"]] == [[5, 6], [7, 8]]
    assert first["path"] == [odd, "x"]
    assert (first["structure"], first["aliases"]) == (odd, [[odd]])


def test_arrays_of_other_devices_than_the_host_s_set_out_together(
    tmp_path: Path, devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are only CPUs here, which are told to be others."""
    fetched: list[int] = []
    plain = laying._fetch

    def noted(sources: Any) -> None:
        fetched.append(len(sources))
        plain(sources)

    monkeypatch.setattr(laying, "_fetch", noted)
    for layout in ("named", "packed"):
        round_trip(tmp_path / layout, a_state(), layout=layout)
    assert fetched == []
    monkeypatch.setattr(laying, "_devices", lambda array: [SimpleNamespace(platform="tpu")])
    for number, state in enumerate((a_state(), spread(a_state(), devices))):
        assert_identical(round_trip(tmp_path / str(number), state, state, layout="packed"), state)
    assert fetched == [4, 4]
