"""A step's arguments: which are static, which are donated, and by which names and positions they are passed.

`jax.jit` counts a function's parameters by position or by name.  A step's function takes the planned objects first,
where the caller passes one state.  Positions given by the user count the function's own parameters.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax

from statewise.errors import DeclarationError, StructureError

__all__ = [
    "Args",
    "Arguments",
    "Bound",
    "JitOptions",
    "Kwargs",
    "Split",
    "chosen_parameters",
    "merged",
    "parameters_of",
    "unused_name",
    "with_shape",
]


class JitOptions(TypedDict, total=False):
    """The options of `jax.jit` that a step takes, of the types that `jax.jit` takes."""

    static_argnames: str | Iterable[str] | None
    static_argnums: int | Sequence[int] | None
    donate_argnames: str | Iterable[str] | None
    donate_argnums: int | Sequence[int] | None
    in_shardings: Any
    out_shardings: Any
    compiler_options: dict[str, Any] | None
    keep_unused: bool
    inline: bool
    backend: str | None
    device: jax.Device | None


_CHOICES = frozenset({"static_argnames", "static_argnums", "donate_argnames", "donate_argnums"})
_OPTIONS = JitOptions.__optional_keys__ - _CHOICES  # passed to `jax.jit` as they are


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Split(NamedTuple):
    """Arguments, separated by how they are passed.

    Attributes:
      args: the positional arguments, with None for those taken out.
      kwargs: the keyword arguments, likewise.
      donated: the donated arguments, by position or name.
      static: the static arguments, by position or name.
    """

    args: Args
    kwargs: Kwargs
    donated: dict[int | str, Any]
    static: dict[int | str, Any]


class Arguments:
    """The handling of a step's arguments: which are passed to its compiled function, and how.

    Args:
      fn: the user's function.
      options: `jax.jit`'s options as the user gave them.
      in_parts: whether the step splits its arguments into microbatches.

    Raises:
      DeclarationError: an option that `jax.jit` does not have, or a parameter that the function does not have.
    """

    def __init__(self, fn: Callable[..., Any], options: Mapping[str, Any], in_parts: bool = False) -> None:
        unknown = sorted(set(options) - _OPTIONS - _CHOICES)
        if unknown:
            raise DeclarationError(
                f"A step does not take the option {unknown[0]!r}.",
                hint="one of: " + ", ".join(sorted(_OPTIONS | _CHOICES)),
            )
        self.static = chosen_parameters(fn, options, "static")
        self.donated = chosen_parameters(fn, options, "donate")
        # By position; and the name of `*rest`, which takes every further position.
        self.names, self.rest = _positions_of(parameters_of(fn) or ())
        self.jit_options = {name: value for name, value in options.items() if name in _OPTIONS}
        if "in_shardings" in options and (self.static or self.donated):
            raise DeclarationError(
                "in_shardings cannot be combined with static or donated arguments.",
                hint="jax.device_put the arguments, and leave in_shardings out",
            )
        self.plain = not self.static and not self.donated
        self.in_parts = in_parts

    def split(self, args: Args, kwargs: Kwargs, objects: int) -> Split:
        """Takes static and donated arguments out; `objects` is the number of planned objects."""
        if self.plain:
            return Split(args, kwargs, {}, {})
        rest_args, rest_kwargs = list(args), dict(kwargs)
        donated: dict[int | str, Any] = {}
        static: dict[int | str, Any] = {}
        for chosen, taken in ((self.static, static), (self.donated, donated)):
            for position in range(len(args)):
                # The user counts the function's own parameters, so the planned objects come first.
                if chosen & {position + objects, self._name(position + objects)}:
                    taken[position] = args[position]
                    rest_args[position] = None
            for name in kwargs:
                if name in chosen:
                    taken[name] = kwargs[name]
                    rest_kwargs[name] = None
        return Split(tuple(rest_args), rest_kwargs, donated, static)

    def name_of(self, place: int | str, objects: int) -> str:
        """Returns an argument's name, given its name or its position after that many objects."""
        return place if isinstance(place, str) else self._name(place + objects) or f"number {place}"

    def named(self, args: Args, kwargs: Kwargs, objects: int) -> Iterator[tuple[str, Any]]:
        """Yields the arguments with their names."""
        yield from ((self.name_of(position, objects), value) for position, value in enumerate(args))
        yield from kwargs.items()

    def _name(self, position: int) -> str | None:
        return self.names[position] if position < len(self.names) else self.rest

    def unhashable(self, static: Iterable[tuple[int | str, object]], objects: int) -> StructureError:
        """Returns the error for static arguments, one of which cannot be hashed."""
        for place, value in static:
            try:
                hash(value)
            except TypeError:
                name = self.name_of(place, objects)
                break
        return StructureError(
            f"The static argument {name} is a {type(value).__name__}, which cannot be hashed.",
            hint="a tuple instead of a list, a frozen dataclass instead of a dict; or make the argument not static",
        )

    def jit(self, program: Callable[..., Any], donate: bool = True, written: Any = None) -> jax.stages.Wrapped:
        """Compiles a program (donated, donated arguments, read_only, args, kwargs) -> (written, output).

        Args:
          program: the function.
          donate: whether the buffers of donated arrays are passed on to the program.
          written: the shardings of the written arrays; None leaves them to XLA.
        """
        options = dict(self.jit_options)
        # The user's shardings are of the output and of the arguments; the program returns and takes more than these.
        if written is not None or "out_shardings" in options:
            options["out_shardings"] = (written, options.get("out_shardings"))
        if "in_shardings" in options:
            options["in_shardings"] = (None, None, None, options["in_shardings"], None)
        return jax.jit(program, donate_argnums=(0, 1) if donate else (), **options)


