"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

import ast
import importlib
import os
from typing import Any

__version__ = "0.1.0"


def _read_names() -> dict[str, str]:
    """Reads the list of public names, `__init__.pyi`: maps each name to the module that it is imported from."""
    with open(os.path.splitext(__file__)[0] + ".pyi", encoding="utf-8") as file:
        listing = ast.parse(file.read())
    imports = [node for node in listing.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_MODULE_OF = _read_names()
# Without the public modules, which are imported by their names.
__all__ = sorted(name for name, module in _MODULE_OF.items() if module != __name__)


# PEP 562: importing JAX and Flax takes seconds, which `statewise --help` should not.
def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_MODULE_OF, *(name for name in globals() if name.startswith("__"))})
