"""The census: every leaf counted once, under its kind, on every sort of model."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from rich.console import Console

import strategies
from statewise._src.core.plan import Kinds, plan
from statewise._src.filters.primitives import Path
from statewise._src.inspect.census import census
from statewise._src.inspect.select.select import count
from statewise._src.plan.kind import Kind
from statewise.errors import DeclarationError, OverlapError, StructureError, UnclaimedError


class Buffer(nnx.Variable):
    """A type that no preset knows."""


class Model(nnx.Module):
    """One leaf or more of most kinds."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.head = self.embed
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.buffer = Buffer(jnp.zeros((0, 3)))
        self.scalar = nnx.Variable(jnp.zeros((), jnp.bfloat16))
        self.nothing = nnx.Variable(None)
        self.moments = nnx.Variable({"a": jnp.ones(2), "b": (jnp.ones(3, jnp.int32),)})
        self.cells = nnx.data({0: {("x", 1): nnx.Cache(jnp.zeros(2))}})
        self.raw = jnp.ones(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen = nnx.Intermediate((x,))  # what `sow` leaves behind
        return x


@pytest.fixture
def model() -> Model:
    return Model(nnx.Rngs(0))


def test_counts_of_every_kind(model: Model) -> None:
    found = census(model)
    assert list(found) == list(Kinds.standard())
    assert {kind: found[kind].leaves for kind in found if found[kind].leaves} == {
        "params": 3,  # the embedding is tied, and counts once
        "stats": 2,
        "cache": 1,
        "rng": 2,
        "variables": 5,
    }
    assert (found["params"].size, found["params"].nbytes) == (28, 112)
    # A threefry key is two words of four bytes.
    assert (found["rng"].size, found["rng"].nbytes) == (2, 12)
    assert found["rng"].dtypes == {"uint32": 1, "key<fry>": 1}
    assert found["variables"].types == {"Buffer": 1, "Variable": 3, "Array": 1}
    assert found["variables"].dtypes == {"float32": 2, "several": 1, "-": 1, "bfloat16": 1}
    assert found["variables"].size == 0 + 5 + 0 + 1 + 2
    assert found["cache"].handling == "not saved, restart=zeros_like"
    assert found.total.leaves == count(model) == 13
    assert found.total.nbytes == sum(found[kind].nbytes for kind in found)


def test_an_unknown_type_is_seen_in_the_table(model: Model) -> None:
    line = next(line for line in str(census(model)).splitlines() if line.startswith("variables"))
    assert "Buffer 1" in line


def test_an_abstract_model_counts_alike() -> None:
    def make() -> nnx.Module:
        return nnx.MultiHeadAttention(4, 8, decode=True, rngs=nnx.Rngs(0))

    assert census(nnx.eval_shape(make)) == census(make())


def test_a_large_abstract_model_makes_no_array() -> None:
    large = nnx.eval_shape(lambda: nnx.Linear(10**6, 10**6, rngs=nnx.Rngs(0)))
    assert census(large)["params"].nbytes == 4 * (10**12 + 10**6)


def test_a_model_without_leaves_counts_nothing() -> None:
    found = census(nnx.Module())
    assert (found.total.leaves, found.total.size, found.total.nbytes) == (0, 0, 0)
    assert all(found[kind].leaves == 0 for kind in found)
    assert "total" in str(found)


def test_several_objects_and_optimizers() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average())
    found = census((model, optimizer, metrics))
    assert {kind: found[kind].leaves for kind in found if found[kind].leaves} == {
        "params": 2,
        "metrics": 2,
        "optimizer": 6,
    }
    assert census([model, model])["params"].leaves == 2
    assert census({"actor": model, "critic": model})["params"].leaves == 2
    assert census(nnx.state(model))["params"].leaves == 2


def test_own_kinds(model: Model) -> None:
    kinds = Kinds(head=Kind(Path("head/**") | Path("embed/**"), frozen=True), rest=Kind(...), none=Kind("tag"))
    found = census(model, kinds)
    assert (found["head"].leaves, found["rest"].leaves, found["none"].leaves) == (1, 12, 0)
    assert found["head"].handling == "frozen"
    with pytest.raises(UnclaimedError) as unclaimed:
        census(model, Kinds(params=Kind(nnx.Param)))
    assert len(unclaimed.value.leaves) == 10
    with pytest.raises(OverlapError):
        census(model, Kinds(params=Kind(nnx.Param), all=Kind(nnx.Variable), rest=Kind(...)))
    with pytest.raises(DeclarationError, match="Param is not a Kinds"):
        census(model, nnx.Param)


def test_a_plan_counts_its_optimizers_and_what_was_sown(model: Model) -> None:
    model(jnp.ones(7))
    planned = plan(model, optimizers={"params": optax.adam(0.1)})
    found = census(planned)
    assert found["intermediates"].leaves == 1
    assert found["intermediates"].size == 7
    assert found["optimizer"].leaves == 1 + 2 * 3
    assert found["optimizer"].size == 1 + 2 * found["params"].size
    assert found["params"] == census(model)["params"]
    assert census(model)["intermediates"] == found["intermediates"]
    with pytest.raises(DeclarationError, match="its own kinds"):
        census(planned, Kinds(rest=Kind(...)))
    assert census(planned, planned.kinds) == found


def test_a_state_counts_as_its_plan_does(model: Model) -> None:
    planned = plan(model)
    assert census(planned.take(model)) == census(planned)
    assert census(planned.abstract()) == census(planned)


def test_a_module_may_have_a_plan_of_its_own() -> None:
    class Planner(nnx.Module):
        def __init__(self, planned: Any) -> None:
            self.plan = planned
            self.size = nnx.Param(jnp.ones(3))

    assert census(Planner(plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))["params"].size == 3


def test_under_tracing(model: Model) -> None:
    seen = []

    @nnx.jit
    def look(model: Model) -> None:
        seen.append(census(model))

    look(model)
    assert seen == [census(model)]


@settings(max_examples=30)
@given(strategies.models())
def test_every_leaf_is_counted_exactly_once(model: nnx.Module) -> None:
    found = census(model)
    assert found.total.leaves == count(model)
    for kind in found:
        assert found[kind].leaves == sum(found[kind].dtypes.values()) == sum(found[kind].types.values())
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    arrays = [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    keys = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert found.total.nbytes == sum(array.nbytes for array in arrays) + 8 * len(keys)


def test_shows_itself_everywhere(model: Model) -> None:
    found = census(model)
    assert "params" in str(found)
    with Console(width=60).capture() as capture:
        Console(width=60).print(found)
    assert "<table>" in found._repr_html_()
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert data["total"]["leaves"] == 13
    assert [kind["name"] for kind in data["kinds"]] == list(found)
    assert capture is not None


def test_access() -> None:
    found = census(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert "params" in found
    assert "param" not in found
    assert len(found) == 9
    with pytest.raises(DeclarationError, match="'param'"):
        found["param"]


@pytest.mark.parametrize("bad", [nnx.Linear, None, 3, "model", np.ones(2)])
def test_what_is_no_model_is_refused(bad: Any) -> None:
    with pytest.raises(StructureError):
        census(bad)
