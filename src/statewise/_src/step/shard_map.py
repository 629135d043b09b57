"""Steps on a state with `PerDevice` kinds: the function runs on each device, under `jax.shard_map`.

Each device has its own values of `PerDevice` kinds, all of everything else, and its part of the arguments:

- an array with axes is split along its first axis, unless it already has a sharding on this mesh (replicated, for
  example), which then wins; numbers are passed to every device;
- the loss and the gradients of a train step are averaged over the devices before the optimizer sees them;
- outputs that are the same on every device are returned as they are; outputs that differ are concatenated along their
  first axis, and numbers that differ are stacked, one for each device.

What is replicated must stay replicated: a step that would write a different value on each device is rejected when it
is traced.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from statewise._src.common import compat
from statewise._src.common.paths import plain_key
from statewise._src.common.problems import Problems
from statewise._src.plan.per_device import PerDeviceArrays
from statewise._src.plan.placements import axes_of
from statewise._src.plan.tables import PlanTables
from statewise._src.step.arguments import with_shape
from statewise._src.step.operands import Operand, Operands
from statewise._src.step.program import Program
from statewise._src.step.replication import NOWHERE, varying
from statewise._src.step.trace import Traced
from statewise.errors import PlacementError

__all__ = ["check_replicated", "local_arguments", "program_on_each", "specs_of", "traced_on_one"]

WHOLE = jax.P()


def specs_of(copies: PerDeviceArrays, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Returns how each array among a step's arguments is split over the devices."""
    return tuple(_spec(copies, leaf) for leaf in leaves)


def _spec(copies: PerDeviceArrays, leaf: Any) -> Any:
    if not getattr(leaf, "shape", ()):
        return WHOLE
    sharding = _sharding(copies, leaf)
    if sharding is None:
        return jax.P(copies.axes)
    own = [tuple(axis for axis in axes_of(axes) if axis in copies.axes) for axes in sharding.spec]
    return jax.P(*(axes or None for axes in own)) if any(own) else WHOLE


def _sharding(copies: PerDeviceArrays, leaf: Any) -> jax.NamedSharding | None:
    """Returns an array's sharding on the mesh; None if it is on other devices or unknown."""
    if isinstance(leaf, compat.Tracer):
        if AxisType.Explicit not in copies.mesh.axis_types:
            return None
        leaf = jax.typeof(leaf)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh in (copies.mesh, copies.mesh.abstract_mesh):
        return sharding
    return None


