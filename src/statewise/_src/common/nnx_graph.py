"""Reads a model (its graph, its leaves, and the arrays in them) and rebuilds it.

NNX flattens anything made of modules into a graph definition and a flat list of leaves, in an order of its own.
`ModelGraph` contains both, for one object or for several together (a model, its optimizer, its metrics), so that what
they share is found.  A leaf's *value* is usually one array, but a Variable may hold None, a number, or a tuple or dict
of arrays; `arrays_of` and `value_of` convert between a value and the arrays in it.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Leaf, Path, Ways
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import (
    of_plain_variables,
    read_reference,
    with_references,
    without_reference_nodes,
)
from statewise.errors import StructureError

__all__ = [
    "ONE",
    "ArraySpec",
    "ModelError",
    "ModelGraph",
    "any_is_deleted",
    "are_concrete",
    "arrays_of",
    "check_plain",
    "held_value",
    "is_abstract",
    "is_array",
    "is_concrete",
    "is_deleted",
    "is_object",
    "is_traced",
    "made_plain",
    "make_leaf",
    "named",
    "numbered",
    "raw_value",
    "read_graph",
    "rebuild",
    "row_of",
    "spec_of",
    "specs_of",
    "value_in",
    "value_of",
]

# The structure of a value that is one array: by far the most frequent, and recognized by identity.
ONE: Any = jax.tree.structure(0)

# Objects without parts: None, and those that JAX would warn about before they are rejected as leaves.
_BARE = (type(None), bool, int, float, complex, str, bytes, Iterator)

# How the array in a reference becomes a leaf.
_IN_VARIABLE = "self.name = nnx.Variable(reference[...])  # with ref=True if it is to stay a reference"


class ModelError(StructureError, TypeError):
    """An argument that is not a model: a class instead of an instance, a number, a module full of strings."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes; for PRNG keys, those of the words that they consist of."""
        if jnp.issubdtype(self.dtype, jax.dtypes.extended):
            key = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(self.shape, self.dtype))
            return int(key.size * key.dtype.itemsize)
        return self.size * int(self.dtype.itemsize)


class ModelGraph(NamedTuple):
    """One or several objects, flattened.

    Attributes:
      graphdef: NNX's graph definition; that of a tuple if there are several objects.  Variables that are references
        are written as they would be with arrays.
      paths: each leaf's first path, prefixed by the object's name, or by its position if there are several.
      leaves: the live Variables, or raw arrays.
      several: whether there are several objects, or one with a name.
      names: the objects' names, in their order; empty if they have none.
    """

    graphdef: Any
    paths: tuple[Path, ...]
    leaves: tuple[Any, ...]
    several: bool
    names: tuple[str, ...] = ()

    def relative(self, path: Path) -> Path:
        """Returns a path as filters receive it: within its object, or with the object's name if it has one."""
        return path[1:] if self.several and not self.names else path

    def ways(self, *paths: Path) -> Path:
        """Returns all paths of one leaf as filters receive them: the first as the path, all for `sw.Path` to read."""
        relative = tuple(map(self.relative, paths))
        if self.several and not self.names:
            return Ways.of(relative, paths)
        return Ways.of(relative) if len(relative) > 1 else relative[0]


def named(path: Path, names: Sequence[str]) -> Path:
    """Returns a path in the tuple of the objects with the object's name instead of its position."""
    return (names[path[0]], *path[1:]) if names and path else path  # type: ignore[call-overload]


def numbered(path: Path, names: Sequence[str]) -> Path:
    """Returns the path that NNX has in the tuple of the objects: the inverse of `named`."""
    return (names.index(path[0]), *path[1:]) if names and path else path


def read_graph(objects: Sequence[Any], names: Sequence[str] = ()) -> ModelGraph:
    """Flattens one object, or several together.

    Args:
      objects: the objects.
      names: their names, if they have any; paths then begin with them.

    Raises:
      ModelError: there is no object, or one is a class, has no parts, or cannot be flattened by NNX.
    """
    if not objects:
        raise ModelError("There is no object to look at.", hint="kinds.plan(model)")
    labels: Sequence[int | str] = names or range(len(objects))
    for label, given in zip(labels, objects, strict=True):
        _check_object(label, given)
    several = len(objects) > 1 or bool(names)
    try:
        # A graph, whatever Flax's default mode is: in tree mode it refuses tied weights.
        graphdef, flat = nnx.flatten(tuple(objects) if several else objects[0], graph=True)
    except (TypeError, ValueError) as error:
        types = ", ".join(type(given).__name__ for given in objects)
        raise ModelError(
            f"NNX cannot flatten {types}: {error}",
            hint="nnx.split(model, graph=True) shows the same; it says what is wrong",
        ) from error
    # An object that NNX takes for a leaf, though it is not a Variable: a function, say.  A single one is the only leaf.
    count = None if several else 1
    for path, leaf in zip(flat.paths[:count], flat.leaves[:count], strict=True):
        if len(path) == several and not isinstance(leaf, nnx.Variable):
            position: Any = path[0] if several else 0
            raise _bare(labels[position], objects[position])
    paths = tuple([named(path, names) for path in flat.paths]) if names else tuple(flat.paths)
    forms = list(map(compat.reference, flat.leaves))
    if any(forms):
        _check_references(graphdef, paths, flat.leaves)
        graphdef = without_reference_nodes(graphdef)
    return ModelGraph(graphdef, paths, tuple(flat.leaves), several, tuple(names))


