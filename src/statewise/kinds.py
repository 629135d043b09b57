"""Kinds: which leaves, and how they live.

A `Kind` is a named filter with its treatment, a `Kinds` the ordered declaration for one program.  Both are
pure data: equal by value, hashable, and nothing happens when one is made.  Everything else reads them through
a plan, which resolves them against a model.

The treatments, one line each; the pipeline that reads it in brackets:

- `frozen` [steps]: no step writes it, no optimizer touches it;
- `saved` [steps, checkpoints]: persisted; what is not saved is *ephemeral*, and a train step does not write
  it unless told to;
- `missing` [checkpoints]: what a restore does for a leaf that the checkpoint lacks;
- `restart` [State.restart]: how a fresh value is made from the current one, and from a key and the path;
- `batch_axis` [State.restart]: which axis holds independent slots;
- `placement` [placement]: how it lies on a mesh;
- `optional` [claims]: a path that its filter spells need not be in the model.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
from flax import nnx

from statewise import _compat
from statewise.averages import EMA
from statewise.errors import FilterError, KindError
from statewise.filters import as_code, describe, normalise
from statewise.fresh import check_restart, takes
from statewise.placements import PLACEMENTS, describe_placement

if TYPE_CHECKING:
    from statewise.plan import Plan
else:
    Plan = Any  # made by a later room

__all__ = ["Kind", "Kinds"]

Missing = Literal["error", "keep", "restart"]

# Words that a kind may not be called: they name something else where kinds are named.
RESERVED = frozenset({"self", "objects", "mesh", "copy"})


# Where an argument's annotation ends in `| Any`, a wrong type is refused here, with the mend.


@dataclasses.dataclass(frozen=True, eq=True)
class Kind:
    """Which leaves make up one kind of state, and how that kind lives.

    Args:
      of: which leaves: any NNX filter (a type, a tag, a callable, `nnx.All(...)`) or one of ours.  `...` claims
        what no other kind of the same declaration does.
      frozen: no step ever writes it, no optimizer ever touches it.
      saved: it is persisted; False declares it ephemeral.
      missing: what a restore does for a leaf that the checkpoint lacks: `"error"`, `"keep"` (the value that the
        target has) or `"restart"`; averages then begin with what is restored.
      restart: makes a fresh array from the current one, of the same shape and dtype; `jnp.zeros_like`, say.  It may
        also take `path`, the leaf's path as a tuple, and `key`, a PRNG key for each leaf and slot: it is then called
        for each slot, with the slot's own array: `lambda array, key: init(key, array.shape, array.dtype)`.  The kind
        `optimizer` needs none: it restarts by the `init` of the plan's optimizers.
      batch_axis: the axis of this kind's arrays that holds independent slots (0 for the first), so that slots
        can be restarted one by one.
      placement: how it lies on a mesh: `sw.Replicated()`, `sw.Sharded("data", None)`, `sw.FromMetadata()`, or a
        function of (path, shape) that returns one.  None replicates; the kind `optimizer` then follows the leaves
        that it updates, and averages (`sw.Kind(sw.EMA)`) what they are of.
      optional: a kind that spells a path (`sw.Path`, `nnx.PathContains`) has to find it in the model; True says that it
        need not be there.  A kind of types may claim nothing as it is.

    Raises:
      FilterError: `of` is no filter.
      KindError: a treatment that contradicts itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> cache = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like)
      >>> cache == sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like)
      True
    """

    of: Any
    _: dataclasses.KW_ONLY
    frozen: bool = False
    saved: bool = True
    missing: Missing | Any = "error"
    restart: Callable[..., Any] | Any = None
    batch_axis: int | Any = None
    placement: Any = None
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", normalise(self.of))
        if _never(self.of):
            raise KindError(
                f"A kind of {describe(self.of)} can never claim a leaf.", mend="leave the kind out of the declaration"
            )
        if self.missing not in ("error", "keep", "restart"):
            raise KindError(f"missing={self.missing!r} is none of 'error', 'keep', 'restart'.", mend="missing='error'")
        if self.missing == "restart" and self.restart is None and self.of is not EMA:
            raise KindError(
                "missing='restart' needs to know how a fresh value is made.",
                mend=f"sw.Kind({as_code(self.of)}, missing='restart', restart=jnp.zeros_like)",
            )
        if self.restart is not None and not callable(self.restart):
            raise KindError(
                f"restart={self.restart!r} is no function of one array.",
                mend=f"sw.Kind({as_code(self.of)}, restart=jnp.zeros_like)",
            )
        if self.restart is not None and not isinstance(self.restart, Hashable):
            raise KindError(
                f"restart={type(self.restart).__name__}(...) cannot be hashed, as every part of a declaration must be.",
                mend=f"sw.Kind({as_code(self.of)}, restart=lambda array: ...)",
            )
        if self.restart is not None:
            check_restart(self.restart, _shown(self.of))
        if self.missing == "restart" and takes(self.restart).key:
            raise KindError(
                "missing='restart' calls restart without a key, and this one takes a key.",
                mend=f"sw.Kind({_shown(self.of)}, missing='keep', restart=...)\n"
                "and after the restore: state.restart(..., key=jax.random.key(0))",
            )
        if self.batch_axis is not None and (isinstance(self.batch_axis, bool) or not isinstance(self.batch_axis, int)):
            raise KindError(f"batch_axis={self.batch_axis!r} is no axis.", mend="batch_axis=0")
        _check_placement(self.placement)

    @property
    def rest(self) -> bool:
        """Whether it claims what no other kind does."""
        return self.of is Ellipsis

    def treatment(self) -> str:
        """The treatment in a few words, for tables: `frozen, not saved, restart=zeros_like`; `-` by default."""
        words = []
        if self.frozen:
            words.append("frozen")
        if not self.saved:
            words.append("not saved")
        if self.missing != "error":
            words.append(f"missing={self.missing}")
        if self.restart is not None:
            words.append(f"restart={getattr(self.restart, '__name__', repr(self.restart))}")
        if self.batch_axis is not None:
            words.append(f"batch_axis={self.batch_axis}")
        if self.placement is not None:
            words.append(f"placement={describe_placement(self.placement)}")
        if self.optional:
            words.append("optional")
        return ", ".join(words) or "-"


class Kinds(Mapping[str, Kind]):
    """The ordered declaration of the kinds of one program.

    A mapping from names to kinds, immutable, equal by value (order included) and hashable.

    Args:
      **kinds: the kinds by name.  A name is a Python identifier.

    Raises:
      KindError: a name that cannot stand, a value that is no `Kind`, or two kinds that both claim the rest.

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

    def __init__(self, /, **kinds: Kind | Any) -> None:
        for name, kind in kinds.items():
            _check_name(name)
            if not isinstance(kind, Kind):
                raise KindError(
                    f"{name}={_shown(kind)} is no Kind.", kind=name, mend=f"sw.Kinds({name}=sw.Kind({_shown(kind)}))"
                )
        rests = [name for name, kind in kinds.items() if kind.rest]
        if len(rests) > 1:
            raise KindError(
                f"The kinds {', '.join(rests)} all claim the rest (`...`); only one can.",
                mend=f"give {rests[1]} a filter of its own",
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

    def replace(self, /, **kinds: Kind | Any) -> Kinds:
        """These kinds with some of them changed, in the same order.

        Args:
          **kinds: new declarations of kinds that are there; use `|` to add one.

        Raises:
          KindError: a name that is not among these kinds.

        Example:
          >>> import statewise as sw
          >>> from flax import nnx
          >>> kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))
          >>> kinds["stats"].treatment()
          'frozen'
        """
        for name in kinds:
            if name not in self._kinds:
                raise unknown_kind(name, self)
        return Kinds(**{**self._kinds, **kinds})

    def plan(
        self,
        /,
        *objects: Any,
        optimizers: Mapping[Any, Any] | Any = None,
        averages: Mapping[Any, Any] | Any = None,
        **named: Any,
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
          ContestedError: leaves that several kinds claim, all of them.
          KindError: optimizers or averages for a kind that is not there, frozen, empty, or not made of floats; two
            optimizers for one kind, two averages of one name; a kind that spells a path which is not there; objects
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
        from statewise.plan import make_plan

        return make_plan(self, objects, optimizers, averages, named)


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise KindError(
            f"{name!r} cannot name a kind: it is no Python identifier.",
            kind=name,
            mend="a name of letters, digits and underscores, such as 'params'",
        )
    if name.startswith("_") or name in RESERVED:
        mend = f"{name.strip('_') or 'my'}_kind"
        raise KindError(f"{name!r} is reserved and cannot name a kind.", kind=name, mend=mend)


def _names_axes(entry: Any) -> bool:
    """Whether an entry of a PartitionSpec, or of a tuple that is meant as one, is what `sw.Sharded` takes."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return entry is None or all(isinstance(name, str) for name in names)


def _check_placement(placement: Any) -> None:
    if placement is None or isinstance(placement, PLACEMENTS):
        return
    if isinstance(placement, type) or not callable(placement):
        named = isinstance(placement, str | jax.P)  # of anything else its type: it may be an array
        shown = repr(placement) if named else getattr(placement, "__name__", type(placement).__name__)
        mend = "placement=sw.Sharded('data')"
        if isinstance(placement, type) and placement in PLACEMENTS:
            mend = f"placement=sw.{shown}()"
        elif isinstance(placement, str):
            mend = f"placement=sw.Sharded({placement!r})"
        elif isinstance(placement, (jax.P, tuple, list)) and all(map(_names_axes, placement)):
            mend = f"placement=sw.Sharded({', '.join(map(repr, placement))})"
        raise KindError(f"placement={shown} is no placement, nor a function that returns one.", mend=mend)
    if not isinstance(placement, Hashable):
        raise KindError(
            f"placement={type(placement).__name__}(...) cannot be hashed, as every part of a declaration must be.",
            mend="placement=lambda path, shape: ...",
        )


def unknown_kind(name: Any, kinds: Mapping[str, Any]) -> KindError:
    """The error for a kind that is not there."""
    known = f"one of: {', '.join(kinds)}" if kinds else "kinds = sw.Kinds.standard()"
    return KindError(f"There is no kind {name!r}.", kind=str(name), mend=known)


def _shown(thing: Any) -> str:
    """A filter as code, or, of what is none, its type: never an array's values."""
    try:
        return as_code(thing)
    except FilterError:
        return type(thing).__name__


def _never(filter_: Any) -> bool:
    """Whether a filter can match nothing, whatever the model."""
    return filter_ is None or filter_ is False or isinstance(filter_, nnx.Nothing) or describe(filter_) == "()"


def _standard() -> Kinds:
    import jax.numpy as jnp

    return Kinds(
        params=Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
        lora=Kind(nnx.LoRAParam),
        stats=Kind(nnx.BatchStat),
        cache=Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
        rng=Kind(nnx.RngState),
        intermediates=Kind(nnx.Any(nnx.Intermediate, nnx.Perturbation), saved=False),
        metrics=Kind(_compat.MetricState),
        optimizer=Kind(nnx.OptState),
        variables=Kind(...),
    )


_STANDARD = _standard()
