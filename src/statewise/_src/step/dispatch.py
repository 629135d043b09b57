"""One compiled step, for one plan and one signature, and how a call reaches it.

An entry selects from a state's parts the arrays that the compiled function needs, calls it, and puts the results into a
new state.  The cost does not depend on the size of the model, only on what the step touches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.compat import is_untraced
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems
from statewise._src.core.part import Part
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_unshared, deleted_kinds, donated_error
from statewise._src.core.usable import check_concrete
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import UNKNOWN, PartShardings, is_on_one_device
from statewise._src.step.arguments import Args, Arguments, Kwargs, merged
from statewise._src.step.function import called_as
from statewise._src.step.operands import Operands
from statewise._src.step.shard_map import specs_of
from statewise._src.step.staleness import Staleness
from statewise.errors import PlacementError, StatewiseError, StructureError

__all__ = ["CompiledStep", "NewSignature", "args_key", "full_key"]


class NewSignature(Exception):
    """Raised when JAX starts to trace a compiled step again: the call has a signature that it was not made for."""


# The entry that may be traced right now, in this thread.
_tracing = threading.local()

# The runtime's errors about arrays that are deleted, or donated twice.
# JAX's own phrases: an error of a callback quotes source code, ours too, which speaks of donation.
_ABOUT_BUFFERS = re.compile(
    r"has been deleted|deleted or donated|donate the same buffer|previously donated|donate a buffer", re.IGNORECASE
)


@dataclasses.dataclass(eq=False)
class CompiledStep:
    """A compiled step.

    Attributes:
      plan: the plan.
      name: the step's name.
      program: from (donated, read_only, args, kwargs) to (written, output); the function that is compiled.
      operands: the arrays that are passed to it.
      arguments: how the step's other arguments are passed.
      returns_state: whether a call returns a state beside the output.
      closes_over_tracers: whether the program belongs to an outer trace, and cannot be used after it.
      staleness: what it does about kinds that depend on others; None if it has to do with none.
      ready: whether it has been called successfully.
    """

    plan: PlanTables
    name: str
    program: Callable[..., Any]
    operands: Operands
    arguments: Arguments
    returns_state: bool
    closes_over_tracers: bool
    staleness: Staleness | None = None
    ready: bool = False

    def __post_init__(self) -> None:
        # Computed once: these are all that a call needs of the operands.
        operands = self.operands
        self._donates = tuple((operand.kind, operand.pick) for operand in operands.donated)
        self._keeps = tuple((operand.kind, operand.pick) for operand in operands.read_only)
        self._touches = tuple({operand.kind for operand in (*operands.donated, *operands.read_only)})
        self._gives = tuple(
            (operand.kind, None if operand.pick is None else operand.slots) for operand in operands.donated
        )
        # Empty, and None, in a plan in which no kind depends on others.
        self._may_be_stale = () if self.staleness is None else self.staleness.may_be_stale
        self._records = self.staleness if self.staleness is not None and self.staleness.affected else None
        # Compilations of the program: by whether it receives the written arrays' buffers, and by their shardings.
        self._fns: dict[Any, jax.stages.Wrapped] = {}
        self._traced: dict[Any, jax.stages.Wrapped] = {}

    def _checked(self, donated: Any, given: Any, read_only: Any, args: Any, kwargs: Any) -> Any:
        # JAX calls this only to trace.  Outside `tracing`, that means a signature that was not checked yet.
        if getattr(_tracing, "entry", None) is not self:
            raise NewSignature
        return self.program(donated, read_only, *merged(args, kwargs, given))

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Allows JAX to trace this entry within a block, in this thread."""
        before = getattr(_tracing, "entry", None)
        _tracing.entry = self
        try:
            yield
        finally:
            _tracing.entry = before

    def operands_from(self, state: State, args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
        """Selects the arguments of the compiled function from a state and the step's arguments."""
        parts = state.parts
        donated = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._donates]
        read_only = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._keeps]
        if self.arguments.plain:
            return donated, {}, read_only, args, kwargs
        split = self.arguments.split(args, kwargs, self.plan.object_count)
        return donated, split.donated, read_only, split.args, split.kwargs

    def run(self, state: State, args: Args, kwargs: Kwargs, fn: Callable[..., Any] | None = None) -> Any:
        """Calls the compiled function, or another compilation of it, on a state.

        Raises:
          NewSignature: the entry was not made for these arguments; nothing has happened.
          StructureError: the state was donated, or holds one array twice.
          StaleError: the step reads a kind that is stale.
        """
        parts = state.parts
        for kind in self._touches:
            if parts[kind].donated_by is not None:
                touched = [name for number, name in enumerate(self.plan.kinds) if number in self._touches]
                raise donated_error(state, [name for name in touched if state.part(name).donated_by])
        for kind in self._may_be_stale:
            if parts[kind].origin is not None:
                state = self.not_stale(state)
                parts = state.parts
                break
        operands = self.operands_from(state, args, kwargs)
        donate = True
        places: tuple[PartShardings | None, ...] = ()
        try:
            if fn is not None:
                written, out = fn(*operands)
            else:
                # Inside a transform the transform owns the arrays, so nothing may be donated: `vmap` may use one for
                # all members, and `grad` still needs it.  A tracer does not know its sharding either.
                untraced = is_untraced()
                donate = untraced and not _looks_for_nans()
                places = self._places(parts) if untraced else ()
                written, out = self._call((donate, places), operands)
        except StatewiseError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            self._explain(state, args, kwargs, error)
            raise
        return (self.received(state, written, donate, places), out) if self.returns_state else out

    def not_stale(self, state: State) -> State:
        """Returns a state in which nothing is stale that the step reads; see `Staleness.checked`."""
        return state if self.staleness is None else self.staleness.checked(state, self.name)

    def _places(self, parts: Sequence[Part]) -> tuple[PartShardings | None, ...]:
        """Returns the shardings of the parts that are written: the new arrays get the same ones."""
        return tuple([parts[kind].places() for kind, _ in self._gives])

    def _call(self, key: Any, operands: tuple[Any, ...]) -> Any:
        fn = self._traced.get(key)
        if fn is not None:
            return fn(*operands)
        fn = self.compiled(*key)
        if self._traced:
            # A different compilation of this program was traced already; only that one can tell whether the signature
            # is new.
            jax.eval_shape(next(iter(self._traced.values())), *operands)
        with self.tracing() if self._traced else contextlib.nullcontext():
            results = fn(*operands)
        self._traced[key] = fn
        return results

    def compiled(self, donate: bool, places: tuple[PartShardings | None, ...]) -> jax.stages.Wrapped:
        """Returns the function, compiled for parts with these shardings; `()` leaves them to XLA."""
        if not any(places):
            places = ()
        if (donate, places) not in self._fns:
            written = None
            if places:
                written = tuple(
                    None if shardings is None else tuple(shardings.shardings[slot] for slot in operand.slots)
                    for shardings, operand in zip(places, self.operands.donated, strict=True)
                )
            self._fns[donate, places] = self.arguments.jit(self._checked, donate, written)
        return self._fns[donate, places]

    def lower(self, state: State, args: Args, kwargs: Kwargs) -> jax.stages.Lowered:
        """Lowers the function for a state, which may be abstract, and these arguments."""
        return self.compiled(True, self._places(state.parts)).lower(*self.operands_from(state, args, kwargs))

    def received(
        self, state: State, written: Any, donated: bool = True, places: tuple[PartShardings | None, ...] = ()
    ) -> State:
        """Returns the state with new arrays where they were written; marks the old one as donated if it was."""
        parts = state.parts
        new = list(parts)
        for index, ((kind, positions), arrays) in enumerate(zip(self._gives, written, strict=True)):
            shardings = places[index] if places else UNKNOWN
            if (shardings is None and not is_on_one_device(arrays[0])) or (
                shardings is not None and not shardings.whole
            ):
                shardings = UNKNOWN  # XLA may have chosen some of them
            if positions is not None:
                merged_arrays = list(parts[kind].arrays)
                for position, array in zip(positions, arrays, strict=True):
                    merged_arrays[position] = array
                arrays = tuple(merged_arrays)
            new[kind] = Part(arrays, shardings)
        if donated:
            for kind, _ in self._gives:
                parts[kind].donated_by = self.name
        if self._records is not None:
            self._records.settle(parts, new)
        return State.make(self.plan, new)

    def _explain(self, state: State, args: Args, kwargs: Kwargs, error: Exception) -> None:
        """Explains a runtime error about arrays that are deleted, donated twice, or abstract."""
        check_concrete(
            jax.tree.leaves(state),
            f"run {self.name} on",
            "state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)\n"
            f"ahead of time: {called_as(self.name)}.lower(state, ...).compile()",
            cause=error,
        )
        deleted = deleted_kinds(state)
        if "incompatible devices" in str(error):
            self._check_other_devices(state, args, kwargs, error)
        if not _ABOUT_BUFFERS.search(str(error)):
            if deleted:
                error.add_note(f"{self.name} had already donated the state's {', '.join(deleted)}: this state is lost.")
            return
        if deleted:
            raise donated_error(state, deleted) from error
        check_unshared(state)
        leaf_of = {id(array): leaf for leaf, array in self._stored(state, range(len(state.parts)))}
        for array in jax.tree.leaves((args, kwargs)):
            if isinstance(array, compat.Tracer) or not isinstance(array, jax.Array):
                continue
            if array.is_deleted():
                raise StructureError(
                    f"An argument of {self.name}, {array.dtype}{list(array.shape)}, was donated by an earlier step.",
                    hint="copy it before that step: kept = jnp.copy(array)",
                ) from error
            if id(array) in leaf_of:
                leaf = leaf_of[id(array)]
                raise StructureError(
                    f"An argument of {self.name} is an array of the state, which the step donates.",
                    leaves=[leaf],
                    kind=leaf.kind,
                    hint="pass a copy: jnp.copy(array)",
                ) from error

    def _check_other_devices(self, state: State, args: Args, kwargs: Kwargs, error: Exception) -> None:
        """Raises for arrays on devices other than those of the first array of the state that the step touches."""
        touched = self._stored(state, sorted(self._touches))
        expected = next((_devices(array) for _, array in touched if _devices(array)), ())
        problems = Problems()
        for leaf, array in touched:
            if _devices(array) not in ((), expected):
                problems.add(leaf, f"on {_listed(_devices(array))}")
        given = [
            f"{name}{jax.tree_util.keystr(path)} on {_listed(_devices(leaf))}"
            for name, value in self.arguments.named(args, kwargs, self.plan.object_count)
            for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
            if isinstance(leaf, jax.Array) and _devices(leaf) not in ((), expected)
        ]
        if not problems and not given:
            return
        arguments = f" Of its arguments: {'; '.join(given[:10])}." if given else ""
        hints = []
        if given and len(expected) == 1:
            hints = ["state = jax.device_put(state, plan.shardings(mesh))  # or restore it there: plan.abstract(mesh)"]
        elif given:
            hints = ["x = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))  # the state's mesh"]
        if problems:
            hints.append("state = jax.device_put(state, plan.shardings(mesh))  # everything on one mesh")
        raise PlacementError(
            f"{self.name} got arrays on different devices; the state is on {_listed(expected)}.{arguments}",
            leaves=problems.leaves,
            kind=problems.leaves[0].kind if problems else None,
            hint="\n".join(hints),
        ) from error

    def _stored(self, state: State, kinds: Iterable[int]) -> list[tuple[Leaf, Any]]:
        """Returns what the state stores of some kinds, each array with its leaf."""
        slots = list(self.plan.stored.values())
        pairs = [pair for kind in kinds for pair in zip(slots[kind], state.parts[kind].arrays, strict=True)]
        return [(slot.leaf, array) for slot, array in pairs]


