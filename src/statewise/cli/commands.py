"""The commands: each makes its target, inspects it, and prints the result.

The commands on checkpoints import Orbax when they run; the others do not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ModelError
from statewise._src.common.tables import Shown, leaf_dict
from statewise._src.common.variable_forms import abstract_objects
from statewise._src.core.plan import Kinds, Plan, State
from statewise._src.inspect.census import census
from statewise._src.inspect.lint.lint import lint
from statewise._src.inspect.memory import memory
from statewise._src.inspect.select.select import explain, objects_of
from statewise._src.step.step import Step
from statewise.cli import checkpoints
from statewise.cli.expressions import parse_filter, types_by_name
from statewise.cli.targets import Target, UsageError, load, one_line, parse_mesh
from statewise.errors import DeclarationError, FilterError, RestoreError, StatewiseError

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Runs one command; returns the exit status."""
    try:
        with contextlib.ExitStack() as stack:
            return _COMMANDS[args.command](args, stack)
    except UsageError as error:
        print(f"statewise: {error}", file=sys.stderr)
        return 2
    except StatewiseError as error:
        # A restore error without leaves is about the paths or names in the request.
        about_request = isinstance(error, RestoreError) and not error.leaves
        if about_request or isinstance(error, (ModelError, FilterError, DeclarationError)):
            hint = f" (hint: {one_line(error.hint)})" if error.hint else ""
            print(f"statewise: {one_line(error.message)}{hint}", file=sys.stderr)
            return 2
        if args.json:
            print(json.dumps(_error_dict(error), indent=2))
        else:
            print(f"statewise: {error}", file=sys.stderr)
        # Like diff(1): files that cannot be compared are neither equal nor different.
        return 2 if args.command == "diff" else 1


def _error_dict(error: StatewiseError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "message": error.message,
        "leaves": list(map(leaf_dict, error.leaves)),
        "kind": error.kind,
        "hint": error.hint,
    }


