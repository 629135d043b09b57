"""Writes of a step's function outside of its state: to arguments, and to objects that it reaches by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from flax.errors import ImmutableVariableError

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ModelError, ModelGraph, made_plain, named, row_of
from statewise._src.step.arguments import Bound, parameters_of, unused_name
from statewise._src.step.closures import STATIC, Brought, brought, holder_of, parts_of, read_by
from statewise._src.step.effects import Effects
from statewise._src.step.function import called_as, positional_names
from statewise._src.step.passed_objects import Passed, WrittenArgument
from statewise.errors import StructureError

__all__ = [
    "check_not_baked",
    "check_written_arguments",
    "instead_of",
    "plain_variables",
    "written_outside",
    "written_variable",
]


def _names_of_objects(fn: Any, objects: int) -> list[str]:
    """Returns the function's names for the planned objects; `model` if they cannot be determined."""
    own = positional_names(fn) or ["model"]
    return [*own[:objects], *(f"object_{number}" for number in range(2, objects + 1))][:objects]


def _with_more(fn: Any, objects: int, more: Sequence[tuple[str, str]], name: str, optimizers: bool) -> str:
    """Returns code that plans more objects, with the function's new signature; `more` are (expression, parameter)."""
    firsts = _names_of_objects(fn, objects)
    expressions = ", ".join([*firsts, *(expression for expression, _ in more)])
    # Among the function's own parameters, those of the planned objects come first, and the new ones move there.
    called = [parameter for _, parameter in more]
    parameters = parameters_of(fn) or ()
    own = [parameter for parameter in parameters if parameter.name not in firsts]
    left = [str(parameter.replace(annotation=parameter.empty)) for parameter in own if parameter.name not in called]
    signature = ", ".join([*firsts, *called, *left])
    return (
        f"plan = kinds.plan({expressions}{', optimizers=optimizers' if optimizers else ''})\n"
        f"state = plan.take({expressions})\n"
        f"def {called_as(name, 'f')}({signature}): ..."
    )


def check_written_arguments(
    written: Sequence[WrittenArgument],
    fn: Any,
    objects: int,
    name_of: Callable[[int | str], str],
    name: str,
    optimizers: bool,
) -> None:
    """Checks that a function does not write to NNX objects among its arguments.

    Args:
      written: what it writes to them.
      fn: the function.
      objects: the number of planned objects that it takes.
      name_of: returns the name of an argument, given its position or name.
      name: the step's name.
      optimizers: whether the plan has optimizers.
    """
    if not written:
        return
    # From the expression that leads to each object (`batch['metrics']`) to the parameter that it would become.
    more: dict[str, str] = {}
    leaves, shown = [], {}
    for write in written:
        argument = name_of(write.place)
        # An argument without a name is "number 3": as code, an item of `args`.
        argument = argument if argument.isidentifier() else f"args[{argument.rpartition(' ')[2]}]"
        expression = argument + jax.tree_util.keystr(write.inside)
        shown[expression] = write.object.__name__
        more.setdefault(expression, _identifier(expression, write.object, more))
        leaves.append(dataclasses.replace(write.leaf, path=(expression, *write.leaf.path)))
    listed = ", ".join(f"`{expression}` ({cls})" for expression, cls in shown.items())
    raise StructureError(
        f"{name} writes to its argument{'s' * (len(shown) > 1)} {listed}, and the write would be lost: the function "
        "receives a copy.",
        leaves=leaves,
        hint=_with_more(fn, objects, list(more.items()), name, optimizers),
    )


def _identifier(expression: str, cls: type, taken: dict[str, str]) -> str:
    """Returns a name for a parameter: the last name in an expression."""
    words: list[str] = re.findall(r"[A-Za-z_]\w*", expression)
    name = words[-1] if words else cls.__name__.lower()
    name += "_" * keyword.iskeyword(name)
    return unused_name(name, taken.values())


def check_not_baked(effects: Effects, fn: Any, name: str) -> None:
    """Checks that a static argument's Variables do not become constants of the compiled step.

    Such an argument is identified by its `id`: a later call would not notice new values in its Variables.
    """
    if not isinstance(fn, Bound):
        return
    static = [reachable for reachable in brought(fn) if reachable.where == STATIC]
    for argument, leaves in read_by(effects.jaxpr, effects.consts, static):
        raise StructureError(
            f"{name} reads Variables of {argument}: they would be constants of the compiled step.",
            leaves=[dataclasses.replace(leaf, path=(argument.name, *leaf.path)) for leaf in leaves],
            hint=f"take {argument.name!r} out of static_argnames: Variables that are only read may be passed",
        )


def instead_of(used: Brought, objects: Sequence[Any], fn: Any) -> str | None:
    """Returns the hint to use the planned object that was probably meant, of the same type; None if there is none."""
    names = _names_of_objects(fn, len(objects))
    same = [name for name, planned in zip(names, objects, strict=True) if type(planned) is type(used.obj)]
    if not same or same[0] == used.name:
        return None
    return f"use `{same[0]}`, the step's argument, instead of `{used.name}`"


