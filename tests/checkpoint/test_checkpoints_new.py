"""`sw.Checkpoints` on Orbax's newer interface: what only that one has.  What both have is in test_checkpoints.py."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import orbax.checkpoint as ocp

import statewise as sw
from checkpoint_models import numbered
from refusals import refused

NEW = ocp.v1.training.Checkpointer


class Counter:
    """An object that saves and loads itself, as Orbax's newer interface has it."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def save(self, directory: Any) -> Any:
        text = str(self.count)

        async def written() -> None:
            ((await directory.await_creation()) / "count").write_text(text)

        return written()

    async def load(self, directory: Any) -> Any:
        async def loaded() -> None:
            self.count = int((directory / "count").read_text())

        return loaded()


def test_what_saves_itself_is_an_extra_item_of_the_newer_interface(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path, options=NEW) as checkpoints:
        checkpoints.save(1, numbered(1), counter=Counter(5))
        counter = Counter(0)
        assert checkpoints.restore(numbered(0), extra={"counter": counter}).extra == {"counter": counter}
        assert counter.count == 5
        with refused(
            sw.SaveError,
            "metrics=0.5 is not a dict of numbers, which Orbax's newer interface needs.",
            hint="metrics={'loss': 0.5}, or another name",
        ):
            checkpoints.save(2, numbered(2), metrics=0.5)
        assert checkpoints.save(2, numbered(2), loss=0.5)


def test_the_newer_interface_is_opened_with_its_own_options(tmp_path: pathlib.Path) -> None:
    training = ocp.v1.training
    keeps = training.preservation_policies.EveryNSteps(2)
    names = ocp.v1.path.step.standard_name_format(step_prefix="at")
    options = functools.partial(NEW, preservation_policy=keeps, step_name_format=names)
    with sw.Checkpoints(tmp_path, options=options, every=3) as checkpoints:
        saved = [checkpoints.save(step, numbered(step)) for step in range(13)]
        checkpoints.wait()
        assert [step for step, done in enumerate(saved) if done] == [0, 3, 6, 9, 12]
        assert checkpoints.steps == (0, 6, 12)
        assert checkpoints.path() == tmp_path / "at_12" / "state"
        assert isinstance(checkpoints.manager, training.Checkpointer)
    with sw.Checkpoints(tmp_path / "two", options=NEW, max_to_keep=2) as checkpoints:
        for step in range(4):
            checkpoints.save(step, numbered(step))
        checkpoints.wait()
        assert checkpoints.steps == (2, 3)


def test_options_of_something_else_are_refused(tmp_path: pathlib.Path) -> None:
    wrong: Any = {"max_to_keep": 3}
    with refused(
        sw.SaveError,
        "options={'max_to_keep': 3} is neither an ocp.CheckpointManagerOptions nor ocp.v1.training.Checkpointer.",
        hint="options=ocp.CheckpointManagerOptions(max_to_keep=3), or "
        "functools.partial(ocp.v1.training.Checkpointer, preservation_policy=...)",
    ):
        sw.Checkpoints(tmp_path, options=wrong)
