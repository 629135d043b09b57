"""`watch`: what a block of code, whatever it is made of, does to a model.

A fingerprint of every leaf is taken where the block begins and where it ends.  Nothing of the arrays is kept in
between, so that the code may donate them, and the objects themselves are held weakly.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from statewise._src.common.compare import Field, is_same_static
from statewise._src.common.object_names import given
from statewise._src.common.paths import format_path
from statewise._src.common.problems import Problems
from statewise._src.common.tables import Shown, Table
from statewise._src.core.plan import Kinds, State
from statewise._src.core.state_data import check_not_donated
from statewise._src.inspect.select.select import check_kinds
from statewise._src.inspect.watch.result import MOVED, LeafChange, changes_between, seen_table
from statewise._src.inspect.watch.snapshot import Snapshot, snapshot_of
from statewise._src.plan.kind import unknown_kind
from statewise.errors import DeclarationError, StructureError, WatchError

__all__ = ["Watch", "watch"]

# In the place of a model that is not given.
NOTHING: Any = object()


def watch(
    model: object = NOTHING,
    /,
    kinds: Kinds | None = None,
    *,
    expect: str | Sequence[str] | None = None,
    **named: object,
) -> Watch:
    """Watches a model while a block of any code runs: `nnx.jit`, plain `jax.jit`, a trainer of somebody else's.

    Use it as `with sw.watch(model) as watch:`.  After the block `watch.changed` says which kinds changed, and in which
    leaves; `print(watch)` shows it.  Where the code does not change the model but returns a new one (a state, Equinox),
    hand that over at the end of the block: `watch.compare(model)`.

    Args:
      model: a module, an `nnx.Optimizer`, a state, or a tuple or list of objects.
      kinds: the kinds to tell the leaves apart by, `Kinds.standard()` if None; a state has its own.  Leaves that no
        kind claims are watched too, under `(no kind)`.
      expect: kinds that have to change.  If given, the end of the block raises where no leaf of such a kind did, and
        where a leaf of a frozen kind did; `()` asks for the second alone.
      **named: several objects by name, instead of a tuple: `sw.watch(policy=policy, reference=reference)`.

    Returns:
      a `Watch`, to be used in a `with` statement.

    Raises:
      DeclarationError: kinds that are none, that spell a path which is not there, or that are given beside a state;
        `expect` names a kind that is not there or has no leaves; objects given by position and by name.
      FilterError: a path in a kind that could mean one leaf or another.
      StructureError: nothing to watch, no model, an abstract or a donated one; inside `jax.jit`, where there are no
        values.
      WatchError: where the block ends, and only with `expect`: an expected kind did not change, or a frozen one did.

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
    if kinds is not None:
        check_kinds(kinds)
    objects = () if model is NOTHING else tuple(model) if isinstance(model, (tuple, list)) else (model,)
    objects, names = given(objects, named, "sw.watch")
    if not objects:
        raise StructureError("There is nothing to watch.", hint="with sw.watch(model) as watch:")
    if isinstance(model, State):
        if kinds is not None and kinds != model.plan.kinds:
            raise DeclarationError("A state is watched by its own kinds.", hint="sw.watch(state)")
        kinds = model.plan.kinds
    return Watch(objects, Kinds.standard() if kinds is None else kinds, _names(expect), names)


def _names(expect: object) -> tuple[str, ...] | None:
    if expect is None or isinstance(expect, str):
        return None if expect is None else (expect,)
    names = tuple(expect) if isinstance(expect, Iterable) and not isinstance(expect, dict) else (expect,)
    if not all(isinstance(name, str) for name in names):
        raise DeclarationError(
            f"expect={expect!r} does not name kinds.", hint="expect='params', or expect=('params', 'stats')"
        )
    return names


