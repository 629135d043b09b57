"""Kinds: the ordered declaration for one program.

Pure data, like each `Kind` in it: equal by value, hashable, and nothing happens when one is made.  Everything else
reads it through a plan, which resolves it against a model.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import optax
from flax import nnx

from statewise._src.common import compat
from statewise._src.core.plan import Plan
from statewise._src.filters.combinators import describe
from statewise._src.plan.ema import EMA
from statewise._src.plan.kind import Kind, shown, unknown_kind
from statewise._src.plan.resolve import resolve_plan
from statewise.errors import DeclarationError

__all__ = ["Kinds", "plan"]

# A kind, or a tuple of kinds.  A mapping does not vary with the type of its keys, so that type is a variable.
Names = TypeVar("Names", bound=Sequence[str])

# Words that a kind may not be called: they name something else where kinds are named.
RESERVED = frozenset({"self", "objects", "mesh", "copy"})


class Kinds(Mapping[str, Kind]):
    """The ordered declaration of the kinds of one program.

    A mapping from names to kinds, immutable, equal by value (order included) and hashable.

    Args:
      **kinds: the kinds by name.  A name is a Python identifier.

    Raises:
      DeclarationError: a name that cannot stand, a value that is no `Kind`, or two kinds that both claim the rest.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param), counters=sw.Kind(sw.Exactly(nnx.Variable)))
      >>> list(kinds)
      ['params', 'counters']
      >>> kinds.replace(params=sw.Kind(nnx.Param, frozen=True))["params"].frozen
      True
    """

    __slots__ = ("_hash", "_kinds")

    def __init__(self, /, **kinds: Kind) -> None:
        for name, kind in kinds.items():
            _check_name(name)
            if not isinstance(kind, Kind):
                raise DeclarationError(
                    f"{name}={shown(kind)} is no Kind.", kind=name, hint=f"sw.Kinds({name}=sw.Kind({shown(kind)}))"
                )
        rests = [name for name, kind in kinds.items() if kind.rest]
        if len(rests) > 1:
            raise DeclarationError(
                f"The kinds {', '.join(rests)} all claim the rest (`...`); only one can.",
                hint=f"give {rests[1]} a filter of its own",
            )
        self._kinds = dict(kinds)
        self._hash = hash(tuple(self._kinds.items()))

    @classmethod
    def standard(cls) -> Kinds:
        """The kinds of everything that NNX ships, so that a newcomer declares nothing.

        `params` (without LoRA's), `lora`, `stats`, `cache` (ephemeral, restarts with zeros), `rng`,
        `intermediates` (ephemeral), `metrics`, `optimizer`, and `variables` for all the rest: plain
        `nnx.Variable`, every subclass not named before, raw arrays.

        Example:
          >>> import statewise as sw
          >>> list(sw.Kinds.standard())
          ['params', 'lora', 'stats', 'cache', 'rng', 'intermediates', 'metrics', 'optimizer', 'variables']
        """
        return _STANDARD

    def __getitem__(self, name: str) -> Kind:
        try:
            return self._kinds[name]
        except KeyError:
            raise unknown_kind(name, self) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __eq__(self, other: object) -> bool:
        # Unlike a dict's, the order counts: tables and states follow it.
        return isinstance(other, Kinds) and list(self._kinds.items()) == list(other._kinds.items())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew: in another process the hashes of types are others.
        return functools.partial(Kinds, **self._kinds), ()

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}=Kind({describe(kind.of)})" for name, kind in self._kinds.items())
        return f"Kinds({inner})"

    def __or__(self, other: Kinds) -> Kinds:
        if not isinstance(other, Kinds):
            return NotImplemented
        return Kinds(**{**self._kinds, **other._kinds})

    def replace(self, /, **kinds: Kind) -> Kinds:
        """These kinds with some of them changed, in the same order.

        Args:
          **kinds: new declarations of kinds that are there; use `|` to add one.

        Raises:
          DeclarationError: a name that is not among these kinds.

        Example:
          >>> import statewise as sw
          >>> from flax import nnx
          >>> kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))
          >>> kinds["stats"].handling()
          'frozen'
        """
        for name in kinds:
            if name not in self._kinds:
                raise unknown_kind(name, self)
        return Kinds(**{**self._kinds, **kinds})

    def plan(
        self,
        /,
        *objects: object,
        optimizers: Mapping[Names, optax.GradientTransformation] | None = None,
        averages: Mapping[Names, EMA | Sequence[EMA]] | None = None,
        **named: object,
    ) -> Plan:
        """Resolves these kinds against a model, or several objects: each leaf in exactly one kind.

        Args:
          *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
          optimizers: from a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.
          averages: from a kind, or a tuple of kinds, to an `sw.EMA`, or a list of them: each becomes a kind of its own,
            which follows these kinds wherever a train step updates them.
          **named: the objects by name instead, `policy=policy, reference=reference`: the name is then the first segment
            of their paths, for filters as in print.  Steps get them in this order.

        Returns:
          the plan; equal plans are one object.

        Raises:
          UnclaimedError: leaves that no kind claims, all of them.
          OverlapError: leaves that several kinds claim, all of them.
          DeclarationError: optimizers or averages for a kind that is not there, frozen, empty, or not made of floats;
            two optimizers for one kind, two averages of one name; a kind that spells a path which is not there; objects
            given by position and by name.
          FilterError: a path that could mean one leaf or another.
          StructureError: no objects, no leaves, a class instead of an instance.

        Example:
          >>> import optax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.Kinds(params=sw.Kind(nnx.Param)).plan(model, optimizers={"params": optax.sgd(0.1)})
          >>> [sw.format_path(leaf.path) for leaf in plan["params"]]
          ['bias', 'kernel']
        """
        return Plan.of(resolve_plan(self, objects, optimizers, averages, named))


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise DeclarationError(
            f"{name!r} cannot name a kind: it is no Python identifier.",
            kind=name,
            hint="a name of letters, digits and underscores, such as 'params'",
        )
    if name.startswith("_") or name in RESERVED:
        hint = f"{name.strip('_') or 'my'}_kind"
        raise DeclarationError(f"{name!r} is reserved and cannot name a kind.", kind=name, hint=hint)


def _standard() -> Kinds:
    return Kinds(
        params=Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
        lora=Kind(nnx.LoRAParam),
        stats=Kind(nnx.BatchStat),
        cache=Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
        rng=Kind(nnx.RngState),
        intermediates=Kind(nnx.Any(nnx.Intermediate, nnx.Perturbation), saved=False),
        metrics=Kind(compat.MetricState),
        optimizer=Kind(nnx.OptState),
        variables=Kind(...),
    )


_STANDARD = _standard()


def plan(
    *objects: object,
    optimizers: Mapping[Names, optax.GradientTransformation] | None = None,
    averages: Mapping[Names, EMA | Sequence[EMA]] | None = None,
    **named: object,
) -> Plan:
    """Plans a model by the standard kinds: `Kinds.standard().plan(...)`.

    Args:
      *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
      optimizers: from a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.
      averages: from a kind, or a tuple of kinds, to an `sw.EMA`, or a list of them.
      **named: the objects by name, instead of by position: paths then begin with the name.

    Returns:
      the plan.

    Raises:
      OverlapError: leaves that two of the standard kinds claim (a type that derives from both).
      DeclarationError: optimizers or averages for a kind that is not there, frozen, empty, or not made of floats; two
        optimizers for one kind, two averages of one name.
      StructureError: no objects, no leaves, a class instead of an instance.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> [(leaf.kind, sw.format_path(leaf.path)) for leaf in sw.plan(model).leaves]
      [('params', 'bias'), ('stats', 'mean'), ('params', 'scale'), ('stats', 'var')]
    """
    return Plan.of(resolve_plan(_STANDARD, objects, optimizers, averages, named))
