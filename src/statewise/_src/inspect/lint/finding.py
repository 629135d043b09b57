"""The results of lint: findings, and the rules that make them.

A `Rule` has a name, the reason why it matters, and a function that looks for it in a `Subject`.  Each `Found` of that
function (a fact, the leaves, the hint) becomes a `Finding`.  Where possible, a rule reports everything about one model
in one finding, so that the same fault in a hundred layers is one line.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.problems import counted
from statewise._src.common.tables import ShownData, Table, leaf_dict, printable
from statewise._src.inspect.lint.subject import Subject

__all__ = ["Finding", "Findings", "Found", "Rule", "Rules", "kind_with"]

_NAMED = 3  # leaves in the one line of a finding
_SHOWN = 10  # leaves below that line


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule that a model breaks.

    Attributes:
      code: the rule's name, the heading under which `docs/lint.md` explains it.
      message: the fact, one sentence.
      leaves: the leaves concerned; empty if the fault is in the kinds or in an optimizer.
      why: the consequence.
      hint: what to change, as code if code can say it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Dict(running_var=nnx.BatchStat(jnp.zeros(3)))
      >>> print(sw.lint(model)[0])
      statistic-starts-at-zero: 1 statistic of spread is all zeros. (running_var)
    """

    code: str
    message: str
    leaves: tuple[Leaf, ...]
    why: str
    hint: str

    def __str__(self) -> str:
        named = ", ".join(format_path(leaf.path) for leaf in self.leaves[:_NAMED])
        more = f" and {len(self.leaves) - _NAMED} more" if len(self.leaves) > _NAMED else ""
        return printable(f"{self.code}: {self.message}" + (f" ({named}{more})" if named else ""))

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as plain data."""
        return vars(self) | {"leaves": list(map(leaf_dict, self.leaves))}


class Findings(ShownData, list[Finding]):
    """The result of `sw.lint`: a list of findings that prints itself in full.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> findings = sw.lint(nnx.Dict(var=nnx.BatchStat(jnp.zeros(3))))
      >>> len(findings), findings == [], findings[0].code
      (1, False, 'statistic-starts-at-zero')
      >>> print(sw.lint(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
      no findings
    """

    def table(self) -> Table:
        """Returns the findings as a table: for each the fact, then leaves, reason and hint, a line for each."""
        if not self:
            return Table("no findings", (), ())
        rows: list[tuple[str, ...]] = []
        for finding in self:
            rows.append((finding.code, finding.message))
            rows += [("", str(leaf)) for leaf in finding.leaves[:_SHOWN]]
            if len(finding.leaves) > _SHOWN:
                rows.append(("", f"... and {len(finding.leaves) - _SHOWN} more (all in .leaves)"))
            first, *rest = finding.hint.splitlines()
            rows += [("", f"why: {finding.why}"), ("", f"hint: {first}"), *(("", f"      {line}") for line in rest)]
        return Table(counted(len(self), "finding", "findings"), ("rule", "what is found"), tuple(rows))

    def __str__(self) -> str:
        lines = [f"{code}: {text}" if code else f"  {text}" for code, text in self.table().rows]
        return "\n".join(lines) or "no findings"

    def to_dict(self) -> dict[str, Any]:
        """Returns the findings as plain data, under `findings`."""
        return {"findings": [finding.to_dict() for finding in self]}


class Found(NamedTuple):
    """One match of a rule: the fact, the leaves, the hint."""

    message: str
    leaves: tuple[Leaf, ...]
    hint: str


# Looks for a rule.
Find = Callable[[Subject], Iterator[Found]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A known rule.

    Attributes:
      code: its name.
      why: the consequence of breaking it, one sentence.
      find: looks for it.
    """

    code: str
    why: str
    find: Find

    def findings(self, subject: Subject) -> list[Finding]:
        """Returns the findings of this rule in a subject."""
        return [Finding(self.code, found.message, found.leaves, self.why, found.hint) for found in self.find(subject)]


class Rules(list[Rule]):
    """The rules of one module, in the order of their functions."""

    def rule(self, code: str, why: str) -> Callable[[Find], Find]:
        """Adds a rule, as a decorator of the function that looks for it."""

        def add(find: Find) -> Find:
            self.append(Rule(code, why, find))
            return find

        return add


def kind_with(name: str, change: str) -> str:
    """Returns the code that declares a kind with a change, for a hint: `kind_with("cache", "saved=False")`."""
    return f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], {change}))"
