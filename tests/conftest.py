"""The test room: eight fake CPU devices, no rank promotion, types checked at run time, warnings are errors, hints that
are code are Python.

(That warnings are errors stands in pyproject.toml, so that it holds while test files are imported too.)
"""

from __future__ import annotations

import os

# Both are read once, when jax is imported: nothing above these lines may import it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import runtime_types

# Annotations of the package are checked while tests run: an import hook, in place before statewise is imported.
runtime_types.check_package()

import jax
import pytest
from hypothesis import settings

from hints import check_hints_of
from statewise._src.inspect.lint.finding import Finding
from statewise.errors import StatewiseError, StatewiseWarning

runtime_types.open_public_boundary()

jax.config.update("jax_numpy_rank_promotion", "raise")

# A hint that looks like code and is not Python fails the test that meets it.
for made in (StatewiseError, StatewiseWarning, Finding):
    check_hints_of(made)

# Compilation makes the first example of a property slow and the next ones fast: a deadline would only flicker.
# CI draws the same examples every time; elsewhere each run looks at new ones.
settings.register_profile("statewise", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("statewise")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight fake CPU devices."""
    found = jax.devices()
    assert len(found) == 8, "jax was imported before tests/conftest.py could set XLA_FLAGS"
    return found
