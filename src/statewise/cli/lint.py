"""The command `lint`: the known rules that a model stands in."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["add_lint"]

LINT = """\
TARGET may also return several objects (a model and its nnx.Optimizer), a plan or a state.  Exit status 1 where there is
a finding.  docs/lint.md explains each rule.

  statewise lint my_project.models:make --ignore tied-weights
"""


def add_lint(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    lint = add("lint", "look for the known rules; exit status 1 where the model stands in one", LINT)
    lint.add_argument("target", metavar="TARGET", help="package.module:factory or file.py:factory")
    lint.add_argument("--kinds", metavar="KINDS", help="the kinds of the model, as in `statewise plan`")
    lint.add_argument(
        "--abstract",
        action="store_true",
        help="make the model without its arrays (nnx.eval_shape), if it is too large; rules that only values tell are "
        "then not seen",
    )
    lint.add_argument(
        "--ignore", action="append", default=[], metavar="TRAP", help="a rule that is not looked for; may be repeated"
    )
    lint.add_argument(
        "--decode-length",
        type=int,
        metavar="N",
        help="how many tokens are to be decoded, for caches that are too small",
    )
    lint.add_argument("--json", action="store_true", help="print JSON")