def _check_object(label: int | str, given: Any) -> None:
    if isinstance(given, type):
        raise ModelError(
            f"Object {label} is the class {given.__name__}, not an instance of it.",
            hint=f"model = {given.__name__}(..., rngs=nnx.Rngs(0))",
        )
    if is_array(given) or isinstance(given, _BARE):
        raise _bare(label, given)
    if not isinstance(given, nnx.Pytree) and type(given).__module__.startswith("statewise._src."):
        raise ModelError(
            f"Object {label} is a {type(given).__name__}, not a model.",
            hint="state['params'] gives a kind's arrays, sw.census(state) counts them, plan.build(state) a model",
        )


def _bare(label: int | str, given: object) -> ModelError:
    return ModelError(
        f"Object {label} is {type(given).__name__}, which holds no leaves at paths.",
        hint="pass a module, an nnx.Optimizer, a metric, or a list or dict of them",
    )


def _check_references(graphdef: Any, paths: Sequence[Path], leaves: Sequence[Any]) -> None:
    """Checks that each reference is that of one Variable."""
    bare = Problems(
        row_of(tuple(path), leaf, note=compat.reference(leaf))
        for path, leaf in zip(paths, leaves, strict=True)
        if not compat.is_variable(leaf) and compat.reference(leaf)
    )
    bare.raise_as(ModelError, "A reference outside of a Variable cannot be planned or filtered here.", _IN_VARIABLE)
    if any(type(getattr(node, "array_refdef", None)).__name__ == "NodeRef" for node in graphdef.nodes):
        # NNX lists such a leaf once, and does not say which other Variable has its reference.
        raise ModelError(
            "Two Variables of the model share one reference, so that they are one leaf in all but their paths.",
            hint="assign the same Variable to both: self.other = self.weight",
        )


def check_plain(graph: ModelGraph, by: str) -> None:
    """Checks that all Variables are plain ones, after a function that is being traced; `by` is the function's name."""
    notes = list(map(compat.reference, graph.leaves))
    if any(notes):
        problems = Problems(
            row_of(path, leaf, note=note)
            for path, leaf, note in zip(graph.paths, graph.leaves, notes, strict=True)
            if note
        )
        problems.raise_as(
            ModelError,
            f"{by} makes Variables that are references, or hijax Variables; where it is traced, all are plain ones.",
            made_plain(leaf.type for leaf in problems.leaves),
        )


def made_plain(types: Iterable[type]) -> str:
    """Returns the hint to make Variables of these types as plain ones."""
    names = dict.fromkeys("nnx." * (getattr(nnx, cls.__name__, None) is cls) + cls.__name__ for cls in types)
    calls = ", ".join(f"{name}(value)" for name in names)
    return f"leave hijax=True and ref=True out, of nnx.var_defaults as well: {calls}"


def rebuild(graphdef: Any, values: Sequence[Any], several: bool, *, plain: bool = True) -> tuple[Any, ...]:
    """Returns new objects, from a graph definition and the leaves' values in the order of the flat leaves.

    Args:
      graphdef: the graph definition.
      values: the values.
      several: whether the graph definition is of a tuple of objects.
      plain: whether Variables become plain ones, which functions can write in every trace, or keep their forms.
    """
    if plain:
        objects = nnx.unflatten(of_plain_variables(graphdef), list(values))
    else:
        objects = nnx.unflatten(graphdef, with_references(graphdef, values))
    return tuple(objects) if several else (objects,)


# Types that are known to be JAX arrays: `isinstance` of a thousand leaves takes as long as flattening them.  A tracer's
# type does not say whether it stands for an array.
_jax_arrays: set[type] = set()


def _is_jax_array(value: Any) -> bool:
    if type(value) in _jax_arrays:
        return True
    if not isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        return False
    if not isinstance(value, compat.Tracer):
        _jax_arrays.add(type(value))
    return True