def _census(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, _ = _model(args.target, args.abstract, stack)
    counted = census(model, _kinds(args, stack))
    return _show(args, counted, counted.to_dict())


def _plan(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    plan = _plan_of(args, stack)
    leaves = {"leaves": list(map(leaf_dict, plan.leaves)), "excluded": list(map(leaf_dict, plan.excluded))}
    return _show(args, plan, leaves | census(plan).to_dict())


def _plan_of(args: argparse.Namespace, stack: contextlib.ExitStack) -> Plan:
    model, _ = _model(args.target, args.abstract, stack)
    plan = _planned(model)
    if plan is None:
        return (_kinds(args, stack) or Kinds.standard()).plan(*objects_of(model))
    if args.kinds:
        raise UsageError(f"{args.target} is already planned, by its own kinds: leave --kinds out")
    return plan


def _memory(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    axes = parse_mesh(args.mesh)
    counted = memory(_plan_of(args, stack), axes)
    return _show(args, counted, counted.to_dict())


def _lint(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, _ = _model(args.target, args.abstract, stack)
    kinds, steps = _kinds(args, stack), [_step(text, stack) for text in args.step]
    findings = lint(model, kinds=kinds, ignore=args.ignore, decode_length=args.decode_length, steps=steps)
    print(findings.to_json() if args.json else findings)
    return 1 if findings else 0


def _explain(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, target = _model(args.target, args.abstract, stack)
    types = {leaf.type for leaf in explain(model, ...).leaves}
    explanation = explain(model, parse_filter(args.filter, target.module, types_by_name(types)))
    return _show(args, explanation, explanation.to_dict())


def _demo(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.examples import demo

    settings = demo.Settings(steps=args.steps) if args.steps else None
    try:
        return demo.main(settings, as_json=args.json)
    except AssertionError as error:
        print(f"statewise: {one_line(str(error))}", file=sys.stderr)
        return 1


def _inspect(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise._src.checkpoint.restore import inspect

    counted = inspect(args.path)
    return _show(args, counted, counted.to_dict())


def _names(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise._src.checkpoint.names import Names

    names = Names({}) if args.names is None else _names_of(args.names, stack)
    plan = _plan_of(args, stack)
    path = args.path[0] if len(args.path) == 1 else args.path
    if args.action == "check":
        report = names.check(plan, path)
        return _show(args, report, report.to_dict(), ok=report.ok)
    proposal = names.infer(plan, path)
    print(json.dumps(proposal.to_dict(), indent=2) if args.json else proposal)
    return 1 if proposal.undecided else 0


def _convert(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise._src.checkpoint.interop.convert import convert

    checkpoints.check_conversion(args)
    target = None
    if args.target is not None:
        model, _ = _model(args.target, args.abstract, stack)
        target = checkpoints.state_of(model, args.abstract, _planned(model), _kinds(args, stack))
    rename = checkpoints.renames(args.rename) or None
    if args.names is not None:
        conversion = checkpoints.convert_by_names(args, target, _names_of(args.names, stack))
        return _show(args, conversion, conversion.to_dict(), ok=conversion.ok)
    conversion = convert(
        args.source, args.destination, target=target, to=args.to, rename=rename, dry_run=args.dry_run, cast=args.cast
    )
    return _show(args, conversion, conversion.to_dict(), ok=conversion.ok)


def _diff(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise._src.checkpoint.diff.diff import diff

    first, second = (_side(text, False, stack) for text in (args.first, args.second))
    difference = diff(first, second, kinds=_kinds(args, stack))
    return _show(args, difference, difference.to_dict(), ok=not difference)


def _report(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise._src.report.report import report

    if args.output is None and not args.json:
        raise UsageError("the page needs a file name: -o report.html")
    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    target = _side(args.target, args.abstract, stack)
    other = None if args.other is None else _side(args.other, args.abstract, stack)
    page = dataclasses.replace(report(target, other, kinds=_kinds(args, stack), mesh=mesh), title=args.target)
    if args.output is not None:
        try:
            page.write(args.output)
        except OSError as error:
            raise UsageError(f"{args.output!r} cannot be written: {error.strerror or error}") from error
    return _show(args, page, page.to_dict(), ok=page.ok)


_COMMANDS = {
    "census": _census,
    "plan": _plan,
    "explain": _explain,
    "memory": _memory,
    "lint": _lint,
    "report": _report,
    "inspect": _inspect,
    "convert": _convert,
    "names": _names,
    "diff": _diff,
    "demo": _demo,
}


def _model(text: str, abstract: bool, stack: contextlib.ExitStack) -> tuple[Any, Target]:
    """Returns the model that a target's text names, or that its function returns."""
    # What a user's module prints does not belong to this output, which may be JSON for another program.
    with contextlib.redirect_stdout(sys.stderr):
        target = load(text, stack)
        model = target.evaluated(_is_model, abstract_objects if abstract else None)
    return model, target


def _side(text: str, abstract: bool, stack: contextlib.ExitStack) -> Any:
    """Returns a side of a comparison: the path of a checkpoint, or a model."""
    return text if checkpoints.is_checkpoint(text) else _model(text, abstract, stack)[0]


def _is_model(value: object) -> bool:
    # Modules are callable, but are models nevertheless.
    is_container = isinstance(value, (nnx.Pytree, nnx.Variable, tuple, list, dict)) or compat.is_nnx_state(value)
    return is_container or _planned(value) is not None


def _planned(value: object) -> Plan | None:
    return value if isinstance(value, Plan) else value.plan if isinstance(value, State) else None


def _kinds(args: argparse.Namespace, stack: contextlib.ExitStack) -> Kinds | None:
    if args.kinds is None:
        return None
    return _declared(args.kinds, stack, Kinds)


def _names_of(text: str, stack: contextlib.ExitStack) -> Any:
    """Returns the names that a text means."""
    from statewise._src.checkpoint.names import Names

    return _declared(text, stack, Names)


def _declared(text: str, stack: contextlib.ExitStack, wanted: type) -> Any:
    """Returns the declaration that a text means: one of a class, or a function that returns one."""
    with contextlib.redirect_stdout(sys.stderr):
        found = load(text, stack).evaluated(lambda value: isinstance(value, wanted), wanted=wanted.__name__)
    if not isinstance(found, wanted):
        raise UsageError(f"{text} is {type(found).__name__}, not {wanted.__name__}")
    return found


def _step(text: str, stack: contextlib.ExitStack) -> Step[..., Any]:
    """Returns the step that a text names."""
    with contextlib.redirect_stdout(sys.stderr):
        step = load(text, stack).value
    if not isinstance(step, Step):
        raise UsageError(f"{text} is {type(step).__name__}, not a step")
    return step


def _show(args: argparse.Namespace, result: Shown, data: dict[str, Any], ok: bool = True) -> int:
    """Prints a result as JSON, with colors in a terminal, or as plain text; returns the exit status."""
    if args.json:
        print(json.dumps(data, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(result)
    else:
        print(result.table())
    return 0 if ok else 1
