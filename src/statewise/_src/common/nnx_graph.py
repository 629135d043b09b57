"""Reading a model: its graph, its leaves, and the arrays in them; and building it again.

NNX flattens anything made of modules into a graph definition and a flat list of leaves, in an order of its
own.  `ModelGraph` is that, for one object or for several at once (a model, its optimizer, its metrics: what they
share is then found).  A leaf's *value* is mostly one array, but a Variable may hold None, a number, or a tuple
or dict of arrays; `arrays_of` and `value_of` go between a value and the arrays in it.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Leaf, Path, Ways
from statewise.errors import StructureError

__all__ = [
    "ArraySpec",
    "ModelError",
    "ModelGraph",
    "arrays_of",
    "is_abstract",
    "is_array",
    "is_deleted",
    "is_traced",
    "named",
    "numbered",
    "read_graph",
    "rebuild",
    "row_of",
    "spec_of",
    "value_of",
]

# The structure of a value that is one array: by far the most frequent, and told apart by identity.
ONE: Any = jax.tree.structure(0)


# How a model of references becomes one of plain Variables.
_TO_PLAIN = (
    "model = nnx.with_vars(model, hijax=False, ref=False, allow_duplicates=True)  # a copy, of plain Variables\n"
    "or, for all that is made from then on: nnx.var_defaults(hijax=False, ref=False)"
)


class ModelError(StructureError, TypeError):
    """What was given is no model: a class instead of an instance, a number, a module full of strings."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """How many elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """How many bytes; a PRNG key counts the words that it is made of."""
        if jnp.issubdtype(self.dtype, jax.dtypes.extended):
            key = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(self.shape, self.dtype))
            return int(key.size * key.dtype.itemsize)
        return self.size * int(self.dtype.itemsize)


class ModelGraph(NamedTuple):
    """One or several objects, flattened.

    Attributes:
      graphdef: NNX's graph definition; of a tuple where there are several objects.
      paths: each leaf's first path, prefixed by the object's name, or by its position where there are several.
      leaves: the live Variables, or raw arrays.
      several: whether there are several objects, or one with a name.
      names: the objects' names, in their order; empty where they have none.
    """

    graphdef: Any
    paths: tuple[Path, ...]
    leaves: tuple[Any, ...]
    several: bool
    names: tuple[str, ...] = ()

    def relative(self, path: Path) -> Path:
        """The path as filters see it: relative to its object; with the object's name, where it has one."""
        return path[1:] if self.several and not self.names else path

    def ways(self, *paths: Path) -> Path:
        """The paths of one leaf as filters see them: `relative`, and what `sw.Path` knows besides."""
        first, *others = map(self.relative, paths)
        if self.several and not self.names:
            return Ways.of((first, *others), paths)
        return Ways.of((first, *others)) if others else first

    def numbered(self, path: Path) -> Path:
        """The path as NNX has it in the tuple of the objects."""
        return numbered(path, self.names)


# None, and what JAX would warn about before it is refused as a leaf.
_BARE = (type(None), bool, int, float, complex, str, bytes, Iterator)


def named(path: Path, names: Sequence[str]) -> Path:
    """A path in the tuple of the objects, with the object's name in the place of its position."""
    return (names[path[0]], *path[1:]) if names and path else path  # type: ignore[call-overload]


def numbered(path: Path, names: Sequence[str]) -> Path:
    """The inverse of `named`: the path as NNX has it in the tuple of the objects."""
    return (names.index(path[0]), *path[1:]) if names and path else path


def read_graph(objects: Sequence[Any], names: Sequence[str] = ()) -> ModelGraph:
    """Flattens one object, or several together.

    Args:
      objects: the objects.
      names: their names, if they have any; paths then begin with them.

    Raises:
      ModelError: no object, a class, something without parts, or something that NNX cannot flatten.
    """
    if not objects:
        raise ModelError("There is no object to look at.", hint="kinds.plan(model)")
    places: Sequence[int | str] = names or range(len(objects))
    for place, thing in zip(places, objects, strict=True):
        _check_object(place, thing)
        if not isinstance(thing, nnx.Pytree) and type(thing).__module__.startswith("statewise._src."):
            raise ModelError(
                f"Object {place} is a {type(thing).__name__}, not a model.",
                hint="state['params'] gives a kind's arrays, sw.census(state) counts them, plan.build(state) a model",
            )
    several = len(objects) > 1 or bool(names)
    try:
        graphdef, flat = nnx.flatten(tuple(objects) if several else objects[0])
    except (TypeError, ValueError) as error:
        names = ", ".join(type(thing).__name__ for thing in objects)
        raise ModelError(
            f"NNX cannot flatten {names}: {error}", hint="nnx.split(model) shows the same; it says what is wrong"
        ) from error
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if len(path) == several and not isinstance(leaf, nnx.Variable):
            position: Any = path[0] if several else 0
            _check_bare(names[position] if names else position, objects[position])
    paths = tuple(named(path, names) for path in flat.paths) if names else tuple(flat.paths)
    _check_references(paths, flat.leaves)
    return ModelGraph(graphdef, paths, tuple(flat.leaves), several, tuple(names))


