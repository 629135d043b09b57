"""Looking at a model: `plan`, `select`, `split` and `census` against `nnx.split`, `nnx.state` and `eqx.partition`.

The model has attributes only.  To go through an `nnx.List` takes Flax's functions time by the square of its length,
which would be most of what one sees of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import statewise as sw
from benchmarks.case import Call
from benchmarks.compare import WrongResultError, table, time_calls
from benchmarks.measure import Settings
from benchmarks.workloads.growth import NAMES, Layer, Stage, Stages

__all__ = ["look"]


def look(settings: Settings, leaves: int | None = None) -> list[dict[str, Any]]:
    """Tables of looking at a model, and of moving arrays between a model and a state; ten leaves make a layer."""
    leaves = leaves or (100 if settings.quick else 2000)
    model = Stages(leaves)
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
    # What these return is not a pytree of arrays to wait for.
    tables = [
        _table(key, titles[key], {label: _silent(call) for label, call in calls.items()}, settings, leaves)
        for key, calls in asked.items()
    ]
    return tables + _exchange(settings, leaves if settings.quick else 10 * leaves)


def _exchange(settings: Settings, leaves: int) -> list[dict[str, Any]]:
    """Arrays from a model to a state and back.  NNX's functions share them; ours copy them unless `copy=False`.

    Every call ends when its arrays are there: all calls of a table wait for a list of as many arrays, which they
    collect in the same way, also those that have made none.
    """
    model, *others = (Stages(leaves, seed) for seed in range(4))
    plan = sw.plan(model)
    state = plan.take(model)
    graphdef, variables = nnx.split(model)
    arrays = nnx.as_pure(variables)
    shared = arrays_of(model)
    plan.put(state, others[0])
    for mine in (others[0], plan.build(state)):
        if not all(np.array_equal(one, two) for one, two in zip(arrays_of(mine), shared, strict=True)):
            raise WrongResultError("put and build disagree")

    # Each writes into a model of its own: what copies leaves arrays there that the next write has to free.
    def put(call: Callable[[Stages], None], other: Stages) -> Call:
        written = variables_of(other)
        return lambda: (call(other), [variable.get_raw_value() for variable in written])

    asked: dict[str, dict[str, Call]] = {
        "take": {
            "`plan.take(model)`": lambda: jax.tree.leaves(plan.take(model)),
            "`plan.take(model, copy=False)`": lambda: jax.tree.leaves(plan.take(model, copy=False)),
            "`nnx.state(model)`, which shares": lambda: (_silent(lambda: nnx.state(model))(), shared),
        },
        "put": {
            "`plan.put(state, model)`": put(lambda other: plan.put(state, other), others[0]),
            "`plan.put(state, model, copy=False)`": put(lambda other: plan.put(state, other, copy=False), others[1]),
            "`nnx.update(model, state)`, which shares": put(lambda other: nnx.update(other, variables), others[2]),
        },
        "build": {
            "`plan.build(state)`": lambda: arrays_of(plan.build(state)),
            "`plan.build(state, copy=False)`": lambda: arrays_of(plan.build(state, copy=False)),
            "`nnx.merge(graphdef, state)`, which shares Variables too": lambda: arrays_of(
                nnx.merge(graphdef, variables)
            ),
            "`nnx.merge(graphdef, arrays)`, which shares": lambda: arrays_of(nnx.merge(graphdef, arrays)),
        },
    }
    titles = {
        "take": "From a model to a state",
        "put": "From a state to a model",
        "build": "From a state to a new model",
    }
    return [_table(key, titles[key], calls, settings, leaves) for key, calls in asked.items()]


def variables_of(model: Stages) -> list[nnx.Variable]:
    """The Variables, found by the shape of the model: much faster than a walk over its graph."""
    layers = [layer for stage in _of(model, Stage) for layer in _of(stage, Layer)]
    return [getattr(layer, name) for layer in layers for name in NAMES]


def _of(module: nnx.Module, kind: type) -> list[Any]:
    # In one order: a model that was built has its attributes in another than one that was made.
    return [child for _, child in sorted(vars(module).items()) if isinstance(child, kind)]


def arrays_of(model: Stages) -> list[jax.Array]:
    return [variable.get_raw_value() for variable in variables_of(model)]


def _table(key: str, title: str, calls: dict[str, Call], settings: Settings, leaves: int) -> dict[str, Any]:
    reference = next(iter(calls))
    rows = time_calls(calls, reference, settings)
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

    from benchmarks.models_eqx import stages

    twin = stages(arrays_of(model))
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
