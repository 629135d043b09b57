"""The definition of a step, its function and contract, and the way from one call to a compiled entry.

Nothing here is compiled or cached: `Step` does that.  An audit examines a step by the same methods, so it reports
what a call would do.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from statewise._src.core.plan import State
from statewise._src.plan.tables import PlanTables
from statewise._src.step.arguments import Args, Arguments, Bound, Kwargs, merged
from statewise._src.step.capture import Capture
from statewise._src.step.contract import Contract, check_loss, check_writes
from statewise._src.step.dispatch import CompiledStep
from statewise._src.step.function import called_as, check_capacity
from statewise._src.step.instruments import check_measured
from statewise._src.step.microbatches import Batch, split_arguments
from statewise._src.step.outside_writes import check_not_baked, check_written_arguments
from statewise._src.step.passed_objects import check_foreign_objects
from statewise._src.step.program import program_of
from statewise._src.step.shard_map import check_replicated, local_arguments, program_on_each, specs_of, traced_on_one
from statewise._src.step.staleness import staleness_of
from statewise._src.step.trace import Call, Traced, evaluating, objects_of
from statewise._src.step.training import PLAIN, Training
from statewise._src.step.warnings import check_trains, warnings_of

__all__ = ["ContractOf", "Definition"]

ContractOf = Callable[[PlanTables, str], Contract]


@dataclasses.dataclass(frozen=True)
class Definition:
    """A step as it was written.

    Attributes:
      fn: the user's function.
      name: the function's name.
      decorator: `step` or `train_step`.
      contract_of: from a plan and the name to the step's contract.
      captured: the kinds whose sown or assigned values the step returns; None for none.
      arguments: which arguments are static, and which are donated.
      training: what a train step does with its batch and its gradients.
    """

    fn: Callable[..., Any]
    name: str
    decorator: str
    contract_of: ContractOf
    captured: str | tuple[str, ...] | None
    arguments: Arguments
    training: Training = PLAIN

    @property
    def captures(self) -> bool:
        """Returns whether the step returns what its function sows or assigns."""
        return bool(self.captured)

    def trace_checked(self, state: State, args: Args, kwargs: Kwargs) -> tuple[Traced, Contract, Any]:
        """Traces and checks one call; for a step that runs on each device, also returns how the arguments are split."""
        plan = state.tables
        contract = self.contract_of(plan, self.name)
        traced, specs = self.traced(state, args, kwargs)
        self.check_writes(traced, contract, state, args, kwargs)
        if contract.trains:
            tree = check_loss(traced, contract, self.captures, self.training.weighted, self.name)
            traced = dataclasses.replace(traced, result_tree=tree)
            check_measured(plan, self.training.measures, plan.numbers(traced.written), self.name)
        return traced, contract, specs

    def traced(self, state: State, args: Args, kwargs: Kwargs, *, evaluated: bool = False) -> tuple[Traced, Any]:
        """Traces one call, optionally after `model.eval()`; also returns how the arguments are split among devices."""
        plan, copies = state.tables, state.tables.per_device
        call, dynamic = self.call(plan, args, kwargs)
        if evaluated:
            call = dataclasses.replace(call, fn=evaluating(call.fn, plan.object_count))
        name_of = functools.partial(self.arguments.name_of, objects=plan.object_count)
        check_capacity(
            self.fn, plan.object_count, args, self.name, lambda: [type(planned) for planned in objects_of(plan)]
        )
        check_foreign_objects(self.arguments.named(*dynamic, plan.object_count), self.name)
        specs: Any = ()
        if copies is None:
            own, batch = self.part_of(*dynamic, name_of)
            traced = call.trace(state, *own)
        else:
            specs = specs_of(copies, jax.tree.leaves(dynamic))
            # The function sees what one device sees: its part of the arguments, and the mesh axes by name.
            own, batch = self.part_of(*local_arguments(copies, *dynamic, specs, name_of, self.name), name_of)
            traced = traced_on_one(copies, lambda: call.trace(state, *own))
        traced = dataclasses.replace(traced, batch=batch)
        check_written_arguments(traced.passed, call.fn, plan.object_count, name_of, self.name, bool(plan.optimizers))
        check_not_baked(traced.effects, call.fn, self.name)
        return traced, specs

    def part_of(
        self, args: Args, kwargs: Kwargs, name_of: Callable[..., str]
    ) -> tuple[tuple[Args, Kwargs], Batch | None]:
        """Returns the arguments of one microbatch, and how all are split; the arguments themselves if they are not."""
        if self.training.microbatches == 1:
            return (args, kwargs), None
        args, kwargs, batch = split_arguments(self.training, args, kwargs, name_of, called_as(self.name))
        return (args, kwargs), batch

    def check_writes(self, traced: Traced, contract: Contract, state: State, args: Args, kwargs: Kwargs) -> None:
        """Checks that the function writes only what its contract allows."""
        evaluated = functools.partial(self.traced, state, args, kwargs, evaluated=True)
        check_writes(state.tables, traced, contract, self.name, lambda: evaluated()[0])

    def judge(self, plan: PlanTables, traced: Traced, contract: Contract) -> None:
        """Rejects a train step that trains nothing, and warns of probable mistakes."""
        check_trains(plan, traced, contract, self.fn, self.name)
        for warning in warnings_of(plan, traced, contract, self.fn, self.name):
            warnings.warn(warning, stacklevel=6)  # points at the call of the step

    def call(self, plan: PlanTables, args: Args, kwargs: Kwargs) -> tuple[Call, tuple[Args, Kwargs]]:
        """Returns the function with its static arguments bound, and the other arguments: (args, kwargs)."""
        capture = Capture(plan.kinds, self.captured)
        split = self.arguments.split(args, kwargs, plan.object_count)
        # Static values are part of the function; only the others are inputs of the trace.
        fn = self.fn
        if split.static:
            names = {place: self.arguments.name_of(place, plan.object_count) for place in split.static}
            fn = Bound(self.fn, split.static, plan.object_count, names)
        return Call(plan, fn, capture, self.name), merged(split.args, split.kwargs, split.donated)

    def make_entry(self, plan: PlanTables, traced: Traced, contract: Contract, specs: Any = None) -> CompiledStep:
        """Makes the entry of a traced call; `specs` is None if only its operands are of interest, as in an audit."""
        copies = plan.per_device
        axes = copies.axes if copies else ()
        program, operands = program_of(plan, traced, contract.groups, axes, self.training)
        if copies and specs is not None:
            differ = check_replicated(plan, traced, specs, self.name)
            if contract.trains:
                differ[0] = False  # the loss, which is averaged over the devices
                if self.training.weighted:
                    del differ[1]  # the weight, which the step does not return
                if self.training.measures:
                    differ[1:1] = [False, False]  # the arrays of `Measured`, which are the same on every device
            program = program_on_each(plan, program, operands, specs, differ)
        return CompiledStep(
            plan,
            self.name,
            program,
            operands,
            self.arguments,
            contract.returns_state,
            traced.closes_over_tracers,
            staleness_of(plan, operands, may_keep=self.training.may_keep),
        )