def _devices(array: Any) -> tuple[int, ...]:
    """Returns the ids of the devices that an array must stay on; empty for one that JAX may move."""
    if isinstance(array, compat.Tracer) or not getattr(array, "committed", False):
        return ()
    return tuple(sorted(device.id for device in array.sharding.device_set))


def _listed(devices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, devices[:8])) + (", ..." if len(devices) > 8 else "")
    return f"device {shown}" if len(devices) == 1 else f"devices {shown}"


def args_key(args: Args, kwargs: Kwargs, arguments: Arguments, plan: PlanTables) -> Any:
    """Returns a cheap key for the arguments of a signature: structure, shapes, dtypes and static values.

    For a step that runs on each device of a mesh, or in microbatches, the key also contains how they are split.

    Raises:
      StructureError: a static argument that cannot be hashed.
    """
    split = arguments.split(args, kwargs, plan.object_count)
    leaves, structure = jax.tree.flatten((split.args, split.kwargs, split.donated))
    static = tuple(split.static.items())
    try:
        hash(static)
    except TypeError as error:
        raise arguments.unhashable(static, plan.object_count) from error
    # 1 == 1.0 == True, but a program made for one of them does not serve the others: hence `types`.
    specs = specs_of(plan.per_device, leaves) if plan.per_device else None
    if arguments.in_parts:  # how the parts are sharded is part of the program
        specs = (
            specs,
            tuple(None if isinstance(leaf, compat.Tracer) else getattr(leaf, "sharding", None) for leaf in leaves),
        )
    types = tuple(_types(value) for value in split.static.values())
    return structure, tuple(map(_leaf_key, leaves)), static, types, specs


