"""`audit`: a step is traced as its first call would trace it, and the facts known from the trace are reported.

Nothing runs and nothing is compiled, so it works on abstract states, and on a step whose call would raise an error.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common.nnx_graph import is_array, is_object
from statewise._src.common.paths import Leaf
from statewise._src.core.member_view import as_one, is_of_one_member
from statewise._src.core.plan import Kinds, State
from statewise._src.core.templates import abstract
from statewise._src.inspect.audit.result import Audit, LeafAudit
from statewise._src.inspect.select.select import objects_of
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explained, sharding_of_type
from statewise._src.step.aot import no_state
from statewise._src.step.contract import Contract
from statewise._src.step.definition import Definition
from statewise._src.step.dependence import zero_gradients
from statewise._src.step.function import called_as
from statewise._src.step.operands import Operand
from statewise._src.step.passed_objects import plain_arguments
from statewise._src.step.shard_map import traced_on_one
from statewise._src.step.step import Step, definition_of
from statewise._src.step.step_update import step_updates
from statewise._src.step.trace import Traced
from statewise._src.step.warnings import check_trains, warnings_of
from statewise.errors import StaleError, StatewiseError, StructureError, UndeclaredWriteError

__all__ = ["audit"]


def audit(step: Callable[..., Any], state: object, /, *args: object, **kwargs: object) -> Audit:
    """Reports what a step does to a state, without running it: it is traced, not compiled, and nothing is donated.

    A step that writes what it does not declare, trains nothing, or reads a stale kind is reported too (`audit.error` is
    the error that a call would raise), and so are the warnings of a call (`audit.warnings`).  Any other error that a
    call would raise while it traces is raised here too.

    Args:
      step: the result of `sw.step` or `sw.train_step`; or a plain function of objects, as used with `nnx.jit`.
      state: a state, or an abstract one (`plan.abstract()`); for an ensemble, the step and its arguments are those of
        one member.  For a plain function also a model, or a tuple or list of objects: they are planned by
        `Kinds.standard()`, and left unchanged.
      *args: the step's other arguments; for an array, `jax.ShapeDtypeStruct` is enough.
      **kwargs: the same by name.

    Returns:
      the audit; it prints as a table.

    Raises:
      StructureError: `state` is not a state; the loss is not a real scalar; other errors of tracing the step.
      DeclarationError: the step names a kind that does not exist.

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
    # A step sees one member: its view is audited, or, for all members, the plan of one.
    if type(state) is State and state.tables.ensemble is not None:
        state = as_one(state) if is_of_one_member(state) else State.wrap(abstract(state.tables.ensemble.single))
    if isinstance(step, Step):
        if type(state) is not State:
            raise no_state(definition_of(step).name, state)
        return _audit(step, state, args, kwargs)
    planned = state if type(state) is State else Kinds.standard().plan(*objects_of(state)).abstract()
    plain, arrays = _plain_step(step, planned, args, kwargs)
    return _audit(plain, planned, (arrays,), {})


