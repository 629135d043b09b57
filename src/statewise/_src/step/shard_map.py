"""Steps on a state of which some kinds lie per device: the function runs on each device, by `jax.shard_map`.

Each device has its own values of what is `PerDevice`, the whole of everything else, and its part of the arguments:

- an array with axes is split along its first axis, unless it lies on the mesh already with a sharding of its own (whole
  on each device, say), which then wins; numbers go to every device;
- the loss and the gradients of a train step are averaged over the devices before the optimizer sees them;
- of the output, what is the same on every device comes out as it is; what differs is joined along its first axis, and
  numbers that differ are stacked, one for each device.

What every device holds alike must stay alike: a step that would write another value to it on each device is refused
when it is traced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from statewise._src.common import compat
from statewise._src.common.paths import Leaf, Path
from statewise._src.plan.per_device import PerDeviceArrays
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Operand, Operands
from statewise._src.step.program import Program
from statewise._src.step.replication import NOWHERE, varying
from statewise._src.step.trace import Traced
from statewise.errors import PlacementError

__all__ = ["check_replicated", "local_arguments", "program_on_each", "specs_of", "traced_on_one"]

WHOLE = jax.P()


def specs_of(copies: PerDeviceArrays, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """How each array among a step's arguments is split over the devices."""
    return tuple(_spec(copies, leaf) for leaf in leaves)


def _spec(copies: PerDeviceArrays, leaf: Any) -> Any:
    if not getattr(leaf, "shape", ()):
        return WHOLE
    sharding = _sharding(copies, leaf)
    if sharding is None:
        return jax.P(copies.axes)
    own = [tuple(axis for axis in _names(axes) if axis in copies.axes) for axes in sharding.spec]
    return jax.P(*(axes or None for axes in own)) if any(own) else WHOLE


