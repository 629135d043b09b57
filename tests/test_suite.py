"""The suite itself: its directories are the packages, markers follow directories, and a worker's memory is watched."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flax import nnx

import quick
import statewise as sw
import worker_memory

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "statewise"
# Beside the packages: what they share, what holds across them, and what runs programs, pages or examples.
OTHERS = {"docs", "equivalence", "examples", "golden", "helpers", "laws", "processes", "typing"}


def test_directories_are_the_packages() -> None:
    packages = {file.parent.name for file in (SOURCE / "_src").glob("*/__init__.py")} | {"cli"}
    directories = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= directories
    assert directories <= packages | OTHERS


def test_helpers_hold_no_tests() -> None:
    assert list((TESTS / "helpers").rglob("test_*.py")) == []


@pytest.mark.parametrize("marker", ["docs", "processes", "browser", "equivalence"])
def test_a_directory_marks_its_tests(marker: str, pytestconfig: pytest.Config) -> None:
    assert [path for path in TESTS.rglob(marker) if list(path.glob("test_*.py"))]
    assert any(line.startswith(f"{marker}:") for line in pytestconfig.getini("markers"))


def test_a_test_has_the_markers_of_its_directories_only(request: pytest.FixtureRequest) -> None:
    names = {mark.name for mark in request.node.iter_markers()}
    assert names == set()
    # By the text: what this run has collected may be one file.
    by_hand = re.compile(r"pytest\.mark\.(docs|processes|browser|equivalence)\b")
    assert {path.name for path in TESTS.rglob("*.py") if by_hand.search(path.read_text(encoding="utf-8"))} == set()


def test_a_test_that_takes_its_worker_over_the_limit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_memory, "reported", worker_memory.LIMIT)
    monkeypatch.setattr(worker_memory, "peak", lambda: worker_memory.LIMIT)
    worker_memory.after_test("test_small.py::test_a", last_of_file=True)
    monkeypatch.setattr(worker_memory, "peak", lambda: worker_memory.LIMIT + 1)
    with pytest.raises(MemoryError, match=r"this worker held 2\.0 GB at most, .* after test_large\.py::test_b"):
        worker_memory.after_test("test_large.py::test_b", last_of_file=False)
    worker_memory.after_test("test_small.py::test_c", last_of_file=True)  # it added nothing
    monkeypatch.setattr(worker_memory, "peak", lambda: worker_memory.LIMIT + 200_000_000)
    with pytest.raises(MemoryError, match=r"this worker held 2\.2 GB at most"):
        worker_memory.after_test("test_large.py::test_d", last_of_file=False)


def test_checking_types_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    """Saving goes on in other threads, while Hypothesis may be drawing an example of the next test."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = random.getstate()
    sw.save(tmp_path / "checkpoint", sw.plan(model).take(model))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("last_of_file", "above"),
    [(True, worker_memory.CLEAR_ABOVE), (False, worker_memory.CLEAR_WITHIN_FILE_ABOVE)],
)
def test_caches_are_cleared_where_a_worker_holds_much(
    monkeypatch: pytest.MonkeyPatch, last_of_file: bool, above: int
) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(worker_memory, "peak", lambda: 0)
    for held in (above, above + 1):
        monkeypatch.setattr(worker_memory, "clear", lambda held=held: cleared.append(held))
        monkeypatch.setattr(worker_memory, "resident", lambda held=held: held)
        worker_memory.after_test("test_file.py::test_a", last_of_file=last_of_file)
    assert cleared == [above + 1]


def test_a_quick_run_leaves_out_what_took_long_until_that_is_long_ago(tmp_path: Path) -> None:
    file, slow = tmp_path / "times.json", tmp_path / "slow.txt"
    file.write_text('{"slow": 1.2, "fast": 0.5, "f[measured]": 0.1}')
    slow.write_text("3.0 f\n")
    times = quick.Times(1.0, file, slow)
    known = {"slow": True, "fast": False, "new": False, "f[a b]": True, "f": True, "f[measured]": False}
    assert {name: times.is_slow(name) for name in known} == known
    times.measured = {"fast": 2.0, "new": 0.1}
    times.pytest_sessionfinish(cast(pytest.Session, SimpleNamespace(config=SimpleNamespace())))
    assert json.loads(file.read_text()) == {"f[measured]": 0.1, "fast": 2.0, "new": 0.1, "slow": 0.96}
    assert not quick.Times(1.0, file, slow).is_slow("slow")
    assert quick.Times(0.9, file, slow).is_slow("slow")
    assert not quick.Times(4.0, tmp_path / "none.json", slow).is_slow("f")


def test_a_test_that_was_left_out_comes_back(tmp_path: Path) -> None:
    file, slow = tmp_path / "times.json", tmp_path / "slow.txt"
    slow.write_text("1.2 tests/test_a.py::f\n")
    item: Any = type("Item", (), {"nodeid": "tests/test_a.py::f[x]", "path": quick.TESTS / "step" / "test_a.py"})()
    left_out: list[Any] = []
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)))
    for expected in ([item], []):
        times = quick.Times(1.0, file, slow)
        left_out.clear()
        times.pytest_collection_modifyitems(config, [item])
        assert left_out == expected
        times.measured = {"tests/test_b.py::g": 0.1}
        times.pytest_sessionfinish(cast(pytest.Session, SimpleNamespace(config=SimpleNamespace())))


def test_the_first_quick_run_knows_what_is_slow(tmp_path: Path) -> None:
    """The list is brought up to date from pytest's results, and every file in it exists."""
    results, slow = tmp_path / "results.xml", tmp_path / "slow.txt"
    case = '<testcase classname="{}" name="{}" time="{}" />'
    cases = (
        ("tests.test_suite", "test_a[x y]", 1.5),
        ("tests.test_suite", "test_a[z]", 0.5),
        ("tests.test_suite", "test_b", 0.1),
        ("tests.step.test_step.A", "b", 2),
        ("", "README.md", 2),
    )
    results.write_text(f"<testsuite>{''.join(case.format(*each) for each in cases)}</testsuite>")
    assert quick.mean_times(results) == {
        "tests/step/test_step.py::A::b": 2.0,
        "tests/test_suite.py::test_a": 1.0,
        "tests/test_suite.py::test_b": 0.1,
    }
    did_not_run = f"tests/test_suite.py::{test_a_test_that_was_left_out_comes_back.__name__}"
    gone = ("tests/gone.py::test_a", "tests/test_suite.py::test_gone")
    slow.write_text("".join(f"4.0 {name}\n" for name in (did_not_run, *gone, "tests/test_suite.py::test_b")))
    quick.update(results, slow)
    assert quick.listed(slow) == {
        "tests/step/test_step.py::A::b": 2.0,
        "tests/test_suite.py::test_a": 1.0,
        did_not_run: 4.0,
    }
    known = quick.listed()
    assert not {name for name in known if not (quick.TESTS.parent / name.partition("::")[0]).exists()}
    assert len(known) > 100
