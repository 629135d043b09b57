"""Derived arrays: what a plan keeps beside a model's own leaves, array by array made from some of them.

The state of an optimizer is derived from the parameters that it updates, an average from what it is of.  Both have no
Variable in the model: they begin when a state is taken, stand in a kind's part after whatever the model has there, and
have paths of their own.  All that places, packs, saves, moves and shows a state reads them as `Derived`.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import abc
import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.narrowing import Casts
from statewise._src.common.nnx_graph import ONE, ArraySpec, make_leaf, value_of
from statewise._src.common.paths import Leaf, Path
from statewise.errors import StructureError

__all__ = [
    "WITHOUT_INTEGERS",
    "Companions",
    "Derived",
    "DerivedLayout",
    "check_no_loss",
    "keys_within",
    "plain_key",
    "unfit",
]

WITHOUT_INTEGERS = (
    "claim them by a kind of their own: "
    "sw.Kind(sw.Where(lambda path, leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact)))"
)


class DerivedLayout(NamedTuple):
    """What derived arrays are made of.

    Attributes:
      structure: their structure as a pytree.
      paths: the path of each within it.
      specs: shape and dtype of each.
      roots: how many keys of each path come before the path of the leaf that it is for; None where that is not known.
    """

    structure: Any
    paths: tuple[Path, ...]
    specs: tuple[ArraySpec, ...]
    roots: tuple[int | None, ...] = ()


class Companions(NamedTuple):
    """Which derived arrays are made element by element of one source each, and so may be packed in its order.

    Attributes:
      signatures: for each source what is computed; those of equal signatures may share a buffer.
      own: for each source the derived arrays that go with it, by their order.
    """

    signatures: tuple[Hashable, ...]
    own: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Derived(abc.ABC):
    """Arrays that are made from the leaves of some kinds: of a plan's *sources*.

    A new kind of derived arrays is a subclass, and a `step_update` for it where train steps move it.

    Attributes:
      trains: whether a train step moves the sources themselves by it, by their gradients.
      mirrors: whether its first arrays are each a value of the source in the same place, and can stand in for it.
      kinds: the names of the kinds.
      rows: path, shapes and structure of the leaves, in the order of the plan.
      overridden: shapes and dtypes of what was cast, or is of an ensemble, where they differ from what `init` makes.
    """

    trains: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False

    kinds: tuple[str, ...]
    rows: tuple[tuple[Path, tuple[ArraySpec, ...], Any], ...]
    overridden: tuple[ArraySpec, ...] | None = dataclasses.field(default=None, kw_only=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Derived) and type(other) is type(self) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self.kinds, self.rule, len(self.rows)))

    def _identity(self) -> tuple[Any, ...]:
        return self.kinds, self.rule, self.rows, self.overridden

    @property
    @abc.abstractmethod
    def rule(self) -> Hashable:
        """What it is made by: two that are made by equal rules from equal leaves are equal."""

    @property
    def label(self) -> str | None:
        """The key of its own pytree in `state[kind]`; None where its arrays are shown by their paths."""
        return None

    def companions(self) -> Companions | None:
        """Returns which of its arrays may be packed in the order of the sources; None where it is to stay apart."""
        return None

    @property
    @abc.abstractmethod
    def into(self) -> str:
        """The kind that the arrays stand in."""

    @property
    @abc.abstractmethod
    def layout(self) -> DerivedLayout:
        """What they are made of."""

    @property
    @abc.abstractmethod
    def leaf_paths(self) -> tuple[Path, ...]:
        """The path of each among the leaves of the plan."""

    @abc.abstractmethod
    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """Them, fresh, from the arrays of the leaves; all are copies, for steps donate what a state holds."""

    @functools.cached_property
    def paths(self) -> tuple[Path, ...]:
        """The path of each array of the leaves: its leaf's, and, where a Variable holds several, the keys within."""
        found: list[Path] = []
        for path, specs, structure in self.rows:
            found.extend(path + keys for keys in keys_within(structure, len(specs)))
        return tuple(found)

    def params(self, arrays: Sequence[Any]) -> Any:
        """The leaves' arrays, in order, as an `nnx.State` of plain arrays, nested by path."""
        flat: list[tuple[Any, Any]] = list(zip(self.paths, arrays, strict=True))
        return nnx.from_flat_state(flat)

    def arrays(self, params: Any) -> list[Any]:
        """Returns the leaves' arrays in order, from the nested state: the inverse of `params`."""
        flat: dict[Any, Any] = dict(nnx.to_flat_state(params))
        return [flat[path] for path in self.paths]

    def recast(self, params: Mapping[Path, tuple[ArraySpec, ...]], own: Sequence[ArraySpec]) -> "Derived":
        """The same of leaves (by path) of other shapes or dtypes, itself of these."""
        rows = tuple((path, params[path], structure) for path, _, structure in self.rows)
        plain = dataclasses.replace(self, rows=rows, overridden=None)
        # Where it is what `init` would make, it is as good as new, and its plan the same.
        as_made = plain.layout.specs == tuple(own)
        return plain if as_made else dataclasses.replace(plain, overridden=tuple(own))


def check_no_loss(paths: Sequence[Path], into: str, arrays: Sequence[Any], specs: Sequence[ArraySpec]) -> None:
    """Refuses to begin with numbers that the dtype of what is derived does not have.

    Raises:
      StructureError: all the leaves.
    """
    casts = Casts()
    for path, array, spec in zip(paths, arrays, specs, strict=False):
        if getattr(array, "dtype", None) != spec.dtype:
            casts.add(make_leaf(path, jax.Array, [spec], True, into), array, spec.dtype)
    casts.check(StructureError, _WIDER)


_WIDER = "a wider dtype: averages={'params': sw.EMA(0.999, dtype=jnp.float32)}; of an optimizer, another state.cast"


def keys_within(structure: Any, count: int) -> list[Path]:
    """The keys of each array within the value of its leaf."""
    if structure is ONE:
        return [()]
    keyed = jax.tree_util.tree_flatten_with_path(value_of(range(count), structure))[0]
    return [tuple(map(plain_key, keys)) for keys, _ in keyed]


def plain_key(key: Any) -> Any:
    """A JAX key entry as a path key: an attribute's name, a dict's key, a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def unfit(rows: Sequence[Any], note: str) -> list[Leaf]:
    """Those of a plan's rows that are not made of floating-point numbers."""
    return [
        make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, note=note)
        for row in rows
        if any(not jnp.issubdtype(spec.dtype, jnp.inexact) for spec in row.specs)
    ]
