"""Kinds as pure data, and every declaration that cannot stand."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from refusals import refused
from strategies import Node, OwnStat, filters

NAMES = ("params", "stats", "cache", "rest")
CACHE = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0)


class Unhashable:
    """A function of one array that cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, array: Any) -> Any:
        return array


def declarations() -> st.SearchStrategy[sw.Kinds]:
    kinds = st.sampled_from(
        (sw.Kind(nnx.Param), sw.Kind(nnx.Param, frozen=True), CACHE, sw.Kind("tag"), sw.Kind(sw.Path("a/**")))
    )
    names = st.lists(st.sampled_from(NAMES), unique=True)
    return names.flatmap(
        lambda chosen: st.tuples(*[kinds] * len(chosen)).map(lambda ks: dict(zip(chosen, ks, strict=True)))
    ).map(lambda found: sw.Kinds(**found))


# --- laws --------------------------------------------------------------------------------------------------------


@given(declarations(), declarations())
def test_declarations_are_equal_by_value_and_order(one: sw.Kinds, other: sw.Kinds) -> None:
    same = list(one.items()) == list(other.items())
    assert (one == other) is same
    assert not same or hash(one) == hash(other)
    assert sw.Kinds(**dict(one)) == one
    reversed_ = sw.Kinds(**dict(reversed(list(one.items()))))
    assert (reversed_ == one) is (len(one) < 2)


@given(declarations(), declarations())
def test_joining_is_like_joining_dicts(one: sw.Kinds, other: sw.Kinds) -> None:
    assert list((one | other).items()) == list((dict(one) | dict(other)).items())
    assert one | sw.Kinds() == one == sw.Kinds() | one
    assert one | one == one


@given(declarations(), st.data())
def test_replacing_keeps_order_and_the_rest(kinds: sw.Kinds, data: st.DataObject) -> None:
    chosen = {name: sw.Kind(OwnStat) for name in kinds if data.draw(st.booleans())}
    after = kinds.replace(**chosen)
    assert list(after) == list(kinds)
    assert all(after[name] == chosen.get(name, kinds[name]) for name in kinds)
    assert kinds.replace() == kinds


@given(declarations())
def test_a_declaration_is_a_mapping_and_survives_copies(kinds: sw.Kinds) -> None:
    assert isinstance(kinds, Mapping)
    assert (len(kinds), list(kinds), [*kinds.keys()]) == (len(dict(kinds)), list(dict(kinds)), list(dict(kinds)))
    assert all(name in kinds and kinds.get(name) is kinds[name] for name in kinds)
    assert "nobody" not in kinds
    assert kinds.get("nobody") is None
    for other in (copy.copy(kinds), copy.deepcopy(kinds), pickle.loads(pickle.dumps(kinds))):
        assert other == kinds
        assert hash(other) == hash(kinds)
    assert kinds != dict(kinds)


@given(filters())
def test_a_kind_of_any_filter_is_a_value(filter: Any) -> None:
    try:
        kind = sw.Kind(filter)
    except sw.DeclarationError as error:
        assert "can never claim a leaf" in error.message  # noqa: PT017 - some drawn filters are empty
        return
    assert kind == sw.Kind(filter)
    assert hash(kind) == hash(sw.Kind(filter))
    assert kind != sw.Kind(filter, frozen=True)
    assert kind.rest is (kind.of is ...)


def test_a_declaration_shows_its_filters() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
    assert repr(kinds) == "Kinds(params=Kind(Param), rest=Kind(...))"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (sw.Kind(nnx.Param), "-"),
        (sw.Kind(nnx.Param, frozen=True), "frozen"),
        (CACHE, "not saved, restart=zeros_like, batch_axis=0"),
        (sw.Kind(nnx.Cache, missing="keep"), "missing=keep"),
        (sw.Kind(nnx.Cache, missing="restart", restart=jnp.ones_like), "missing=restart, restart=ones_like"),
    ],
)
def test_a_treatment_in_a_few_words(kind: sw.Kind, text: str) -> None:
    assert kind.handling() == text


