"""The forms that Flax has for Variables: plain ones, hijax Variables (`hijax=True`), and references (`ref=True`).

A state holds arrays, and a step works on plain Variables, whatever form those of the model have: what is read from a
reference is its array, what is written goes into it.  A graph definition keeps the form of each Variable in its
metadata, so that `plan.build` makes a model of the forms that were planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat

__all__ = [
    "abstract_objects",
    "empty_leaves",
    "has_hijax",
    "hijax_brought_back",
    "hijax_set_aside",
    "of_plain_variables",
    "out_of_model",
    "read_reference",
    "store",
    "with_references",
    "without_reference_nodes",
    "write_reference",
]


def store(variable: Any, value: Any) -> None:
    """Writes a value to a Variable, without hooks: into its reference if it has one."""
    held = variable.get_raw_value()
    if isinstance(held, jax.Ref):
        if _is_stored_alike(held, value):
            write_reference(held, value)
            return
        value = _new_reference(value)  # an array elsewhere cannot be written into the reference's memory
    elif variable.ref and isinstance(value, (jax.Array, np.ndarray)):
        value = _new_reference(value)  # the Variable was abstract
    variable.set_raw_value(value)


def read_reference(reference: Any) -> Any:
    """Returns the array in a reference: a copy."""
    with compat.without_mesh():
        return reference[...]


def write_reference(reference: Any, value: Any) -> None:
    """Writes an array into a reference."""
    with compat.without_mesh():
        reference[...] = value


def _new_reference(value: Any) -> Any:
    with compat.without_mesh():
        return jax.new_ref(jnp.asarray(value))


def _is_stored_alike(held: Any, value: Any) -> bool:
    """Returns whether a value can be written into a reference: on the same devices, split in the same way."""
    if isinstance(held, compat.Tracer) or isinstance(value, compat.Tracer) or not isinstance(value, jax.Array):
        return True
    sharding = held.sharding
    return sharding == value.sharding or bool(sharding.is_equivalent_to(value.sharding, value.ndim))


def abstract_objects(make: Callable[[], Any]) -> Any:
    """Returns the objects that a function makes, without their arrays, as `nnx.eval_shape` does in its first mode.

    Other modes refuse tied weights, and no version of Flax returns references or hijax Variables from every trace.
    """
    with nnx.var_defaults(hijax=False, ref=False):
        return nnx.eval_shape(make, graph=True, graph_updates=True)


# --- graph definitions -------------------------------------------------------------------------------------------


def _is_variable(node: Any) -> bool:
    return type(node).__name__ == "VariableDef"


# Metadata of a Variable that was a hijax one, for the time in which it is not.
_WAS_HIJAX = "statewise_was_hijax"
_GONE = object()


def _map_metadata(graphdef: Any, changes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """Returns a graph definition with other metadata: changed entries, those that are `_GONE` left out.

    It is the given one if no Variable's metadata changes.
    """
    nodes, changed = [], False
    for node in graphdef.nodes:
        changes = changes_of(node.metadata) if _is_variable(node) else {}
        if changes:
            changed = True
            new = {name: value for name, value in {**node.metadata, **changes}.items() if value is not _GONE}
            node = dataclasses.replace(node, metadata=type(node.metadata)(new))
        nodes.append(node)
    return dataclasses.replace(graphdef, nodes=nodes) if changed else graphdef


def _with_metadata(graphdef: Any, **flags: bool) -> Any:
    """Returns a graph definition whose Variables have these flags in their metadata; itself if they have them."""
    return _map_metadata(
        graphdef, lambda old: flags if any(old.get(name, value) != value for name, value in flags.items()) else {}
    )


def of_plain_variables(graphdef: Any) -> Any:
    """Returns the graph definition of the same objects with plain Variables; itself if it is that already."""
    return _with_metadata(graphdef, hijax=False, ref=False)


def has_hijax(graphdef: Any) -> bool:
    """Returns whether some Variables of a graph definition are hijax ones."""
    return any(_is_variable(node) and node.metadata.get("hijax", False) for node in graphdef.nodes)


def out_of_model(pop: str, hijax: str | None, when: str) -> str:
    """Returns the code that takes leaves which a call has left out of a model, for a hint.

    Args:
      pop: the call of `nnx.pop` that does it for other Variables than hijax ones.
      hijax: the place of a hijax Variable among the leaves; None if there is none.
      when: when to do it, for the comment.
    """
    return f"{pop}  # {when}" if hijax is None else f"del {hijax}  # {when}; nnx.pop does not find hijax Variables"


def hijax_set_aside(graphdef: Any) -> Any:
    """Returns the graph definition with plain Variables instead of hijax ones, marked as such in their metadata."""
    return _map_metadata(graphdef, lambda old: {"hijax": False, _WAS_HIJAX: True} if old.get("hijax") else {})


def hijax_brought_back(graphdef: Any) -> Any:
    """Returns the graph definition with hijax Variables for those that `hijax_set_aside` marked."""
    return _map_metadata(graphdef, lambda old: {"hijax": True, _WAS_HIJAX: _GONE} if _WAS_HIJAX in old else {})


def without_reference_nodes(graphdef: Any) -> Any:
    """Returns a graph definition as NNX writes it for Variables of `ref=True` that hold arrays.

    NNX numbers references too, so that it would differ between a model and its abstract one.
    """
    nodes: list[Any] = []
    number_of: dict[int, int] = {}
    for node in graphdef.nodes:
        if type(node).__name__ == "NodeRef":
            nodes.append(dataclasses.replace(node, index=number_of[node.index]))
            continue
        changes: dict[str, Any] = {"array_refdef": None} if _is_variable(node) else {}
        if node.index is not None:
            changes["index"] = number_of[node.index] = len(number_of)
        nodes.append(dataclasses.replace(node, **changes))
    return dataclasses.replace(graphdef, nodes=nodes)


def empty_leaves(graphdef: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the path and an empty leaf for each position of a graph definition: a Variable, or a raw array.

    The Variables are never hijax ones, but have all other metadata.
    """
    # Each leaf holds its own position: NNX's definitions of graphs and of trees list the same leaves differently.
    # NNX does not count None as a leaf, hence arrays.
    positions = [np.asarray(position) for position in range(graphdef.num_leaves)]
    _, flat = nnx.flatten(nnx.unflatten(_with_metadata(graphdef, hijax=False), positions), graph=True)
    held = [leaf.get_raw_value() if compat.is_variable(leaf) else leaf for leaf in flat.leaves]
    for number in sorted(range(len(held)), key=lambda number: int(held[number])):
        yield tuple(flat.paths[number]), flat.leaves[number]


def with_references(graphdef: Any, values: Sequence[Any]) -> list[Any]:
    """Returns values for the leaves of a graph definition, arrays of Variables with `ref=True` in new references."""
    if not any(_is_variable(node) and node.metadata.get("ref", False) for node in graphdef.nodes):
        return list(values)
    leaves = [leaf for _, leaf in empty_leaves(graphdef)]
    return [
        _new_reference(value)
        if compat.is_variable(leaf) and leaf.ref and isinstance(value, (jax.Array, np.ndarray))
        else value
        for leaf, value in zip(leaves, values, strict=True)
    ]
