"""A snapshot: what a model is made of at one moment, with a fingerprint for each leaf and without an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import (
    ONE,
    ModelGraph,
    arrays_of,
    is_abstract,
    is_deleted,
    make_leaf,
    named,
    raw_value,
    read_graph,
    spec_of,
)
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.ties import aliases_of
from statewise._src.core.check_objects import plain_attributes
from statewise._src.core.plan import Kinds, State
from statewise._src.core.state_data import check_not_donated
from statewise._src.core.usable import check_concrete, check_untraced
from statewise._src.filters.explain import type_only
from statewise._src.inspect.watch.fingerprints import fingerprints
from statewise._src.plan.match import claimants
from statewise._src.plan.spelled_paths import Reading, check_claimed

__all__ = ["NO_KIND", "Print", "Snapshot", "snapshot_of"]

# Under this name stand the leaves that no kind claims; no kind can be called so.
NO_KIND = "(no kind)"


@dataclasses.dataclass(frozen=True, slots=True)
class Print:
    """One leaf at one moment.

    Attributes:
      leaf: the leaf.
      kind: its kind's name; `NO_KIND`, or `params and lora` where two claim it.
      specs: shape and dtype of each array in its value; of what is no array its type.
      structure: the structure of its value.
      prints: what stands for its values; None where an array is gone, since it was donated.
    """

    leaf: Leaf
    kind: str
    specs: tuple[Any, ...]
    structure: Any
    prints: tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A model at one moment.

    Attributes:
      prints: the leaves, by their first paths.
      aliases: from each other path of a tied leaf to its first.
      statics: the modules' plain attributes (`deterministic`, `use_running_average`), by path.
    """

    prints: Mapping[Path, Print]
    aliases: Mapping[Path, Path]
    statics: Mapping[Path, Any]


def snapshot_of(objects: Sequence[Any], kinds: Kinds, names: Sequence[str] = (), there: bool = True) -> Snapshot:
    """The snapshot of a state, or of one or several objects.

    Args:
      objects: the state, or the objects.
      kinds: the kinds to tell the leaves apart by.
      names: the objects' names, if they have any.
      there: whether the paths that kinds spell have to be there.

    Raises:
      DeclarationError: a kind that spells a path which is not there.
      StructureError: what is given is no model, is being traced, or is abstract; a donated state.
    """
    with jax.transfer_guard("allow"):  # a fingerprint has to come to the host, whatever the program forbids itself
        return _snapshot_of(objects, kinds, names, there)


def _snapshot_of(objects: Sequence[Any], kinds: Kinds, names: Sequence[str], there: bool) -> Snapshot:
    check_untraced([jnp.zeros(())], *_TRACED, subject="The model")
    if isinstance(objects[0], State):
        return _of_state(objects[0])
    found = read_graph(objects, names)
    aliases = aliases_of(found.graphdef, found.paths, found.several, found.names)
    claims = _claims(kinds, found, aliases, there)
    leaves = []
    for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True):
        arrays, structure = arrays_of(raw_value(leaf))
        specs = [spec for spec in map(spec_of, arrays) if spec is not None]
        type_ = compat.variable_type(leaf)
        own = make_leaf(path, type_, specs, structure is ONE, kind, aliases.get(path, ()))
        leaves.append((own, kind, arrays, structure))
    first = {alias: path for path, others in aliases.items() for alias in others}
    return Snapshot(_printed(leaves), first, _statics(objects, names))


def _of_state(state: State) -> Snapshot:
    plan = state.tables
    check_not_donated(state, plan.kinds)
    arrays: dict[int, list[Any]] = {}
    for kind, part in zip(plan.kinds, state.parts, strict=True):
        for leaf, array in zip(plan.leaf_of_array[kind], plan.unpack(kind, part.arrays), strict=True):
            arrays.setdefault(id(leaf), []).append(array)
    leaves = [(leaf, leaf.kind or NO_KIND, arrays.get(id(leaf), []), None) for leaf in plan.leaves]
    first = {alias: leaf.path for leaf in plan.leaves for alias in leaf.aliases}
    return Snapshot(_printed(leaves), first, {})


def _claims(kinds: Kinds, found: ModelGraph, aliases: Mapping[Path, tuple[Path, ...]], there: bool) -> list[str]:
    """The kind of each leaf; unlike a plan it refuses none that no kind claims, or that two do."""
    claims_of = claimants(kinds)
    claims = []
    claimed: set[str] = set()
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        ways = (path, *aliases.get(path, ()))
        names = dict.fromkeys(name for way in ways for name in claims_of(found.ways(way), leaf))
        claimed.update(names)
        # What the rest kind would get by one path belongs to whoever claims it by another.
        own = [name for name in names if not kinds[name].rest] or list(names)
        claims.append(" and ".join(own) or NO_KIND)
    if there and not all(kind.rest or type_only(kind.of) for kind in kinds.values()):
        reading = Reading(found, aliases)
        for kind in kinds.values():
            reading.check(kind.of)
        check_claimed(kinds, reading, claimed, ())
    return claims


def _printed(leaves: Sequence[tuple[Leaf, str, Sequence[Any], Any]]) -> dict[Path, Print]:
    flat = [array for _, _, arrays, _ in leaves for array in arrays]
    check_untraced(flat, *_TRACED, subject="The model")
    check_concrete(
        flat,
        "watch",
        "sw.watch(model)  # built for real, not by nnx.eval_shape",
        subject="The model",
        leaves=[leaf for leaf, _, arrays, _ in leaves if is_abstract(arrays)],
    )
    there = [_as_jax_sees_it(array) for array in flat if spec_of(array) is not None and not is_deleted(array)]
    sums = iter(fingerprints(there))
    prints = {}
    for leaf, kind, arrays, structure in leaves:
        specs = tuple(spec_of(array) or type(array) for array in arrays)
        # What is no array (text, an object of the user's) is told apart as it prints.
        own = tuple(repr(array) if spec_of(array) is None else next(sums) for array in arrays if not is_deleted(array))
        prints[leaf.path] = Print(leaf, kind, specs, structure, own if len(own) == len(arrays) else None)
    return prints


def _as_jax_sees_it(array: Any) -> Any:
    """An array of NumPy, or a number, in the dtype that it has as soon as it has been through a compiled function."""
    spec = spec_of(array)
    if isinstance(array, jax.Array) or spec is None:
        return array
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(spec.dtype)


def _statics(objects: Sequence[Any], names: Sequence[str]) -> dict[Path, Any]:
    several = len(objects) > 1 or bool(names)
    return {
        (named((position,), names) if several else ()) + path: value
        for position, thing in enumerate(objects)
        for path, value in plain_attributes(thing).items()
    }


_TRACED = ("watch", "with sw.watch(model) as watch:\n    train(model, x)  # the block around the compiled call")
