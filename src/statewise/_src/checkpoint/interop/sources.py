"""What arrays can be read from: a `Source`; and nested dicts of arrays, such as Linen's variables, as one.

A source is a list of entries (name, path, shape, dtype), made from metadata alone, and a function that reads arrays by
name, as NumPy arrays, exactly as stored.  `foreign` makes sources from files, `open` from checkpoints of Statewise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from statewise._src.checkpoint.format.keys import dtype_of, prng_of
from statewise._src.common.nnx_graph import raw_value
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.core.usable import check_concrete
from statewise.errors import StructureError

__all__ = ["ARRAY", "NAMED", "Source", "SourceArray", "is_linen", "known_collection", "open_mapping", "stored_dtype"]

ARRAY = "jax:Array"
# The format of a source whose names became those of our paths.
NAMED = "named"


@dataclasses.dataclass(frozen=True, slots=True)
class SourceArray:
    """One array of a source.

    Attributes:
      name: its name in the source.
      path: the same as a path.
      shape: its shape, as stored.
      dtype: the name of its dtype, as stored; for a dtype that JAX lacks, the source's own name.
      kind: the name of its kind, if the source has it.
      type: the type of its leaf, `flax.nnx:Param`, if the source has it.
      prng: for the words of PRNG keys the implementation, if the source has it.
      aliases: other paths of its leaf, if the source has them.
      average: whether it is an average that a plan keeps, and not a leaf of the model.
      stacked: the axes of which each position is an array of its own in the files.
      parts: the names of the arrays that it is in the files, if names say so.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    kind: str | None = None
    type: str | None = None
    prng: str | None = None
    aliases: tuple[Path, ...] = ()
    average: bool = False
    stacked: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    def leaf(self, note: str = "") -> Leaf:
        """Returns the entry as tables and errors show it."""
        dtype, elements = dtype_of(self.dtype), math.prod(self.shape)
        nbytes = elements * dtype.itemsize if dtype is not None else 0
        shown: Any = self.dtype if dtype is None else dtype
        return Leaf(self.path, self.kind, self.type or ARRAY, self.shape, shown, self.aliases, elements, nbytes, note)


@dataclasses.dataclass(frozen=True)
class Source:
    """Something that arrays can be read from.

    Attributes:
      name: its name in messages.
      format: `statewise`, `orbax`, `safetensors`, `mapping` or `named`.
      entries: the arrays that it has; none was read for this.
      read: returns the arrays of some entries, by name.
      others: the names of everything in it that is not an array.
      by_design: the paths, as text, of leaves that it is known not to have.
      read_part: reads a part of one array into a buffer, see `fill`; None if an array is only read as a whole.
    """

    name: str
    format: str
    entries: tuple[SourceArray, ...]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    others: tuple[str, ...] = ()
    by_design: frozenset[str] = frozenset()
    read_part: Callable[[str, Sequence[slice], np.ndarray], None] | None = None

    def fill(self, name: str, index: Sequence[slice], into: np.ndarray) -> None:
        """Reads a part of an array into a buffer.

        Args:
          name: the array's entry.
          index: the positions of the part along each axis, without steps.
          into: a buffer in C order, of the array's dtype, with as many elements as the part, in any shape.  Of a source
            of our names the dtype may be another.
        """
        if self.read_part is None:
            into[...] = self.read((name,))[name][tuple(index)].reshape(into.shape)
        else:
            self.read_part(name, index, into)


def stored_dtype(entry: SourceArray) -> np.dtype[Any]:
    """Returns the dtype in which an array is stored, which is one that fits a leaf."""
    dtype = dtype_of(entry.dtype)
    assert dtype is not None, "a dtype that JAX lacks fits no leaf"
    return dtype


def known_collection(name: Any) -> bool:
    """Returns whether NNX knows a Linen collection of this name."""
    try:
        nnx.variable_type_from_name(str(name))
    except ValueError:
        return False
    return True


def is_linen(entries: Sequence[SourceArray]) -> bool:
    """Returns whether these are Linen's variables: collections at the top, `params` among them or all of them known."""
    tops = {entry.path[0] for entry in entries if len(entry.path) > 1}
    return "params" in tops or (bool(tops) and all(known_collection(entry.path[0]) for entry in entries))


def open_mapping(tree: Mapping[Any, Any]) -> Source:
    """Opens nested dicts of arrays: Linen's variables, with or without their metadata boxes, or an `nnx.State`.

    Raises:
      StructureError: it contains something other than arrays and numbers.
    """
    entries: list[SourceArray] = []
    arrays: dict[str, Any] = {}
    problems = Problems()
    for path, value in _walk(tree, ()):
        array: Any = value if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(value)
        prng = prng_of(array.dtype)
        if prng is not None:
            is_key = isinstance(array, jax.Array)
            array = jax.random.key_data(array) if is_key else jax.eval_shape(jax.random.key_data, array)
        if array.dtype.kind in "OUSMm":  # objects, text, dates
            problems.add(Leaf(path, None, type(value), None, None), f"holds {type(value).__name__}")
            continue
        entry = SourceArray(format_path(path), path, tuple(array.shape), str(array.dtype), prng=prng)
        entries.append(entry)
        arrays[entry.name] = array
    hint = "take it out of the dict: rename={name: None} leaves out arrays only"
    problems.raise_as(StructureError, "Only arrays and numbers can be converted.", hint)

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        abstract = [entry for entry in entries if isinstance(arrays[entry.name], jax.ShapeDtypeStruct)]
        leaves = [entry.leaf("has no values") for entry in abstract]
        hint = "sw.convert(..., dry_run=True), or variables with values"
        check_concrete(arrays.values(), "convert", hint, subject="The source", leaves=leaves)
        return {name: np.asarray(arrays[name]) for name in names}

    return Source("the mapping", "mapping", tuple(entries), read)


def _walk(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, meta.AxisMetadata):
        tree = tree.unbox()
    elif isinstance(tree, nnx.Variable):
        tree = raw_value(tree)
    if isinstance(tree, Mapping):
        for key in tree:
            yield from _walk(tree[key], (*path, key))
    elif isinstance(tree, (tuple, list)):
        for index, part in enumerate(tree):
            yield from _walk(part, (*path, index))
    elif tree is not None:
        yield path, tree
