"""Graph definitions of trees, taken apart: which object holds each leaf, and the same graph without some leaves.

NNX's `GraphDef` lists the nodes of a graph in the order in which they are reached, and in a second list the attributes
of all of them, in the same order.  `read_tree` reads both together.  It answers for trees alone: where one object is
reached by two paths, removing it at one of them changes what is first at the other, and only NNX knows how.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

from flax import nnx

__all__ = ["Tree", "called", "is_tree", "read_tree"]

# Where a Pytree keeps which of its attributes are data.  NNX takes an attribute out of it when the attribute goes.
_DATA_ATTRIBUTES = "_pytree__nodes"


class _Entry(NamedTuple):
    """Where a leaf is written.

    Attributes:
      node: the index of its own node; None for a raw array, which has none.
      attribute: the index of the attribute that holds it.
      owner: the index of the node that has this attribute.
    """

    node: int | None
    attribute: int
    owner: int


def is_tree(graphdef: Any) -> bool:
    """Returns whether each object of a graph is reached by one path alone."""
    return "NodeRef" not in _type_names(graphdef.nodes)


def called(function: str, *arguments: str, graphdef: Any = None) -> str:
    """Returns a call of a function of Flax on a model, as code for a hint that works in the present mode.

    In tree mode Flax refuses a model with tied weights, unless it is asked for a graph.

    Args:
      function: the function, or the method.
      *arguments: its arguments.
      graphdef: the graph definition of the model; None if it is not known.
    """
    is_refused = not nnx.set_graph_mode.current_value() and (graphdef is None or not is_tree(graphdef))
    return f"{function}({', '.join([*arguments, *['graph=True'] * is_refused])})"


def _type_names(nodes: list[Any]) -> set[str]:
    return {cls.__name__ for cls in set(map(type, nodes))}


class Tree(NamedTuple):
    """A graph definition in which each object is reached by one path.

    Attributes:
      graphdef: the definition.
      entries: where each leaf is written, in the order of the leaves.
      data_attributes: by the index of a node, the index of the attribute that lists its data attributes.
    """

    graphdef: Any
    entries: tuple[_Entry, ...]
    data_attributes: dict[int, int]

    def owner(self, leaf: int) -> type:
        """Returns the type of the object that holds a leaf."""
        owner: type = self.graphdef.nodes[self.entries[leaf].owner].type
        return owner

    def without(self, leaves: Collection[int]) -> Any:
        """Returns the graph definition without these leaves, as NNX makes it of objects that never had them."""
        nodes, attributes = list(self.graphdef.nodes), list(self.graphdef.attributes)
        dropped = [self.entries[leaf] for leaf in leaves]
        for entry in dropped:
            # The object that held the leaf has one attribute less, and no longer lists it among its data.
            owner = nodes[entry.owner]
            nodes[entry.owner] = dataclasses.replace(owner, num_attributes=owner.num_attributes - 1)
            listed = self.data_attributes.get(entry.owner)
            if listed is not None:
                key, static = attributes[listed]
                name = attributes[entry.attribute][0]
                kept = {other: is_data for other, is_data in static.value.items() if other != name}
                attributes[listed] = key, dataclasses.replace(static, value=type(static.value)(kept))
        # Entries are removed only now, because they refer to nodes and attributes by index.
        without_nodes = {entry.node for entry in dropped}
        without_attributes = {entry.attribute for entry in dropped}
        return dataclasses.replace(
            self.graphdef,
            nodes=_renumbered([node for index, node in enumerate(nodes) if index not in without_nodes]),
            attributes=[each for index, each in enumerate(attributes) if index not in without_attributes],
            num_leaves=len(self.entries) - len(dropped),
        )


def _renumbered(nodes: list[Any]) -> list[Any]:
    """Numbers objects and Variables in their order, as NNX does; tuples and dicts have no number."""
    number = 0
    cls: Any
    for index, node in enumerate(nodes):
        if node.index is not None:
            if node.index != number:
                cls = type(node)
                names = _field_names(cls)
                nodes[index] = cls(*[number if name == "index" else getattr(node, name) for name in names])
            number += 1
    return nodes


@functools.cache
def _field_names(cls: Any) -> tuple[str, ...]:
    """Returns the names of a dataclass's fields, which `dataclasses.replace` works out again for each node."""
    return tuple(field.name for field in dataclasses.fields(cls))


def read_tree(graphdef: Any) -> Tree | None:
    """Reads the graph definition of a tree; None for a graph that is not a tree, or that is written otherwise."""
    if not _type_names(graphdef.nodes) <= {"NodeDef", "VariableDef"}:
        return None
    # One more than there are nodes: an attribute of the last node may look at the next.
    variables = [type(node).__name__ == "VariableDef" for node in graphdef.nodes] + [False]
    entries: list[_Entry] = []
    data_attributes: dict[int, int] = {}
    attributes = iter(enumerate(graphdef.attributes))
    # Each object that is being read: its index, and how many of its attributes are still to come.
    stack: list[list[int]] = []
    for index, node in enumerate(graphdef.nodes):
        if not variables[index]:
            stack.append([index, node.num_attributes])
        # Attributes follow their object up to the next one that holds a node; that node is then the next in its list.
        while stack:
            if not stack[-1][1]:
                stack.pop()
                continue
            owner = stack[-1]
            owner[1] -= 1
            attribute, (key, content) = next(attributes)
            kind = type(content).__name__
            if kind == "NodeAttr":
                if variables[index + 1]:
                    entries.append(_Entry(index + 1, attribute, owner[0]))
                break
            if kind == "LeafAttr":
                entries.append(_Entry(None, attribute, owner[0]))
            elif key == _DATA_ATTRIBUTES:
                data_attributes[owner[0]] = attribute
    # Another number of leaves: this version of NNX writes its definitions in another way.
    return Tree(graphdef, tuple(entries), data_attributes) if len(entries) == graphdef.num_leaves else None
