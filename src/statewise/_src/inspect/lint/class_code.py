"""What the code of a class refers to: read from its bytecode, so that nothing runs and no source is needed.

Only names that are known without running anything count: globals, variables of an enclosing function, and attributes of
modules (`nnx.pop`).  What is computed, imported inside a function or reached through an object is unknown and left out,
so a rule that reads this may miss something, but does not see what is not there.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dis
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from statewise._src.common.codes import codes_in

__all__ = ["Call", "FunctionCode", "functions_of"]

_NAMES = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})  # the second one exists in Python 3.11 only


# What to look for: the name of a method, or a function.
Wanted = Collection[str | Callable[..., Any]]


class Call(NamedTuple):
    """A call of a method or a function, with the first of its arguments.

    Attributes:
      name: the name of the method or function.
      type: the class that is passed before the first text; None if that is unknown.
      text: the first text that is passed; None if there is none, or if it is computed.
    """

    name: str
    type: type | None
    text: str | None


class FunctionCode(NamedTuple):
    """The code of one function of a class, with the functions inside it.

    Attributes:
      name: the function's qualified name.
      objects: the modules, classes and functions that it refers to.
      calls: its calls of the methods and functions that were asked for.
      texts: its constants that are texts, with the names of the arguments that it passes by name.
    """

    name: str
    objects: tuple[Any, ...]
    calls: tuple[Call, ...]
    texts: frozenset[str]


def functions_of(cls: type, wanted: Wanted) -> tuple[FunctionCode, ...]:
    """Returns the code of the functions of a class and its bases, with their calls of some methods and functions.

    A method that another one replaces is left out, unless that one refers to `super`.
    """
    functions = dict[types.FunctionType, None]()
    replaced: set[str] = set()
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if name not in replaced:
                own = dict.fromkeys(_functions_in(value))
                functions |= own
                if not any("super" in code.co_names for function in own for code in codes_in(function.__code__)):
                    replaced.add(name)
    return tuple(_read(function, wanted) for function in functions)


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Yields the Python functions in an attribute of a class, be it a method, a property, or a decorated method."""
    for candidate in (value.fget, value.fset) if isinstance(value, property) else (value,):
        if isinstance(candidate, classmethod):  # which is not callable by itself
            candidate = candidate.__func__
        if isinstance(candidate, type) or not callable(candidate):
            continue
        try:
            function = inspect.unwrap(candidate)  # `nnx.jit` and others keep the function as functools.wraps does
        except ValueError:  # a chain of decorators that is a circle
            continue
        if isinstance(function, types.FunctionType):
            yield function


def _read(function: types.FunctionType, wanted: Wanted) -> FunctionCode:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    # The cell of a name that has no value yet raises when its contents are read; it equals an empty one.
    scope = function.__globals__ | {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    objects, calls, texts = list[Any](), list[Call](), set[str]()
    for code in codes_in(function.__code__):
        objects += _objects_in(code, scope)
        calls += _calls_in(code, scope, wanted)
        for const in code.co_consts:  # the names of arguments are a tuple
            texts.update(text for text in (const if isinstance(const, tuple) else [const]) if isinstance(text, str))
    return FunctionCode(function.__qualname__, tuple(objects), tuple(calls), frozenset(texts))


def _loaded(code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[dis.Instruction, Any]]:
    """Yields each instruction with the object that it loads; None if that is unknown, or nothing is loaded."""
    latest = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in _NAMES:
            latest = scope.get(instruction.argval)
        elif instruction.opname in _ATTRIBUTES:
            latest = vars(latest).get(instruction.argval) if isinstance(latest, types.ModuleType) else None
        elif instruction.opname not in ("EXTENDED_ARG", "CACHE"):
            latest = None
        yield instruction, latest


def _objects_in(code: types.CodeType, scope: Mapping[str, Any]) -> list[Any]:
    kinds = types.ModuleType | types.FunctionType | type
    return [value for _, value in _loaded(code, scope) if isinstance(value, kinds)]


def _calls_in(code: types.CodeType, scope: Mapping[str, Any], wanted: Wanted) -> Iterator[Call]:
    """Yields the calls; one inside the arguments of another hides the rest of the other's."""
    name, class_, is_first = "", None, False
    for instruction, value in _loaded(code, scope):
        text = instruction.argval if instruction.opname == "LOAD_CONST" else None
        target = instruction.argval if instruction.opname in _ATTRIBUTES and value is None else value
        if isinstance(target, str | types.FunctionType) and target in wanted:
            name, class_, is_first = target if isinstance(target, str) else target.__name__, None, True
        elif not name or instruction.opname in ("EXTENDED_ARG", "CACHE", "PUSH_NULL"):
            continue
        elif isinstance(text, str) and not (is_first and name == "sow"):
            yield Call(name, class_, text)
            name = ""
        elif instruction.opname.startswith("CALL"):
            yield Call(name, class_, None)
            name = ""
        else:  # a text that `sow` gets before the name is the name of a type
            class_ = value if isinstance(value, type) and class_ is None else class_
            is_first = False
