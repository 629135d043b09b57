"""The command `memory`: what a model's state takes of each device of a mesh that need not be there."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from statewise.cli.targets import UsageError

__all__ = ["add_memory", "parse_mesh"]

MEMORY = """\
TARGET may also make a plan, with kinds that say how they are placed and with optimizers, or a state.  Activations are
not counted.

  statewise memory my_project.plans:plan --mesh data=16,model=8
"""


def add_memory(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    memory = add("memory", "count what the state takes of each device of a mesh, without any device", MEMORY)
    memory.add_argument("target", metavar="TARGET", help="package.module:factory or file.py:factory")
    memory.add_argument("--mesh", metavar="MESH", required=True, help="its axes and their sizes, data=16,model=8")
    memory.add_argument("--kinds", metavar="KINDS", help="the kinds of the model, as in `statewise plan`")
    memory.add_argument(
        "--abstract", action="store_true", help="make the model without its arrays (nnx.eval_shape), if it is too large"
    )
    memory.add_argument("--json", action="store_true", help="print JSON")


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of a mesh and their sizes, from `data=16,model=8`.

    Raises:
      UsageError: text that says no such thing.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit() and int(size)):
            raise UsageError(f"{text!r} is no mesh: write its axes and their sizes, data=16,model=8")
        if name in axes:
            raise UsageError(f"{text!r} is no mesh: it has two axes {name!r}")
        axes[name] = int(size)
    return axes
