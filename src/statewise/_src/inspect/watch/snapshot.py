"""A snapshot: the leaves of a model at one moment, with a fingerprint for each and without an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.common.compare import LeafFacts
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

# The group of leaves that no kind claims; a kind cannot have this name.
NO_KIND = "(no kind)"


@dataclasses.dataclass(frozen=True, slots=True)
class Print:
    """One leaf at one moment.

    Attributes:
      leaf: the leaf.
      kind: its kind's name; `NO_KIND`, or `params and lora` if two claim it.
      facts: its type, the shapes and dtypes in its value, and the fingerprints of its arrays.
    """

    leaf: Leaf
    kind: str
    facts: LeafFacts


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


def snapshot_of(objects: Sequence[object], kinds: Kinds, names: Sequence[str] = (), strict: bool = True) -> Snapshot:
    """Makes a snapshot of a state, or of one or several objects.

    Args:
      objects: the state, or the objects.
      kinds: the kinds by which the leaves are grouped.
      names: the objects' names, if they have any.
      strict: whether the paths in the kinds must exist.

    Raises:
      DeclarationError: a kind has a path that does not exist.
      StructureError: an object is not a model, is being traced, or is abstract; a donated state.
    """
    with jax.transfer_guard("allow"):  # a fingerprint must be fetched, whatever the program forbids itself
        check_untraced([jnp.zeros(())], *_TRACED, subject="The model")
        first_object = objects[0]
        if isinstance(first_object, State):
            return _of_state(first_object)
        graph = read_graph(objects, names)
        aliases = aliases_of(graph.graphdef, graph.paths, graph.several, graph.names)
        leaves = []
        for path, leaf, kind in zip(graph.paths, graph.leaves, _claims(kinds, graph, aliases, strict), strict=True):
            arrays, structure = arrays_of(raw_value(leaf))
            specs = [spec for spec in map(spec_of, arrays) if spec is not None]
            type_ = compat.variable_type(leaf)
            row = make_leaf(path, type_, specs, structure is ONE, kind, aliases.get(path, ()))
            leaves.append((row, kind, arrays, structure))
        # Ties the other way around: from each alias to the path under which the leaf is listed.
        first = {alias: path for path, others in aliases.items() for alias in others}
        return Snapshot(_printed(leaves), first, _statics(objects, names))


def _of_state(state: State) -> Snapshot:
    plan = state.tables
    check_not_donated(state, plan.kinds)
    # By identity: some leaves have no array, others several.
    arrays: dict[int, list[Any]] = {id(leaf): [] for leaf in plan.leaves}
    for kind, part in zip(plan.kinds, state.parts, strict=True):
        for info, array in zip(plan.by_kind[kind], plan.unpack(kind, part.arrays), strict=True):
            arrays[id(info.leaf)].append(array)
    leaves = [(leaf, leaf.kind or NO_KIND, arrays[id(leaf)], None) for leaf in plan.leaves]
    first = {alias: leaf.path for leaf in plan.leaves for alias in leaf.aliases}
    return Snapshot(_printed(leaves), first, {})


def _claims(kinds: Kinds, graph: ModelGraph, aliases: Mapping[Path, tuple[Path, ...]], strict: bool) -> list[str]:
    """Returns the kind of each leaf; unlike a plan, it accepts leaves that no kind claims, or that two claim."""
    claims_of = claimants(kinds)
    claims = []
    claimed: set[str] = set()
    for path, leaf in zip(graph.paths, graph.leaves, strict=True):
        ways = (path, *aliases.get(path, ()))
        names = dict.fromkeys(name for way in ways for name in claims_of(graph.ways(way), leaf))
        claimed.update(names)
        # A leaf that the rest kind would claim by one path belongs to the kind that claims it by another.
        own = [name for name in names if not kinds[name].rest] or list(names)
        claims.append(" and ".join(own) or NO_KIND)
    if strict and not all(kind.rest or type_only(kind.of) for kind in kinds.values()):
        reading = Reading(graph, aliases)
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
        "sw.watch(model)  # a real model, not one made by nnx.eval_shape",
        subject="The model",
        leaves=[leaf for leaf, _, arrays, _ in leaves if is_abstract(arrays)],
    )
    # All in one call, which takes the arrays of all leaves together; the results come back in the same order.
    present = [_in_jax_dtype(array) for array in flat if spec_of(array) is not None and not is_deleted(array)]
    sums = iter(fingerprints(present))
    prints = {}
    for leaf, kind, arrays, structure in leaves:
        specs = tuple(spec_of(array) or type(array) for array in arrays)
        donated = any(map(is_deleted, arrays))
        # A value that is not an array (text, an object of the user's) is compared by its repr.
        values = tuple(
            repr(array) if spec_of(array) is None else next(sums) for array in arrays if not is_deleted(array)
        )
        facts = LeafFacts(leaf.type, specs, structure, values=None if donated else values, donated=donated)
        prints[leaf.path] = Print(leaf, kind, facts)
    return prints


def _in_jax_dtype(array: Any) -> Any:
    """Returns a NumPy array, or a number, in the dtype that a compiled function would return it in."""
    spec = spec_of(array)
    if isinstance(array, jax.Array) or spec is None:
        return array
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(spec.dtype)


def _statics(objects: Sequence[object], names: Sequence[str]) -> dict[Path, Any]:
    several = len(objects) > 1 or bool(names)
    return {
        (named((position,), names) if several else ()) + path: value
        for position, item in enumerate(objects)
        for path, value in plain_attributes(item).items()
    }


_TRACED = ("watch", "with sw.watch(model) as watch:\n    train(model, x)  # the block around the compiled call")