def local_arguments(
    copies: PerDeviceArrays, args: Any, kwargs: Any, specs: Sequence[Any], name_of: Callable[..., str], step: str
) -> tuple[Any, Any]:
    """Returns the arguments as one device sees them, by shape and dtype; numbers unchanged.

    Raises:
      PlacementError: an axis of an array does not divide evenly among the devices.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    local, uneven = [], []
    for (keys, leaf), spec in zip(keyed, specs, strict=True):
        if not getattr(leaf, "shape", ()):
            local.append(leaf)
            continue
        shape = list(leaf.shape)
        for axis, names in enumerate(spec):
            parts = math.prod(copies.mesh.shape[name] for name in axes_of(names))
            if shape[axis] % parts:
                place = name_of(plain_key(keys[1])) + jax.tree_util.keystr(keys[2:])
                uneven.append((place, leaf, axis, parts))
            shape[axis] //= parts
        local.append(with_shape(leaf, tuple(shape)))
    if uneven:
        listed = "; ".join(f"{place}: axis {axis} of {leaf.shape}" for place, leaf, axis, _ in uneven)
        raise PlacementError(
            f"{step} runs on {uneven[0][3]} devices along {copies.words}, and cannot split among them {listed}.",
            hint=f"make the axis a multiple of {uneven[0][3]}\n"
            f"or replicate the array: jax.device_put({uneven[0][0]}, jax.NamedSharding(mesh, jax.P()))",
        )
    return jax.tree.unflatten(structure, local)


def _on_each(copies: PerDeviceArrays, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    shard_map: Any = jax.shard_map  # its type stubs take no function
    mapped: Callable[..., Any] = shard_map(
        fn,
        mesh=copies.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(copies.axes),
        check_vma=False,  # `varying` determines what varies, without changes to the model
    )
    return mapped


def traced_on_one(copies: PerDeviceArrays, trace: Callable[[], Traced]) -> Traced:
    """Traces as one device under `shard_map`, so that the function can use the mesh axes."""
    box: list[Traced] = []

    def on_one_device() -> Any:
        box.append(trace())
        return jnp.zeros(())

    jax.eval_shape(_on_each(copies, on_one_device, (), WHOLE))
    return box[0]


def check_replicated(plan: PlanTables, traced: Traced, specs: Sequence[Any], step: str) -> list[bool]:
    """Returns which of a traced call's outputs differ from device to device.

    Raises:
      PlacementError: the call would write a different value on each device to a replicated leaf.
    """
    copies = plan.per_device
    assert copies is not None
    axes = frozenset(copies.axes)
    # Inputs: the arrays of the state, then those of the arguments; only those that are read are inputs of the jaxpr.
    inputs = [axes if array.devices else NOWHERE for array in plan.arrays]
    inputs += [frozenset(name for names in spec for name in axes_of(names)) for spec in specs]
    outputs = varying(traced.effects.jaxpr, list(itertools.compress(inputs, traced.effects.read)), axes)
    problems = Problems()
    for (kind, position), over in zip(traced.written, outputs[traced.outputs :], strict=True):
        if over and position not in copies.of(kind):
            problems.add(plan.by_kind[kind][position].leaf, "differs from device to device")
    if problems:
        kinds = list(dict.fromkeys(leaf.kind for leaf in problems.leaves))
        raise PlacementError(
            f"`{step}` would write a different value on each device to {', '.join(map(repr, kinds))}, "
            f"which {'is' if len(kinds) == 1 else 'are'} replicated.",
            leaves=problems.leaves,
            kind=kinds[0],
            hint=f"keep a value for each device: {kinds[0]}=sw.Kind(..., placement=sw.PerDevice({copies.words}))\n"
            f"or average before writing: jax.lax.pmean(value, {copies.words})",
        )
    return [bool(over) for over in outputs[: traced.outputs]]


def program_on_each(
    plan: PlanTables, program: Program, operands: Operands, specs: Sequence[Any], differ: Sequence[bool]
) -> Program:
    """Makes the program of all devices from that of one.

    Args:
      plan: the plan.
      program: what one device runs.
      operands: the arrays that are passed to it.
      specs: how each array among the arguments is split.
      differ: which outputs differ from device to device.
    """
    copies = plan.per_device
    assert copies is not None
    each = jax.P(copies.axes)
    # `PerDevice` arrays have a leading axis for the devices, which each device sees as an axis of size 1.
    donated_own, read_only_own = (
        [tuple(_is_own(plan, operand, slot) for slot in operand.slots) for operand in part]
        for part in (operands.donated, operands.read_only)
    )
    donated_specs, read_only_specs = (
        [tuple(each if own else WHOLE for own in operand) for operand in part] for part in (donated_own, read_only_own)
    )

    # On one device: remove the leading axis of size 1, run, and put it back.
    def on_one(donated: Any, read_only: Any, leaves: Any, structure: Any) -> tuple[Any, Any]:
        donated = _map(lambda x, own: x[0] if own else x, donated, donated_own)
        read_only = _map(lambda x, own: x[0] if own else x, read_only, read_only_own)
        written, out = program(donated, read_only, *jax.tree.unflatten(structure, leaves))
        flat, box["out"] = jax.tree.flatten(out)
        # An output that differs is concatenated along its first axis; a number gets one.
        stacked = [
            jnp.asarray(x)[None] if alone and not jnp.ndim(x) else x for x, alone in zip(flat, differ, strict=True)
        ]
        return _map(lambda x, own: x[None] if own else x, written, donated_own), stacked

    box: dict[str, Any] = {}

    def on_all(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten((args, kwargs))
        resharded = functools.partial(_resharded, copies)
        mapped = _on_each(
            copies,
            functools.partial(on_one, structure=structure),
            (donated_specs, read_only_specs, list(specs)),
            (donated_specs, [each if alone else WHOLE for alone in differ]),
        )
        written, flat = mapped(
            _map(resharded, donated, donated_specs),
            _map(resharded, read_only, read_only_specs),
            list(map(resharded, leaves, specs)),
        )
        return tuple(written), jax.tree.unflatten(box["out"], flat)

    return on_all


def _map(fn: Callable[[Any, Any], Any], arrays: Any, others: Any) -> list[tuple[Any, ...]]:
    """Maps a function over the arrays of operands, each with its counterpart in a structure of the same form."""
    return [tuple(map(fn, *pair)) for pair in zip(arrays, others, strict=True)]


def _is_own(plan: PlanTables, operand: Operand, slot: int) -> bool:
    """Returns whether the operand in a slot has the leading axis for the devices; a buffer never has."""
    stored = plan.stored[operand.name][slot]
    return stored.buffer is None and stored.arrays[0].devices > 0


def _resharded(copies: PerDeviceArrays, array: Any, spec: Any) -> Any:
    """Reshards an array as `jax.shard_map` needs it: on axes of type `Explicit` it moves nothing by itself."""
    if AxisType.Explicit not in copies.mesh.axis_types or not jnp.ndim(array):
        return array
    sharding = getattr(jax.typeof(array), "sharding", None)
    now = [axes_of(axes) for axes in sharding.spec] if isinstance(sharding, jax.NamedSharding) else []
    now += [()] * (jnp.ndim(array) - len(now))
    wanted = [axes_of(axes) for axes in spec] + [()] * (len(now) - len(spec))
    # The axes of `PerDevice` as wanted; every other axis of the mesh stays where it is.
    full = [(*new, *(name for name in old if name not in copies.axes)) for old, new in zip(now, wanted, strict=True)]
    return jax.reshard(array, jax.NamedSharding(copies.mesh, jax.P(*(axes or None for axes in full))))
