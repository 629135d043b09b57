"""Facts about a mesh that placements need: its axes, its devices, and their kinds of memory."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from statewise.errors import PlacementError

__all__ = ["axis_sizes", "check_devices", "describe_mesh", "memories"]


def axis_sizes(mesh: object) -> dict[str, int]:
    """Returns the axes of a mesh and their sizes.

    Raises:
      PlacementError: it is not a mesh.
    """
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise PlacementError(f"A {type(mesh).__name__} is not a mesh.", hint="mesh = jax.make_mesh((8,), ('data',))")
    return {str(name): int(size) for name, size in mesh.shape.items()}


def check_devices(mesh: object) -> None:
    """Checks that a mesh has devices to put arrays on."""
    axis_sizes(mesh)
    if not isinstance(mesh, jax.sharding.Mesh):
        raise PlacementError(
            "An abstract mesh has no devices to put arrays on.",
            hint="mesh = jax.make_mesh((8,), ('data',))  # plan.abstract(mesh) takes an abstract one",
        )


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """Returns a mesh in words: `(data=4, model=2)`."""
    return "(" + ", ".join(f"{name}={size}" for name, size in sizes.items()) + ")"


def memories(mesh: object) -> set[str] | None:
    """Returns the kinds of memory of a mesh's devices; None for an abstract mesh."""
    if not isinstance(mesh, jax.sharding.Mesh):
        return None
    return {memory.kind for memory in mesh.devices.flat[0].addressable_memories()}
