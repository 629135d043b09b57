"""`statewise memory`: what it prints, its exit status, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from statewise.cli import main

MODELS = """
import optax
from flax import nnx
import statewise as sw

def make(): return nnx.Linear(16, 64, use_bias=False, rngs=nnx.Rngs(0))
def kinds(): return sw.Kinds(weights=sw.Kind(nnx.Param, placement=sw.Sharded("data", "model")))
def plan(): return kinds().plan(make(), optimizers={"weights": optax.sgd(0.1, momentum=0.9)})
def state(): return plan().take(make())
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "models_for_memory.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_for_memory", raising=False)

    def run(name: str, mesh: str, *options: str) -> tuple[int, str, str]:
        status = main(["memory", f"models_for_memory:{name}", "--mesh", mesh, *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_table_that_says_what_is_not_in_it(run: Run) -> None:
    status, out, err = run("plan", "data=4,model=2")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "memory of each of 8 devices, mesh (data=4, model=2): ACTIVATIONS ARE NOT INCLUDED",
        "kind       arrays    bytes  per device  saved if sharded",
        "--------------------------------------------------------",
        "weights         1  4.0 KiB       512 B                 -",
        "optimizer       1  4.0 KiB       512 B                 -",
        "gradients                        512 B",
        "--------------------------------------------------------",
        "total                          1.5 KiB",
        "",
        "the largest leaves",
        "path                              kind       per device",
        "-------------------------------------------------------",
        "kernel                            weights         512 B",
        "optimizer/weights/0/trace/kernel  optimizer       512 B",
    ]


@pytest.mark.parametrize("options", [[], ["--abstract"], ["--kinds", "models_for_memory:kinds"]])
def test_json_of_a_model(run: Run, options: list[str]) -> None:
    status, out, _ = run("make", "data=16, model=4", "--json", *options)
    told = json.loads(out)
    assert status == 0
    assert (told["mesh"], told["devices"]) == ({"data": 16, "model": 4}, 64)
    assert told["total"] == (4096 // 64 if "--kinds" in options else 4096)


def test_a_state_has_its_plan(run: Run) -> None:
    assert json.loads(run("state", "data=4,model=2", "--json")[1])["total"] == 3 * 512


@pytest.mark.parametrize(
    "mesh", ["", "data", "data=", "=4", "data=0", "data=-1", "data=four", "data=4,", "data=4;model=2"]
)
def test_a_mesh_that_is_none(run: Run, mesh: str) -> None:
    status, out, err = run("make", mesh)
    assert (status, out) == (2, "")
    assert err == f"statewise: {mesh!r} is not a mesh: write its axes and their sizes, data=16,model=8\n"


def test_an_axis_that_is_named_twice(run: Run) -> None:
    status, _, err = run("make", "data=2,data=4")
    assert (status, err) == (2, "statewise: 'data=2,data=4' is not a mesh: it has two axes 'data'\n")


def test_a_mesh_that_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["memory", "models_for_memory:make"])
    assert caught.value.code == 2
    assert "--mesh" in capsys.readouterr().err


def test_leaves_that_do_not_fit_are_a_finding(run: Run) -> None:
    status, out, err = run("plan", "data=3,model=2")
    assert (status, out) == (1, "")
    assert "kernel: Param(16, 64) float32  kind=weights  (axis 0 of 16 does not divide by (data=3))" in err
    status, out, _ = run("plan", "data=3,model=2", "--json")
    told = json.loads(out)
    assert (status, told["error"], told["leaves"][0]["path"]) == (1, "PlacementError", "kernel")


def test_kinds_beside_a_plan(run: Run) -> None:
    status, _, err = run("plan", "data=2", "--kinds", "models_for_memory:kinds")
    assert status == 2
    assert err == ("statewise: models_for_memory:plan is already planned, by its own kinds: leave --kinds out\n")
