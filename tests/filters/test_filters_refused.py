"""What is not a filter, and what fails at a leaf: every error of the filters, with its text."""

from __future__ import annotations

import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from ids import named
from statewise._src.filters.combinators import describe, normalize, predicate
from statewise._src.filters.explain import as_code, explain_leaf, type_only
from strategies import Node


class Called(nnx.Module):
    """NNX would take it for a filter, because it can be called."""

    def __call__(self, path: Any, leaf: Any) -> bool:
        return True


GENERIC = "nnx.Param  # or 'tag', ..., sw.Path('layers/**'), sw.Where(lambda path, leaf: ...), or a tuple of these"
LAMBDA = "lambda path, leaf: ..."
HERE = __name__


@pytest.mark.parametrize(
    ("filter", "message", "hint"),
    [
        (3, "3 is not a filter.", GENERIC),
        (2.5, "2.5 is not a filter.", GENERIC),
        (object(), "an object of type object is not a filter.", GENERIC),
        (np.ones(3), "ndarray(3,) float64 is not a filter.", GENERIC),
        (jnp.ones(3), "Array(3,) float32 is not a filter.", GENERIC),
        (Called(), "an object of type Called is an object of a model, not a filter.", GENERIC),
        (Node(), "an object of type Node is not a filter.", GENERIC),
        (nnx.Param(jnp.ones(2)), "Param(2,) float32 is an object of a model, not a filter.", "nnx.Param"),
        ({"a": 1}, "an object of type dict is not a filter.", GENERIC),
        ({nnx.Param}, "an object of type set is not a filter.", "(nnx.Param, nnx.Cache)  # a tuple"),
        (iter([]), "an object of type list_iterator is not a filter.", "(nnx.Param, nnx.Cache)  # a tuple"),
        ([nnx.Param, (nnx.Cache, 3)], "3 is not a filter (at filter[1][1]).", GENERIC),
        (nnx.All(..., nnx.Not(Called())), "(at filter.predicates[1].predicate).", GENERIC),
        (nnx.Any([Called()]), "(at filter.predicates[0].predicates[0]).", GENERIC),
        (nnx.Everything, "Everything is a class of filters, not a filter.", "Everything(...)"),
        (sw.Path, "Path is a class of filters, not a filter.", "Path(...)"),
        (nnx.Param[int], "Param[int] is a generic alias, not a type.", "nnx.Param"),
        (nnx.Param | list[int], "list[int] is a generic alias, not a type (at filter[1]).", GENERIC),
        (typing.TypedDict("T", {"a": int}), "T is a type that isinstance does not accept.", GENERIC),
        (lambda path: True, f"{HERE}:<lambda> cannot be called with (path, leaf).", LAMBDA),
        (len, "builtins:len cannot be called with (path, leaf).", LAMBDA),
        ("x".join, "builtins:str.join cannot be called with (path, leaf).", LAMBDA),
    ],
    ids=named,
)
def test_no_filter(filter: Any, message: str, hint: str) -> None:
    for ask in (normalize, predicate, describe, as_code, type_only, lambda f: explain_leaf(f, (), None)):
        with pytest.raises(sw.FilterError) as caught:
            ask(filter)
        assert caught.value.message.endswith(message)
        assert caught.value.hint == hint


