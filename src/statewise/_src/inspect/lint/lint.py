"""Lint: the known rules of state in NNX programs, looked for in a model before it runs.

Most of them are calls that succeed: a variance that starts at zero, a base that trains under its adapter, a cache in
every checkpoint.  Each rule is one small function with a name and a reason; `RULES` is the list of all.  Nothing is run
or traced, but the layout of an optimizer's state and the functions that make fresh values; arrays are read in few
calls (`reading`).

The files: `subject` (what is looked at) and `training` (what updates it), `finding` (what is said); the rules by theme:
`values`, `arrays`, `leaf_types`, `declared` (the kinds), `optimizing`, `restarting`, `members` (ensembles).
"""

from __future__ import annotations

from collections.abc import Iterable

from statewise._src.common.object_names import given, names_given
from statewise._src.core.plan import Kinds
from statewise._src.inspect.lint import arrays, declared, leaf_types, members, values
from statewise._src.inspect.lint import optimizers as optimizing
from statewise._src.inspect.lint import restarts as restarting
from statewise._src.inspect.lint.finding import Finding, Findings, Rule
from statewise._src.inspect.lint.subject import look
from statewise.errors import DeclarationError

__all__ = ["RULES", "Finding", "Findings", "Rule", "lint"]

RULES: tuple[Rule, ...] = (
    *values.RULES,
    *arrays.RULES,
    *leaf_types.RULES,
    *declared.RULES,
    *optimizing.RULES,
    *restarting.RULES,
    *members.RULES,
)


def lint(
    *objects: object,
    kinds: Kinds | None = None,
    ignore: str | Iterable[str] = (),
    decode_length: int | None = None,
    **named: object,
) -> Findings:
    """Looks for the known rules in a model; `docs/lint.md` explains each.

    Args:
      *objects: a module, or several objects (a model, its `nnx.Optimizer`, an `nnx.EMA`), concrete or abstract; or one
        plan or one state, with the kinds and optimizers that it has (of an ensemble each member is looked at).  Kinds
        are also taken as the second argument.
      kinds: the kinds that the program declares, `Kinds.standard()` if None; a plan and a state have their own.
      ignore: the codes of rules that are not looked for, one or several.
      decode_length: how many tokens are to be decoded, for caches that are too small for them.
      **named: the objects by name, instead of by position.

    Returns:
      a list of findings, empty when all is well; it prints as a table.  What only values tell is not found in what is
      abstract.

    Raises:
      DeclarationError: kinds that are none, kinds beside a plan, or a code that is no rule's; objects given by position
        and by name.
      FilterError: a path in a kind that could mean one leaf or another.
      StructureError: what is given is no model, or a donated state.

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
    not_saved = set(names_given(ignore, "ignore", "rules"))
    codes = [rule.code for rule in RULES]
    for code in sorted(not_saved.difference(codes)):
        raise DeclarationError(f"There is no rule {code!r}.", hint=f"one of: {', '.join(codes)}")
    objects, names = given(objects, named, "sw.lint")
    rules = [rule for rule in RULES if rule.code not in not_saved]
    if len(objects) == 1 and members.is_ensemble(objects[0]) and kinds is None:
        found = members.each_member(objects[0], lambda one: lint(one, ignore=not_saved, decode_length=decode_length))
        own = [finding for rule in members.RULES if rule in rules for finding in members.findings(rule, objects[0])]
        return Findings([*own, *found])
    subject = look(objects, kinds, decode_length, names)
    return Findings(finding for rule in rules for finding in rule.findings(subject))
