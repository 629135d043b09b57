"""What `compat` says of the trace that it is asked in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from statewise._src.common import compat

X = jnp.ones(2)
TRANSFORMS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "jit": lambda fn: jax.jit(fn)(X),
    "vmap": lambda fn: jax.vmap(fn)(X),
    "grad": lambda fn: jax.grad(lambda x: fn(x).sum())(X),
}


def imported_anew() -> Any:
    """The module, as a program imports it that uses a public name for the first time."""
    spec = importlib.util.spec_from_file_location("compat_again", compat.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_untraced_is_known_wherever_the_module_is_imported(name: str) -> None:
    """Otherwise no step of the process would donate its state any more, and nothing stale would be found."""
    found: list[tuple[Any, bool]] = []

    def fn(x: Any) -> Any:
        module = imported_anew()
        found.append((module, module.is_untraced()))
        return x * 1

    TRANSFORMS[name](fn)
    ((module, inside),) = found
    assert not inside
    assert module.is_untraced()
    with jax.set_mesh(jax.make_mesh((1,), ("d",))):
        assert module.is_untraced()
        with module.without_mesh():
            assert jax.sharding.get_abstract_mesh().empty
