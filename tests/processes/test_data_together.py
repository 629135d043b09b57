"""Each of several processes has an iterator of its own; another number of them goes on where Grain allows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import statewise as sw
from iterators import drawn, elastic
from programs import data_together
from programs.save_together import make
from refusals import refused
from started import started

START = "2 processes again; or leave out data=, and start the data at the step: dataset[step * batch_size :]"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have saved; they have restored it, and what this process has saved."""
    folder = tmp_path_factory.mktemp("together") / "run"
    iterator = elastic()
    drawn(iterator, 3)
    with sw.Checkpoints(folder / "one") as checkpoints:
        checkpoints.save(1, sw.plan(make()).take(make()), data=iterator)
    with started("data_together.py", folder, 2) as running:
        running.check_ended_well()
        (folder / "then.json").write_text(
            json.dumps([json.loads(re.search(r"then (\[.*\])", running.said(number))[1]) for number in range(2)])
        )
    return folder


@pytest.mark.parametrize(("name", "interface"), [pair for pair in data_together.SAVED if pair[0] != "elastic"])
def test_each_process_has_its_own_file_and_one_process_is_refused(saved: Path, name: str, interface: str) -> None:
    data = saved / f"{name}.{interface}" / "1" / "data"
    found = {file.name for file in data.iterdir() if file.name.startswith("process")}
    assert found == {f"process_{number}-of-2.{kind}" for number in range(2) for kind in ("json", "statewise")}
    message = (
        "The data of step 1 were saved by 2 processes, not by 1. Each position is of the part that one process had."
    )
    plan = sw.plan(make())
    with sw.Checkpoints(saved / f"{name}.{interface}") as checkpoints:
        with refused(sw.RestoreError, message, hint=START):
            checkpoints.restore(plan.abstract(), data=data_together.PIPELINES[name]())
        assert checkpoints.restore(plan.abstract()).report.ok


def test_an_elastic_iterator_of_two_processes_goes_on_in_one(saved: Path) -> None:
    iterator, expected = elastic(), elastic()
    drawn(expected, 3)
    with sw.Checkpoints(saved / "elastic.new") as checkpoints:
        checkpoints.restore(sw.plan(make()).abstract(), data=iterator)
    assert drawn(iterator, 100) == drawn(expected, 100)


def test_an_elastic_iterator_of_one_process_goes_on_in_two(saved: Path) -> None:
    expected = elastic()
    drawn(expected, 3)
    batches = json.loads((saved / "then.json").read_text())
    assert [len(batch) for batch in batches] == [2, 2]
    assert sorted([*batches[0], *batches[1]]) == sorted(next(iter(expected)).tolist())
