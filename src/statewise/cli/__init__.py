"""The command line: `census | plan | explain | memory | lint | report TARGET`, `inspect | convert | diff`, `demo`.

A target is a function without arguments that makes a model, `package.module:factory` or `file.py:factory`; a model
itself, or a tuple of objects, will do as well.  Exit status: 0 fine, 1 findings (leaves that no kind claims, say),
2 wrong usage, with one line that says what is wrong.

This file parses arguments and imports nothing heavy, so that `--help` is there at once.  The files: `commands` (what
each command does), `checkpoints` (the same for those on checkpoints), `memory` (a mesh from text), `lint` and `report`
(options), `targets` (from text to objects), `expressions` (from text to filters).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from statewise.cli.lint import add_lint
from statewise.cli.memory import add_memory
from statewise.cli.report import add_report

__all__ = ["main"]

FILTERS = """\
FILTER is written as in Python: type names (of the target's module, of the model's leaves, of nnx), tags in quotes,
`...`, the operators & | ~, and Exactly(Type), Path('layers/**'), Meta('name', value), All(...), Any(...), Not(...).

  statewise explain my_project.models:make "nnx.Param & ~Path('head/**')"
"""

CONVERT = """\
  statewise convert run/step_100 model.safetensors
  statewise convert model.safetensors run/imported --target my_project.models:make --dry-run
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage as well: more than the one line that says what is wrong.
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive number"  # argparse names a converter in its message


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="statewise",
        description="Looks at the state of a Flax NNX model, and at its checkpoints, kind by kind.",
        epilog="Exit status: 0 fine, 1 findings, 2 wrong usage.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    census = add("census", "count a model kind by kind: leaves, elements, bytes, dtypes")
    plan = add("plan", "show the kind of each leaf; exit status 1 where kinds and model do not fit")
    explain = add("explain", "show which leaves a filter means, and why", FILTERS)
    for command in (census, plan, explain):
        command.add_argument("target", metavar="TARGET", help="package.module:factory or file.py:factory")
        command.add_argument(
            "--abstract",
            action="store_true",
            help="make the model without its arrays (nnx.eval_shape), for one that is too large; arrays outside of "
            "nnx.Variables are then not seen",
        )
    for command in (census, plan):
        command.add_argument(
            "--kinds",
            metavar="KINDS",
            help="package.module:kinds or file.py:kinds, a Kinds or a function that returns one; the standard kinds "
            "if not given",
        )
    explain.add_argument("filter", metavar="FILTER", help="which leaves, see below")
    add_memory(add)
    add_lint(add)
    add_report(add)
    _add_checkpoints(add)
    demo = add("demo", "train a small transformer on real text, and see what its kinds are good for")
    demo.add_argument("--steps", type=_positive, metavar="N", help="how many training steps")
    for command in (census, plan, explain, demo):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_checkpoints(add: Callable[..., argparse.ArgumentParser]) -> None:
    inspect = add("inspect", "count a checkpoint kind by kind: of Statewise, plain Orbax, or a .safetensors file")
    inspect.add_argument("path", metavar="PATH", help="a checkpoint's directory, or a .safetensors file")
    convert = add("convert", "convert a checkpoint: of Statewise, plain Orbax or safetensors, each into each", CONVERT)
    convert.add_argument("source", metavar="SOURCE", help="a checkpoint's directory, or a .safetensors file")
    convert.add_argument("destination", metavar="DESTINATION", help="a path where there is nothing yet")
    convert.add_argument(
        "--target",
        metavar="TARGET",
        help="package.module:factory or file.py:factory, which makes the model (or the state) that it is to fit",
    )
    convert.add_argument("--kinds", metavar="KINDS", help="the kinds of the target's model, as in `statewise plan`")
    convert.add_argument(
        "--abstract", action="store_true", help="make the target without its arrays; then nothing of it can be kept"
    )
    convert.add_argument(
        "--to",
        choices=("statewise", "orbax", "safetensors", "linen"),
        help="the format to write; by default what the end of DESTINATION tells, .safetensors or not",
    )
    convert.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="another path for a name; `OLD=` leaves it out"
    )
    convert.add_argument("--cast", action="store_true", help="allow other dtypes")
    convert.add_argument("--dry-run", action="store_true", help="only show what would be done")
    diff = add("diff", "compare two checkpoints, leaf by leaf; exit status 1 where they differ, 2 for trouble")
    for name in ("first", "second"):
        diff.add_argument(
            name,
            metavar=name.upper(),
            help="a checkpoint's directory; or, to compare with a model, package.module:factory or file.py:factory",
        )
    diff.add_argument("--kinds", metavar="KINDS", help="the kinds of models among the two, as in `statewise plan`")
    for command in (inspect, convert, diff):
        command.add_argument("--json", action="store_true", help="print JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments, without the program's name; those of the process if None.

    Returns:
      the exit status: 0 fine, 1 findings, 2 wrong usage; of `diff` also 2 where a checkpoint is corrupted.

    Raises:
      SystemExit: after `--help`, and where the arguments cannot be parsed.

    Example:
      >>> from statewise.cli import main
      >>> main(["explain", "statewise.examples.multi_state:missing", "..."])
      2
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A name of a file may have bytes, or letters, that a terminal's encoding does not: they are shown escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if args.version:
            from statewise import __version__

            print(f"statewise {__version__}")
            return 0
        if args.command is None:
            parser.error("there is no command")
        from statewise.cli.commands import run

        status = run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # `statewise plan ... | head`: whoever reads has read enough.  What is still buffered goes nowhere, so that
        # the interpreter does not fail on it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
