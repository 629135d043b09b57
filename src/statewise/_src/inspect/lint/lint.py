"""Lint: a model checked against known mistakes in the state of NNX programs, before it runs.

Most of them are calls that succeed: a variance that starts at zero, a base that trains under its adapter, a cache in
every checkpoint.  Each rule is one small function with a name and a reason; `RULES` is the list of all.  Nothing is run
or traced, except the shapes of an optimizer's state and the functions that make fresh values; arrays are read in few
transfers (`read_values`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from statewise._src.common.object_names import given, names_given
from statewise._src.core.plan import Kinds
from statewise._src.inspect.lint import (
    arrays,
    constants,
    declared,
    hooks,
    leaf_types,
    members,
    optimizers,
    restarts,
    sowing,
    statistics,
    values,
)
from statewise._src.inspect.lint.finding import Finding, Findings, Rule
from statewise._src.inspect.lint.subject import subject_of
from statewise._src.step.definition import Definition
from statewise._src.step.step import Step, definition_of
from statewise.errors import DeclarationError

__all__ = ["RULES", "Finding", "Findings", "Rule", "lint"]

# In the order of the findings.
_MODULES = (values, arrays, leaf_types, sowing, declared, statistics, constants, optimizers, hooks, restarts, members)
RULES: tuple[Rule, ...] = tuple(rule for module in _MODULES for rule in module.RULES)


def lint(
    *objects: object,
    kinds: Kinds | None = None,
    ignore: str | Iterable[str] = (),
    decode_length: int | None = None,
    steps: Step[..., Any] | Iterable[Step[..., Any]] = (),
    **named: object,
) -> Findings:
    """Checks a model against the known rules; `docs/lint.md` explains each.

    Args:
      *objects: a module, or several objects (a model, its `nnx.Optimizer`, an `nnx.EMA`), concrete or abstract; or one
        plan or one state, with its kinds and optimizers (for an ensemble, each member is checked).  Kinds may also be
        the second argument.
      kinds: the kinds that the program declares, `Kinds.standard()` if None; a plan and a state have their own.
      ignore: the codes of rules to skip, one or several.
      decode_length: the number of tokens to decode, to find caches that are too small for them.
      steps: the steps that run on these objects, one or several, to find options that do not fit the model.
      **named: the objects by name, instead of by position.

    Returns:
      a list of findings, empty if nothing is wrong; it prints as a table.  Rules that need values find nothing in
      abstract objects.

    Raises:
      DeclarationError: `kinds` is not a `Kinds`, or is passed beside a plan; an unknown code; a step that is not one;
        objects by position and by name.
      FilterError: a path in a kind that could mean one leaf or another.
      StructureError: an object is not a model; a donated state.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> class Norm(nnx.Module):
      ...     def __init__(self):
      ...         self.running_var = nnx.BatchStat(jnp.zeros(3))
      >>> for finding in sw.lint(Norm()):
      ...     print(finding, finding.hint, sep="\\n")
      statistic-starts-at-zero: 1 statistic of spread is all zeros. (running_var)
      self.running_var = BatchStat(jnp.ones(...))
    """
    last = objects[-1] if len(objects) > 1 else None
    if kinds is None and isinstance(last, Kinds):
        objects, kinds = objects[:-1], last
    skipped = set(names_given(ignore, "ignore", "rules"))
    codes = [rule.code for rule in RULES]
    for code in sorted(skipped.difference(codes)):
        raise DeclarationError(f"There is no rule {code!r}.", hint=f"one of: {', '.join(codes)}")
    objects, names = given(objects, named, "sw.lint")
    rules = [rule for rule in RULES if rule.code not in skipped]
    steps = (steps,) if isinstance(steps, Step) or not isinstance(steps, Iterable) else tuple(steps)
    definitions = tuple(map(_definition, steps))
    ensemble = members.members_of(objects[0]) if len(objects) == 1 and kinds is None else None
    if ensemble is None:
        subject = subject_of(objects, kinds, decode_length, names, definitions)
        return Findings(finding for rule in rules for finding in rule.findings(subject))
    together = members.subject_of_members(objects[0])
    own = [finding for rule in members.RULES if rule in rules for finding in rule.findings(together)]
    each = members.each_member(
        objects[0], ensemble, lambda member: lint(member, ignore=skipped, decode_length=decode_length, steps=steps)
    )
    return Findings([*own, *each])


def _definition(step: object) -> Definition:
    """Returns the definition of a step, checked."""
    if not isinstance(step, Step):
        raise DeclarationError(
            f"{getattr(step, '__name__', type(step).__name__)} is not a step.",
            hint="sw.lint(plan, steps=train), where train is made by @sw.train_step",
        )
    return definition_of(step)
