"""Positions that a restart leaves behind: integers kept beside caches, in a kind that does not restart.

A cache is useless without the position up to which it is filled.  If that position is an `nnx.Variable` of another
kind, `state.restart("cache")` empties the cache and leaves the position as it was: the next token is written, and the
mask reaches, as if the old text were still there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Path
from statewise._src.inspect.kind_hints import kind_apart
from statewise._src.plan.kind import Kind

__all__ = ["WHY", "is_named_position", "may_be_position", "restart_hint"]

WHY = "after restart() the cache is empty, but it is written and masked as if the old text were still in it"

# Values of these types have a meaning of their own, and are not positions in a cache.
_OTHER = (nnx.Param, nnx.BatchStat, nnx.RngState, nnx.OptState, nnx.Intermediate, nnx.Cache, compat.MetricState)

_POSITION = re.compile(
    r"(?:^|_)(?:idx|ind|index|pos|position|cur|current|cursor|len|length|offset|step|ptr|pointer|start|end|filled)(?:_|$|\d)",
    re.IGNORECASE,
)


def may_be_position(type_: type, shape: tuple[int, ...] | None, dtype: Any, name: str) -> bool:
    """Returns whether a Variable may hold a position in a cache, or one for each of its slots.

    It is a plain Variable, or of a type of the user's, and an integer; several integers only if its name says so, since
    they could also be tokens.
    """
    if not issubclass(type_, nnx.Variable) or issubclass(type_, _OTHER) or shape is None:
        return False
    return jnp.issubdtype(dtype, jnp.integer) and (shape == () or (len(shape) == 1 and is_named_position(name)))


def is_named_position(name: str) -> bool:
    """Returns whether a name is one that positions have: `cur_ind`, `cache_index`, `pos`."""
    return bool(_POSITION.search(name))


def restart_hint(kinds: Mapping[str, Kind], kind: str | None, path: Path, cache: str) -> str:
    """Returns a declaration with which such a leaf restarts with its cache, and a type with which it would, as code.

    Args:
      kinds: the declaration.
      kind: the leaf's kind in it.
      path: the leaf's path.
      cache: the kind that restarts.
    """
    name = str(path[-1])
    handling = "saved=False, restart=jnp.zeros_like"
    declaration, own = kind_apart(kinds, kind, "positions", f"sw.Path({'**/' + name!r})", handling)
    target = f"self.{name}" if name.isidentifier() else "self.position"
    return (
        f"{declaration}  # or a function that returns its initial value\n"
        f"state = state.restart({cache!r}, {own!r})\n"
        f"or, where the model makes it: {target} = nnx.Cache(jnp.array(0))"
    )
