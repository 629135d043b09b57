"""What one process says when another one fails or ends, by the step that they had come to.

tests/processes has real ones; here the answers of the others are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import statewise as sw
from refusals import refused
from statewise._src.checkpoint.together import agreed, agreed_token, together

RESTART = "the logs of the other processes; then restart all of them, on as many as there are"
ENDED = "another process has ended or cannot be reached: Connection closed"


def answers(monkeypatch: pytest.MonkeyPatch, failed: Sequence[bool] | None) -> None:
    """Has the processes answer whether they have failed; for None, they do not answer."""

    def gathered(_: object) -> np.ndarray:
        if failed is None:
            raise RuntimeError("Connection closed.\nand its trace")
        return np.asarray(failed)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda values: values if failed else gathered(values))


def here(is_complete: Callable[[], bool] | None = None) -> None:
    """Does in this process what does not fail."""
    with together("run", is_complete):
        pass


def test_one_process_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, None)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    here()
    assert agreed(1, 2) == [1, 2]


def test_what_is_not_written_yet_could_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [False, False])
    here()
    answers(monkeypatch, [False, True])
    said = "run could not be written: process 1 has failed, and its own error says why."
    with refused(sw.SaveError, said, hint="the log of process 1"):
        here()
    answers(monkeypatch, None)
    with refused(sw.SaveError, f"run could not be written: {ENDED}.", hint=RESTART):
        here()


def test_what_may_be_complete_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = "It is not known whether run is complete: "
    asks = "sw.inspect('run') says whether it is; "
    answers(monkeypatch, None)
    with refused(sw.SaveError, f"run is complete, but {ENDED}.", hint=RESTART):
        here(lambda: True)
    with refused(sw.SaveError, f"{unknown}{ENDED}.", hint=f"{asks}{RESTART}"):
        here(lambda: False)
    answers(monkeypatch, [True, False])
    said = f"{unknown}process 0 has failed, and its own error says why."
    with refused(sw.SaveError, said, hint=f"{asks}the log of process 0"):
        here(lambda: True)  # it may be another writer's


def test_a_failure_that_no_other_process_hears_of_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, None)
    with pytest.raises(OSError, match="full") as caught, together("run"):
        raise OSError("full")
    assert caught.value.__notes__ == ["The other processes do not know of it: Connection closed.\nand its trace"]


def test_numbers_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [True])
    assert agreed(5, 2**32 - 1) == [5, 2**32 - 1]
    assert len(agreed_token()) == 16
    answers(monkeypatch, None)
    with refused(sw.SaveError, f"No checkpoint could be written: {ENDED}.", hint=RESTART):
        agreed_token()
