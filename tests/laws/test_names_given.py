"""Names of kinds, wherever a function takes some: of a dict nobody knows what its values were to say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from refusals import refused

KINDS = sw.Kinds(params=sw.Kind(nnx.Param), cache=sw.Kind(nnx.Cache))


def model() -> nnx.Dict:
    return nnx.Dict(w=nnx.Param(jnp.ones((2, 2))), c=nnx.Cache(jnp.zeros((2, 2))))


def calls(tmp_path: Path) -> dict[str, Callable[[Any], Any]]:
    plan = KINDS.plan(model())
    state = plan.take(model())
    sw.save(tmp_path / "kept", state)
    return {
        "kinds": lambda given: sw.transfer(state, plan.take(model()), kinds=given),
        "only": lambda given: sw.restore(tmp_path / "kept", plan.take(model()), only=given),
        "only=": lambda given: sw.save(tmp_path / "other", state, only=given),
        "pack": lambda given: plan.take(model(), pack=given),
        "shared": lambda given: sw.scan_layers(lambda layer, x: (layer, x), state, jnp.ones(2), shared=given),
    }


@pytest.mark.parametrize("given", [{"params": "cache"}, nnx.Param, sw.Path("w"), 3], ids=str)
def test_what_names_no_kinds_is_refused(tmp_path: Path, given: Any) -> None:
    for option, call in calls(tmp_path).items():
        name = option.rstrip("=")
        with refused(sw.DeclarationError, f"{name}={given!r} does not name kinds.", hint=f"{name}=('params',)"):
            call(given)


def test_whatever_holds_names_will_do(tmp_path: Path) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: "params",
        lambda: ["params"],
        lambda: {"params"},
        lambda: iter(["params"]),
        lambda: {"params": 0}.keys(),
    ]
    for number, way in enumerate(ways):
        (tmp_path / str(number)).mkdir()
        every = calls(tmp_path / str(number))
        del every["shared"]  # wants layers
        for call in every.values():
            call(way())


def test_traps_watched_kinds_and_steps_likewise() -> None:
    with refused(sw.DeclarationError, f"ignore={nnx.Param!r} does not name rules.", hint="ignore=('tied-weights',)"):
        sw.lint(model(), ignore=nnx.Param)  # type: ignore[arg-type]
    with pytest.raises(sw.DeclarationError, match="does not name kinds"):
        sw.watch(model(), expect={"params": 1})
    with pytest.raises(sw.DeclarationError, match="takes names of kinds, not a dict"):
        sw.step(writes={"cache": 1})(lambda one: one)
