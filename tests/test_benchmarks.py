"""The benchmark suite on tiny models: rivals compute what ours does, and results become tables.  No time is tested."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is run from the checkout, not installed

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import machine, report, targets  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.compare import WrongResultError, check, compare  # noqa: E402
from benchmarks.measure import Settings, interleave, quartiles  # noqa: E402
from benchmarks.plot import curves, write_plot  # noqa: E402
from benchmarks.styles import OURS, STYLES, why_not  # noqa: E402
from benchmarks.workloads import (  # noqa: E402
    WORKLOADS,
    alone,
    disk,
    first,
    grow,
    look,
    memory,
    names,
    options,
    serve,
    start,
    together,
    train,
)

pytestmark = pytest.mark.heavy

TINY = Settings.tiny()
needs_equinox = pytest.mark.skipif(importlib.util.find_spec("equinox") is None, reason="equinox is missing")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")

# By name: the case, and which rivals run it here; a benchmark runs and checks them all.
CASES: dict[str, tuple[Callable[[], Case], Sequence[str]]] = {
    "many_small": (lambda: train.many_small_case(1), tuple(STYLES)),
    "noop": (lambda: serve.noop_case(4), tuple(STYLES)),
    "leaves": (lambda: grow.sweep_case(4), tuple(STYLES)),
    "few_large": (lambda: train.few_large_case((8, 8)), (OURS, "nnx.jit_partial")),
    "decode": (lambda: serve.decode_case(8, 1, length=8), (OURS, "equinox")),
    "rl": (serve.rl_case, (OURS, "by-hand")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rival_computes_what_ours_does(name: str) -> None:
    make, names = CASES[name]
    found = compare(make(), TINY, key=name, title=name, names=names)  # raises where one computes something else
    rows = {row["key"]: row for row in found["rows"]}
    assert set(rows) == set(names)
    for key, row in rows.items():
        if why_not(key, make()):
            assert "available" in row["skipped"]
            continue
        assert row["difference"] <= make().tolerance
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
        assert row["first_call_s"] > 0
    assert rows[OURS]["ratio"] == 1


def test_published_weights_are_what_they_were() -> None:
    (found,) = names.names(TINY)  # raises where something else came back
    assert [row["key"] for row in found["rows"]] == [names.REFERENCE, names.AS_IT_IS, names.TURNED, names.BYTES]


def test_what_is_read_from_disks_and_stores_is_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "DELAY", 0.0)
    saved, *restored = disk.disk(TINY)  # raises where something else came back
    ways = [row["key"] for row in saved["rows"]]
    assert {disk.OURS, disk.ALONE, "orbax", "orbax-v1"} <= set(ways)
    assert [table["key"] for table in restored[:2]] == ["disk_warm", "disk_cold"]
    for table in restored[:2]:
        assert [row["key"] for row in table["rows"]] == ways
    for table in restored[2:]:  # none where there is no emulator
        assert [row["key"] for row in table["rows"]] == [disk.OURS, disk.ORBAX_STORE]


@needs_equinox
@pytest.mark.parametrize(
    "make",
    [lambda: train.resnet_case((2, 4), 1, size=4, batch=4), lambda: train.transformer_case(8, 1, 0.0, 2, length=4)],
    ids=["resnet", "transformer"],
)
def test_twins_have_the_same_loss(make: Callable[[], Case]) -> None:
    case = make()
    batch: list[jax.Array] = []
    case.loop(lambda _: lambda *args: batch.extend(args))()
    loss, twin = case.programs["train"].fn, case.programs["train"].eqx
    assert twin is not None
    assert case.eqx is not None
    build_twin = case.eqx.build

    @jax.jit  # all in one: compiling the initialisers one by one takes longer than the models
    def losses(*batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = case.build()
        return twin(*build_twin(model), *batch)[0], loss(model, *batch)

    found, expected = losses(*batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_on_a_mesh(devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "FEW", (OURS, "by-hand", "nnx.jit"))
    (table,) = train.mesh(TINY, blocks=1)
    assert [row["key"] for row in table["rows"] if "median_s" in row] == [OURS, "by-hand", "nnx.jit"]


def test_many_caches_over_one_set_of_weights() -> None:
    table = serve.many_caches(serve.decode_case(8, 1, length=8), TINY, conversations=2)
    assert [row["key"] for row in table["rows"]] == ["many-states", "replace", "by-hand", "nnx.jit_partial"]
    assert max(row["difference"] for row in table["rows"]) < 1e-5


def test_scan_computes_what_single_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.workloads import loops

    monkeypatch.setattr(loops, "many_small_case", lambda blocks: train.many_small_case(1))
    (table,) = loops.scan(TINY, steps=2)
    assert {row["key"] for row in table["rows"]} == set(loops.LABELS)


def test_options_of_a_train_step_change_no_loss() -> None:
    ways = ("plain", "skip", "measure", "packed-measure")
    table = options.options_table("small", "one block", train.many_small_case(1), ways, TINY)
    assert [row["key"] for row in table["rows"]] == [*ways, *options.RIVALS]
    assert max(row["difference"] for row in table["rows"]) < 1e-5


def test_growth_and_looking() -> None:
    steps, restarts = grow.small_kind(TINY, counts=(12, 20))
    assert steps["facts"]["counts"] == restarts["facts"]["counts"] == [12, 20]
    assert {row["key"] for row in steps["rows"]} >= {f"nnx.jit_partial-{count}" for count in (12, 20)}
    assert [table["key"] for table in look.look(TINY, leaves=120)] == [
        "look_plan",
        "look_select",
        "look_split",
        "look_census",
        "look_take",
        "look_put",
        "look_build",
    ]


def test_the_start_of_a_program() -> None:
    tables = start.start(TINY, blocks=1)
    assert [table["key"] for table in tables] == ["start_import", "start_first", "start_whole"]
    for table in tables[1:]:
        assert {row["key"] for row in table["rows"]} == {"statewise", "by-hand", "statewise-cold", "by-hand-cold"}
    assert all(row["median_s"] > 0 for table in tables for row in table["rows"])


def test_each_way_in_a_process_of_its_own() -> None:
    tables = alone.alone(TINY, depth=1)
    assert [table["key"] for table in tables] == list(alone.CASES)
    for table in tables:
        assert [row["key"] for row in table["rows"]] == list(alone.CASES[table["key"]].ways)
        assert all(row["median_s"] > 0 and row["samples"] == 1 for row in table["rows"])
        assert table["reference"] == table["rows"][0]["key"]


def test_the_first_call_in_turns() -> None:
    tables = first.first(TINY, blocks=1)
    assert [table["key"] for table in tables] == ["first_lowered", "first_whole"]
    lowered, whole = ({row["key"]: row for row in table["rows"]} for table in tables)
    assert list(lowered) == list(whole) == list(first.WAYS)
    assert all(row["median_s"] > 0 and row["samples"] == 2 for row in (*lowered.values(), *whole.values()))
    assert lowered["statewise"]["ratio"] == whole["statewise"]["ratio"] == 1.0


def test_several_processes_restore_what_they_saved() -> None:
    ways = ("statewise-1", "statewise-2", "apart-2", "orbax-2")
    tables = together.together(TINY, ways)  # raises where something else came back
    assert [table["key"] for table in tables] == ["together_small_save", "together_small_restore"]
    assert all(row["median_s"] > 0 for table in tables for row in table["rows"])


def test_memory_of_one_way() -> None:
    found = memory.child("by-hand", "large", 8)
    assert len(found["losses"]) == memory.STEPS
    assert found["compiled_bytes"] > 8 * 8 * 8 * 4 * 3  # eight square layers, and two moments of each
    assert found["losses"] == pytest.approx(memory.child("statewise-shared", "large", 8)["losses"], abs=1e-5)


# --- checking and measuring ------------------------------------------------------------------------------------


def test_a_wrong_result_stops_the_run() -> None:
    assert check("rival", [np.float32(200)], [np.float32(200.1)], 1e-3) < 1e-3
    with pytest.raises(WrongResultError, match=r"rival differs from Statewise by 0\.5"):
        check("rival", [1.0, 0.5], [1.0, 1.0], 1e-3)
    with pytest.raises(WrongResultError, match="no finite numbers"):
        check("rival", [np.nan], [np.nan], 1e-3)
    with pytest.raises(WrongResultError, match="call 1"):
        check("rival", [np.zeros(2)], [np.zeros(3)], 1e-3)


def test_samples_come_from_the_same_rounds() -> None:
    made: list[str] = []
    samples = interleave({name: lambda name=name: made.append(name) for name in "ab"}, TINY)
    assert {name: len(found) for name, found in samples.items()} == {"a": 2, "b": 2}
    assert made[:6] == ["a"] * 3 + ["b"] * 3  # warming up
    assert all(sorted(made[start : start + 2]) == ["a", "b"] for start in (6, 8))
    assert quartiles([1.0]) == (1.0, 1.0, 1.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


# --- results ---------------------------------------------------------------------------------------------------


def row(key: str, seconds: float, **more: Any) -> dict[str, Any]:
    numbers = {"median_s": seconds, "q1_s": seconds, "q3_s": seconds, "samples": 3, "difference": 0.0}
    return {"key": key, "label": f"`{key}`", **numbers, "ratio": seconds, "ratio_q1": 1.0, "ratio_q3": 2.0, **more}


def run(key: str, rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    table = {"key": key, "title": "A title", "per": "step", "reference": OURS, "facts": facts, "rows": rows}
    about = {"machine": {"cpu": "a cpu", "cores": 2, "memory_gib": 8.0, "system": "Linux", "load_before": 0.1}}
    return {"title": key, **about, "versions": {"jax": "1"}, "when": "today", "seconds": 1.0, "tables": [table]}


def test_several_processes_give_medians() -> None:
    runs = [run("many_small", [row(OURS, value, first_call_s=value)]) for value in (1.0, 5.0, 2.0)]
    merged = report.merge("many_small", runs, quick=False)
    (found,) = merged["tables"][0]["rows"]
    assert (found["median_s"], found["first_call_s"], found["samples"]) == (2.0, 2.0, 9)
    assert found["process_medians_s"] == [1.0, 5.0, 2.0]
    assert merged["processes"] == 3
    assert merged["loads_before"] == [0.1, 0.1, 0.1]
    assert json.loads(json.dumps(merged)) == merged


def test_a_table_says_what_was_left_out() -> None:
    rows = [row("nnx.jit", 2e-3), row(OURS, 1e-6), {"key": "equinox", "label": "Equinox", "skipped": "no twin"}]
    text = report.markdown(run("many_small", rows)["tables"][0])
    lines = text.splitlines()
    assert lines[0] == "| for one step | median | interquartile range | ratio to the first row |"
    assert lines[2].startswith("| `statewise` | 1 µs |")
    assert lines[3].startswith("| `nnx.jit` | 2 ms |")
    assert lines[-1] == "Left out: Equinox: no twin."
    shown = report.show(report.merge("many_small", [run("many_small", rows)], quick=True))
    assert "left out: Equinox: no twin" in shown


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    page = docs / "performance.md"
    page.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n", encoding="utf-8")
    with pytest.raises(ValueError, match="there are no results"):
        report.write_docs(results, docs)
    made = run("many_small", [row(OURS, 1.0, first_call_s=1.0), row("nnx.jit", 7.0), row("by-hand", 0.9)])
    merged = report.merge("many_small", [made], quick=True)
    (results / "many_small.json").write_text(json.dumps(merged), encoding="utf-8")
    for _ in range(2):  # writing it again changes nothing
        assert report.write_docs(results, docs) == [page]
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# Before\n")
        assert text.endswith("After\n")
        assert "old" not in text
        assert text.count("A title") == 1
    assert "A quick run" in text
    assert "`nnx.jit` over ours | 6 | 7.00 times | reached |" in text
    assert "by hand over ours | more than 1 | 0.90 times | **not reached** |" in text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lost its marks"):
        report.write_docs(results, docs)
    (results / "odd.json").write_text('{"schema": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.json has schema 0"):
        report.write_docs(results, docs)


def test_the_oldest_libraries_have_columns_of_their_own(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    for folder in (docs, results / report.OLDEST):
        folder.mkdir(parents=True)
    page = docs / "performance.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    for folder, python, seconds in ((results, "3.13", 7.0), (results / report.OLDEST, "3.11", 3.0)):
        made = run("many_small", [row(OURS, 1.0), row("nnx.jit", seconds)]) | {"versions": {"python": python}}
        text = json.dumps(report.merge("many_small", [made], quick=False))
        (folder / "many_small.json").write_text(text, encoding="utf-8")
    report.write_docs(results, docs)
    text = page.read_text(encoding="utf-8")
    assert "| what | target | newest libraries | | oldest libraries | |" in text
    assert "`nnx.jit` over ours | 6 | 7.00 times | reached | 3.00 times | **not reached** |" in text
    assert text.index("python 3.13") < text.index("oldest libraries below") < text.index("python 3.11")
    assert text.count("## many_small") == 1


def test_the_page_says_when_and_of_which_commits_results_were_taken(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    for folder in (docs, results):
        folder.mkdir()
    page = docs / "performance.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    about = {"noop": ("2026-02-01", "abc"), "rl": ("2026-01-01", "abc+"), "many_small": ("2026-03-01", None)}
    for name, (when, commit) in about.items():
        made = run(name, [row(OURS, 1.0)]) | {"when": when} | ({"commit": commit} if commit else {})
        (results / f"{name}.json").write_text(json.dumps(report.merge(name, [made], quick=False)), encoding="utf-8")
    report.write_docs(results, docs)
    text = page.read_text(encoding="utf-8")
    assert "\n2026-01-01 to 2026-03-01; commits abc, abc+; load average" in text


def test_ways_are_made_in_one_order_and_its_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for number in range(4):
        monkeypatch.setenv(machine.RUN, str(number))
        orders.append(machine.order("abcdef"))
    assert all(sorted(found) == list("abcdef") for found in orders)
    assert orders[1] == orders[0][::-1]
    assert orders[3] == orders[2][::-1]


def test_packing_pays_from_so_many_steps() -> None:
    def rows(packed_first: float, packed: float) -> list[dict[str, Any]]:
        ours = row(OURS, 2e-3, first_call_s=1.0)
        return [ours, row("statewise-packed", packed, first_call_s=packed_first)]

    found = {
        name: report.merge(name, [run(name, rows(first, median))], quick=True)
        for name, first, median in (("one", 3.0, 1e-3), ("two", 0.5, 1e-3), ("three", 3.0, 2.5e-3))
    }
    lines = targets.packing_pays(found).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["2,000 steps", "the first step", "never"]


def test_a_target_without_its_number_says_so() -> None:
    lines = targets.targets_markdown({}).splitlines()
    assert len(lines) == 2 + len(targets.TARGETS)
    assert all("not measured" in line for line in lines[2:])


def test_a_row_without_a_target_has_no_verdict() -> None:
    found = {"scan": run("scan", [row("by-hand", 8.0), row("packed-scan", 1.0), row("by-hand-buffer-scan", 2.0)])}
    lines = targets.targets_markdown(found).splitlines()
    assert "| the same, packed | 8 | 8.00 times | reached |" in lines
    assert "| the same, the loop by hand on one flat buffer, which is the limit | none | 4.00 times | |" in lines


@needs_matplotlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib itself imports
def test_the_plot_is_svg_and_the_same_each_time(tmp_path: Path) -> None:
    tables = [run("x", [row(OURS, 1e-4 * n), row("nnx.jit", 1e-3 * n)], leaves=n)["tables"][0] for n in (20, 200)]
    result = {"tables": tables[::-1]}
    assert curves(result)["nnx.jit"] == ("nnx.jit", [(20, 0.02), (200, 0.2)])
    files = [tmp_path / name for name in ("one.svg", "two.svg")]
    for file in files:
        write_plot(result, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert xml.etree.ElementTree.parse(files[0]).getroot().tag.endswith("svg")


def test_what_is_committed_has_the_schema() -> None:
    folder = ROOT / "benchmarks" / "results"
    committed = [*report.load(folder).items(), *report.load(folder / report.OLDEST).items()]
    assert committed
    for name, result in committed:
        assert name in WORKLOADS
        assert not result["quick"]
        assert {"machine", "versions", "when", "device", "seconds", "tables"} <= set(result)
        for table in result["tables"]:
            assert {"key", "title", "per", "reference", "facts", "rows"} == set(table)
            assert table["reference"] in {row["key"] for row in table["rows"]}
    assert report.BEGIN in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_the_command_line_knows_every_workload() -> None:
    assert set(command.PLANNED) == set(WORKLOADS)
    with pytest.raises(SystemExit):
        command.main(["--only", "nonsense"])
