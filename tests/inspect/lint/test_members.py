"""Lint of an ensemble: each member, and what only all of them together tell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw


def make(seed: int, spread: float = 1.0, stream: int | None = None) -> nnx.Dict:
    return nnx.Dict(
        w=nnx.Param(jnp.ones(3)),
        var=nnx.BatchStat(jnp.full(3, spread)),
        drop=nnx.Dropout(0.5, rngs=nnx.Rngs(seed if stream is None else stream)),
    )


def stacked(*models: nnx.Dict, **axes: None) -> sw.State:
    plan = sw.plan(models[0])
    return plan.stacked(len(models), **axes).stack([plan.take(model) for model in models])


def test_members_of_their_own_are_clean() -> None:
    states = stacked(make(0), make(1), make(2))
    assert sw.lint(states) == []
    assert sw.lint(states.plan) == []
    assert sw.lint(states.plan.abstract()) == []


def test_what_is_found_in_some_members_says_in_which() -> None:
    every = sw.lint(stacked(make(0, 0.0), make(1, 0.0)))
    assert [str(finding) for finding in every] == [
        "statistic-starts-at-zero: 1 statistic of spread is all zeros. (var)"
    ]
    some = sw.lint(stacked(make(0), make(1, 0.0), make(2), make(3, 0.0)))
    assert [finding.message for finding in some] == ["1 statistic of spread is all zeros, in members 1, 3."]
    assert sw.lint(stacked(make(0), make(1, 0.0)), ignore="statistic-starts-at-zero") == []


def test_members_with_one_key_are_found() -> None:
    states = stacked(make(0, stream=7), make(1, stream=5), make(2, stream=7))
    (finding,) = sw.lint(states)
    assert finding.code == "members-share-noise"
    assert finding.message == "1 random stream has one key in several members."
    assert [str(leaf) for leaf in finding.leaves] == [
        "drop/rngs/key: RngKey(3,) key<fry>  kind=rng  (member 2 as member 0)"
    ]
    assert "plan.stacked(3, rng=None)" in finding.hint
    assert sw.lint(states, ignore="members-share-noise") == []


def test_noise_that_is_shared_by_name_is_none() -> None:
    models = [make(0, stream=7), make(1, stream=7)]
    assert [finding.code for finding in sw.lint(stacked(*models))] == ["members-share-noise"]
    assert sw.lint(stacked(*models, rng=None)) == []


def test_a_state_on_a_mesh_is_looked_at_too(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=devices[:2])
    plan = sw.plan(make(0)).stacked(2, over="data")
    states = jax.device_put(plan.stack([sw.plan(make(0)).take(make(seed)) for seed in (0, 0)]), plan.shardings(mesh))  # type: ignore[union-attr]
    assert [finding.code for finding in sw.lint(states)] == ["members-share-noise"]
