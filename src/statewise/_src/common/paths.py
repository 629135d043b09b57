"""A leaf's path, as data and as text, and the row that describes a leaf.

A path is a tuple of keys, as NNX gives it: attribute names are strings, positions in an `nnx.List` are
integers, and the keys of a user's own dict may be anything sortable.  As text it is written with slashes,
`layers/0/attn/kernel`.  The text is for people, tables and globs; programs compare the tuples, so that the
integer `0` and the string `"0"` never become each other.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

__all__ = ["Leaf", "Path", "Ways", "format_dtype", "format_path", "format_shape", "format_type"]

Path = tuple[Hashable, ...]


class Ways(tuple[Hashable, ...]):
    """A leaf's path as filters see it, together with the other ways in which that leaf is written.

    To any filter it is the first of `relative`, an ordinary tuple of keys.  `sw.Path` alone looks at the rest, so that
    what a table prints as a path means that leaf.

    Attributes:
      relative: the leaf's paths relative to its object, its own first.
      printed: the same paths as they are printed, beginning with the object's position.
    """

    relative: tuple[Path, ...]
    printed: tuple[Path, ...]

    @classmethod
    def of(cls, relative: tuple[Path, ...], printed: tuple[Path, ...] = ()) -> "Ways":
        """Makes one of the leaf's paths."""
        made = cls(relative[0])
        made.relative, made.printed = relative, printed
        return made


def format_path(path: Path) -> str:
    """Writes a path with slashes; the root is `.`.

    Args:
      path: the keys, as NNX gives them.

    Example:
      >>> import statewise as sw
      >>> sw.format_path(("layers", 0, "kernel"))
      'layers/0/kernel'
    """
    return "/".join(str(key) for key in path) if path else "."


def format_shape(shape: tuple[int, ...] | None) -> str:
    """Writes a shape: `(3, 4)`; `-` where a leaf holds no array, or several."""
    return "-" if shape is None else "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def format_dtype(dtype: Any) -> str:
    """Writes a dtype: `float32`, `key<fry>`; `-` where a leaf holds no array, or several."""
    return "-" if dtype is None else str(dtype)


def format_type(cls: type | str) -> str:
    """Writes a leaf's type by its name alone: `Param`, `BatchStat`, `Array` for a raw array."""
    name = cls if isinstance(cls, str) else cls.__name__
    return name.rpartition(":")[2].rpartition(".")[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a model: one `nnx.Variable`, or one raw array, wherever it can be reached from.

    Attributes:
      path: the first path that reaches it, as a tuple of keys.
      kind: the name of the kind that claims it; None before a plan was made.
      type: the Variable's type; `jax.Array` for a raw array.  Of a leaf on disk its name, `flax.nnx:Param`.
      shape: the array's shape; None if the leaf holds no array or several.
      dtype: the array's dtype; None if the leaf holds no array or several.
      aliases: the other paths that reach the same Variable (tied weights).
      size: how many elements it holds, over all its arrays.
      nbytes: how many bytes it holds, over all its arrays.
      note: what an error has to say of this very leaf.

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
