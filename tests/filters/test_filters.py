"""Filters one by one: what each matches, where NNX takes them, what they refuse (the laws: test_filters_laws.py)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import typing
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import parses
from ids import named
from statewise._src.filters.combinators import describe, normalize, predicate
from statewise._src.filters.explain import as_code, explain_leaf, type_key, type_only
from strategies import Constrained, Node, OwnStat, is_matrix, leaves_of


def ones(*shape: int) -> jax.Array:
    return jnp.asarray(np.ones(shape, np.float32))


def make() -> Node:
    """Seven leaves: nested, in a list, under integer keys, one of them a raw array."""
    return Node(
        kernel=nnx.Param(ones(2, 3), role="base"),
        lora=nnx.LoRAParam(ones(2, 1)),
        steps=nnx.Variable(ones()),
        own=OwnStat(ones(3), role="ema", tag="mine"),
        layers=nnx.List([Node(kernel=Constrained(ones(3, 3))), nnx.Cache(ones(4))]),
        table=nnx.data({3: {5: ones(2)}}),
    )


def found(filter: Any) -> set[str]:
    """The paths, as text, that `nnx.state` selects."""
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(make(), filter))}


ALL = {"kernel", "lora", "steps", "own", "layers/0/kernel", "layers/1", "table/3/5"}


# What each of them matches.


@pytest.mark.parametrize(
    ("filter", "paths"),
    [
        (sw.Exactly(nnx.Variable), {"steps"}),
        (sw.Exactly(nnx.Param), {"kernel"}),
        (sw.Exactly(nnx.Param, Constrained), {"kernel", "layers/0/kernel"}),
        (sw.Exactly(jax.Array), {"table/3/5"}),
        (sw.Exactly(np.ndarray), set()),
        (sw.Path("kernel"), {"kernel"}),
        (sw.Path("**/kernel"), {"kernel", "layers/0/kernel"}),
        (sw.Path("layers/**"), {"layers/0/kernel", "layers/1"}),
        (sw.Path("layers/*"), {"layers/1"}),
        (sw.Path("table/3/?"), {"table/3/5"}),
        (sw.Path("**"), ALL),
        (sw.Meta("role", "ema"), {"own"}),
        (sw.Meta("role", "nobody"), set()),
        (sw.Meta("absent", None), set()),
        (sw.Where(is_matrix), {"kernel", "lora", "layers/0/kernel"}),
        (sw.Where(lambda path, leaf: np.bool_(5 in path)), {"table/3/5"}),
        (nnx.Param & ~sw.Exactly(nnx.LoRAParam), {"kernel", "layers/0/kernel"}),
        (nnx.Param | sw.Path("steps") | "mine", {"kernel", "lora", "layers/0/kernel", "steps", "own"}),
        (sw.Path("steps") | nnx.Cache | OwnStat, {"layers/1", "own", "steps"}),
        (nnx.All(nnx.Param, nnx.Not(sw.Path("*"))), {"layers/0/kernel"}),
        (nnx.Any(sw.Meta("role", "base"), (sw.Path("steps"), [nnx.Cache])), {"kernel", "steps", "layers/1"}),
    ],
    ids=named,
)
def test_what_is_matched(filter: Any, paths: set[str]) -> None:
    assert found(filter) == paths
    assert found(predicate(filter)) == paths


def test_a_union_of_types_joins_with_a_filter() -> None:
    """From Python 3.14 on the union takes the filter in: NNX rejects it, Statewise reads it as before."""
    union = nnx.Cache | OwnStat | sw.Path("steps")
    assert found(predicate(union)) == found(sw.Path("steps") | nnx.Cache | OwnStat) == {"layers/1", "own", "steps"}
    assert len(nnx.to_flat_state(sw.select(make(), union))) == 3


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a/**/z", ("a", "z"), True),
        ("a/**/z", ("a", "b", "c", "z"), True),
        ("a/**/z", ("a", "z", "b"), False),
        ("a/**", ("a",), True),
        ("**/a/**", ("b", "a"), True),
        ("**/**", (), False),
        ("**", (), True),
        (".", (), True),
        ("*", (), False),
        ("layer_*", ("layer_10",), True),
        ("layer_*", ("layer_1", "w"), False),
        ("*_?_*", ("a_b_c",), True),
        ("Kernel", ("kernel",), False),
        ("a.b+", ("a.b+",), True),
        ("a.b", ("axb",), False),
        ("0", (0,), True),
        ("0", ("0",), True),
        ("d/('x', 1)", ("d", ("x", 1)), True),
        ("*", ("",), True),
        ("*", ("two\nlines",), True),
    ],
)
def test_globs(pattern: str, path: tuple[Any, ...], matches: bool) -> None:
    assert sw.Path(pattern)(path, None) is matches


def test_types_are_true_under_hijax() -> None:
    with nnx.var_defaults(hijax=True, ref=False):
        model = Node(w=nnx.Param(ones(2), role="base"), v=nnx.Variable(ones(2)))
    assert type(model.w) is type(model.v)
    assert [path for path, leaf in leaves_of(model) if sw.Exactly(nnx.Variable)(path, leaf)] == [("v",)]
    assert [path for path, leaf in leaves_of(model) if sw.Meta("role", "base")(path, leaf)] == [("w",)]
    assert type_key(model.w) is nnx.Param
    assert type_key(model.v) is nnx.Variable
    with pytest.raises(sw.FilterError, match=r"w: Param\(2,\) float32"):
        sw.Where(lambda path, leaf: 1)(("w",), model.w)


@pytest.mark.parametrize(
    ("value", "same", "other"),
    [
        ([1, [2]], [1, [2]], [1, [3]]),
        ({"a": np.ones(2)}, {"a": np.ones(2)}, {"a": np.zeros(2)}),
        (np.ones(3), jnp.ones(3), np.ones(4)),
        (np.ones((2, 1)), np.ones((2, 1)), np.ones(2)),
        (("data", None), ("data", None), ["data", None]),
        (1, np.int32(1), 2),
        ({1, 2}, {2, 1}, {1}),
        (np.float32, np.float32, np.float64),
        (None, None, False),
    ],
    ids=named,
)
def test_any_metadata_can_be_compared_and_hashed(value: Any, same: Any, other: Any) -> None:
    meta = sw.Meta("m", value)
    assert meta == sw.Meta("m", same)
    assert hash(meta) == hash(sw.Meta("m", same))
    assert meta != sw.Meta("m", other)
    assert meta != sw.Meta("n", value)
    assert meta((), nnx.Param(None, m=same))
    assert not meta((), nnx.Param(None, m=other))
    assert not meta((), nnx.Param(None))
    assert not meta((), value)


def test_a_filter_does_not_change_with_the_list_it_was_made_from() -> None:
    value = ["a", {"b": np.zeros(2)}]
    meta = sw.Meta("m", value)
    value[1]["b"][0] = 7
    value.append("c")
    assert meta == sw.Meta("m", ["a", {"b": np.zeros(2)}])


# Where NNX takes them.


def test_split_pop_and_merge() -> None:
    model = make()
    graphdef, params, rest = nnx.split(model, nnx.Param & ~sw.Exactly(nnx.LoRAParam), ...)
    assert len(nnx.to_flat_state(params)) == 2
    assert len(leaves_of(nnx.merge(graphdef, params, rest))) == len(ALL)
    popped = nnx.pop(model, sw.Path("own") | sw.Exactly(nnx.Variable))
    assert {path for path, _ in nnx.to_flat_state(popped)} == {("own",), ("steps",)}
    assert not hasattr(model, "steps")


def test_an_optimizer_takes_them_and_goes_through_jit() -> None:
    model = Node(a=nnx.Param(ones(2)), b=nnx.LoRAParam(ones(2)), c=nnx.Param(ones(2), role="ema"))
    only_a = nnx.Param & ~sw.Exactly(nnx.LoRAParam) & ~sw.Meta("role", "ema")
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=only_a)

    traces = []

    @nnx.jit
    def train(model: Any, optimizer: Any) -> None:
        traces.append(1)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, only_a)))

    train(model, optimizer)
    train(model, optimizer)
    assert [float(v[...][0]) for v in (model.a, model.b, model.c)] == [-1.0, 1.0, 1.0]
    assert len(traces) == 1


@pytest.mark.parametrize(
    "other", [nnx.Param, "tag", ..., None, True, (nnx.Param,), [nnx.Param], is_matrix, nnx.All(nnx.Param)]
)
def test_operators_take_any_filter_on_either_side(other: Any) -> None:
    path = sw.Path("steps")
    assert found(other | path) == found(path | other) == found(other) | {"steps"}
    assert found(other & path) == found(path & other) == found(other) & {"steps"}
    assert hash(other | path) == hash(copy.deepcopy(other) | path)


# They are data.


def test_equal_by_value_and_frozen() -> None:
    assert sw.Exactly(nnx.Param, nnx.Cache) == sw.Exactly(nnx.Cache, nnx.Param) != sw.Exactly(nnx.Param)
    assert sw.Path("a/*") == sw.Path("a/*") != sw.Path("a/**")
    assert sw.Where(is_matrix) == sw.Where(is_matrix) != sw.Where(lambda path, leaf: True)
    assert (nnx.Param | sw.Path("a")) != (nnx.Param & sw.Path("a"))
    assert len({sw.Path("a"), sw.Path("a"), ~sw.Path("a"), sw.Exactly(nnx.Param), nnx.Param}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        sw.Path("a").pattern = "b"
    kept = nnx.Param & ~sw.Path("a/**") | sw.Meta("m", [1]) | sw.Where(is_matrix)
    assert pickle.loads(pickle.dumps(kept)) == copy.deepcopy(kept) == kept


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, path: Any, leaf: Any) -> bool:
        return True


def test_normalise_makes_hashable_and_keeps_what_is_fine() -> None:
    fine = nnx.All(nnx.Param, nnx.Not(nnx.Cache))
    assert normalize(fine) is fine
    assert normalize([nnx.Param, ["x", (is_matrix,)]]) == (nnx.Param, ("x", (is_matrix,)))
    old_union = typing.Union[nnx.Param, nnx.Cache]  # noqa: UP007
    assert normalize(nnx.Param | nnx.Cache) == normalize(old_union) == (nnx.Param, nnx.Cache)
    assert normalize(nnx.Param | None) == (nnx.Param, None)
    thing = Unhashable()
    for of in (thing, [thing], nnx.Not(nnx.Any(thing)), sw.Where(thing), sw.Path("a") & thing):
        assert hash(normalize(of)) == hash(normalize(of))
        assert normalize(of) == normalize(of)
    assert normalize(thing) != normalize(Unhashable())
    assert found(normalize(nnx.All(thing, nnx.Cache))) == {"layers/1"}


class Traced:
    @classmethod
    def method(cls, path: Any, leaf: Any) -> bool:
        return True


HERE = __name__


@pytest.mark.parametrize(
    ("filter", "text", "code"),
    [
        (nnx.Param, "Param", "nnx.Param"),
        (OwnStat, "OwnStat", "OwnStat"),
        (..., "...", "..."),
        (None, "None", "None"),
        ("tag", "'tag'", "'tag'"),
        (nnx.WithTag("tag"), "'tag'", "'tag'"),
        (nnx.OfType(nnx.Cache), "Cache", "nnx.Cache"),
        (sw.Exactly(nnx.Variable), "Exactly(Variable)", "sw.Exactly(nnx.Variable)"),
        (sw.Path("a/**"), "Path('a/**')", "sw.Path('a/**')"),
        (sw.Meta("m", 3), "Meta('m', 3)", "sw.Meta('m', 3)"),
        (sw.Meta("m", [np.ones(2)]), "Meta('m', [ndarray(2,) float64])", "sw.Meta('m', ...)"),
        (nnx.All(nnx.Param, nnx.Not(nnx.Cache)), "Param & ~Cache", "nnx.All(nnx.Param, nnx.Not(nnx.Cache))"),
        ([nnx.Param, (nnx.Cache,)], "Param | Cache", "(nnx.Param, (nnx.Cache,))"),
        (nnx.Not(nnx.Any(nnx.All("a", "b"))), "~('a' & 'b')", "nnx.Not((nnx.All('a', 'b'),))"),
        (sw.Path("a") & ("b", "c") | "d", "Path('a') & ('b' | 'c') | 'd'", "(nnx.All(sw.Path('a'), ('b', 'c')), 'd')"),
        (nnx.All(), "...", "nnx.All()"),
        ([], "()", "()"),
        (nnx.PathContains("a"), "PathContains('a', exact=True)", "nnx.PathContains('a', exact=True)"),
        (nnx.filterlib.PathIn(("b", 0), ("a",)), "PathIn(a, b/0)", "nnx.filterlib.PathIn(('a',), ('b', 0))"),
        (Traced.method, f"{HERE}:Traced.method", "Traced.method"),
        (Unhashable(), f"{HERE}:Unhashable(...)", "Unhashable(...)"),
        (functools.partial(Traced.method), f"partial({HERE}:Traced.method)", "functools.partial(Traced.method, ...)"),
        (sw.Where(Traced.method), f"Where({HERE}:Traced.method)", "sw.Where(Traced.method)"),
        (
            sw.Where(lambda path, leaf: True),
            f"Where({HERE}:<lambda>)",
            "sw.Where(lambda path, leaf: ...)",
        ),
    ],
)
def test_text_and_code(filter: Any, text: str, code: str) -> None:
    assert describe(filter) == text
    assert as_code(filter) == code
    parses(code)
    if isinstance(filter, (sw.Exactly, sw.Path, sw.Meta, sw.Where)):
        assert repr(filter) == text


PARAM, LORA = (("w",), nnx.Param(None, ref=False)), (("l",), nnx.LoRAParam(None, role="ema", ref=False))
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


@pytest.mark.parametrize(
    ("filter", "leaf", "matched", "by"),
    [
        (BASE, LORA, False, "~LoRAParam"),
        (BASE, PARAM, True, "Param & ~LoRAParam"),
        (nnx.Not(BASE), LORA, True, "LoRAParam"),
        ([nnx.Cache, "x", nnx.Param], PARAM, True, "Param"),
        ([nnx.Cache, "x"], PARAM, False, "Cache | 'x'"),
        (sw.Path("l") & (nnx.Cache | sw.Meta("role", "ema")), LORA, True, "Path('l') & Meta('role', 'ema')"),
        (~(sw.Path("l") | nnx.Cache), LORA, False, "~Path('l')"),
        (..., PARAM, True, "..."),
        (nnx.Param | nnx.Cache, PARAM, True, "Param"),
    ],
    ids=named,
)
def test_what_decided(filter: Any, leaf: Any, matched: bool, by: str) -> None:
    answer = explain_leaf(filter, *leaf)
    assert answer == (matched, by)
    assert type(answer[0]) is bool


@typing.runtime_checkable
class HasTag(typing.Protocol):
    tag: str


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (nnx.Param, True),
        (jax.Array, True),
        (np.ndarray, True),
        (object, True),
        (sw.Exactly(nnx.Param), True),
        ([..., True, False, None, nnx.Everything(), nnx.Nothing(), nnx.OfType(OwnStat)], True),
        (nnx.All(nnx.Param, ~sw.Exactly(nnx.LoRAParam)), True),
        ("tag", False),
        (nnx.WithTag("tag"), False),
        (sw.Path("**"), False),
        (sw.Meta("a", 1), False),
        (sw.Where(is_matrix), False),
        (is_matrix, False),
        (nnx.Not([nnx.Param, is_matrix]), False),
        (nnx.PathContains("a"), False),
        (HasTag, False),
        (jaxtyping.Float[jax.Array, "3"], False),
    ],
    ids=named,
)
def test_type_only(filter: Any, expected: bool) -> None:
    assert type_only(filter) is expected


def test_the_key_of_a_traced_array_is_no_variable_s() -> None:
    keys = []
    jax.eval_shape(lambda *leaves: keys.extend(map(type_key, leaves)) or 0, ones(2), nnx.Param(ones(2)), ones(3))
    assert keys[0] == keys[2] != keys[1] is nnx.Param
    assert len({type_key(ones(2)), type_key(ones(3)), type_key(np.ones(2)), type_key(nnx.Param(None))}) == 3