def test_functions_in_a_kind_compare_by_identity() -> None:
    fresh = functools.partial(jnp.full_like, fill_value=1)
    assert sw.Kind(nnx.Cache, restart=fresh) == sw.Kind(nnx.Cache, restart=fresh)
    assert sw.Kind(nnx.Cache, restart=fresh) != sw.Kind(nnx.Cache, restart=functools.partial(fresh))


def test_the_standard_kinds_are_those_of_the_design() -> None:
    kinds = sw.Kinds.standard()
    assert kinds is sw.Kinds.standard()
    assert [(name, kind.handling()) for name, kind in kinds.items()] == [
        ("params", "-"),
        ("lora", "-"),
        ("stats", "-"),
        ("cache", "not saved, restart=zeros_like"),
        ("rng", "-"),
        ("intermediates", "not saved"),
        ("metrics", "-"),
        ("optimizer", "-"),
        ("variables", "-"),
    ]
    assert kinds["variables"].rest


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "1st", "a-b", "a/b", "class", "None", "lambda"])
def test_a_name_that_is_no_identifier(name: str) -> None:
    with refused(
        sw.DeclarationError,
        f"{name!r} cannot name a kind: it is not a Python identifier.",
        kind=name,
        hint="a name of letters, digits and underscores, such as 'params'",
    ):
        sw.Kinds(**{name: sw.Kind(nnx.Param)})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("self", "self_kind"),
        ("objects", "objects_kind"),
        ("mesh", "mesh_kind"),
        ("copy", "copy_kind"),
        ("_hidden", "hidden_kind"),
        ("__", "my_kind"),
    ],
)
def test_a_name_that_is_reserved(name: str, hint: str) -> None:
    with refused(sw.DeclarationError, f"{name!r} is reserved and cannot name a kind.", kind=name, hint=hint):
        sw.Kinds(**{name: sw.Kind(nnx.Param)})
    sw.Kinds(**{hint: sw.Kind(nnx.Param)})


def test_names_in_any_script_stand() -> None:
    assert list(sw.Kinds(größe=sw.Kind(nnx.Param), 状態=sw.Kind(...))) == ["größe", "状態"]


# --- what cannot stand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        (nnx.Param, "nnx.Param"),
        (sw.Path("a/**"), "sw.Path('a/**')"),
        ("tag", "'tag'"),
        (..., "..."),
        (jnp.ones(3), "ArrayImpl"),
        (3, "int"),
    ],
)
def test_a_filter_in_the_place_of_a_kind(given_: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError, f"params={shown} is not a Kind.", kind="params", hint=f"sw.Kinds(params=sw.Kind({shown}))"
    ):
        sw.Kinds(params=given_)


@pytest.mark.parametrize(
    ("of", "shown"),
    [
        (None, "None"),
        (False, "False"),
        ((), "()"),
        ([], "()"),
        (nnx.Any(), "()"),
        (nnx.Nothing(), "Nothing()"),
    ],
)
def test_a_kind_of_nothing(of: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError, f"A kind of {shown} can never claim a leaf.", hint="leave the kind out of the declaration"
    ):
        sw.Kind(of)


@pytest.mark.parametrize("of", [3, jnp.ones(2), {nnx.Param}, lambda path: True])
def test_a_kind_of_no_filter(of: Any) -> None:
    with pytest.raises(sw.FilterError):
        sw.Kind(of)


