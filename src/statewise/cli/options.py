"""The commands' options: the parser of the command line, with its help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

__all__ = ["build_parser"]

FILTERS = """\
FILTER is written as in Python: type names (of the target's module, of the model's leaves, of nnx), tags in quotes,
`...`, the operators & | ~, and Exactly(Type), Path('layers/**'), Meta('name', value), All(...), Any(...), Not(...).

  statewise explain my_project.models:make "nnx.Param & ~Path('head/**')"
"""

CONVERT = """\
  statewise convert run/step_100 model.safetensors
  statewise convert model.safetensors run/imported --target my_project.models:make --dry-run
  statewise convert llama_folder run/imported --target my_project.models:make --names my_project.names:llama
  statewise convert run/step_100 published --target my_project.models:make --names my_project.names:llama
"""

NAMES = """\
NAMES is package.module:names or file.py:names, a sw.Names or a function that returns one.  PATH is a folder, or one or
more .safetensors files.  Reads no array.
"""

NAMES_EXAMPLES = """\
  statewise names infer my_project.models:make llama_folder > proposal.py
  statewise names check my_project.names:llama my_project.models:make llama_folder
"""

MEMORY = """\
TARGET may also make a plan, with placements in its kinds and with optimizers, or a state.  Activations are not
counted.

  statewise memory my_project.plans:plan --mesh data=16,model=8
"""

LINT = """\
TARGET may also return several objects (a model and its nnx.Optimizer), a plan or a state.  Exit status 1 if there are
findings.  docs/lint.md explains each rule.

  statewise lint my_project.models:make --ignore tied-weights
  statewise lint my_project.plans:plan --step my_project.steps:train
"""

REPORT = """\
TARGET and OTHER may also be paths of checkpoints; or return several objects (a model and its nnx.Optimizer), a plan
with its own kinds and optimizers, or a state.  Exit status 1 if lint has findings or the two differ; the page is
written either way.

  statewise report my_project.models:make -o report.html
  statewise report run/step_100 run/step_200 -o changes.html
  statewise report my_project.plans:plan --mesh data=16,model=8 -o report.html
