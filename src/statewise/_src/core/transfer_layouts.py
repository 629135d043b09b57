"""The arrays of a transfer by names: cut, stacked and rearranged on the device, and placed as the target has them.

A row is one compiled program, on the devices of the source.  Its results already have the target's shardings where the
devices are the same, or as many; what goes elsewhere is then copied from device to device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Sharding

from statewise._src.common import compat
from statewise._src.core.cast import as_dtype
from statewise._src.core.transfer_names import NamedMove
from statewise._src.names.layout import Layout
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.per_device import spread
from statewise._src.sharding.device_put import moved, on_devices_of

__all__ = ["placed_by_names"]


def placed_by_names(move: NamedMove, arrays: Sequence[Any], shardings: Sequence[Any]) -> list[tuple[ArrayInfo, Any]]:
    """Returns the arrays of the target that a row makes; they share no memory with those of the source.

    Args:
      move: the move.
      arrays: the arrays of the source.
      shardings: the sharding of each array of the target; None where it is that of the source's devices.
    """
    targets = [target for target in move.targets if target is not None]
    wanted = tuple(target is not None for target in move.targets)
    dtypes = tuple(target.spec.dtype for target in targets)
    # By numbers, so that all layers share one program.
    layout = move.layout.numbered()
    function = functools.partial(_run, layout, move.backward, wanted, dtypes)
    if not arrays or any(isinstance(array, compat.Tracer) for array in arrays):
        # Of no arrays a stack of no layers is made.
        made = function(*arrays) if arrays else [jnp.zeros(to.spec.shape, to.spec.dtype) for to in targets]
        return [
            (to, _traced(array, to, sharding)) for to, array, sharding in zip(targets, made, shardings, strict=True)
        ]
    inputs = _together([jnp.asarray(array) for array in arrays], shardings)
    outs = tuple(_on_source(inputs[0].sharding, to, sharding) for to, sharding in zip(targets, shardings, strict=True))
    made = _program(layout, move.backward, wanted, dtypes, outs)(*inputs)
    return [(to, _finished(array, to, sharding)) for to, array, sharding in zip(targets, made, shardings, strict=True)]


def _run(layout: Layout, backward: bool, wanted: Sequence[bool], dtypes: Sequence[Any], *arrays: Any) -> list[Any]:
    if backward:
        # Each before they are joined: arrays of several dtypes would be promoted.
        cast = [as_dtype(array, dtypes[0]) for array in arrays]
        made = [layout.joined(dict(zip(layout.names, cast, strict=True)))]
    else:
        parts = layout.to_theirs(arrays[0]).values()
        kept = [part for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted]
        made = [as_dtype(part, dtype) for part, dtype in zip(kept, dtypes, strict=True)]
    # Without the copy JAX may return an argument itself, where nothing is rearranged.
    return [jnp.copy(array) for array in made]


@functools.lru_cache(maxsize=1024)
def _program(
    layout: Layout, backward: bool, wanted: tuple[bool, ...], dtypes: tuple[Any, ...], outs: tuple[Any, ...]
) -> Any:
    """Returns a compiled function that rearranges arrays on their devices."""
    return jax.jit(functools.partial(_run, layout, backward, wanted, dtypes), out_shardings=list(outs))


def _traced(array: Any, to: ArrayInfo, sharding: Any) -> Any:
    array = spread(array, to.devices, axis=to.axis) if to.devices else array
    return array if sharding is None else jax.device_put(array, sharding)


def _finished(array: jax.Array, to: ArrayInfo, sharding: Any) -> jax.Array:
    if to.devices:
        return spread(array, to.devices, sharding, to.axis)
    return array if sharding is None or array.sharding == sharding else moved(array, sharding)


def _together(arrays: list[jax.Array], shardings: Sequence[Any]) -> list[jax.Array]:
    """Returns arrays that one program can read: on the same devices, and on meshes without Explicit axes."""
    # A model may have each layer on a device of its own; its stack is then made where it is wanted.
    if len({frozenset(array.sharding.device_set) for array in arrays}) > 1:
        whole = _whole(next((each for each in shardings if each is not None), arrays[0].sharding))
        arrays = [moved(array, whole) for array in arrays]
    return [
        jax.device_put(array, usable) if (usable := _usable(array.sharding)) != array.sharding else array
        for array in arrays
    ]


def _whole(sharding: Sharding) -> Sharding:
    return jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding


def _usable(sharding: Any) -> Any:
    """Returns a sharding with which programs compute anything: in the devices' own memory, on Auto axes."""
    kind = next(iter(sharding.device_set)).default_memory().kind
    if sharding.memory_kind not in (None, kind):
        sharding = sharding.with_memory_kind(kind)
    if not isinstance(sharding, jax.NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return sharding
    # On Explicit axes the product of two that are split has no sharding of its own.
    axes = sharding.mesh.axis_names
    mesh = jax.sharding.Mesh(sharding.mesh.devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    return jax.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _on_source(source: Sharding, to: ArrayInfo, sharding: Any) -> Any:
    """Returns the sharding on the source's devices that is nearest to the one that is wanted; None if there is none."""
    if sharding is None or to.devices:
        return None
    if source.device_set == sharding.device_set:
        return _usable(sharding)
    return on_devices_of(source, _usable(sharding))
