"""Looking at a model: `plan`, `select`, `split` and `census` against `nnx.split`, `nnx.state` and `eqx.partition`."""

from __future__ import annotations

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
    asked = {
        "plan": {
            "`sw.plan(model)`": lambda: sw.plan(model),
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