def _names(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _sharding(copies: PerDeviceArrays, leaf: Any) -> jax.NamedSharding | None:
    """How an array lies on the mesh; None where it lies elsewhere, or where nobody can tell."""
    if isinstance(leaf, compat.Tracer):
        if AxisType.Explicit not in copies.mesh.axis_types:
            return None
        leaf = jax.typeof(leaf)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh in (copies.mesh, copies.mesh.abstract_mesh):
        return sharding
    return None


def local_arguments(
    copies: PerDeviceArrays, args: Any, kwargs: Any, specs: Sequence[Any], name_of: Callable[[Any], str], step: str
) -> tuple[Any, Any]:
    """The arguments as one device sees them, by shape and dtype; numbers as they are.

    Raises:
      PlacementError: an array whose axis does not divide among the devices.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    made, odd = [], []
    for (keys, leaf), spec in zip(keyed, specs, strict=True):
        if not getattr(leaf, "shape", ()):
            made.append(leaf)
            continue
        shape = list(leaf.shape)
        for axis, names in enumerate(spec):
            parts = _count(copies, _names(names))
            if shape[axis] % parts:
                first, *rest = keys[1:]
                place = name_of(getattr(first, "idx", getattr(first, "key", None)))
                odd.append((place + jax.tree_util.keystr(tuple(rest)), leaf, axis, parts))
            shape[axis] //= parts
        type_ = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)  # NumPy's float64 is float32
        made.append(jax.ShapeDtypeStruct(tuple(shape), type_.dtype, weak_type=getattr(type_, "weak_type", False)))
    if odd:
        listed = "; ".join(f"{place}: axis {axis} of {leaf.shape}" for place, leaf, axis, _ in odd)
        raise PlacementError(
            f"{step} runs on {odd[0][3]} devices along {copies.words}, and cannot split among them {listed}.",
            hint=f"an axis that is a multiple of {odd[0][3]}\n"
            f"or the whole on each device: jax.device_put({odd[0][0]}, jax.NamedSharding(mesh, jax.P()))",
        )
    return jax.tree.unflatten(structure, made)


def _count(copies: PerDeviceArrays, names: Sequence[str]) -> int:
    return functools.reduce(lambda count, name: count * int(copies.mesh.shape[name]), names, 1)


def _on_each(copies: PerDeviceArrays, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    shard_map: Any = jax.shard_map  # typed as if it took no function
    made: Callable[..., Any] = shard_map(
        fn,
        mesh=copies.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(copies.axes),
        check_vma=False,  # what varies is told by `varying`, which asks nothing of the model
    )
    return made


def traced_on_one(copies: PerDeviceArrays, trace: Callable[[], Traced]) -> Traced:
    """Traces where one device stands, so that the function may speak of the mesh axes."""
    box: list[Traced] = []

    def standing() -> Any:
        box.append(trace())
        return jnp.zeros(())

    jax.eval_shape(_on_each(copies, standing, (), WHOLE))
    return box[0]


def check_replicated(plan: PlanTables, traced: Traced, specs: Sequence[Any], step: str) -> list[bool]:
    """Which of a traced call's outputs differ from device to device.

    Raises:
      PlacementError: it writes another value on each device to leaves that every device holds alike.
    """
    copies = plan.per_device
    assert copies is not None
    axes = frozenset(copies.axes)
    inputs = [axes if at in copies.of(kind) else NOWHERE for kind, own in plan.specs.items() for at in range(len(own))]
    inputs += [frozenset(name for names in spec for name in _names(names)) for spec in specs]
    read = [one for one, is_read in zip(inputs, traced.effects.read, strict=True) if is_read]
    found = varying(traced.effects.jaxpr, read, axes)
    odd: dict[Path, Leaf] = {}
    for (kind, position), over in zip(traced.written, found[traced.outputs :], strict=True):
        if over and position not in copies.of(kind):
            leaf = plan.leaf_of_array[kind][position]
            odd[leaf.path] = dataclasses.replace(leaf, note="differs from device to device")
    if odd:
        kinds = list(dict.fromkeys(leaf.kind for leaf in odd.values()))
        raise PlacementError(
            f"{step} would write another value on each device to {', '.join(map(str, kinds))}, "
            "which every device holds alike.",
            leaves=odd.values(),
            kind=kinds[0],
            hint=f"a value for each device: {kinds[0]}=sw.Kind(..., placement=sw.PerDevice({copies.words}))\n"
            f"or one for all: jax.lax.pmean(value, {copies.words}) before it is written",
        )
    return [bool(over) for over in found[: traced.outputs]]


def program_on_each(
    plan: PlanTables, program: Program, routes: Operands, specs: Sequence[Any], differ: Sequence[bool]
) -> Program:
    """The program of all devices, from that of one.

    Args:
      plan: the plan.
      program: what one device runs.
      routes: which arrays cross.
      specs: how each array among the arguments is split.
      differ: which outputs differ from device to device.
    """
    copies = plan.per_device
    assert copies is not None
    each = jax.P(copies.axes)
    parts = routes.donated, routes.kept
    ours = [[[_is_ours(plan, copies, route, slot) for slot in route.slots] for route in part] for part in parts]
    laid = [[tuple(each if own else WHOLE for own in route) for route in part] for part in ours]

    def on_one(donated: Any, kept: Any, leaves: Any, structure: Any) -> tuple[Any, Any]:
        donated, kept = (
            [
                tuple(x[0] if own else x for x, own in zip(arrays, route, strict=True))
                for arrays, route in zip(part, own_of_part, strict=True)
            ]
            for part, own_of_part in zip((donated, kept), ours, strict=True)
        )
        args, kwargs = jax.tree.unflatten(structure, leaves)
        written, out = program(donated, kept, args, kwargs)
        written = tuple(
            tuple(x[None] if own else x for x, own in zip(arrays, route, strict=True))
            for arrays, route in zip(written, ours[0], strict=True)
        )
        flat, box["out"] = jax.tree.flatten(out)
        return written, [
            jnp.asarray(x)[None] if alone and not jnp.ndim(x) else x for x, alone in zip(flat, differ, strict=True)
        ]

    box: dict[str, Any] = {}

    def on_all(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten((args, kwargs))
        leaves = [_laid(copies, leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
        donated, kept = (
            [tuple(_laid(copies, *one) for one in zip(*both, strict=True)) for both in zip(part, own, strict=True)]
            for part, own in zip((donated, kept), laid, strict=True)
        )
        mapped = _on_each(
            copies,
            lambda donated, kept, leaves: on_one(donated, kept, leaves, structure),
            (laid[0], laid[1], list(specs)),
            (tuple(laid[0]), [each if alone else WHOLE for alone in differ]),
        )
        written, flat = mapped(donated, kept, leaves)
        return written, jax.tree.unflatten(box["out"], flat)

    return on_all


def _is_ours(plan: PlanTables, copies: PerDeviceArrays, route: Operand, slot: int) -> bool:
    """Whether what crosses in a slot has the leading axis; a buffer never has."""
    kind = list(plan.kinds)[route.kind]
    return plan.slots[route.kind][slot] in copies.of(kind)


def _laid(copies: PerDeviceArrays, array: Any, spec: Any) -> Any:
    """An array where `jax.shard_map` wants it: with axes of type `Explicit` it moves nothing by itself."""
    if AxisType.Explicit not in copies.mesh.axis_types or not jnp.ndim(array):
        return array
    lies = getattr(jax.typeof(array), "sharding", None)
    now = [_names(axes) for axes in lies.spec] if isinstance(lies, jax.NamedSharding) else []
    now += [()] * (jnp.ndim(array) - len(now))
    wanted = [_names(axes) for axes in spec] + [()] * (len(now) - len(spec))
    full = [(*new, *(name for name in old if name not in copies.axes)) for old, new in zip(now, wanted, strict=True)]
    return jax.reshard(array, jax.NamedSharding(copies.mesh, jax.P(*(axes or None for axes in full))))
