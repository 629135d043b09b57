"""`watch`: the effects of a block of any code on a model.

A fingerprint of every leaf is computed at the start and at the end of the block.  No array is kept in between, so the
code may donate them, and the objects themselves are referenced weakly.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from statewise._src.common.compare import Field, is_same_static
from statewise._src.common.object_names import given, names_given
from statewise._src.common.paths import format_path
from statewise._src.common.problems import Problems
from statewise._src.common.tables import ShownData, Table
from statewise._src.core.plan import Kinds, State
from statewise._src.core.state_data import check_not_donated
from statewise._src.inspect.select.select import chosen_kinds, objects_of
from statewise._src.inspect.watch.result import MOVED, LeafChange, changes_between, watch_table
from statewise._src.inspect.watch.snapshot import Snapshot, snapshot_of
from statewise._src.plan.kind import unknown_kind
from statewise.errors import DeclarationError, StructureError, WatchError

__all__ = ["Watch", "watch"]

# The default for a model that is not passed; `help` shows it.
NOTHING: object = ...


def watch(
    model: object = NOTHING,
    /,
    kinds: Kinds | None = None,
    *,
    expect: str | Sequence[str] | None = None,
    **named: object,
) -> Watch:
    """Watches a model while a block of any code runs: `nnx.jit`, plain `jax.jit`, another library's trainer.

    Use it as `with sw.watch(model) as watch:`.  After the block, `watch.changed` lists the kinds and leaves that
    changed; `print(watch)` shows them.  If the code does not change the model but returns a new one (a state, Equinox),
    pass that at the end of the block: `watch.compare(model)`.

    Args:
      model: a module, an `nnx.Optimizer`, a state, or a tuple or list of objects.
      kinds: the kinds by which the leaves are grouped, `Kinds.standard()` if None; a state has its own.  Leaves that no
        kind claims are watched too, under `(no kind)`.
      expect: kinds that must change.  If given, the end of the block raises an error if no leaf of such a kind changed,
        or if a leaf of a frozen kind did; `()` only checks the frozen ones.
      **named: several objects by name, instead of a tuple: `sw.watch(policy=policy, reference=reference)`.

    Returns:
      a `Watch`, to be used in a `with` statement.

    Raises:
      DeclarationError: `kinds` is not a `Kinds`, has a path that does not exist, or is passed beside a state; `expect`
        names a kind that does not exist or has no leaves; objects by position and by name.
      FilterError: a path in a kind that could mean one leaf or another.
      StructureError: nothing to watch; an object that is not a model, is abstract or was donated; inside `jax.jit`,
        which has no values.
      WatchError: at the end of the block, and only with `expect`: an expected kind did not change, or a frozen one did.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> @jax.jit  # not nnx.jit: what it writes is dropped
      ... def train(model):
      ...     model.kernel[...] -= 0.1
      >>> with sw.watch(model) as watch:
      ...     train(model)
      >>> print(watch)
      watch
      kind    leaves  changed  unchanged  remark
      ------------------------------------------
      params       2        -          2  -
    """
    declared = chosen_kinds(kinds, model.tables if isinstance(model, State) else None, "sw.watch(state)")
    objects, names = given(() if model is NOTHING else objects_of(model), named, "sw.watch")
    if not objects:
        raise StructureError("There is nothing to watch.", hint="with sw.watch(model) as watch:")
    return Watch(objects, declared, None if expect is None else names_given(expect, "expect"), names)


class Watch(ShownData):
    """The effects of a block of code on a model; made by `watch`, complete when the block has ended.

    Attributes:
      kinds: the declaration by which the leaves are grouped.
      expect: the kinds that must change; None if nothing is checked.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> with sw.watch(model) as watch:
      ...     model.mean[...] += 1
      >>> {
      ...     kind: [sw.format_path(change.path) for change in changes]
      ...     for kind, changes in watch.changed.items()
      ... }
      {'stats': ['mean']}
    """

    def __init__(
        self, objects: tuple[object, ...], kinds: Kinds, expect: tuple[str, ...] | None, names: tuple[str, ...] = ()
    ) -> None:
        self.kinds = kinds
        self.expect = expect
        self._names = names
        self._objects = objects
        self._given: tuple[object, ...] | None = None
        self._refs: tuple[Callable[[], object], ...] = ()
        self._before: Snapshot | None = None
        self._leaves: tuple[LeafChange, ...] | None = None
        self._static: dict[str, tuple[Any, Any]] = {}

    def __repr__(self) -> str:
        if self._leaves is None:
            return "<sw.results.Watch, the block has not ended>"
        return f"<sw.results.Watch, changed: {', '.join(self.changed) or 'nothing'}>"

    # --- the block -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        if self._before is not None:
            raise StructureError(
                "This watch was already used.", hint="with sw.watch(model) as watch:  # one for each block"
            )
        self._before = snapshot_of(self._objects, self.kinds, self._names)
        present = {row.kind for row in self._before.prints.values()}
        for name in self.expect or ():
            if name not in self.kinds:
                raise unknown_kind(name, self.kinds)
            if name not in present:
                raise DeclarationError(
                    f"Kind {name!r} is expected to change, but has no leaves.",
                    kind=name,
                    hint=f"expect one of: {', '.join(kind for kind in self.kinds if kind in present)}",
                )
        self._refs = tuple(map(_reference, self._objects))
        self._objects = ()  # a state that the code replaces must not be kept alive here
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Cleared in any case: a watch outlives its block, and the objects should not.
        now, self._given = self._given, None
        refs, self._refs = self._refs, ()
        before = self._before
        if cls is not None or before is None:
            return
        # Not strict: the code may have removed what a path in the kinds matches.
        after = snapshot_of(_alive(refs) if now is None else now, self.kinds, self._names, strict=False)
        self._leaves = changes_between(before, after)
        self._static = {
            format_path(path): (value, after.statics[path])
            for path, value in before.statics.items()
            if path in after.statics and not is_same_static(after.statics[path], value)
        }
        # Empty, but not None: the watch has been used.
        self._before = Snapshot({}, {}, {})
        if self.expect is not None:
            self.check()

    def compare(self, /, *objects: object, **named: object) -> None:
        """Passes the objects to compare with at the end of the block, instead of the watched objects themselves.

        Args:
          *objects: the state or model that the code returned; as many as are watched.
          **named: the same by name, if objects are watched by name.

        Raises:
          StructureError: another number of objects, or other names; some by position and some by name.

        Example:
          >>> import jax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(model).take(model)
          >>> with sw.watch(state) as watch:
          ...     state = jax.tree.map(lambda array: array + 1, state)
          ...     watch.compare(state)
          >>> list(watch.changed)
          ['params']
        """
        objects, names = given(objects, named, "watch.compare")
        if names:
            if set(names) != set(self._names):
                raise StructureError(
                    f"The watched objects are {', '.join(self._names) or 'without names'}, "
                    f"but {', '.join(names)} were passed.",
                    hint=f"watch.compare({', '.join(f'{name}={name}' for name in self._names) or 'model'})",
                )
            # In the order of `sw.watch`, since snapshots count objects by position.
            objects = tuple(named[name] for name in self._names)
        if len(objects) != len(self._refs):
            raise StructureError(
                f"{len(self._refs)} objects are watched, but {len(objects)} were passed.",
                hint="watch.compare(...)  # inside the block, with as many objects as sw.watch received",
            )
        self._given = objects

    # --- the changes ---------------------------------------------------------------------------------------------

    @property
    def leaves(self) -> tuple[LeafChange, ...]:
        """Returns the change of each leaf: those of before, in their order, then the new ones."""
        if self._leaves is None:
            raise StructureError(
                "The changes are known once the block has ended without an error.",
                hint="with sw.watch(model) as watch:\n    train(model, x)\nprint(watch)",
            )
        return self._leaves

    @property
    def changed(self) -> dict[str, tuple[LeafChange, ...]]:
        """Returns the leaves that changed in any way, by kind, without kinds that have none."""
        return self._by_kind(change for change in self.leaves if change.what)

    @property
    def unchanged(self) -> dict[str, tuple[LeafChange, ...]]:
        """Returns the leaves that did not change, by kind, without kinds that have none."""
        return self._by_kind(change for change in self.leaves if not change.what)

    @property
    def ties(self) -> dict[str, tuple[LeafChange, ...]]:
        """Returns, by kind, the paths whose ties changed: to another leaf, to none, or newly tied."""
        return self._by_kind(change for change in self.leaves if Field.TIES in change.what)

    @property
    def missed(self) -> dict[str, tuple[LeafChange, ...]]:
        """Returns the leaves of expected kinds that did not change, including those of kinds in which others did."""
        return {kind: changes for kind, changes in self.unchanged.items() if kind in (self.expect or ())}

    @property
    def violations(self) -> tuple[LeafChange, ...]:
        """Returns the leaves of frozen kinds that changed in any way."""
        return tuple(change for change in self.leaves if change.what and self._is_frozen(change.kind))

    @property
    def static(self) -> dict[str, tuple[Any, Any]]:
        """Returns the plain attributes of modules that changed (such as `deterministic`), by path: before and after."""
        return self._static

    def check(self) -> None:
        """Checks that something of each expected kind changed, and nothing of a frozen one.

        Raises:
          WatchError: something else happened; all such leaves are listed.
        """
        missed, by_kind = self._missed_kinds(), self._by_kind(self.leaves)
        problems = Problems()
        for change in (change for kind in missed for change in by_kind[kind]):
            problems.add(change.leaf, change.describe() if change.what else "did not change")
        for change in self.violations:
            problems.add(change.leaf, f"frozen, but {'changed' if change.what == ('value',) else change.describe()}")
        facts, hints = [], []
        if missed:
            # A leaf that was donated or removed did change, but it was not trained.
            did = "changed" if any(kind in self.missed for kind in missed) else "got new values"
            facts.append(f"nothing of {' and '.join(missed)} {did}, although that was expected")
            hints.append("nnx.jit, or sw.train_step: what a function writes to a model under jax.jit is dropped")
            hints.append("watch.compare(model) at the end of the block, if the code returns a new model")
        if self.violations:
            facts.append(f"{' and '.join(self._by_kind(self.violations))} changed, although frozen")
            hints.append("nnx.Optimizer(model, tx, wrt=filter) with a filter that leaves them out")
        fact = "; ".join(facts)
        problems.raise_as(WatchError, f"{fact[:1].upper()}{fact[1:]}.", "\nor, ".join(hints))

    def _by_kind(self, changes: Iterable[LeafChange]) -> dict[str, tuple[LeafChange, ...]]:
        """Groups changes by kind, in the order of the declaration; leaves that no kind claims come last."""
        by_kind: dict[str, list[LeafChange]] = {name: [] for name in self.kinds}
        for change in changes:
            by_kind.setdefault(change.kind, []).append(change)
        return {name: tuple(rows) for name, rows in by_kind.items() if rows}

    def _is_frozen(self, kind: str) -> bool:
        return any(self.kinds[name].frozen for name in kind.split(" and ") if name in self.kinds)

    def _missed_kinds(self) -> list[str]:
        moved = {change.kind for change in self.leaves if MOVED.intersection(change.what)}
        return [kind for kind in self._by_kind(self.leaves) if kind in (self.expect or ()) and kind not in moved]

    # --- display -------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """Returns the changes as a table: a line for each kind; below, all changes of more than values."""
        by_kind = self._by_kind(self.leaves)
        return watch_table(by_kind, self._missed_kinds(), list(filter(self._is_frozen, by_kind)), self.static)

    def to_dict(self) -> dict[str, Any]:
        """Returns the changes as plain data: `expect`, `missed` (kinds), `static`, and `leaves`, a list in order."""
        return {
            "expect": None if self.expect is None else list(self.expect),
            "missed": self._missed_kinds(),
            "static": {path: list(map(_plain, values)) for path, values in self.static.items()},
            "leaves": [change.to_dict() for change in self.leaves],
        }


def _plain(value: object) -> object:
    # JSON has no NaN and no infinity.
    is_plain = isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else repr(value)


def _reference(item: object) -> Callable[[], object]:
    """Returns a function that returns an object while others refer to it; for a dict, which cannot tell, always."""
    try:
        return weakref.ref(item)
    except TypeError:
        return lambda: item


def _alive(refs: Sequence[Callable[[], object]]) -> tuple[object, ...]:
    objects = tuple(ref() for ref in refs)
    hint = "watch.compare(state)  # at the end of the block: what the step returned"
    if any(item is None for item in objects):
        raise StructureError("The watched object no longer exists: the code made a new one instead.", hint=hint)
    first = objects[0]
    if isinstance(first, State):
        try:
            check_not_donated(first, first.plan.kinds)
        except StructureError as error:
            raise StructureError(f"{error.message} The returned state was not passed to `watch`.", hint=hint) from None
    return objects
