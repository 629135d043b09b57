"""The function that a step is made of: what is refused where the step is written, and what when it is first called."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.core.plan import Kinds
from statewise._src.filters.explain import as_code
from statewise._src.plan.match import claimants
from statewise._src.step.closures import arrays_in, layers_of
from statewise.errors import DeclarationError, StructureError

__all__ = ["called_as", "check_capacity", "check_function", "kind_names", "parameters_of"]


def called_as(name: str, otherwise: str = "step") -> str:
    """Returns a function's name as code may have it: one that is made of a lambda has none there."""
    return name if name.isidentifier() else otherwise


def check_function(fn: Any, decorator: str) -> None:
    """Raises for what can be no step's function: a model, a method of one, a function under a transform of JAX.

    Args:
      fn: what the decorator was given.
      decorator: its name.

    Raises:
      StructureError: it is such a thing, and how to write it instead.
    """
    if not callable(fn):
        raise StructureError(f"{fn!r} is no function.", hint=f"@sw.{decorator}\ndef f(model, x): ...")
    layers = list(layers_of(fn))
    bound = [layer.__self__ for layer in layers if isinstance(layer, types.MethodType)]
    for layer in (*layers, *bound):
        # Where an inner layer is a method's function, its own `__self__` stands among the layers before it.
        if isinstance(layer, (nnx.Pytree, nnx.Variable)) and arrays_in(layer):
            _check_model(layer, layers, decorator)
    for layer in layers:
        called = inspect.getattr_static(type(layer), "__call__", None)
        transform = _transform(layer) or _transform(called)
        if transform is not None:
            _check_transform(layer, transform, decorator)
        if not isinstance(layer, (functools.partial, types.MethodType)):
            break  # what a decorator of somebody else does with what it wraps is not known


def _check_model(model: Any, layers: Sequence[Any], decorator: str) -> None:
    name = type(model).__name__
    method = next((layer.__name__ for layer in layers if isinstance(layer, types.MethodType)), "__call__")
    written = "model" if method == "__call__" else f"model.{method}"
    call = f"{written}(x)" if decorator != "train_step" else f"loss({written}(x), y)"
    given = "model, x, y" if decorator == "train_step" else "model, x"
    hint = f"@sw.{decorator}\ndef f({given}):\n    return {call}"
    if decorator == "scan_layers":
        hint = f"sw.scan_layers(lambda layer, x: {written.replace('model', 'layer')}(x), layers, x)"
    raise StructureError(
        f"sw.{decorator} is given {'a method of ' if written != 'model' else ''}a model, {name}, which brings its own "
        "arrays along; a step's function is given the planned objects.",
        hint=hint,
    )


def _check_transform(fn: Any, transform: str, decorator: str) -> None:
    name = getattr(fn, "__name__", type(fn).__name__)
    name = called_as(name, "f")
    given = "layer, x" if decorator == "scan_layers" else "model, x"
    if transform == "jax.jit":
        hint = f"sw.{decorator}({name}), where {name} is the function itself: a step compiles by itself"
        if decorator != "scan_layers":
            hint += "\nits options go to the step: static_argnames=, donate_argnames=, out_shardings= ..."
    elif transform == "jax.checkpoint":
        hint = f"sw.{decorator}(nnx.remat({name}))"
    else:
        x = given.rpartition(" ")[2]
        inner = f"{transform}(lambda {x}: {name}({given}))({x})"
        hint = f"sw.{decorator}(lambda {given}: {inner})"
    raise StructureError(
        f"sw.{decorator} is given {name} under {transform}, through which what it writes to the model is lost.",
        hint=hint,
    )


def _transform(fn: Any) -> str | None:
    """The transform of JAX that a callable was made by, where it is one that gives a function a copy of the model."""
    return _transforms().get(_made_by(fn)) if fn is not None else None


def _made_by(fn: Any) -> Any:
    """What tells the callables that one transform makes from others: their type, and the code that they share."""
    code = getattr(fn, "__code__", None) if isinstance(fn, types.FunctionType) else None
    if code is None:
        return type(fn)
    # One wrapper may serve several transforms: what it calls tells them apart, but for the user's own function.
    cells = [cell.cell_contents for cell in fn.__closure__ or () if cell != types.CellType()]
    own = getattr(fn, "__wrapped__", None)
    return code, tuple(one.__code__ for one in cells if isinstance(one, types.FunctionType) and one is not own)


def _sample(x: Any) -> Any:
    return x


