"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

import ast
import importlib
import os
from typing import Any

__version__ = "0.1.0"


def _read_names() -> dict[str, str]:
    """Reads the list of public names, `__init__.pyi`: maps each name to the module that defines it."""
    with open(os.path.splitext(__file__)[0] + ".pyi", encoding="utf-8") as file:
        listing = ast.parse(file.read())
    imports = [node for node in listing.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports if node.module != "statewise" for alias in node.names}


_MODULE_OF = _read_names()
__all__ = sorted(_MODULE_OF)


# PEP 562: importing JAX and Flax takes seconds, which `statewise --help` should not.
def __getattr__(name: str) -> Any:
    if name in ("errors", "results", "testing"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
