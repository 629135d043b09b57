"""The commands on checkpoints: `inspect`, `convert`, `diff`, and `report`, which takes them too.

What was asked for wrongly (nothing at a path, something where there should be nothing, a name that is not there) is
wrong usage; what is found in a checkpoint is a finding.
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
    """A refusal that names no leaf is one of the paths or names that were asked for."""
    try:
        yield
    except RestoreError as error:
        if error.leaves:
            raise
        raise UsageError(f"{error.message} (hint: {error.hint})") from error


def inspected(path: str) -> Census:
    """The census of a checkpoint.

    Raises:
      UsageError: there is nothing, or nothing that is known.
      CorruptedError: it is not what was written.
    """
    with _usage():
        return inspect(path)


def check(args: argparse.Namespace) -> None:
    """What can be refused before a target is made.

    Raises:
      UsageError: paths that are not what they should be; options that do not fit together.
    """
    if not os.path.exists(args.source):
        raise UsageError(f"there is nothing at {args.source!r}")
    if os.path.lexists(args.destination):
        raise UsageError(f"there is something at {args.destination!r} already, and nothing is written over")
    statewise = args.to == "statewise" or (args.to is None and not args.destination.endswith(".safetensors"))
    if statewise and args.target is None:
        raise UsageError("a checkpoint of Statewise needs --target: only a model has the kinds and types of the leaves")
    if args.target is None and (args.kinds or args.abstract):
        raise UsageError("--kinds and --abstract are for a --target, and there is none")


def _renames(texts: list[str]) -> dict[str, str | None]:
    made: dict[str, str | None] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(f"--rename {text!r} is not OLD=NEW")
        made[old] = new or None
    return made


def state_of(model: Any, abstract: bool, plan: Plan | None, kinds: Kinds | None) -> State:
    """The state that a target stands for.

    Raises:
      UsageError: kinds for what is planned already.
    """
    if plan is not None and kinds is not None:
        raise UsageError("the target is planned already, by kinds of its own: leave --kinds out")
    if isinstance(model, State):
        return model
    if plan is not None:
        return plan.abstract()
    objects = model if isinstance(model, (tuple, list)) else (model,)
    plan = (kinds or Kinds.standard()).plan(*objects)
    return plan.abstract() if abstract else plan.take(*objects)


def converted(args: argparse.Namespace, target: State | None) -> Conversion:
    """Converts, or tells what a conversion would do.

    Raises:
      UsageError: a source that is nothing known, a rename of what is not there.
      StatewiseError: whatever `sw.convert` refuses.
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
    """Whether a side of a comparison is a path, not a model's factory.

    Raises:
      UsageError: it is neither.
    """
    if os.path.exists(text):
        return True
    if ":" not in text:
        raise UsageError(f"there is nothing at {text!r}, nor is it package.module:factory or file.py:factory")
    return False


def differences(first: Any, second: Any, kinds: Kinds | None) -> Diff:
    """Compares two checkpoints, or a checkpoint and a model.

    Raises:
      UsageError: a path that is no checkpoint.
      StatewiseError: whatever `sw.diff` refuses.
    """
    with _usage():
        return diff(first, second, kinds=kinds)


def reported(target: Any, other: Any, kinds: Kinds | None, mesh: dict[str, int] | None) -> Report:
    """Reports on models and checkpoints.

    Raises:
      UsageError: a path that is no checkpoint.
      StatewiseError: whatever `sw.report` refuses.
    """
    with _usage():
        return report(target, other, kinds=kinds, mesh=mesh)
