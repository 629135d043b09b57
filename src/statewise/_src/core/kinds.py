"""Kinds: the ordered declaration for one program.

It is pure data, like each `Kind` in it: equal by value, hashable, and creating one has no effect.  Everything else
reads it through a plan, which resolves it against a model.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.filters.combinators import describe
from statewise._src.plan.kind import Kind, shown, unknown_kind
from statewise.errors import DeclarationError

__all__ = ["KindsData", "standard_kinds"]

# Names that a kind cannot have: where kinds are passed by name, these are other arguments.
RESERVED = frozenset({"self", "objects", "mesh", "copy"})


class KindsData(Mapping[str, Kind]):
    """The data of `Kinds`: a mapping from names to kinds, immutable, equal by value (order included) and hashable."""

    __slots__ = ("_hash", "_kinds")

    def __init__(self, /, **kinds: Kind) -> None:
        for name, kind in kinds.items():
            _check_name(name)
            if not isinstance(kind, Kind):
                raise DeclarationError(
                    f"{name}={shown(kind)} is not a Kind.", kind=name, hint=f"sw.Kinds({name}=sw.Kind({shown(kind)}))"
                )
        rests = [name for name, kind in kinds.items() if kind.rest]
        if len(rests) > 1:
            raise DeclarationError(
                f"The kinds {', '.join(rests)} all claim the rest (`...`); only one can.",
                hint=f"give {rests[1]} a filter of its own",
            )
        self._kinds = dict(kinds)
        self._hash = hash(tuple(self._kinds.items()))

    def __getitem__(self, name: str) -> Kind:
        if name not in self._kinds:
            raise unknown_kind(name, self)
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __eq__(self, other: object) -> bool:
        # Unlike in a dict, the order matters: tables and states follow it.
        return isinstance(other, KindsData) and list(self._kinds.items()) == list(other._kinds.items())

    def __hash__(self) -> int:
        return self._hash  # computed once: plans and steps look up tables by their kinds

    def __reduce__(self) -> tuple[Any, ...]:
        # Built again on load: in another process the hashes of types differ.
        return functools.partial(type(self), **self._kinds), ()

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}=Kind({describe(kind.of)})" for name, kind in self._kinds.items())
        return f"Kinds({inner})"

    def __or__(self, other: Self) -> Self:
        if not isinstance(other, KindsData):
            return NotImplemented
        return type(self)(**{**self._kinds, **other._kinds})

    def replace(self, /, **kinds: Kind) -> Self:
        """Returns these kinds with some of them replaced, in the same order.

        Args:
          **kinds: new declarations of existing kinds; use `|` to add a kind.

        Raises:
          DeclarationError: a kind does not exist.

        Example:
          >>> import statewise as sw
          >>> from flax import nnx
          >>> kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))
          >>> kinds["stats"].handling()
          'frozen'
        """
        for name in kinds:
            self[name]  # raises for a kind that does not exist
        return self | type(self)(**kinds)


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise DeclarationError(
            f"{name!r} cannot name a kind: it is not a Python identifier.",
            kind=name,
            hint="a name of letters, digits and underscores, such as 'params'",
        )
    if name.startswith("_") or name in RESERVED:
        hint = f"{name.strip('_') or 'my'}_kind"
        raise DeclarationError(f"{name!r} is reserved and cannot name a kind.", kind=name, hint=hint)


def standard_kinds() -> dict[str, Kind]:
    """Returns the kinds of everything that NNX ships; see `Kinds.standard`."""
    return {
        "params": Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
        "lora": Kind(nnx.LoRAParam),
        "stats": Kind(nnx.BatchStat),
        "cache": Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
        "rng": Kind(nnx.RngState),
        "intermediates": Kind(nnx.Any(nnx.Intermediate, nnx.Perturbation), saved=False),
        "metrics": Kind(compat.MetricState),
        "optimizer": Kind(nnx.OptState),
        "variables": Kind(...),
    }
