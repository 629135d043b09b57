"""Derived arrays: what a plan keeps beside a model's own leaves, array by array made from some of them.

The state of an optimizer is derived from the parameters that it updates, an average from the values that it tracks.
Neither has a Variable in the model: it is created when a state is taken, comes after the model's arrays in the part of
its kind, and has paths of its own.  Everything that places, packs, saves, moves or displays a state reads it as
`Derived`.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import abc
import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.narrowing import Casts
from statewise._src.common.nested_state import flat_items, nested
from statewise._src.common.nnx_graph import ONE, ArraySpec, make_leaf, value_of
from statewise._src.common.paths import Path, plain_key
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.leaf_specs import LeafSpec
from statewise.errors import DeclarationError, StructureError

__all__ = ["Companions", "Derived", "DerivedLayout", "LeafRow", "check_no_loss", "keys_within", "sources_of"]

# Path, shapes and structure of a leaf that something is derived from.
LeafRow = tuple[Path, tuple[ArraySpec, ...], Any]

_WIDER = "a wider dtype: averages={'params': sw.EMA(0.999, dtype=jnp.float32)}; of an optimizer, another state.cast"
_WITHOUT_INTEGERS = (
    "claim them by a kind of their own: "
    "sw.Kind(sw.Where(lambda path, leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact)))"
)


class DerivedLayout(NamedTuple):
    """The layout of derived arrays.

    Attributes:
      structure: their structure as a pytree.
      paths: the path of each within it.
      specs: shape and dtype of each.
      roots: for each path, how many keys come before the path of the leaf that it belongs to; None if that is unknown.
    """

    structure: Any
    paths: tuple[Path, ...]
    specs: tuple[ArraySpec, ...]
    roots: tuple[int | None, ...] = ()


class Companions(NamedTuple):
    """The derived arrays that are computed element by element from one source each, and so may be packed in its order.

    Attributes:
      signatures: for each source, what is computed; sources with equal signatures may share a buffer.
      own: for each source, the indices of the derived arrays that belong to it.
    """

    signatures: tuple[Hashable, ...]
    own: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Derived(abc.ABC):
    """Arrays that are made from the leaves of some kinds, their *sources*.

    A new sort of derived arrays is a subclass, and a `step_update` for it if train steps update it.

    Attributes:
      trains: whether a train step uses it to update the sources themselves, by their gradients.
      mirrors: whether its first arrays are values of the sources, in the same order, that can replace them.
      kinds: the names of the sources' kinds.
      rows: path, shapes and structure of the sources' leaves, in the order of the plan.
      overridden: shapes and dtypes after a cast, or of an ensemble, where they differ from what `init` makes.
    """

    trains: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False

    kinds: tuple[str, ...]
    rows: tuple[LeafRow, ...]
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
        """Returns how it is made: derived arrays with equal rules and equal sources are equal."""

    @property
    def label(self) -> str | None:
        """Returns the key of its own pytree in `state[kind]`; None if its arrays are displayed by their paths."""
        return None

    def companions(self) -> Companions | None:
        """Returns which of its arrays may be packed in the order of the sources; None if none may."""
        return None

    @property
    @abc.abstractmethod
    def into(self) -> str:
        """Returns the kind that its arrays belong to."""

    @property
    @abc.abstractmethod
    def layout(self) -> DerivedLayout:
        """Returns the layout of its arrays."""

    @property
    @abc.abstractmethod
    def leaf_paths(self) -> tuple[Path, ...]:
        """Returns the path of each array among the leaves of the plan."""

    @abc.abstractmethod
    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """Returns its arrays, newly made from the sources' arrays; all are copies, because steps donate a state."""

    @functools.cached_property
    def paths(self) -> tuple[Path, ...]:
        """Returns the path of each source array: its leaf's, and the keys within if a Variable holds several."""
        return tuple(path + keys for path, specs, of in self.rows for keys in keys_within(of, len(specs)))

    @functools.cached_property
    def source_specs(self) -> tuple[ArraySpec, ...]:
        """Returns shape and dtype of each source array."""
        return tuple(spec for _, specs, _ in self.rows for spec in specs)

    @property
    def container(self) -> type:
        """Returns the container in which `params` nests arrays."""
        return compat.state_type()

    def params(self, arrays: Sequence[Any]) -> Any:
        """Returns the sources' arrays, given in order, nested by path: plain arrays, as NNX gives them."""
        return nested(zip(self.paths, arrays, strict=True), self.container)

    def arrays(self, params: Any) -> list[Any]:
        """Returns the sources' arrays in order, from the nested state: the inverse of `params`."""
        flat = dict(flat_items(params))
        return [flat[path] for path in self.paths]

    def recast(self, params: Mapping[Path, tuple[ArraySpec, ...]], own: Sequence[ArraySpec]) -> "Derived":
        """Returns the same with other shapes or dtypes.

        Args:
          params: the new ones of the sources, by path.
          own: the new ones of its own arrays.
        """
        rows = tuple((path, params[path], structure) for path, _, structure in self.rows)
        plain = dataclasses.replace(self, rows=rows, overridden=None)
        # If `init` would make these dtypes anyway, nothing is overridden, and the plan equals a newly made one.
        return plain if plain.layout.specs == tuple(own) else dataclasses.replace(plain, overridden=tuple(own))


