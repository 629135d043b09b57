"""Every error has the same three parts, as text and as attributes, and goes through pickle and notes as it is."""

from __future__ import annotations

import copy
import inspect
import pickle

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from statewise import errors
from statewise._src.common.nnx_graph import ModelError

LEAVES = (
    sw.results.Leaf(("layers", 0, "kernel"), "params", nnx.Param, (3, 4), jnp.dtype("float32"), note="gone"),
    sw.results.Leaf(("count",), None, nnx.Variable, (), jnp.dtype("int32")),
)
ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]
BASES = (sw.StatewiseError, sw.StatewiseWarning)


def make(cls: type[sw.StatewiseError] = sw.StructureError) -> sw.StatewiseError:
    return cls("Two leaves do not fit.", leaves=LEAVES, kind="params", hint="one = 1\ntwo = 2")


def test_the_text_has_the_fact_the_leaves_and_the_hint_in_this_order() -> None:
    assert str(make()).splitlines() == [
        "Two leaves do not fit.",
        "  layers/0/kernel: Param(3, 4) float32  kind=params  (gone)",
        "  count: Variable() int32",
        "  hint: one = 1",
        "        two = 2",
    ]


def test_the_parts_are_attributes() -> None:
    error = make()
    assert (error.message, error.kind, error.hint) == ("Two leaves do not fit.", "params", "one = 1\ntwo = 2")
    assert error.leaves == LEAVES
    assert [(leaf.path, leaf.kind, leaf.type, leaf.shape, leaf.dtype) for leaf in error.leaves] == [
        (("layers", 0, "kernel"), "params", nnx.Param, (3, 4), jnp.dtype("float32")),
        (("count",), None, nnx.Variable, (), jnp.dtype("int32")),
    ]


def test_a_bare_error_is_its_fact() -> None:
    error = sw.StatewiseError("It is so.")
    assert str(error) == "It is so."
    assert (error.leaves, error.kind, error.hint) == ((), None, None)


def test_the_text_is_cut_after_fifty_leaves_and_the_attribute_is_not() -> None:
    error = sw.StructureError("Many.", leaves=iter(LEAVES[1:] * 60), hint="x")
    lines = str(error).splitlines()
    assert len(error.leaves) == 60
    assert len(lines) == 1 + 50 + 1 + 1
    assert lines[-2:] == ["  ... and 10 more (all in .leaves)", "  hint: x"]
    assert "more" not in str(sw.StructureError("Many.", leaves=LEAVES[1:] * 50))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_errors_are_pickled_and_copied_whole(cls: type[sw.StatewiseError]) -> None:
    error = make(cls)
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), copy.copy(error)):
        assert type(other) is cls
        assert str(other) == str(error)
        assert (other.leaves, other.kind, other.hint) == (error.leaves, error.kind, error.hint)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_all_derive_from_one_and_are_public(cls: type[sw.StatewiseError]) -> None:
    assert issubclass(cls, BASES)
    assert issubclass(cls, UserWarning) == (cls is sw.StatewiseWarning)
    assert getattr(sw, cls.__name__) is cls
    assert inspect.getdoc(cls)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (sw.FilterError, TypeError),
        (sw.DeclarationError, ValueError),
        (sw.DeclarationError, KeyError),
        (sw.UnclaimedError, ValueError),
        (sw.OverlapError, ValueError),
        (sw.StructureError, ValueError),
        (sw.UndeclaredWriteError, ValueError),
        (sw.PlacementError, ValueError),
        (sw.RestoreError, ValueError),
        (sw.CorruptedError, ValueError),
        (sw.WatchError, AssertionError),
        (ModelError, sw.StructureError),
        (ModelError, TypeError),
    ],
)
def test_a_caller_can_catch_the_builtin(cls: type[sw.StatewiseError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise cls("It is so.")


def test_a_key_error_shows_its_text_and_not_a_repr() -> None:
    assert str(sw.DeclarationError("There is no kind 'a'.", hint="b")) == "There is no kind 'a'.\n  hint: b"
