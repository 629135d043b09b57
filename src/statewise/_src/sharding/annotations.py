"""What the Variables of a model say of their own placement: `out_sharding` and `sharding_rules`, their metadata.

NNX keeps `out_sharding` beside the value and does not hold the two together: where `nnx.vmap` stacks layers the value
gains an axis, the metadata an entry only if `transform_metadata` asks for one.  Nothing in a Variable tells such a leaf
from one whose last axes were left out by hand, as `jax.P` allows; so what names an axis has to name them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import read_graph, rebuild
from statewise._src.common.paths import Path
from statewise._src.plan.placements import FromMetadata, Sharded, axes_of, merged_rules
from statewise._src.plan.tables import PlanTables
from statewise.errors import PlacementError

__all__ = ["annotated", "metadata_of"]


def metadata_of(plan: PlanTables) -> dict[Path, Mapping[str, Any]]:
    """Returns the metadata of each leaf's Variable by the leaf's path; of a raw array none."""
    # Of raw leaves NNX counts only what is an array, so that None in the place of one would not be found again.
    values = [np.zeros(()) if row.type is jax.Array else None for row in plan.rows]
    found = read_graph(rebuild(plan.graphdef, values, plan.several), plan.names)
    return {
        path: leaf.get_metadata() if compat.is_variable(leaf) else {}
        for path, leaf in zip(found.paths, found.leaves, strict=True)
    }


def annotated(placement: FromMetadata, metadata: Mapping[str, Any], shape: tuple[int, ...]) -> Sharded | None:
    """Returns what a Variable's metadata says of an array of this shape; None where it says nothing.

    Raises:
      PlacementError: metadata that names no axes, or not all of them; a name without a rule; rules that disagree.
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
    rules = merged_rules(placement.rules or (), own)
    unruled = [name for axis in names for name in axes_of(axis) if placement.rules is not None and name not in rules]
    if unruled:
        listed = [(name, None) for name in dict.fromkeys(unruled)]
        raise PlacementError(
            f"no rule for {', '.join(map(repr, dict.fromkeys(unruled)))}.", hint=f"a rule each: {listed}"
        )
    return Sharded(*(_ruled(axis, rules) for axis in names))


def _check_rank(names: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    """Raises where metadata would be applied to other axes than it was written for."""
    entries = "1 entry" if len(names) == 1 else f"{len(names)} entries"
    axes = "1 axis" if len(shape) == 1 else f"{len(shape)} axes"
    if len(names) > len(shape):
        raise PlacementError(
            f"out_sharding={names!r} has {entries}, the array {axes}.",
            hint=f"leaf.set_metadata(out_sharding={_filled(names, shape)!r})"
            "  # an entry for each axis: a layer that was taken out of a stack keeps those of the stack",
        )
    if len(names) < len(shape) and any(map(axes_of, names)):
        raise PlacementError(
            f"out_sharding={names!r} has {entries}, the array {axes}.",
            hint="transform_metadata={nnx.PARTITION_NAME: None}"
            "  # in the nnx.vmap that stacks the layers: theirs is the first axis, and has no entry\n"
            f"or, where nothing is stacked, an entry for each axis: out_sharding={_filled(names, shape)!r}\n"
            f"or, where nothing else reaches the metadata (as under jax.vmap): "
            f"leaf.set_metadata(out_sharding={((None,) * (len(shape) - len(names)) + names)!r})",
        )


def _filled(names: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The entries as they would be for so many axes."""
    if len(names) > len(shape):
        return names[len(names) - len(shape) :]
    return names + (None,) * (len(shape) - len(names))


def _ruled(axis: Any, rules: Mapping[str, Any]) -> Any:
    found = tuple(one for name in axes_of(axis) for one in axes_of(rules.get(name, name)))
    return found[0] if len(found) == 1 else found or None
