"""The command for a machine with an accelerator, on the CPU and on tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is run from the checkout, not installed

from benchmarks import accelerator  # noqa: E402
from benchmarks.compare import WrongResultError  # noqa: E402
from benchmarks.measure import Settings  # noqa: E402
from benchmarks.workloads import bfloat16  # noqa: E402

pytestmark = pytest.mark.heavy

TINY = Settings.tiny()


@pytest.fixture
def matmul_precision():
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


def test_the_command_for_accelerators_has_two_figures_of_correctness_in_each_row(
    tmp_path: Path, matmul_precision: None
) -> None:
    kept: list[dict[str, object]] = []
    result = accelerator.run(TINY, ["keep", "pinned", "decode_wide"], 600.0, kept.append)
    assert result["failures"] == []
    assert [table["key"] for table in result["tables"]] == ["keep_save", "keep_restore", "pinned", "decode_wide"]
    assert len(kept) == 3
    for table in result["tables"]:
        for row in table["rows"]:
            figures = {"elements_that_differ", "arrays_elsewhere"} & set(row) or {"difference", "difference_to_cpu"}
            assert figures <= set(row)
            assert len(figures) == 2


def test_microbatches_on_an_accelerator_give_the_losses_of_the_whole_batch() -> None:
    (table,) = bfloat16.microbatches(TINY)
    assert [row["key"] for row in table["rows"]] == list(bfloat16.WAYS)
    assert all(row["difference"] <= 2e-2 and row["difference_to_cpu"] == 0 for row in table["rows"])


def test_a_section_that_fails_is_written_down_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, matmul_precision: None
) -> None:
    def broken(settings: Settings) -> list[dict[str, object]]:
        raise WrongResultError("the device differs from the CPU by 3")

    sections = {"broken": broken, "keep": accelerator.keep}
    monkeypatch.setattr(accelerator, "SECTIONS", sections)
    kept: list[dict[str, object]] = []
    result = accelerator.run(TINY, ["broken", "keep"], 600.0, kept.append)
    assert [failure["section"] for failure in result["failures"]] == ["broken"]
    assert "differs from the CPU by 3" in result["failures"][0]["error"]
    assert [table["key"] for table in result["tables"]] == ["keep_save", "keep_restore"]


def test_no_section_starts_after_the_budget(matmul_precision: None) -> None:
    result = accelerator.run(TINY, ["keep"], -1.0, lambda found: None)
    assert result["tables"] == []
    assert result["failures"][0]["error"].startswith("not started")


def test_a_save_that_is_read_back_differently_stops_the_benchmark() -> None:
    expected = [np.zeros(3)]
    with pytest.raises(WrongResultError, match="1 elements differ"):
        accelerator._checked(TINY, {"save": lambda: "path"}, expected, {"save": lambda path: [np.array([0.0, 1, 0])]})
