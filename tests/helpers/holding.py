"""What the tests of writing into models share: containers of raw arrays, and what a model holds, to the bit."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw
from comparing import data
from statewise._src.common.nnx_graph import held_value, raw_value
from strategies import Node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen dataclass that JAX knows."""

    mean: Any
    var: Any


class Pair(NamedTuple):
    """A named tuple."""

    one: Any
    two: Any


@flax.struct.dataclass
class Struct:
    """Flax's own frozen dataclass, with a field that is no array."""

    mean: Any
    count: int = flax.struct.field(pytree_node=False, default=3)


@jax.tree_util.register_pytree_node_class
class Own:
    """A pytree of the user's, whose children have no names."""

    def __init__(self, one: Any, two: Any) -> None:
        self.one, self.two = one, two

    def tree_flatten(self) -> Any:
        return (self.one, self.two), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


def ones(*shape: int) -> Any:
    return jnp.ones(shape)


# Each holds raw arrays alone or among other things.
CONTAINERS: dict[str, Callable[[], Any]] = {
    "an array": lambda: ones(2),
    "a NumPy array": lambda: np.ones(2, np.float32),
    "a tuple": lambda: (ones(2), ones()),
    "a named tuple": lambda: Pair(ones(2), ones()),
    "a frozen dataclass": lambda: Frozen(ones(2), ones(3)),
    "a flax dataclass": lambda: Struct(ones(2)),
    "a pytree of one's own": lambda: Own(ones(2), ones(3)),
    "a frozen dict": lambda: flax.core.freeze({"a": ones(2), "b": {"c": ones(1)}}),
    "an ordered dict": lambda: collections.OrderedDict(b=ones(2), a=(ones(1),)),
    "a default dict": lambda: collections.defaultdict(list, a=ones(2)),
    "a list": lambda: [ones(2), (ones(1),)],
    "a dict": lambda: {10: ones(2), 9: (ones(1), [ones(2)])},
    "an nnx.List": lambda: nnx.List([nnx.data(ones(2)), nnx.data((ones(1),))]),
    "an nnx.Dict": lambda: nnx.Dict(a=nnx.data(ones(2)), b=nnx.data(Pair(ones(1), ones(2)))),
    "a state": lambda: nnx.State({"a": ones(2), "b": {"c": ones(1)}}),
    "deeply nested": lambda: ([Pair((ones(1), {3: Frozen(ones(2), (ones(1),))}), ones(3))], ones(2)),
    "beside Variables and modules": lambda: (
        nnx.Param(ones(2)),
        ones(2),
        Node(w=nnx.Param(ones(1)), r=nnx.data(ones(3))),
    ),
    "with None in it": lambda: (None, ones(2), Pair(None, ones(1))),
    "a tuple in a Variable": lambda: nnx.Variable((ones(2), {"a": ones(1)}), ref=False),  # a reference holds one array
}


def model_of(name: str) -> Node:
    return Node(first=nnx.Param(ones(2)), held=nnx.data(CONTAINERS[name]()), last=nnx.Param(ones(3)))


def other(state: sw.State) -> sw.State:
    return jax.tree.map(lambda array: array * 5 - 2, state)


class Bits:
    """Everything that a model holds, by identity: leaves, metadata, attributes, items."""

    def __init__(self, *objects: Any) -> None:
        self.objects = objects
        self.before = self.now()
        self.values = [_copied(value) for value in self.arrays()]

    def leaves(self) -> list[tuple[Any, Any]]:
        flat = nnx.flatten(self.objects)[1]
        return list(zip(flat.paths, flat.leaves, strict=True))

    def arrays(self) -> list[Any]:
        return [array for _, leaf in self.leaves() for array in jax.tree.leaves(raw_value(leaf))]

    def now(self) -> Any:
        found = [
            (
                tuple(path),
                id(leaf),
                id(held_value(leaf)),
                leaf.get_metadata() if isinstance(leaf, nnx.Variable) else None,
            )
            for path, leaf in self.leaves()
        ]
        attributes = [
            (path, {name: id(value) for name, value in vars(module).items()})
            for path, module in nnx.iter_modules(self.objects)
        ]
        return found, attributes

    def check(self) -> None:
        assert self.now() == self.before
        assert all(np.array_equal(_copied(a), b) for a, b in zip(self.arrays(), self.values, strict=True))


def _copied(array: Any) -> Any:
    return np.zeros(0) if isinstance(array, jax.ShapeDtypeStruct) else np.array(data(jnp.asarray(array)))