class Watch(Shown):
    """What a block of code did to a model; made by `watch`, known when the block has ended.

    Attributes:
      kinds: the declaration that leaves are told apart by.
      expect: the kinds that had to change; None where nothing is asked.

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
        self, objects: tuple[Any, ...], kinds: Kinds, expect: tuple[str, ...] | None, names: tuple[str, ...] = ()
    ) -> None:
        self.kinds = kinds
        self._names = names
        self.expect = expect
        self._objects: tuple[Any, ...] = objects
        self._given: tuple[Any, ...] | None = None
        self._refs: tuple[Callable[[], Any], ...] = ()
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
                "This watch has been used.", hint="with sw.watch(model) as watch:  # one for each block"
            )
        self._before = snapshot_of(self._objects, self.kinds, self._names)
        held = {row.kind for row in self._before.prints.values()}
        for name in self.expect or ():
            if name not in self.kinds:
                raise unknown_kind(name, self.kinds)
            if name not in held:
                raise DeclarationError(
                    f"Kind {name!r} is expected to change, but has no leaves.",
                    kind=name,
                    hint=f"expect one of: {', '.join(kind for kind in self.kinds if kind in held)}",
                )
        self._refs = tuple(map(_reference, self._objects))
        self._objects = ()  # a state that the code replaces is not to be kept alive here
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        now, self._given = self._given, None
        refs, self._refs = self._refs, ()
        before = self._before
        if cls is not None or before is None:
            return
        after = snapshot_of(_alive(refs) if now is None else now, self.kinds, self._names, there=False)
        self._leaves = changes_between(before, after)
        self._static = {
            format_path(path): (value, after.statics[path])
            for path, value in before.statics.items()
            if path in after.statics and not is_same_static(after.statics[path], value)
        }
        self._before = Snapshot({}, {}, {})
        if self.expect is not None:
            self.check()

    def compare(self, /, *objects: object, **named: object) -> None:
        """Hands over what is to be compared at the end of the block, in the place of the objects watched.

        Args:
          *objects: the state or model that the code returned; as many as are watched.
          **named: the same by name, where objects are watched by name.

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
                    f"Watched are {', '.join(self._names) or 'objects without names'}, "
                    f"but handed over are {', '.join(names)}.",
                    hint=f"watch.compare({', '.join(f'{name}={name}' for name in self._names) or 'model'})",
                )
            objects = tuple(named[name] for name in self._names)
        if len(objects) != len(self._refs):
            raise StructureError(
                f"{len(self._refs)} objects are watched, but {len(objects)} are handed over.",
                hint="watch.compare(...)  # inside the block, with as many objects as were given to sw.watch",
            )
        self._given = objects

    # --- what was seen -------------------------------------------------------------------------------------------

    @property
    def leaves(self) -> tuple[LeafChange, ...]:
        """What became of each leaf: those that were there, in their order, then the new ones."""
        if self._leaves is None:
            raise StructureError(
                "What was seen is known when the block has ended without an error.",
                hint="with sw.watch(model) as watch:\n    train(model, x)\nprint(watch)",
            )
        return self._leaves

    @property
    def changed(self) -> dict[str, tuple[LeafChange, ...]]:
        """The leaves that changed in any way, by kind; a kind in which none did is not there."""
        return self._by_kind([change for change in self.leaves if change.what])

    @property
    def unchanged(self) -> dict[str, tuple[LeafChange, ...]]:
        """The leaves that are as they were, by kind; a kind that has none is not there."""
        return self._by_kind([change for change in self.leaves if not change.what])

    @property
    def ties(self) -> dict[str, tuple[LeafChange, ...]]:
        """By kind, the paths that are tied otherwise than they were: to another leaf, or to none, or newly."""
        return self._by_kind([change for change in self.leaves if Field.TIES in change.what])

    @property
    def missed(self) -> dict[str, tuple[LeafChange, ...]]:
        """Of the kinds expected to change, the leaves that did not; also where others of the kind did."""
        return {kind: changes for kind, changes in self.unchanged.items() if kind in (self.expect or ())}

    @property
    def violations(self) -> tuple[LeafChange, ...]:
        """The leaves of frozen kinds that changed in any way."""
        return tuple(change for change in self.leaves if change.what and self._is_frozen(change.kind))

    @property
    def static(self) -> dict[str, tuple[Any, Any]]:
        """The plain attributes of modules that changed (`deterministic`, say), by path: before and after."""
        return self._static

    def check(self) -> None:
        """Raises where nothing of an expected kind changed, or anything of a frozen one.

        Raises:
          WatchError: so it is; every such leaf is listed.
        """
        missed = self._missed_kinds()
        by_kind = self._by_kind(self.leaves)
        problems = Problems()
        for change in (change for kind in missed for change in by_kind[kind]):
            problems.add(change.leaf, change.describe() if change.what else "did not change")
        for change in self.violations:
            problems.add(change.leaf, f"frozen, but {'changed' if change.what == ('value',) else change.describe()}")
        if not problems:
            return
        frozen = list(self._by_kind(self.violations))
        # What was donated, or removed, has changed; trained it was not.
        did = "changed" if any(kind in self.missed for kind in missed) else "got new values"
        facts = ([f"nothing of {' and '.join(missed)} {did}, though that was expected"] if missed else []) + (
            [f"{' and '.join(frozen)} changed, though frozen"] if frozen else []
        )
        hints = (
            ["nnx.jit, or sw.train_step: what a function writes to a model under jax.jit is dropped"] if missed else []
        )
        hints += ["watch.compare(model) at the end of the block, where the code returns a new model"] if missed else []
        hints += ["nnx.Optimizer(model, tx, wrt=filter) with a filter that leaves them out"] if frozen else []
        fact = "; ".join(facts)
        problems.raise_as(WatchError, f"{fact[0].upper()}{fact[1:]}.", "\nor, ".join(hints))

    def _by_kind(self, changes: Sequence[LeafChange]) -> dict[str, tuple[LeafChange, ...]]:
        """Changes by kind, in the order of the declaration; what stands under no kind of it comes last."""
        names = dict.fromkeys([*self.kinds, *(change.kind for change in changes)])
        by_kind: dict[str, list[LeafChange]] = {name: [] for name in names}
        for change in changes:
            by_kind[change.kind].append(change)
        return {name: tuple(rows) for name, rows in by_kind.items() if rows}

    def _is_frozen(self, kind: str) -> bool:
        return any(self.kinds[name].frozen for name in kind.split(" and ") if name in self.kinds)

    def _missed_kinds(self) -> list[str]:
        moved = {change.kind for change in self.leaves if MOVED.intersection(change.what)}
        there = self._by_kind(self.leaves)
        return [kind for kind in there if kind in (self.expect or ()) and kind not in moved]

    # --- showing -------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """What was seen as a table: a line for each kind; below, whatever is more than other values."""
        by_kind = self._by_kind(self.leaves)
        return seen_table(by_kind, self._missed_kinds(), list(filter(self._is_frozen, by_kind)), self.static)

    def to_dict(self) -> dict[str, Any]:
        """What was seen as plain data: `expect`, `missed` (kinds), `static`, and `leaves`, a list in order."""
        return {
            "expect": None if self.expect is None else list(self.expect),
            "missed": self._missed_kinds(),
            "static": {path: list(map(_plain, values)) for path, values in self.static.items()},
            "leaves": [change.to_dict() for change in self.leaves],
        }

    def to_json(self) -> str:
        """What was seen as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _reference(thing: Any) -> Callable[[], Any]:
    """Something that gives an object back for as long as others hold it; of a dict, which cannot be asked, always."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _alive(refs: Sequence[Callable[[], Any]]) -> tuple[Any, ...]:
    objects = tuple(ref() for ref in refs)
    hint = "watch.compare(state)  # at the end of the block: what the step returned"
    if any(thing is None for thing in objects):
        raise StructureError("What was watched is no longer there; the code has made another in its place.", hint=hint)
    if isinstance(objects[0], State):
        try:
            check_not_donated(objects[0], objects[0].plan.kinds)
        except StructureError as error:
            raise StructureError(f"{error.message} What came back was not handed over.", hint=hint) from None
    return objects
