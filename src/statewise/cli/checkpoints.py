"""The commands on checkpoints: `inspect`, `convert`, `diff`, and `report`, which also accepts them.

A wrong request (a path that does not exist, or exists where it should not, an unknown name) is wrong usage; a problem
in a checkpoint is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from statewise._src.checkpoint.diff.diff import Diff, diff
from statewise._src.checkpoint.interop.convert import Conversion, convert
from statewise._src.checkpoint.restore import inspect
from statewise._src.core.plan import Kinds, Plan, State
from statewise._src.inspect.census import Census
from statewise._src.report.report import Report, report
from statewise.cli.targets import UsageError
from statewise.errors import RestoreError

__all__ = ["check", "converted", "differences", "inspected", "is_checkpoint", "reported", "state_of"]


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Turns restore errors without leaves into usage errors: they are about the paths or names in the request."""
    try:
        yield
    except RestoreError as error:
        if error.leaves:
            raise
        raise UsageError(f"{error.message} (hint: {error.hint})") from error


def inspected(path: str) -> Census:
    """Returns the census of a checkpoint.

    Raises:
      UsageError: there is nothing, or nothing in a known format.
      CorruptedError: it is not what was written.
    """
    with _usage():
        return inspect(path)


def check(args: argparse.Namespace) -> None:
    """Checks everything that can be checked before a target is made.

    Raises:
      UsageError: wrong paths; options that cannot be combined.
    """
    if not os.path.exists(args.source):
        raise UsageError(f"there is nothing at {args.source!r}")
    if os.path.lexists(args.destination):
        raise UsageError(f"there is already something at {args.destination!r}, and nothing is overwritten")
    statewise = args.to == "statewise" or (args.to is None and not args.destination.endswith(".safetensors"))
    if statewise and args.target is None:
        raise UsageError("a checkpoint of Statewise needs --target: only a model has the kinds and types of the leaves")
    if args.target is None and (args.kinds or args.abstract):
        raise UsageError("--kinds and --abstract are for a --target, and there is none")


def _renames(texts: list[str]) -> dict[str, str | None]:
    renames: dict[str, str | None] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(f"--rename {text!r} is not OLD=NEW")
        renames[old] = new or None
    return renames


def state_of(model: Any, abstract: bool, plan: Plan | None, kinds: Kinds | None) -> State:
    """Returns the state that a target stands for.

    Raises:
      UsageError: kinds for a target that is already planned.
    """
    if plan is not None and kinds is not None:
        raise UsageError("the target is already planned, by its own kinds: leave --kinds out")
    if isinstance(model, State):
        return model
    if plan is not None:
        return plan.abstract()
    objects = model if isinstance(model, (tuple, list)) else (model,)
    plan = (kinds or Kinds.standard()).plan(*objects)
    return plan.abstract() if abstract else plan.take(*objects)


def converted(args: argparse.Namespace, target: State | None) -> Conversion:
    """Converts, or reports what a conversion would do.

    Raises:
      UsageError: a source in an unknown format, a rename of an unknown name.
      StatewiseError: as raised by `sw.convert`.
    """
    with _usage():
        return convert(
            args.source,
            args.destination,
            target=target,
            to=args.to,
            rename=_renames(args.rename) or None,
            dry_run=args.dry_run,
            cast=args.cast,
        )


def is_checkpoint(text: str) -> bool:
    """Returns whether a side of a comparison is a path rather than a model's factory.

    Raises:
      UsageError: it is neither.
    """
    if os.path.exists(text):
        return True
    if ":" not in text:
        raise UsageError(f"there is nothing at {text!r}, and it is not package.module:factory or file.py:factory")
    return False


def differences(first: Any, second: Any, kinds: Kinds | None) -> Diff:
    """Compares two checkpoints, or a checkpoint and a model.

    Raises:
      UsageError: a path that is not a checkpoint.
      StatewiseError: as raised by `sw.diff`.
    """
    with _usage():
        return diff(first, second, kinds=kinds)


def reported(target: Any, other: Any, kinds: Kinds | None, mesh: dict[str, int] | None) -> Report:
    """Reports on models and checkpoints.

    Raises:
      UsageError: a path that is not a checkpoint.
      StatewiseError: as raised by `sw.report`.
    """
    with _usage():
        return report(target, other, kinds=kinds, mesh=mesh)
