"""One kind of state: which leaves belong to it, and how they are handled.

A `Kind` is a filter with its handling.  It is pure data: equal by value, hashable, and creating one has no effect.
Everything else reads it through a plan, which resolves it against a model.

What can be declared, with the part of Statewise that reads it in brackets:

- `frozen` [steps]: no step writes it, and no optimizer updates it;
- `saved` [steps, checkpoints]: it is saved; a kind that is not saved is *ephemeral*, and a train step writes it only if
  it declares that it does;
- `missing` [checkpoints]: what a restore does for a leaf that the checkpoint lacks;
- `restart` [State.restart]: how a fresh value is made from the current one, a key and the path;
- `batch_axis` [State.restart]: the axis that holds independent slots;
- `placement` [sharding]: how its arrays are placed on a mesh;
- `compute` [steps]: the dtype in which the functions of steps see it;
- `depends_on`, `stale` [steps]: the kinds that its values were made from, and what happens once those have changed;
- `optional` [matching]: a path in its filter need not exist in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.paths import Path
from statewise._src.filters.combinators import Filter, describe, normalize
from statewise._src.filters.explain import as_code
from statewise._src.plan.ema import EMA
from statewise._src.plan.fresh_values import check_restart, takes
from statewise._src.plan.placements import PLACEMENTS, Placement, axes_of, describe_placement
from statewise.errors import DeclarationError, FilterError

__all__ = ["Kind", "shown", "unknown_kind", "with_kinds"]

Missing = Literal["error", "keep", "restart"]
Stale = Literal["error", "restart", "keep"]


@dataclasses.dataclass(frozen=True, eq=True)
class Kind:
    """Declares which leaves make up one kind of state, and how they are handled.

    Args:
      of: which leaves: any NNX filter (a type, a tag, a callable, `nnx.All(...)`) or one of Statewise's.  `...` claims
        every leaf that no other kind of the declaration claims.
      frozen: no step writes the kind, and no optimizer updates it.
      saved: checkpoints hold the kind; False declares it ephemeral.
      missing: what a restore does for a leaf that the checkpoint lacks: `"error"`, `"keep"` (the target's value) or
        `"restart"`; averages then restart from the restored values.
      restart: makes a fresh array of the same shape and dtype from the current one, such as `jnp.zeros_like`.  It may
        also take `path`, the leaf's path as a tuple, and `key`, a PRNG key for each leaf and slot.  With `key` it is
        called once for each slot, with the slot's own array: `lambda array, key: init(key, array.shape, array.dtype)`.
        The kind `optimizer` needs none: it restarts by the `init` of the plan's optimizers.
      batch_axis: the axis of the kind's arrays that holds independent slots (0 for the first), so that slots can be
        restarted one by one.
      placement: how the kind is placed on a mesh: `sw.Replicated()`, `sw.Sharded("data", None)`, `sw.FromMetadata()`,
        `sw.PerDevice("data")`, or a function of (path, shape) that returns one of these.  None replicates; the kind
        `optimizer` then follows the leaves that it updates, and averages (`sw.Kind(sw.EMA)`) the values they track.
      compute: the floating-point dtype in which the functions of steps see the kind, such as `"bfloat16"`; a step casts
        floating-point leaves when it reads them, gradients arrive in the state's own dtype, and what a function writes
        is cast back, so it is rounded.  The state, the optimizer and checkpoints keep their dtypes.  None casts
        nothing.
      depends_on: the kinds whose values this one's are made from, as a cache is made from `("params", "lora")`; one
        name or several.  Once one of them has changed, the kind is *stale*, until it restarts or a step writes all of
        it without reading it.  What such a kind itself depends on counts as well.
      stale: what a step does that reads the kind while it is stale: `"error"` raises `StaleError`, `"restart"` restarts
        it first, `"keep"` reads it as it is.
      optional: a path in the filter (`sw.Path`, `nnx.PathContains`) must exist in the model unless this is True.  A
        filter of types alone may claim nothing.

    Raises:
      FilterError: `of` is not a filter.
      DeclarationError: the arguments contradict each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> cache = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like)
      >>> cache == sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like)
      True
    """

    of: Filter
    _: dataclasses.KW_ONLY
    frozen: bool = False
    saved: bool = True
    missing: Missing = "error"
    restart: Callable[..., Any] | None = None
    batch_axis: int | None = None
    placement: Placement | Callable[[Path, tuple[int, ...]], Placement | None] | None = None
    compute: Any = None
    depends_on: Sequence[str] = ()
    stale: Stale = "error"
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", normalize(self.of))
        if _never(self.of):
            raise DeclarationError(
                f"A kind of {describe(self.of)} can never claim a leaf.", hint="leave the kind out of the declaration"
            )
        if self.missing not in get_args(Missing):
            raise DeclarationError(
                f"missing={self.missing!r} is not one of 'error', 'keep', 'restart'.", hint="missing='error'"
            )
        # Averages need no function: they restart from the restored values that they track.
        if self.missing == "restart" and self.restart is None and self.of is not EMA:
            raise DeclarationError(
                "missing='restart' needs a function that makes a fresh value.",
                hint=f"sw.Kind({as_code(self.of)}, missing='restart', restart=jnp.zeros_like)",
            )
        if self.restart is not None:
            check_restart(self.restart, shown(self.of))
        if self.missing == "restart" and takes(self.restart).key:
            raise DeclarationError(
                "missing='restart' calls restart without a key, but this one takes a key.",
                hint=f"sw.Kind({shown(self.of)}, missing='keep', restart=...)\n"
                "and after the restore: state.restart(..., key=jax.random.key(0))",
            )
        if self.batch_axis is not None and (isinstance(self.batch_axis, bool) or not isinstance(self.batch_axis, int)):
            raise DeclarationError(f"batch_axis={self.batch_axis!r} is not an axis.", hint="batch_axis=0")
        _check_placement(self.placement)
        if self.compute is not None:
            object.__setattr__(self, "compute", _compute_dtype(self.compute))
        object.__setattr__(self, "depends_on", _kind_names(self.depends_on))
        _check_stale(self)

    @property
    def rest(self) -> bool:
        """Returns whether the kind claims what no other kind does."""
        return self.of is Ellipsis

    def handling(self) -> str:
        """Returns the handling in a few words, for tables: `frozen, not saved, restart=zeros_like`; `-` by default."""
        restart = getattr(self.restart, "__name__", repr(self.restart))
        words = {
            "frozen": self.frozen,
            "not saved": not self.saved,
            f"missing={self.missing}": self.missing != "error",
            f"restart={restart}": self.restart is not None,
            f"batch_axis={self.batch_axis}": self.batch_axis is not None,
            f"placement={describe_placement(self.placement)}": self.placement is not None,
            f"compute={self.compute}": self.compute is not None,
            f"depends_on={'+'.join(self.depends_on)}": bool(self.depends_on),
            f"stale={self.stale}": self.stale != "error",
            "optional": self.optional,
        }
        return ", ".join(word for word, applies in words.items() if applies) or "-"


def _compute_dtype(given: Any) -> str:
    """Returns the name of a floating-point dtype."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        named = repr(given) if isinstance(given, str) else dtype or type(given).__name__
        raise DeclarationError(f"compute={named} is not a floating-point dtype.", hint="compute='bfloat16'")
    return dtype.name


