"""`audit`: a step is traced as its first call would trace it, and what is known then is written down.

Nothing runs and nothing is compiled, so that it works on abstract states, and on a step that a call would refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from statewise._src.common.paths import Leaf
from statewise._src.core.member_view import as_one, is_of_one_member
from statewise._src.core.plan import Kinds, State
from statewise._src.core.templates import abstract
from statewise._src.inspect.audit.result import Audit, LeafAudit
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explained, sharding_of_type
from statewise._src.step.aot import no_state
from statewise._src.step.contract import Contract
from statewise._src.step.definition import Definition
from statewise._src.step.dependence import zero_gradients
from statewise._src.step.function import called_as
from statewise._src.step.operands import Operand
from statewise._src.step.shard_map import traced_on_one
from statewise._src.step.step import Step, definition_of
from statewise._src.step.step_update import step_updates
from statewise._src.step.trace import Traced
from statewise._src.step.warnings import check_trains, warnings_of
from statewise.errors import StatewiseError, StructureError, UndeclaredWriteError

__all__ = ["audit"]


def audit(step: Callable[..., Any], state: object, /, *args: object, **kwargs: object) -> Audit:
    """Tells what a step does to a state, without running it: it is traced, not compiled, and nothing is donated.

    A step that writes what it does not declare, or trains nothing, is reported too (`audit.error` is what a call would
    raise), and so is what a call would warn of (`audit.warnings`); whatever else a call would refuse while it traces is
    refused here.

    Args:
      step: what `sw.step` or `sw.train_step` made; or a plain function of objects, as people write under `nnx.jit`.
      state: a state, or an abstract one (`plan.abstract()`); of an ensemble, where the step sees one member and its
        arguments.  For a plain function also a model, or a tuple or list of
        objects: they are planned by `Kinds.standard()`, and left as they are.
      *args: the step's other arguments; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: the same by name.

    Returns:
      the audit; it prints as a table.

    Raises:
      StructureError: no state; a loss that is no real scalar; and whatever tracing the step raises it for.
      DeclarationError: the step names a kind that is not there.

    Example:
      >>> import jax, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).abstract()
      >>> @sw.train_step
      ... def train(model, x):
      ...     return (model(x) ** 2).mean()
      >>> print(sw.audit(train, state, jax.ShapeDtypeStruct((4, 2), "float32")))
      audit of train
      kind    leaves  read  written  differentiated  zero gradient  passed to jit  donated  saved  restarts
      -----------------------------------------------------------------------------------------------------
      params       4     4        4               4              -              4        4  yes    -
      stats        2     2        2               -              -              2        2  yes    -
    """
    if type(state) is State and state.tables.ensemble is not None:
        state = as_one(state) if is_of_one_member(state) else State.wrap(abstract(state.tables.ensemble.single))
    if isinstance(step, Step):
        if type(state) is not State:
            raise no_state(definition_of(step).name, state)
        return _audit(step, state, args, kwargs)
    plan_state = state if type(state) is State else _planned(state)
    plain, arrays = _plain_step(step, plan_state, args, kwargs)
    return _audit(plain, plan_state, (arrays,), {})


def _planned(model: Any) -> State:
    """The state of a model, or of several objects, as they are: nothing is copied."""
    objects = tuple(model) if isinstance(model, (tuple, list)) else (model,)
    plan = Kinds.standard().plan(*objects)
    return plan.abstract()


def _plain_step(fn: Any, state: State, args: Any, kwargs: Any) -> tuple[Step, list[Any]]:
    """A plain function as a step of arrays that may write everything; and the arrays among its arguments.

    What is no array (a flag, a name, a function) stays as it is, as `static_argnames` has it.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    objects = [type(leaf).__name__ for leaf in leaves if _is_object(leaf)]
    name = getattr(fn, "__name__", type(fn).__name__)
    said = called_as(name, "f")
    if objects:
        raise StructureError(
            f"{name} is given {objects[0]} as an argument; what it does to an object is told of those before them.",
            hint=f"sw.audit({said}, (model, {objects[0].lower()}), ...)",
        )
    own = getattr(fn, "__self__", fn)
    if isinstance(own, nnx.Pytree):
        called = "model" if own is fn else f"model.{said}"
        raise StructureError(
            f"{called} brings its {type(own).__name__} along; what it does to an object is told of those that it is "
            "given.",
            hint=f"sw.audit(lambda model, *args: {called}(*args), model, ...)",
        )
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)]
    count = state.tables.object_count

    def bound(*given: Any) -> Any:
        filled = list(leaves)
        for place, array in zip(places, given[count], strict=True):
            filled[place] = array
        own_args, own_kwargs = jax.tree.unflatten(structure, filled)
        return fn(*given[:count], *own_args, **own_kwargs)

    bound.__name__ = name
    return Step(bound if callable(fn) else fn, _no_contract, "step", None, {}), [leaves[place] for place in places]


_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)


def _is_object(thing: Any) -> bool:
    return isinstance(thing, (nnx.Pytree, nnx.Variable)) and not isinstance(thing, nnx.State)


def _no_contract(plan: PlanTables, name: str) -> Contract:
    """The contract of a plain function: it declares nothing, so it may write all."""
    return Contract(frozenset(plan.kinds), (), {}, (), False, False, True, "@sw.step(writes={kinds})")


