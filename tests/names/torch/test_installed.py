"""What the tests of this directory compare with is there."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_it_is_installed(name: str) -> None:
    assert importlib.import_module(name).__version__
