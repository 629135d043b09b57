"""The requests of the commands on checkpoints, `inspect`, `convert`, `diff` and `report`: paths, names, and states.

A wrong request (a path that does not exist, or exists where it should not, an unknown name) is wrong usage; a problem
in a checkpoint is a finding.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from statewise._src.core.plan import Kinds, Plan, State
from statewise._src.inspect.select.select import objects_of
from statewise.cli.targets import UsageError

__all__ = ["check_conversion", "convert_by_names", "is_checkpoint", "renames", "state_of"]


def check_conversion(args: argparse.Namespace) -> None:
    """Checks everything that can be checked before a target is made.

    Raises:
      UsageError: wrong paths; options that cannot be combined.
    """
    # What is at a URL, only a store can say: the conversion asks it.
    if not (_is_url(args.source) or os.path.exists(args.source)):
        raise UsageError(f"there is nothing at {args.source!r}")
    # lexists: a broken link is something too.
    if not _is_url(args.destination) and os.path.lexists(args.destination):
        raise UsageError(f"there is already something at {args.destination!r}, and nothing is overwritten")
    if args.names is not None and args.target is None:
        raise UsageError("--names are those of the leaves of a --target, and there is none")
    if args.names is not None and args.rename:
        raise UsageError("--names and --rename do not go together")
    statewise = args.to == "statewise" or (args.to is None and not args.destination.endswith(".safetensors"))
    if statewise and args.target is None:
        raise UsageError("a checkpoint of Statewise needs --target: only a model has the kinds and types of the leaves")
    if args.target is None and (args.kinds or args.abstract):
        raise UsageError("--kinds and --abstract are for a --target, and there is none")


def _is_url(text: str) -> bool:
    return "://" in text


def convert_by_names(args: argparse.Namespace, target: State | None, names: Any) -> Any:
    """Reads files of other names into a target, or writes a checkpoint of the target's model as such files."""
    from statewise._src.checkpoint.interop.convert import convert
    from statewise._src.checkpoint.interop.foreign import is_foreign
    from statewise._src.checkpoint.restore import preview, restore

    assert target is not None, "checked before"
    if is_foreign(args.source):
        given = {"target": target, "to": args.to, "dry_run": args.dry_run, "cast": args.cast}
        return convert(args.source, args.destination, names=names, **given)
    if args.dry_run:
        preview(args.source, target, cast=args.cast).raise_problems()
        return convert(target, args.destination, names=names, to=args.to, dry_run=True)
    state, _ = restore(args.source, target, cast=args.cast)
    return convert(state, args.destination, names=names, to=args.to)


def renames(texts: list[str]) -> dict[str, str | None]:
    """Parses renames, `OLD=NEW` each; `OLD=` drops a name.

    Raises:
      UsageError: a text does not have that form.
    """
    names: dict[str, str | None] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(f"--rename {text!r} is not OLD=NEW")
        names[old] = new or None
    return names


def state_of(model: object, abstract: bool, plan: Plan | None, kinds: Kinds | None) -> State:
    """Returns the state that a target represents.

    Raises:
      UsageError: kinds for a target that is already planned.
    """
    if plan is not None and kinds is not None:
        raise UsageError("the target is already planned, by its own kinds: leave --kinds out")
    if isinstance(model, State):
        return model
    if plan is not None:
        return plan.abstract()
    objects = objects_of(model)
    plan = (kinds or Kinds.standard()).plan(*objects)
    return plan.abstract() if abstract else plan.take(*objects)


def is_checkpoint(text: str) -> bool:
    """Returns whether a side of a comparison is a path rather than a model's factory.

    Raises:
      UsageError: it is neither.
    """
    if _is_url(text) or os.path.exists(text):
        return True
    if ":" not in text:
        raise UsageError(f"there is nothing at {text!r}, and it is not package.module:factory or file.py:factory")
    return False
