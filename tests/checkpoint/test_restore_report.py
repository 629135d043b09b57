"""The report of a restore, and the census of a checkpoint: as data, as text, in a terminal and in a notebook."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import statewise as sw
from checkpoint_models import ALL_SAVED, trained
from disagreeing import ONES, nothing_read, state_of
from refusals import refused


@pytest.fixture
def report(tmp_path: pathlib.Path) -> sw.results.RestoreReport:
    """One leaf of each outcome; two that are not there."""
    sw.save(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES), b=nnx.Param(ONES), s=nnx.BatchStat(ONES), gone=nnx.BatchStat(ONES)),
    )
    kinds = sw.Kinds.standard().replace(metrics=sw.Kind(nnx.MultiMetric, missing="keep"))
    kinds = kinds.replace(variables=sw.Kind(..., missing="keep"), lora=sw.Kind(nnx.LoRAParam))
    target = state_of(
        kinds,
        w=nnx.Param(ONES),
        b=nnx.Param(ONES.astype("bfloat16")),
        s=nnx.BatchStat(jnp.ones(3)),
        n=nnx.Variable(jnp.array(1)),
        c=nnx.Cache(ONES),
    )
    return sw.preview(tmp_path / "run", target, cast=True)


def table_of(path: str) -> str:
    return f"""\
restore of {path}: does not go through
path  kind       outcome  why
-----------------------------------------------------
b     params     cast     from float32 to bfloat16
c     cache      kept     ephemeral, never saved
n     variables  kept     missing from the checkpoint
s     stats      problem  is (2, 3) in the checkpoint
gone  stats      problem  not in the target