def _kind_names(given: Any) -> tuple[str, ...]:
    """Returns the names of the kinds that a kind depends on."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        named = repr(names) if isinstance(names, tuple | list) else type(given).__name__
        raise DeclarationError(
            f"depends_on={named} is not the name of a kind, nor several names.", hint="depends_on=('params',)"
        )
    return tuple(dict.fromkeys(names))


def _check_stale(kind: Kind) -> None:
    """Checks that what a kind does when it is stale can be done."""
    if kind.stale not in get_args(Stale):
        raise DeclarationError(f"stale={kind.stale!r} is not one of 'error', 'restart', 'keep'.", hint="stale='error'")
    declared = f"sw.Kind({shown(kind.of)}, depends_on={kind.depends_on!r}"
    if kind.stale != "error" and not kind.depends_on:
        raise DeclarationError(
            f"stale={kind.stale!r} says what happens to a kind that depends on others, and this one depends on none.",
            hint=f"sw.Kind({shown(kind.of)}, depends_on='params', stale={kind.stale!r})",
        )
    if kind.stale != "restart":
        return
    if kind.frozen:
        raise DeclarationError("stale='restart' would restart a kind that is frozen.", hint=f"{declared}, frozen=True)")
    if kind.restart is None:
        raise DeclarationError(
            "stale='restart' needs a function that makes a fresh value.",
            hint=f"{declared}, stale='restart', restart=jnp.zeros_like)",
        )
    if takes(kind.restart).key:
        raise DeclarationError(
            "stale='restart' calls restart without a key, but this one takes a key.",
            hint=f"{declared}, restart=...)\n"
            "and where a step raises StaleError: state.restart(..., key=jax.random.key(0))",
        )


def _check_placement(placement: Any) -> None:
    if placement is None or isinstance(placement, PLACEMENTS):
        return
    if isinstance(placement, type) or not callable(placement):
        is_short = isinstance(placement, str | jax.P)  # anything else is named by its type: it may be an array
        shown = repr(placement) if is_short else getattr(placement, "__name__", type(placement).__name__)
        hint = "placement=sw.Sharded('data')"
        if isinstance(placement, type) and placement in PLACEMENTS:
            hint = f"placement=sw.{shown}()"
        elif isinstance(placement, str):
            hint = f"placement=sw.Sharded({placement!r})"
        elif isinstance(placement, (jax.P, tuple, list)) and all(
            isinstance(name, str) for axis in placement for name in axes_of(axis)
        ):  # the entries of a PartitionSpec, which `sw.Sharded` accepts too
            hint = f"placement=sw.Sharded({', '.join(map(repr, placement))})"
        raise DeclarationError(f"placement={shown} is not a placement, nor a function that returns one.", hint=hint)
    if not isinstance(placement, Hashable):
        raise DeclarationError(
            f"placement={type(placement).__name__}(...) cannot be hashed, as every part of a declaration must be.",
            hint="placement=lambda path, shape: ...",
        )


def unknown_kind(name: Any, kinds: Mapping[str, Any]) -> DeclarationError:
    """Returns the error for a kind that does not exist."""
    known = f"one of: {', '.join(kinds)}" if kinds else "kinds = sw.Kinds.standard()"
    return DeclarationError(f"There is no kind {name!r}.", kind=str(name), hint=known)


def with_kinds(kinds: Mapping[str, Kind], changed: Mapping[str, Kind]) -> Mapping[str, Kind]:
    """Returns the declaration with these kinds added; they replace those of the same name."""
    declaration: Any = type(kinds)  # a user's `Kinds`, which is above this package
    return declaration(**{**kinds, **changed}) if changed else kinds


def shown(value: object) -> str:
    """Returns a filter as code, and anything else as its type: never the values of an array."""
    try:
        return as_code(value)
    except FilterError:
        return type(value).__name__


def _never(filter_: Filter) -> bool:
    """Returns whether a filter matches nothing in any model."""
    return filter_ is None or filter_ is False or isinstance(filter_, nnx.Nothing) or describe(filter_) == "()"
