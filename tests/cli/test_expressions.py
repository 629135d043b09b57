"""Filters as the command line reads them: parsed, never evaluated."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from statewise._src.filters.combinators import describe
from statewise._src.filters.primitives import Exactly
from statewise.cli.expressions import parse_filter
from statewise.cli.targets import UsageError
from statewise.errors import FilterError
from statewise.examples import multi_state


@pytest.mark.parametrize(
    ("text", "filter"),
    [
        ("...", ...),
        ("None", None),
        ("'tag'", "tag"),
        (" Param ", nnx.Param),
        ("nnx.Param", nnx.Param),
        ("Param | Cache & ~RngKey", nnx.Any(nnx.Param, nnx.All(nnx.Cache, nnx.Not(nnx.RngKey)))),
        ("(Param, ['tag', ...])", (nnx.Param, ("tag", ...))),
        ("Exactly(nnx.Variable)", Exactly(nnx.Variable)),
        ("sw.Exactly(nnx.Variable, Param)", Exactly(nnx.Variable, nnx.Param)),
        ("BatchStat", multi_state.BatchStat),
        ("nnx.BatchStat", nnx.BatchStat),
        ("nnx.All(Param, Not('a'))", nnx.All(nnx.Param, nnx.Not("a"))),
        ("Any()", nnx.Any()),
        ("PathContains('head')", nnx.PathContains("head")),
        ("jax.Array", jax.Array),
    ],
)
def test_filters_that_are_read(text: str, filter: object) -> None:
    assert parse_filter(text, multi_state, {}) == filter


def test_types_of_leaves_are_known_by_name() -> None:
    class Elsewhere(nnx.Variable):
        pass

    assert parse_filter("~Elsewhere", multi_state, {"Elsewhere": Elsewhere}) == nnx.Not(Elsewhere)
    assert describe(parse_filter("Meta('sizes', [1, {'a': (2,)}])", multi_state, {})).startswith("Meta(")
    with pytest.raises(UsageError, match="the types of the model's leaves: Elsewhere"):
        parse_filter("Nowhere", multi_state, {"Elsewhere": Elsewhere})
    with pytest.raises(FilterError):
        parse_filter("Path('')", multi_state, {})
