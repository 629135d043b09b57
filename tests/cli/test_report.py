"""`statewise report`: what it writes and prints, its exit status, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import statewise as sw
from statewise.cli import main

MODELS = """
import jax.numpy as jnp
import optax
from flax import nnx
import statewise as sw

print("a user's module may print")

class Norm(nnx.Module):
    def __init__(self): self.running_var = nnx.BatchStat(jnp.zeros(4))

def fine(): return nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
def other(): return nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(1))
def norm(): return Norm()
def kinds(): return sw.Kinds(weights=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
def plan(): return kinds().plan(fine(), optimizers={"weights": optax.sgd(0.1, momentum=0.9)})
def state(): return plan().take(fine())
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "models_for_report.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_for_report", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        targets = [f"models_for_report:{one[1:]}" if one.startswith("@") else one for one in arguments]
        status = main(["report", *targets])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_page_is_written_and_a_census_printed(run: Run, tmp_path: Path) -> None:
    status, out, err = run("@fine", "-o", "report.html")
    assert (status, err) == (0, "a user's module may print\n")
    assert out.splitlines()[0] == "report of models_for_report:fine: 1 leaf, 128 B, 0 findings"
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<title>models_for_report:fine · Statewise</title>" in page


def test_json_needs_no_page(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("@plan", "--mesh", "data=4", "--json")
    told = json.loads(out)
    assert status == 0
    assert (told["title"], told["what"], told["memory"]["mesh"]) == ("models_for_report:plan", "plan", {"data": 4})
    assert told["leaves"][0]["per_device"] == 32
    assert not list(tmp_path.glob("*.html"))


def test_json_and_a_page(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("@fine", "--json", "--output", "x.html", "--kinds", "models_for_report:kinds")
    assert (status, [kind["name"] for kind in json.loads(out)["kinds"]]) == (0, ["weights"])
    assert (tmp_path / "x.html").exists()


def test_findings_are_exit_status_1_and_the_page_is_written_all_the_same(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("@norm", "-o", "report.html")
    assert status == 1
    assert "1 finding" in out
    assert "statistic-starts-at-zero" in (tmp_path / "report.html").read_text()


def test_abstract_makes_no_arrays(run: Run) -> None:
    status, out, _ = run("@norm", "--abstract", "--json")
    assert (status, json.loads(out)["findings"]) == (0, [])


def test_two_that_differ_are_exit_status_1(run: Run) -> None:
    assert run("@fine", "@fine", "--json")[0] == 0
    status, out, _ = run("@fine", "@other", "--json")
    assert (status, [leaf["what"] for leaf in json.loads(out)["diff"]["leaves"]]) == (1, [["value"]])


def test_checkpoints_alone_and_beside_others(run: Run, tmp_path: Path) -> None:
    from flax import nnx

    model = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
    sw.save(tmp_path / "first", sw.plan(model).take(model))
    status, out, _ = run("first", "--json")
    told = json.loads(out)
    assert (status, told["what"], told["findings"], told["diff"]) == (0, "checkpoint", None, None)
    assert run("first", "@fine", "--json")[0] == 0
    assert run("@other", "first", "--json")[0] == 1


def test_a_page_without_a_name_is_wrong_usage(run: Run) -> None:
    assert run("@fine") == (2, "", "statewise: the page needs a file name: -o report.html\n")


def test_a_page_that_cannot_be_written_is_wrong_usage(run: Run) -> None:
    status, out, err = run("@fine", "-o", "no/such/folder/report.html")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        "statewise: 'no/such/folder/report.html' cannot be written: No such file or directory"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "there is nothing at 'nowhere', and it is not package.module:factory or file.py:factory"),
        (["@missing"], "'models_for_report' has no 'missing'"),
        (["@fine", "--mesh", "data"], "'data' is not a mesh: write its axes and their sizes, data=16,model=8"),
        (
            ["@plan", "--kinds", "models_for_report:kinds"],
            "Only models are planned by `kinds`; plans, states and checkpoints have their own. "
            "(hint: sw.report(target))",
        ),
        (
            ["models_for_report.py", "--mesh", "data=2"],
            "A checkpoint is not on a mesh; a plan says how its leaves are placed. "
            "(hint: sw.report(plan, path, mesh=mesh))",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, arguments: list[str], text: str) -> None:
    status, out, err = run(*arguments, "-o", "report.html")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"statewise: {text}"


def test_leaves_that_do_not_fit_the_mesh_are_a_finding_and_no_page_is_written(run: Run, tmp_path: Path) -> None:
    status, out, err = run("@state", "--mesh", "data=3", "-o", "report.html")
    assert (status, out) == (1, "")
    assert "kernel: Param(4, 8) float32  kind=weights  (axis 0 of 4 does not divide by (data=3))" in err
    assert not (tmp_path / "report.html").exists()
