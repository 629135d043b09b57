"""The four filters that NNX lacks: `Exactly`, `Path`, `Meta` and `Where`."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from statewise._src.common import compat, paths
from statewise._src.filters.combinators import Ours, Predicate, ask
from statewise._src.filters.values import (
    describe_callable,
    fault_of_callable,
    hashable,
    own_copy,
    reason,
    row,
    same,
    shown,
    type_as_code,
)
from statewise.errors import FilterError

__all__ = ["Exactly", "Meta", "Path", "Where"]

_MISSING = object()


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class Exactly(Ours):
    """Matches the leaves whose type is one of these, excluding subclasses.

    A bare type, such as `nnx.Variable`, matches every subclass too.  A Variable's type is its `var_type`; a raw JAX
    array, of any implementation, counts as `jax.Array`.

    Args:
      *types: one or more types; their order does not matter.

    Raises:
      FilterError: no type is given, or something that is not a type.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import statewise as sw
      >>> class Model(nnx.Module):
      ...     def __init__(self):
      ...         self.kernel = nnx.Param(jnp.ones((2, 3)))
      ...         self.steps = nnx.Variable(jnp.array(0))
      >>> len(nnx.to_flat_state(nnx.state(Model(), nnx.Variable)))
      2
      >>> [path for path, _ in nnx.to_flat_state(nnx.state(Model(), sw.Exactly(nnx.Variable)))]
      [('steps',)]
    """

    types: tuple[type, ...] = dataclasses.field(compare=False)
    _members: frozenset[type]

    by_type: ClassVar[bool] = True

    def __init__(self, *types: type) -> None:
        for given in types:
            if not isinstance(given, type):
                cls = compat.variable_type(given) if compat.is_variable(given) else type(given)
                hint = f"sw.Exactly({type_as_code(cls)})  # the type, not an object of it"
                hint = hint if isinstance(given, nnx.Variable) else "sw.Exactly(nnx.Variable, nnx.Param)"
                raise FilterError(f"Exactly takes types, not {shown(given)}.", hint=hint)
        if not types:
            raise FilterError("Exactly() needs at least one type.", hint="sw.Exactly(nnx.Variable)")
        object.__setattr__(self, "types", types)
        object.__setattr__(self, "_members", frozenset(types))

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the leaf's type is one of these."""
        if isinstance(leaf, nnx.Variable):
            return leaf.var_type in self._members  # under hijax `type(leaf)` is another class
        return type(leaf) in self._members or (jax.Array in self._members and isinstance(leaf, jax.Array))

    def __repr__(self) -> str:
        return f"Exactly({', '.join(map(paths.format_type, self.types))})"


