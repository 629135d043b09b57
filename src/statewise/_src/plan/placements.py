"""Placements: how a kind's arrays are placed on a mesh, as pure data.

A placement does not refer to a particular mesh; `sharding/resolve` resolves it against one.  If the arrays of a kind
are placed differently, the kind's placement is a function of (path, shape) that returns one of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from statewise.errors import PlacementError

__all__ = [
    "PLACEMENTS",
    "Axis",
    "FromMetadata",
    "PerDevice",
    "Placement",
    "Replicated",
    "Sharded",
    "axes_of",
    "describe_placement",
    "merged_rules",
    "reduced",
]

Axis = str | tuple[str, ...] | None
Resize = Literal["error", "mean", "first"]


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Replicates the array: every device holds all of it.

    Args:
      memory: the memory kind, such as `"pinned_host"`, where JAX has one; None for the device's default.

    Example:
      >>> import statewise as sw
      >>> sw.Replicated() == sw.Replicated(memory=None)
      True
    """

    _: dataclasses.KW_ONLY
    memory: str | None = None

    def __post_init__(self) -> None:
        _check_memory(self.memory)

    def __repr__(self) -> str:
        return _as_call(self, memory=self.memory)


@dataclasses.dataclass(frozen=True, init=False)
class Sharded:
    """Shards the array over the mesh: for each axis of the array, the mesh axis or axes to shard it over.

    Args:
      *axes: for each axis of the array a mesh axis, a tuple of mesh axes, or None if it is not sharded; the array's
        remaining axes are not sharded.
      memory: the memory kind, such as `"pinned_host"`; None for the device's default.

    Raises:
      PlacementError: an axis is not a name, or is named twice.

    Example:
      >>> import statewise as sw
      >>> sw.Sharded("data", None).axes
      ('data', None)
    """

    axes: tuple[Axis, ...]
    memory: str | None

    def __init__(self, *axes: Axis, memory: str | None = None) -> None:
        names = [name for axis in axes for name in axes_of(axis)]
        for name in names:
            if not isinstance(name, str):
                raise PlacementError(f"{name!r} is not the name of a mesh axis.", hint="sw.Sharded('data', None)")
            if names.count(name) > 1:
                raise PlacementError(
                    f"Sharded{axes!r} shards an array twice over {name!r}.", hint=f"name {name!r} once, None elsewhere"
                )
        _check_memory(memory)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "memory", memory)

    def __repr__(self) -> str:
        return _as_call(self, *self.axes, memory=self.memory)


@dataclasses.dataclass(frozen=True, init=False)
class FromMetadata:
    """Shards by the `out_sharding` metadata of the Variables, as NNX layers carry it; replicates where there is none.

    Metadata that names an axis must have an entry for every axis of the array.  Layers that `nnx.vmap` stacks have one
    more axis, and an entry for it only with `transform_metadata={nnx.PARTITION_NAME: None}`; without it they are an
    error.

    Args:
      rules: maps a logical name to a mesh axis, a tuple of mesh axes, or None, as in `nnx.logical_axis_rules`; a
        Variable's own `sharding_rules` apply too.  Without rules the names are mesh axes.

    Raises:
      PlacementError: something is not a rule, or two rules contradict each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Dict(w=nnx.Param(jnp.zeros((8, 4)), out_sharding=("embed", None), eager_sharding=False))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.FromMetadata([("embed", "data")])))
      >>> tuple(kinds.plan(model).shardings(jax.sharding.AbstractMesh((4,), ("data",)))["params"]["w"].spec)
      ('data',)
    """

    rules: tuple[tuple[str, Axis], ...] | None

    def __init__(self, rules: Iterable[tuple[str, Axis]] | None = None) -> None:
        object.__setattr__(self, "rules", None if rules is None else tuple(merged_rules(rules).items()))

    def __repr__(self) -> str:
        return _as_call(self, *(() if self.rules is None else [list(self.rules)]))