@pytest.mark.parametrize("bad", [3, jnp.ones(3), np.ones(3), nnx.Param(jnp.ones(2)), {nnx.Param}], ids=named)
def test_operators_refuse_what_is_no_filter(bad: Any) -> None:
    path = sw.Path("a")
    for join in (lambda: path & bad, lambda: bad & path, lambda: path | bad, lambda: bad | path):
        with pytest.raises(sw.FilterError):
            join()


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: sw.Exactly(), "Exactly() needs at least one type.", "sw.Exactly(nnx.Variable)"),
        (lambda: sw.Exactly(3), "Exactly takes types, not 3.", "sw.Exactly(nnx.Variable, nnx.Param)"),
        (
            lambda: sw.Exactly(nnx.Param(jnp.ones(2))),
            "Exactly takes types, not Param(2,) float32.",
            "sw.Exactly(nnx.Param)  # the type, not an object of it",
        ),
        (lambda: sw.Path(3), "Path takes a glob, not 3.", "sw.Path('layers/**')"),
        (lambda: sw.Path(("a", 0)), "Path takes a glob, not ('a', 0).", "sw.Path('layers/**')"),
        (lambda: sw.Path(""), "Path('') has an empty segment.", "sw.Path('**')"),
        (lambda: sw.Path("/a//b/"), "Path('/a//b/') has an empty segment.", "sw.Path('a/b')"),
        (
            lambda: sw.Path("**/a**/***"),
            "Path('**/a**/***') has `**` inside a segment, where only `*` is allowed.",
            "sw.Path('**/a*/*')",
        ),
        (
            lambda: sw.Path("a[0-3]/w"),
            "Path('a[0-3]/w') has `[]`: a glob here has only `*`, `**` and `?`.",
            "sw.Path('a*/w')",
        ),
        (lambda: sw.Path("{a,b}"), "Path('{a,b}') has `{}`: a glob here has only `*`, `**` and `?`.", "sw.Path('*')"),
        (lambda: sw.Path("a]"), "Path('a]') has `]`: a glob here has only `*`, `**` and `?`.", "sw.Path('a?')"),
        (lambda: sw.Meta("", 3), "Meta takes a name, not ''.", "sw.Meta('role', 'ema')"),
        (lambda: sw.Meta(3, 3), "Meta takes a name, not 3.", "sw.Meta('role', 'ema')"),
        (lambda: sw.Where(3), "Where takes a function of (path, leaf): 3 is not a filter.", f"sw.Where({LAMBDA})"),
        (
            lambda: sw.Where(nnx.Param),
            "Where takes a function of (path, leaf): Param is a type, which is already a filter.",
            "nnx.Param",
        ),
        (
            lambda: sw.Where(len),
            "Where takes a function of (path, leaf): builtins:len cannot be called with (path, leaf).",
            f"sw.Where({LAMBDA})",
        ),
    ],
)
def test_not_made(make: Any, message: str, hint: str) -> None:
    with pytest.raises(sw.FilterError) as caught:
        make()
    assert caught.value.message == message
    assert caught.value.hint == hint


def divide(path: Any, leaf: Any) -> Any:
    return 1 / 0


def says_one(path: Any, leaf: Any) -> Any:
    return 1


def says_array(path: Any, leaf: Any) -> Any:
    return leaf[...] > 0


class Proud:
    """Its `==` raises."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison\nat all")

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("filter", "message", "cause"),
    [
        (sw.Where(divide), f"Where({HERE}:divide) raised ZeroDivisionError: division by zero.", ZeroDivisionError),
        (nnx.Not(divide), f"{HERE}:divide raised ZeroDivisionError: division by zero.", ZeroDivisionError),
        ([sw.Path("a") & sw.Where(divide)], None, ZeroDivisionError),
        (says_array, f"{HERE}:says_array raised ValueError: The truth value of an array", ValueError),
        (sw.Where(says_one), f"Where({HERE}:says_one) returned 1, not a bool.", None),
        (sw.Where(says_array), "Array(2,) bool, not a bool.", None),
        (
            sw.Meta("m", Proud()),
            "Meta('m', an object of type Proud) cannot be compared with the leaf's an object of type Proud: "
            "RuntimeError: no comparison.",
            RuntimeError,
        ),
    ],
)
def test_fails_at_a_leaf(filter: Any, message: str | None, cause: type | None) -> None:
    leaf = nnx.Param(jnp.ones(2), m=Proud())
    for ask in (predicate(filter), lambda path, leaf: explain_leaf(filter, path, leaf)):
        with pytest.raises(sw.FilterError) as caught:
            ask(("a",), leaf)
        error = caught.value
        assert message is None or message in error.message
        assert str(error.leaves[0]) == "a: Param(2,) float32"
        assert "lambda path, leaf: " in error.hint
        assert type(error.__cause__) is (cause or type(None))


def test_the_error_says_which_leaf_of_a_model() -> None:
    model = Node(a=nnx.Param(jnp.ones(2)), b=nnx.List([nnx.Variable(None)]))
    with pytest.raises(sw.FilterError, match="AttributeError") as caught:
        nnx.state(model, sw.Where(lambda path, leaf: leaf.ndim == 2))
    assert caught.value.leaves[0].path == ("b", 0)
    assert caught.value.leaves[0].shape is None