@dataclasses.dataclass(frozen=True, repr=False)
class Path(Ours):
    """Matches the leaves whose path, written `layers/0/attn/kernel`, matches a glob.

    The complete path must match: `Path("layers")` is one leaf of that name, `Path("layers/**")` everything below it.

    Args:
      pattern: segments separated by slashes.  `*` is any one segment or, inside a segment, any run of characters
        (`layer_*`); `?` is any one character; `**` is any number of segments, including none.  Case matters.  A key is
        compared by its text: the integer `0` and the string `"0"` are both `0`.  With several objects without names, a
        pattern is relative to each of them; one that begins with a position (`1/kernel`, `1/**`) may also be a path as
        it is printed.  Statewise's own functions reject a pattern that could mean two leaves.

    Raises:
      FilterError: the pattern is not a string, has an empty segment, `**` inside a segment, or one of `[]{}`, which
        mean something in other globs but nothing here.

    Example:
      >>> import statewise as sw
      >>> kernels = sw.Path("layers/*/**/kernel")
      >>> kernels(("layers", 0, "kernel"), None), kernels(("layers", 0, "attn", "kernel"), None)
      (True, True)
      >>> kernels(("head", "kernel"), None)
      False
    """

    pattern: str
    _glob: re.Pattern[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise FilterError(f"Path takes a glob, not {shown(self.pattern)}.", hint="sw.Path('layers/**')")
        object.__setattr__(self, "_glob", _compiled(self.pattern))

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the path matches."""
        if type(path) is not paths.Ways:
            return self.matches(path)
        return any(map(self.matches, path.relative)) or (self.positional and any(map(self.matches, path.printed)))

    @property
    def positional(self) -> bool:
        """Returns whether the pattern begins with an object's position, and so may be a path as it is printed."""
        first = self.pattern.partition("/")[0]
        return first.isascii() and first.isdecimal()

    def matches(self, path: paths.Path) -> bool:
        """Returns whether exactly this path matches."""
        return self.matches_text(_segments(path))

    def matches_text(self, segments: str) -> bool:
        """Returns whether a path matches that is given as text, with a slash after each of its segments."""
        if not segments:  # no segments: matched only by `**`, and by `.`, as which it is printed
            return self.pattern in ("**", ".")
        return self._glob.fullmatch(segments) is not None

    def __repr__(self) -> str:
        return f"Path({self.pattern!r})"


# The path that was last written as text.  Each leaf is shown to all kinds before the next one is.
_latest: tuple[paths.Path, str] = ((), "")


def _segments(path: paths.Path) -> str:
    """Returns a path as text, with a slash after each segment."""
    global _latest
    known, text = _latest
    if known is not path:
        text = paths.format_path(path) + "/" if path else ""
        _latest = path, text
    return text


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiles a glob to a regular expression over the path's text with a slash after each segment."""
    segments = pattern.split("/")
    fault, hint = "", ""
    if "" in segments:
        fault, hint = "an empty segment", "/".join(filter(None, segments)) or "**"
    elif any("**" in segment and segment != "**" for segment in segments):
        fault = "`**` inside a segment, where only `*` is allowed"
        hint = "/".join(s if s == "**" else re.sub(r"\*+", "*", s) for s in segments)
    elif strange := sorted(set("[]{}") & set(pattern)):
        fault = f"`{''.join(strange)}`: a glob here has only `*`, `**` and `?`"
        hint = re.sub(r"\[.*?\]|\{.*?\}", "*", pattern).translate(dict.fromkeys(map(ord, "[]{}"), "?"))
    if fault:
        raise FilterError(f"Path({pattern!r}) has {fault}.", hint=f"sw.Path({hint!r})")
    wild = {"*": "[^/]*", "?": "[^/]"}
    text = ""
    for segment in segments:
        text += "(?:[^/]*/)*" if segment == "**" else "".join(wild.get(c, re.escape(c)) for c in segment) + "/"
    return re.compile(text)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Meta(Ours):
    """Matches the Variables whose metadata has this value under this name.

    Metadata is what a Variable received besides its value: `nnx.Param(x, role="ema")`.  A Variable without that name,
    and a raw array, never match.

    Args:
      name: the metadata's name.
      value: the value to compare with: any object; arrays are equal if their shapes and all elements are.

    Raises:
      FilterError: the name is not a string, or (at a leaf) the two values cannot be compared.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import statewise as sw
      >>> ema = sw.Meta("role", "ema")
      >>> ema((), nnx.Param(jnp.ones(2), role="ema")), ema((), nnx.Param(jnp.ones(2)))
      (True, False)
    """

    name: str
    value: Any

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise FilterError(f"Meta takes a name, not {shown(self.name)}.", hint="sw.Meta('role', 'ema')")
        object.__setattr__(self, "value", own_copy(self.value))

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the leaf has this metadata."""
        if not isinstance(leaf, nnx.Variable):
            return False
        value = leaf.get_metadata(self.name, _MISSING)
        if value is _MISSING:
            return False
        try:
            return same(value, self.value)
        except Exception as error:  # metadata may be anything, and its comparison may raise anything
            raise FilterError(
                f"{self!r} cannot be compared with the leaf's {shown(value)}: {reason(error)}.",
                leaves=[row(path, leaf)],
                hint=f"sw.Where(lambda path, leaf: leaf.get_metadata({self.name!r}, None) is ...)",
            ) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Meta):
            return NotImplemented
        return self.name == other.name and same(self.value, other.value)

    def __hash__(self) -> int:
        # By the name alone: a value may be unhashable, and values that are equal across types (1, True, a NumPy 1) may
        # have different hashes.
        return hash((Meta, self.name))

    def __repr__(self) -> str:
        return f"Meta({self.name!r}, {shown(self.value)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Where(Ours):
    """Matches the leaves for which a function of (path, leaf) returns True.

    For everything that types, paths and metadata do not say: shapes, dtypes, a path's keys rather than its text.  Two
    `Where` are equal if their functions are: a lambda is equal only to itself.

    Args:
      predicate: takes a leaf's path, a tuple of keys, and the leaf, an `nnx.Variable` or a raw array; returns a bool.

    Raises:
      FilterError: the predicate is not a function of two arguments; at a leaf, the predicate raised (the cause is
        chained) or returned something other than a bool.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import statewise as sw
      >>> matrices = sw.Where(lambda path, leaf: leaf.ndim == 2)
      >>> matrices((), nnx.Param(jnp.ones((2, 3)))), matrices((), nnx.Param(jnp.ones(3)))
      (True, False)
    """

    predicate: Predicate

    def __post_init__(self) -> None:
        given, hint = self.predicate, "sw.Where(lambda path, leaf: ...)"
        fault = fault_of_callable(given)
        if isinstance(given, type):
            fault, hint = "is a type, which is already a filter", type_as_code(given)
        if fault:
            raise FilterError(f"Where takes a function of (path, leaf): {shown(given)} {fault}.", hint=hint)
        object.__setattr__(self, "predicate", hashable(given))

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the predicate returns True for the leaf."""
        answer = ask(self, self.predicate, path, leaf)
        if not isinstance(answer, (bool, np.bool_)):
            raise FilterError(
                f"{self!r} returned {shown(answer)}, not a bool.",
                leaves=[row(path, leaf)],
                hint="sw.Where(lambda path, leaf: bool(...))",
            )
        return bool(answer)

    def __repr__(self) -> str:
        return f"Where({describe_callable(self.predicate)})"