def merged(args: Args, kwargs: Kwargs, taken: dict[int | str, Any]) -> tuple[Args, Kwargs]:
    """Puts arguments that were taken out back at their positions and names."""
    if not taken:
        return args, kwargs
    full_args, full_kwargs = list(args), dict(kwargs)
    for place, value in taken.items():
        if isinstance(place, int):
            full_args[place] = value
        else:
            full_kwargs[place] = value
    return tuple(full_args), full_kwargs


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A function with its static arguments bound.

    Attributes:
      fn: the function.
      static: the arguments, by position after the objects or by name.
      objects: the number of planned objects that the function takes first.
      names: the name of each static argument.
    """

    fn: Callable[..., Any]
    static: dict[int | str, Any]
    objects: int
    names: dict[int | str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        full_args, full_kwargs = merged(args[self.objects :], kwargs, self.static)
        return self.fn(*args[: self.objects], *full_args, **full_kwargs)


def parameters_of(fn: Any) -> list[inspect.Parameter] | None:
    """Returns a function's parameters, bound ones too; None if they cannot be determined."""
    try:
        return list(inspect.signature(fn.fn if isinstance(fn, Bound) else fn).parameters.values())
    except (TypeError, ValueError):
        return None  # a builtin without a signature


def _positions_of(parameters: Iterable[inspect.Parameter]) -> tuple[tuple[str, ...], str | None]:
    """Returns the names of parameters by position, up to `*rest`, and the name of that one, if there is one."""
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(names), parameter.name
        names.append(parameter.name)
    return tuple(names), None


def chosen_parameters(fn: Callable[..., Any], options: Mapping[str, Any], which: str) -> frozenset[Any]:
    """Returns the names of the parameters in `which_argnames` and `which_argnums`; positions if names are unknown.

    Raises:
      DeclarationError: the function does not have such a parameter.
    """
    parameters = parameters_of(fn) or []
    names = [parameter.name for parameter in parameters]
    chosen = set(_many(options.get(f"{which}_argnames")))
    numbers = set(_many(options.get(f"{which}_argnums")))
    if not names:
        return frozenset(chosen | numbers)
    positions, rest = _positions_of(parameters)
    takes_any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    missing = sorted(name for name in chosen if name not in names and not takes_any_name)
    missing += [
        str(number)
        for number in sorted(numbers)
        if not -len(names) <= number or (number >= len(names) and rest is None)
    ]
    if missing:
        raise DeclarationError(
            f"{which}: {getattr(fn, '__name__', fn)} has no parameter {missing[0]}.", hint="one of: " + ", ".join(names)
        )
    return frozenset(chosen | {names[number] if number < len(positions) else number for number in numbers})


def _many(given: Any) -> Iterable[Any]:
    if given is None:
        return ()
    return (given,) if isinstance(given, (str, int)) else tuple(given)


def with_shape(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns an argument's dtype with another shape, for a trace; a NumPy array has the dtype that JAX gives it."""
    type_ = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return jax.ShapeDtypeStruct(shape, type_.dtype, weak_type=getattr(type_, "weak_type", False))


def unused_name(name: str, taken: Collection[str]) -> str:
    """Returns a name for a parameter, with a number behind it if it is taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)