def written_outside(
    error: Exception, fn: Any, objects: Sequence[Any], before: ModelGraph, passed: Passed, name: str, optimizers: bool
) -> StructureError | None:
    """Returns the error for a write to an object of another trace, which Flax rejects; None for an unknown object.

    Args:
      error: Flax's error.
      fn: the function.
      objects: the objects that it received.
      before: their leaves.
      passed: the objects among its other arguments.
      name: the step's name.
      optimizers: whether the plan has optimizers.
    """
    part = _written_part(error)
    if part is None:
        return None
    # Flax rejects the write because the object belongs to an outer trace.  If it is one that the function received,
    # the inner trace is one that the function started itself.
    of_model = zip(before.paths, before.leaves, strict=True)
    for what, known in (("the model", of_model), ("an argument", passed.variables)):
        leaves = [row_of(path, leaf, note="written") for path, leaf in known if leaf is part]
        own = objects if what == "the model" else passed.objects
        # A hijax Variable that was not there before is one that the function made.
        is_own = not compat.is_hijax(part) and any(other is part for planned in own for other in parts_of(planned))
        if leaves or is_own:
            return StructureError(
                f"{name} writes to {what} inside a function that JAX traces (under jax.jit, jax.checkpoint, jax.grad, "
                f"jax.vmap, jax.lax.scan ...) and that reaches {what} by its closure.",
                leaves=leaves,
                hint="nnx.jit, nnx.remat, nnx.grad, nnx.vmap, nnx.scan ..., passing it to the function as an argument",
            )
    if isinstance(part, compat.Tracer):
        return _not_writable(part, objects, name, before.names)
    if compat.is_hijax(part):
        return written_variable(part, fn, objects, name, optimizers)
    holder = holder_of(brought(fn), part)
    return None if holder is None else _brought_and_written(holder, part, fn, objects, name, optimizers)


@contextlib.contextmanager
def plain_variables(fn: Any, objects: Sequence[Any], name: str) -> Iterator[None]:
    """Makes new Variables plain ones while a function is traced: no version of Flax can write others in every trace.

    Args:
      fn: the function.
      objects: the objects that it received.
      name: its name.

    Raises:
      ModelError: the function asks for a hijax Variable and writes to it, which Flax refuses.
    """
    with nnx.var_defaults(hijax=False, ref=False):
        try:
            yield
        except ImmutableVariableError as error:
            part = _written_part(error)
            if part is None or holder_of(brought(fn), part) is not None:
                raise
            raise _not_writable(part, objects, name) from error


def _not_writable(part: Any, objects: Sequence[Any], name: str, names: Sequence[str] = ()) -> StructureError:
    """Returns the error for a write to a hijax Variable that the function made, or that no search finds."""
    root = objects[0] if len(objects) == 1 and not names else tuple(objects)
    paths = (path for path, other in nnx.iter_graph(root, graph=True) if other is part)
    return ModelError(
        f"{name} writes to a hijax Variable, which Flax refuses where a function is traced.",
        leaves=[row_of(named(next(paths, ()), names), part, note=compat.reference(part))],
        hint=made_plain([compat.variable_type(part)]),
    )


def written_variable(part: Any, fn: Any, objects: Sequence[Any], name: str, optimizers: bool) -> StructureError:
    """Returns the error for a write to a hijax Variable from outside, where Flax itself lets a trace do so.

    Args:
      part: the Variable.
      fn: the function.
      objects: the planned objects.
      name: the step's name.
      optimizers: whether the plan has optimizers.
    """
    holder = holder_of(brought(fn), part)
    if holder is not None:
        return _brought_and_written(holder, part, fn, objects, name, optimizers)
    return StructureError(
        f"{name} writes to a hijax Variable from outside: a step writes only the objects that it receives.",
        leaves=[row_of((), part, note="written")],
        hint="plan the object that holds it as an additional one: kinds.plan(model, other)",
    )


def _brought_and_written(
    used: Brought, part: Any, fn: Any, objects: Sequence[Any], name: str, optimizers: bool
) -> StructureError:
    obj = used.obj
    paths = [] if compat.is_nnx_state(obj) else list(nnx.iter_graph(obj, graph=True))
    path = next((path for path, other in paths if other is part), ())
    leaves = [row_of((used.name, *path), part, note="written")] if isinstance(part, nnx.Variable) else []
    instead = instead_of(used, objects, fn)
    plan = _with_more(fn, len(objects), [(used.name, _identifier(used.name, type(obj), {}))], name, optimizers)
    lines = [instead, f"or plan it as an additional object:\n{plan}"] if instead else [plan]
    return StructureError(
        f"{name} writes to {used}: a step writes only the objects that it receives.",
        leaves=leaves,
        hint="\n".join(lines),
    )


def _written_part(error: Exception) -> Any:
    """Returns the Variable or module that Flax refused to write: the object of the last method in the traceback."""
    # Flax's error does not carry the object, so it is read from the frames: the innermost one comes last.  The methods
    # of a hijax Variable do not call their first argument `self`.
    part, trace = None, error.__traceback__
    while trace is not None:
        first = trace.tb_frame.f_code.co_varnames[:1]
        own = trace.tb_frame.f_locals.get(first[0]) if first else None
        part = own if isinstance(own, (nnx.Variable, nnx.Pytree)) else part
        trace = trace.tb_next
    if isinstance(error, ImmutableVariableError) and not compat.is_hijax(part):
        return None  # Linen's error has the same type
    return part