def check_no_loss(paths: Sequence[Path], into: str, arrays: Sequence[Any], specs: Sequence[ArraySpec]) -> None:
    """Checks that the dtypes of derived arrays can represent the numbers that they start from.

    Raises:
      StructureError: some cannot; lists all of them.
    """
    casts = Casts()
    for path, array, spec in zip(paths, arrays, specs, strict=False):  # a count has no array to start from
        if getattr(array, "dtype", None) != spec.dtype:
            casts.add(make_leaf(path, jax.Array, [spec], True, into), array, spec.dtype)
    casts.check(StructureError, _WIDER)


def keys_within(structure: Any, count: int) -> list[Path]:
    """Returns the keys of each array within the value of its leaf."""
    if structure is ONE:
        return [()]
    keyed = jax.tree_util.tree_flatten_with_path(value_of(range(count), structure))[0]
    return [tuple(map(plain_key, keys)) for keys, _ in keyed]


def sources_of(
    noun: str, names: Sequence[str], kinds: Mapping[str, Kind], rows: Sequence[LeafSpec], note: str
) -> tuple[LeafSpec, ...]:
    """Returns the leaves of the kinds that an optimizer or an average is declared for.

    Args:
      noun: what is declared: `optimizer`.
      names: the names of the kinds.
      kinds: the declaration.
      rows: the leaves of the model.
      note: what an error reports about a leaf that is not made of floating-point numbers.

    Raises:
      DeclarationError: a kind that does not exist, is frozen, or has no leaves; leaves that are not made of
        floating-point numbers.
    """
    for name in names:
        if name not in kinds:
            raise unknown_kind(name, kinds)
        if kinds[name].frozen:
            raise DeclarationError(
                f"The kind {name!r} is frozen, so it cannot have an {noun}.",
                kind=name,
                hint=f"{noun}s without {name!r}, or a declaration of {name!r} that is not frozen",
            )
    empty = [name for name in names if not any(row.kind == name for row in rows)]
    if empty or not names:
        raise DeclarationError(
            f"An {noun} is given for {', '.join(map(repr, empty)) or 'no kind'}, which claims no leaf of this model.",
            kind=empty[0] if empty else None,
            hint=f"leave that {noun} out, or correct the kind's filter",
        )
    sources = tuple(row for row in rows if row.kind in names)
    integers = [
        make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, note=note)
        for row in sources
        if any(not jnp.issubdtype(spec.dtype, jnp.inexact) for spec in row.specs)
    ]
    if integers:
        raise DeclarationError(
            f"The {noun} of {', '.join(names)} would include leaves that are not made of floating-point numbers.",
            leaves=integers,
            kind=names[0],
            hint=_WITHOUT_INTEGERS,
        )
    return sources