kinds
kind       leaves  outcome
-------------------------------------
params          2  cast 1, restored 1
cache           1  kept 1
variables       1  kept 1
stats           2  problem 2"""


def test_what_happens_to_each_leaf_is_data(report: sw.results.RestoreReport) -> None:
    assert [(sw.format_path(one.leaf.path), one.outcome, one.why) for one in report.leaves] == [
        ("b", "cast", "from float32 to bfloat16"),
        ("c", "kept", "ephemeral, never saved"),
        ("n", "kept", "missing from the checkpoint"),
        ("s", "problem", "is (2, 3) in the checkpoint"),
        ("w", "restored", ""),
        ("gone", "problem", "not in the target"),
    ]
    assert not report.ok
    assert [str(leaf) for leaf in report.problems] == [
        "s: BatchStat(3,) float32  kind=stats  (is (2, 3) in the checkpoint)",
        "gone: BatchStat(2, 3) float32  kind=stats  (not in the target)",
    ]
    assert report.counts == {
        "params": {"cast": 1, "restored": 1},
        "cache": {"kept": 1},
        "variables": {"kept": 1},
        "stats": {"problem": 2},
    }
    assert report.hints == (
        "build the model with the sizes that it was saved with",
        "plan what was saved, optimizers included; or ask for the kinds you want: "
        "sw.restore(path, target, only=('params', 'variables'))",
    )
    assert set(report.written) >= {"statewise", "jax", "flax", "python", "at"}


def test_a_kind_s_leaves(report: sw.results.RestoreReport) -> None:
    assert [one.leaf.path for one in report["params"]] == [("b",), ("w",)]
    with refused(
        sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint="one of: params, cache, variables, stats"
    ):
        report["gates"]


def test_it_raises_what_is_wrong_with_it(report: sw.results.RestoreReport) -> None:
    with refused(
        sw.RestoreError,
        f"{report.path} does not fit the target: 2 leaves differ. Nothing was read or changed.",
        leaves=[str(leaf) for leaf in report.problems],
        hint="\n".join(report.hints),
    ):
        report.raise_problems()


def test_the_table_has_a_line_for_each_leaf_that_was_not_simply_restored(report: sw.results.RestoreReport) -> None:
    assert str(report) == table_of(report.path)


def test_in_a_terminal_it_is_a_rich_table(report: sw.results.RestoreReport) -> None:
    console = Console(width=300, color_system=None)
    with console.capture() as captured:
        console.print(report)
    words = captured.get().split()
    assert [word for word in table_of(report.path).split() if not word.startswith("--")] == [
        word for word in words if not word.startswith("─")
    ]


def test_in_a_notebook_it_is_html(report: sw.results.RestoreReport) -> None:
    html = report._repr_html_()
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 1 + 5 + 1 + 4
    assert f"<caption>restore of {report.path}: does not go through</caption>" in html
    assert '<td style="text-align:left;white-space:pre-wrap">is (2, 3) in the checkpoint</td>' in html


def test_as_json_it_is_the_same(report: sw.results.RestoreReport) -> None:
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert (data["path"], data["ok"], data["counts"]) == (report.path, False, report.counts)
    assert (data["hints"], data["written"]) == (list(report.hints), report.written)
    assert data["leaves"][0] == {
        "path": "b",
        "kind": "params",
        "type": "Param",
        "shape": [2, 3],
        "dtype": "bfloat16",
        "aliases": [],
        "size": 6,
        "nbytes": 12,
        "outcome": "cast",
        "why": "from float32 to bfloat16",
    }


def test_where_all_was_restored_there_is_a_line_for_each_kind(tmp_path: pathlib.Path) -> None:
    state = state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES))
    sw.save(tmp_path / "run", state)
    _, report = sw.restore(tmp_path / "run", state)
    report.raise_problems()
    assert (report.ok, report.problems, report.hints) == (True, (), ())
    assert str(report) == (
        f"restore of {tmp_path}/run\n"
        "kind    leaves  outcome\n"
        "--------------------------\n"
        "stats        1  restored 1\n"
        "params       1  restored 1"
    )


def test_a_preview_says_what_a_restore_does_and_reads_nothing(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", trained(0))
    target = trained(1)
    with nothing_read():
        foretold = sw.preview(tmp_path / "run", target)
        half = sw.preview(tmp_path / "run", target.cast(params="bfloat16"), cast=True, only="params")
    assert foretold == sw.restore(tmp_path / "run", target)[1]
    assert half == sw.restore(tmp_path / "run", target.cast(params="bfloat16"), cast=True, only="params")[1]


# --- the census --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_the_census_of_a_checkpoint_is_that_of_its_state(tmp_path: pathlib.Path, layout: str) -> None:
    model = {
        "layer": nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        "drop": nnx.Dropout(0.5, rngs=nnx.Rngs(default=jax.random.key(0, impl="rbg"), params=0)),
        "cache": nnx.Cache(jnp.zeros(2, "int4")),
        "several": nnx.Variable({"a": jnp.ones(2), "b": (jnp.ones((), "bfloat16"), 3)}),
        "none": nnx.Variable(None),
        "raw": jnp.ones((0, 3)),
    }
    tied = nnx.Param(jnp.ones(2))
    model["tied"] = nnx.List([tied, tied])
    state = ALL_SAVED.plan(model).take(model)
    with nothing_read():
        sw.save(tmp_path / "run", state, layout=layout)
        assert sw.inspect(tmp_path / "run") == sw.census(state)


def test_the_census_of_a_trained_state_is_that_of_its_saved_kinds(tmp_path: pathlib.Path) -> None:
    state = state_of(w=nnx.Param(ONES), c=nnx.Cache(ONES))
    sw.save(tmp_path / "run", state)
    found, census = sw.inspect(tmp_path / "run"), sw.census(state)
    assert list(found) == list(census)
    assert [found[kind] for kind in found if kind != "cache"] == [census[kind] for kind in census if kind != "cache"]
    assert (found["cache"].leaves, found["cache"].handling) == (0, "not saved, restart=zeros_like")


def test_the_census_says_which_kinds_were_left_out(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES)), only="params")
    found = sw.inspect(tmp_path / "run")
    assert (found["params"].leaves, found["params"].handling) == (1, "-")
    assert (found["stats"].leaves, found["stats"].handling) == (0, "not in this checkpoint")


def test_a_report_is_iterated_leaf_by_leaf(tmp_path: pathlib.Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "saved", state)
    report = sw.preview(tmp_path / "saved", state)
    assert [one.outcome for one in report] == ["restored", "restored"]