"""

FACTORY = "package.module:factory or file.py:factory"
CHECKPOINT = "a checkpoint's directory, or a .safetensors file"
AS_IN_PLAN = "as in `statewise plan`"
MESH = "its axes and their sizes, data=16,model=8"
ABSTRACT = "make the model without its arrays (nnx.eval_shape), if it is too large"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage too; one line is enough to say what is wrong.
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive number"  # argparse prints a converter's name in its message

_Add = Callable[..., argparse.ArgumentParser]


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = _Parser(
        prog="statewise",
        description="Shows the state of a Flax NNX model, and of its checkpoints, kind by kind.",
        epilog="Exit status: 0 success, 1 findings, 2 wrong usage.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    _add_models(add)
    _add_report(add)
    _add_checkpoints(add)
    _add_names(add)
    demo = add("demo", "train a small transformer on real text, and see what its kinds are good for")
    demo.add_argument("--steps", type=_positive, metavar="N", help="the number of training steps")
    # Last, so that --json is the last option of each command.
    for name, command in commands.choices.items():
        if name == "names":
            continue  # its own commands have it
        text = "print the data as JSON; then no page is needed" if name == "report" else "print JSON"
        command.add_argument("--json", action="store_true", help=text)
    return parser


def _add_target(command: argparse.ArgumentParser, abstract: str, kinds: str | None = None) -> None:
    """Adds a model, with the texts of its options."""
    command.add_argument("target", metavar="TARGET", help=FACTORY)
    command.add_argument("--abstract", action="store_true", help=abstract)
    if kinds is not None:
        command.add_argument("--kinds", metavar="KINDS", help=kinds)


def _add_models(add: _Add) -> None:
    unseen = f"{ABSTRACT}; arrays outside of nnx.Variables are then not seen"
    kinds = (
        "package.module:kinds or file.py:kinds, a Kinds or a function that returns one; by default the standard kinds"
    )
    _add_target(add("census", "count a model kind by kind: leaves, elements, bytes, dtypes"), unseen, kinds)
    _add_target(add("plan", "show the kind of each leaf; exit status 1 if kinds and model do not fit"), unseen, kinds)
    explain = add("explain", "show which leaves a filter matches, and why", FILTERS)
    _add_target(explain, unseen)
    # After the target: positional arguments are parsed in the order in which they are added.
    explain.add_argument("filter", metavar="FILTER", help="which leaves, see below")

    kinds = f"the kinds of the model, {AS_IN_PLAN}"
    memory = add("memory", "count the memory that the state takes on each device of a mesh, without any device", MEMORY)
    _add_target(memory, ABSTRACT, kinds)
    memory.add_argument("--mesh", metavar="MESH", required=True, help=MESH)

    lint = add("lint", "check a model for known mistakes; exit status 1 if there are findings", LINT)
    _add_target(lint, f"{ABSTRACT}; rules that need values are then skipped", kinds)
    lint.add_argument(
        "--ignore", action="append", default=[], metavar="RULE", help="a rule to skip; may be given several times"
    )
    lint.add_argument(
        "--decode-length",
        type=int,
        metavar="N",
        help="the number of tokens to decode, to find caches that are too small",
    )
    lint.add_argument(
        "--step",
        action="append",
        default=[],
        metavar="STEP",
        help="package.module:step or file.py:step, a step that runs on the model; may be given several times",
    )


def _add_report(add: _Add) -> None:
    report = add("report", "write one self-contained HTML page with everything there is to see", REPORT)
    report.add_argument(
        "target", metavar="TARGET", help="package.module:factory, file.py:factory, or a checkpoint's path"
    )
    report.add_argument("other", metavar="OTHER", nargs="?", help="another of these, to compare with")
    report.add_argument("-o", "--output", metavar="FILE", help="the page; an existing file is replaced")
    report.add_argument("--kinds", metavar="KINDS", help=f"the kinds of models among the two, {AS_IN_PLAN}")
    report.add_argument("--mesh", metavar="MESH", help=f"show the sharding on a mesh: {MESH}")
    report.add_argument(
        "--abstract", action="store_true", help="make models without their arrays (nnx.eval_shape); values are not seen"
    )


def _add_checkpoints(add: _Add) -> None:
    inspect = add("inspect", "count a checkpoint kind by kind: of Statewise, plain Orbax, or a .safetensors file")
    inspect.add_argument("path", metavar="PATH", help=CHECKPOINT)
    convert = add("convert", "convert a checkpoint between Statewise, plain Orbax and safetensors", CONVERT)
    convert.add_argument("source", metavar="SOURCE", help=CHECKPOINT)
    convert.add_argument("destination", metavar="DESTINATION", help="a path that does not exist yet")
    convert.add_argument(
        "--target", metavar="TARGET", help=f"{FACTORY}, which makes the model (or the state) that the result must fit"
    )
    convert.add_argument("--kinds", metavar="KINDS", help=f"the kinds of the target's model, {AS_IN_PLAN}")
    convert.add_argument(
        "--abstract",
        action="store_true",
        help="make the target without its arrays; then none of its values can be kept",
    )
    convert.add_argument(
        "--to",
        choices=("statewise", "orbax", "safetensors", "linen"),
        help="the format to write; by default safetensors if DESTINATION ends in .safetensors, else statewise",
    )
    convert.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="another path for a name; `OLD=` drops it"
    )
    convert.add_argument(
        "--names",
        metavar="NAMES",
        help="package.module:names or file.py:names, what the leaves of --target are called in another program's "
        "files: those are read if SOURCE is not a checkpoint of Statewise, and otherwise written",
    )
    convert.add_argument("--cast", action="store_true", help="allow other dtypes")
    convert.add_argument("--dry-run", action="store_true", help="only show what would be done")
    diff = add("diff", "compare two checkpoints, leaf by leaf; exit status 1 if they differ, 2 for trouble")
    for name in ("first", "second"):
        diff.add_argument(
            name, metavar=name.upper(), help=f"a checkpoint's directory; or, to compare with a model, {FACTORY}"
        )
    diff.add_argument("--kinds", metavar="KINDS", help=f"the kinds of models among the two, {AS_IN_PLAN}")


def _add_names(add: _Add) -> None:
    names = add("names", "what the leaves of a model are called in another program's files", NAMES_EXAMPLES)
    actions = names.add_subparsers(dest="action", metavar="ACTION", required=True)
    texts = {
        "check": "compare names with a model and with files; exit status 1 if they do not fit",
        "infer": "propose names, as code to read and paste; exit status 1 if some rows could not be decided",
    }
    for action, text in texts.items():
        command = actions.add_parser(
            action, help=text, description=text, epilog=NAMES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if action == "check":
            command.add_argument("names", metavar="NAMES", help="the names")
        _add_target(command, ABSTRACT, f"the kinds of the model, {AS_IN_PLAN}")
        command.add_argument("path", metavar="PATH", nargs="+", help="a folder, or .safetensors files")
        if action == "infer":
            command.add_argument("--names", metavar="NAMES", help="names whose rows are kept")
        command.add_argument("--json", action="store_true", help="print JSON")