def _audit(step: Step, state: State, args: Any, kwargs: Any) -> Audit:
    definition = definition_of(step)
    plan, name = state.tables, definition.name
    contract = definition.contract_of(plan, name)
    # As in a first call, but for the refusal: an instrument shows what it sees.
    allows_all = dataclasses.replace(contract, allowed=frozenset(plan.kinds))
    lenient = dataclasses.replace(definition, contract_of=lambda *_: allows_all)
    # Under disable_jit a loop unrolls, and everything in it looks written.
    with jax.disable_jit(False), explained(name, state, args, kwargs):
        traced, *_ = lenient.trace_checked(state, args, kwargs)
        touched = _Touched(definition, plan, traced, contract)
        zero = _zero_gradients(plan, traced, contract)
    error: StatewiseError | None = None
    try:
        with jax.disable_jit(False):
            definition.check_writes(traced, contract, state, args, kwargs)
        check_trains(plan, traced, contract, step.fn, name)
    except (UndeclaredWriteError, StructureError) as refusal:
        error = refusal.with_traceback(None)
    warnings = tuple(warnings_of(plan, traced, contract, step.fn, name))
    rows = tuple(_row(plan, leaf, numbers, touched, zero) for leaf, numbers in _numbers_of_leaves(plan))
    return Audit(name, contract.trains, rows, plan.kinds, error, warnings)


class _Touched:
    """What a step does to the arrays of a state, as sets of their numbers among all arrays of the plan."""

    def __init__(self, definition: Definition, plan: PlanTables, traced: Traced, contract: Contract) -> None:
        operands = definition.make_entry(plan, traced, contract).operands
        self.donated = _numbers(plan, operands.donated)
        self.passed_to_jit = self.donated | _numbers(plan, operands.read_only)
        self.packed = {array.number for array in plan.arrays if array.buffer is not None}
        by_function = set(plan.numbers(traced.written))
        self.undeclared = set(plan.numbers(spot for spot in traced.written if spot[0] not in contract.allowed))
        self.differentiated = _differentiated(plan, contract)
        moments: set[int] = set()
        for update in step_updates(plan, contract.groups, traced.written):
            moments |= update.writes - self.differentiated
        # An array of its own is passed only if it is read or written; one in a buffer, also because of its neighbours.
        alone = self.passed_to_jit - self.packed
        self.updated = (self.differentiated | moments | (self.donated & alone)) - (by_function - self.differentiated)
        self.written = by_function | self.updated
        in_function = {number for number in range(traced.inputs) if traced.effects.read[number]}
        self.read = in_function | self.differentiated | moments | (alone - self.donated)


def _differentiated(plan: PlanTables, contract: Contract) -> set[int]:
    return {array.number for group in contract.groups for array in plan.arrays_of(group).sources}


def _numbers(plan: PlanTables, operands: Sequence[Operand]) -> set[int]:
    return {number for one in operands for slot in one.slots for number in plan.stored[one.name][slot].numbers}


def _numbers_of_leaves(plan: PlanTables) -> list[tuple[Leaf, list[int]]]:
    """Each leaf, kind by kind, with the numbers of its arrays."""
    # A leaf that holds None has no array, and a row all the same.
    found: dict[int, tuple[Leaf, list[int]]] = {id(leaf): (leaf, []) for leaf in plan.leaves}
    for array in plan.arrays:
        found[id(array.leaf)][1].append(array.number)
    order = list(plan.kinds)
    return sorted(found.values(), key=lambda entry: order.index(entry[0].kind or ""))


def _row(plan: PlanTables, leaf: Leaf, numbers: Collection[int], touched: _Touched, zero: Collection[int]) -> LeafAudit:
    kind = plan.kinds[leaf.kind or ""]

    def any_in(chosen: Collection[int]) -> bool:
        return any(number in chosen for number in numbers)

    written, differentiated = any_in(touched.written), any_in(touched.differentiated)
    return LeafAudit(
        leaf=leaf,
        read=any_in(touched.read),
        written=written,
        updated=any_in(touched.updated),
        differentiated=differentiated,
        zero_gradient=differentiated and all(number in zero for number in numbers),
        passed_to_jit=any_in(touched.passed_to_jit),
        donated=any_in(touched.donated),
        returned=any_in(touched.donated),
        packed=any_in(touched.packed),
        undeclared=any_in(touched.undeclared),
        saved=kind.saved,
        written_but_not_saved=written and not kind.saved,
        restarts=kind.restart is not None,
    )


def _zero_gradients(plan: PlanTables, traced: Traced, contract: Contract) -> set[int]:
    """The numbers of the differentiated arrays whose gradient is zero whatever the values."""
    if not contract.trains:
        return set()
    differentiated = _differentiated(plan, contract)
    read = [number for number, is_read in enumerate(traced.effects.read) if is_read]
    shapes = {
        number: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=sharding_of_type(var.aval))
        for number, var in zip(read, traced.effects.jaxpr.invars, strict=True)
    }
    wrt = {number: shape for number, shape in shapes.items() if number in differentiated}
    others = {number: shape for number, shape in shapes.items() if number not in differentiated}

    def loss_of(wrt: dict[int, Any], others: dict[int, Any]) -> Any:
        values = wrt | others
        return traced.run([values.get(number) for number in range(len(traced.effects.read))])[0][0]

    zero: list[bool] = []

    def traced_again() -> Traced:
        zero.extend(zero_gradients(loss_of, wrt, others))
        return traced

    # On a mesh the loss may speak of its axes.
    traced_again() if plan.per_device is None else traced_on_one(plan.per_device, traced_again)
    # What is not read has no gradient either.
    return differentiated - {number for number, is_zero in zip(sorted(wrt), zero, strict=True) if not is_zero}
