"""The command line on checkpoints: what it prints, its exit status, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from statewise.cli import main

MODELS = """
import jax, optax
from flax import nnx
import statewise as sw

def make(): return nnx.Linear(2, 3, rngs=nnx.Rngs(0))
def wider(): return nnx.Linear(2, 4, rngs=nnx.Rngs(0))
def state(): return sw.plan(make(), optimizers={"params": optax.sgd(0.1, momentum=0.9)}).take(make())
def plan(): return sw.plan(make())
def kinds(): return sw.Kinds(weights=sw.Kind(...))
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in a folder with a user's models, and a checkpoint of one."""
    (tmp_path / "models_of_checkpoints.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_checkpoints", raising=False)
    sw.save("first", state())

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def state(seed: int = 0) -> sw.State:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
    return sw.plan(model).take(model)


MAKE = "models_of_checkpoints:make"


# --- inspect -------------------------------------------------------------------------------------------------


def test_inspect_counts_a_checkpoint(run: Run) -> None:
    status, out, _ = run("inspect", "first")
    assert status == 0
    assert out == f"{sw.inspect('first')}\n"
    assert json.loads(run("inspect", "first", "--json")[1]) == sw.inspect("first").to_dict()


def test_inspect_counts_what_others_wrote(run: Run) -> None:
    safetensors.numpy.save_file({"a.b": np.ones(3, np.float32)}, "other.safetensors")
    status, out, _ = run("inspect", "other.safetensors", "--json")
    assert (status, json.loads(out)["total"]["nbytes"]) == (0, 12)


@pytest.mark.parametrize("name", ["run#3", "lr%3D0.1", "-run", "a b\nc", "[a]*", "caf\u00e9", "a:b"])
def test_a_path_may_have_any_letter(run: Run, name: str) -> None:
    Path("first").rename(name)
    status, out, _ = run("inspect", "--", name)
    assert (status, out) == (0, f"{sw.inspect(name)}\n")
    assert run("diff", "--", name, name)[0] == 0
    assert run("convert", "--to", "orbax", "--", name, f"{name}.plain")[0] == 0
    assert run("convert", "--", f"{name}.plain", f"{name}.safetensors")[0] == 0
    assert sw.inspect(f"{name}.safetensors").total.size == sw.inspect(name)["params"].size


def test_what_a_terminal_cannot_show_is_shown_escaped(run: Run) -> None:
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, "\udcff.safetensors")
    status, out, _ = run("convert", "--dry-run", "--to", "orbax", "\udcff.safetensors", "made")
    assert status == 0
    assert "\\udcff.safetensors to " in out
    status, _, err = run("convert", "\udcff.safetensors", "a\udcff", "--to", "orbax")
    assert status != 0
    assert "it is not UTF-8, and TensorStore takes only text" in err


def test_damage_is_a_finding(run: Run) -> None:
    Path("broken.safetensors").write_bytes(b"x" * 20)
    status, out, err = run("inspect", "broken.safetensors")
    assert (status, out) == (1, "")
    assert "is corrupted, or not a safetensors file" in err
    Path("first/statewise.json").write_text("{}")
    status, out, _ = run("inspect", "first", "--json")
    assert (status, json.loads(out)["error"]) == (1, "CorruptedError")


# --- convert -------------------------------------------------------------------------------------------------


def test_convert_there_and_back(run: Run) -> None:
    status, out, _ = run("convert", "first", "net.safetensors")
    assert status == 0
    assert out.splitlines()[3].split() == ["bias", "bias", "params", "(3,)", "float32", "matched", "-"]
    assert set(safetensors.numpy.load_file("net.safetensors")) == {"bias", "kernel"}
    status, out, _ = run("convert", "net.safetensors", "back", "--target", MAKE, "--json")
    data = json.loads(out)
    assert (status, data["ok"], data["to"], len(data["matched"])) == (0, True, "statewise", 2)
    assert sw.preview("back", state()).ok


@pytest.mark.parametrize("form", ["orbax", "linen"])
def test_convert_to_a_format_that_is_named(run: Run, form: str) -> None:
    assert run("convert", "first", "plain", "--to", form)[0] == 0
    assert list(sw.inspect("plain")) == ["arrays" if form == "orbax" else "params"]


def test_a_dry_run_writes_nothing(run: Run) -> None:
    status, out, _ = run("convert", "first", "net.safetensors", "--dry-run")
    assert (status, "matched" in out, Path("net.safetensors").exists()) == (0, True, False)


def test_what_is_in_the_way_is_a_finding(run: Run) -> None:
    wider = ("convert", "first", "out", "--target", "models_of_checkpoints:wider")
    status, out, err = run(*wider)
    assert (status, out) == (1, "")
    assert "kernel: Param(2, 4) float32  kind=params  (is (2, 3) in the source)" in err
    status, out, _ = run(*wider, "--json")
    assert (status, json.loads(out)["error"], len(json.loads(out)["leaves"])) == (1, "RestoreError", 2)
    status, out, _ = run(*wider, "--dry-run", "--json")
    assert (status, json.loads(out)["ok"], len(json.loads(out)["problems"])) == (1, False, 2)
    assert not Path("out").exists()


