"""The command line on names: check, infer, and conversions by them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from statewise.cli import main

MODELS = """
from flax import nnx
import statewise as sw

def make(): return nnx.Linear(2, 3, rngs=nnx.Rngs(0))
names = sw.Names({"kernel": sw.Name("proj.weight", "o i -> i o"), "bias": "proj.bias"})
def other(): return sw.Names({"kernel": "proj.weight"})
number = 3
rows = {"kernel": "proj.weight"}
def of_size(size): return names
half = sw.Names({"bias": "proj.bias"})
"""
MAKE = "models_of_names:make"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in a folder with a user's models and names, and a published folder."""
    (tmp_path / "models_of_names.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_names", raising=False)
    Path("published").mkdir()
    arrays = {"proj.weight": np.arange(6, dtype=np.float32).reshape(3, 2)}
    safetensors.numpy.save_file(arrays, "published/a.safetensors")
    safetensors.numpy.save_file({"proj.bias": np.ones(3, np.float32)}, "published/b.safetensors")

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        return status, *capsys.readouterr()

    return run


def test_check(run: Run) -> None:
    status, out, _ = run("names", "check", "models_of_names:names", MAKE, "published")
    assert status == 0
    assert "restored 2" in out
    status, out, _ = run("names", "check", "models_of_names:other", MAKE, "published", "--json", "--abstract")
    assert status == 1
    assert json.loads(out)["ok"] is False
    files = ["published/a.safetensors", "published/b.safetensors"]
    assert run("names", "check", "models_of_names:names", MAKE, *files)[0] == 0


def test_infer(run: Run) -> None:
    status, out, _ = run("names", "infer", MAKE, "published")
    assert status == 0
    proposed: dict[str, sw.Names] = {"sw": sw}  # type: ignore[dict-item]
    exec(out, proposed)
    assert proposed["names"] == sw.Names({"kernel": sw.Name("proj.weight", "o i -> i o"), "bias": "proj.bias"})
    status, out, _ = run("names", "infer", MAKE, "published/b.safetensors", "--json")
    assert status == 1
    assert json.loads(out)["undecided"] == ["kernel"]
    status, out, _ = run("names", "infer", MAKE, "published", "--names", "models_of_names:half")
    assert (status, "'bias': 'proj.bias',\n" in out) == (0, True)


def test_convert_there_and_back(run: Run) -> None:
    options = ["--target", MAKE, "--names", "models_of_names:names"]
    assert run("convert", "published", "imported", *options, "--dry-run")[0] == 0
    assert not Path("imported").exists()
    status, out, _ = run("convert", "published", "imported", *options)
    assert status == 0
    assert "proj.weight" in out
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    state, _ = sw.restore("imported", sw.plan(model).take(model))
    assert np.array_equal(state["params"]["kernel"][...], np.arange(6).reshape(3, 2).T)
    assert run("convert", "imported", "back", *options, "--dry-run")[0] == 0
    assert not Path("back").exists()
    assert run("convert", "imported", "back", *options)[0] == 0
    back = safetensors.numpy.load_file("back/model.safetensors")
    assert np.array_equal(back["proj.weight"], np.arange(6).reshape(3, 2))
    assert sorted(back) == ["proj.bias", "proj.weight"]
    status, out, err = run("convert", "published", "not", "--target", MAKE, "--names", "models_of_names:half")
    assert status == 1
    assert "kernel: Param(2, 3) float32  kind=params  (has no row in the names)" in out + err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["names", "check", "models_of_names:make", MAKE, "published"], "models_of_names:make is Linear, not Names"),
        (
            ["names", "check", "models_of_names:rows", MAKE, "published"],
            "models_of_names:rows is dict, not a function that takes no arguments and returns Names",
        ),
        (
            ["names", "check", "models_of_names:of_size", MAKE, "published"],
            "models_of_names:of_size is a function that needs arguments (size); name a function without any that "
            "returns Names",
        ),
        (
            ["names", "infer", "models_of_names:number", "published"],
            "models_of_names:number is int, not a function that takes no arguments and returns the model",
        ),
        (["names", "check", "models_of_names:names", MAKE, "nowhere"], "There is nothing at"),
        (["names", "infer", MAKE, "published", "nowhere.safetensors"], "There is no file at"),
        (
            ["convert", "published", "x.safetensors", "--names", "models_of_names:names"],
            "--names are those of the leaves of a --target, and there is none",
        ),
        (
            ["convert", "published", "x", "--target", MAKE, "--names", "models_of_names:names", "--rename", "a=b"],
            "--names and --rename do not go together",
        ),
    ],
)
def test_what_was_asked_for_wrongly_is_one_line(run: Run, argv: list[str], says: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("statewise: ")
    assert says in err
    assert err.count("\n") == 1