def test_two_kinds_claim_the_rest() -> None:
    with refused(
        sw.DeclarationError,
        "The kinds rest, others all claim the rest (`...`); only one can.",
        hint="give others a filter of its own",
    ):
        sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...), others=sw.Kind(...))


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"missing": "never"}, "missing='never' is not one of 'error', 'keep', 'restart'.", "missing='error'"),
        (
            {"missing": "restart"},
            "missing='restart' needs a function that makes a fresh value.",
            "sw.Kind(nnx.Cache, missing='restart', restart=jnp.zeros_like)",
        ),
        ({"restart": 0}, "restart=0 is not a function of one array.", "sw.Kind(nnx.Cache, restart=jnp.zeros_like)"),
        (
            {"restart": Unhashable()},
            "restart=Unhashable(...) cannot be hashed, as every part of a declaration must be.",
            "sw.Kind(nnx.Cache, restart=lambda array: ...)",
        ),
        ({"batch_axis": True}, "batch_axis=True is not an axis.", "batch_axis=0"),
        ({"batch_axis": "0"}, "batch_axis='0' is not an axis.", "batch_axis=0"),
        ({"batch_axis": 0.0}, "batch_axis=0.0 is not an axis.", "batch_axis=0"),
        (
            {"placement": "data"},
            "placement='data' is not a placement, nor a function that returns one.",
            "placement=sw.Sharded('data')",
        ),
        (
            {"placement": jax.P("data", None)},
            f"placement={jax.P('data', None)!r} is not a placement, nor a function that returns one.",
            "placement=sw.Sharded('data', None)",
        ),
        (
            {"placement": "fsdp"},
            "placement='fsdp' is not a placement, nor a function that returns one.",
            "placement=sw.Sharded('fsdp')",
        ),
        (
            {"placement": (None, ("data", "model"))},
            "placement=tuple is not a placement, nor a function that returns one.",
            "placement=sw.Sharded(None, ('data', 'model'))",
        ),
        (
            {"placement": (1, 2)},
            "placement=tuple is not a placement, nor a function that returns one.",
            "placement=sw.Sharded('data')",
        ),
        (
            {"placement": jnp.ones(3)},
            f"placement={type(jnp.ones(3)).__name__} is not a placement, nor a function that returns one.",
            "placement=sw.Sharded('data')",
        ),
        (
            {"placement": sw.Replicated},
            "placement=Replicated is not a placement, nor a function that returns one.",
            "placement=sw.Replicated()",
        ),
        (
            {"placement": Unhashable()},
            "placement=Unhashable(...) cannot be hashed, as every part of a declaration must be.",
            "placement=lambda path, shape: ...",
        ),
    ],
)
def test_a_treatment_that_cannot_stand(options: dict[str, Any], message: str, hint: str) -> None:
    with refused(sw.DeclarationError, message, hint=hint):
        sw.Kind(nnx.Cache, **options)


def test_a_kind_that_is_not_there() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
    plan = kinds.plan(Node(a=nnx.Param(jnp.ones(2))))
    state = plan.take(Node(a=nnx.Param(jnp.ones(2))))
    attempts = [
        lambda: kinds["gates"],
        lambda: kinds.replace(gates=sw.Kind(nnx.Cache)),
        lambda: plan["gates"],
        lambda: plan.axes(gates=0),
        lambda: state["gates"],
        lambda: state.replace(gates={}),
        lambda: state.restart("gates"),
        lambda: state.cast(gates="bfloat16"),
        lambda: kinds.plan(Node(a=nnx.Param(jnp.ones(2))), optimizers={"gates": optax.sgd(1.0)}),
        lambda: sw.step(writes="gates")(lambda model: None)(state),
        lambda: sw.step(writes=("params", "gates"))(lambda model: None)(state),
        lambda: sw.step(capture="gates")(lambda model: None)(state),
    ]
    for attempt in attempts:
        with refused(sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint="one of: params, rest"):
            attempt()
    with pytest.raises(KeyError):
        kinds["gates"]
    assert np.array_equal(state["params"]["a"], [1, 1])


def test_a_kind_that_is_not_there_and_none_is() -> None:
    with refused(sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint="kinds = sw.Kinds.standard()"):
        sw.Kinds()["gates"]
