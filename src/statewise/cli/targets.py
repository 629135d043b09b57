"""From the text of a target to the objects that it names.

`package.module:attribute` is imported, `file.py:attribute` is run; modules are found from the current directory, a
file's neighbours from the file's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Target", "UsageError", "importable", "load", "one_line"]


class UsageError(Exception):
    """What was asked for makes no sense; the text is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """The text with its line breaks as spaces."""
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Target:
    """What a target's text names.

    Attributes:
      text: the text.
      module: the module that it stands in.
      value: the attribute itself, uncalled.
    """

    text: str
    module: ModuleType
    value: Any

    def made(self, is_value: Callable[[Any], bool], through: Callable[[Any], Any] | None = None) -> Any:
        """The value, or what it makes where it is a function.

        Args:
          is_value: whether a thing is what is wanted rather than a function that makes it; a model can be called too.
          through: what calls the function, if it is not to be called directly.

        Raises:
          UsageError: the function takes arguments, raises, or returns nothing; the thing is neither.
        """
        if is_value(self.value):
            return self.value
        if not callable(self.value):
            raise UsageError(f"{self.text} is {type(self.value).__name__}, not a function that takes no arguments")
        _check_no_arguments(self.text, self.value)
        try:
            made = through(self.value) if through else self.value()
        except (Exception, SystemExit) as error:
            raise UsageError(f"{self.text}() raised {_named(error)}") from error
        if made is None:
            raise UsageError(f"{self.text}() returned None; does it lack a return?")
        return made


def _check_no_arguments(text: str, factory: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin that tells no signature: the call will show
        return
    try:
        signature.bind()
    except TypeError as error:
        kind = "class" if isinstance(factory, type) else "function"
        raise UsageError(
            f"{text} is a {kind} that needs arguments {signature}; name a function without, that returns the model"
        ) from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules in the folder can be imported; what a factory imports late, too, as long as this lasts."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def load(text: str, stack: contextlib.ExitStack) -> Target:
    """Finds what a text names.

    Args:
      text: `package.module:attribute` or `file.py:attribute`; the attribute may be dotted.
      stack: keeps the target's neighbours importable until it is closed.

    Raises:
      UsageError: no colon, no such module, file or attribute, or a module that cannot be imported.

    Example:
      >>> import contextlib
      >>> from statewise.cli.targets import load
      >>> with contextlib.ExitStack() as stack:
      ...     load("string:ascii_lowercase", stack).value
      'abcdefghijklmnopqrstuvwxyz'
    """
    place, colon, attribute = text.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{text!r} is no target: write package.module:factory or file.py:factory")
    stack.enter_context(importable(Path.cwd()))
    if place.endswith(".py") or os.sep in place:
        file = Path(place).resolve()
        if not file.is_file():
            raise UsageError(f"there is no file {place!r}")
        stack.enter_context(importable(file.parent))
        module = _run_file(file)
    else:
        module = _import(place)
    value: Any = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise UsageError(f"{place!r} has no {attribute!r}{_hint(value, name)}")
        value = getattr(value, name)
    return Target(text, module, value)


def _hint(thing: Any, name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, dir(thing), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"there is no module {error.name!r}, seen from here") from error
        raise UsageError(f"the module {name!r} cannot be imported: {_named(error)}") from error


def _run_file(file: Path) -> ModuleType:
    name = file.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    if known is not None or name in sys.stdlib_module_names:
        name = f"statewise_target_{name}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file.name!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"the file {file.name!r} cannot be run: {_named(error)}") from error
    return module
