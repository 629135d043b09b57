"""The function that a step is made of: what is checked when the step is defined, and when it is first called."""

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
from statewise._src.step.arguments import parameters_of, unused_name
from statewise._src.step.closures import arrays_in, layers_of
from statewise.errors import DeclarationError, StructureError

__all__ = ["called_as", "check_capacity", "check_function", "kind_names", "named_like", "positional_names"]


def called_as(name: str, otherwise: str = "step") -> str:
    """Returns a function's name as code can use it; a lambda has none, so it gets `otherwise`."""
    return name if name.isidentifier() else otherwise


def named_like(wrapper: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a wrapper the name and docstring of its function, but not its annotations: it takes or returns others."""
    functools.update_wrapper(wrapper, fn, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    del vars(wrapper)["__wrapped__"]
    return wrapper


def check_function(fn: object, decorator: str) -> None:
    """Checks that a step can be made of a function: not a model, a method of one, or a function under a JAX transform.

    Args:
      fn: what the decorator was given.
      decorator: its name.

    Raises:
      StructureError: it is one of these; with the way to write it instead.
    """
    if not callable(fn):
        raise StructureError(f"{fn!r} is not a function.", hint=f"@sw.{decorator}\ndef f(model, x): ...")
    layers = list(layers_of(fn))
    bound = [layer.__self__ for layer in layers if isinstance(layer, types.MethodType)]
    for layer in (*layers, *bound):
        # If an inner layer is a method's function, the method's `__self__` is among the layers before it.
        if isinstance(layer, (nnx.Pytree, nnx.Variable)) and arrays_in(layer):
            _check_model(layer, layers, decorator)
    for layer in layers:
        # An object may be transformed by its class: `__call__ = jax.jit(...)`, or a decorated `__call__`.
        called = inspect.getattr_static(type(layer), "__call__", None)
        transform = _transform(layer) or _transform(called)
        if transform is not None:
            _check_transform(layer, transform, decorator)
        if not isinstance(layer, (functools.partial, types.MethodType)):
            break  # it is unknown what a user's decorator does with the function that it wraps


def _check_model(model: object, layers: Sequence[Any], decorator: str) -> None:
    name = type(model).__name__
    method = next((layer.__name__ for layer in layers if isinstance(layer, types.MethodType)), "__call__")
    written = "model" if method == "__call__" else f"model.{method}"
    call = f"{written}(x)" if decorator != "train_step" else f"loss({written}(x), y)"
    given = "model, x, y" if decorator == "train_step" else "model, x"
    hint = f"@sw.{decorator}\ndef f({given}):\n    return {call}"
    if decorator == "scan_layers":
        hint = f"sw.scan_layers(lambda layer, x: {written.replace('model', 'layer')}(x), layers, x)"
    raise StructureError(
        f"sw.{decorator} received {'a method of ' if written != 'model' else ''}a model, {name}, which brings its own "
        "arrays; a step's function must take the planned objects as arguments.",
        hint=hint,
    )


def _check_transform(fn: object, transform: str, decorator: str) -> None:
    name = called_as(getattr(fn, "__name__", type(fn).__name__), "f")
    given = "layer, x" if decorator == "scan_layers" else "model, x"
    if transform == "jax.jit":
        hint = f"sw.{decorator}({name}), where {name} is the function itself: a step compiles it"
        if decorator != "scan_layers":
            hint += "\npass its options to the step: static_argnames=, donate_argnames=, out_shardings= ..."
    elif transform == "jax.checkpoint":
        hint = f"sw.{decorator}(nnx.remat({name}))"
    else:
        hint = f"sw.{decorator}(lambda {given}: {transform}(lambda x: {name}({given}))(x))"
    raise StructureError(
        f"sw.{decorator} received {name} under {transform}, which would lose its writes to the model.", hint=hint
    )


def _transform(fn: object) -> str | None:
    """Returns the JAX transform that made a callable, if it is one that passes a copy of the model to the function."""
    return _transforms().get(_made_by(fn)) if fn is not None else None


def _made_by(fn: object) -> Any:
    """Returns what distinguishes the callables of one transform from others: their type and their shared code."""
    if not isinstance(fn, types.FunctionType):
        return type(fn)
    # One wrapper may serve several transforms: the functions that it calls tell them apart, except the user's own.
    cells = [cell.cell_contents for cell in fn.__closure__ or () if cell != types.CellType()]
    calls = [cell for cell in cells if isinstance(cell, types.FunctionType) and cell is not vars(fn).get("__wrapped__")]
    return fn.__code__, tuple(called.__code__ for called in calls)


@functools.cache
def _transforms() -> dict[Any, str]:
    """Returns the transforms by what they make, determined by making one of each: no private JAX name is needed."""
    differentiating = (jax.grad, jax.value_and_grad, jax.jacfwd, jax.jacrev)
    transforms: tuple[Any, ...] = (jax.jit, jax.checkpoint, jax.vmap, *differentiating)
    return {_made_by(transform(lambda x: x)): f"jax.{transform.__name__}" for transform in transforms}


def kind_names(names: object, option: str, decorator: str) -> tuple[str, ...]:
    """Returns the names of kinds in an option of a decorator: one name, or several.

    Raises:
      DeclarationError: it contains something other than names, such as a type or a filter.
    """
    if isinstance(names, str):
        return (names,)
    listed: tuple[Any, ...] = (names,)
    if isinstance(names, Collection) and not isinstance(names, type | dict):
        listed = tuple(names)
    if all(isinstance(name, str) for name in listed):
        return listed
    wrong = next(name for name in listed if not isinstance(name, str))
    kinds = [_kind_of(name) for name in listed]
    if all(kinds):
        code = repr(kinds[0]) if len(kinds) == 1 else repr(tuple(kinds))
        hint = f"{option}={code}  # of the standard kinds; for your own kinds: print(plan)"
    else:
        hint = f"{option}='params'  # a kind's name: print(plan) shows them"
        if option == "wrt":
            hint += "\nor leave wrt out, for all kinds that have an optimizer in the plan"
    raise DeclarationError(
        f"sw.{decorator}({option}=...) takes names of kinds, not {_shown(wrong)}: the plan says which leaves a "
        "kind has.",
        hint=hint,
    )


def _kind_of(obj: object) -> str | None:
    """Returns the standard kind that a type, or a name, refers to."""
    if isinstance(obj, str):
        return obj
    if isinstance(obj, type) and issubclass(obj, nnx.Variable):
        # The standard filters look only at the type, so they can be evaluated on an empty instance.
        kinds = Kinds.standard()
        claims = claimants(kinds)((), object.__new__(obj))
        return claims[0] if claims and not kinds[claims[0]].rest else None
    return None


def _shown(obj: object) -> str:
    if isinstance(obj, type):
        return f"the type {as_code(obj) if issubclass(obj, nnx.Variable) else obj.__name__}"
    if obj is None or obj is ... or isinstance(obj, (bool, int, float)):
        return repr(obj)
    return f"a {type(obj).__name__}"


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_names(fn: Any) -> list[str]:
    """Returns the names of a function's positional parameters; none if they cannot be determined."""
    return [parameter.name for parameter in parameters_of(fn) or () if parameter.kind in _BY_POSITION]


def check_capacity(
    fn: Any, objects: int, args: Sequence[Any], name: str, types_of: Callable[[], Sequence[type]]
) -> None:
    """Checks that a function takes as many positional arguments as there are planned objects and arguments.

    Args:
      fn: the function.
      objects: the number of planned objects.
      args: the other arguments by position.
      name: the step's name.
      types_of: returns the types of the planned objects.
    """
    parameters = parameters_of(fn)
    if parameters is None or any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return
    own = positional_names(fn)
    if len(own) >= objects + len(args):
        return
    # The hint reuses the function's own names: the first for the first object, the rest for the arguments.
    rest = own[1:] if len(own) > len(args) else own
    words = "1 object" if objects == 1 else f"{objects} objects"
    more = f", and {len(args)} more" if args else ""
    firsts = _object_names(types_of(), own[0] if len(own) > len(args) else None, rest)
    others = [rest[index] if index < len(rest) else f"x{index}" if index else "x" for index in range(len(args))]
    called = called_as(name, "f")
    raise StructureError(
        f"{name} takes {len(own)} positional argument{'s' * (len(own) != 1)}; it must take the plan's {words} "
        f"first{more}.",
        hint=f"def {called}({', '.join([*firsts, *others])}): ...",
    )


def _object_names(types_: Sequence[type], first: str | None, taken: Sequence[str]) -> list[str]:
    """Returns parameter names for the planned objects: the function's own name for the first, then names by type."""
    names: list[str] = []
    for position, cls in enumerate(types_):
        snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        names.append(unused_name(snake_case if position else first or "model", [*names, *taken]))
    return names
