"""Hints that are applied: their code is taken from the error itself and run, with a test's own names in reach."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import code_of

COMMON = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "nnx": nnx, "optax": optax, "sw": sw}


def hint_of(error: type[BaseException], program: Callable[[], Any], having: str = "") -> str:
    """Runs a program that has to fail, and returns the first code of its error's hint that holds the words `having`."""
    with pytest.raises(error) as caught:
        program()
    return code_of(caught.value, having)


def run(code: str, **names: Any) -> dict[str, Any]:
    """Runs statements; returns all names that are there afterwards."""
    scope = {**COMMON, **names}
    exec(code, scope)
    return scope


def value(code: str, **names: Any) -> Any:
    """The value of an expression."""
    return eval(code.strip(), {**COMMON, **names})


def options(code: str, **names: Any) -> dict[str, Any]:
    """Keyword arguments, as they stand in a call."""
    given: dict[str, Any] = eval(f"dict({code}\n)", {**COMMON, **names})
    return given


def decorated(decorator: str, fn: Callable[..., Any], **names: Any) -> Any:
    """The function under a decorator that is given as text, in the place of those that it has."""
    return value(decorator.removeprefix("@"), **names)(inspect.unwrap(fn))