def is_array(value: Any) -> bool:
    """Returns whether a value is one array: JAX's or NumPy's, concrete, traced or abstract."""
    return _is_jax_array(value) or isinstance(value, (np.ndarray, np.generic))


def is_object(value: object) -> bool:
    """Returns whether a value is an NNX object: a module, a metric, random streams, a Variable; not an `nnx.State`."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def is_deleted(array: Any) -> bool:
    """Returns whether this is a JAX array whose buffer was donated."""
    return is_concrete(array) and array.is_deleted()


def is_concrete(array: Any) -> bool:
    """Returns whether this is a JAX array with values: neither NumPy's nor traced nor a shape; it may be deleted."""
    return isinstance(array, jax.Array) and not isinstance(array, compat.Tracer)


def are_concrete(arrays: Iterable[Any]) -> bool:
    """Returns whether all of these are JAX arrays with values; they may be deleted."""
    # A type says so for all arrays of it, and there are few types.
    return all(map(is_concrete, {type(array): array for array in arrays}.values()))


def any_is_deleted(arrays: Sequence[Any]) -> bool:
    """Returns whether any of these is a JAX array whose buffer was donated."""
    if are_concrete(arrays):
        return any(array.is_deleted() for array in arrays)
    return any(map(is_deleted, arrays))


def is_abstract(arrays: Iterable[Any]) -> bool:
    """Returns whether any of these is a shape and dtype only."""
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays)


def is_traced(arrays: Iterable[Any]) -> bool:
    """Returns whether any of these is being traced."""
    return any(isinstance(array, compat.Tracer) for array in arrays)


def held_value(leaf: Any) -> Any:
    """Returns what a leaf holds, without hooks: a Variable's raw value, perhaps a reference; a raw array itself."""
    return leaf.get_raw_value() if compat.is_variable(leaf) else leaf


def raw_value(leaf: Any) -> Any:
    """Returns a leaf's value, without hooks: what a Variable or its reference holds, a raw array itself."""
    return value_in(leaf) if compat.is_variable(leaf) else leaf


def value_in(variable: Any) -> Any:
    """Returns what a Variable or its reference holds, without hooks."""
    value = variable.get_raw_value()
    if type(value) in _jax_arrays or not isinstance(value, jax.Ref):
        return value
    return read_reference(value)


def arrays_of(value: Any) -> tuple[list[Any], Any]:
    """Returns the arrays in a value, and its structure."""
    if is_array(value):
        return [value], ONE
    arrays, structure = jax.tree.flatten(value)
    return arrays, ONE if structure == ONE else structure


def value_of(arrays: Sequence[Any], structure: Any) -> Any:
    """Returns the value that contains these arrays: the inverse of `arrays_of`."""
    return arrays[0] if structure is ONE else jax.tree.unflatten(structure, arrays)


def spec_of(array: Any) -> ArraySpec | None:
    """Returns the shape and dtype that an array or a Python number has in JAX; None for anything else."""
    if _is_jax_array(array):
        return ArraySpec(array.shape, array.dtype)
    if isinstance(array, (np.ndarray, np.generic)):
        if array.dtype.hasobject or array.dtype.kind in "USMm":
            return None
        return ArraySpec(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
    if isinstance(array, (bool, int, float, complex)):
        return ArraySpec((), jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(array)))
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        return ArraySpec(tuple(array.shape), array.dtype)
    return None


def specs_of(value: Any) -> tuple[tuple[ArraySpec | type, ...], Any]:
    """Returns the shape and dtype of each array in a value, or the type of anything else; and its structure."""
    if type(value) in _jax_arrays:  # nearly every value
        return (ArraySpec(value.shape, value.dtype),), ONE
    arrays, structure = arrays_of(value)
    return tuple([spec_of(array) or type(array) for array in arrays]), structure


def row_of(path: Path, leaf: Any, kind: str | None = None, note: str = "") -> Leaf:
    """Describes a leaf, which may hold anything, for a table or an error."""
    arrays, structure = arrays_of(held_value(leaf))  # a reference has a shape and a dtype too
    specs = [spec for spec in map(spec_of, arrays) if spec is not None]
    return make_leaf(path, compat.variable_type(leaf), specs, structure is ONE, kind, note=note)


def make_leaf(
    path: Path,
    type_: type,
    specs: Sequence[ArraySpec],
    single: bool,
    kind: str | None,
    aliases: tuple[Path, ...] = (),
    note: str = "",
) -> Leaf:
    """Describes a leaf by the shapes and dtypes of its arrays."""
    shape, dtype = specs[0] if single and specs else (None, None)
    size = sum(spec.size for spec in specs)
    nbytes = sum(spec.nbytes for spec in specs)
    return Leaf(path, kind, type_, shape, dtype, aliases, size, nbytes, note)