def _check_object(place: int | str, thing: Any) -> None:
    if isinstance(thing, type):
        raise ModelError(
            f"Object {place} is the class {thing.__name__}, not an instance of it.",
            hint=f"model = {thing.__name__}(..., rngs=nnx.Rngs(0))",
        )
    if is_array(thing) or isinstance(thing, _BARE):
        _check_bare(place, thing)


def _check_bare(place: int | str, thing: Any) -> None:
    raise ModelError(
        f"Object {place} is {type(thing).__name__}, which holds no leaves at paths.",
        hint="pass a module, an nnx.Optimizer, a metric, or a list or dict of them",
    )


def _check_references(paths: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Refuses what changes behind a state's back: references, and Variables of JAX's own (hijax)."""
    rows = [
        row_of(tuple(path), leaf, note=note)
        for path, leaf in zip(paths, leaves, strict=True)
        if (note := compat.reference(leaf))
    ]
    if rows:
        raise ModelError(
            "Variables that are references, or hijax Variables, cannot be planned, filtered or differentiated here.",
            leaves=rows,
            hint=_TO_PLAIN,
        )


def rebuild(graphdef: Any, values: list[Any], several: bool) -> tuple[Any, ...]:
    """Fresh objects from a graph definition and the leaves' values, in the order of the flat leaves."""
    made = nnx.unflatten(graphdef, values)
    return tuple(made) if several else (made,)


# Types that were found to be arrays of JAX.  Asking `isinstance` of a thousand leaves takes as long as flattening them;
# what a tracer stands for is not told by its type.
_jax_arrays: set[type] = set()


def _is_jax_array(value: Any) -> bool:
    if type(value) in _jax_arrays:
        return True
    if not isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        return False
    if not isinstance(value, jax.core.Tracer):
        _jax_arrays.add(type(value))
    return True


def is_array(value: Any) -> bool:
    """Whether a value is one array: JAX's or NumPy's, concrete, traced or abstract."""
    return _is_jax_array(value) or isinstance(value, (np.ndarray, np.generic))


def is_deleted(array: Any) -> bool:
    """Returns whether this was an array, and its buffer was donated."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.is_deleted()


def is_abstract(arrays: Iterable[Any]) -> bool:
    """Returns whether any of these is a shape and dtype only."""
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays)


def is_traced(arrays: Iterable[Any]) -> bool:
    """Returns whether any of these is being traced."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def raw_value(leaf: Any) -> Any:
    """What a leaf holds, without its hooks: a Variable's raw value, a raw array itself."""
    return leaf.get_raw_value() if compat.is_variable(leaf) else leaf


def arrays_of(value: Any) -> tuple[list[Any], Any]:
    """The arrays in a value, and its structure."""
    if is_array(value):
        return [value], ONE
    arrays, structure = jax.tree.flatten(value)
    return arrays, ONE if structure == ONE else structure


def value_of(arrays: Sequence[Any], structure: Any) -> Any:
    """The value that has these arrays: the inverse of `arrays_of`."""
    return arrays[0] if structure is ONE else jax.tree.unflatten(structure, arrays)


def spec_of(array: Any) -> ArraySpec | None:
    """The shape and dtype that JAX will see of an array or a Python number; None for anything else."""
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


def row_of(path: Path, leaf: Any, kind: str | None = None, note: str = "") -> Leaf:
    """Describes a leaf for a table or an error; it may hold anything."""
    arrays, structure = arrays_of(raw_value(leaf))
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
    one = specs[0] if single and specs else None
    return Leaf(
        path=path,
        kind=kind,
        type=type_,
        shape=one.shape if one else None,
        dtype=one.dtype if one else None,
        aliases=aliases,
        size=sum(spec.size for spec in specs),
        nbytes=sum(spec.nbytes for spec in specs),
        note=note,
    )
