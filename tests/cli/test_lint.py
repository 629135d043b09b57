"""`statewise lint`: what it prints, its exit status, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from statewise.cli import main

MODELS = """
import jax.numpy as jnp
import optax
from flax import nnx
import statewise as sw

print("a user's module may print")

class Norm(nnx.Module):
    def __init__(self): self.running_var = nnx.BatchStat(jnp.zeros(3))

def fine(): return nnx.Linear(2, 3, rngs=nnx.Rngs(0))
def norm(): return Norm()
def kinds(): return sw.Kinds(mine=sw.Kind(nnx.BatchStat, saved=False))
def pair(): return fine(), norm()
def planned(): return kinds().plan(norm())
def state(): return planned().take(norm())
def decoder():
    model = nnx.MultiHeadAttention(num_heads=1, in_features=2, rngs=nnx.Rngs(0))
    model.init_cache((1, 4, 2))
    return model
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "models_for_lint.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_for_lint", raising=False)

    def run(name: str, *options: str) -> tuple[int, str, str]:
        status = main(["lint", f"models_for_lint:{name}", *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_model_without_findings(run: Run) -> None:
    assert run("fine")[:2] == (0, "no findings\n")
    status, out, _ = run("fine", "--json")
    assert (status, json.loads(out)) == (0, {"findings": []})


def test_findings_are_shown_in_full(run: Run) -> None:
    status, out, err = run("norm")
    assert (status, err) == (1, "a user's module may print\n")
    assert out.splitlines() == [
        "statistic-starts-at-zero: 1 statistic of spread is all zeros.",
        "  running_var: BatchStat(3,) float32  kind=stats",
        "  why: dividing by its square root gives infinities or huge numbers until enough batches were seen",
        "  hint: self.running_var = BatchStat(jnp.ones(...))",
    ]


def codes(run: Run, name: str, *options: str) -> list[str]:
    status, out, _ = run(name, *options, "--json")
    found = [finding["code"] for finding in json.loads(out)["findings"]]
    assert status == bool(found)
    return found


def test_several_objects_plans_and_states(run: Run) -> None:
    assert codes(run, "pair") == ["statistic-starts-at-zero"]
    assert codes(run, "planned") == ["statistics-not-saved"]
    assert codes(run, "state") == ["statistic-starts-at-zero", "statistics-not-saved"]


def test_kinds_and_abstract_models(run: Run) -> None:
    kinds = ("--kinds", "models_for_lint:kinds")
    assert codes(run, "norm", *kinds) == ["statistic-starts-at-zero", "statistics-not-saved"]
    assert codes(run, "norm", *kinds, "--abstract") == ["statistics-not-saved"]
    assert codes(run, "fine", *kinds) == ["unclaimed-leaf"]


def test_traps_that_are_ignored(run: Run) -> None:
    ignored = ("--ignore", "statistic-starts-at-zero", "--ignore", "raw-array")
    assert codes(run, "norm", *ignored) == []
    status, out, err = run("norm", "--ignore", "nonsense")
    assert (status, out) == (2, "")
    assert "statewise: There is no rule 'nonsense'. (hint: one of: statistic-starts-at-zero" in err


def test_how_much_is_to_be_decoded(run: Run) -> None:
    assert codes(run, "decoder", "--decode-length", "4") == []
    assert codes(run, "decoder", "--decode-length", "5") == ["cache-too-small"]


def test_wrong_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("missing")[0] == 2
    assert run("planned", "--kinds", "models_for_lint:kinds")[0] == 1  # the plan's own
    status, _, err = run("planned", "--kinds", "models_for_lint:fine")
    assert (status, "not Kinds" in err) == (2, True)
    with pytest.raises(SystemExit) as caught:
        main(["lint", "models_for_lint:fine", "--decode-length", "many"])
    assert caught.value.code == 2
    assert "--decode-length" in capsys.readouterr().err


STEPS = """
import optax
from flax import nnx
import statewise as sw

def planned():
    return sw.plan(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), optimizers={"params": optax.sgd(0.1)})

def fn(model, x): return (model(x) ** 2).mean()
whole = sw.train_step(fn)
parts = sw.train_step(fn, microbatches=2)
"""


def test_steps_that_run_on_the_model(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps_for_lint.py").write_text(STEPS)
    target = "steps_for_lint.py:planned"
    assert main(["lint", target, "--step", "steps_for_lint.py:whole"]) == 0
    assert main(["lint", target, "--step", "steps_for_lint.py:whole", "--step", "steps_for_lint.py:parts"]) == 1
    assert "microbatches-with-batch-statistics: fn splits its batch into 2" in capsys.readouterr().out
    assert main(["lint", target, "--step", "steps_for_lint.py:fn"]) == 2
    assert capsys.readouterr().err == "statewise: steps_for_lint.py:fn is function, not a step\n"