def test_renames_and_casts(run: Run) -> None:
    safetensors.numpy.save_file({"fc.weight": np.ones((2, 3)), "bias": np.zeros(3), "odd": np.ones(1)}, "w.safetensors")
    renames = ("--rename", "fc.weight=kernel", "--rename", "odd=")
    command = ("convert", "w.safetensors", "out", "--target", MAKE, *renames)
    assert run(*command)[0] == 1
    status, out, _ = run(*command, "--cast", "--json")
    data = json.loads(out)
    assert (status, data["unexpected"]) == (0, ["odd"])
    assert {one["note"] for one in data["matched"]} == {"from float64 to float32"}


def test_a_target_may_be_a_state_or_a_plan_and_have_kinds(run: Run) -> None:
    run("convert", "first", "net.safetensors")
    for number, target in enumerate(["state", "plan"]):
        name = f"models_of_checkpoints:{target}"
        assert run("convert", "net.safetensors", f"out{number}", "--target", name)[0] == 0
    assert "optimizer" in sw.inspect("out0")
    kinds = ("--kinds", "models_of_checkpoints:kinds")
    assert run("convert", "net.safetensors", "out2", "--target", MAKE, *kinds)[0] == 0
    assert list(sw.inspect("out2")) == ["weights"]
    assert run("convert", "net.safetensors", "out3", "--target", MAKE, "--abstract")[0] == 0
    status, _, err = run("convert", "net.safetensors", "o", "--target", "models_of_checkpoints:plan", *kinds)
    assert (status, err) == (
        2,
        "statewise: the target is already planned, by its own kinds: leave --kinds out\n",
    )


# --- diff ----------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_alike_are_fine(run: Run) -> None:
    sw.save("second", state())
    status, out, _ = run("diff", "first", "second", "--json")
    assert status == 0
    assert json.loads(out)["leaves"] == []
    assert run("diff", "first", MAKE)[0] == 0


def test_checkpoints_that_differ_are_a_finding(run: Run) -> None:
    changed = state().replace(params={"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)})
    sw.save("second", changed)
    status, out, _ = run("diff", "first", "second")
    assert status == 1
    assert "kernel" in out
    status, out, _ = run("diff", MAKE, "second", "--json")
    assert (status, [leaf["path"] for leaf in json.loads(out)["leaves"]]) == (1, ["kernel"])


def test_a_damaged_checkpoint_is_neither_equal_nor_different(run: Run) -> None:
    """As with diff(1), a script tells trouble from a difference by the exit status."""
    sw.save("second", state())
    (Path("second") / "_METADATA").write_text("{}")
    for argv in (["diff", "first", "second"], ["diff", "second", MAKE], ["diff", "first", "second", "--json"]):
        status, out, err = run(*argv)
        assert status == 2
        assert "is corrupted: _METADATA has 2 bytes" in (out or err)


# --- wrong usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["inspect", "nothing"], "There is nothing at"),
        (["convert", "nothing", "a.safetensors"], "there is nothing at 'nothing'"),
        (["convert", "first", "first"], "there is already something at 'first', and nothing is overwritten"),
        (["convert", "first", "out"], "a checkpoint of Statewise needs --target"),
        (["convert", "first", "a.safetensors", "--abstract"], "--kinds and --abstract are for a --target"),
        (["convert", "first", "a.safetensors", "--kinds", "x:y"], "--kinds and --abstract are for a --target"),
        (["convert", "first", "a.safetensors", "--rename", "kernel"], "--rename 'kernel' is not OLD=NEW"),
        (["convert", "first", "a.safetensors", "--rename", "kernal=w"], "rename names what the source does not have"),
        (["convert", "empty", "a.safetensors"], "is not a checkpoint in a known format"),
        (["convert", "first", "out", "--target", "models_of_checkpoints:mak"], "has no 'mak'; did you mean 'make'?"),
        (["diff", "first", "nothing"], "there is nothing at 'nothing', and it is not package.module:factory"),
        (["diff", "first", "no_such_module:make"], "there is no module 'no_such_module'"),
    ],
)
def test_what_was_asked_for_wrongly_is_one_line(run: Run, argv: list[str], says: str) -> None:
    Path("empty").mkdir()
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("statewise: ")
    assert says in err


@pytest.mark.parametrize(
    "argv", [["inspect"], ["convert", "a"], ["convert", "a", "b", "--to", "zip"], ["diff", "a"], ["inspect", "a", "b"]]
)
def test_arguments_that_are_none_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
