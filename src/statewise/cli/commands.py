"""The commands: each makes its target, inspects it, and prints the result."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from flax import nnx

from statewise._src.common.nnx_graph import ModelError
from statewise._src.common.tables import Table, leaf_dict
from statewise._src.core.plan import Kinds, Plan, State
from statewise._src.inspect.census import census
from statewise._src.inspect.lint.lint import lint
from statewise._src.inspect.memory import memory
from statewise._src.inspect.select.select import explain
from statewise.cli.expressions import parse_filter, types_by_name
from statewise.cli.targets import Target, UsageError, load, one_line, parse_mesh
from statewise.errors import DeclarationError, FilterError, StatewiseError

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Runs one command; returns the exit status."""
    try:
        with contextlib.ExitStack() as stack:
            return _COMMANDS[args.command](args, stack)
    except UsageError as error:
        print(f"statewise: {error}", file=sys.stderr)
        return 2
    except (ModelError, FilterError, DeclarationError) as error:
        hint = f" (hint: {one_line(error.hint)})" if error.hint else ""
        print(f"statewise: {one_line(error.message)}{hint}", file=sys.stderr)
        return 2
    except StatewiseError as error:
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
        "leaves": [leaf_dict(leaf) for leaf in error.leaves],
        "kind": error.kind,
        "hint": error.hint,
    }


def _census(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, _ = _model(args, stack)
    counted = census(model, _kinds(args, stack))
    return _show(args, counted.table(), counted.to_dict())


def _plan(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    plan = _plan_of(args, stack)
    return _show(
        args,
        plan.table(),
        {
            "leaves": list(map(leaf_dict, plan.leaves)),
            "excluded": list(map(leaf_dict, plan.excluded)),
            **census(plan).to_dict(),
        },
    )


def _plan_of(args: argparse.Namespace, stack: contextlib.ExitStack) -> Plan:
    model, _ = _model(args, stack)
    plan = _planned(model)
    if plan is None:
        kinds = _kinds(args, stack) or Kinds.standard()
        return kinds.plan(*model) if isinstance(model, (tuple, list)) else kinds.plan(model)
    if args.kinds:
        raise UsageError(f"{args.target} is already planned, by its own kinds: leave --kinds out")
    return plan


def _memory(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    axes = parse_mesh(args.mesh)
    counted = memory(_plan_of(args, stack), axes)
    return _show(args, counted.table(), counted.to_dict())


def _lint(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, _ = _model(args, stack)
    findings = lint(model, kinds=_kinds(args, stack), ignore=args.ignore, decode_length=args.decode_length)
    print(findings.to_json() if args.json else findings)
    return 1 if findings else 0


def _explain(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    model, target = _model(args, stack)
    types = {leaf.type for leaf in explain(model, ...).leaves}
    explanation = explain(model, parse_filter(args.filter, target.module, types_by_name(types)))
    return _show(args, explanation.table(), explanation.to_dict())


def _demo(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.examples import demo

    settings = demo.Settings(steps=args.steps) if args.steps else None
    try:
        return demo.main(settings, as_json=args.json)
    except AssertionError as error:
        print(f"statewise: {one_line(str(error))}", file=sys.stderr)
        return 1


def _inspect(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.cli import checkpoints

    counted = checkpoints.inspected(args.path)
    return _show(args, counted.table(), counted.to_dict())


def _convert(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.cli import checkpoints

    checkpoints.check(args)
    model = None if args.target is None else _model(args, stack)[0]
    target = None if model is None else checkpoints.state_of(model, args.abstract, _planned(model), _kinds(args, stack))
    conversion = checkpoints.converted(args, target)
    _show(args, conversion.table(), conversion.to_dict())
    return 0 if conversion.ok else 1


def _diff(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.cli import checkpoints

    first, second = (
        text if checkpoints.is_checkpoint(text) else _model(argparse.Namespace(target=text, abstract=False), stack)[0]
        for text in (args.first, args.second)
    )
    difference = checkpoints.differences(first, second, _kinds(args, stack))
    _show(args, difference.table(), difference.to_dict())
    return 1 if difference else 0


def _report(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from statewise.cli import checkpoints

    if args.output is None and not args.json:
        raise UsageError("the page needs a file name: -o report.html")
    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    target, other = (
        text
        if text is None or checkpoints.is_checkpoint(text)
        else _model(argparse.Namespace(target=text, abstract=args.abstract), stack)[0]
        for text in (args.target, args.other)
    )
    page = dataclasses.replace(checkpoints.reported(target, other, _kinds(args, stack), mesh), title=args.target)
    if args.output is not None:
        try:
            page.write(args.output)
        except OSError as error:
            raise UsageError(f"{args.output!r} cannot be written: {error.strerror or error}") from error
    _show(args, page.table(), page.to_dict())
    return 0 if page.ok else 1


_COMMANDS = {
    "census": _census,
    "plan": _plan,
    "explain": _explain,
    "memory": _memory,
    "lint": _lint,
    "report": _report,
    "inspect": _inspect,
    "convert": _convert,
    "diff": _diff,
    "demo": _demo,
}


def _model(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Any, Target]:
    """Returns the model that the target names, or that its function returns."""
    # What a user's module prints does not belong to this output, which may be JSON for another program.
    with contextlib.redirect_stdout(sys.stderr):
        target = load(args.target, stack)
        model = target.evaluated(_is_model, nnx.eval_shape if args.abstract else None)
    return model, target


def _is_model(value: Any) -> bool:
    # Modules are callable, but are models nevertheless.
    return isinstance(value, (nnx.Pytree, nnx.Variable, nnx.State, tuple, list, dict)) or _planned(value) is not None


def _planned(value: Any) -> Plan | None:
    return value if isinstance(value, Plan) else value.plan if isinstance(value, State) else None


def _kinds(args: argparse.Namespace, stack: contextlib.ExitStack) -> Kinds | None:
    if args.kinds is None:
        return None
    with contextlib.redirect_stdout(sys.stderr):
        kinds = load(args.kinds, stack).evaluated(lambda value: isinstance(value, Kinds))
    if not isinstance(kinds, Kinds):
        raise UsageError(f"{args.kinds} is {type(kinds).__name__}, not Kinds")
    return kinds


def _show(args: argparse.Namespace, table: Table, data: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps(data, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(table)
    else:
        print(table)
    return 0
