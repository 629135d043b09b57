"""Leaves whose type Flax changed between the version that wrote a checkpoint and the one that reads it.

Flax 0.12.11, for one, made the scales of `nnx.WeightNorm` Params, which were plain arrays: the same values at the same
paths, of another type and so of another kind.  No list here says so.  A leaf is restored into another type where all
else about it is equal, both types are of JAX or Flax, another version of Flax wrote the checkpoint, and a layer of
Flax's own holds the leaf and has the new type in its code.  A type that a user gives a leaf is still refused.

Of such a leaf, only the side that trains it has moments and averages.  They start as for a new leaf where the
checkpoint lacks them, and are dropped where the target has no use for them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.common import compat
from statewise._src.common.codes import codes_in
from statewise._src.common.compare import Field, Mismatch
from statewise._src.common.paths import Path, format_path, format_type
from statewise._src.plan.ema import EMA
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise._src.step.trace import objects_of

__all__ = ["Retyped"]

# These hold what a user puts into them.
_CONTAINERS = (nnx.List, nnx.Dict)
# The modules of the classes that every user's module extends.
_BASES = frozenset(base.__module__ for base in nnx.Module.__mro__)


class Retyped:
    """The leaves of one restore whose type Flax changed.

    Args:
      plan: the target's plan.
      manifests: the manifest of the checkpoint, and that of its base if it has one.
    """

    def __init__(self, plan: PlanTables, manifests: Sequence[Manifest]) -> None:
        self._plan = plan
        self._versions = [manifest.written.get("flax", "") for manifest in manifests]
        # By path: what the leaf was in the checkpoint.
        self._known: dict[Path, str] = {}

    def accept(
        self, record: LeafRecord, saved: LeafRecord, checkpoint: int, mismatches: Sequence[Mismatch]
    ) -> tuple[Sequence[Mismatch], str]:
        """Returns the differences that remain if Flax changed the type of a leaf, and what to report.

        Args:
          record: the leaf of the target.
          saved: the leaf of the checkpoint.
          checkpoint: the number of the checkpoint that has it.
          mismatches: the differences between the two.
        """
        changed = [mismatch for mismatch in mismatches if mismatch.field is Field.TYPE]
        version = self._versions[checkpoint]
        if not changed or version == compat.versions()["flax"] or not self._is_of_flax(record, saved):
            return mismatches, ""
        was_type = format_type(saved.type)
        kinds = "" if saved.kind == record.kind else f" of kind {saved.kind!r}"
        was = f"was {_article(was_type)} {was_type}{kinds} in flax {version}"
        self._known[record.path] = was
        rest = [mismatch for mismatch in mismatches if mismatch.field not in (Field.TYPE, Field.KIND)]
        return rest, was

    def companion_of(self, leaf: LeafRecord) -> str:
        """Returns of which leaf that was retyped this one is a moment or an average, in words; empty if of none."""
        if not self._known or not self._is_derived(leaf):
            return ""
        for path, was in self._known.items():
            # An nnx.Optimizer has paths relative to its model, which is another object.
            ends = (path, path[1:]) if self._plan.several else (path,)
            if any(end and len(leaf.path) > len(end) and leaf.path[-len(end) :] == end for end in ends):
                return f"of {format_path(path)}, which {was}"
        return ""

    def _is_derived(self, leaf: LeafRecord) -> bool:
        kind = self._plan.kinds.get(leaf.kind)
        is_average = kind is not None and kind.of is EMA
        return is_average or leaf.kind == OPTIMIZER or leaf.type.rpartition(":")[2] in ("OptArray", "OptVariable")

    def _is_of_flax(self, record: LeafRecord, saved: LeafRecord) -> bool:
        if not all(type_.partition(":")[0].partition(".")[0] in ("jax", "flax") for type_ in (record.type, saved.type)):
            return False
        owner, name = _owner(self._objects, record.path, self._plan)
        return _is_set_by_flax(owner, name) and _has_type(owner, format_type(record.type))

    @functools.cached_property
    def _objects(self) -> tuple[Any, ...]:
        return objects_of(self._plan)


def _article(name: str) -> str:
    return "an" if name[0] in "AEIOU" else "a"


def _owner(objects: Sequence[Any], path: Path, plan: PlanTables) -> tuple[type, Any]:
    """Returns the type of the innermost module above a leaf, and the key under which it holds that."""
    node: Any = objects[0]
    keys: list[Any] = list(path)
    if plan.several:
        first = keys.pop(0)
        node = objects[plan.names.index(first) if plan.names else first]
    owner: tuple[type, Any] = object, None
    for key in keys:
        if isinstance(node, nnx.Pytree) and not isinstance(node, _CONTAINERS):
            owner = type(node), key
        is_attribute = isinstance(node, nnx.Pytree) and isinstance(key, str) and hasattr(node, key)
        node = getattr(node, key) if is_attribute else node[key] if hasattr(node, "__getitem__") else None
    return owner


def _is_set_by_flax(owner: type, name: Any) -> bool:
    """Returns whether an attribute is one that a layer of Flax gives itself, and not a subclass of the user's."""
    for cls in owner.__mro__:
        if cls.__module__.partition(".")[0] == "flax":
            return cls.__module__ not in _BASES
        if name in _names_in(cls):
            return False
    return False


def _has_type(owner: type, name: str) -> bool:
    """Returns whether a layer of Flax names a type of Variables in its code; a plain array needs no name."""
    layers = (cls for cls in owner.__mro__ if cls.__module__.partition(".")[0] == "flax")
    return name == "Array" or any(name in _names_in(cls) for cls in layers)


def _names_in(cls: type) -> Iterator[str]:
    for function in vars(cls).values():
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        for inner in codes_in(code) if code is not None else ():
            yield from inner.co_names
