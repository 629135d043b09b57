"""How a `Diff` is shown and written down, what `sw.diff` reads of a checkpoint, and what it refuses."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import statewise as sw
from checkpoint_models import contents, trained
from disagreeing import ONES, nothing_read, state_of
from refusals import refused
from statewise._src.checkpoint.diff import diff as differing
from statewise._src.checkpoint.diff.diff import Diff, diff
from statewise._src.checkpoint.format import load as reading
from statewise._src.common.nnx_graph import ModelError
from strategies import Node


@pytest.fixture
def found() -> Diff:
    """A leaf that changed, one that was added, two that are the same."""
    one = state_of(w=nnx.Param(ONES), b=nnx.Param(ONES), s=nnx.BatchStat(jnp.array([1.0, 2.0])), c=nnx.Cache(ONES))
    other = {"w": nnx.Param(ONES), "s": nnx.BatchStat(jnp.array([1.0, jnp.nan])), "c": nnx.Cache(ONES)}
    return diff(one, Node(**other, more=nnx.Param(jnp.ones(2)), b=nnx.Param(jnp.full((2, 3), 1.25))))


TABLE = """\
a state and a model (Node): 3 of 5 leaves differ
path  kind    what        why
----------------------------------------------------------
b     params  value       6 of 6 elements by up to 0.25
more  params  unexpected  Param(2,) float32
s     stats   value       1 of 2 elements, NaN in only one

