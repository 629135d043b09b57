"""One compiled step for one plan and one signature, and how a call gets to it.

An entry picks the arrays that cross out of a state's parts, calls the compiled function, and puts what comes
back into a new state.  Nothing here depends on the size of the model, only on what the step touches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from statewise._src.common import compat
from statewise._src.core.plan import State
from statewise._src.core.state_data import Part, check_unshared, deleted_kinds, donated_error
from statewise._src.core.usable import check_concrete
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import UNKNOWN, PartShardings, lies_on_one_device
from statewise._src.step.arguments import Arguments, merged
from statewise._src.step.function import called_as
from statewise._src.step.operands import Operands
from statewise._src.step.shard_map import specs_of
from statewise.errors import PlacementError, StatewiseError, StructureError

__all__ = ["CompiledStep", "NewSignature", "args_key", "full_key"]


class NewSignature(Exception):
    """JAX began to trace a compiled step anew: the call is of a signature that it was not made for."""


# Which entry may be traced right now, in this thread.
_tracing = threading.local()

# How the runtime speaks of arrays that are no longer there, or are given away twice.
_ABOUT_BUFFERS = re.compile(r"delete|donat", re.IGNORECASE)


class CompiledStep:
    """A compiled step.

    Attributes:
      program: from (donated, kept, args, kwargs) to (written, output); what is compiled.
      routes: which arrays cross.
    """

    def __init__(
        self,
        plan: PlanTables,
        name: str,
        program: Callable[..., Any],
        routes: Operands,
        arguments: Arguments,
        *,
        returns_state: bool,
        closes_over_tracers: bool,
    ) -> None:
        self.plan = plan
        self.name = name
        self.program = program
        self.routes = routes
        self.arguments = arguments
        self.objects = plan.object_count
        self.returns_state = returns_state
        self.closes_over_tracers = closes_over_tracers
        self.ready = False
        self._donates = tuple((route.kind, route.pick) for route in routes.donated)
        self._keeps = tuple((route.kind, route.pick) for route in routes.kept)
        self._touches = tuple({route.kind for route in (*routes.donated, *routes.kept)})
        self._gives = tuple((route.kind, None if route.pick is None else route.slots) for route in routes.donated)
        # Compilations of one program: by whether it is given the written arrays' buffers, and where these lie.
        self._fns: dict[Any, Any] = {}
        self._traced: dict[Any, Any] = {}

    def _checked(self, donated: Any, given: Any, kept: Any, args: Any, kwargs: Any) -> Any:
        if getattr(_tracing, "entry", None) is not self:
            raise NewSignature
        return self.program(donated, kept, *merged(args, kwargs, given))

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Lets JAX trace this entry, for the length of a block, in this thread."""
        before = getattr(_tracing, "entry", None)
        _tracing.entry = self
        try:
            yield
        finally:
            _tracing.entry = before

    def operands(self, state: State, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What the compiled function is called with."""
        parts = state.parts
        donated = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._donates]
        kept = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._keeps]
        if self.arguments.plain:
            return donated, {}, kept, args, kwargs
        split = self.arguments.split(args, kwargs, self.objects)
        return donated, split.given, kept, split.args, split.kwargs

    def run(self, state: State, args: Any, kwargs: Any, fn: Callable[..., Any] | None = None) -> Any:
        """Calls the compiled function, or another compilation of it, on a state.

        Raises:
          NewSignature: it was not made for these arguments; nothing has happened then.
          StructureError: the state was donated, or holds one array twice.
        """
        parts = state.parts
        for kind in self._touches:
            if parts[kind].donated_by is not None:
                self._check_donated(state)
        operands = self.operands(state, args, kwargs)
        donate = True
        places: tuple[PartShardings | None, ...] = ()
        try:
            if fn is not None:
                written, out = fn(*operands)
            else:
                untraced = get_opaque_trace_state() == _UNTRACED
                donate = untraced and not _looks_for_nans()
                places = self._places(parts) if untraced else ()
                written, out = self._call((donate, places), operands)
        except StatewiseError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            self._explain(state, args, kwargs, error)
            raise
        return (self.received(state, written, donate, places), out) if self.returns_state else out

    def _places(self, parts: Sequence[Part]) -> tuple[PartShardings | None, ...]:
        """Where the parts that are written lie: what they become is to lie there too."""
        return tuple([parts[kind].places() for kind, _ in self._gives])

    def _call(self, key: Any, operands: tuple[Any, ...]) -> Any:
        fn = self._traced.get(key)
        if fn is not None:
            return fn(*operands)
        fn = self.compiled(*key)
        if self._traced:
            # Only another compilation knows yet whether this is its signature.
            jax.eval_shape(next(iter(self._traced.values())), *operands)
            with self.tracing():
                results = fn(*operands)
        else:
            results = fn(*operands)
        self._traced[key] = fn
        return results

    def compiled(self, donate: bool, places: tuple[PartShardings | None, ...]) -> Any:
        """The function of what crosses, compiled for parts that lie so; not at all for `()`."""
        if not any(places):
            places = ()
        if (donate, places) not in self._fns:
            written = None
            if places:
                written = tuple(
                    None if lie is None else tuple(lie.shardings[at] for at in route.slots)
                    for lie, route in zip(places, self.routes.donated, strict=True)
                )
            self._fns[donate, places] = self.arguments.jit(self._checked, donate, written)
        return self._fns[donate, places]

    def lower(self, state: State, args: Any, kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function for a state, which may be abstract, and these arguments."""
        lowered: jax.stages.Lowered = self.compiled(True, self._places(state.parts)).lower(
            *self.operands(state, args, kwargs)
        )
        return lowered

    def received(
        self, state: State, written: Any, donated: bool = True, places: tuple[PartShardings | None, ...] = ()
    ) -> State:
        """The state with its written arrays replaced; the one whose arrays were donated for it is marked donated."""
        parts = state.parts
        made = list(parts)
        for at, ((kind, positions), arrays) in enumerate(zip(self._gives, written, strict=True)):
            lie = places[at] if places else UNKNOWN
            if (lie is None and not lies_on_one_device(arrays[0])) or (lie is not None and not lie.whole):
                lie = UNKNOWN  # XLA may have laid out some of them
            if positions is not None:
                merged_arrays = list(parts[kind].arrays)
                for position, array in zip(positions, arrays, strict=True):
                    merged_arrays[position] = array
                arrays = tuple(merged_arrays)
            made[kind] = Part(arrays, lie)
        if donated:
            for kind, _ in self._gives:
                parts[kind].donated_by = self.name
        return State.make(self.plan, made)

    def _check_donated(self, state: State) -> None:
        names = list(self.plan.kinds)
        raise donated_error(state, [names[kind] for kind in sorted(self._touches) if state.parts[kind].donated_by])

    def _explain(self, state: State, args: Any, kwargs: Any, error: Exception) -> None:
        """Says what the runtime's error means, where it is about arrays that are gone, given twice, or never there."""
        check_concrete(
            jax.tree.leaves(state),
            f"run {self.name} on",
            "state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)\n"
            f"ahead of time: {called_as(self.name)}.lower(state, ...).compile()",
            cause=error,
        )
        gone = deleted_kinds(state)
        if "incompatible devices" in str(error):
            self._check_other_devices(state, args, kwargs, error)
        if not _ABOUT_BUFFERS.search(str(error)):
            if gone:
                error.add_note(f"{self.name} had already taken the state's {', '.join(gone)}: this state is lost.")
            return
        if gone:
            raise donated_error(state, gone) from error
        check_unshared(state)
        leaves = jax.tree.leaves((args, kwargs))
        mine = {
            id(array): (kind, position)
            for kind, part in zip(self.plan.kinds, state.parts, strict=True)
            for position, array in enumerate(part.arrays)
        }
        for leaf in leaves:
            if isinstance(leaf, compat.Tracer) or not isinstance(leaf, jax.Array):
                continue
            if leaf.is_deleted():
                raise StructureError(
                    f"An argument of {self.name}, {leaf.dtype}{list(leaf.shape)}, was donated by an earlier step.",
                    hint="copy it before that step: kept = jnp.copy(array)",
                ) from error
            if id(leaf) in mine:
                kind, position = mine[id(leaf)]
                raise StructureError(
                    f"An argument of {self.name} is an array of the state, which the step donates.",
                    leaves=[self.plan.leaf_of_slot[kind][position]],
                    kind=kind,
                    hint="pass a copy: jnp.copy(array)",
                ) from error

    def _check_other_devices(self, state: State, args: Any, kwargs: Any, error: Exception) -> None:
        """Raises for arrays that lie on other devices than what the step touches first of the state."""
        touched = [(kind, array, self.plan.leaf_of_slot[kind][slot]) for kind, slot, array in self._touched(state)]
        where = next((_devices(array) for _, array, _ in touched if _devices(array)), ())
        leaves = [
            dataclasses.replace(leaf, note=f"on {_listed(_devices(array))}")
            for _, array, leaf in touched
            if _devices(array) not in ((), where)
        ]
        given = [
            f"{name}{jax.tree_util.keystr(path)} on {_listed(_devices(leaf))}"
            for name, value in self._named(args, kwargs)
            for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
            if isinstance(leaf, jax.Array) and _devices(leaf) not in ((), where)
        ]
        if not leaves and not given:
            return
        arguments = f" Of its arguments {'; '.join(given[:10])}." if given else ""
        hints = []
        if given and len(where) == 1:
            hints = ["state = jax.device_put(state, plan.shardings(mesh))  # or restored there: plan.abstract(mesh)"]
        elif given:
            hints = ["x = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))  # the state's mesh"]
        if leaves:
            hints.append("state = jax.device_put(state, plan.shardings(mesh))  # all of it on one mesh")
        raise PlacementError(
            f"{self.name} got arrays that lie on different devices; the state lies on {_listed(where)}.{arguments}",
            leaves=list(dict.fromkeys(leaves)),
            kind=leaves[0].kind if leaves else None,
            hint="\n".join(hints),
        ) from error

    def _named(self, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
        """The arguments by their names."""
        yield from ((self.arguments.name_of(place, self.objects), value) for place, value in enumerate(args))
        yield from kwargs.items()

    def _touched(self, state: State) -> Iterator[tuple[str, int, Any]]:
        """Kind, slot and array of all that the step touches; of a kind that it touches, all arrays."""
        for number in sorted(self._touches):
            kind = tuple(self.plan.kinds)[number]
            yield from ((kind, slot, array) for slot, array in enumerate(state.parts[number].arrays))


def _devices(array: Any) -> tuple[int, ...]:
    """The devices that an array has to stay on, by number; none for one that JAX may move."""
    if isinstance(array, compat.Tracer) or not getattr(array, "committed", False):
        return ()
    return tuple(sorted(device.id for device in array.sharding.device_set))


def _listed(devices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, devices[:8])) + (", ..." if len(devices) > 8 else "")
    return f"device {shown}" if len(devices) == 1 else f"devices {shown}"


def args_key(args: Any, kwargs: Any, arguments: Arguments, plan: PlanTables) -> Any:
    """What tells the arguments of one signature from another's, cheaply: structure, shapes, dtypes, static values.

    Where a step runs on each device of a mesh, also how they are split among them.

    Raises:
      StructureError: a static argument that cannot be hashed.
    """
    split = arguments.split(args, kwargs, plan.object_count)
    leaves, structure = jax.tree.flatten((split.args, split.kwargs, split.given))
    static = tuple(split.static.items())
    try:
        hash(static)
    except TypeError as error:
        raise arguments.unhashable(static, plan.object_count) from error
    # 1 == 1.0 == True, but a program made for one of them is another program.
    specs = specs_of(plan.per_device, leaves) if plan.per_device else None
    types = tuple(_types(value) for value in split.static.values())
    return structure, tuple(map(_leaf_key, leaves)), static, types, specs


def _types(value: Any) -> Any:
    if isinstance(value, (tuple, frozenset)):
        return type(value), tuple(map(_types, value))
    return type(value)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)  # an array of keys has none
    try:
        type_ = jax.typeof(leaf)
    except TypeError:
        return type(leaf)  # JAX says so too, when it is traced
    if not hasattr(type_, "shape"):
        return type_  # no array: a hijax Variable, which is refused
    return type_.shape, type_.dtype, getattr(type_, "weak_type", False)


def full_key(state: State, arguments: Any) -> Any:
    """What tells one signature from another in full, as JAX sees it: the types of all arrays, and its settings."""
    leaves = jax.tree.leaves((state, arguments))
    return _settings(), tuple(map(_type_of, leaves))


def _type_of(leaf: Any) -> Any:
    try:
        return jax.typeof(leaf)
    except TypeError:
        return type(leaf)


_counter = itertools.count(1)


@jax.jit
def _probe() -> jax.Array:
    return jnp.zeros(next(_counter), bool)


def _settings() -> int:
    """A number for the settings of JAX that a trace depends on: matmul precision, mesh, mapped axes, 64 bits ...

    JAX traces a function once for each of them.  So that is what is asked: in which of its traces are we?
    """
    return int(jax.eval_shape(_probe).shape[0])


# Inside a transform it is the transform that owns the arrays: `vmap` may go on to use one for all, and `grad` looks
# back at it.  Nor does a tracer tell where its array lies.
_UNTRACED = get_opaque_trace_state()


def _looks_for_nans() -> bool:
    """Whether JAX runs a function once more where a NaN arises, to find out where: it needs what it was given."""
    config: Any = jax.config
    return bool(config.jax_debug_nans or config.jax_debug_infs)
