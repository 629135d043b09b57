"""Positions that a restart leaves behind: whole numbers that are kept beside caches, in a kind that does not restart.

A cache is of no use without the position up to which it is filled.  Where that position is an `nnx.Variable` of another
kind, `state.restart("cache")` makes the cache empty and leaves the position where it was: the next token is written,
and the mask reaches, as if the old text were still there.
"""

from __future__ import annotations

from flax import nnx

from statewise import _compat
from statewise.filters import as_code
from statewise.kinds import Kinds
from statewise.paths import Path

__all__ = ["WHY", "may_be_position", "restart_mend"]

WHY = "after restart() the cache is empty, and written and masked as if the old text still stood in it"

# What these hold has a life of its own, and is no position in a cache.
_OTHER = (nnx.Param, nnx.BatchStat, nnx.RngState, nnx.OptState, nnx.Intermediate, nnx.Cache, _compat.MetricState)


def may_be_position(type_: type) -> bool:
    """Whether a Variable of this type may hold a position in a cache: it is a plain one, or of a type of the user's."""
    return issubclass(type_, nnx.Variable) and not issubclass(type_, _OTHER)


def restart_mend(kinds: Kinds, kind: str | None, path: Path, cache: str) -> str:
    """The declaration under which such a leaf restarts with its cache; and the type with which it would, both as code.

    Args:
      kinds: the declaration.
      kind: the leaf's kind in it.
      path: the leaf's path.
      cache: the kind that restarts.
    """
    name = str(path[-1])
    pattern = f"sw.Path({'**/' + name!r})"
    names = ("positions", *(f"positions_{number}" for number in range(2, len(kinds) + 3)))
    own = next(free for free in names if free not in kinds)
    others = "kinds"
    if kind is not None and not kinds[kind].rest:
        of = f"nnx.All({as_code(kinds[kind].of)}, nnx.Not({pattern}))"
        others = f"kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], of={of}))"
    target = f"self.{name}" if name.isidentifier() else "self.position"
    return (
        f"kinds = {others} | sw.Kinds({own}=sw.Kind({pattern}, saved=False, restart=jnp.zeros_like))\n"
        f"state = state.restart({cache!r}, {own!r})\n"
        f"or, where the model makes it: {target} = nnx.Cache(jnp.array(0))"
    )
