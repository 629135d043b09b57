"""What arrays can be read from: a `Source`, and nested dicts of arrays, such as Linen's variables, as one.

A source is a list of entries (name, path, shape, dtype), made of metadata alone, and a function that reads arrays by
name, as NumPy's, exactly as they are stored.  `foreign` makes sources of files, `opening` of checkpoints of Statewise.
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
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.core.usable import check_concrete
from statewise.errors import StructureError

__all__ = ["ARRAY", "Source", "SourceArray", "is_linen", "known_collection", "open_mapping"]

ARRAY = "jax:Array"


@dataclasses.dataclass(frozen=True, slots=True)
class SourceArray:
    """One array of a source.

    Attributes:
      name: what the source calls it.
      path: the same as a path.
      shape: its shape, as stored.
      dtype: its dtype's name, as stored; a dtype that JAX lacks by the source's own name.
      kind: the name of its kind, where the source tells.
      type: the type of its leaf, `flax.nnx:Param`, where the source tells.
      prng: of the words of PRNG keys, the implementation, where the source tells.
      aliases: other paths of its leaf, where the source tells.
      average: whether it is an average that a plan keeps, and no leaf of the model.
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

    def leaf(self, note: str = "") -> Leaf:
        """The entry as tables and errors show it."""
        dtype, elements = dtype_of(self.dtype), math.prod(self.shape)
        nbytes = elements * dtype.itemsize if dtype is not None else 0
        shown: Any = self.dtype if dtype is None else dtype
        return Leaf(self.path, self.kind, self.type or ARRAY, self.shape, shown, self.aliases, elements, nbytes, note)


@dataclasses.dataclass(frozen=True)
class Source:
    """Something that arrays can be read from.

    Attributes:
      name: what to call it in messages.
      format: `statewise`, `orbax`, `safetensors` or `mapping`.
      entries: what it holds; no array was read for it.
      read: the arrays of some entries, by name.
      others: the names of what it holds besides arrays.
    """

    name: str
    format: str
    entries: tuple[SourceArray, ...]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    others: tuple[str, ...] = ()


def known_collection(name: Any) -> bool:
    """Whether NNX knows a Linen collection of this name."""
    try:
        nnx.variable_type_from_name(str(name))
    except ValueError:
        return False
    return True


def is_linen(entries: Sequence[SourceArray]) -> bool:
    """Whether these are Linen's variables: collections at the top, `params` among them or all of them known."""
    tops = {entry.path[0] for entry in entries if len(entry.path) > 1}
    return "params" in tops or (bool(tops) and all(known_collection(entry.path[0]) for entry in entries))


def open_mapping(tree: Mapping[Any, Any]) -> Source:
    """Nested dicts of arrays: Linen's variables, with or without their metadata boxes, or an `nnx.State`.

    Raises:
      StructureError: it holds something else than arrays and numbers.
    """
    entries, arrays, wrong = [], {}, []
    for path, value in _walk(tree, ()):
        array = value if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(value)
        prng = prng_of(array.dtype)
        if prng is not None:
            key: Any = array
            array = jax.eval_shape(jax.random.key_data, key) if _is_abstract(key) else jax.random.key_data(key)
        if array.dtype.kind in "OUSMm":
            wrong.append(Leaf(path, None, type(value), None, None, note=f"holds {type(value).__name__}"))
            continue
        entry = SourceArray(format_path(path), path, tuple(array.shape), str(array.dtype), prng=prng)
        entries.append(entry)
        arrays[entry.name] = array
    if wrong:
        raise StructureError(
            "Only arrays and numbers can be converted.",
            leaves=wrong,
            hint="take it out of the dict: rename={name: None} leaves out arrays only",
        )

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        check_concrete(
            arrays.values(),
            "convert",
            "sw.convert(..., dry_run=True), or variables with values",
            subject="The source",
            leaves=[entry.leaf("has no values") for entry in entries if _is_abstract(arrays[entry.name])],
        )
        return {name: np.asarray(arrays[name]) for name in names}

    return Source("the mapping", "mapping", tuple(entries), read)


def _is_abstract(array: Any) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def _walk(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, meta.AxisMetadata):
        tree = tree.unbox()
    elif isinstance(tree, nnx.Variable):
        tree = tree.get_raw_value()
    if isinstance(tree, (Mapping, nnx.State)):
        for key in tree:
            yield from _walk(tree[key], (*path, key))
    elif isinstance(tree, (tuple, list)):
        for at, part in enumerate(tree):
            yield from _walk(part, (*path, at))
    elif tree is not None:
        yield path, tree