@functools.cache
def _transforms() -> dict[Any, str]:
    """The transforms by what they make: found out by making one, so that nothing private of JAX has to be known."""
    made: dict[str, Callable[..., Any]] = {
        "jax.jit": jax.jit(_sample),
        "jax.checkpoint": jax.checkpoint(_sample),
        "jax.vmap": jax.vmap(_sample),
        "jax.grad": jax.grad(_sample),
        "jax.value_and_grad": jax.value_and_grad(_sample),
        "jax.jacfwd": jax.jacfwd(_sample),
        "jax.jacrev": jax.jacrev(_sample),
    }
    return {_made_by(fn): name for name, fn in made.items()}


def kind_names(names: Any, option: str, decorator: str) -> tuple[str, ...]:
    """The names of kinds that an option of a decorator was given: one, or several.

    Raises:
      DeclarationError: something else than names: a type, or a filter.
    """
    if isinstance(names, str):
        return (names,)
    several = isinstance(names, Collection) and not isinstance(names, type | dict)
    many = tuple(names) if several else (names,)
    if all(isinstance(name, str) for name in many):
        return many
    odd = next(name for name in many if not isinstance(name, str))
    kinds = [_kind_of(name) for name in many]
    if all(kinds):
        code = repr(kinds[0]) if len(kinds) == 1 else repr(tuple(kinds))
        hint = f"{option}={code}  # by the standard kinds; kinds of your own: print(plan)"
    else:
        hint = f"{option}='params'  # a kind's name: print(plan) shows them"
        if option == "wrt":
            hint += "\nor leave wrt out: all kinds that have an optimizer in the plan"
    raise DeclarationError(
        f"sw.{decorator}({option}=...) takes names of kinds, not {_shown(odd)}: the plan says which leaves a kind has.",
        hint=hint,
    )


def _kind_of(thing: Any) -> str | None:
    """The standard kind that a type, or a name, means."""
    if isinstance(thing, str):
        return thing
    if isinstance(thing, type) and issubclass(thing, nnx.Variable):
        # The standard filters look at nothing but the type, and can be asked about an instance that holds nothing.
        kinds = Kinds.standard()
        claims = claimants(kinds)((), object.__new__(thing))
        return claims[0] if claims and not kinds[claims[0]].rest else None
    return None


def _shown(thing: Any) -> str:
    if isinstance(thing, type):
        return f"the type {as_code(thing) if issubclass(thing, nnx.Variable) else thing.__name__}"
    if thing is None or thing is ... or isinstance(thing, (bool, int, float)):
        return repr(thing)
    return f"a {type(thing).__name__}"


def parameters_of(fn: Any) -> list[inspect.Parameter] | None:
    """A function's parameters; None where it does not tell."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return None  # of a builtin nobody knows


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_capacity(
    fn: Any, objects: int, args: Sequence[Any], name: str, types_of: Callable[[], Sequence[type]]
) -> None:
    """Raises where a function takes fewer arguments by position than there are planned objects and arguments.

    Args:
      fn: the function.
      objects: how many planned objects it is given.
      args: the other arguments by position.
      name: the step's name.
      types_of: gives the types of the planned objects.
    """
    parameters = parameters_of(fn)
    if parameters is None or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        return
    own = [one.name for one in parameters if one.kind in _BY_POSITION]
    if len(own) >= objects + len(args):
        return
    rest = own[1:] if len(own) > len(args) else own
    words = "1 object" if objects == 1 else f"{objects} objects"
    more = f", and {len(args)} more" if args else ""
    firsts = _object_names(types_of(), own[0] if len(own) > len(args) else None, rest)
    others = [rest[at] if at < len(rest) else f"x{at}" if at else "x" for at in range(len(args))]
    called = called_as(name, "f")
    raise StructureError(
        f"{name} takes {len(own)} argument{'s' * (len(own) != 1)} by position; the plan has {words}, which it is given "
        f"first{more}.",
        hint=f"def {called}({', '.join([*firsts, *others])}): ...",
    )


def _object_names(types_: Sequence[type], first: str | None, taken: Sequence[str]) -> list[str]:
    """Names for parameters that take the planned objects: the function's own first one, then by their types."""
    names: list[str] = []
    for position, cls in enumerate(types_):
        name = "model" if position == 0 else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if position == 0 and first is not None:
            name = first
        free = [name, *(f"{name}_{number}" for number in range(2, len(types_) + 3))]
        names.append(next(one for one in free if one not in names and one not in taken))
    return names
