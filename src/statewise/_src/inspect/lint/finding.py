"""What lint says: findings, and the rules that make them.

A `Rule` is a name, the reason why it matters, and a function that looks for it in a `Subject`.  What the function
yields (a fact, the leaves, the hint) becomes a `Finding`; a rule says all that it has to say of one model in one
finding where it can, so that a hundred layers with the same fault are one line.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.problems import counted
from statewise._src.common.tables import Shown, Table, leaf_dict
from statewise._src.inspect.lint.subject import Subject

__all__ = ["Finding", "Findings", "Found", "Rule"]

_NAMED = 3  # leaves in the one line of a finding
_SHOWN = 10  # and below it


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule that a model stands in.

    Attributes:
      code: the rule's name, the heading under which `docs/lint.md` explains it.
      message: the fact, one sentence.
      leaves: the leaves concerned; empty where the rule lies in the kinds or in an optimizer.
      why: what comes of it.
      hint: what to change, as code where code is the hint.

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
        line = f"{self.code}: {self.message}" + (f" ({named}{more})" if named else "")
        return _printable(line)

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data."""
        return {
            "code": self.code,
            "message": self.message,
            "leaves": [leaf_dict(leaf) for leaf in self.leaves],
            "why": self.why,
            "hint": self.hint,
        }


def _details(finding: Finding) -> list[str]:
    """The lines below a finding's fact."""
    lines = [_printable(str(leaf)) for leaf in finding.leaves[:_SHOWN]]
    if len(finding.leaves) > _SHOWN:
        lines.append(f"... and {len(finding.leaves) - _SHOWN} more (all in .leaves)")
    first, *rest = finding.hint.splitlines()
    return [*lines, f"why: {finding.why}", f"hint: {first}", *(f"      {line}" for line in rest)]


def _printable(line: str) -> str:
    # A key of a user's dict may hold anything, and this is to be one line.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


class Findings(Shown, list[Finding]):
    """What `sw.lint` returns: a list of findings that prints itself in full.

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
        """The findings as a table: of each the fact, the leaves, the reason and the hint, a line for each."""
        if not self:
            return Table("no findings", (), ())
        rows: list[tuple[str, ...]] = []
        for finding in self:
            rows.append((finding.code, finding.message))
            rows += [("", line) for line in _details(finding)]
        return Table(counted(len(self), "finding", "findings"), ("rule", "what is found"), tuple(rows))

    def __str__(self) -> str:
        if not self:
            return "no findings"
        lines: list[str] = []
        for finding in self:
            lines += [f"{finding.code}: {_printable(finding.message)}", *(f"  {line}" for line in _details(finding))]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data, under `findings`."""
        return {"findings": [finding.to_dict() for finding in self]}

    def to_json(self) -> str:
        """The findings as JSON."""
        return json.dumps(self.to_dict(), indent=2)


class Found(NamedTuple):
    """What a rule found: the fact, the leaves, the hint."""

    message: str
    leaves: tuple[Leaf, ...]
    hint: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """A known rule.

    Attributes:
      code: its name.
      why: what comes of standing in it, one sentence.
      find: looks for it.
    """

    code: str
    why: str
    find: Callable[[Subject], Iterator[Found]]

    def findings(self, subject: Subject) -> list[Finding]:
        """What there is to say of a subject."""
        return [Finding(self.code, found.message, found.leaves, self.why, found.hint) for found in self.find(subject)]
