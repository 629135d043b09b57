"""Meshes with axes of type `Explicit`, the default of the newest `jax.make_mesh`.

On such axes an array's sharding is part of its type, and JAX does not guess: if the sharding of a result is ambiguous
(a product over a split axis, for example), the function has to name it.  Placing, saving and moving arrays need none of
that, and work with them as with `Auto` axes.  A model that was not written for them may not; JAX's error then names
neither the mesh nor the way out, so it is explained here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from statewise.errors import PlacementError, StatewiseError

__all__ = [
    "as_it_came",
    "explained",
    "explicit_axes",
    "explicit_sharding",
    "is_split",
    "sharding_of_type",
    "spec_entries",
]


def explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the names of a mesh's Explicit axes."""
    return tuple(
        str(name) for name, type_ in zip(mesh.axis_names, mesh.axis_types, strict=True) if type_ is AxisType.Explicit
    )


def explicit_sharding(array: object) -> jax.NamedSharding | None:
    """Returns the sharding in the type of an array or tracer; None if its type does not have one."""
    try:
        return sharding_of_type(jax.typeof(array))
    except TypeError:  # not an array
        return None


def is_split(array: object) -> bool:
    """Returns whether an array's type has a sharding that splits it: such arrays cannot be joined with others."""
    sharding = explicit_sharding(array)
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def sharding_of_type(type_: object) -> jax.NamedSharding | None:
    """Returns the sharding in a type, as jaxprs have them; None if it does not have one."""
    sharding = getattr(type_, "sharding", None)
    return sharding if isinstance(sharding, jax.NamedSharding) and explicit_axes(sharding.mesh) else None


def spec_entries(sharding: jax.NamedSharding, rank: int) -> list[Any]:
    """Returns the entries of a sharding's spec, one for each dimension: a spec may leave out trailing ones."""
    return [*sharding.spec, *[None] * (rank - len(sharding.spec))]


def as_it_came(new: Any, old: Any) -> Any:
    """Reshards a new value as the old one by its type: a written array has the type of the one that it replaces."""
    sharding = explicit_sharding(old)
    if sharding is None or explicit_sharding(new) == sharding:
        return new
    return jax.reshard(new, sharding)


@contextlib.contextmanager
def explained(name: str, *given: object) -> Iterator[None]:
    """Explains errors of JAX that are about Explicit axes.

    Args:
      name: the name of the function.
      *given: pytrees of arrays, and meshes, that may have such axes.

    Raises:
      PlacementError: JAX cannot determine the sharding of a result on Explicit axes.
    """
    try:
        yield
    except StatewiseError:
        raise
    except Exception as error:  # the class that JAX raises here is not public
        mesh = _explicit_mesh(given)
        if mesh is None or not _is_about_sharding(error, explicit_axes(mesh)):
            raise
        axes = explicit_axes(mesh)
        listed = " and ".join(map(repr, axes))
        # The first line of JAX's error is the fact; what follows shows its own call stack.
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        sizes = tuple(int(size) for size in mesh.shape.values())
        raise PlacementError(
            f"{name} cannot be traced: the mesh ax{'is' if len(axes) == 1 else 'es'} {listed} "
            f"{'is' if len(axes) == 1 else 'are'} Explicit, and JAX needs the sharding of a result: "
            f"{text.rstrip('.')}.",
            hint=f"mesh = jax.make_mesh({sizes}, {tuple(mesh.axis_names)}, "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(sizes)})\n"
            "or, where JAX needs it: jnp.dot(x, w, out_sharding=jax.P(...)), jax.reshard(x, jax.P(...))",
        ) from error


def _explicit_mesh(given: object) -> Mesh | AbstractMesh | None:
    """Returns the first mesh with Explicit axes: one of those given, otherwise the current mesh."""
    for leaf in jax.tree.leaves(given, is_leaf=lambda node: isinstance(node, Mesh | AbstractMesh)):
        sharding = getattr(leaf, "sharding", None) or explicit_sharding(leaf)
        mesh = leaf if isinstance(leaf, Mesh | AbstractMesh) else getattr(sharding, "mesh", None)
        if isinstance(mesh, Mesh | AbstractMesh) and explicit_axes(mesh):
            return mesh
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if explicit_axes(mesh) else None


def _is_about_sharding(error: Exception, axes: tuple[str, ...]) -> bool:
    # A loop whose carry changes its type is reported by the types: float32[16@model].
    split = re.search(r"@\(?['\"]?(" + "|".join(map(re.escape, axes)) + r")\b", str(error))
    named = any(word in str(error) for word in ("out_sharding", "Explicit"))
    return type(error).__name__ == "ShardingTypeError" or bool(split) or named
