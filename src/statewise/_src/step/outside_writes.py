"""What a step's function writes outside of its state: arguments, and objects that it brings along."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common.nnx_graph import ModelGraph, row_of
from statewise._src.common.paths import Leaf, Path
from statewise._src.step.closures import STATIC, Bound, Brought, brought, holder_of, parts_of, read_by
from statewise._src.step.effects import Effects
from statewise._src.step.function import called_as, parameters_of
from statewise._src.step.passed_objects import Passed, WrittenArgument
from statewise.errors import StructureError

__all__ = ["check_not_baked", "check_written_arguments", "names_of_objects", "own_name", "written_outside"]


def names_of_objects(fn: Any, objects: int) -> list[str]:
    """What a function calls the planned objects; `model` where it does not tell."""
    fn = fn.fn if isinstance(fn, Bound) else fn
    own = [one.name for one in parameters_of(fn) or () if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    rest = ["model"] if not own else []
    return [*own[:objects], *rest, *(f"object_{number}" for number in range(2, objects + 1))][:objects]


def _with_more(fn: Any, objects: int, more: Sequence[tuple[str, str]], name: str, optimizers: bool) -> str:
    """How to plan more objects, and how the function reads then; `more` are (expression, parameter)."""
    firsts = names_of_objects(fn, objects)
    expressions = ", ".join([*firsts, *(expression for expression, _ in more)])
    called = [parameter for _, parameter in more]
    own = [one for one in parameters_of(fn.fn if isinstance(fn, Bound) else fn) or () if one.name not in firsts]
    left = [str(one.replace(annotation=one.empty)) for one in own if one.name not in called]
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
    name_of: Callable[[Any], str],
    name: str,
    optimizers: bool,
) -> None:
    """Raises where a function writes to NNX objects among its arguments.

    Args:
      written: what it writes.
      fn: the function.
      objects: how many planned objects it is given.
      name_of: the name of an argument, by its place.
      name: the step's name.
      optimizers: whether the plan has optimizers.
    """
    if not written:
        return
    more: dict[str, str] = {}
    leaves, shown = [], {}
    for one in written:
        argument = name_of(one.place)
        argument = argument if argument.isidentifier() else f"args[{argument.rpartition(' ')[2]}]"
        expression = argument + jax.tree_util.keystr(one.inside)
        shown[expression] = one.object.__name__
        more.setdefault(expression, _identifier(expression, one.object, more))
        path: Path = (expression, *one.leaf.path)
        leaves.append(_moved(one.leaf, path))
    listed = ", ".join(f"`{expression}` ({cls})" for expression, cls in shown.items())
    raise StructureError(
        f"{name} writes to its argument{'s' * (len(shown) > 1)} {listed}, and what it writes would be lost: it is "
        "given a copy.",
        leaves=leaves,
        hint=_with_more(fn, objects, list(more.items()), name, optimizers),
    )


def _moved(leaf: Leaf, path: Path) -> Leaf:
    return Leaf(path, leaf.kind, leaf.type, leaf.shape, leaf.dtype, size=leaf.size, nbytes=leaf.nbytes, note=leaf.note)


def _identifier(expression: str, cls: type, taken: dict[str, str]) -> str:
    """A name for a parameter: the last name in an expression."""
    words: list[str] = re.findall(r"[A-Za-z_]\w*", expression)
    name = words[-1] if words else cls.__name__.lower()
    name += "_" * keyword.iskeyword(name)
    free = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
    return next(one for one in free if one not in taken.values())


def check_not_baked(effects: Effects, fn: Any, name: str) -> None:
    """Raises where the values of a static argument's Variables would be constants of the compiled step.

    Such an argument is known by its identity: a later call would not see that its Variables hold something else.
    """
    if not isinstance(fn, Bound):
        return
    static = [one for one in brought(fn) if one.where == STATIC]
    for one, leaves in read_by(effects.jaxpr, effects.consts, static):
        raise StructureError(
            f"{name} reads Variables of {one}: they would be constants of the compiled step.",
            leaves=[_moved(leaf, (one.name, *leaf.path)) for leaf in leaves],
            hint=f"take {one.name!r} out of static_argnames: Variables that are only read may be passed",
        )


def own_name(one: Brought, objects: Sequence[Any], fn: Any) -> str | None:
    """What the function calls the planned object that was probably meant: the one of the same type."""
    names = names_of_objects(fn, len(objects))
    same = [name for name, thing in zip(names, objects, strict=True) if type(thing) is type(one.thing)]
    return same[0] if same and same[0] != one.name else None


def written_outside(
    error: Exception, fn: Any, objects: Sequence[Any], before: ModelGraph, passed: Passed, name: str, optimizers: bool
) -> StructureError | None:
    """The error for a write that Flax refused because the object is of another trace; None where it is nobody's.

    Args:
      error: Flax's.
      fn: the function.
      objects: the objects that it was given.
      before: their leaves.
      passed: the objects among its other arguments.
      name: the step's name.
      optimizers: whether the plan has optimizers.
    """
    part = _written_part(error)
    if part is None:
        return None
    of_model = zip(before.paths, before.leaves, strict=True)
    for what, known in (("the model", of_model), ("an argument", passed.variables)):
        leaves = [row_of(path, leaf, note="written") for path, leaf in known if leaf is part]
        own = objects if what == "the model" else passed.objects
        if leaves or any(other is part for thing in own for other in parts_of(thing)):
            return StructureError(
                f"{name} writes to {what} inside a function that JAX traces by itself (under jax.jit, jax.checkpoint, "
                f"jax.grad, jax.vmap, jax.lax.scan ...), and that reaches {what} by its closure.",
                leaves=leaves,
                hint="nnx.jit, nnx.remat, nnx.grad, nnx.vmap, nnx.scan ..., with it as an argument of the function",
            )
    found = holder_of(brought(fn), part)
    return None if found is None else _brought_and_written(found, part, fn, objects, name, optimizers)


def _brought_and_written(
    found: Brought, part: Any, fn: Any, objects: Sequence[Any], name: str, optimizers: bool
) -> StructureError:
    thing = found.thing
    paths = [] if isinstance(thing, nnx.State) else list(nnx.iter_graph(thing))
    path = next((path for path, other in paths if other is part), ())
    leaves = [row_of((found.name, *path), part, note="written")] if isinstance(part, nnx.Variable) else []
    own = own_name(found, objects, fn)
    lines = [f"use `{own}`, which the step is given, in the place of `{found.name}`"] if own else []
    plan = _with_more(fn, len(objects), [(found.name, _identifier(found.name, type(thing), {}))], name, optimizers)
    lines.append(f"or plan it as one more object:\n{plan}" if own else plan)
    return StructureError(
        f"{name} writes to {found}: a step writes only what it is given.", leaves=leaves, hint="\n".join(lines)
    )


def _written_part(error: Exception) -> Any:
    """The Variable or module that Flax refused to write: the last that a method in the traceback was called on."""
    part, trace = None, error.__traceback__
    while trace is not None:
        own = trace.tb_frame.f_locals.get("self")
        part = own if isinstance(own, (nnx.Variable, nnx.Pytree)) else part
        trace = trace.tb_next
    return part