def _types(value: object) -> Any:
    if isinstance(value, (tuple, frozenset)):
        return type(value), tuple(map(_types, value))
    return type(value)


def _leaf_key(leaf: object) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)  # an array of keys has no weak_type
    type_ = _type_of(leaf)
    # Not an array: JAX raises a clear error when it traces it, and `plain_arguments` replaces hijax Variables.
    if isinstance(type_, type) or not hasattr(type_, "shape"):
        return type_
    return type_.shape, type_.dtype, getattr(type_, "weak_type", False)


def full_key(state: State, arguments: Any) -> Any:
    """Returns the complete key of a signature, as JAX sees it: the types of all arrays, and JAX's settings."""
    leaves = jax.tree.leaves((state, arguments))
    return _settings(), tuple(map(_type_of, leaves))


def _type_of(leaf: object) -> Any:
    try:
        return jax.typeof(leaf)
    except TypeError:
        return type(leaf)


_counter = itertools.count(1)


# The shape of the result is new in every trace, and cached with it: see `_settings`.
@jax.jit
def _probe() -> jax.Array:
    return jnp.zeros(next(_counter), bool)


def _settings() -> int:
    """Returns a number for the JAX settings that a trace depends on: matmul precision, mesh, mapped axes, 64 bits ...

    JAX traces a function once for each combination of them, so the number identifies a trace of `_probe`.
    """
    return int(jax.eval_shape(_probe).shape[0])


def _looks_for_nans() -> bool:
    """Returns whether JAX reruns a function to locate a NaN: then no argument may be donated."""
    config: Any = jax.config
    return bool(config.jax_debug_nans or config.jax_debug_infs)
