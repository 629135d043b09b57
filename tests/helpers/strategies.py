"""Hypothesis strategies for small NNX models, and for filters over them.

`models()` draws what real models hold, on a small scale: the Variable types of NNX and subclasses of them, tags and
other metadata, typed keys, raw arrays, zero-size and scalar leaves, lists, dicts with integer and tuple keys, and
tied leaves.  Arrays come from NumPy, so that drawing a model compiles nothing.

`filters()` draws any filter that NNX takes, of its making or of ours; `our_filters()` those that have operators.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

import statewise as sw


class OwnStat(nnx.Variable):
    """A type of the user's own, directly below `nnx.Variable`."""


class OwnBatchStat(nnx.BatchStat):
    """A subclass of a type that NNX ships."""


class Constrained(nnx.Param):
    """A subclass of `nnx.Param` that is no LoRA."""


class Node(nnx.Module):
    """A module with any attributes, fixed when it is made."""

    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


TYPES: tuple[type[nnx.Variable], ...] = (
    nnx.Param,
    nnx.LoRAParam,
    nnx.BatchStat,
    nnx.Cache,
    nnx.Intermediate,
    nnx.Variable,
    OwnStat,
    OwnBatchStat,
    Constrained,
)
NAMES = ("a", "b", "kernel", "layer_0", "layer_1")
SHAPES = ((), (3,), (0,), (2, 3), (1, 2, 2))
DTYPES = (np.float32, np.int32, np.bool_, jnp.bfloat16)
METADATA: tuple[dict[str, Any], ...] = ({}, {"role": "ema"}, {"role": "base"}, {"tag": "dropout"}, {"sizes": [1, 2]})


def arrays() -> st.SearchStrategy[jax.Array]:
    def make(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).integers(0, 5, shape).astype(dtype))

    return st.builds(make, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, 99))


def variables(types: tuple[type[nnx.Variable], ...] = TYPES) -> st.SearchStrategy[nnx.Variable]:
    def make(cls: type[nnx.Variable], value: jax.Array, metadata: dict[str, Any]) -> nnx.Variable:
        return cls(value, **metadata)

    plain = st.builds(make, st.sampled_from(types), arrays(), st.sampled_from(METADATA))
    keys = st.integers(0, 9).map(lambda seed: nnx.Variable(jax.random.key(seed)))
    nothing = st.just(None).map(lambda value: nnx.Variable(value, ref=False))  # a reference holds an array
    return st.one_of(plain, plain, plain, keys, nothing)


@st.composite
def models(draw: st.DrawFn, *, raw: bool = True, tied: bool = True, max_leaves: int = 6) -> Node:
    """A module tree of at most `max_leaves` leaves, and two at least.

    Args:
      draw: given by Hypothesis.
      raw: whether raw arrays may stand beside Variables.
      tied: whether a Variable may be reachable by two paths.
      max_leaves: how many leaves there may be at most.
    """
    leaf = st.one_of(variables(), arrays()) if raw else variables()
    leaves = draw(st.lists(leaf, min_size=2, max_size=max_leaves))

    def place(leaves: list[Any], depth: int) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        rest = list(leaves)
        for name in NAMES:
            if not rest:
                return attributes
            take = draw(st.integers(0, len(rest)))
            group, rest = rest[:take], rest[take:]
            form = draw(st.sampled_from(("leaf", "node", "list", "dict"))) if depth else "list"
            if len(group) == 1 and form == "leaf":
                attributes[name] = nnx.data(group[0])
            elif group and form == "node":
                attributes[name] = Node(**place(group, depth - 1))
            elif group and form == "dict":
                attributes[name] = nnx.data({3: {("t", i): item for i, item in enumerate(group)}})
            elif group:
                attributes[name] = nnx.List(group)
        if rest:
            attributes["rest"] = nnx.List(rest)
        return attributes

    model = Node(**place(leaves, 2))
    ties = [leaf for leaf in leaves if isinstance(leaf, nnx.Variable)]
    if tied and ties and draw(st.booleans()):
        model.zz_tied = draw(st.sampled_from(ties))
    return model


def leaves_of(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The (path, leaf) pairs of a model as NNX gives them, a tied leaf once."""
    return [(tuple(path), leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))]


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    return getattr(value, "ndim", None) == 2


def is_deep(path: tuple[Any, ...], leaf: Any) -> int:
    """As NNX allows of a bare callable, the answer is no bool."""
    return len(path) - 1


GLOBS = ("**", "*", "a/**", "**/kernel", "layer_*/**", "*/*", "**/0", "b/3/*", "layer_?", "?", ".")


def our_filters() -> st.SearchStrategy[Any]:
    """Filters that have operators: `sw.Exactly`, `sw.Path`, `sw.Meta`, `sw.Where`."""
    return st.one_of(
        st.lists(st.sampled_from((*TYPES, jax.Array)), min_size=1, max_size=3).map(lambda types: sw.Exactly(*types)),
        st.sampled_from(GLOBS).map(sw.Path),
        st.sampled_from((("role", "ema"), ("role", 3), ("sizes", [1, 2]), ("hijax", False))).map(lambda m: sw.Meta(*m)),
        st.just(sw.Where(is_matrix)),
    )


def filters(*, max_leaves: int = 5) -> st.SearchStrategy[Any]:
    """Any filter, of at most `max_leaves` parts."""
    literals: tuple[Any, ...] = (..., True, False, None, "dropout", "nobody", is_deep, is_matrix, jax.Array)
    nnx_own = (nnx.PathContains("a"), nnx.Everything(), nnx.Nothing(), nnx.OfType(nnx.Param), nnx.WithTag("dropout"))
    atoms = st.one_of(st.sampled_from((*TYPES, *literals, *nnx_own)), our_filters())

    def join(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        few = st.lists(parts, max_size=3)
        return st.one_of(
            few,
            few.map(tuple),
            few.map(lambda some: nnx.All(*some)),
            few.map(lambda some: nnx.Any(*some)),
            parts.map(nnx.Not),
            st.tuples(our_filters(), parts).map(lambda two: two[0] & two[1]),
            st.tuples(our_filters(), parts).map(lambda two: two[1] | two[0]),
            our_filters().map(lambda one: ~one),
        )

    return st.recursive(atoms, join, max_leaves=max_leaves)
