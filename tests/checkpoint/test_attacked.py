"""What an attacker has found in the checkpoints, each as it is now."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import numbered
from refusals import refused
from statewise._src.common.narrowing import WIDE
from strategies import Node


def state_of(**values: Any) -> sw.State:
    model = Node(**{name: nnx.Param(value) for name, value in values.items()})
    return sw.plan(model).take(model)


def test_numbers_of_64_bits_are_not_cut_where_there_are_none(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        wide = state_of(a=jnp.arange(3, dtype="int64") * 2**33)
        sw.save(tmp_path / "wide", wide)
    with refused(
        sw.RestoreError,
        f"{tmp_path / 'wide'} does not fit the target: 1 leaf differs. Nothing was read or changed.",
        leaves=["a: Param(3,) int64  kind=params  (is int64, and this process has no 64-bit numbers)"],
        hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
    ):
        sw.restore(tmp_path / "wide", wide.plan.abstract())


@pytest.mark.parametrize(("value", "to"), [([300, 1], "int8"), ([-1, 1], "uint8"), ([1e6, 1], "float16")])
def test_a_cast_loses_no_number(tmp_path: pathlib.Path, value: list[float], to: str) -> None:
    from_ = "float32" if to == "float16" else "int32"
    sw.save(tmp_path / "run", state_of(a=jnp.array(value, from_)))
    target = state_of(a=jnp.zeros(2, to))
    wider = to == "float16"
    with refused(
        sw.RestoreError,
        "Casting would lose numbers: 1 leaf has some that the new dtype cannot represent. Nothing was changed.",
        leaves=[
            f"a: Param(2,) {to}  kind=params  "
            f"({from_} numbers, one of magnitude {abs(value[0]):.3g}, that {to} cannot represent)"
        ],
        kind="params",
        hint="sw.restore(path, target.cast(params='bfloat16'), cast=True)"
        if wider
        else f"plan the model with the dtype that was saved\n{WIDE}",
    ):
        sw.restore(tmp_path / "run", target, cast=True)
    assert np.array_equal(target["params"]["a"], np.zeros(2))


def test_what_fits_is_cast(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(a=jnp.array([127, -128]), b=jnp.array([jnp.inf, 1.0 + 2**-20])))
    target = state_of(a=jnp.zeros(2, "int8"), b=jnp.zeros(2, "bfloat16"))
    state, report = sw.restore(tmp_path / "run", target, cast=True)
    assert report.counts == {"params": {"cast": 2}}
    assert state["params"]["a"].tolist() == [127, -128]
    assert state["params"]["b"].tolist() == [np.inf, 1]


def test_a_folder_with_a_number_is_no_step(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
        (tmp_path / "99").mkdir()
        assert checkpoints.steps == (1,)
        assert checkpoints.restore(numbered(0)).step == 1
        assert checkpoints.save(2, numbered(2))


def test_metrics_that_best_fn_cannot_judge_are_refused_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: -metrics["loss"])
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(0, numbered(0), metrics={"loss": 1.0})
        with refused(
            sw.SaveError,
            "best_fn cannot judge these metrics: KeyError: 'loss'.",
            hint="give each step what best_fn looks at: checkpoints.save(step, state, metrics={'loss': loss})",
        ):
            checkpoints.save(1, numbered(1), metrics={})
        checkpoints.save(2, numbered(2), metrics={"loss": 0.0})
        checkpoints.wait()
        assert checkpoints.steps == (2,)


@pytest.mark.parametrize("only", [3, [["params"]], [None]])
def test_only_names_kinds(tmp_path: pathlib.Path, only: Any) -> None:
    state = state_of(a=jnp.ones(2))
    sw.save(tmp_path / "run", state)
    for call in (sw.save, sw.restore, sw.preview):
        with refused(sw.DeclarationError, f"only={only!r} names no kinds.", hint="only=('params',)"):
            call(tmp_path / "run", state, only=only)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (b"run", "bytes is no path."),
        ("", "'' is no path."),
        ("a\0b", "'a\\x00b' cannot be a path: it has a null byte."),
    ],
)
def test_what_is_no_path(path: Any, message: str) -> None:
    with refused(sw.SaveError, message, hint="sw.save('run/step_100', state)"):
        sw.save(path, state_of(a=jnp.ones(2)))


def test_a_name_that_is_too_long(tmp_path: pathlib.Path) -> None:
    with pytest.raises(sw.SaveError, match="File name too long"):
        sw.save(tmp_path / ("x" * 300), state_of(a=jnp.ones(2)))
