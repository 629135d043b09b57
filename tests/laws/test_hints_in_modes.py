"""Hints that call Flax work in the mode that they are given in: in tree mode Flax refuses models with tied weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
import statewise as sw
from hints import code_of

TOKENS = jnp.arange(4)
GRAPH = pytest.mark.parametrize("graph", [True, False], ids=["graph mode", "tree mode"])


class Bounded(nnx.Param[Any]):
    def set_value(self, value: Any, **options: Any) -> None:
        super().set_value(jnp.clip(value, -1, 1), **options)


class Tied(nnx.Module):
    def __init__(self, key: Any = 0) -> None:
        rngs = nnx.Rngs(key)
        self.embed = nnx.Embed(4, 3, rngs=rngs)
        self.tied = self.embed.embedding
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.bound = Bounded(jnp.full(3, 2.0))

    def __call__(self, tokens: Any) -> Any:
        return self.dropout(self.norm(self.embed(tokens))) @ self.tied[...].T


def half_evaluating() -> Tied:
    model = Tied()
    model.set_attributes(deterministic=True, graph=True)
    return model


def hint_of(rule: str, *given: Any, **options: Any) -> str:
    """The hint of a rule of lint; empty where it finds nothing."""
    return next((found.hint for found in sw.lint(*given, **options) if found.code == rule), "")


@GRAPH
@pytest.mark.parametrize("several", [False, True])
def test_a_step_that_only_evaluates(graph: bool, several: bool) -> None:
    with nnx.set_graph_mode(graph):
        objects = [Tied(), Tied()][: 1 + several]
        state = sw.plan(*objects).take(*objects)
        with pytest.raises(sw.UndeclaredWriteError) as caught:
            sw.step(lambda *given: given[0](given[-1]))(state, TOKENS)
        line = modes.in_mode("model.eval()", graph)
        assert f"if the function only evaluates: {line} as its first line" in str(caught.value.hint)

        @sw.step
        def evaluate(*given: Any) -> Any:
            exec(line, {"model": given[0]})
            return given[0](given[-1])

        assert evaluate(state, TOKENS).shape == (4, 4)


@GRAPH
def test_a_model_that_evaluates_by_half(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        one, _, other = hint_of("statistics-written-by-eval", half_evaluating()).partition("  # or ")
        assert one == modes.in_mode("model.eval()", graph)
        exec(one, {"model": (model := half_evaluating())})
        for mended in (model, eval(other, {"model": half_evaluating(), "nnx": nnx})):
            assert mended.norm.use_running_average
            assert not hint_of("statistics-written-by-eval", mended)


@GRAPH
def test_frozen_statistics_that_are_updated(graph: bool) -> None:
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))
    with nnx.set_graph_mode(graph):
        hint = hint_of("frozen-statistics-in-training", model := Tied(), kinds=kinds)
        exec(hint.partition("  # or ")[2].removesuffix(" as a step's first line"), {"model": model})
        assert not hint_of("frozen-statistics-in-training", model, kinds=kinds)


@GRAPH
def test_a_model_in_another_mode_than_planned(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        plan, model = sw.plan(Tied()), Tied()
        model.eval(graph=True)
        with pytest.raises(sw.StructureError, match="static attributes have changed") as caught:
            plan.take(model)
        hint = str(caught.value.hint).removesuffix(" back to what was planned")
        train, evaluate = hint.partition("  # or ")[2].split(" / ")
        exec(evaluate, {"model": model})
        exec(train, {"model": model})
        plan.take(model)


@GRAPH
def test_hooks_that_an_optimizer_does_not_run(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        model = Tied()
        plan = sw.plan(model, optimizers={"params": optax.sgd(1.0)})
        scope: dict[str, Any] = {"sw": sw, "nnx": nnx, "Bounded": Bounded}
        exec(hint_of("hook-not-run", plan), scope)
        state, _ = scope["run_hooks"](plan.take(model))
        np.testing.assert_array_equal(state["params"]["bound"], 1.0)
        with modes.classic():
            model = Tied()
            optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
        exec(hint_of("hook-not-run", model, optimizer), {"nnx": nnx, "model": model, "Bounded": Bounded})
        np.testing.assert_array_equal(model.bound[...], 1.0)


@GRAPH
def test_models_that_are_to_be_stacked(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        plan = sw.plan(Tied()).stacked(2)
        with pytest.raises(sw.StructureError, match="is not what was planned") as caught:
            plan.take(Tied())
        line = str(caught.value.hint).splitlines()[0].partition("stacked arrays, ")[2]
        with nnx.var_defaults(hijax=False, ref=False):
            keys = jax.random.split(jax.random.key(0), 2)
            plan.take(eval(line, {"nnx": nnx, "make_model": Tied, "keys": keys}))
        same = plan.stack([sw.plan(Tied()).take(Tied())] * 2)
        (found,) = sw.lint(same)
        line = code_of(found, "vmap")
        assert line == modes.in_mode("nnx.vmap(make_model)", graph) + "(jax.random.split(key, members))"


@GRAPH
def test_arrays_that_are_not_a_state(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        graphdef, _ = sw.split(model := Tied(), sw.Kinds.standard())
        with pytest.raises(sw.StructureError, match="is not a state") as caught:
            sw.merge(graphdef, [1])
        state = eval(code_of(caught.value, "nnx.state"), {"nnx": nnx, "model": model})
        assert sw.merge(graphdef, state).tied.shape == (4, 3)
