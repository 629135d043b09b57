"""Set-up of every test run: eight fake CPU devices, no rank promotion, types checked at run time, and hints that are
code are checked to be Python.

Warnings are errors too; pyproject.toml says so, which covers the import of test files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Both are read once, when jax is imported: nothing above these lines may import it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Where `make` has JAX keep what it compiled, for all workers; the programs that tests start have none.  Workers inherit
# the environment of the process that loaded this file first, which has taken JAX's own variable out of it.
COMPILED = os.environ.pop("JAX_COMPILATION_CACHE_DIR", "") or os.environ.get("STATEWISE_COMPILED", "")
os.environ["STATEWISE_COMPILED"] = COMPILED

import runtime_types

# Annotations of the package are checked while tests run: an import hook, in place before statewise is imported.
runtime_types.check_package()

import jax
import pytest
import rich.style  # noqa: F401 - it draws a random number on import, which Hypothesis forbids inside a strategy
from flax import nnx
from hypothesis import settings

import modes
import plain_states
import quick
import worker_memory
from hints import check_hints_of
from statewise._src.inspect.lint.finding import Finding
from statewise.errors import StatewiseError, StatewiseWarning
from stores import gcs, gcs_proxy, proxy, s3, s3_proxy, store_writers, stores  # noqa: F401 - fixtures

runtime_types.open_public_boundary()
modes.start()

if plain_states.IS_DICT:
    plain_states.install()

TESTS = Path(__file__).parent
# Directories whose tests a run can leave out: `-m "not processes"`.
MARKED = {
    "docs": "the site, and every example in docstrings and on pages",
    "processes": "starts processes: several at once, killed ones, whole programs",
    "browser": "needs a Chromium",
    "torch": "needs torch, transformers and peft, and is left out unless asked for: `make test-torch`",
    "equivalence": "trains models beside plain NNX and compares every number",
}
# Directories that are not about what a compiled program computes.  Most of their time goes into compiling, and it takes
# a sixth less without XLA's expensive optimizations; all others compile as users do.
COMPILED_FAST = {"checkpoint", "cli", "common", "core", "filters", "inspect", "names", "plan", "report", "sharding"}
# Fixtures of the servers on loopback: tests that ask for one are `heavy`.
STORES = {"stores", "gcs", "s3"}
QUICK_EXAMPLES = 10  # of each property, under `--hypothesis-profile=quick`
CI_EXAMPLES = 16

jax.config.update("jax_numpy_rank_promotion", "raise")
FAST_EVERYWHERE = jax.config.read("jax_disable_most_optimizations")
if COMPILED:
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A hint that looks like code and is not Python fails the test that meets it.
for made in (StatewiseError, StatewiseWarning, Finding):
    check_hints_of(made)

# Compilation makes the first example of a property slow and the next ones fast: a deadline would only flicker.
# CI draws the same examples every time, and more of them would find nothing new; elsewhere each run looks at others.
settings.register_profile("statewise", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("statewise"), derandomize=True, max_examples=CI_EXAMPLES)
# A quick run draws the same ones too, so that what it compiled is in JAX's cache the next time.
settings.register_profile("quick", settings.get_profile("statewise"), derandomize=True, max_examples=QUICK_EXAMPLES)
settings.load_profile("ci" if "CI" in os.environ else "statewise")


def pytest_configure(config: pytest.Config) -> None:
    """Registers a marker for each directory in `MARKED`."""
    for folder, why in MARKED.items():
        config.addinivalue_line("markers", f"{folder}: {why}")
    limit = config.getoption("--quick")
    if limit is not None:
        config.pluginmanager.register(quick.Times(limit), "quick-times")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--quick`: what `make quick` asks for."""
    parser.addoption(
        "--quick", type=float, metavar="SECONDS", help="leave out tests that took longer in their last run"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test by the directory that it is in, and those that ask for a server."""
    few = config.getoption("--hypothesis-profile") == "quick"
    for item in items:
        for folder in MARKED.keys() & set(item.path.relative_to(TESTS).parts[:-1]):
            item.add_marker(folder)
        if STORES & set(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")
        if few:
            draw_few_examples(item)


def draw_few_examples(item: pytest.Item) -> None:
    """Holds a property that sets its own number of examples to that of the quick profile too."""
    function = getattr(item, "obj", None)
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if own is not None and own.max_examples > QUICK_EXAMPLES:
        function._hypothesis_internal_use_settings = settings(own, max_examples=QUICK_EXAMPLES)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out files that need torch where it is not installed."""
    needs_torch = "torch" in collection_path.relative_to(TESTS.parent).parts
    return True if needs_torch and importlib.util.find_spec("torch") is None else None


class FileInAMode(pytest.Module):
    """A test file that is skipped if its import does what Flax itself refuses in the mode of this run."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Imports the file, and returns its tests."""
        try:
            return super().collect()
        except Exception as error:
            reason = modes.refused_by_flax(error)
            if not reason:
                raise
            pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collects test files in a mode of Flax other than the default."""
    return None if modes.current() == "graph" else FileInAMode.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Skips a test that is about what the mode of this run changes in Flax, or whose fixtures do what Flax refuses."""
    fast = FAST_EVERYWHERE or item.path.relative_to(TESTS).parts[0] in COMPILED_FAST
    fast = fast and item.get_closest_marker("optimized") is None
    if fast != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # two programs that a test compares are compiled alike
        jax.config.update("jax_disable_most_optimizations", fast)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(fast))  # programs that it starts too
    changed = modes.changed_by_flax(item.nodeid)
    if changed:
        pytest.skip(changed)
    yield from skipped_if_flax_refuses()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test that does what Flax itself refuses in the mode of this run."""
    yield from skipped_if_flax_refuses()


def skipped_if_flax_refuses() -> Iterator[None]:
    """Runs the rest of a hook; turns an error that `modes.REFUSALS` lists into a skip with its reason."""
    try:
        yield
    except Exception as error:
        reason = modes.refused_by_flax(error)
        if not reason:
            raise
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Keeps a worker's memory under 2 GB by clearing caches, mostly between files."""
    yield
    last_of_file = nextitem is None or nextitem.path != item.path
    worker_memory.after_test(item.nodeid, last_of_file=last_of_file)


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight fake CPU devices."""
    found = jax.devices()
    assert len(found) == 8, "jax was imported before tests/conftest.py could set XLA_FLAGS"
    return found


@pytest.fixture
def plain_variables() -> Iterator[None]:
    """Plain Variables, in every mode."""
    with nnx.var_defaults(hijax=False, ref=False):
        yield


@pytest.fixture(params=[False, True])
def hijax(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Plain Variables, then hijax ones, in every mode."""
    with nnx.var_defaults(hijax=request.param, ref=False):
        yield request.param


@pytest.fixture(params=["nnx.State", "dict"])
def container(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """What Flax gives leaves in: an `nnx.State` as today, and the dict that is announced."""
    if request.param == "nnx.State" and plain_states.IS_DICT:
        pytest.skip("a test of nnx.State, which a Flax that returns plain dicts does not make")
    if request.param == "dict" and not plain_states.IS_DICT:
        for name, function in list(plain_states.functions()):
            monkeypatch.setattr(nnx, name, function)
    return type(nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