def _plain_step(fn: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Step, list[Any]]:
    """Returns a plain function as a step of arrays that may write everything, and the arrays among its arguments.

    An argument that is not an array (a flag, a name, a function) stays as it is, as with `static_argnames`.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_object)
    objects = [type(leaf).__name__ for leaf in leaves if is_object(leaf)]
    name = getattr(fn, "__name__", type(fn).__name__)
    call = called_as(name, "f")
    if objects:
        raise StructureError(
            f"{name} is given {objects[0]} as an argument; only the objects before its arguments are audited.",
            hint=f"sw.audit({call}, (model, {objects[0].lower()}), ...)",
        )
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, nnx.Pytree):
        method = "model" if owner is fn else f"model.{call}"
        raise StructureError(
            f"{method} contains its own {type(owner).__name__}; an audit only covers objects that are passed as "
            "arguments.",
            hint=f"sw.audit(lambda model, *args: {method}(*args), model, ...)",
        )
    places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
    count = state.tables.object_count

    def bound(*given: Any) -> Any:
        filled = list(leaves)
        for place, array in zip(places, given[count], strict=True):
            filled[place] = array
        own_args, own_kwargs = jax.tree.unflatten(structure, filled)
        return fn(*given[:count], *own_args, **own_kwargs)

    # Errors name the step by its function.
    bound.__name__ = name
    return Step(bound if callable(fn) else fn, _no_contract, "step", None, {}), [leaves[place] for place in places]


def _no_contract(plan: PlanTables, name: str) -> Contract:
    """Returns the contract of a plain function: it declares nothing, so it may write everything."""
    return Contract(frozenset(plan.kinds), (), {}, (), False, False, True, "@sw.step(writes={kinds})")


def _audit(step: Step, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Audit:
    definition = definition_of(step)
    plan, name = state.tables, definition.name
    args, kwargs = plain_arguments(args, kwargs) or (args, kwargs)
    contract = definition.contract_of(plan, name)
    # As in a first call, except that undeclared writes are allowed: an audit reports them.
    allows_all = dataclasses.replace(contract, allowed=frozenset(plan.kinds))
    lenient = dataclasses.replace(definition, contract_of=lambda *_: allows_all)
    # Under disable_jit a loop would unroll, and everything in it would look written.
    with jax.disable_jit(False), explained(name, state, args, kwargs):
        # Everything that a call would check is checked, with the same errors.
        traced, *_ = lenient.trace_checked(state, args, kwargs)
        touched = _touched(definition, plan, traced, contract)
        zero = _zero_gradients(plan, traced, contract) if contract.trains else set()
    error: StatewiseError | None = None
    try:
        with jax.disable_jit(False):
            definition.check_writes(traced, contract, state, args, kwargs)
        check_trains(plan, traced, contract, step.fn, name)
        staleness = definition.make_entry(plan, traced, contract).staleness
        if staleness is not None:
            staleness.check(state, name)
    except (UndeclaredWriteError, StructureError, StaleError) as refusal:
        error = refusal.with_traceback(None)
    warnings = tuple(warnings_of(plan, traced, contract, step.fn, name))
    rows = tuple(_row(plan, leaf, numbers, touched, zero) for leaf, numbers in _numbers_of_leaves(plan))
    return Audit(name, contract.trains, rows, plan.kinds, error, warnings)


def _touched(definition: Definition, plan: PlanTables, traced: Traced, contract: Contract) -> dict[str, set[int]]:
    """Returns, for facts of `LeafAudit`, the numbers of the arrays for which they hold."""
    operands = definition.make_entry(plan, traced, contract).operands
    donated = _numbers(plan, operands.donated)
    passed = donated | _numbers(plan, operands.read_only)
    packed = {array.number for array in plan.arrays if array.buffer is not None}
    by_function = set(plan.numbers(traced.written))
    differentiated = {array.number for group in contract.groups for array in plan.arrays_of(group).sources}
    updates = step_updates(plan, contract.groups, traced.written)
    moments = {number for update in updates for number in update.writes} - differentiated
    # An array of its own is passed only if it is read or written; one in a buffer, also because of the others in it.
    alone = passed - packed
    # A parameter counts as updated even if the function writes it too; what only the function writes does not.
    updated = (differentiated | moments | (donated & alone)) - (by_function - differentiated)
    in_function = set(itertools.compress(range(traced.inputs), traced.effects.read))
    # Where a step may change nothing, it selects between old values and new ones.
    kept = by_function if definition.training.may_keep else set()
    return {
        "read": in_function | differentiated | moments | (alone - donated) | kept,
        "written": by_function | updated,
        "updated": updated,
        "differentiated": differentiated,
        "passed_to_jit": passed,
        "donated": donated,
        "returned": donated,
        "packed": packed,
        "undeclared": set(plan.numbers(spot for spot in traced.written if spot[0] not in contract.allowed)),
    }


def _numbers(plan: PlanTables, operands: Sequence[Operand]) -> set[int]:
    return {
        number for operand in operands for slot in operand.slots for number in plan.stored[operand.name][slot].numbers
    }


def _numbers_of_leaves(plan: PlanTables) -> list[tuple[Leaf, list[int]]]:
    """Returns each leaf, kind by kind, with the numbers of its arrays."""
    # From the leaves, not from the arrays: a leaf that holds None has no array, but a row.
    numbers: dict[int, tuple[Leaf, list[int]]] = {id(leaf): (leaf, []) for leaf in plan.leaves}
    for array in plan.arrays:
        numbers[id(array.leaf)][1].append(array.number)
    return sorted(numbers.values(), key=lambda entry: plan.kind_index[entry[0].kind or ""])


def _row(plan: PlanTables, leaf: Leaf, numbers: list[int], touched: dict[str, set[int]], zero: set[int]) -> LeafAudit:
    kind = plan.kinds[leaf.kind or ""]
    facts = {fact: not arrays.isdisjoint(numbers) for fact, arrays in touched.items()}
    return LeafAudit(
        leaf=leaf,
        zero_gradient=facts["differentiated"] and zero.issuperset(numbers),
        saved=kind.saved,
        written_but_not_saved=facts["written"] and not kind.saved,
        restarts=kind.restart is not None,
        compute=next((plan.compute_dtypes[number].name for number in numbers if number in plan.compute_dtypes), None),
        **facts,
    )


def _zero_gradients(plan: PlanTables, traced: Traced, contract: Contract) -> set[int]:
    """Returns the numbers of the differentiated arrays whose gradient is zero whatever the values."""
    overwrites = {
        array.number: group.overwrites for group in contract.groups for array in plan.arrays_of(group).sources
    }
    differentiated = set(overwrites)
    # The jaxpr takes only the arrays that are read, so its inputs have other numbers.
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

    is_zero: list[bool] = []

    def traced_again() -> Traced:
        is_zero.extend(zero_gradients(loss_of, wrt, others, overwritten=[overwrites[number] for number in sorted(wrt)]))
        return traced

    # On a mesh the loss may use the names of its axes, which only a shard_map defines.
    traced_again() if plan.per_device is None else traced_on_one(plan.per_device, traced_again)
    # The leaves of a dict are sorted by key.  An array that is not read has no gradient either.
    return differentiated - {number for number, zero in zip(sorted(wrt), is_zero, strict=True) if not zero}
