"""Looking at a model: `plan`, `select`, `split` and `census` against `nnx.split`, `nnx.state` and `eqx.partition`."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
from flax import nnx

import statewise as sw
from benchmarks import models
from benchmarks.case import Call
from benchmarks.compare import WrongResultError, table, time_calls
from benchmarks.measure import Settings

__all__ = ["look"]


def look(settings: Settings, blocks: int | None = None) -> list[dict[str, Any]]:
    blocks = blocks or (25 if settings.quick else 500)
    model = models.Chain(blocks, rngs=nnx.Rngs(0))
    kinds = sw.Kinds.standard()
    filters = [kinds[name].of for name in kinds]
    plan = sw.plan(model)
    state = plan.take(model)
    _check(model, kinds, plan, state)
    # Kinds that nothing else uses, so that no plan of them is in use when the model is planned.
    unused = kinds.replace(cache=dataclasses.replace(kinds["cache"], saved=True))
    asked = {
        "plan": {
            "`sw.plan(model)`": lambda: unused.plan(model),
            "`sw.plan(model)`, repeated": lambda: sw.plan(model),
            "`nnx.split(model, ...)` by the same kinds": lambda: nnx.split(model, *filters),
        },
        "select": {
            "`sw.select(model, nnx.Param)`": lambda: sw.select(model, nnx.Param),
            '`state["params"]`': lambda: state["params"],
            "`nnx.state(model, nnx.Param)`": lambda: nnx.state(model, nnx.Param),
        },
        "split": {
            "`sw.split(model, kinds)`": lambda: sw.split(model, kinds),
            "`nnx.split(model, ...)` by the same kinds": lambda: nnx.split(model, *filters),
        },
        "census": {
            "`sw.census(model)`": lambda: sw.census(model),
            "`sw.census(plan)`": lambda: sw.census(plan),
            "`nnx.state(model)`, which counts nothing yet": lambda: nnx.state(model),
        },
    }
    _add_equinox(asked, model)
    titles = {"plan": "Planning", "select": "Selecting one kind", "split": "Splitting by kind", "census": "Counting"}
    tables = [_table(key, titles[key], calls, settings, 4 * blocks) for key, calls in asked.items()]
    return tables + _exchange(settings, blocks if settings.quick else 10 * blocks)


def _exchange(settings: Settings, blocks: int) -> list[dict[str, Any]]:
    """Arrays from a model to a state and back.  NNX's functions share them; ours copy them, unless told otherwise."""
    model, other = (models.Chain(blocks, rngs=nnx.Rngs(seed)) for seed in range(2))
    plan = sw.plan(model)
    state = plan.take(model)
    graphdef, variables = nnx.split(model)
    arrays = nnx.as_pure(variables)
    plan.put(state, other)
    pairs = zip(jax.tree.leaves(plan.take(other)), jax.tree.leaves(plan.take(plan.build(state))), strict=True)
    if not all(bool((one == another).all()) for one, another in pairs):
        raise WrongResultError("put and build disagree")
    asked: dict[str, dict[str, Call]] = {
        "take": {
            "`plan.take(model)`": lambda: plan.take(model),
            "`plan.take(model, copy=False)`": lambda: plan.take(model, copy=False),
            "`nnx.state(model)`, which shares": lambda: nnx.state(model),
        },
        "put": {
            "`plan.put(state, model)`": lambda: plan.put(state, other),
            "`plan.put(state, model, copy=False)`": lambda: plan.put(state, other, copy=False),
            "`nnx.update(model, state)`, which shares": lambda: nnx.update(other, variables),
        },
        "build": {
            "`plan.build(state)`": lambda: plan.build(state),
            "`plan.build(state, copy=False)`": lambda: plan.build(state, copy=False),
            "`nnx.merge(graphdef, state)`, which shares Variables too": lambda: nnx.merge(graphdef, variables),
            "`nnx.merge(graphdef, arrays)`, which shares": lambda: nnx.merge(graphdef, arrays),
        },
    }
    titles = {
        "take": "From a model to a state",
        "put": "From a state to a model",
        "build": "From a state to a new model",
    }
    return [_table(key, titles[key], calls, settings, 4 * blocks) for key, calls in asked.items()]


def _table(key: str, title: str, calls: dict[str, Call], settings: Settings, leaves: int) -> dict[str, Any]:
    reference = next(iter(calls))
    # What these return is no pytree of arrays to wait for.
    rows = time_calls({label: _silent(call) for label, call in calls.items()}, reference, settings)
    made = [{"key": label, "label": label, **rows[label]} for label in calls]
    return table(f"look_{key}", f"{title}, {leaves:,} leaves", made, per="call", reference=reference, leaves=leaves)


def _silent(call: Call) -> Call:
    def run() -> None:
        call()

    return run


def _add_equinox(asked: dict[str, dict[str, Call]], model: Any) -> None:
    if importlib.util.find_spec("equinox") is None:
        return
    import equinox as eqx

    from benchmarks.models_eqx import chain

    twin, _ = chain(model)
    for key in ("plan", "split"):
        asked[key]["`eqx.partition(model, eqx.is_array)`"] = lambda: eqx.partition(twin, eqx.is_array)
    asked["select"]["`eqx.filter(model, eqx.is_array)`"] = lambda: eqx.filter(twin, eqx.is_array)


def _check(model: Any, kinds: sw.Kinds, plan: sw.Plan, state: sw.State) -> None:
    """All of them see the same leaves."""
    expected = len(jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param))))
    found = {
        "plan": len(plan["params"]),
        "select": len(jax.tree.leaves(nnx.as_pure(sw.select(model, nnx.Param)))),
        "state": len(jax.tree.leaves(state["params"])),
        "split": len(jax.tree.leaves(nnx.as_pure(sw.split(model, kinds)[1]["params"]))),
        "census": sw.census(model)["params"].leaves,
    }
    wrong = {name: count for name, count in found.items() if count != expected}
    if wrong:
        raise WrongResultError(f"there are {expected} leaves of nnx.Param; found {wrong}")