@dataclasses.dataclass(frozen=True, init=False)
class PerDevice:
    """Gives each device its own value: statistics that are not synchronized, caches, random streams.

    In a state on a mesh such an array has a leading axis with one value for each device along the mesh axis; in the
    plan and the model it has one value, in the model's own shape.  Steps run on each device with that device's values.

    Args:
      *axes: the mesh axis; with several axes, there is one value for each device along all of them.
      memory: the memory kind, such as `"pinned_host"`; None for the device's default.
      resize: what a restore onto another number of devices does: `"error"`, or gives every device the `"mean"` of all
        values or the `"first"` value.

    Raises:
      PlacementError: there is no axis, or an axis is not a name or is named twice; `resize` is none of these.

    Example:
      >>> import statewise as sw
      >>> sw.PerDevice("data", resize="mean")
      PerDevice('data', resize='mean')
    """

    axes: tuple[str, ...]
    memory: str | None
    resize: str

    def __init__(self, *axes: str, memory: str | None = None, resize: Resize = "error") -> None:
        named = all(isinstance(axis, str) for axis in axes)
        if not axes or not named or len(set(axes)) < len(axes):
            raise PlacementError(
                f"PerDevice({', '.join(map(repr, axes))}) does not name the axes of a mesh, each once.",
                hint="sw.PerDevice('data')",
            )
        if resize not in get_args(Resize):
            raise PlacementError(
                f"resize={resize!r} is not one of 'error', 'mean', 'first'.",
                hint="resize='mean'  # or 'first', or 'error'",
            )
        _check_memory(memory)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "memory", memory)
        object.__setattr__(self, "resize", resize)

    def __repr__(self) -> str:
        return _as_call(self, *self.axes, memory=self.memory, resize="" if self.resize == "error" else self.resize)


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The placement of a kind after its per-device values were reduced to one: `Replicated` for those.

    Attributes:
      placement: the placement before, a function of (path, shape).
    """

    placement: Any

    def __call__(self, path: Any, shape: Any) -> Any:
        """Returns the placement of a leaf after the reduction."""
        return reduced(self.placement(path, shape))


def reduced(placement: Any) -> Any:
    """Returns a placement as it is after per-device values were reduced to one."""
    if isinstance(placement, PerDevice):
        return Replicated(memory=placement.memory)
    return placement if isinstance(placement, PLACEMENTS) or placement is None else Reduced(placement)


Placement = Replicated | Sharded | PerDevice | FromMetadata
PLACEMENTS = (Replicated, Sharded, PerDevice, FromMetadata)


def merged_rules(*several: Any) -> dict[str, Axis]:
    """Merges several lists of rules into one.

    Raises:
      PlacementError: something is not a rule, or two rules contradict each other.
    """
    merged: dict[str, Axis] = {}
    for rules in several:
        if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
            raise PlacementError(f"A {type(rules).__name__} is not a list of rules.", hint=_RULES)
        for rule in rules:
            is_pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
            pair: Any = rule if is_pair else (None, None)
            name, axis = pair[0], tuple(pair[1]) if isinstance(pair[1], list) else pair[1]
            if not all(isinstance(each, str) for each in (name, *axes_of(axis))):
                raise PlacementError(f"{rule!r} is not a rule: a logical name and a mesh axis.", hint=_RULES)
            if name in merged and merged[name] != axis:
                raise PlacementError(
                    f"Two rules for {name!r} contradict each other: {merged[name]!r} and {axis!r}.",
                    hint=f"one rule for {name!r}",
                )
            merged[name] = axis
    return merged


_RULES = "sw.FromMetadata([('embed', 'data'), ('heads', None)])"


def axes_of(axis: Any) -> tuple[Any, ...]:
    """Returns the mesh axes that one axis of an array is sharded over."""
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def describe_placement(placement: Any) -> str:
    """Returns a placement as code; a function by its name."""
    if isinstance(placement, PLACEMENTS):
        return repr(placement)
    if isinstance(placement, Reduced):
        return f"{describe_placement(placement.placement)}, reduced"
    return str(getattr(placement, "__name__", None) or type(placement).__name__)


def _as_call(placement: object, *args: object, **options: object) -> str:
    """Returns a placement as code, without the options that are empty."""
    words = [*map(repr, args), *(f"{name}={value!r}" for name, value in options.items() if value)]
    return f"{type(placement).__name__}({', '.join(words)})"


def _check_memory(memory: object) -> None:
    if memory is not None and not isinstance(memory, str):
        raise PlacementError(f"memory={memory!r} is not a memory kind.", hint="memory='pinned_host'")