kinds
kind    leaves  outcome
---------------------------------------------
params       3  same 1, value 1, unexpected 1
cache        1  same 1
stats        1  value 1"""


def test_it_prints_a_line_for_each_leaf_that_differs_and_for_each_kind(found: Diff) -> None:
    assert str(found) == TABLE


def test_without_a_difference_it_prints_a_line_for_each_kind() -> None:
    state = state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES))
    assert str(diff(state, state)) == (
        "a state and a state: no leaf differs\n"
        "kind    leaves  outcome\n"
        "-----------------------\n"
        "params       1  same 1\n"
        "stats        1  same 1"
    )


def test_in_a_terminal_it_is_a_rich_table(found: Diff) -> None:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(found)
    words = [word for word in captured.get().split() if not word.startswith("─")]
    assert words == [word for word in TABLE.split() if not word.startswith("--")]


def test_in_a_notebook_it_is_html(found: Diff) -> None:
    html = found._repr_html_()
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 1 + 3 + 1 + 3
    assert "<caption>a state and a model (Node): 3 of 5 leaves differ</caption>" in html


def test_as_json_it_is_plain_data(found: Diff) -> None:
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert {name: data[name] for name in ("first", "second", "differ", "not_saved", "counts")} == {
        "first": "a state",
        "second": "a model (Node)",
        "differ": True,
        "not_saved": [],
        "counts": {
            "params": {"same": 1, "value": 1, "unexpected": 1},
            "cache": {"same": 1},
            "stats": {"value": 1},
        },
    }
    changed, added, nan = data["leaves"]
    shown = {"path": "b", "kind": "params", "type": "Param", "shape": [2, 3], "dtype": "float32"}
    shown |= {"aliases": [], "size": 6, "nbytes": 24}
    assert changed == shown | {
        "other": shown,
        "what": ["value"],
        "why": "6 of 6 elements by up to 0.25",
        "elements_changed": 6,
        "largest": 0.25,
    }
    assert (added["other"], added["largest"], nan["largest"]) == (None, None, "nan")


def test_a_kind_s_leaves(found: Diff) -> None:
    assert [one.leaf.path for one in found["params"]] == [("b",), ("more",)]
    assert found["cache"] == ()
    with refused(sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint="one of: params, cache, stats"):
        found["gates"]


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_a_few_leaves_are_read_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    def state(fill: float) -> sw.State:
        return state_of(
            **{f"w{at}": nnx.Param(jnp.full(64, fill)) for at in range(8)}, big=nnx.Param(jnp.full(256, fill))
        )

    read: list[list[str]] = []
    plain, checked = reading.read_arrays, []
    corrupted_files = reading.corrupted_files

    def noted(folder: Any, manifest: Any, wanted: Any, **options: Any) -> Any:
        read.append([record.path[0] for record, _ in wanted])
        return plain(folder, manifest, wanted, **options)

    monkeypatch.setattr(reading, "read_arrays", noted)
    monkeypatch.setattr(reading, "corrupted_files", lambda *args: checked.append(args) or corrupted_files(*args))
    monkeypatch.setattr(differing, "BATCH", 4 * 64 * 4)
    sw.save(tmp_path / "one", state(1), layout=layout)
    sw.save(tmp_path / "two", state(2), layout=layout)
    found = diff(tmp_path / "one", tmp_path / "two")
    assert [one.why for one in found.leaves] == ["256 of 256 elements by up to 1"] + [
        "64 of 64 elements by up to 1"
    ] * 8
    assert read == [
        batch for batch in (["big"], ["w0", "w1", "w2", "w3"], ["w4", "w5", "w6", "w7"]) for _ in ("one", "two")
    ]
    assert len(checked) == 2  # the files of each checkpoint are looked at once


def test_what_cannot_be_the_same_is_not_read(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "one", state_of(w=nnx.Param(jnp.ones(2)), a=nnx.Param(ONES)))
    sw.save(tmp_path / "two", state_of(w=nnx.Param(jnp.ones(3)), b=nnx.Param(ONES)))
    with nothing_read():
        found = diff(tmp_path / "one", tmp_path / "two")
    assert [one.what for one in found.leaves] == [("missing",), ("shape",), ("unexpected",)]


def test_nothing_changes_what_is_compared(tmp_path: pathlib.Path) -> None:
    state, model = trained(0), Node(w=nnx.Param(ONES))
    before, held = contents(state), model.w.get_raw_value()
    sw.save(tmp_path / "run", trained(1))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert diff(state, tmp_path / "run")
    assert diff(model, state)
    assert contents(state) == before
    assert model.w.get_raw_value() is held
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == files


# --- what is refused ----------------------------------------------------------------------------------------------


def check_either(cls: type[sw.StatewiseError], message: str, thing: Any, **said: Any) -> None:
    good = state_of(w=nnx.Param(ONES))
    for pair in ((thing, good), (good, thing), (thing, thing)):
        with refused(cls, message, **said):
            diff(*pair)


def test_a_path_where_nothing_is(tmp_path: pathlib.Path) -> None:
    hint = "sw.save(path, state) writes a checkpoint; look for it beside this path"
    check_either(sw.RestoreError, f"There is nothing at {tmp_path}/run.", str(tmp_path / "run"), hint=hint)


def test_a_folder_that_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    message = f"{tmp_path} is not a checkpoint of Statewise: it has no statewise.json."
    hint = f"sw.convert('{tmp_path}', ...) reads a plain Orbax checkpoint"
    check_either(sw.CorruptedError, message, tmp_path, hint=hint)


def test_a_damaged_checkpoint(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    (tmp_path / "run" / "_METADATA").unlink()
    good = state_of(w=nnx.Param(ONES))
    with refused(
        sw.CorruptedError,
        f"{tmp_path}/run is corrupted: _METADATA is missing.",
        hint="restore another checkpoint",
    ):
        diff(tmp_path / "run", good)


@pytest.mark.parametrize("thing", [3, None, jnp.ones(2)], ids=lambda thing: type(thing).__name__)
def test_what_holds_no_leaves(thing: Any) -> None:
    message = f"Object 0 is {type(thing).__name__}, which holds no leaves at paths."
    check_either(
        ModelError, message, thing, hint="pass a module, an nnx.Optimizer, a metric, or a list or dict of them"
    )


def test_a_spent_state() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, restart=jnp.zeros_like))
    state = state_of(kinds, w=nnx.Param(ONES))
    state.restart()
    check_either(
        sw.StructureError,
        "This state was donated: restart('params') has donated its params.",
        state,
        kind="params",
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    )


def test_a_state_inside_jit() -> None:
    with refused(
        sw.StructureError,
        "This state is being traced: inside jax.jit there are no values to compare.",
        hint="return the state from the function, and compare what comes back",
    ):
        jax.jit(lambda state: len(diff(state, state).leaves))(state_of(w=nnx.Param(ONES)))


def test_a_batch_of_states() -> None:
    check_either(
        sw.StructureError,
        "The state's arrays do not have the shapes and dtypes of its plan.",
        jax.tree.map(lambda array: jnp.stack([array] * 4), state_of(w=nnx.Param(ONES))),
        leaves=["w: Param(2, 3) float32  kind=params  (is (4, 2, 3) in the state)"],
        hint="all of them as one ensemble: state = plan.stacked(4).stack(states)\n"
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
        "for other dtypes: state.cast(params='bfloat16')",
    )


def test_a_model_whose_arrays_are_gone() -> None:
    model = Node(w=nnx.Param(ONES * 2, ref=False))  # reading a reference copies it
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, restart=jnp.zeros_like))
    kinds.plan(model).take(model, copy=False).restart()
    check_either(
        sw.StructureError,
        "The model's arrays no longer exist: they were taken with copy=False, and a step has donated them.",
        model,
        leaves=["w: Param(2, 3) float32  kind=params"],
        hint="plan.put(state, model) gives it the present arrays; or compare the state",
    )


def test_a_model_with_leaves_of_no_kind() -> None:
    with refused(
        sw.UnclaimedError,
        "1 leaf is claimed by no kind.",
        leaves=["s: BatchStat(2, 3) float32"],
        hint="kinds = kinds | sw.Kinds(batchstat_kind=sw.Kind(sw.Exactly(nnx.BatchStat)))\n"
        "or, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))",
    ):
        diff(Node(s=nnx.BatchStat(ONES)), Node(s=nnx.BatchStat(ONES)), kinds=sw.Kinds(params=sw.Kind(nnx.Param)))


def test_several_objects_are_compared_together() -> None:
    one = (Node(w=nnx.Param(ONES)), nnx.Rngs(0))
    other = [Node(w=nnx.Param(ONES)), nnx.Rngs(1)]
    found = diff(one, other)
    assert found.first == "a model (Node and Rngs)"
    assert [leaf.leaf.path for leaf in found.leaves] == [(1, "default", "key")]


def test_a_diff_is_iterated_leaf_by_leaf() -> None:
    narrow, wide = (nnx.Linear(2, size, rngs=nnx.Rngs(0)) for size in (3, 4))
    found = sw.diff(narrow, wide)
    assert list(found) == list(found.leaves)
    assert len(list(found)) == 2
