"""Collects what a function sows or assigns, without letting it into the state.

Flax records sown values in two ways: inside `nnx.capture`, in a separate place; outside of it, as new Variables of the
module (which newer versions warn about).  `Capture` handles both: it runs the function under `nnx.capture` for the
Variable types that the captured kinds claim, and collects new Variables of these kinds, which a function may also
assign itself (`self.kl_loss = Loss(...)`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from statewise._src.common.nested_state import flat_items, nested
from statewise._src.common.nnx_graph import named, raw_value, row_of
from statewise._src.common.paths import Path
from statewise._src.common.problems import Problems
from statewise._src.filters.combinators import predicate
from statewise._src.filters.explain import type_only
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.leaf_specs import LeafSpec
from statewise._src.plan.match import claimants
from statewise._src.plan.tables import PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["Capture"]

# The error of nnx.pop about the tuple in which nnx.capture keeps sown values.
_POPPED = re.compile(r"Cannot pop key .* from node of type tuple")


# The position of an object, and what its modules sowed of one type.
Sown = tuple[int, Any]


class Capture:
    """The kinds of new leaves that a step returns beside its output.

    Args:
      kinds: the declaration.
      names: one kind, several, or none.
    """

    def __init__(self, kinds: Mapping[str, Kind], names: str | Sequence[str] | None) -> None:
        self.single = isinstance(names, str)
        self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names or ())
        for name in self.names:
            if name not in kinds:
                raise unknown_kind(name, kinds)
            if not type_only(kinds[name].of):
                raise DeclarationError(
                    f"Kind {name!r} cannot be captured: its filter looks at more than the type.",
                    kind=name,
                    hint=f"{name}=sw.Kind(nnx.Intermediate, saved=False)",
                )
        self.kinds = kinds
        self._claimants = claimants(kinds)

    def __bool__(self) -> bool:
        return bool(self.names)

    def call(
        self, fn: Callable[..., Any], objects: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Sown]]:
        """Calls the function; returns its output and what was sown."""
        if not self.names:
            return fn(*objects, *args, **kwargs), []
        types, sown = self._types(), list[Sown]()
        run: Callable[[], Any] = functools.partial(fn, *objects, *args, **kwargs)
        # `nnx.capture` observes one module, so the calls are nested, one for each.
        for position, obj in enumerate(objects):
            if isinstance(obj, nnx.Module):
                run = _capturing(run, obj, position, types, sown)
        try:
            return run(), sown
        except ValueError as error:
            if not _POPPED.match(str(error)):
                raise
            names = ", ".join(map(repr, self.names))
            raise StructureError(
                f"The function pops leaves of a captured kind ({names}); nnx.capture does not let it.",
                kind=self.names[0],
                hint="take capture= out of the step's decorator: a function that pops its own leaves needs none\n"
                "or, read the Variables instead: model.loss.get_value()",
            ) from error

    def claims(self, path: Path, leaf: Any) -> bool:
        """Returns whether a new leaf belongs to a captured kind."""
        return bool(self.names) and self._claimants(path, leaf)[:1] in {(name,) for name in self.names}

    def takes(self, row: LeafSpec, now: Any) -> bool:
        """Returns whether this collector returns the change that a function made to a leaf of an earlier call.

        Args:
          row: the leaf.
          now: the Variable that the function replaced it with; None if it removed the leaf.
        """
        return row.kind in self.names if now is None else self.claims(row.path, now)

    def collect(
        self, plan: PlanTables, live: Mapping[Path, Any], assigned: frozenset[Path], out: Any, sown: Sequence[Sown]
    ) -> Any:
        """Returns the step's output: unchanged, or (output, captured).

        Args:
          plan: the plan.
          live: all leaves after the call, by path.
          assigned: the paths of planned leaves that the function replaced.
          out: what the function returned.
          sown: what `nnx.capture` collected.

        Raises:
          StructureError: the function both assigns and sows under one name.
        """
        if not self.names:
            return out
        flat: dict[str, dict[Any, Any]] = {name: {} for name in self.names}
        planned = {row.path for row in plan.rows} - assigned
        # What the function assigned, or sowed outside of `nnx.capture`, is among the leaves of the objects.
        for path, leaf in live.items():
            if path not in planned:
                flat[self._claimants(path, leaf)[0]][path] = raw_value(leaf)
        problems = Problems()
        for position, state in sown:
            for path, leaf in flat_items(state):
                # `nnx.capture` runs once for each object: its paths start there.
                full = named((position, *path), plan.names) if plan.several else path
                values = flat[self._claimants(path, leaf)[0]]
                if full in values:
                    problems.add(row_of(full, leaf))
                values[full] = raw_value(leaf)
        problems.raise_as(
            StructureError,
            "The function sows under a name to which it also assigns a Variable.",
            "self.sow(nnx.Intermediate, 'another_name', value)",
        )
        states = {name: nested(leaves.items()) for name, leaves in flat.items()}
        return out, states[self.names[0]] if self.single else states

    def _types(self) -> tuple[type, ...]:
        """Returns the Variable types that a captured kind claims: `nnx.capture` needs each one exactly."""
        # A filter that looks only at the type can be evaluated on an empty instance.
        matches = [predicate(self.kinds[name].of) for name in self.names]
        return tuple(
            cls
            for cls in dict.fromkeys(_subclasses(nnx.Variable))
            if any(match((), object.__new__(cls)) for match in matches)
        )


def _capturing(
    run: Callable[[], Any], module: nnx.Module, position: int, types: tuple[type, ...], sown: list[Sown]
) -> Callable[[], Any]:
    """Wraps a call so that it also appends what the module sows to `sown`."""

    def captured() -> Any:
        # `nnx.capture` walks over the module in the mode that is set, and in tree mode refuses shared ones.  What the
        # function calls is left in its own mode.
        mode = nnx.set_graph_mode.current_value()

        def in_own_mode(_: nnx.Module) -> Any:
            with nnx.set_graph_mode(mode):
                return run()

        with nnx.set_graph_mode(True):
            out, *states = nnx.capture(in_own_mode, *types)(module)
        sown.extend((position, state) for state in states)
        return out

    return captured


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    below: list[type] = cls.__subclasses__()
    for subclass in below:
        yield from _subclasses(subclass)
