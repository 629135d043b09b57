"""What runs the suite in each mode: its parts exist, its results are kept, and the page has their table."""

from __future__ import annotations

from pathlib import Path

import pytest

import modes
import run_modes


def test_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run_modes.BEGIN}\nold\n{run_modes.END}\nafter\n", encoding="utf-8")
    names = ["flax 1, jax 1", "flax 2, jax 2"]
    results: dict[tuple[str, str], run_modes.Result | None] = {
        (mode, name): run_modes.Result(5, 0, {"no a|b": 2}, 1.0, commit="abc") for mode in modes.MODES for name in names
    }
    assert "Commit: abc.\n" in run_modes.table(results, ["tests/plan"])
    results["tree", names[0]] = run_modes.Result(4, 1, {}, 1.0, commit="def")
    results["sow-noop", names[0]] = None
    run_modes.write(run_modes.table(results, ["tests/plan"]), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| tree mode: `NNX_GRAPH_MODE=false` | 4 passed, 0 skipped, **1 failed** | 5 passed, 2 skipped |" in text
    assert "`NNX_SOW_CAPTURE_NOOP=true` | this Flax does not have it | 5 passed, 2 skipped |" in text
    assert "- no a\\|b: 2 in mode graph on flax 1; 2 in mode graph on flax 2" in text
    assert "What ran: `tests/plan`.\n\nWhat did not run: tests that take minutes, that " in text
    assert " that start processes, or that need a browser.\n" in text
    assert "; def (tree on flax 1).\n" in text
    assert ", or that take more than 0.2 seconds.\n" in run_modes.table(results, ["tests/plan"], 0.2)


def test_results_are_kept_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_modes, "KEPT", tmp_path / "modes.json")
    assert run_modes.kept(["tests/plan"], 0.0) == {}
    results = {("tree", "flax 1"): run_modes.Result(4, 1, {"no": 2}, 1.0, True, "abc"), ("sow-noop", "flax 1"): None}
    run_modes.keep(["tests/plan"], 0.0, results)
    assert run_modes.kept(["tests/plan"], 0.0) == results
    assert run_modes.kept(["tests/plan"], 0.2) == run_modes.kept(["tests/core"], 0.0) == {}


def test_a_later_call_runs_what_is_missing_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, page = [], tmp_path / "page.md"
    page.write_text(f"{run_modes.BEGIN}{run_modes.END}", encoding="utf-8")
    monkeypatch.setattr(run_modes, "KEPT", tmp_path / "modes.json")
    monkeypatch.setattr(
        run_modes, "asked", lambda python: {"name": "flax 1", "modes": ["graph", "tree", "ref", "dict"]}
    )
    monkeypatch.setattr(run_modes, "run", lambda python, mode, *_: ran.append(mode) or run_modes.Result(5, 0, {}, 1.0))
    write = run_modes.write
    monkeypatch.setattr(run_modes, "write", lambda text: write(text, page))
    before = {"graph": run_modes.Result(5, 0, {}, 1.0, True), "tree": run_modes.Result(4, 1, {}, 1.0, True)}
    before["ref"] = run_modes.Result(5, 0, {}, 1.0, demo=False)
    run_modes.keep(["tests/plan"], 0.0, {(mode, "flax 1"): result for mode, result in before.items()})
    call = ["--python", "python", "--resume", "--write", "tests/plan"]
    assert run_modes.main(call) == 0
    assert ran == ["tree", "ref", "dict"]
    assert run_modes.main(call) == 0
    assert ran == ["tree", "ref", "dict"]


def test_a_skip_has_its_reason_also_where_a_complete_file_is_skipped(tmp_path: Path) -> None:
    where = "('/tests/conftest.py', 138, 'Skipped: flax in mode ref: because')"
    cases = [
        "<testcase name='test_one'/>",
        "<testcase name='test_two'><skipped message='flax in mode ref: because'>tests:3</skipped></testcase>",
        f"<testcase name='tests.core.test_all'><skipped message='collection skipped'>{where}</skipped></testcase>",
        "<testcase name='test_three'><failure>no</failure></testcase>",
    ]
    (xml := tmp_path / "results.xml").write_text(f"<testsuite>{''.join(cases)}</testsuite>", encoding="utf-8")
    result = run_modes.read(xml, 1.0)
    assert (result.passed, result.failed) == (1, 1)
    assert result.skipped == {
        "flax in mode ref: because": 1,
        "all tests of tests.core.test_all, counted as one: flax in mode ref: because": 1,
    }


def test_every_file_and_test_of_the_fixed_part_exists() -> None:
    folder = Path(__file__).parent
    for each in (*run_modes.FIXED, *run_modes.PARTS):
        file, _, test = each.partition("[")[0].partition("::")
        assert (folder / file).exists()
        assert not test or f"def {test}(" in (folder / file).read_text(encoding="utf-8")


def test_the_page_has_the_table_of_the_results_that_are_kept() -> None:
    files = [f"tests/{part}" for part in run_modes.PARTS]
    results = run_modes.kept(files, 0.0)
    assert results
    assert all(result is None or result.passed > 1000 for result in results.values())
    page = run_modes.PAGE.read_text(encoding="utf-8").partition(run_modes.BEGIN)[2].partition(run_modes.END)[0]
    assert page.strip() == run_modes.table(results, files).strip()
