"""Laws of filters, on generated models: they form a Boolean algebra, they mean what NNX's mean, they are data."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise._src.filters.combinators import describe, normalize, predicate
from statewise._src.filters.explain import explain_leaf, type_key, type_only
from strategies import filters, leaves_of, models, our_filters

FEW = settings(max_examples=100)


def matched(filter: Any, model: Any) -> list[bool]:
    matches = predicate(filter)
    answers = [matches(path, leaf) for path, leaf in leaves_of(model)]
    assert all(type(answer) is bool for answer in answers)
    return answers


@FEW
@given(models(), our_filters(), filters())
def test_de_morgan(model: Any, a: Any, b: Any) -> None:
    assert matched(~(a & b), model) == matched(~a | nnx.Not(b), model)
    assert matched(~(b | a), model) == matched(nnx.Not(b) & ~a, model)
    assert matched(nnx.Not(a & b), model) == matched(nnx.Any(~a, nnx.Not(b)), model)


@FEW
@given(models(), our_filters(), filters())
def test_double_negation(model: Any, a: Any, b: Any) -> None:
    assert ~~a is a
    assert ~~(a & b) == (a & b)
    assert matched(nnx.Not(nnx.Not(b)), model) == matched(b, model)
    assert matched(nnx.Not(~a), model) == matched(a, model)


@FEW
@given(models(), our_filters(), filters())
def test_absorption_and_complement(model: Any, a: Any, b: Any) -> None:
    assert matched(a | (a & b), model) == matched(a & (a | b), model) == matched(a, model)
    assert not any(matched(a & ~a, model))
    assert all(matched(a | ~a, model))
    assert matched(a & ..., model) == matched(a | False, model) == matched(a, model)


@FEW
@given(models(), our_filters(), filters(), our_filters())
def test_joining_commutes_associates_and_distributes(model: Any, a: Any, b: Any, c: Any) -> None:
    assert matched(a & b, model) == matched(b & a, model)
    assert matched(a | b, model) == matched(b | a, model)
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert matched(a & (b | c), model) == matched((a & b) | (a & c), model)


@FEW
@given(models(), filters())
def test_the_meaning_is_that_of_nnx(model: Any, filter: Any) -> None:
    theirs = nnx.filterlib.to_predicate(filter)
    assert matched(filter, model) == [bool(theirs(path, leaf)) for path, leaf in leaves_of(model)]
    assert matched(normalize(filter), model) == matched(filter, model)


@FEW
@given(models(), filters())
def test_nnx_state_and_split_select_the_same_leaves(model: Any, filter: Any) -> None:
    matches = predicate(filter)
    ours = [path for path, leaf in leaves_of(model) if matches(path, leaf)]
    assert [tuple(path) for path, _ in nnx.to_flat_state(nnx.state(model, filter))] == ours
    assert [tuple(path) for path, _ in nnx.to_flat_state(nnx.state(model, matches))] == ours
    _, chosen, rest = nnx.split(model, filter, ...)
    assert [tuple(path) for path, _ in nnx.to_flat_state(chosen)] == ours
    assert len(nnx.to_flat_state(rest)) == len(leaves_of(model)) - len(ours)


@FEW
@given(filters())
def test_filters_are_data(filter: Any) -> None:
    one, two = normalize(filter), normalize(copy.deepcopy(filter))
    assert one == two
    assert hash(one) == hash(two)
    assert normalize(one) == one
    assert describe(one) == describe(two) == describe(filter)
    if "Array" not in describe(one):  # before 0.11, JAX cannot pickle `jax.Array` itself
        back = pickle.loads(pickle.dumps(one))
        assert back == one
        assert hash(back) == hash(one)


@FEW
@given(models(), st.lists(filters(), min_size=2, max_size=6))
def test_equal_filters_hash_alike_and_match_alike(model: Any, several: list[Any]) -> None:
    several = [*map(normalize, several), normalize(copy.deepcopy(several[0]))]
    for a in several:
        for b in several:
            if a == b:
                assert hash(a) == hash(b)
                assert matched(a, model) == matched(b, model)


@FEW
@given(models(), filters())
def test_type_only_is_sound(model: Any, filter: Any) -> None:
    if not type_only(filter):
        return
    matches = predicate(filter)
    by_type: dict[Any, bool] = {}
    for path, leaf in leaves_of(model):
        answer = matches(path, leaf)
        assert by_type.setdefault(type_key(leaf), answer) == answer == matches(("elsewhere",), leaf)


@FEW
@given(models(raw=False), filters())
def test_abstract_models_give_the_same_answers(model: Any, filter: Any) -> None:
    abstract = nnx.eval_shape(lambda: nnx.clone(model))
    assert matched(filter, abstract) == matched(filter, model)


@FEW
@given(models(), filters())
def test_the_explanation_agrees_with_the_answer(model: Any, filter: Any) -> None:
    matches = predicate(filter)
    for path, leaf in leaves_of(model):
        answer, part = explain_leaf(filter, path, leaf)
        assert answer == matches(path, leaf)
        assert part


@settings(max_examples=40)
@given(models(), filters())
def test_traced_leaves_give_the_same_answers(model: Any, filter: Any) -> None:
    expected = dict(zip([path for path, _ in leaves_of(model)], matched(filter, model), strict=True))
    seen: dict[Any, bool] = {}

    def look(state: Any) -> int:
        matches = predicate(filter)
        by_type: dict[Any, bool] = {}
        for path, leaf in nnx.to_flat_state(state):
            seen[tuple(path)] = answer = matches(tuple(path), leaf)
            assert not type_only(filter) or by_type.setdefault(type_key(leaf), answer) == answer
        return 0

    jax.eval_shape(look, nnx.state(model))
    assert seen == expected
