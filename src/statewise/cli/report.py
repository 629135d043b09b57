"""The command `report`: one page of all that there is to see of a model or a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["add_report"]

REPORT = """\
TARGET and OTHER may also be checkpoints' paths; or return several objects (a model and its nnx.Optimizer), a plan, with
kinds and optimizers of its own, or a state.  Exit status 1 where lint finds something, or the two differ; the page is
written all the same.

  statewise report my_project.models:make -o report.html
  statewise report run/step_100 run/step_200 -o changes.html
  statewise report my_project.plans:plan --mesh data=16,model=8 -o report.html
"""


def add_report(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    report = add("report", "write one HTML page of all that there is to see, self-contained", REPORT)
    report.add_argument(
        "target", metavar="TARGET", help="package.module:factory, file.py:factory, or a checkpoint's path"
    )
    report.add_argument("other", metavar="OTHER", nargs="?", help="another of these, to compare it with")
    report.add_argument("-o", "--output", metavar="FILE", help="the page; a file that is there is replaced")
    report.add_argument("--kinds", metavar="KINDS", help="the kinds of models among the two, as in `statewise plan`")
    report.add_argument(
        "--mesh", metavar="MESH", help="how it lies on a mesh: its axes and their sizes, data=16,model=8"
    )
    report.add_argument(
        "--abstract", action="store_true", help="make models without their arrays (nnx.eval_shape); values are not seen"
    )
    report.add_argument("--json", action="store_true", help="print the data as JSON; no page is then needed")
