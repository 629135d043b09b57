"""Placements in a model's own Variables: the metadata `out_sharding` and `sharding_rules`.

NNX stores `out_sharding` beside the value and does not keep the two in step: where `nnx.vmap` stacks layers, the value
gets another axis, but the metadata another entry only if `transform_metadata` asks for one.  A Variable does not show
whether that happened or its last axes were left out by hand, as `jax.P` allows; so metadata that names an axis must
name all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import read_graph, rebuild
from statewise._src.common.paths import Path
from statewise._src.common.problems import counted
from statewise._src.plan.placements import FromMetadata, Sharded, axes_of, merged_rules
from statewise._src.plan.tables import PlanTables
from statewise.errors import PlacementError

__all__ = ["annotated", "metadata_of"]


def metadata_of(plan: PlanTables) -> dict[Path, Mapping[str, Any]]:
    """Returns the metadata of each leaf's Variable by the leaf's path; empty for a raw array."""
    # A raw leaf must be an array: NNX does not count None as one, and would not list it again.
    values = [np.zeros(()) if row.type is jax.Array else None for row in plan.rows]
    graph = read_graph(rebuild(plan.graphdef, values, plan.several), plan.names)
    return {
        path: leaf.get_metadata() if compat.is_variable(leaf) else {}
        for path, leaf in zip(graph.paths, graph.leaves, strict=True)
    }


def annotated(placement: FromMetadata, metadata: Mapping[str, Any], shape: tuple[int, ...]) -> Sharded | None:
    """Returns the placement that a Variable's metadata gives an array of this shape; None if it gives none.

    Raises:
      PlacementError: the metadata does not name axes, or not all of them; a name has no rule; rules conflict.
    """
    names, own = metadata.get("out_sharding"), metadata.get("sharding_rules") or ()
    names = names.spec if isinstance(names, jax.NamedSharding) else names
    if names is None:
        return None
    if not isinstance(names, tuple | list | jax.P):
        raise PlacementError(
            f"out_sharding is {names!r}.", hint="out_sharding=('embed', None)  # a name for each axis, or None"
        )
    _check_rank(tuple(names), shape)
    # The kind's rules and the Variable's own, which must agree.  Without the kind's, a name may be a mesh axis itself.
    rules = merged_rules(placement.rules or (), own)
    unruled = [name for axis in names for name in axes_of(axis) if placement.rules is not None and name not in rules]
    if unruled:
        missing = list(dict.fromkeys(unruled))
        raise PlacementError(
            f"no rule for {', '.join(map(repr, missing))}.",
            hint=f"add a rule for each: {[(name, None) for name in missing]}",
        )
    return Sharded(*(_ruled(axis, rules) for axis in names))


def _check_rank(names: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    """Checks that metadata is applied to the axes that it was written for."""
    entries, axes = counted(len(names), "entry", "entries"), counted(len(shape), "axis", "axes")
    fact = f"out_sharding={names!r} has {entries}, the array {axes}."
    if len(names) > len(shape):
        raise PlacementError(
            fact,
            hint=f"leaf.set_metadata(out_sharding={_filled(names, shape)!r})"
            "  # an entry for each axis: a layer that was taken out of a stack keeps the stack's entries",
        )
    # Without the name of an axis, metadata replicates an array of any rank.
    if len(names) < len(shape) and any(map(axes_of, names)):
        raise PlacementError(
            fact,
            hint="transform_metadata={nnx.PARTITION_NAME: None}"
            "  # in the nnx.vmap that stacks the layers: the layers' axis is the first, and has no entry\n"
            f"or, if nothing is stacked, an entry for each axis: out_sharding={_filled(names, shape)!r}\n"
            f"or, if the metadata cannot be set elsewhere (as under jax.vmap): "
            f"leaf.set_metadata(out_sharding={((None,) * (len(shape) - len(names)) + names)!r})",
        )


def _filled(names: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns the entries, cut or filled up to this many axes."""
    return names[max(len(names) - len(shape), 0) :] + (None,) * (len(shape) - len(names))


def _ruled(axis: Any, rules: Mapping[str, Any]) -> Any:
    axes = tuple(mesh_axis for name in axes_of(axis) for mesh_axis in axes_of(rules.get(name, name)))
    return axes[0] if len(axes) == 1 else axes or None
