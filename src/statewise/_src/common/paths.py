"""A leaf's path, as data and as text, and the row that describes a leaf.

A path is a tuple of keys, as NNX has it: attribute names are strings, positions in an `nnx.List` are integers, and the
keys of a user's own dict may be anything sortable.  As text it is written with slashes, `layers/0/attn/kernel`.  The
text is for people, tables and globs; programs compare the tuples, so the integer `0` and the string `"0"` are never
confused.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

__all__ = ["Leaf", "Path", "Ways", "format_dtype", "format_path", "format_shape", "format_type", "plain_key"]

Path = tuple[Hashable, ...]


class Ways(tuple[Hashable, ...]):
    """A leaf's path as filters see it, together with the other paths of that leaf.

    To a filter it is the first of `relative`, an ordinary tuple of keys.  Only `sw.Path` looks at the rest, so that the
    path in a table means the same leaf.

    Attributes:
      relative: the leaf's paths relative to its object, its own first.
      printed: the same paths as they are printed, starting with the object's position.
    """

    relative: tuple[Path, ...]
    printed: tuple[Path, ...]

    @classmethod
    def of(cls, relative: tuple[Path, ...], printed: tuple[Path, ...] = ()) -> "Ways":
        """Makes the path of a leaf with these paths."""
        ways = cls(relative[0])
        ways.relative, ways.printed = relative, printed
        return ways


def format_path(path: Path) -> str:
    """Writes a path with slashes; the root is `.`.

    Args:
      path: the keys, as NNX has them.

    Example:
      >>> import statewise as sw
      >>> sw.format_path(("layers", 0, "kernel"))
      'layers/0/kernel'
    """
    return "/".join(str(key) for key in path) if path else "."


def plain_key(key: Any) -> Any:
    """Returns a JAX key entry as a key of a path: an attribute's name, a dict's key, or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def format_shape(shape: tuple[int, ...] | None) -> str:
    """Writes a shape: `(3, 4)`; `-` if a leaf holds no array, or several."""
    return "-" if shape is None else "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def format_dtype(dtype: Any) -> str:
    """Writes a dtype: `float32`, `key<fry>`; `-` if a leaf holds no array, or several."""
    return "-" if dtype is None else str(dtype)


def format_type(cls: type | str) -> str:
    """Writes a leaf's type by its name only: `Param`, `BatchStat`, `Array` for a raw array."""
    name = cls if isinstance(cls, str) else cls.__name__
    return name.rpartition(":")[2].rpartition(".")[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a model: one `nnx.Variable`, or one raw array, however many paths reach it.

    Attributes:
      path: the first path that reaches it, as a tuple of keys.
      kind: the name of the kind that claims it; None without a plan.
      type: the Variable's type; `jax.Array` for a raw array.  For a leaf on disk its name, `flax.nnx:Param`.
      shape: the array's shape; None if the leaf holds no array, or several.
      dtype: the array's dtype; None if the leaf holds no array, or several.
      aliases: the other paths that reach the same Variable (tied weights).
      size: the number of elements, over all its arrays.
      nbytes: the number of bytes, over all its arrays.
      note: what an error reports about this leaf.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> leaf = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["params"][1]
      >>> leaf.path, leaf.kind, leaf.type.__name__, leaf.shape, leaf.size, leaf.nbytes
      (('kernel',), 'params', 'Param', (2, 3), 6, 24)
      >>> print(leaf)
      kernel: Param(2, 3) float32  kind=params
    """

    path: Path
    kind: str | None
    type: Any
    shape: tuple[int, ...] | None
    dtype: Any
    aliases: tuple[Path, ...] = ()
    size: int = 0
    nbytes: int = 0
    note: str = ""

    def __str__(self) -> str:
        kind = f"  kind={self.kind}" if self.kind is not None else ""
        note = f"  ({self.note})" if self.note else ""
        shown = f"{format_type(self.type)}{format_shape(self.shape)} {format_dtype(self.dtype)}"
        return f"{format_path(self.path)}: {shown}{kind}{note}"
