"""split and merge: inverse to each other on any model, and refusing in full whatever does not fit."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings

import modes
import strategies
from parts_model import STANDARD, Model, assert_same, flat, notes
from statewise._src.core.plan import Kinds
from statewise._src.filters.primitives import Path
from statewise._src.inspect.select.parts import merge, split, update
from statewise._src.inspect.select.select import count
from statewise._src.plan.kind import Kind
from statewise.errors import DeclarationError, OverlapError, StructureError, UnclaimedError

TWO = Kinds(params=Kind(nnx.Param), rest=Kind(...))


@pytest.fixture
def model() -> Model:
    return Model()


# --- split ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(strategies.models())
def test_split_then_merge_is_the_identity(model: nnx.Module) -> None:
    for kinds in (STANDARD, TWO):
        graphdef, parts = split(model, kinds)
        assert list(parts) == list(kinds)
        assert sum(len(flat(part)) for part in parts.values()) == count(model)
        assert_same(merge(graphdef, parts), model)
        assert_same(nnx.merge(graphdef, *parts.values()), model)
        assert_same(merge(nnx.graphdef(model), parts), model)


def test_parts_hold_the_live_variables(model: Model) -> None:
    _, parts = split(model, STANDARD)
    assert parts["params"]["first"]["kernel"] is model.first.kernel
    assert parts["lora"] == nnx.State({})
    assert {type(part) for part in parts.values()} == {type(nnx.state(model))}


def test_tied_weights_stay_tied(model: Model) -> None:
    graphdef, parts = split(model, STANDARD)
    new = merge(graphdef, parts)
    assert new.tied is new.first
    assert new.first.kernel is model.first.kernel is nnx.merge(graphdef, *parts.values()).first.kernel, "as in NNX"
    raw = {kind: nnx.to_pure_dict(part) for kind, part in parts.items()}
    assert merge(graphdef, raw).first.kernel is not model.first.kernel


def test_split_refuses_what_plan_refuses(model: Model) -> None:
    with pytest.raises(UnclaimedError) as unclaimed:
        split(model, Kinds(params=Kind(nnx.Param)))
    assert len(unclaimed.value.leaves) == count(model) - count(model, nnx.Param)
    with pytest.raises(OverlapError, match="params and first"):
        split(model, Kinds(params=Kind(nnx.Param), first=Kind(Path("first/*")), rest=Kind(...)))
    for bad in (nnx.Param, None, {"params": Kind(nnx.Param)}):
        with pytest.raises(DeclarationError, match="is not a Kinds"):
            split(model, bad)
    with pytest.raises(StructureError, match="class Model"):
        split(Model, STANDARD)


def test_containers_come_back_as_they_were(model: Model) -> None:
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    graphdef, parts = split([model, other], TWO)
    assert set(parts["params"]) == {0, 1}
    new = merge(graphdef, parts)
    assert isinstance(new, list)
    assert_same(nnx.state(new[1]), nnx.state(other))
    assert isinstance(merge(*split((model, other), TWO)), tuple)
    assert set(merge(*split({"a": model}, TWO))) == {"a"}
    assert merge(*split([other], Kinds(kernel=Kind(Path("kernel")), rest=Kind(...))))[0].kernel.shape == (2, 2)


def test_a_model_without_leaves() -> None:
    graphdef, parts = split(nnx.Module(), STANDARD)
    assert isinstance(merge(graphdef, parts), nnx.Module)


# --- the graph definition ------------------------------------------------------------------------------------


def test_the_graph_definition_is_static_to_jax(model: Model) -> None:
    traces = []

    def total(graphdef: Any, parts: Any) -> jax.Array:
        traces.append(1)
        return merge(graphdef, parts).first.kernel[...].sum()

    model.nothing.set_raw_value(jnp.zeros(()))
    for jitted in (jax.jit(total, static_argnums=0), jax.jit(total)):
        traces.clear()
        for _ in range(3):
            graphdef, parts = split(model, STANDARD)
            assert jitted(graphdef, parts) == model.first.kernel[...].sum()
        assert len(traces) == 1
    graphdef, _ = split(model, STANDARD)
    assert jax.tree.leaves(graphdef) == []
    assert isinstance(graphdef, nnx.GraphDef)
    assert graphdef == split(model, TWO)[0]
    assert hash(graphdef) == hash(split(model, TWO)[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        graphdef.num_leaves = 3


def test_the_graph_definition_goes_through_pickle_and_scan() -> None:
    # Flax 0.12.8 does not tell the type of a hijax Variable in a scan.
    with nnx.var_defaults(hijax=nnx.var_defaults().hijax and not modes.hijax_is_written_in_traces()):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    graphdef, parts = split(model, STANDARD)
    again = pickle.loads(pickle.dumps(graphdef))
    assert_same(merge(again, parts), model)

    def body(carry: Any, x: jax.Array) -> Any:
        graphdef, parts = carry
        model = merge(graphdef, parts)
        model.kernel[...] = model.kernel[...] + x
        return split(model, STANDARD), None

    (_, parts), _ = jax.lax.scan(body, (graphdef, parts), jnp.ones(3))
    assert (parts["params"]["kernel"][...] == model.kernel[...] + 3).all()


def test_nothing_is_slower_than_it_has_to_be(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = nnx.flatten
    monkeypatch.setattr(nnx, "flatten", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    graphdef, parts = split(model, STANDARD)
    assert len(calls) == 1
    merge(graphdef, parts)
    assert len(calls) == 1
    update(model, parts["params"])
    assert len(calls) == 2


# --- merge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_merge_takes_parts_in_every_form(model: Model, raw: bool) -> None:
    graphdef, parts = split(model, TWO)
    whole = nnx.state(model)
    if raw:
        parts = {kind: jax.tree.map(lambda x: x, nnx.to_pure_dict(part)) for kind, part in parts.items()}
        whole = nnx.State(nnx.to_pure_dict(whole))
    as_paths = {kind: dict(nnx.to_flat_state(nnx.state(model, kinds.of))) for kind, kinds in TWO.items() if not raw}
    forms = [parts, list(parts.values()), tuple(parts.values()), whole]
    if not raw:
        as_paths["rest"] = {
            path: leaf for path, leaf in nnx.to_flat_state(whole) if tuple(path) not in as_paths["params"]
        }
        forms += [as_paths, nnx.to_flat_state(whole)]
    for form in forms:
        assert_same(merge(graphdef, form), model)


def test_merge_goes_by_path_where_nnx_goes_by_position() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.zeros(2))
            self.b = nnx.Param(jnp.ones(2))

    graphdef, parts = split(Two(), Kinds(all=Kind(...)))
    renamed = nnx.State({"b": parts["all"]["a"], "c": parts["all"]["b"]})
    assert (nnx.merge(graphdef, renamed).a[...] == 0).all(), "NNX takes b for a and c for b"
    with pytest.raises(StructureError, match="2 leaves differ") as caught:
        merge(graphdef, {"all": renamed})
    assert notes(caught.value) == {"c": "not in the model", "a": "missing from the parts"}


def test_merge_lists_every_problem_at_once(model: Model) -> None:
    graphdef, parts = split(model, STANDARD)
    parts["params"]["first"]["kernel"] = nnx.Param(jnp.ones((9, 9)))
    parts["params"]["first"]["bias"] = nnx.Param(jnp.ones(4, jnp.bfloat16))
    parts["lora"]["layers"] = nnx.State({0: {"mean": parts["stats"]["layers"][0]["mean"]}})
    parts["stats"]["layers"][0]["var"] = nnx.Cache(jnp.ones(4))
    parts["cache"]["surplus"] = nnx.Cache(jnp.ones(1))
    del parts["variables"]["raw"]
    parts["variables"]["several"] = nnx.Variable({"a": jnp.ones(2)})
    with pytest.raises(StructureError) as caught:
        merge(graphdef, parts)
    assert notes(caught.value) == {
        "first/kernel": "is (9, 9) in the parts",
        "first/bias": "is bfloat16 in the parts",
        "layers/0/mean": "given in lora and stats",
        "layers/0/var": "is a Cache in the parts",
        "surplus": "not in the model",
        "several": "is a value of another structure in the parts",
        "raw": "missing from the parts",
    }
    assert "sw.split(model, kinds)" in str(caught.value)
    # What NNX knows of a graph definition is paths and types.
    with pytest.raises(StructureError) as plain:
        merge(nnx.graphdef(model), parts)
    assert set(notes(plain.value)) == {"layers/0/mean", "layers/0/var", "surplus", "raw"}


def test_keys_of_another_type_are_told_apart(model: Model) -> None:
    graphdef, parts = split(model, STANDARD)
    parts["stats"] = nnx.State({"layers": {"0": nnx.to_pure_dict(parts["stats"])["layers"][0]}})
    with pytest.raises(StructureError) as caught:
        merge(graphdef, parts)
    assert (
        caught.value.leaves[0].note
        == "not in the model, whose path is ('layers', 0, 'mean'): this one is ('layers', '0', 'mean')"
    )


@pytest.mark.parametrize("bad", [None, 3, jnp.ones(2), "state", {"a": 3}, [nnx.Linear]])
def test_merge_refuses_what_are_no_parts(model: Model, bad: Any) -> None:
    graphdef, _ = split(model, STANDARD)
    with pytest.raises(StructureError, match="is not a state"):
        merge(graphdef, bad)


def test_merge_refuses_what_is_no_graph_definition(model: Model) -> None:
    with pytest.raises(StructureError, match="Model is not a graph definition"):
        merge(model, nnx.state(model))


def test_spent_arrays_are_refused(model: Model) -> None:
    graphdef, parts = split(model, STANDARD)
    parts["params"]["first"]["kernel"][...].delete()
    for fails in (lambda: merge(graphdef, parts), lambda: update(Model(), parts["params"])):
        with pytest.raises(StructureError, match="1 leaf differs") as caught:
            fails()
        assert notes(caught.value) == {"first/kernel": "donated by an earlier step"}


def test_merge_of_abstract_parts() -> None:
    graphdef, parts = split(nnx.eval_shape(Model), STANDARD)
    assert isinstance(merge(graphdef, parts).first.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    concrete, filled = split(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), STANDARD)
    values = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    assert merge(concrete, {**filled, "params": values}).kernel.sum() == 6
