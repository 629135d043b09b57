"""Declarations of kinds as code, for hints."""

from __future__ import annotations

from collections.abc import Mapping

from statewise._src.filters.explain import as_code
from statewise._src.plan.kind import Kind
from statewise._src.plan.match import free_name

__all__ = ["kind_apart"]


def kind_apart(kinds: Mapping[str, Kind], kind: str | None, name: str, of: str, handling: str = "") -> tuple[str, str]:
    """Returns code that gives some leaves a kind of their own, and the name of that kind.

    Args:
      kinds: the declaration.
      kind: the kind in it that claims the leaves; None if no kind, or more than one, does.
      name: a name for their own kind; a number is added to it if there is such a kind.
      of: the filter of their own kind, as code.
      handling: its other arguments, as code.
    """
    own = free_name(kinds, name)
    others = "kinds"
    if kind is not None and not kinds[kind].rest:  # the rest leaves out by itself what another kind claims
        remaining = f"nnx.All({as_code(kinds[kind].of)}, nnx.Not({of}))"
        others = f"kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], of={remaining}))"
    arguments = f"{of}, {handling}" if handling else of
    return f"kinds = {others} | sw.Kinds({own}=sw.Kind({arguments}))", own
