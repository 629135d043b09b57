"""The scripts in tests/golden that made the checkpoints there: tests build the same models with them."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> types.ModuleType:
    """Returns the script of this name as a module."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
