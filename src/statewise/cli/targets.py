"""Finds the objects that the text of a target names.

`package.module:attribute` is imported, `file.py:attribute` is run.  Modules are found from the current directory, and
modules next to a file from the file's own.
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

__all__ = ["Target", "UsageError", "load", "one_line", "parse_mesh"]


class UsageError(Exception):
    """The command line makes no sense; the text is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Returns the text with its line breaks as spaces."""
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Target:
    """The object that a target's text names.

    Attributes:
      text: the text.
      module: the module that contains it.
      value: the attribute itself, uncalled.
    """

    text: str
    module: ModuleType
    value: Any

    def evaluated(
        self, is_value: Callable[[Any], bool], through: Callable[[Any], Any] | None = None, wanted: str = "the model"
    ) -> Any:
        """Returns the value, or the result of calling it if it is a function.

        Args:
          is_value: tells a wanted value from a function that makes one; a model is callable too.
          through: calls the function, if it should not be called directly.
          wanted: what the value is, for messages.

        Raises:
          UsageError: the function takes arguments, raises, or returns None; or it is neither a value nor a function.
        """
        if is_value(self.value):
            return self.value
        if not callable(self.value):
            is_of = f"{self.text} is {type(self.value).__name__}"
            raise UsageError(f"{is_of}, not a function that takes no arguments and returns {wanted}")
        _check_no_arguments(self.text, self.value, wanted)
        try:
            result = through(self.value) if through else self.value()
        except (Exception, SystemExit) as error:
            raise UsageError(f"{self.text}() raised {_named(error)}") from error
        if result is None:
            raise UsageError(f"{self.text}() returned None; is a return missing?")
        return result


def _check_no_arguments(text: str, factory: Callable[..., Any], wanted: str) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin without a signature: the call will show
        return
    try:
        signature.bind()
    except TypeError as error:
        kind = "class" if isinstance(factory, type) else "function"
        raise UsageError(
            f"{text} is a {kind} that needs arguments {signature}; name a function without any that returns {wanted}"
        ) from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Makes the modules in a folder importable within a block, which covers a factory's late imports."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def load(text: str, stack: contextlib.ExitStack) -> Target:
    """Finds the object that a text names.

    Args:
      text: `package.module:attribute` or `file.py:attribute`; the attribute may be dotted.
      stack: keeps the modules next to the target importable until it is closed.

    Raises:
      UsageError: the colon, the module, the file or the attribute is missing, or the module cannot be imported.

    Example:
      >>> import contextlib
      >>> from statewise.cli.targets import load
      >>> with contextlib.ExitStack() as stack:
      ...     load("string:ascii_lowercase", stack).value
      'abcdefghijklmnopqrstuvwxyz'
    """
    # At the last colon: a path on Windows has one of its own.
    place, colon, attribute = text.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{text!r} is not a target: write package.module:factory or file.py:factory")
    stack.enter_context(_importable(Path.cwd()))
    if place.endswith(".py") or os.sep in place:
        file = Path(place).resolve()
        if not file.is_file():
            raise UsageError(f"there is no file {place!r}")
        stack.enter_context(_importable(file.parent))
        module = _run_file(file)
    else:
        module = _import(place)
    value: Any = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise UsageError(f"{place!r} has no {attribute!r}{_hint(value, name)}")
        value = getattr(value, name)
    return Target(text, module, value)


def _hint(value: object, name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, dir(value), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"there is no module {error.name!r}, as seen from here") from error
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
        raise UsageError(f"{file.name!r} is not a Python file")
    # Run, not imported: a file need not be on the path, or have a name that can be imported.
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"the file {file.name!r} cannot be run: {_named(error)}") from error
    return module


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the axes of a mesh and their sizes: `data=16,model=8`.

    Raises:
      UsageError: the text does not have that form.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit() and int(size)):
            raise UsageError(f"{text!r} is not a mesh: write its axes and their sizes, data=16,model=8")
        if name in axes:
            raise UsageError(f"{text!r} is not a mesh: it has two axes {name!r}")
        axes[name] = int(size)
    return axes
