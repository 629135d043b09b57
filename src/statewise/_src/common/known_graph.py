"""Graphs that were flattened before: the leaves of equal objects, found without flattening them again.

NNX's `flatten` sorts, names and describes everything that it meets, which is most of the time of planning a model and
of taking a state from it.  `KnownGraph` is a graph definition in the form of lists.  Reading objects with it collects
what they hold into lists of the same order, and compares each list at once.  It answers with the leaves, or None: the
objects differ, or the graph has something that is not read here (references, hijax Variables, types of users with
children of their own).  NNX then flattens them, and finds what differs.

What NNX makes of an object depends on its class and its `vars` alone.  All of them are compared, so that objects which
are read here have the graph definition that `same_graph` finds equal.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ONE, ArraySpec, specs_of

__all__ = ["KnownGraph", "known_graph", "values_if_fit"]


class _Step(NamedTuple):
    """How the children of one object are read: all with one call, sorted by what they are.

    Attributes:
      type: the type of the object.
      structure: the structure of one level of a pytree of a user's type or a named tuple, or `nnx.State`; else None.
      size: the number of attributes or items.
      get: returns the static ones, then objects, Variables, raw arrays, what was reached before, and pytrees without
        children, from a mapping or a sequence of all of them.
      ends: where each of these groups ends.
    """

    type: Any
    structure: Any
    size: int
    get: Callable[[Any], Any]
    ends: tuple[int, ...]


class _Found(NamedTuple):
    """What objects hold, in the order in which it is met."""

    nodes: list[Any]
    statics: list[Any]
    variables: list[Any]
    arrays: list[Any]
    again: list[Any]
    bare: list[Any]


class KnownGraph(NamedTuple):
    """A graph definition, as it is compared with objects.

    Attributes:
      steps: how each object is read, in the order in which they are met, level by level.
      statics: the static attributes of all of them.
      static_types: their types, for `1`, `1.0` and `True` are equal.
      variable_types: the types of the Variables.
      metadata: the metadata of the Variables.
      shared: the positions of the objects that NNX tells apart by identity; all Variables follow them.
      again: the position among these, for each object or Variable that is reached once more.
      bare: the structure of all pytrees without children.
      order: for each leaf, its position among Variables and, after them, raw arrays.
    """

    steps: list[_Step]
    statics: list[Any]
    static_types: list[type]
    variable_types: list[Any]
    metadata: list[dict[str, Any]]
    shared: list[int]
    again: list[int]
    bare: Any
    order: list[int]

    def leaves_of(self, root: Any) -> list[Any] | None:
        """Returns the leaves of an object that has this graph, in NNX's order; None if it may have another one."""
        # Comparing what is not alike may fail in any of these ways; NNX then finds out how the objects differ.
        try:
            found = self._read(root)
            return self._leaves_if_same(found) if found is not None else None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None

    def leaves_with(self, values: Sequence[Any]) -> list[Any]:
        """Returns new leaves that hold these values, in NNX's order, for `nnx.unflatten`.

        NNX makes Variables in the same way, if it is given values, but first copies the metadata item by item.
        """
        leaves = list(values)
        for number, position in enumerate(self.order):
            if position < len(self.variable_types):  # raw arrays follow the Variables
                cls, metadata = self.variable_types[position], dict(self.metadata[position])
                leaves[number] = cls.from_metadata(leaves[number], metadata)
        return leaves

    def _read(self, root: Any) -> _Found | None:
        found = _Found([root], [], [], [], [], [])
        nodes, statics, variables, arrays, again, bare = found
        for node, (cls, structure, size, get, ends) in zip(nodes, self.steps, strict=False):  # `nodes` grows
            if structure is not None:
                held = _items(node, structure)
            elif type(node) is cls:
                held = node if cls in _CONTAINERS else vars(node)
            else:
                return None
            if len(held) != size or (type(held) is dict and held is node and not _has_plain_keys(held)):
                return None
            values = get(held)
            statics += values[: ends[0]]
            nodes += values[ends[0] : ends[1]]
            variables += values[ends[1] : ends[2]]
            bare += values[ends[4] :]
            if ends[2] != ends[4]:
                arrays += values[ends[2] : ends[3]]
                again += values[ends[3] : ends[4]]
        return found

    def _leaves_if_same(self, found: _Found) -> list[Any] | None:
        variables = found.variables
        same = (
            list(map(type, variables)) == self.variable_types
            and list(map(type, found.statics)) == self.static_types
            and jax.tree.structure(tuple(found.bare)) == self.bare
            and found.statics == self.statics
            and [variable.get_metadata() for variable in variables] == self.metadata
        )
        shared = [found.nodes[position] for position in self.shared] + variables
        if not same or len(set(map(id, shared))) != len(shared):
            return None
        # To NNX what only has a shape is a static value, outside of a Variable.
        if not all(isinstance(array, jax.Array | np.ndarray) for array in found.arrays):
            return None
        if not all(one is shared[position] for one, position in zip(found.again, self.again, strict=True)):
            return None
        leaves = variables + found.arrays
        return [leaves[position] for position in self.order]


