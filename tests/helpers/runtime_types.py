"""The run-time type checker, for everything but what users pass.

Annotations of public functions say what they take, for editors and type checkers; that other things are refused with
an error that helps is for the functions themselves to do, and for tests to see.  So of public functions and methods
only the result is checked, and of everything else the arguments too.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import beartype._check.code.codemain as checks
from beartype import BeartypeConf, beartype
from beartype.claw import beartype_package

# With the numeric tower an int is a float, as it is for the static checkers.
CONF = BeartypeConf(is_pep484_tower=True)


def check_package() -> None:
    """Has every annotation checked of what is imported from now on: an import hook, so statewise is imported later."""
    assert "statewise" not in sys.modules, "the hook sees only what is imported after it"
    # Of a list, one item is checked, drawn by Python's global generator.  A thread that saves in the background would
    # so draw from it while Hypothesis, which forbids that, makes an example: the checks get a generator of their own.
    assert checks.getrandbits is random.getrandbits
    checks.getrandbits = random.Random(0).getrandbits
    beartype_package("statewise", conf=CONF)


def open_public_boundary() -> None:
    """Leaves the arguments of public functions and methods to the functions themselves."""
    import statewise

    for module in pkgutil.walk_packages(statewise.__path__, "statewise."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "statewise"]
    listed = [(statewise, name) for name in statewise.__all__]
    listed += [(statewise.results, name) for name in statewise.results.__all__]
    for holder, name in listed:
        thing = getattr(holder, name)
        if isinstance(thing, types.FunctionType):
            opened = _only_result(thing)
            for module in modules:
                for alias in [alias for alias, value in vars(module).items() if value is thing]:
                    setattr(module, alias, opened)
        elif isinstance(thing, type) and not issubclass(thing, BaseException):
            for cls, attribute, method in _methods(thing):
                setattr(cls, attribute, _only_result(method))


def _methods(public: type) -> Iterator[tuple[type, str, types.FunctionType]]:
    """Every method of a class, those of its bases in statewise included; but for names with one underscore."""
    for cls in public.__mro__:
        if cls.__module__.startswith("statewise"):
            for name, value in list(vars(cls).items()):
                if isinstance(value, types.FunctionType) and (name.startswith("__") or not name.startswith("_")):
                    yield cls, name, value


def _only_result(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function under the checker's wrapper, wrapped so that its result alone is checked."""
    plain = getattr(checked, "__wrapped__", None)
    if not isinstance(plain, types.FunctionType):
        return checked
    annotations = plain.__annotations__
    try:
        # `Self` means nothing to the checker outside of the class, which it has decorated already.
        result = annotations.get("return", Any)
        plain.__annotations__ = {} if "Self" in str(result) else {"return": result}
        opened = beartype(conf=CONF)(plain)
    finally:
        plain.__annotations__ = annotations
    opened.__annotations__ = annotations
    return opened
