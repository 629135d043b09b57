"""Functions of `models_eqx` by name, looked up when they are called: Equinox may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["twin"]


def twin(name: str) -> Callable[..., Any]:
    """The function of that name."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module("benchmarks.models_eqx"), name)(*args)

    return call