_CONTAINERS = (list, tuple, dict)


def _items(node: Any, structure: Any) -> dict[Any, Any]:
    """Returns the children of a pytree by NNX's keys; none if it is of another structure."""
    if isinstance(structure, type):
        items = dict(node.raw_mapping) if compat.is_nnx_state(node) else {}
        return items if type(node) is structure and _has_plain_keys(items) else {}
    keyed, found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    same: Any = found
    items = {_key_of(keys[0]): child for keys, child in keyed if same == structure}
    return items if _has_plain_keys(items) else {}


def _has_plain_keys(items: Mapping[Any, Any]) -> bool:
    """Returns whether each key is equal to keys of its own type alone; `0`, `0.0` and `False` are equal."""
    return set(map(type, items)) <= {str, int}


def _key_of(key: Any) -> Any:
    """Returns NNX's key for a key of JAX."""
    for name in ("idx", "key", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return None


def values_if_fit(leaves: Sequence[Any], specs: Sequence[tuple[tuple[ArraySpec, ...], Any]]) -> list[Any] | None:
    """Returns what leaves hold, if these are the shapes and dtypes of the arrays in it, and its structures; else None.

    The answer is also None for a Variable that holds a reference: what is in it would have to be read.
    """
    values = [leaf.get_raw_value() if compat.is_variable(leaf) else leaf for leaf in leaves]
    for value, (expected, structure) in zip(values, specs, strict=True):
        if structure is ONE and isinstance(value, jax.Array):
            # By far the most; the same as below, without making a spec.
            if value.shape != expected[0].shape or value.dtype != expected[0].dtype:
                return None
        elif isinstance(value, jax.Ref) or specs_of(value) != (expected, structure):
            return None
    return values


# --- from a graph definition ---------------------------------------------------------------------------------------

# What the children of an object are, in the order in which `_Step.get` returns them.
_GROUPS = _STATIC, _NODE, _VARIABLE, _ARRAY, _AGAIN, _BARE = range(6)


class _Node(NamedTuple):
    """One object of a graph definition.

    Attributes:
      definition: its own part of the definition.
      keys: NNX's keys of its children, by what they are.
      contents: static values; objects; Variables, each with the number of its leaf; the numbers of raw arrays; the
        numbers of objects that were reached before; the structures of pytrees without children.
    """

    definition: Any
    keys: tuple[list[Any], ...]
    contents: tuple[list[Any], ...]


class _UnknownFormError(Exception):
    """Raised for a graph definition with something that is not read here."""


def known_graph(graphdef: Any) -> KnownGraph | None:
    """Returns a graph definition as it is compared with objects; None if it has something that is not read here."""
    try:
        return _in_lists(_root_of(graphdef), graphdef.num_leaves)
    except _UnknownFormError:
        return None


def _root_of(graphdef: Any) -> _Node:
    """Returns a graph definition as a tree: its attributes are listed in the order in which NNX reaches them."""
    definitions, attributes = iter(graphdef.nodes), iter(graphdef.attributes)
    group_of = _Groups()
    first = next(definitions)
    if group_of[first] != _NODE:
        raise _UnknownFormError
    root = _new(first)
    leaf = 0
    stack = [(root, first.num_attributes)]
    while stack:
        node, missing = stack.pop()
        _, keys, contents = node
        while missing:
            missing -= 1
            key, attribute = next(attributes)
            child: Any
            group = group_of[attribute]
            if group == _STATIC:
                child = attribute.value
            elif group == _ARRAY:
                child, leaf = leaf, leaf + 1
            else:  # the attribute says that a definition follows
                definition = next(definitions)
                group = group_of[definition]
                if group == _NODE:
                    child = _new(definition)
                    stack += [(node, missing), (child, definition.num_attributes)]
                    missing = 0
                elif group == _VARIABLE:
                    child, leaf = (definition, leaf), leaf + 1
                else:
                    child = definition.index if group == _AGAIN else _structure_of(definition)
            keys[group].append(key)
            contents[group].append(child)
    return root


def _new(definition: Any) -> _Node:
    return _Node(definition, tuple([[] for _ in _GROUPS]), tuple([[] for _ in _GROUPS]))


class _Groups:
    """Says what an attribute or a definition in a graph definition is of; its answers are kept by type."""

    def __init__(self) -> None:
        self._of_types: dict[type, int] = {}
        self._of_forms: dict[type, str] = {}

    def __getitem__(self, definition: Any) -> int:
        form = type(definition).__name__
        if form in _FORMS:
            return _FORMS[form]
        if form == "VariableDef" and definition.array_refdef is None:
            return _VARIABLE
        if form == "NodeDef":
            group = self._of_types.get(definition.type)
            if group is None:
                group = self._of_types[definition.type] = _group_of(definition)
            return group if not definition.num_attributes else _NODE
        raise _UnknownFormError


_FORMS = {"Static": _STATIC, "LeafAttr": _ARRAY, "NodeAttr": -1, "NodeRef": _AGAIN}


def _group_of(definition: Any) -> int:
    """Returns `_NODE` for what is read item by item, `_BARE` for what may have no children and is read as JAX does."""
    if definition.type in (*_CONTAINERS, *compat.state_types()) or issubclass(definition.type, nnx.Pytree):
        return _NODE
    if _structure_of(definition) is None:
        raise _UnknownFormError
    return _BARE


def _structure_of(definition: Any) -> Any:
    """Returns the structure, of one level, of a pytree that NNX takes apart as JAX does, or `nnx.State`; else None."""
    if definition.type is not dict and definition.type in compat.state_types():
        return definition.type
    return _NONE if definition.type is type(None) else getattr(definition.metadata, "treedef", None)


_NONE: Any = jax.tree.structure(None)


def _in_lists(root: _Node, leaf_count: int) -> KnownGraph:
    """Returns the lists that objects are compared with."""
    nodes = [root]
    for node in nodes:
        nodes += node.contents[_NODE]
    steps: dict[Any, _Step] = {}  # models repeat their layers, which are read alike
    statics, _, variables, arrays, again, bare = (
        [child for node in nodes for child in node.contents[group]] for group in _GROUPS
    )
    numbers = [number for _, number in variables] + arrays
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    if [numbers[position] for position in order] != list(range(leaf_count)):
        raise _UnknownFormError  # this version of NNX writes its definitions in another way
    metadata = [dict(definition.metadata) for definition, _ in variables]
    if any(each.get("hijax") or each.get("ref") for each in metadata):
        raise _UnknownFormError
    shared = [position for position, node in enumerate(nodes) if node.definition.index is not None]
    indices = [nodes[position].definition.index for position in shared]
    indices += [definition.index for definition, _ in variables]
    position_of = {index: position for position, index in enumerate(indices)}
    return KnownGraph(
        steps=[_step_of(node, steps) for node in nodes],
        statics=statics,
        static_types=list(map(type, statics)),
        variable_types=[definition.type for definition, _ in variables],
        metadata=metadata,
        shared=shared,
        again=[position_of[index] for index in again],
        bare=jax.tree_util.treedef_tuple(bare),
        order=order,
    )


def _step_of(node: _Node, steps: dict[Any, _Step]) -> _Step:
    """Returns how an object is read."""
    cls = node.definition.type
    keys = tuple(itertools.chain.from_iterable(node.keys))
    ends = tuple(itertools.accumulate(map(len, node.keys)))
    structure = None
    if cls not in _CONTAINERS and not issubclass(cls, nnx.Pytree):
        structure = _structure_of(node.definition)
    known = steps.get((cls, keys, ends)) if structure is None else None
    if known is not None:
        return known
    if not _has_plain_keys(dict.fromkeys(keys)):
        raise _UnknownFormError
    # `vars` of an nnx.List has strings.
    names = tuple(map(str, keys)) if structure is None and cls not in _CONTAINERS else keys
    step = steps[cls, keys, ends] = _Step(cls, structure, len(keys), _getter(names), ends)
    return step


def _getter(keys: tuple[Any, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """Returns a function that returns the items at some keys."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda items: tuple([items[key] for key in keys])
